"""The folder of a run: which one, may it be used, and what is said about it."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from reclm import dist
from reclm.checkpoint import load_checkpoint
from reclm.config import SECTIONS, Config, ModelConfig
from reclm.errors import UserError
from reclm.impressions import SHARES, SPLITS
from reclm.metrics import CUTOFFS

ROOT = Path("runs")
LATEST = ROOT / "latest"


def chosen_dir(said: dict) -> Path:
    """--out_dir, or the folder of a checkpoint given by its path, or the run that runs/latest points at.
    Raises UserError where there is none."""
    ckpt = Path(said.get("ckpt_name", ""))
    if "out_dir" not in said and len(ckpt.parts) > 1 and ckpt.is_file():
        return ckpt.parent
    folder = Path(said.get("out_dir") or LATEST)
    if not folder.is_dir():
        raise UserError(f"no run in {folder}: train first (--eval_only=false) or name an --out_dir")
    return settle(folder)


def settle(folder: Path) -> Path:
    """runs/latest -> the run it points at now; another may start while this one works."""
    return ROOT / os.readlink(folder) if folder == LATEST else folder


def find_resume(said: dict) -> tuple[dict | None, Path | None]:
    """(state, path) of the checkpoint to go on from; (None, None) for a new run, (None, folder) for a
    run that was to go on but had not saved anything yet. Raises UserError."""
    resume = said.get("resume")
    if resume is None:
        return None, None
    if resume != "auto":
        if not Path(resume).is_file():
            raise UserError(f"--resume={resume}: no such file; use --resume=auto or the path of a .pth")
        return load_checkpoint(Path(resume)), Path(resume)
    folder = Path(said.get("out_dir") or LATEST)
    if not folder.is_dir():
        return None, None  # nothing to go on from: the same command starts and restarts a run
    folder = settle(folder)
    last = folder / "last.pth"
    return (load_checkpoint(last), last) if last.is_file() else (None, folder)


def claim_dir(cfg: Config, dataset: str, resumed: Path | None) -> Path:
    """Make the folder of this run, write the resolved settings, point runs/latest at it.

    A folder that holds another run is never used. Raises UserError."""
    if resumed is not None and cfg.run.out_dir is None:
        folder = resumed if resumed.is_dir() else resumed.parent
    elif cfg.run.out_dir is not None:
        folder = settle(Path(cfg.run.out_dir))
    else:
        folder = new_dir(f"{time.strftime('%Y%m%d-%H%M%S')}-{dataset}-{cfg.model.model_name}")
    held = folder.is_dir() and any(folder.iterdir())
    if resumed is None or folder not in (resumed, resumed.parent):
        goes_on = False
    elif resumed.is_dir():  # killed before its first checkpoint: ours, if our settings lie there
        goes_on = (folder / "config.yaml").is_file()
    else:
        goes_on = True
        if resumed.name != "last.pth" and (folder / "last.pth").exists():
            raise UserError(f"{folder} has gone on after {resumed.name}: give this run its own --out_dir")
    if held and not goes_on:
        raise UserError(
            f"--out_dir={cfg.run.out_dir} is not empty and nothing there is overwritten: "
            "go on with --resume=auto or choose another --out_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(cfg))
    if folder.parent == ROOT:
        point_latest(folder)
    return folder


def new_dir(name: str) -> Path:
    """Create runs/<name>, with a number behind it where two runs start in the same second."""
    ROOT.mkdir(exist_ok=True)
    for number in range(1, 1000):
        folder = ROOT / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"too many runs called {name}")


def point_latest(folder: Path) -> None:
    work = ROOT / f".latest-{os.getpid()}"
    work.unlink(missing_ok=True)
    work.symlink_to(folder.name)
    os.replace(work, LATEST)  # never a moment without runs/latest


def dump_config(cfg: Config) -> str:
    """The resolved settings as YAML that --config reads again (without the folder of this run)."""
    parts = []
    for section, cls in SECTIONS.items():
        if section != "run":
            parts.append(f"# {cls.__doc__}\n" + yaml.safe_dump(vars(getattr(cfg, section)), sort_keys=False))
    return "\n".join(parts)


def describe_data(dataset, cfg: ModelConfig) -> str:
    """What is trained on, and what the model gets to know of it. Raises UserError."""
    notes = list(dataset.notes)
    if cfg.task == "ctr":
        return "\n".join([*describe_impressions(dataset), *(f"NOTE: {note}" for note in notes)])
    for name in ("request_time", "time_tokens", "time_head"):
        if getattr(cfg, name) not in (False, "none") and not len(dataset.timestamps):
            raise UserError(f"--{name} needs timestamps, but {dataset.name} has none: leave it out")
    if cfg.request_time:
        notes.append("the model knows the time of the item to predict (--request_time=true)")
    if cfg.model_name == "hstu" and not len(dataset.timestamps):
        notes.append("no timestamps in these data: the time bias of hstu is off")
    lines = [
        f"data: {dataset.name}, {dataset.num_users:,} users ({len(dataset.evaluated):,} evaluated), "
        f"{dataset.num_items:,} items, {len(dataset.item_ids):,} interactions",
        f"protocol: {dataset.protocol}",
    ]
    return "\n".join(lines + [f"NOTE: {note}" for note in notes])


def describe_impressions(dataset) -> list[str]:
    parts = []
    for split in SHARES:
        labels = dataset.labels[dataset.splits == SPLITS[split]]
        parts.append(f"{split} {len(labels):,} ({labels.mean():.1%} positive)")
    return [
        f"data: {dataset.name}, {dataset.num_users:,} users, {dataset.num_items:,} items, impressions to "
        + ", ".join(parts),
        f"protocol: {dataset.protocol}",
    ]


def describe_model(model: torch.nn.Module, num_steps: int, num_tokens: int) -> str:
    size = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    return (
        f"model: {model.cfg.model_name}, {size:,} parameters on {dist.world_size()} rank(s) of {device}; "
        f"an epoch is {num_steps} steps, {num_tokens:,} targets"
    )


def describe_run(cfg: Config, dataset) -> dict:
    """What a number needs beside it to be made again."""
    return {
        "dataset": dataset.name,
        "protocol": dataset.protocol,
        "notes": dataset.notes,
        "filter_seen": cfg.eval.filter_seen,
        "request_time": cfg.model.request_time,
        "num_users": len(dataset.evaluated),
        "num_items": dataset.num_items,
        "model_name": cfg.model.model_name,
        "loss": cfg.loss.loss,
        "seed": cfg.train.seed,
        "world_size": dist.world_size(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "command": " ".join(sys.argv),
        "machine": machine(),
    }


def machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {gpu}"


def commit() -> str:
    """Hash of the code's commit, "-dirty" when files differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if name.returncode:
        return "unknown"
    return name.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def format_epoch(row: dict[str, float]) -> str:
    is_ranking = "valid/HR@10" in row
    names, unit = (("HR@10", "NDCG@10"), "tokens") if is_ranking else (("AUC", "logloss"), "impressions")
    metrics = "  ".join(f"{name} {row[f'valid/{name}']:.4f}" for name in names if f"valid/{name}" in row)
    return (
        f"epoch {row['epoch']:3d}   loss {row['loss']:.4f}   valid {metrics}   "
        f"{row['train_seconds']:.1f} s + {row['eval_seconds']:.1f} s   "
        f"{row['tokens_per_second']:,.0f} {unit}/s"
    )


