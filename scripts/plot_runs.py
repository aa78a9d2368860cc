"""Plot validation NDCG@10 against training time, one line per run, as a PNG.

    python scripts/plot_runs.py --out=curves.png LLaMA=runs/a HSTU=runs/b SASRec=configs/records/c.jsonl

A run is its folder or a copy of its metrics.jsonl. Time is training time in minutes, without evaluation. An
existing PNG is overwritten.
"""

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read_curve(path: Path) -> tuple[list[float], list[float]]:
    """(minutes of training so far, validation NDCG@10), one value per epoch each. Raises OSError, ValueError
    or KeyError if `path` is not a run of matching."""
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
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--title", default="full ranking, validation", help="title of the plot")
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=PATH", help="label=folder of the run or metrics.jsonl"
    )
    args = parser.parse_args()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for run in args.runs:
        name, _, path = run.rpartition("=")  # the name may contain "="
        try:
            minutes, scores = read_curve(Path(path))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{run}: not a run of matching or its metrics.jsonl ({error})")
        axes.plot(minutes, scores, marker="o", markersize=2.5, label=name)
    axes.set(xlabel="minutes of training", ylabel="NDCG@10", title=args.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
