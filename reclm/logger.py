"""What a person sees of a run: console, progress bar, metrics.jsonl, TensorBoard, curves.png.

All of it on the main rank; elsewhere a Logger does nothing, so the spine never asks which rank it is."""

import json
import warnings
from pathlib import Path

from tqdm import tqdm

from reclm import dist


def say(text: str = "") -> None:
    """Print a line, once."""
    if dist.is_main():
        tqdm.write(text)


class Logger:
    """Records of one run in out_dir. `history` holds the rows of earlier epochs when a run is resumed."""

    def __init__(self, out_dir: Path, history: list[dict]):
        self.out_dir, self.history = Path(out_dir), history
        self.bar = self.board = None
        if dist.is_main():
            from torch.utils.tensorboard import SummaryWriter  # slow to import: only where used

            (self.out_dir / "metrics.jsonl").write_text("".join(map(json_line, history)))
            next_epoch = history[-1]["epoch"] + 1 if history else 0
            self.board = SummaryWriter(self.out_dir / "tensorboard", purge_step=next_epoch)

    def start_epoch(self, epoch: int, num_steps: int, first_step: int) -> None:
        if dist.is_main():
            self.bar = tqdm(
                total=num_steps, initial=first_step, desc=f"epoch {epoch}", unit="step",
                leave=False, dynamic_ncols=True, mininterval=0.5,
            )  # fmt: skip

    def step(self, loss: float, tokens_per_second: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", False)
            self.bar.update()

    def end_epoch(self, row: dict) -> None:
        """One line, one json record, TensorBoard scalars, the plot. Row: epoch, loss, valid metrics ..."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.history.append(row)
        if not dist.is_main():
            return
        with open(self.out_dir / "metrics.jsonl", "a") as file:
            file.write(json_line(row))
        for name, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, row["epoch"])
        self.board.flush()
        plot_curves(self.history, self.out_dir / "curves.png")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def json_line(row: dict) -> str:
    return json.dumps(row) + "\n"


def write_json(path: Path, content: dict) -> None:
    if dist.is_main():
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def plot_curves(history: list[dict], path: Path) -> None:
    """Training loss and validation NDCG@10 by epoch, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for panel, key, title in zip(
        panels, ("loss", "valid/NDCG@10"), ("training loss per target", "validation NDCG@10"), strict=True
    ):
        values = [row[key] for row in history]
        panel.plot(epochs, values, marker="o", markersize=3)
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    best = max(history, key=lambda row: row["valid/NDCG@10"])
    panels[1].axvline(best["epoch"], color="gray", linestyle=":")
    panels[1].annotate(
        f"best {best['valid/NDCG@10']:.4f}, epoch {best['epoch']}",
        (best["epoch"], best["valid/NDCG@10"]), xytext=(-6, -14), textcoords="offset points", ha="right",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=110)