def format_metrics(title: str, metrics: dict[str, float], cfg: Config) -> str:
    """A small table: one column a cut-off."""
    if cfg.model.task == "ctr":
        return format_clicks(title, metrics)
    seen = "seen items left out" if cfg.eval.filter_seen else "seen items kept in"
    request = ", request time known" if cfg.model.request_time else ""
    rows = [f"\n{title} (all users x all items, {seen}{request})"]
    rows.append("K".rjust(8) + "".join(f"{k:>9}" for k in CUTOFFS))
    for name in ("HR", "NDCG"):
        rows.append(f"{name}@K".rjust(8) + "".join(f"{metrics[f'{name}@{k}']:9.4f}" for k in CUTOFFS))
    rows.append("MRR".rjust(8) + f"{metrics['MRR']:9.4f}")
    if "liked/users" in metrics:
        rows.append(
            f"the {metrics['liked/users']:,} users whose item is no negative feedback: "
            f"HR@10 {metrics['liked/HR@10']:.4f}  NDCG@10 {metrics['liked/NDCG@10']:.4f}"
        )
    if "cold/HR@10" in metrics:
        rows.append(
            f"among the items held out of training alone: "
            f"HR@10 {metrics['cold/HR@10']:.4f}  NDCG@10 {metrics['cold/NDCG@10']:.4f}"
        )
    if "time_NLL" in metrics:
        rows.append("log(1 + seconds) to it:        NLL      MAE")
        for what, key in (("model", ""), ("last gap", "_last_gap"), ("user's mean", "_user_mean")):
            values = (metrics[f"{name}{key}"] for name in ("time_NLL", "time_MAE"))
            rows.append(what.rjust(22) + "  " + "".join(f"{value:9.4f}" for value in values))
    return "\n".join(rows)


def format_clicks(title: str, metrics: dict[str, float]) -> str:
    rows = [f"\n{title} ({metrics['impressions']:,} impressions, {metrics['positives']:.1%} positive)"]
    for name in ("AUC", "GAUC", "logloss", "NE"):
        value = f"{metrics[name]:9.4f}" if name in metrics else "not defined: there is one class only"
        rows.append(f"{name:>8} {value}")
    if "GAUC" in metrics:
        rows[2] += f"   of {metrics['users of GAUC']:,} users with both classes"
    return "\n".join(rows)


def describe_files(out_dir: Path) -> str:
    names = {
        "checkpoints": "epoch_N.pth, best.pth, last.pth",
        "settings": "config.yaml",
        "result": "result.json",
        "every epoch": "metrics.jsonl",
        "curves": "curves.png",
        "TensorBoard": "tensorboard/ (tensorboard --logdir runs)",
    }
    return f"\nin {out_dir}/\n" + "\n".join(f"  {what:12} {name}" for what, name in names.items())
