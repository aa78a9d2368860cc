"""Dataset -> batches: leave-one-out sequences (--task=matching) or split impressions (--task=ctr).

A batch is a dict of tensors, all that the model knows of the data:
    item_ids   (B, T) int64   the history, oldest first, padded with 0 on the right
    lengths    (B,)   int64   number of actions per row
    user_ids   (B,)   int64   from 0
    num_before (B,)   int64   earlier actions of the user, cut off by max_len
    timestamps, next_timestamps (B, T) float64   seconds since 1970 of each action and of the one after it;
                              missing where the data have no times
    profiles   (B, P) int64   one code per profile field; with --profile_tokens
    actions, contexts (B, T) int64   one code per action; with --action_embedding; with a column `context`
  in training also
    places     (B,)   int64   of each row in the batch of all processes
    targets    (B, T) int64   the item after each position; 0 if there is none or it is negative feedback
    negatives  (N,) or (B, T, N) int64   shared by the batch, or drawn per position
  in evaluation also
    target_ids (B,)   int64   the held-out item
  in evaluation, and in training with shared negatives and --exclude_history
    seen_items (B, L) int64   the whole history (in training: its training part), padded with 0
  with --task=ctr, in place of the last four, C candidates per history
    candidate_ids, candidate_times, candidate_contexts (B, C)   as above
    history_lengths (B, C) int64   how many actions of the row each candidate may attend to
    labels          (B, C) int64   0 or 1; -1 is padding
    rows            (B, C) int64   row of the candidate in Dataset
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reclm.config import DataConfig, LossConfig, TrainConfig
from reclm.data.cache import read_cache
from reclm.data.dataset import Dataset
from reclm.data.features import FEEDBACK, WORDS
from reclm.data.impressions import SPLITS
from reclm.data.negatives import NegativeSampler
from reclm.data.prepare import prepare
from reclm.data.sources import Source, find_dataset
from reclm.errors import UserError
from reclm.nn.losses import NEEDS_NO_NEGATIVES
from reclm.run import dist

HELD_OUT = {"valid": 2, "test": 1}  # the target's place, counted from the end of the user's sequence
MAX_CANDIDATES = 1024  # per sequence, to bound the memory of a batch


def load_dataset(cfg: DataConfig, task: str = "matching") -> Dataset:
    """Find or download the data, prepare and cache it, and return it memory-mapped. One process of each host
    does the work; the others read its cache. Raises UserError where there are no data, they are malformed, or
    other data on another host."""

    def find_and_prepare() -> tuple[Source, Path, list[str]]:
        source = find_dataset(cfg.dataset, cfg.folder)
        return source, *prepare(source, cfg, task)

    source, folder, notes = dist.on_each_host(find_and_prepare)
    found = read_cache(folder)
    if found is None:
        raise UserError(f"process {dist.rank()} cannot read {folder}: set RECLM_CACHE to another folder")
    meta, arrays = found
    dist.check_alike("data", meta["fingerprint"])
    words = {name: arrays.pop(name) for name in WORDS}
    meta["notes"] = [*notes, *source.notes, *meta["notes"]]
    return Dataset(name=source.name, words=words, **meta, **arrays)


def pad(array: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """(B, width): row b holds array[starts[b] : starts[b] + lengths[b]], then zeros."""
    column = np.arange(width)
    real = column < lengths[:, None]  # (B, T)
    rows = np.where(real, starts[:, None] + column, 0)
    return np.where(real, array[rows], 0)


def histories(
    dataset: Dataset, users: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int
) -> dict:
    """The batch fields of one history per user: rows starts : starts + lengths of Dataset, each (B,)."""
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
    """(B, L): the first `lengths` items of each user, then zeros."""
    return pad(dataset.item_ids, dataset.offsets[users], lengths, int(lengths.max()))


def to_tensors(batch: dict) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class NextItems:
    """One training sequence per user (--task=matching): of the last max_len + 1 training actions all but the
    last are inputs, all but the first are targets. Raises UserError if all are negative feedback."""

    outcome, nothing = "targets", 0  # the batch field that the loss is about, and its padding

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig):
        self.dataset, self.loss = dataset, loss
        self.users = np.flatnonzero(dataset.train_lengths >= 2)  # a single action has no next item
        self.lengths = np.minimum(dataset.train_lengths[self.users] - 1, max_len)
        ends = dataset.offsets[self.users] + dataset.train_lengths[self.users]
        self.starts = ends - 1 - self.lengths
        self.sizes = self.lengths  # the cost of a sequence, which batches are sorted by
        self.num_targets = int(self.lengths.sum())
        if len(dataset.negative):
            before = np.concatenate([[0], np.cumsum(~dataset.negative)])
            self.num_targets = int((before[ends] - before[ends - self.lengths]).sum())
            if not self.num_targets:
                raise UserError("nothing is left to train on: use a lower --negative_below")
        self.sampler = NegativeSampler(dataset, loss)

    def build(
        self, rows: np.ndarray, width: int | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor]:
        """The batch of the sequences `rows` (B,), padded to `width` [default: the longest]; `rng` draws the
        negatives."""
        lengths, starts, users = self.lengths[rows], self.starts[rows], self.users[rows]
        width = width or int(lengths.max())
        batch = histories(self.dataset, users, starts, lengths, width)
        batch["targets"] = pad(self.dataset.item_ids, starts + 1, lengths, width)
        if len(self.dataset.negative):
            batch["targets"] *= pad(~self.dataset.negative, starts + 1, lengths, width)
        if self.loss.loss not in NEEDS_NO_NEGATIVES:
            batch["negatives"] = self.sampler.draw(rng, users, batch["targets"])
        if self.loss.exclude_history is not False and self.loss.share_negatives:
            batch["seen_items"] = whole_histories(self.dataset, users, self.dataset.train_lengths[users])
        return to_tensors(batch)


class Impressions:
    """Sequences of --task=ctr: a user's history, encoded once, with all impressions of one split as its
    candidates, each of which attends to the first `history_lengths` of its actions.

    A history longer than `max_len` is cut into windows that start max_len / 2 actions apart. A candidate
    belongs to one of them, in which it attends to at least the last max_len / 2 actions of its history. A
    window with more than MAX_CANDIDATES candidates becomes several sequences."""

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
        self.counts = np.diff(first, append=len(rows))  # candidates per sequence
        self.skipped = windows[first] * stride  # actions of the user before the window
        self.starts = dataset.offsets[self.users] + self.skipped
        self.lengths = np.maximum.reduceat(dataset.history_lengths[rows], first) - self.skipped
        self.sizes = self.lengths + self.counts
        self.num_targets = len(rows)

    def build(
        self, rows: np.ndarray, width: int | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor]:
        """The batch of the sequences `rows` (B,), like NextItems.build; without negatives `rng` is unused."""
        dataset, lengths, counts = self.dataset, self.lengths[rows], self.counts[rows]
        width = width or max(1, int(lengths.max()))
        batch = histories(dataset, self.users[rows], self.starts[rows], lengths, width)

        # Indices, not ranges: unless split by time, rows of other splits lie between those of this one.
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
    """The training batches of this process. Composition, order and negatives depend on (seed, epoch, step)
    only: every process builds the same whole batch and takes its share of the rows. Raises UserError if there
    are more processes than sequences."""

    def __init__(self, dataset: Dataset, max_len: int, loss: LossConfig, cfg: TrainConfig):
        self.loss, self.cfg = loss, cfg
        self.sequences = SEQUENCES[dataset.task](dataset, max_len, loss)
        self.num_targets = self.sequences.num_targets  # per epoch
        if not len(self.sequences.sizes):
            raise UserError(
                "nothing is left to train on: two actions per user are held out, and a next item needs two "
                "more; use data with users of four actions or more"
            )
        if len(self.sequences.sizes) < dist.data_world():
            raise UserError(
                f"{dist.data_world()} processes, but only {len(self.sequences.sizes)} sequences to train on: "
                "use a smaller --nproc_per_node"
            )

    def __len__(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.sequences.sizes) // self.cfg.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, list[dict], int]]:
        """Yield (step, micro-batches of this process, number of targets of ALL processes) per optimizer step,
        starting at `first_step`."""
        composed = self.compose(np.random.default_rng((self.cfg.seed, epoch)))
        for step in range(first_step, len(composed)):
            rng = np.random.default_rng((self.cfg.seed, epoch, step))
            batch = self.sequences.build(composed[step], rng=rng)
            self.sequences.dataset.release()
            batch["places"] = torch.arange(len(batch["lengths"]))
            num_targets = (batch[self.sequences.outcome] != self.sequences.nothing).sum()
            yield step, self.split(batch), int(num_targets)

    def split(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """This process's rows of a batch, cut into at most `grad_accum_steps` micro-batches."""
        # Every k-th row: rows are sorted by length, so the processes get equal work.
        mine = torch.arange(len(batch["lengths"]))[dist.data_rank() :: dist.data_world()]
        if not len(mine):  # fewer rows than processes: DDP still needs a backward pass here, with a loss of 0
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
        """The indices of the sequences of each batch of an epoch."""
        # A batch is as wide as its longest sequence, so sequences of similar length waste little on padding.
        # Sorting all would put the same ones together in every epoch: sort within random pools of 16 batches.
        size = self.cfg.batch_size
        order = rng.permutation(len(self.sequences.sizes))
        pools = np.split(order, range(16 * size, len(order), 16 * size))
        pools = [pool[np.argsort(-self.sequences.sizes[pool], kind="stable")] for pool in pools]
        batches = [part for pool in pools for part in np.array_split(pool, -(-len(pool) // size))]
        return [batches[i] for i in rng.permutation(len(batches))]


def dealt(count: int, batch_size: int) -> Iterator[slice]:
    """Yield this process's share of `count` ordered things as slices of at most `batch_size`."""
    # Whole batches are dealt out: their composition, on which the last bits of a score depend, is then the
    # same for any number of processes. Nothing is padded or repeated, so each user counts exactly once.
    for first in range(dist.data_rank() * batch_size, count, dist.data_world() * batch_size):
        yield slice(first, first + batch_size)


def eval_batches(dataset: Dataset, split: str, max_len: int, batch_size: int) -> Iterator[dict]:
    """Yield this process's share of the ranked users as batches with `target_ids` and `seen_items`, longest
    histories first. `split` is "valid" or "test"."""
    users = dataset.ranked_users
    known = dataset.lengths[users] - HELD_OUT[split]  # all actions before the target
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
        dataset.release()
        yield to_tensors(batch)


def impression_batches(dataset: Dataset, split: str, max_len: int, batch_size: int) -> Iterator[dict]:
    """Yield this process's share of the impressions of a split, a key of impressions.SPLITS, as batches."""
    sequences = Impressions(dataset, max_len, split=split)
    order = np.argsort(-sequences.sizes, kind="stable")
    for chosen in dealt(len(order), batch_size):
        yield sequences.build(order[chosen])
