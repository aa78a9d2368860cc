"""Texts about a run (its data, model and metrics), and the record of settings in its result.json."""

import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from reclm.config import Config
from reclm.data.dataset import Dataset
from reclm.data.impressions import SHARES, SPLITS
from reclm.errors import UserError
from reclm.metrics import CUTOFFS
from reclm.run import dist


def describe_data(dataset: Dataset) -> str:
    """Lines on the size of the dataset, the evaluation protocol, and notes needed to interpret results."""
    lines = [
        f"data: {dataset.name}, {REPORT[dataset.task]['data'](dataset)}",
        f"protocol: {dataset.protocol}",
    ]
    return "\n".join(lines + [f"NOTE: {note}" for note in dataset.notes])


def count_interactions(dataset: Dataset) -> str:
    return (
        f"{dataset.num_users:,} users ({len(dataset.ranked_users):,} evaluated), "
        f"{dataset.num_items:,} items, {len(dataset.item_ids):,} interactions"
    )


def count_impressions(dataset: Dataset) -> str:
    parts = []
    for split in SHARES:
        labels = dataset.labels[dataset.splits == SPLITS[split]]
        parts.append(f"{split} {len(labels):,} ({labels.mean():.1%} positive)")
    return f"{dataset.num_users:,} users, {dataset.num_items:,} items, impressions to " + ", ".join(parts)


def describe_model(model: torch.nn.Module, num_steps: int, num_targets: int) -> str:
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = f" ({trained:,} of them trained)" if trained < size else ""
    device = next(model.parameters()).device
    return (
        f"model: {model.cfg.model_name}, {size:,} parameters{part} in {dist.num_processes()} process(es) on "
        f"{device}; an epoch is {num_steps} steps, {num_targets:,} targets"
    )


def describe_run(cfg: Config, dataset: Dataset) -> dict:
    """The part of result.json that is needed to reproduce its metrics: data, settings, code, machine."""
    return {
        "dataset": dataset.name,
        "protocol": dataset.protocol,
        "fingerprint": dataset.fingerprint,
        "notes": dataset.notes,
        "task": cfg.model.task,
        "num_items": dataset.num_items,
        "model_name": cfg.model.model_name,
        **REPORT[cfg.model.task]["settings"](cfg, dataset),
        "seed": cfg.train.seed,
        "num_processes": dist.num_processes(),
        **stamp(),
        "command": " ".join(sys.argv),
    }


def ranking_settings(cfg: Config, dataset: Dataset) -> dict:
    return {
        "num_users": len(dataset.ranked_users),
        "filter_seen": cfg.eval.filter_seen,
        "exclude_history": cfg.loss.exclude_history,
        "request_time": cfg.model.request_time,
        "loss": cfg.loss.loss,
    }


