"""Interactions -> leave-one-out split -> batches.

A batch is a dict of tensors, the only thing the model knows of the data:
    item_ids   (B, T) int64   the history, oldest first, padded with 0 on the right
    lengths    (B,)   int64   real actions in each row
    user_ids   (B,)   int64   0-based
    num_before (B,)   int64   earlier actions of the user that were cut off
    timestamps, next_timestamps (B, T) float64 seconds of each action and of the one after it, which is the
                              one to predict; only where the data have them
    profiles   (B, P) int64   codes of the fields of the user's profile, and
    actions    (B, T) int64   the feedback given with each item, from 1 on; where they are asked for
  in training also
    targets    (B, T) int64   the next item at each position, 0 where there is none or it is negative feedback
    negatives  (N,) or (B, T, N) int64   shared by the batch, or drawn for each position
  and, in evaluation and where --exclude_history asks for it,
    seen_items (B, L) int64   the whole history (in training: its training part), padded with 0
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from reclm import dist
from reclm.cold_start import hold_out
from reclm.config import DataConfig, LossConfig, TrainConfig
from reclm.datasets import Source, find_dataset, read_dataset
from reclm.errors import UserError
from reclm.features import WORDS, profile_codes, word_codes
from reclm.inputs import Vocabulary

HELD_OUT = {"valid": 2, "test": 1}  # the target's place, from the end of a sequence
CACHE_VERSION = 2  # part of the cache key: raise it when `prepare` changes what it writes
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
            self.num_items, self.num_users, self.profile_sizes, num_actions, self.features, self.cold_items
        )

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


def load_dataset(cfg: DataConfig) -> Dataset:
    """Find (or download), prepare and cache the data: once, on the main rank. Raises UserError."""

    def find_and_prepare() -> tuple[Source, Path]:
        source = find_dataset(cfg.dataset, cfg.folder, cfg.unordered_ok)
        return source, prepare(source, cfg.min_item_count, cfg.shuffle_ties, cfg.cold_items)

    source, folder = dist.on_main(find_and_prepare)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*ARRAYS, *WORDS)}
    words = {name: arrays.pop(name) for name in WORDS}
    meta = json.loads((folder / "meta.json").read_text())
    meta["notes"] = [*source.notes, *meta["notes"]]
    return Dataset(name=source.name, protocol=source.protocol, words=words, **meta, **arrays)


def prepare(source: Source, min_item_count: int, shuffle_ties: int = 0, cold_items: float = 0.0) -> Path:
    """The folder with the prepared arrays of a source: made now, or found by the key of its inputs."""
    settings = (CACHE_VERSION, source.reader, min_item_count, shuffle_ties, cold_items)
    key = hashlib.sha256(repr(settings).encode())
    for path in source.files:
        with open(path, "rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    root = Path(os.environ.get("RECLM_CACHE") or Path.home() / ".cache" / "reclm")
    folder = root / f"{source.name}-{key.hexdigest()[:16]}"
    if folder.exists():
        return folder
    raw = read_dataset(source)
    meta, arrays = build_sequences(raw.interactions, min_item_count, shuffle_ties, cold_items)
    arrays["profiles"] = profile_codes(raw.users, arrays["users"])
    arrays |= word_codes(raw.items, arrays["items"])
    root.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed: a killed run leaves nothing that looks whole.
    work = Path(tempfile.mkdtemp(dir=root, prefix=".preparing-"))
    try:
        for name, array in arrays.items():
            np.save(work / f"{name}.npy", array)
        (work / "meta.json").write_text(json.dumps(meta))
        try:
            work.rename(folder)
        except OSError:  # another run was faster: its folder is the same
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def build_sequences(
    table: pd.DataFrame, min_item_count: int, shuffle_ties: int = 0, cold_items: float = 0.0
) -> tuple[dict, dict]:
    """Tidy interactions (user, item[, rating][, timestamp]) in file order -> notes and arrays.

    Rows are sorted by (user, time) with a STABLE sort, so ties keep file order, or with `shuffle_ties` the
    random order of that seed. `cold_items`: see reclm/cold_start.py. Raises UserError."""
    notes = []
    if min_item_count > 1:
        counts = table["item"].map(table["item"].value_counts())
        dropped = table["item"][counts < min_item_count].nunique()
        table = table[counts >= min_item_count]
        notes.append(f"{dropped:,} items with fewer than {min_item_count} interactions dropped")
    user_index, users = pd.factorize(table["user"], sort=True)
    item_index, items = pd.factorize(table["item"], sort=True)
    times = table["timestamp"].to_numpy() if "timestamp" in table else np.zeros(0)
    if shuffle_ties:
        if not len(times):
            raise UserError(f"--shuffle_ties={shuffle_ties}, but these data have no timestamps: leave it out")
        shuffled = np.random.default_rng(shuffle_ties).permutation(len(table))
        table, user_index = table.iloc[shuffled], user_index[shuffled]
        item_index, times = item_index[shuffled], times[shuffled]
        notes.append(f"ties in time are in a random order (--shuffle_ties={shuffle_ties})")
    order = np.lexsort((times, user_index)) if len(times) else np.argsort(user_index, kind="stable")
    lengths = np.bincount(user_index, minlength=len(users))
    short = int((lengths < 3).sum())
    if short == len(users):
        raise UserError(
            "no user has 3 interactions or more (one each to train, validate and test): "
            "too little data, or --min_item_count is too high"
        )
    if short:
        notes.append(f"{short:,} users with fewer than 3 interactions train but are not evaluated")
    users, items = np.asarray(users), np.asarray(items)
    users, items = (x.astype(str) if x.dtype == object else x for x in (users, items))
    arrays = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "item_ids": item_index[order].astype(np.int64) + 1,
        "timestamps": times[order].astype(np.float64) if len(times) else times,
        "ratings": table["rating"].to_numpy(np.float64)[order] if "rating" in table else np.zeros(0),
        "users": users,
        "items": items,
        "cold_items": np.zeros(0, np.int64),
    }
    if cold_items:
        arrays, note = hold_out(arrays, cold_items)
        notes.append(note)
    fingerprint = hashlib.sha256("\n".join(map(str, [*items, *users])).encode())
    for name in ("offsets", "item_ids"):
        fingerprint.update(arrays[name].tobytes())
    return {"notes": notes, "fingerprint": fingerprint.hexdigest()[:16]}, arrays


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
    return batch


def whole_histories(dataset: Dataset, users: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B, L): the first `lengths` items of each user, 0 behind the end."""
    return pad(dataset.item_ids, dataset.offsets[users], lengths, int(lengths.max()))


