"""The output of a run: console, progress bar, metrics.jsonl, TensorBoard, curves.png.

Only the main process writes. In the others a Logger does nothing, so callers need not ask."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from reclm.errors import printable
from reclm.metrics import choosing_metric
from reclm.run import dist
from reclm.run.output import write_whole, writing


def say(text: str = "") -> None:
    """Print a line in the main process, above a progress bar if there is one."""
    if dist.is_main():
        tqdm.write(printable(text))
        sys.stdout.flush()  # so that a log file is up to date


def progress_bar(total: int, unit: str) -> tqdm:
    """A progress bar of the main process, none in the others."""
    return tqdm(total=total, unit=unit, dynamic_ncols=True, disable=not dist.is_main())


class Logger:
    """Writes the log of one run to out_dir. In a resumed run, `history` has the rows of earlier epochs.

    Files are written through `on_main`, so that an error such as a full disk ends all processes."""

    def __init__(self, out_dir: Path, history: list[dict], unit: str = "targets"):
        self.out_dir, self.history, self.unit = Path(out_dir), history, unit
        self.bar = self.board = None
        dist.on_main(self.open)

    def open(self) -> None:
        """Rewrite metrics.jsonl and drop TensorBoard points from epochs later than `history`."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where used

        rows = "".join(map(json_line, self.history))
        write_whole(self.out_dir / "metrics.jsonl", lambda path: path.write_text(rows))
        next_epoch = self.history[-1]["epoch"] + 1 if self.history else 0
        with writing(self.out_dir / "tensorboard"):
            self.board = SummaryWriter(self.out_dir / "tensorboard", purge_step=next_epoch)

    def start_epoch(self, epoch: int, num_steps: int, first_step: int) -> None:
        if dist.is_main():
            terminal = sys.stderr.isatty()  # in a log file, where each update is a line, keep them few
            self.bar = tqdm(
                total=num_steps, initial=first_step, desc=f"epoch {epoch}", unit="step",
                leave=not terminal, mininterval=0.5 if terminal else 10, dynamic_ncols=True,
            )  # fmt: skip

    def step(self, loss: float, speed: float) -> None:
        """Advance the progress bar. `loss` is per target, `speed` is in `unit` per second."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} {self.unit}/s", False)
            self.bar.update()

    def end_epoch(self, row: dict) -> None:
        """Write the row of an epoch, {"epoch": ..., "loss": ..., "valid/...": ...}, to all files."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.history.append(row)
        dist.on_main(self.write)

    def write(self) -> None:
        row = self.history[-1]
        rows = "".join(map(json_line, self.history))
        write_whole(self.out_dir / "metrics.jsonl", lambda path: path.write_text(rows))
        with writing(self.out_dir / "tensorboard"):
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, row["epoch"])
            self.board.flush()
        write_whole(self.out_dir / "curves.png", lambda path: plot_curves(self.history, path))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def json_line(row: dict) -> str:
    return json.dumps(row) + "\n"


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file in the main process. Raises UserError, in all processes, if that fails."""
    text = json.dumps(content, indent=2) + "\n"
    dist.on_main(lambda: write_whole(Path(path), lambda work: work.write_text(text)))


def plot_curves(history: list[dict], path: Path) -> None:
    """Plot the training loss and the metric that selects the best epoch against the epoch, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    best = max(history, key=lambda row: choosing_metric(row, "valid/")[1])
    metric = f"valid/{choosing_metric(best, 'valid/')[0]}"
    titles = {
        "loss": "training loss per target",
        metric: f"{metric.replace('/', 'ation ')}, best {best[metric]:.4f} at epoch {best['epoch']}",
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        panel.plot(epochs, [row[name] for row in history], marker="o", markersize=3)
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    panels[1].axvline(best["epoch"], color="gray", linestyle=":")
    figure.savefig(path, dpi=110)
