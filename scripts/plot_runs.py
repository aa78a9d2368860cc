"""Plot validation NDCG@10 against training time, one line per run, as a PNG.

    python scripts/plot_runs.py --out=curves.png LLaMA=runs/a HSTU=runs/b SASRec=configs/records/c.jsonl

A run is its folder or a copy of its metrics.jsonl. Time is training time in minutes, without evaluation.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser, add_out, check_out, write_whole


def read_curve(path: Path) -> tuple[list[float], list[float]]:
    """(minutes of training so far, validation NDCG@10), one value per epoch each. Raises UserError if `path`
    is not a run of matching."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        seconds = [float(row["train_seconds"]) for row in rows]
        scores = [float(row["valid/NDCG@10"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run of matching or its metrics.jsonl ({error!r})") from None
    if not rows:
        raise UserError(f"{path} has no epochs yet")
    return [sum(seconds[: i + 1]) / 60 for i in range(len(rows))], scores


def shown(text: str) -> str:
    """The text without the surrogates that stand for bytes of an argument in the C locale."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def main() -> None:
    parser = ScriptParser(__doc__)
    add_out(parser, "PNG file")
    parser.add_argument("--title", default="full ranking, validation", help="title of the plot")
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=PATH", help="label=folder of the run or metrics.jsonl"
    )
    args = parser.parse_args()
    runs = [run.rpartition("=")[::2] for run in args.runs]  # the name may contain "="
    check_out(args, [".png"], [Path(path) for _, path in runs])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, path in runs:
        minutes, scores = read_curve(Path(path))
        axes.plot(minutes, scores, marker="o", markersize=2.5, label=name)
    axes.set(xlabel="minutes of training", ylabel="NDCG@10")
    axes.set_title(shown(args.title), parse_math=False)
    axes.grid(alpha=0.3)
    for text in axes.legend(axes.lines, [shown(name) for name, _ in runs]).get_texts():
        text.set_parse_math(False)
    write_whole(args.out, lambda path: figure.savefig(path, dpi=110))


if __name__ == "__main__":
    run_script(main)