def to_tensors(batch: dict) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class TrainBatches:
    """The batches of an epoch. All is a function of (seed, epoch): the order, the composition of every
    batch, the negatives. It does not depend on the number of ranks, of which each takes its rows."""

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig, cfg: TrainConfig):
        self.dataset, self.loss, self.cfg = dataset, loss, cfg
        self.users = np.flatnonzero(dataset.train_lengths >= 2)  # one item gives no next item
        if len(self.users) < dist.world_size():
            raise UserError(
                f"{dist.world_size()} ranks, but only {len(self.users)} users to train on: "
                "use a smaller --nproc_per_node"
            )
        # The last max_len + 1 training items: inputs are all but the last, targets all but the first.
        self.lengths = np.minimum(dataset.train_lengths[self.users] - 1, max_len)
        ends = dataset.offsets[self.users] + dataset.train_lengths[self.users]
        self.starts = ends - 1 - self.lengths
        self.max_len = max_len
        is_target = ~dataset.negative if len(dataset.negative) else np.ones(len(dataset.item_ids), bool)
        before = np.concatenate([[0], np.cumsum(is_target)])
        self.num_tokens = int((before[ends] - before[ends - self.lengths]).sum())  # targets in an epoch
        if not self.num_tokens:
            raise UserError("nothing is left to train on: use a lower --negative_below")
        self.sampler = NegativeSampler(dataset, loss)

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.users) // self.cfg.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, list[dict], int]]:
        """Yield (step, this rank's micro-batches, number of targets of ALL ranks), from `first_step` on."""
        composed = self.compose(np.random.default_rng((self.cfg.seed, epoch)))
        for step in range(first_step, len(composed)):
            rows = composed[step]
            batch = self.build(rows, np.random.default_rng((self.cfg.seed, epoch, step)))
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
        order = rng.permutation(len(self.users))
        pools = np.split(order, range(16 * size, len(order), 16 * size))
        pools = [pool[np.argsort(-self.lengths[pool], kind="stable")] for pool in pools]
        batches = [part for pool in pools for part in np.array_split(pool, -(-len(pool) // size))]
        return [batches[i] for i in rng.permutation(len(batches))]

    def build(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        lengths, starts, users = self.lengths[rows], self.starts[rows], self.users[rows]
        width = self.max_len if self.cfg.pad_to == "max_len" else int(lengths.max())
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


class NegativeSampler:
    """Uniform negatives without a loop and without rejection."""

    def __init__(self, dataset: Dataset, loss: LossConfig):
        self.cfg, self.num_items = loss, dataset.num_items
        if dataset.num_items < 2:
            raise UserError("only 1 item in the data: there is nothing to rank")
        if loss.exclude_history and not loss.share_negatives:
            self.index_histories(dataset)

    def index_histories(self, dataset: Dataset) -> None:
        """Sorted keys (user, item) of all distinct training interactions."""
        lengths = dataset.train_lengths
        owner = np.repeat(np.arange(dataset.num_users), dataset.lengths)
        place = np.arange(len(owner)) - np.repeat(dataset.offsets[:-1], dataset.lengths)
        train = place < lengths[owner]
        stride = self.num_items + 1
        self.keys = np.unique(owner[train] * stride + dataset.item_ids[train])
        owner, items = self.keys // stride, self.keys % stride
        self.firsts = np.searchsorted(owner, np.arange(dataset.num_users + 1))
        # How many items that are NOT in the history lie below each item of it; see `free_items`.
        self.gaps = owner * stride + items - 1 - (np.arange(len(owner)) - self.firsts[owner])
        full = np.flatnonzero(np.diff(self.firsts) >= self.num_items)
        if len(full):
            raise UserError(
                f"user {dataset.users[full[0]]} has every item in the history: "
                "no negative is left; use --exclude_history=false"
            )

    def draw(self, rng: np.random.Generator, users: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The field `negatives` for users (B,) and targets (B, T)."""
        count = self.cfg.num_negatives
        if self.cfg.share_negatives:
            count = min(count, self.num_items)
            return rng.choice(self.num_items, count, replace=False) + 1  # (N,)
        real = targets > 0  # (B, T); drawing for these M only, the width of the batch changes nothing
        negatives = np.zeros((*targets.shape, count), dtype=np.int64)  # (B, T, N)
        if self.cfg.exclude_history:
            owners = np.broadcast_to(users[:, None], targets.shape)[real]  # (M,)
            negatives[real] = self.free_items(rng, owners, count)
        else:  # uniform over all items but the target: draw from one fewer and step over the target
            draws = rng.integers(1, self.num_items, (real.sum(), count))  # (M, N)
            negatives[real] = draws + (draws >= targets[real][:, None])
        return negatives

    def free_items(self, rng: np.random.Generator, users: np.ndarray, count: int) -> np.ndarray:
        """users (M,) -> (M, count), uniform over the items outside each user's history: the r-th free item
        is 1 + r + the number of history items with at most r free items below them."""
        users = users[:, None]
        num_free = self.num_items - np.diff(self.firsts)[users]  # (M, 1)
        draws = rng.integers(0, num_free, (len(users), count))
        below = np.searchsorted(self.gaps, users * (self.num_items + 1) + draws, side="right")
        return 1 + draws + below - self.firsts[users]


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
