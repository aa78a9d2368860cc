"""Evaluate rankings and time forecasts that only count, without learning.

    python scripts/baselines.py --dataset=ml-1m-sasrec
    python scripts/baselines.py --dataset=ml-1m --min_item_count=5 --shuffle_ties=1

Popularity ranks items by their number of training actions; the first-order Markov chain by how often they
followed the user's last item in training, ties by popularity.

If the data have timestamps, three tables forecast the time to the next action (--time_head): the histogram of
all training gaps, the same given the previous gap, and given the two previous gaps. The resolution of the
previous gaps and the smoothing towards the histogram are chosen on validation, separately for each metric.

Protocols and metrics are those of main.py, whose flags for data and evaluation apply. The Markov chain counts
all pairs of items and takes fewer than 20,000 of them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import HELD_OUT
from evaluate import evaluate
from main import open_dataset
from reclm.config import ModelConfig, build_config
from reclm.data.dataset import Dataset
from reclm.errors import UserError, run_script
from reclm.flags import parse_args
from reclm.nn.heads import NUM_BUCKETS, distribution_errors, time_buckets
from reclm.run import report

COARSE = torch.tensor([1, 2, 5, 10, 20, 30, 45, 60, 120, 300, 1800, 86400, 1e7], dtype=torch.float64)
SMOOTHING = (1, 20, 100, 500)  # weights of the histogram, as numbers of gaps


class Baseline(nn.Module):
    """Fixed scores: (V,) for all users alike, or (V, V) with one row per last item."""

    def __init__(self, scores: np.ndarray, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.scores = nn.Parameter(torch.from_numpy(scores).float(), requires_grad=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch of histories -> scores (B, V)"""
        if self.scores.dim() == 1:
            return self.scores.repeat(len(batch["lengths"]), 1)
        return self.scores[batch["item_ids"].gather(1, batch["lengths"][:, None] - 1)[:, 0]]


def popularity(dataset: Dataset) -> np.ndarray:
    """(V,) int64: number of training actions per item; 0 for the padding."""
    return np.bincount(dataset.item_ids[dataset.in_training], minlength=dataset.num_items + 1)


def markov_chain(dataset: Dataset) -> np.ndarray:
    """(V, V) float64: how often the column item followed the row item in training, plus popularity
    scaled to less than 1, which breaks ties. Raises UserError for 20,000 items or more."""
    train = dataset.in_training
    size = dataset.num_items + 1
    if size > 20_000:
        raise UserError(
            f"{size - 1:,} items: the Markov chain takes fewer than 20,000; raise --min_item_count"
        )
    not_last = np.ones(len(train), dtype=bool)
    not_last[dataset.offsets[:-1] + dataset.train_lengths - 1] = False
    before = np.flatnonzero(train & not_last)
    pairs = dataset.item_ids[before] * size + dataset.item_ids[before + 1]
    counts = np.bincount(pairs, minlength=size * size).reshape(size, size)
    popular = popularity(dataset)
    return counts + popular / (popular.max() + 1)


def gap_table(
    dataset: Dataset, order: int, fine: bool, smoothing: float, rows: np.ndarray
) -> dict[str, float]:
    """Means of `distribution_errors` over `rows` (n,), where the gap that ends in a row is forecast from the
    training gaps that followed the same `order` gaps, in time-head buckets (`fine`) or in COARSE ones. The
    histogram of all training gaps is added with a total weight of `smoothing`."""
    gaps = torch.from_numpy(np.diff(dataset.timestamps, prepend=0.0).clip(min=0))
    buckets = time_buckets(gaps).numpy()
    codes = buckets if fine else torch.bucketize(gaps, COARSE, right=True).numpy()
    size = NUM_BUCKETS if fine else len(COARSE) + 1
    state = sum(np.roll(codes, k) * size ** (k - 1) for k in range(1, order + 1)) + np.zeros_like(codes)
    train = np.flatnonzero(dataset.in_training & (dataset.place >= 1))
    histogram = np.bincount(buckets[train], minlength=NUM_BUCKETS) + 1.0  # no gap has probability 0
    counts = np.zeros((size**order, NUM_BUCKETS))
    known = train[dataset.place[train] > order]
    np.add.at(counts, (state[known], buckets[known]), 1)
    counts = np.where(dataset.place[rows, None] > order, counts[state[rows]], 0)
    counts = counts + smoothing * histogram / histogram.sum()
    probabilities = torch.from_numpy(counts / counts.sum(1, keepdims=True))
    owner = torch.from_numpy(dataset.owner[rows])
    errors = distribution_errors(probabilities.log(), gaps[rows], owner)
    return {name: error.mean().item() for name, error in errors.items()}


def print_gap_tables(dataset: Dataset) -> None:
    """Print NLL (nats) and MAE, both of log(1 + seconds), for the tables that are best on validation."""
    rows = {split: dataset.offsets[dataset.ranked_users + 1] - back for split, back in HELD_OUT.items()}
    print("\nTime to the next action     valid NLL      MAE    test NLL      MAE")
    for order, name in enumerate(("histogram of gaps", "given the gap before", "given two gaps before")):
        options = [(fine, smoothing) for fine in (False, True) for smoothing in SMOOTHING]
        tried = [[gap_table(dataset, order, *how, rows[split]) for split in HELD_OUT] for how in options]
        best = {name: min(tried, key=lambda both: both[0][name]) for name in ("time_NLL", "time_MAE")}
        values = [best[metric][i][metric] for i in (0, 1) for metric in best]
        print(name.ljust(24) + "".join(f"{value:{12 - 3 * (i % 2)}.4f}" for i, value in enumerate(values)))


def main() -> None:
    cfg = build_config(parse_args())
    dataset = open_dataset(cfg)
    for name, scores in (("popularity", popularity), ("Markov chain", markov_chain)):
        model = Baseline(scores(dataset), cfg.model)
        for split in ("valid", "test"):
            print(
                report.format_metrics(
                    f"{split.upper()}, {name}", evaluate(model, dataset, split, cfg.eval), cfg
                )
            )
    if len(dataset.timestamps):
        print_gap_tables(dataset)


if __name__ == "__main__":
    run_script(main)
