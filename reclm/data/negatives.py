"""Sampling of negative items for the loss."""

import numpy as np

from reclm.config import LossConfig
from reclm.data.dataset import Dataset
from reclm.errors import UserError


class NegativeSampler:
    """Uniform negatives, drawn without Python loops or rejection. Raises UserError if the catalogue has only
    one item, or (not shared, --exclude_history) a user has every item in the history."""

    def __init__(self, dataset: Dataset, loss: LossConfig):
        self.cfg, self.num_items = loss, dataset.num_items
        if dataset.num_items < 2:
            raise UserError("only 1 item in the data, nothing to rank: use data with at least 2")
        if loss.exclude_history is not False and not loss.share_negatives:
            self.index_histories(dataset)

    def index_histories(self, dataset: Dataset) -> None:
        """Index each user's distinct training items for `free_items`. Raises UserError if a user has all."""
        train, stride = dataset.in_training, self.num_items + 1
        keys = np.unique(dataset.owner[train] * stride + dataset.item_ids[train])
        owner, items = keys // stride, keys % stride
        self.firsts = np.searchsorted(owner, np.arange(dataset.num_users + 1))
        # For each history item: user * stride + the number of smaller items OUTSIDE the history; sorted.
        self.gaps = owner * stride + items - 1 - (np.arange(len(owner)) - self.firsts[owner])
        full = np.flatnonzero(np.diff(self.firsts) >= self.num_items)
        if len(full):
            raise UserError(
                f"user {dataset.users[full[0]]} has every item in the history, "
                "so no negative is left: use --exclude_history=false"
            )

    def draw(self, rng: np.random.Generator, users: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """users (B,), targets (B, T) -> int64 negatives. Shared: (N,) distinct items, which may include
        targets and history (the loss masks these). Otherwise (B, T, N): never the target, nor with
        --exclude_history any item of the training history; 0 where there is no target."""
        count = self.cfg.num_negatives
        if self.cfg.share_negatives:
            count = min(count, self.num_items)
            return rng.choice(self.num_items, count, replace=False) + 1  # (N,)
        real = targets > 0  # (B, T); drawn for these M only, so padding does not affect the draws
        negatives = np.zeros((*targets.shape, count), dtype=np.int64)  # (B, T, N)
        if self.cfg.exclude_history is not False:
            owners = np.broadcast_to(users[:, None], targets.shape)[real]  # (M,)
            negatives[real] = self.free_items(rng, owners, count)
        else:  # uniform over all items except the target: draw from one fewer and skip it
            draws = rng.integers(1, self.num_items, (real.sum(), count))  # (M, N)
            negatives[real] = draws + (draws >= targets[real][:, None])
        return negatives

    def free_items(self, rng: np.random.Generator, users: np.ndarray, count: int) -> np.ndarray:
        """users (M,) -> (M, count) int64, uniform over the items outside each user's history. Free item r,
        from 0, is 1 + r + the number of history items with at most r free items below them."""
        users = users[:, None]
        num_free = self.num_items - np.diff(self.firsts)[users]  # (M, 1)
        draws = rng.integers(0, num_free, (len(users), count))
        below = np.searchsorted(self.gaps, users * (self.num_items + 1) + draws, side="right")
        return 1 + draws + below - self.firsts[users]
