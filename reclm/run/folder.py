"""The folder of a run: find an existing one, or claim a new one without overwriting anything."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from reclm.config import FIELDS, SECTIONS, Config, fixed_names
from reclm.data import histories
from reclm.data.dataset import Dataset
from reclm.errors import UserError
from reclm.run import dist
from reclm.run.checkpoint import epoch_files, load_checkpoint
from reclm.run.lock import LOCK, OWNER, FolderLock
from reclm.run.logger import say
from reclm.run.output import write_whole

ROOT = Path("runs")
LATEST = ROOT / "latest"


def chosen_dir(given: dict) -> Path:
    """The existing run folder for --eval_only: --out_dir, else the folder of the checkpoint whose path is
    --ckpt_name, else the run that runs/latest points to. Raises UserError if it does not exist."""
    ckpt = given.get("ckpt_name", "")
    if "out_dir" not in given and os.path.dirname(ckpt) and os.path.isfile(ckpt):
        return Path(ckpt).parent
    folder = settle(Path(given.get("out_dir") or LATEST))
    if not folder.is_dir():
        raise UserError(f"no run in {folder}: train first (--eval_only=false) or give the --out_dir of a run")
    return folder


def settle(folder: Path) -> Path:
    """The run that runs/latest points to now, since another run may start meanwhile; else the folder."""
    if folder != LATEST:
        return folder
    name = latest_name()
    return ROOT / name if name else folder


def latest_name() -> str | None:
    """The name of the run that runs/latest points to, as a link or, on file systems without links, as a text
    file; None if it is missing or something else, such as a copied folder."""
    if LATEST.is_symlink():
        return os.readlink(LATEST)
    if LATEST.is_file() and LATEST.stat().st_size < 1000:
        name = LATEST.read_text(errors="replace").strip()
        return name if name and Path(name).name == name and (ROOT / name).is_dir() else None
    return None


def find_resume(given: dict) -> tuple[dict | None, Path | None]:
    """(state, path) of the checkpoint to resume from; (None, None) for a new run; (None, folder) for a run
    that was stopped before its first checkpoint. Raises UserError if the file is missing or damaged."""
    resume = given.get("resume")
    if resume is None:
        return None, None
    if resume != "auto":
        if not Path(resume).is_file():
            raise UserError(f"--resume={resume}: no such file; use --resume=auto or the path of a .pth file")
        return continued(Path(resume), given)
    folder = settle(Path(given.get("out_dir") or LATEST))
    if not folder.is_dir():
        return None, None  # nothing to resume: the same command can start and restart a run
    last = folder / "last.pth"
    if last.is_file():
        return continued(last, given)
    others = [path.name for path in (last, folder / "best.pth", *epoch_files(folder)) if path.exists()]
    if others:
        raise UserError(
            f"--resume=auto: {last} is missing or not a file, but {others[-1]} is there: continue from a "
            f"checkpoint with --resume={folder / others[-1]}, or choose another --out_dir"
        )
    return None, folder


def continued(path: Path, given: dict) -> tuple[dict, Path]:
    """(state, path). Raises UserError for the last epoch of a run whose best one is not in the run folder."""
    state = load_checkpoint(path)
    epochs = (state["config"] | given).get("num_epochs", FIELDS["num_epochs"].default)
    best = Path(given.get("out_dir") or path.parent) / "best.pth"
    if state["progress"].get("epoch", 0) >= epochs and not best.is_file():
        raise UserError(
            f"--resume: {path} has all its {epochs} epochs, and {best} is missing: evaluate it with "
            f"--eval_only=true --ckpt_name={path}"
        )
    return state, path


@contextmanager
def claimed(cfg: Config, dataset: str, resumed: Path | None) -> Iterator[Path]:
    """The folder of this run in all processes, locked until the block ends, with the settings in config.yaml
    and runs/latest pointing to it. `resumed` is the path from find_resume. Raises UserError if another run
    uses the folder, or if it holds anything but the run to resume."""
    locks = []

    def claim() -> Path:
        folder = choose_dir(cfg, dataset, resumed)
        folder.mkdir(parents=True, exist_ok=True)
        locks.append(FolderLock(folder))
        write_whole(folder / "config.yaml", lambda path: path.write_text(dump_config(cfg)))
        if folder.parent == ROOT:
            point_latest(folder)
        return folder

    try:
        yield dist.on_main(claim)
    finally:
        for lock in locks:
            lock.release()


def choose_dir(cfg: Config, dataset: str, resumed: Path | None) -> Path:
    """The folder that this run may write to. Raises UserError."""
    if resumed is not None and cfg.run.out_dir is None:
        folder = resumed if resumed.is_dir() else resumed.parent
    elif cfg.run.out_dir is not None:
        folder = settle(Path(cfg.run.out_dir))
    else:
        return new_dir(f"{time.strftime('%Y%m%d-%H%M%S')}-{dataset}-{cfg.model.model_name}")
    held = folder.is_dir() and any(path.name not in (LOCK, OWNER) for path in folder.iterdir())
    if not held:
        return folder
    if resumed is None or folder not in (resumed, resumed.parent):
        raise UserError(
            f"--out_dir={cfg.run.out_dir} is not empty: "
            "continue its run with --resume=auto or choose another --out_dir"
        )
    if resumed.is_dir():  # stopped before its first checkpoint
        refuse_other_run(folder, cfg)
    elif resumed.name != "last.pth" and (folder / "last.pth").exists():
        raise UserError(f"--resume={resumed} would overwrite later epochs: choose another --out_dir")
    return folder


def refuse_other_run(folder: Path, cfg: Config) -> None:
    """Raises UserError unless config.yaml in the folder holds the settings of this run."""
    path, ours = folder / "config.yaml", cfg.flat()
    try:
        theirs = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        theirs = None
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        raise UserError(f"--out_dir={folder} is not empty and no run of this version: choose another one")
    for name in fixed_names(ours, "model", "data", "trajectory"):
        if theirs[name] != ours[name]:
            raise UserError(
                f"{path} has {name}={theirs[name]}, this run has {name}={ours[name]}: "
                "use the same settings, or a new run with another --out_dir"
            )


def new_dir(name: str) -> Path:
    """Create runs/<name>, or runs/<name>-2, -3, ... if another run started in the same second."""
    ROOT.mkdir(exist_ok=True)
    for number in range(1, 1000):
        folder = ROOT / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"there are 999 runs called runs/{name}: give an --out_dir")


def point_latest(folder: Path) -> None:
    """Make runs/latest point to the folder: a link, or a text file with its name where the file system has no
    links. A file or folder that is neither stays as it is, with a note."""
    if LATEST.exists() and latest_name() is None:
        say(f"NOTE: {LATEST} is not a link to a run and is left alone: name this run with --out_dir={folder}")
        return
    work = ROOT / f".latest-{os.getpid()}"
    work.unlink(missing_ok=True)
    try:
        work.symlink_to(folder.name)
    except OSError:
        work.write_text(folder.name)
    os.replace(work, LATEST)  # atomic: runs/latest exists at every moment


def evaluation_file(folder: Path, ckpt: Path, result: dict) -> Path:
    """eval-<checkpoint>.json, or eval-<checkpoint>-int4.json of the quantized model, with a number behind
    where that holds an evaluation with other settings or of other data, such as the file before it grew."""
    stem = f"eval-{ckpt.stem}" + (f"-{result['quantize']}" if result["quantize"] != "none" else "")
    for number in range(1, 1000):
        path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return path
        except (OSError, ValueError):
            continue  # not ours: it stays
        ours = {name: result[name] for name in ("config", "checkpoint", "fingerprint", "quantize")}
        if isinstance(found, dict) and ours == {name: found.get(name, ours[name]) for name in ours}:
            return path
    raise UserError(f"{folder} has 999 evaluations of {ckpt.name}: delete some, or give an --out_dir")


def dump_config(cfg: Config) -> str:
    """All settings but those of section `run`, as YAML that --config can read."""
    parts = []
    for section, cls in SECTIONS.items():
        if section not in ("run", "processes"):
            parts.append(f"# {cls.__doc__}\n" + yaml.safe_dump(vars(getattr(cfg, section)), sort_keys=False))
    return "\n".join(parts)


def keep_histories(out_dir: Path, dataset: Dataset) -> None:
    """Write histories.npz, from which scripts/recommend.py knows the users, unless it is there."""
    target = out_dir / histories.FILE
    if not dataset.grown and not dist.on_main(target.exists):
        dist.on_main(lambda: write_whole(target, lambda path: histories.write_histories(path, dataset)))
