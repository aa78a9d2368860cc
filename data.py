"""Interactions -> leave-one-out split, or impressions with a split of their own -> batches.

A batch is a dict of tensors, the only thing the model knows of the data:
    item_ids   (B, T) int64   the history, oldest first, padded with 0 on the right
    lengths    (B,)   int64   real actions in each row
    user_ids   (B,)   int64   0-based
    num_before (B,)   int64   earlier actions of the user that were cut off
    timestamps, next_timestamps (B, T) float64 seconds of each action and of the one after it, which is the
                              one to predict; only where the data have them
    profiles   (B, P) int64   codes of the fields of the user's profile, and
    actions    (B, T) int64   the feedback given with each item, from 1 on; where they are asked for
    contexts   (B, T) int64   what else was known when the item was shown; where the data have it
  in training also
    targets    (B, T) int64   the next item at each position, 0 where there is none or it is negative feedback
    negatives  (N,) or (B, T, N) int64   shared by the batch, or drawn for each position
  and, in evaluation and where --exclude_history asks for it,
    seen_items (B, L) int64   the whole history (in training: its training part), padded with 0
  and with --task=ctr, in place of the last four, C candidates shown to the user of each history
    candidate_ids, candidate_times, candidate_contexts (B, C)   as above
    candidate_seen (B, C) int64   how many actions of the history came before the candidate; it sees no others
    targets        (B, C) int64   1 + its label, 0 where there is no candidate
    rows           (B, C) int64   its row in Dataset
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reclm import dist
from reclm.config import DataConfig, LossConfig, TrainConfig
from reclm.datasets import Source, find_dataset
from reclm.errors import UserError
from reclm.features import WORDS
from reclm.impressions import SPLITS
from reclm.inputs import Vocabulary
from reclm.negatives import NegativeSampler
from reclm.sequences import prepare

HELD_OUT = {"valid": 2, "test": 1}  # the target's place, from the end of a sequence
MAX_CANDIDATES = 1024  # of a sequence: a batch of them fits into memory
OF_IMPRESSIONS = ("labels", "splits", "num_seen", "contexts")
ARRAYS = ("offsets", "item_ids", "timestamps", "ratings", "users", "items", "cold_items", "profiles")


@dataclass
class Dataset:
    """All sequences, one after another: user u owns rows offsets[u] : offsets[u + 1], oldest first."""

    name: str
    protocol: str
    notes: list[str]  # what a reader of the numbers must know; said out loud
    fingerprint: str  # of original ids and sequences: a checkpoint fits only its own
    offsets: np.ndarray  # (U + 1,) int64
    item_ids: np.ndarray  # (rows,) int64 in 1..V-1
    timestamps: np.ndarray  # (rows,) float64 seconds; empty where the source has none
    ratings: np.ndarray  # (rows,) float64; empty where the source has none
    users: np.ndarray  # (U,) original ids
    items: np.ndarray  # (V - 1,) original ids; items[i - 1] is item i
    cold_items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # kept out of training
    profiles: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # (U, P) codes
    words: dict[str, np.ndarray] = field(default_factory=dict)  # genres, year, title: (V - 1, K) codes
    # Of impressions (--task=ctr; reclm/impressions.py), each (rows,) and empty elsewhere.
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # 0 or 1
    splits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # one of SPLITS
    num_seen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of its user's first rows
    contexts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # codes from 1 on
    # What this run gives the model, empty where it is not asked for; see features.choose_inputs.
    profile_sizes: tuple[int, ...] = ()
    actions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (rows,) kinds of feedback
    features: dict[str, np.ndarray] = field(default_factory=dict)  # of items, a row each
    negative: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # (rows,) never a target

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def vocabulary(self) -> Vocabulary:
        num_actions = int(self.actions.max(initial=0))
        return Vocabulary(
            self.num_items,
            self.num_users,
            self.profile_sizes,
            num_actions,
            self.features,
            self.cold_items,
            int(self.contexts.max(initial=0)),
        )

    @property
    def ids(self) -> str:
        """A hash of the original ids: with the same one, a user or an item has the same number."""
        return hashlib.sha256("\n".join(map(str, [*self.items, *self.users])).encode()).hexdigest()[:16]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def evaluated(self) -> np.ndarray:
        """Users with at least one training, one validation and one test item."""
        return np.flatnonzero(self.lengths >= 3)

    @property
    def train_lengths(self) -> np.ndarray:
        """(U,) Leave-one-out: all but the last two; short sequences train whole."""
        return np.where(self.lengths >= 3, self.lengths - 2, self.lengths)


def load_dataset(cfg: DataConfig, task: str = "matching") -> Dataset:
    """Find (or download), prepare and cache the data: once, on the main rank. Raises UserError."""

    def find_and_prepare() -> tuple[Source, Path]:
        source = find_dataset(cfg.dataset, cfg.folder, cfg.unordered_ok)
        return source, prepare(source, cfg, task)

    source, folder = dist.on_main(find_and_prepare)
    names = (*ARRAYS, *WORDS, *(OF_IMPRESSIONS if task == "ctr" else ()))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
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
    """What a batch says of its sequences: rows starts : starts + lengths, whose users are `users`."""
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
    if len(dataset.actions):
        batch["actions"] = pad(dataset.actions, starts, lengths, width)
    if len(dataset.contexts):
        batch["contexts"] = pad(dataset.contexts, starts, lengths, width)
    return batch


def whole_histories(dataset: Dataset, users: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B, L): the first `lengths` items of each user, 0 behind the end."""
    return pad(dataset.item_ids, dataset.offsets[users], lengths, int(lengths.max()))


