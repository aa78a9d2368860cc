"""Prepared arrays -> leave-one-out split, or impressions with a split of their own -> batches.

A batch is a dict of tensors, the only thing the model knows of the data:
    item_ids   (B, T) int64   the history, oldest first, padded with 0 on the right
    lengths    (B,)   int64   real actions in each row
    user_ids   (B,)   int64   0-based
    num_before (B,)   int64   earlier actions of the user that were cut off
    timestamps, next_timestamps (B, T) float64 seconds of each action and of the one after it, which is the
                              one to predict; only where the data have them
    profiles   (B, P) int64   codes of the fields of the user's profile, where they are asked for
    actions, contexts (B, T) int64   codes of each action (Dataset.codes), where they are asked for or known
  in training also
    targets    (B, T) int64   the next item at each position, 0 where there is none or it is negative feedback
    negatives  (N,) or (B, T, N) int64   shared by the batch, or drawn for each position
  and, in evaluation and where --exclude_history asks for it,
    seen_items (B, L) int64   the whole history (in training: its training part), padded with 0
  and with --task=ctr, in place of the last three, C candidates shown to the user of each history
    candidate_ids, candidate_times, candidate_contexts (B, C)   as above
    history_lengths (B, C) int64   how many actions of the row are the history of each candidate
    labels          (B, C) int64   0 or 1, -1 where there is no candidate
    rows            (B, C) int64   its row in Dataset
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reclm.config import DataConfig, LossConfig, TrainConfig
from reclm.data.dataset import Dataset
from reclm.data.features import FEEDBACK, WORDS
from reclm.data.impressions import SPLITS
from reclm.data.negatives import NegativeSampler
from reclm.data.prepare import prepare
from reclm.data.sources import Source, find_dataset
from reclm.errors import UserError
from reclm.nn.losses import NEEDS_NO_NEGATIVES
from reclm.run import dist

HELD_OUT = {"valid": 2, "test": 1}  # the target's place, from the end of a sequence
MAX_CANDIDATES = 1024  # of a sequence: a batch of them fits into memory


def load_dataset(cfg: DataConfig, task: str = "matching") -> Dataset:
    """Find (or download), prepare and cache the data, once, in the main process; the others read the same
    cache, so they must share its file system. Raises UserError."""

    def find_and_prepare() -> tuple[Source, Path]:
        source = find_dataset(cfg.dataset, cfg.folder)
        return source, prepare(source, cfg, task)

    source, folder = dist.on_main(find_and_prepare)
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    words = {name: arrays.pop(name) for name in WORDS}
    meta = json.loads((folder / "meta.json").read_text())
    meta["notes"] = [*source.notes, *meta["notes"]]
    return Dataset(name=source.name, words=words, **meta, **arrays)


def pad(array: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """(B, width): rows starts : starts + lengths of an array of Dataset, 0 behind the end."""
    column = np.arange(width)
    real = column < lengths[:, None]  # (B, T)
    rows = np.where(real, starts[:, None] + column, 0)
    return np.where(real, array[rows], 0)


def histories(
    dataset: Dataset, users: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int
) -> dict:
    """The fields of a batch that describe histories: rows starts : starts + lengths of `users`."""
    batch = {
        "item_ids": pad(dataset.item_ids, starts, lengths, width),
        "lengths": lengths,
        "user_ids": users,
        "num_before": starts - dataset.offsets[users],
    }
    if len(dataset.timestamps):
        batch["timestamps"] = pad(dataset.timestamps, starts, lengths, width)
        batch["next_timestamps"] = pad(dataset.timestamps, starts + 1, lengths, width)
    if dataset.profile_sizes:
        batch["profiles"] = dataset.profiles[users]
    for name, codes in dataset.codes.items():
        batch[name] = pad(codes, starts, lengths, width)
    return batch


def whole_histories(dataset: Dataset, users: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B, L): the first `lengths` items of each user, 0 behind the end."""
    return pad(dataset.item_ids, dataset.offsets[users], lengths, int(lengths.max()))