def stamp() -> dict:
    """Date, commit and machine of a run."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {gpu}",
    }


def commit() -> str:
    """Hash of the code's git commit, with "-dirty" if tracked files other than records differ; "unknown"
    outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        tracked = ["status", "--porcelain", "-uno", "--", ":/", ":!/configs/records"]
        changed = subprocess.run([*git, *tracked], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if name.returncode:
        return "unknown"
    return name.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def describe_rounding(quantize: str, trained_for: str = "none") -> str:
    """ ", int4" for the title of a quantized model's metrics; where it was trained for another format, so"""
    note = f" (trained with --qat={trained_for})" if trained_for not in ("none", quantize) else ""
    return note if quantize == "none" else f", {quantize}{note}"


def format_epoch(row: dict[str, float], task: str) -> str:
    """One line for the log row of an epoch."""
    shown, unit = REPORT[task]["shown"], REPORT[task]["unit"]
    metrics = "  ".join(f"{name} {row[f'valid/{name}']:.4f}" for name in shown if f"valid/{name}" in row)
    return (
        f"epoch {row['epoch']:3d}   loss {row['loss']:.4f}   valid {metrics}   "
        f"{row['train_seconds']:.1f} s + {row['eval_seconds']:.1f} s   "
        f"{row['targets_per_second']:,.0f} {unit}/s"
    )


def format_metrics(title: str, metrics: dict[str, float], cfg: Config) -> str:
    """A table of the metrics of `evaluate`, in the form of the task."""
    return REPORT[cfg.model.task]["metrics"](title, metrics, cfg)


def format_ranking(title: str, metrics: dict[str, float], cfg: Config) -> str:
    """HR@K and NDCG@K with one column per cut-off K, MRR, and the optional metrics."""
    seen = "history kept in" if cfg.eval.filter_seen is False else "history left out"
    request = ", request time known" if cfg.model.request_time else ""
    rows = [f"\n{title} (all users x all items, {seen}{request})"]
    rows.append("K".rjust(8) + "".join(f"{k:>9}" for k in CUTOFFS))
    for name in ("HR", "NDCG"):
        rows.append(f"{name}@K".rjust(8) + "".join(f"{metrics[f'{name}@{k}']:9.4f}" for k in CUTOFFS))
    rows.append("MRR".rjust(8) + f"{metrics['MRR']:9.4f}")
    if "new/users" in metrics:
        rows.append(
            f"new items alone ({metrics['new/users']:,} users whose item is new to them, history left out): "
            f"HR@10 {metrics['new/HR@10']:.4f}  NDCG@10 {metrics['new/NDCG@10']:.4f}"
        )
    if "liked/users" in metrics:
        rows.append(
            f"{metrics['liked/users']:,} users whose item is not negative feedback: "
            f"HR@10 {metrics['liked/HR@10']:.4f}  NDCG@10 {metrics['liked/NDCG@10']:.4f}"
        )
    if "cold/HR@10" in metrics:
        rows.append(
            f"ranked among cold items only: "
            f"HR@10 {metrics['cold/HR@10']:.4f}  NDCG@10 {metrics['cold/NDCG@10']:.4f}"
        )
    if "time_NLL" in metrics:
        errors = f"NLL {metrics['time_NLL']:.4f} nats  MAE {metrics['time_MAE']:.4f}"
        rows.append(f"log(1 + seconds) to the next action: {errors}")
    return "\n".join(rows)


def format_impressions(title: str, metrics: dict[str, float], cfg: Config) -> str:
    rows = [f"\n{title} ({metrics['impressions']:,} impressions, {metrics['positives']:.1%} positive)"]
    for name in ("AUC", "GAUC", "logloss", "NE"):
        value = f"{metrics[name]:9.4f}" if name in metrics else "undefined: all labels are equal"
        rows.append(f"{name:>8} {value}")
    if "GAUC" in metrics:
        rows[2] += f"   over {metrics['GAUC_users']:,} users with both classes"
    return "\n".join(rows)


def refuse_non_finite(loss_sum: float, epoch: int, step: int, out_dir: Path) -> None:
    """Raise UserError in all processes, before the optimizer step, so that no checkpoint gets bad weights.
    `loss_sum` is that of this process."""
    bad = [r for r, loss in enumerate(dist.gather_from_processes(loss_sum)) if not math.isfinite(loss)]
    what = f"the loss became NaN or infinite in process {bad[0]}" if bad else "the gradient overflowed"
    raise UserError(
        f"{what} at epoch {epoch}, step {step}: try a smaller --lr or --dtype=float32; "
        f"earlier checkpoints in {out_dir} are intact"
    )


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


REPORT = {  # per task: data counts, settings for result.json, metrics and unit for an epoch's line, the table
    "matching": {
        "data": count_interactions,
        "settings": ranking_settings,
        "shown": ("HR@10", "NDCG@10"),
        "unit": "targets",
        "metrics": format_ranking,
    },
    "ctr": {
        "data": count_impressions,
        "settings": lambda cfg, dataset: {},
        "shown": ("AUC", "logloss"),
        "unit": "impressions",
        "metrics": format_impressions,
    },
}