def to_tensors(batch: dict) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class NextItems:
    """What matching trains on: the last `max_len` training actions of each user but the last one as inputs,
    all but the first as targets."""

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig, cfg: TrainConfig):
        self.dataset, self.loss, self.cfg = dataset, loss, cfg
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

    def build(self, rows: np.ndarray, width: int | None, rng: np.random.Generator) -> dict[str, Tensor]:
        lengths, starts, users = self.lengths[rows], self.starts[rows], self.users[rows]
        width = width or int(lengths.max())
        if self.cfg.random_windows:
            moved = rng.random(len(rows)) < self.cfg.random_windows
            starts = starts - moved * rng.integers(0, starts - self.dataset.offsets[users] + 1)
        batch = histories(self.dataset, users, starts, lengths, width)
        batch["targets"] = pad(self.dataset.item_ids, starts + 1, lengths, width)
        if len(self.dataset.negative):
            batch["targets"] *= pad(~self.dataset.negative, starts + 1, lengths, width)
        if self.loss.loss != "softmax":
            batch["negatives"] = self.sampler.draw(rng, users, batch["targets"])
        if self.loss.exclude_history and self.loss.share_negatives:
            batch["seen_items"] = whole_histories(self.dataset, users, self.dataset.train_lengths[users])
        return to_tensors(batch)


