"""Shared by benchmarks that compare trainings: run main.py unless the run is there, and read its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

from reclm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def trained(folder: Path, flags: dict, data_dir: str | None = None) -> Path:
    """Train into `folder`, in one process of one thread, unless it holds a finished run. Returns the folder;
    `flags` are {name: value} of main.py. Raises UserError with the end of its output if it fails."""
    if (folder / "result.json").is_file():
        return folder
    given = flags | {"out_dir": folder} | ({"data_dir": data_dir} if data_dir else {})
    command = [sys.executable, "main.py", *(f"--{name}={value}" for name, value in given.items())]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
    return folder


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
