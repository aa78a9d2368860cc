"""A person's history and profile, in the numbers and codes of a model, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from reclm.errors import UserError


def no_numbers() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Person:
    """What a model knows of one person; n actions, oldest first."""

    items: np.ndarray  # (n,) int64 numbers of Catalogue
    times: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (n,) seconds since 1970, or empty
    codes: dict[str, np.ndarray] = field(default_factory=dict)  # per field: (n,) int64, 0 = unknown
    profile: np.ndarray = field(default_factory=no_numbers)  # (P,) int64, 0 = unknown
    at: float | None = None  # time of the request; None = that of the last action
    user: int | None = None  # index in the training data; None = a person it does not contain
    adapter: int = 0  # number in Recommender.adapters; 0 = the model as it is

    def __len__(self) -> int:
        return len(self.items)

    def keep(self, places: np.ndarray | slice) -> "Person":
        """The person with only the actions at these places."""
        codes = {name: codes[places] for name, codes in self.codes.items()}
        times = self.times[places] if len(self.times) else self.times
        return replace(self, items=self.items[places], times=times, codes=codes)

    def times_in(self, reads: "Reads") -> np.ndarray:
        """(n,) seconds since 1970 of the actions for a model, which cannot do without"""
        return self.times if len(self.times) else np.full(len(self), reads.default_time)

    def request_time(self, reads: "Reads") -> float:
        """Seconds since 1970 of the request after the last action"""
        if self.at is not None:
            return self.at
        return float(self.times[-1]) if len(self.times) else reads.default_time

    def followed_by(self, new: "Person", reads: "Reads") -> "Person":
        """The person with one more action and the time of the next request, those of `new`. Raises UserError
        if it is earlier than the last action."""
        times = self.times
        if reads.times:
            times = self.times_in(reads)
            if len(times) and new.times[0] < times[-1]:
                raise UserError("an action cannot be earlier than the one before it")
            times = np.append(times, new.times)
        none = np.zeros(len(self), np.int64)
        codes = {
            name: np.append(self.codes.get(name, none), new.codes.get(name, 0))
            for name in self.codes.keys() | new.codes.keys()
        }
        items = np.append(self.items, new.items)
        return replace(self, items=items, times=times, codes=codes, at=new.at)


@dataclass(frozen=True)
class Reads:
    """What a model reads of a person besides the items."""

    max_len: int
    times: bool  # times of actions
    request_time: bool  # time of the request
    default_time: float  # seconds since 1970, for actions and requests without one: the last in the data
    codes: dict[str, list[str]]  # per code field: the texts behind 1, 2, ...
    profile: dict[str, list[str]]  # the same per profile field
    vector_per_user: bool  # --user_embedding=explicit: only persons of the training data have one

    def code(self, name: str, text: str) -> int:
        """The code of a rating or context. Raises UserError if the model does not know it."""
        if name not in self.codes:
            raise UserError(f"this model does not read {SAID.get(name, name)}: leave out {text!r:.40}")
        return look_up(SAID.get(name, name), text, self.codes[name])

    def profile_codes(self, given: dict[str, str]) -> np.ndarray:
        """{field: text} -> (P,) int64, 0 for a field that is not given. Raises UserError for an unknown field
        or value."""
        for name in given:
            if name not in self.profile:
                known = ", ".join(self.profile) or "none"
                raise UserError(f"this model does not read the profile field {name!r:.40}: it reads {known}")
        codes = [
            look_up(name, given[name], self.profile[name]) if name in given else 0 for name in self.profile
        ]
        return np.array(codes, np.int64)


SAID = {"actions": "ratings", "contexts": "contexts"}  # what people call the code fields


def look_up(name: str, text: str, texts: list[str]) -> int:
    """The code, from 1, of a text. An age belongs to the group with the next lower bound, a zip code to the
    one of its first character. Raises UserError if it is unknown."""
    text = text.strip()
    if name == "age":
        try:
            below = [i for i, bound in enumerate(texts, 1) if float(bound) <= float(text)]
        except ValueError:
            below = []
        if below:
            return below[-1]
    if name == "zip":
        text = text[:1]
    known = {shown.casefold(): code for code, shown in enumerate(texts, 1)}
    if (code := known.get(text.casefold())) is None:
        try:
            code = known.get(f"{float(text):g}")
        except ValueError:
            code = None
    if code is None:
        shown = ", ".join(texts[:20]) + (", ..." if len(texts) > 20 else "")
        raise UserError(f"{name}: {text!r:.40} is not one of {shown or 'the values in the training data'}")
    return code


def make_batch(people: Sequence[Person], reads: Reads) -> dict[str, np.ndarray]:
    """The batch of data.py with the last max_len actions of B persons: item_ids (B, T), lengths (B,),
    num_before (B,), user_ids (B,), as the model reads them timestamps, next_timestamps and codes (B, T) and
    profiles (B, P), and where persons chose adapters adapter_ids (B,). Raises UserError for an empty history,
    and for a new person where the model needs a vector per user."""
    sizes = np.array([len(person) for person in people])
    if not sizes.all():
        raise UserError("an empty history: name at least one item")
    lengths = np.minimum(sizes, reads.max_len)
    if reads.vector_per_user and any(person.user is None for person in people):
        raise UserError("this model has a vector per user (--user_embedding=explicit): only its own users")
    width = int(lengths.max())
    real = np.arange(width) < lengths[:, None]

    def pad(rows: list[np.ndarray], dtype: type) -> np.ndarray:
        """The last values of each row, (B, T), then zeros"""
        out = np.zeros((len(rows), width), dtype)
        out[real] = np.concatenate([row[-n:] for row, n in zip(rows, lengths, strict=True)])
        return out

    batch = {
        "item_ids": pad([person.items for person in people], np.int64),
        "lengths": lengths,
        "num_before": sizes - lengths,
        "user_ids": np.array([person.user or 0 for person in people]),
    }
    if reads.times:
        times = [person.times_in(reads) for person in people]
        requests = [person.request_time(reads) for person in people]
        after = [np.append(row[1:], at) for row, at in zip(times, requests, strict=True)]
        batch |= {"timestamps": pad(times, np.float64), "next_timestamps": pad(after, np.float64)}
    if reads.profile:
        none = np.zeros(len(reads.profile), np.int64)
        batch["profiles"] = np.stack([person.profile if len(person.profile) else none for person in people])
    for name in reads.codes:
        rows = [person.codes.get(name, np.zeros(len(person), np.int64)) for person in people]
        batch[name] = pad(rows, np.int64)
    if any(person.adapter for person in people):
        batch["adapter_ids"] = np.array([person.adapter for person in people])
    return batch