class Impressions:
    """What a ranker trains on, and what it is evaluated on: each user's history, once, with all candidates of
    one split (C of them) that were shown after a part of it.

    A history longer than `max_len` is cut into windows, each half a window after the one before, so that
    each candidate is in one of them and sees at least the last max_len / 2 actions before it. More than
    MAX_CANDIDATES of one window are several sequences."""

    def __init__(self, dataset: Dataset, split: str, max_len: int):
        self.dataset = dataset
        rows = np.flatnonzero(dataset.splits == SPLITS[split])
        owner = np.searchsorted(dataset.offsets, rows, side="right") - 1
        stride = max(1, max_len // 2)
        windows = np.maximum(0, -(-(dataset.num_seen[rows] - max_len) // stride))
        new = (np.diff(owner, prepend=-1) != 0) | (np.diff(windows, prepend=-1) != 0)
        first = np.flatnonzero(new)
        place = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
        first = np.flatnonzero(place % MAX_CANDIDATES == 0)
        self.users, self.rows, self.first = owner[first], rows, first
        self.counts = np.diff(first, append=len(rows))  # candidates of each
        self.skipped = windows[first] * stride  # actions of the user before the window
        self.starts = dataset.offsets[self.users] + self.skipped
        self.lengths = np.maximum.reduceat(dataset.num_seen[rows], first) - self.skipped
        self.sizes = self.lengths + self.counts
        self.num_targets = len(rows)

    def build(self, rows: np.ndarray, width: int | None = None, rng=None) -> dict[str, Tensor]:
        dataset, lengths, counts = self.dataset, self.lengths[rows], self.counts[rows]
        width = width or max(1, int(lengths.max()))
        batch = histories(dataset, self.users[rows], self.starts[rows], lengths, width)

        # Where a split is no part of time, rows of other splits lie between those of this one.
        candidates = pad(self.rows, self.first[rows], counts, int(counts.max()))  # (B, C)
        real = np.arange(candidates.shape[1]) < counts[:, None]

        def shown(array: np.ndarray) -> np.ndarray:  # (B, C)
            return np.where(real, array[candidates], 0)

        batch |= {
            "candidate_ids": shown(dataset.item_ids),
            "candidate_seen": (shown(dataset.num_seen) - self.skipped[rows, None]).clip(min=0),
            "rows": candidates,
            "targets": shown(dataset.labels) + real,
        }
        if len(dataset.timestamps):
            batch["candidate_times"] = shown(dataset.timestamps)
        if len(dataset.contexts):
            batch["candidate_contexts"] = shown(dataset.contexts)
        return to_tensors(batch)


class TrainBatches:
    """The batches of an epoch. All is a function of (seed, epoch): the order, the composition of every
    batch, the negatives. It does not depend on the number of ranks, of which each takes its rows."""

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig, cfg: TrainConfig):
        self.loss, self.cfg = loss, cfg
        is_ctr = len(dataset.labels) > 0
        self.source = (
            Impressions(dataset, "train", max_len) if is_ctr else NextItems(dataset, max_len, loss, cfg)
        )
        self.width = max_len if cfg.pad_to == "max_len" else None
        self.num_targets = self.source.num_targets  # in an epoch
        if len(self.source.sizes) < dist.world_size():
            raise UserError(
                f"{dist.world_size()} ranks, but only {len(self.source.sizes)} sequences to train on: "
                "use a smaller --nproc_per_node"
            )

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.source.sizes) // self.cfg.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, list[dict], int]]:
        """Yield (step, this rank's micro-batches, number of targets of ALL ranks), from `first_step` on."""
        composed = self.compose(np.random.default_rng((self.cfg.seed, epoch)))
        for step in range(first_step, len(composed)):
            rng = np.random.default_rng((self.cfg.seed, epoch, step))
            batch = self.source.build(composed[step], self.width, rng)
            yield step, self.split(batch), int((batch["targets"] > 0).sum())

    def split(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """This rank's rows of a batch (every world-size-th), in `grad_accum_steps` parts."""
        mine = torch.arange(len(batch["lengths"]))[dist.rank() :: dist.world_size()]
        if not len(mine):  # too small a batch: this rank takes part in the step without a target
            batch = batch | {"targets": torch.zeros_like(batch["targets"])}
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
        order = rng.permutation(len(self.source.sizes))
        pools = np.split(order, range(16 * size, len(order), 16 * size))
        pools = [pool[np.argsort(-self.source.sizes[pool], kind="stable")] for pool in pools]
        batches = [part for pool in pools for part in np.array_split(pool, -(-len(pool) // size))]
        return [batches[i] for i in rng.permutation(len(batches))]


def eval_batches(dataset: Dataset, split: str, max_len: int, batch_size: int) -> Iterator[dict]:
    """This rank's share of all evaluated users, as batches with `target_ids` (B,) and the whole history as
    `seen_items`. Split is "valid" or "test".

    The composition of a batch never depends on the number of ranks: whole batches are dealt out, so
    every user's scores are computed in the same shapes, to the same bits, whoever computes them."""
    users = dataset.evaluated
    known = dataset.lengths[users] - HELD_OUT[split]
    order = np.argsort(-known, kind="stable")
    users, known = users[order], known[order]
    for first in range(dist.rank() * batch_size, len(users), dist.world_size() * batch_size):
        chosen = slice(first, first + batch_size)
        ends = dataset.offsets[users[chosen]] + known[chosen]  # row of the target
        lengths = np.minimum(known[chosen], max_len)
        batch = histories(dataset, users[chosen], ends - lengths, lengths, int(lengths.max()))
        batch |= {
            "target_ids": dataset.item_ids[ends],
            "seen_items": whole_histories(dataset, users[chosen], known[chosen]),
        }
        yield to_tensors(batch)


def impression_batches(dataset: Dataset, split: str, max_len: int, batch_size: int) -> Iterator[dict]:
    """This rank's share of the impressions of a split; whole batches are dealt out, as in `eval_batches`."""
    shown = Impressions(dataset, split, max_len)
    order = np.argsort(-shown.sizes, kind="stable")
    for first in range(dist.rank() * batch_size, len(order), dist.world_size() * batch_size):
        yield shown.build(order[first : first + batch_size])