def to_tensors(batch: dict) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class NextItems:
    """The sequences that matching trains on: the last `max_len` training actions of each user but the last
    one as inputs, all but the first as targets. Raises UserError where nothing is left to train on."""

    outcome, nothing = "targets", 0  # the field of the batch that is learned, and its padding

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig):
        self.dataset, self.loss = dataset, loss
        self.users = np.flatnonzero(dataset.train_lengths >= 2)  # one item gives no next item
        self.lengths = np.minimum(dataset.train_lengths[self.users] - 1, max_len)
        ends = dataset.offsets[self.users] + dataset.train_lengths[self.users]
        self.starts = ends - 1 - self.lengths
        self.sizes = self.lengths  # what a sequence costs
        is_target = ~dataset.negative if len(dataset.negative) else np.ones(len(dataset.item_ids), bool)
        before = np.concatenate([[0], np.cumsum(is_target)])
        self.num_targets = int((before[ends] - before[ends - self.lengths]).sum())
        if len(dataset.negative) and not self.num_targets:
            raise UserError("nothing is left to train on: use a lower --negative_below")
        self.sampler = NegativeSampler(dataset, loss)

    def build(
        self, rows: np.ndarray, width: int | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor]:
        """The batch of these sequences; `rng` draws the negatives."""
        lengths, starts, users = self.lengths[rows], self.starts[rows], self.users[rows]
        width = width or int(lengths.max())
        batch = histories(self.dataset, users, starts, lengths, width)
        batch["targets"] = pad(self.dataset.item_ids, starts + 1, lengths, width)
        if len(self.dataset.negative):
            batch["targets"] *= pad(~self.dataset.negative, starts + 1, lengths, width)
        if self.loss.loss not in NEEDS_NO_NEGATIVES:
            batch["negatives"] = self.sampler.draw(rng, users, batch["targets"])
        if self.loss.exclude_history and self.loss.share_negatives:
            batch["seen_items"] = whole_histories(self.dataset, users, self.dataset.train_lengths[users])
        return to_tensors(batch)


