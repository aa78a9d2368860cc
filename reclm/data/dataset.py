"""The prepared data as arrays (`Dataset`), and the sizes that a model is built for (`Vocabulary`)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from reclm.data.cache import parts, release
from reclm.data.impressions import SPLITS


def no_numbers() -> np.ndarray:
    """An empty int64 array, the default of optional fields."""
    return np.zeros(0, np.int64)


def hash_ids(columns: Iterable[np.ndarray]):
    """sha256 of original ids as text, one per line."""
    digest, newline = hashlib.sha256(), ""
    for column in columns:
        for part in parts(column):
            digest.update((newline + "\n".join(map(str, part.tolist()))).encode())
            newline = "\n"
    return digest


def count_items(item_ids: np.ndarray, num_items: int) -> np.ndarray:
    """(num_items + 1,) int64: rows of each item; 0 is padding."""
    counts = np.zeros(num_items + 1, np.int64)
    for part in parts(item_ids):
        counts += np.bincount(part, minlength=num_items + 1)
    return counts


@dataclass(frozen=True)
class Vocabulary:
    """Sizes and item features that a model is built for; inference needs no more of the training data."""

    num_items: int
    num_users: int
    profile_sizes: tuple[int, ...] = ()  # codes per profile field, 0 = unknown included
    code_sizes: dict[str, int] = field(default_factory=dict)  # largest code per array of Dataset.codes
    features: dict[str, np.ndarray] = field(default_factory=dict)  # one row per item, as in Dataset
    cold_items: np.ndarray = field(default_factory=no_numbers)  # items held out of training
    meanings: dict[str, str] = field(default_factory=dict)  # per code: hash of the values that it stands for


@dataclass
class Dataset:
    """All sequences, concatenated: user u owns rows offsets[u] : offsets[u + 1], oldest first (CTR: ordered
    by `impressions.order_impressions`). There are U users and V - 1 items; item 0 is padding."""

    name: str
    protocol: str
    notes: list[str]  # caveats to print with the results
    fingerprint: str  # hash of ids and sequences, compared with that of a checkpoint
    offsets: np.ndarray  # (U + 1,) int64
    item_ids: np.ndarray  # (rows,) int64 in 1..V-1
    timestamps: np.ndarray  # (rows,) float64 seconds; empty where the source has none
    ratings: np.ndarray  # (rows,) float64; empty where the source has none
    users: np.ndarray  # (U,) original ids
    items: np.ndarray  # (V - 1,) original ids; items[i - 1] is item i
    task: str = "matching"
    grown: bool = False  # since the model at hand was trained; see grown.py
    repeats: float = 0.0  # share of targets on items that the user has used before (repeats.describe_targets)
    titles: np.ndarray = field(default_factory=lambda: np.zeros(0, str))  # (V - 1,), or empty
    genre_names: np.ndarray = field(default_factory=lambda: np.zeros(0, str))  # (V - 1,), or empty
    cold_items: np.ndarray = field(default_factory=no_numbers)  # sorted; held out of training
    profiles: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # (U, P) codes
    words: dict[str, np.ndarray] = field(default_factory=dict)  # genres, year, title: (V - 1, K) codes
    settings: dict = field(default_factory=dict)  # with which the data were prepared (prepare.settings_of)
    num_rows: int = 0  # read, before a task or setting leaves some out
    meanings: dict[str, str] = field(default_factory=dict)  # per column: features.meaning of its values
    values: dict[str, list[str]] = field(default_factory=dict)  # per column: texts behind its codes
    # Impressions only (--task=ctr, see reclm/data/impressions.py): each (rows,), otherwise empty.
    labels: np.ndarray = field(default_factory=no_numbers)  # 0 or 1
    splits: np.ndarray = field(default_factory=no_numbers)  # values of impressions.SPLITS
    history_lengths: np.ndarray = field(default_factory=no_numbers)  # its history: the user's first n rows
    contexts: np.ndarray = field(default_factory=no_numbers)  # codes of the column context, from 1
    # Optional inputs of this run, empty unless requested; see features.choose_inputs.
    profile_sizes: tuple[int, ...] = ()
    codes: dict[str, np.ndarray] = field(default_factory=dict)  # per action: (rows,), 0 = unknown
    features: dict[str, np.ndarray] = field(default_factory=dict)  # per item: (V - 1, K) or (V - 1, F)
    negative: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # (rows,) negative feedback

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def vocabulary(self) -> Vocabulary:
        """The sizes and item features that the model of this run is built for."""
        return Vocabulary(
            self.num_items,
            self.num_users,
            self.profile_sizes,
            code_sizes={name: int(codes.max(initial=0)) for name, codes in self.codes.items()},
            features=self.features,
            cold_items=self.cold_items,
            meanings=self.meanings,
        )

    @cached_property
    def ids(self) -> str:
        """Hash of the original ids, 16 hex digits: datasets that share it number users and items alike."""
        return hash_ids((self.items, self.users)).hexdigest()[:16]

    @cached_property
    def user_keys(self) -> np.ndarray:
        """(U,) int64: a hash of each user's id, as which a checkpoint knows them."""
        hashes = [pd.util.hash_array(part.astype(str).astype(object)) for part in parts(self.users)]
        return np.concatenate([np.zeros(0, np.uint64), *hashes]).view(np.int64)

    @cached_property
    def last_time(self) -> float | None:
        """Seconds since 1970 of the latest row, of impressions the latest training row; None if untimed."""
        times = self.timestamps
        if len(times) and len(self.splits):
            times = times[self.splits == SPLITS["train"]]
        return max((float(part.max()) for part in parts(times)), default=None)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(U,) int64: number of rows per user."""
        return np.diff(self.offsets)

    @cached_property
    def item_counts(self) -> np.ndarray:
        """(V - 1,) int32: rows of each item."""
        return count_items(self.item_ids, self.num_items)[1:].astype(np.int32)

    @property
    def ranked_users(self) -> np.ndarray:
        """(n,) int64: the users to evaluate, those with a training, a validation and a test item."""
        return np.flatnonzero(self.lengths >= 3)

    @cached_property
    def train_lengths(self) -> np.ndarray:
        """(U,) int64: training rows per user (leave-one-out): all but the last two; of 1 or 2, all."""
        return np.where(self.lengths >= 3, self.lengths - 2, self.lengths)

    @cached_property
    def owner(self) -> np.ndarray:
        """(rows,) int64: the user of each row."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    @cached_property
    def place(self) -> np.ndarray:
        """(rows,) int64: position of each row in the sequence of its user, from 0."""
        return np.arange(len(self.item_ids)) - self.offsets[self.owner]

    @property
    def in_training(self) -> np.ndarray:
        """(rows,) bool: True for the training rows of leave-one-out."""
        return self.place < self.train_lengths[self.owner]

    def release(self) -> None:
        """Take what was read of the sequences out of the memory of this process (cache.release)."""
        release(self.item_ids, self.timestamps, self.ratings)
