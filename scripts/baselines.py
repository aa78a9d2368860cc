"""Rankings without learning, in the same harness as the models: what of a result is the data's own order?

    python scripts/baselines.py --dataset=ml-1m-sasrec
    python scripts/baselines.py --dataset=ml-1m --min_item_count=5 --shuffle_ties=1

Popularity ranks items by how often they were trained on; the first-order Markov chain by how often they
followed the user's last item, then by popularity. All flags of main.py that name data or evaluation count.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import load_dataset
from evaluate import evaluate
from reclm.config import ModelConfig, build_config
from reclm.data.dataset import Dataset
from reclm.errors import UserError
from reclm.flags import parse_args
from reclm.run import report


class Baseline(nn.Module):
    """scores (V,) of all items for everybody, or (V, V) by the last item."""

    def __init__(self, scores: np.ndarray, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.scores = nn.Parameter(torch.from_numpy(scores).float(), requires_grad=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """-> (B, V)"""
        if self.scores.dim() == 1:
            return self.scores.repeat(len(batch["lengths"]), 1)
        return self.scores[batch["item_ids"].gather(1, batch["lengths"][:, None] - 1)[:, 0]]


def popularity(dataset: Dataset) -> np.ndarray:
    """(V,) how often each item was trained on."""
    return np.bincount(dataset.item_ids[dataset.in_training], minlength=dataset.num_items + 1)


def markov_chain(dataset: Dataset) -> np.ndarray:
    """(V, V): how often column followed row in training; ties by popularity."""
    train = dataset.in_training
    size = dataset.num_items + 1
    if size > 20_000:
        raise UserError(f"{size - 1:,} items: a chain between all pairs of them does not fit into memory")
    not_last = np.ones(len(train), dtype=bool)
    not_last[dataset.offsets[:-1] + dataset.train_lengths - 1] = False
    before = np.flatnonzero(train & not_last)
    pairs = dataset.item_ids[before] * size + dataset.item_ids[before + 1]
    counts = np.bincount(pairs, minlength=size * size).reshape(size, size)
    popular = popularity(dataset)
    return counts + popular / (popular.max() + 1)


def main() -> None:
    try:
        cfg = build_config(parse_args())
        dataset = load_dataset(cfg.data)
        print(report.describe_data(dataset))
        for name, scores in (("popularity", popularity), ("Markov chain", markov_chain)):
            model = Baseline(scores(dataset), cfg.model)
            for split in ("valid", "test"):
                print(
                    report.format_metrics(
                        f"{split.upper()}, {name}", evaluate(model, dataset, split, cfg.eval), cfg
                    )
                )
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
