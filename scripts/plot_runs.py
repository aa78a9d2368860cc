"""Validation NDCG@10 against training time, one line a run, as a PNG.

    python scripts/plot_runs.py --out=curves.png LLaMA=runs/a HSTU=runs/b SASRec=configs/records/c.jsonl

A run is its folder, or its metrics.jsonl under another name. Time is that of training alone, in minutes.
"""

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read_curve(path: Path) -> tuple[list[float], list[float]]:
    """(minutes of training so far, validation NDCG@10) after each epoch. Raises OSError, ValueError."""
    if path.is_dir():
        path = path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    minutes, seconds = [], 0.0
    for row in rows:
        seconds += row["train_seconds"]
        minutes.append(seconds / 60)
    return minutes, [row["valid/NDCG@10"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--title", default="full ranking, validation", help="above the axes")
    parser.add_argument("runs", nargs="+", metavar="NAME=PATH")
    args = parser.parse_args()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for run in args.runs:
        name, _, path = run.rpartition("=")  # a name may hold one
        try:
            minutes, scores = read_curve(Path(path))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{run}: not a run or its metrics.jsonl ({error})")
        axes.plot(minutes, scores, marker="o", markersize=2.5, label=name)
    axes.set(xlabel="minutes of training", ylabel="NDCG@10", title=args.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
