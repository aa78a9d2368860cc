"""What all of the program knows as the data: sequences, and the sizes that a model must have room for."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


def no_numbers() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Vocabulary:
    """What a model must have room for; with the weights all that inference needs of the data."""

    num_items: int
    num_users: int
    profile_sizes: tuple[int, ...] = ()  # codes of each field of a profile, with 0 for "unknown"
    code_sizes: dict[str, int] = field(default_factory=dict)  # largest code of each of Dataset.codes
    features: dict[str, np.ndarray] = field(default_factory=dict)  # of items; see reclm/data/features.py
    cold_items: np.ndarray = field(default_factory=no_numbers)  # never trained


@dataclass
class Dataset:
    """All sequences, one after another: user u owns rows offsets[u] : offsets[u + 1], oldest first."""

    name: str
    protocol: str
    notes: list[str]  # what a reader of the numbers must know; printed
    fingerprint: str  # of original ids and sequences: a checkpoint fits only its own
    offsets: np.ndarray  # (U + 1,) int64
    item_ids: np.ndarray  # (rows,) int64 in 1..V-1
    timestamps: np.ndarray  # (rows,) float64 seconds; empty where the source has none
    ratings: np.ndarray  # (rows,) float64; empty where the source has none
    users: np.ndarray  # (U,) original ids
    items: np.ndarray  # (V - 1,) original ids; items[i - 1] is item i
    task: str = "matching"
    titles: np.ndarray = field(default_factory=lambda: np.zeros(0, str))  # (V - 1,); empty without titles
    genre_names: np.ndarray = field(default_factory=lambda: np.zeros(0, str))  # (V - 1,) "Action|Comedy"
    cold_items: np.ndarray = field(default_factory=no_numbers)  # kept out of training
    profiles: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # (U, P) codes
    words: dict[str, np.ndarray] = field(default_factory=dict)  # genres, year, title: (V - 1, K) codes
    # Of impressions (--task=ctr; reclm/data/impressions.py), each (rows,) and empty elsewhere.
    labels: np.ndarray = field(default_factory=no_numbers)  # 0 or 1
    splits: np.ndarray = field(default_factory=no_numbers)  # one of impressions.SPLITS
    history_lengths: np.ndarray = field(default_factory=no_numbers)  # its history: that many first rows
    contexts: np.ndarray = field(default_factory=no_numbers)  # what else was known then; codes from 1 on
    # What this run gives the model, empty where it is not asked for; see features.choose_inputs.
    profile_sizes: tuple[int, ...] = ()
    codes: dict[str, np.ndarray] = field(default_factory=dict)  # of actions: (rows,) from 1 on, 0 = unknown
    features: dict[str, np.ndarray] = field(default_factory=dict)  # of items, one row each
    negative: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # (rows,) negative feedback

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            self.num_items,
            self.num_users,
            self.profile_sizes,
            code_sizes={name: int(codes.max(initial=0)) for name, codes in self.codes.items()},
            features=self.features,
            cold_items=self.cold_items,
        )

    @property
    def ids(self) -> str:
        """A hash of the original ids: with the same one, a user or an item has the same number."""
        return hashlib.sha256("\n".join(map(str, [*self.items, *self.users])).encode()).hexdigest()[:16]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def ranked_users(self) -> np.ndarray:
        """Users with at least one training, one validation and one test item."""
        return np.flatnonzero(self.lengths >= 3)

    @property
    def train_lengths(self) -> np.ndarray:
        """(U,) Leave-one-out: all but the last two; short sequences train whole."""
        return np.where(self.lengths >= 3, self.lengths - 2, self.lengths)

    @cached_property
    def owner(self) -> np.ndarray:
        """(rows,) the user of each row."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    @cached_property
    def place(self) -> np.ndarray:
        """(rows,) how many rows of its user come before each."""
        return np.arange(len(self.item_ids)) - self.offsets[self.owner]

    @property
    def in_training(self) -> np.ndarray:
        """(rows,) bool: leave-one-out trains on these."""
        return self.place < self.train_lengths[self.owner]