class Impressions:
    """The sequences that ctr trains on or is evaluated on: each user's history, once, with all candidates of
    one split (C of them) that were shown after a part of it.

    A history longer than `max_len` is cut into windows, each half a window after the one before, so that
    each candidate is in one of them and sees at least the last max_len / 2 actions before it. More than
    MAX_CANDIDATES of one window are several sequences."""

    outcome, nothing = "labels", -1

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig | None = None, split: str = "train"):
        self.dataset = dataset
        rows = np.flatnonzero(dataset.splits == SPLITS[split])
        owner = dataset.owner[rows]
        stride = max(1, max_len // 2)
        windows = np.maximum(0, -(-(dataset.history_lengths[rows] - max_len) // stride))
        new = (np.diff(owner, prepend=-1) != 0) | (np.diff(windows, prepend=-1) != 0)
        first = np.flatnonzero(new)
        place = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
        first = np.flatnonzero(place % MAX_CANDIDATES == 0)
        self.users, self.rows, self.first = owner[first], rows, first
        self.counts = np.diff(first, append=len(rows))  # candidates of each
        self.skipped = windows[first] * stride  # actions of the user before the window
        self.starts = dataset.offsets[self.users] + self.skipped
        self.lengths = np.maximum.reduceat(dataset.history_lengths[rows], first) - self.skipped
        self.sizes = self.lengths + self.counts
        self.num_targets = len(rows)

    def build(
        self, rows: np.ndarray, width: int | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor]:
        """The batch of these sequences; nothing is drawn."""
        dataset, lengths, counts = self.dataset, self.lengths[rows], self.counts[rows]
        width = width or max(1, int(lengths.max()))
        batch = histories(dataset, self.users[rows], self.starts[rows], lengths, width)

        # Where a split is no part of time, rows of other splits lie between those of this one.
        candidates = pad(self.rows, self.first[rows], counts, int(counts.max()))  # (B, C)
        real = np.arange(candidates.shape[1]) < counts[:, None]

        def shown(array: np.ndarray, padding: int = 0) -> np.ndarray:  # (B, C)
            return np.where(real, array[candidates], padding)

        batch |= {
            "candidate_ids": shown(dataset.item_ids),
            "history_lengths": (shown(dataset.history_lengths) - self.skipped[rows, None]).clip(min=0),
            "rows": candidates,
            "labels": shown(dataset.labels, self.nothing),
        }
        if len(dataset.timestamps):
            batch["candidate_times"] = shown(dataset.timestamps)
        for name in dataset.codes.keys() - {FEEDBACK}:
            batch[f"candidate_{name}"] = shown(dataset.codes[name])
        return to_tensors(batch)


SEQUENCES = {"matching": NextItems, "ctr": Impressions}  # by task


class TrainBatches:
    """The batches of an epoch. All is a function of (seed, epoch): the order, the composition of every
    batch, the negatives. It does not depend on the number of processes, each of which takes its rows."""

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig, cfg: TrainConfig):
        self.loss, self.cfg = loss, cfg
        self.sequences = SEQUENCES[dataset.task](dataset, max_len, loss)
        self.num_targets = self.sequences.num_targets  # in an epoch
        if len(self.sequences.sizes) < dist.data_world():
            raise UserError(
                f"{dist.data_world()} processes, but only {len(self.sequences.sizes)} sequences to train on: "
                "use a smaller --nproc_per_node"
            )

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.sequences.sizes) // self.cfg.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, list[dict], int]]:
        """Yield (step, micro-batches of this process, number of targets of ALL processes), from `first_step`
        on."""
        composed = self.compose(np.random.default_rng((self.cfg.seed, epoch)))
        for step in range(first_step, len(composed)):
            rng = np.random.default_rng((self.cfg.seed, epoch, step))
            batch = self.sequences.build(composed[step], rng=rng)
            num_targets = (batch[self.sequences.outcome] != self.sequences.nothing).sum()
            yield step, self.split(batch), int(num_targets)

    def split(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The rows of a batch that are this process's share, in `grad_accum_steps` parts."""
        mine = torch.arange(len(batch["lengths"]))[dist.data_rank() :: dist.data_world()]
        if not len(mine):  # too small a batch: this process takes part in the step without a target
            outcome, nothing = self.sequences.outcome, self.sequences.nothing
            batch = batch | {outcome: torch.full_like(batch[outcome], nothing)}
            mine = torch.zeros(1, dtype=torch.long)
        shared = {"negatives"} if self.loss.share_negatives else set()
        return [
            {name: value if name in shared else value[part] for name, value in batch.items()}
            for part in mine.tensor_split(self.cfg.grad_accum_steps)
            if len(part)
        ]

    def compose(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Random batches of sequences of similar length, so that little of a batch is padding:
        shuffle, sort by length within pools of 16 batches, cut evenly, shuffle the batches."""
        size = self.cfg.batch_size
        order = rng.permutation(len(self.sequences.sizes))
        pools = np.split(order, range(16 * size, len(order), 16 * size))
        pools = [pool[np.argsort(-self.sequences.sizes[pool], kind="stable")] for pool in pools]
        batches = [part for pool in pools for part in np.array_split(pool, -(-len(pool) // size))]
        return [batches[i] for i in rng.permutation(len(batches))]


def dealt(count: int, batch_size: int) -> Iterator[slice]:
    """This process's share of `count` things in their order: whole batches are dealt out, so that the
    composition of a batch, and with it the last bit of each score, never depends on the number of
    processes."""
    for first in range(dist.data_rank() * batch_size, count, dist.data_world() * batch_size):
        yield slice(first, first + batch_size)


def eval_batches(dataset: Dataset, split: str, max_len: int, batch_size: int) -> Iterator[dict]:
    """This process's share of all ranked users, as batches with `target_ids` (B,) and the whole history as
    `seen_items`. Split is "valid" or "test"."""
    users = dataset.ranked_users
    known = dataset.lengths[users] - HELD_OUT[split]
    order = np.argsort(-known, kind="stable")
    users, known = users[order], known[order]
    for chosen in dealt(len(users), batch_size):
        ends = dataset.offsets[users[chosen]] + known[chosen]  # row of the target
        lengths = np.minimum(known[chosen], max_len)
        batch = histories(dataset, users[chosen], ends - lengths, lengths, int(lengths.max()))
        batch |= {
            "target_ids": dataset.item_ids[ends],
            "seen_items": whole_histories(dataset, users[chosen], known[chosen]),
        }
        yield to_tensors(batch)


def impression_batches(dataset: Dataset, split: str, max_len: int, batch_size: int) -> Iterator[dict]:
    """This process's share of the impressions of a split."""
    sequences = Impressions(dataset, max_len, split=split)
    order = np.argsort(-sequences.sizes, kind="stable")
    for chosen in dealt(len(order), batch_size):
        yield sequences.build(order[chosen])
