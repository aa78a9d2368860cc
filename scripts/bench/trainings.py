"""Shared by benchmarks that compare trainings: run main.py unless the run is there, and read its results."""

import json
import os
import subprocess
from pathlib import Path

import measure

from reclm.errors import UserError
from reclm.run.logger import say

ROOT = Path(__file__).resolve().parents[2]


def trained(folder: Path, flags: list[str], processes: int = 1) -> Path:
    """Train into `folder` with these flags of main.py, one thread per process, unless it holds a finished
    run; an interrupted one goes on. Returns the folder. Raises UserError with the end of what a run that
    fails has printed."""
    if (folder / "result.json").is_file():
        return folder
    say(f"training {folder} ...")
    where = [f"--out_dir={folder.resolve()}", "--resume=auto"]
    command = [*measure.launcher(processes), "main.py", *flags, *where]
    threads = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=threads, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
    return folder


def as_flags(settings: dict) -> list[str]:
    """{name: value} -> ["--name=value", ...], without those that are None"""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def test_metrics(folder: Path) -> dict[str, float]:
    """The test metrics of a finished run."""
    return json.loads((folder / "result.json").read_text())["test"]


def curve(folder: Path) -> list[tuple[float, float]]:
    """(seconds since the start, validation NDCG@10) after each epoch of a run."""
    points, seconds = [], 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += row["train_seconds"] + row["eval_seconds"]
        points.append((seconds, row["valid/NDCG@10"]))
    return points
