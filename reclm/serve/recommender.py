"""Recommender: a trained model, its items and, where they are known, its users."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from reclm.data.histories import Histories, read_histories
from reclm.errors import UserError
from reclm.serve.about import About
from reclm.serve.catalogue import Catalogue, Filters
from reclm.serve.engine import Engine
from reclm.serve.person import Person, Reads, make_batch
from reclm.serve.top_k import FEW, score_items, top_k

AT_ONCE = 64  # persons in one pass through the model
EVERYTHING = Filters()
EVERY_ITEM = slice(None)


@dataclass(frozen=True)
class Item:
    """A recommended item. `score` is a dot product, comparable within one list only, or a probability with a
    model of --task=ctr."""

    id: str
    title: str
    score: float
    genres: str = ""


@dataclass(frozen=True)
class Reason:
    """An item of the history, and by how much the score of a recommendation falls without it."""

    id: str
    title: str
    drop: float


class Recommender:
    """Recommends items to persons of the training data and to new ones. Build it with `load`.

    A history is a Person, or an iterable of ids or titles, oldest first, as `person` reads them. Where a
    parameter is called `item`, it is an id or a title."""

    def __init__(
        self, engine: Engine, catalogue: Catalogue, reads: Reads, about: About, histories: Path | None = None
    ):
        self.engine, self.catalogue, self.reads, self.about = engine, catalogue, reads, about
        self.histories_file = histories
        self.adapters: list[str] = []  # names; Person.adapter counts them from 1

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        quantize: str = "none",
        adapters: Sequence[Path] = (),
        merged: Path | None = None,
    ) -> "Recommender":
        """The recommender of a checkpoint file, of a folder of the hub (reclm/serve/hub.py), or of one that
        scripts/export.py has written, which needs onnxruntime and no torch. `quantize` is as --quantize. Each
        person may name one of the `adapters` of a checkpoint (reclm/adapt/lora.py); the adapter `merged` is
        used for all. Raises UserError if a file is missing, damaged or of another kind."""
        path = Path(path)
        if adapters and quantize != "none":
            raise UserError(f"adapters change float32 weights: leave out --quantize={quantize}")
        if path.is_dir() and (adapters or merged):
            raise UserError(f"an adapter needs the checkpoint it was trained from, not the folder {path}")
        if (path / "model.safetensors").is_file():
            from reclm.serve.hub import open_model

            return cls(*open_model(path, device, quantize))
        if path.is_dir():
            if quantize != "none":
                raise UserError(f"{path} is an export: export its checkpoint with --quantize={quantize}")
            from reclm.serve.exported import open_export

            return cls(*open_export(path))
        from reclm.serve.trained import open_checkpoint, put_adapters

        recommender = cls(*open_checkpoint(path, device, quantize, merged))
        if adapters:
            recommender.adapters = put_adapters(recommender.engine, path, adapters)
        return recommender

    @cached_property
    def histories(self) -> Histories:
        """The users of the training data. Raises UserError if they are unknown here."""
        if self.histories_file is None:
            raise UserError("this model comes without its users: name the items of a person instead")
        known = read_histories(self.histories_file)
        if known.item_ids.max(initial=0) > len(self.catalogue):
            raise UserError(f"{self.histories_file} belongs to another model: it has items that are not here")
        return known

    @property
    def knows_users(self) -> bool:
        return self.histories_file is not None and self.histories_file.is_file()

    @property
    def is_ctr(self) -> bool:
        return self.about.config["task"] == "ctr"

    def describe(self) -> dict[str, Any]:
        """What a person should know of the model, as plain values"""
        about, reads, catalogue = self.about, self.reads, self.catalogue
        years = catalogue.years[catalogue.years > 0]
        return {
            "dataset": about.dataset,
            "protocol": about.protocol,
            "trained": about.trained,
            "items": len(catalogue),
            "titled": catalogue.titled,
            "reads": {
                "ratings": reads.codes.get("actions", []),
                "profile": reads.profile,
                "times": reads.times,
                "request_time": reads.request_time,
                "max_len": reads.max_len,
            },
            "genres": catalogue.genre_names,
            "years": [int(years.min()), int(years.max())] if len(years) else None,
            "task": about.config["task"],
            "adapters": self.adapters,
        }

    # ------------------------------------------------------------------ persons

    def person(
        self,
        history: Iterable[str],
        ratings: Sequence[str | float | None] = (),
        profile: dict[str, str] | None = None,
        at: float | None = None,
        times: Sequence[float] = (),
        adapter: str | None = None,
    ) -> Person:
        """A person with these actions, oldest first, each an id or a title.

        `ratings` and `times` (seconds since 1970) have one entry per action, or none; `profile` is like
        {"gender": "F", "age": "25"}; `at` is the time of the request, `adapter` one of `adapters`. Raises
        UserError for an unknown item or adapter, for values that the model does not know or does not read,
        and if an action is after the request."""
        if adapter is not None and adapter not in self.adapters:
            raise UserError(f"there is no adapter {adapter!r:.80}, but {', '.join(self.adapters) or 'none'}")
        items = np.array([self.catalogue.number(text) for text in history], np.int64)
        for name, values in (("ratings", ratings), ("times", times)):
            if len(values) not in (0, len(items)):
                raise UserError(f"{len(items)} items, but {len(values)} {name}: give one per item, or none")
        codes = {}
        if any(rating is not None for rating in ratings):
            read = self.reads.code
            codes["actions"] = np.array([0 if r is None else read("actions", str(r)) for r in ratings])
        if (at is not None or len(times)) and not self.reads.times:
            raise UserError("this model does not read times: leave them out")
        moments = np.array([*times, *([] if at is None else [at])], np.float64)
        if len(moments) and (not np.isfinite(moments).all() or (np.diff(moments) < 0).any()):
            raise UserError("times must be finite, in order and not after the request")
        times = np.full(len(items), at) if at is not None and not len(times) else moments[: len(times)]
        number = 0 if adapter is None else 1 + self.adapters.index(adapter)
        return Person(items, times, codes, self.reads.profile_codes(profile or {}), at, adapter=number)

    def user(self, user: str, at: float | None = None) -> Person:
        """The user of the training data with this id and their whole history, with the request at the time
        `at` [default: that of the last action]. Raises UserError for an unknown id."""
        return self.user_at(self.histories.number(str(user)), at)

    def user_at(self, index: int, at: float | None = None) -> Person:
        """The same by index, 0..U-1."""
        known = self.histories
        rows = slice(known.offsets[index], known.offsets[index + 1])
        names = self.reads.codes.keys() & known.codes.keys()
        codes = {name: known.codes[name][rows].astype(np.int64) for name in names}
        items, times = known.item_ids[rows].astype(np.int64), known.timestamps[rows]
        return Person(items, times, codes, known.profiles[index].astype(np.int64), at, int(index))

    def as_person(self, history: "Person | Iterable[str]") -> Person:
        if isinstance(history, str):  # else its letters would be items
            raise UserError(f"a history is a list of items: [{history!r:.60}]")
        return history if isinstance(history, Person) else self.person(history)

    # ------------------------------------------------------------------ recommendations

    def recommend(
        self, history: "Person | Iterable[str]", k: int = 10, filters: Filters = EVERYTHING
    ) -> list[Item]:
        """The k best items for a person, best first, of those that `filters` allows; fewer only where fewer
        are allowed. Raises UserError for an empty history."""
        return self.recommend_batch([history], k, filters)[0]

    def recommend_batch(
        self, histories: "Sequence[Person | Iterable[str]]", k: int = 10, filters: Filters = EVERYTHING
    ) -> list[list[Item]]:
        """`recommend` for several persons."""
        people = [self.as_person(history) for history in histories]
        found = [self.best(people[i : i + AT_ONCE], k, filters) for i in range(0, len(people), AT_ONCE)]
        return [self.items(*row) for rows in found for row in rows]

    def best(self, people: Sequence[Person], k: int, filters: Filters) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per person (item numbers, scores), (n,) each with n <= k. Raises UserError for k < 1."""
        if k < 1:
            raise UserError(f"k={k} must be at least 1")
        if self.is_ctr:
            return [self.best_of_candidates(person, k, filters) for person in people]
        return self.best_of(self.engine.hidden(make_batch(people, self.reads)), people, k, filters)

    def best_of(
        self, hidden: np.ndarray, people: Sequence[Person], k: int, filters: Filters
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The same from the user embeddings (B, D). Raises UserError for non-finite scores."""
        left_out, includes_seen = self.catalogue.left_out(filters), self.includes_seen(filters)
        if len(people) > FEW and hasattr(self.engine.table, "best"):  # a PQTable
            nothing = np.zeros(0, np.int64)
            seen = [nothing if includes_seen else person.items for person in people]
            return self.engine.table.best(hidden, k, left_out, seen)
        scores = self.scores(hidden, people)  # (B, V)
        if not np.isfinite(scores.sum()):
            raise UserError("the model gives non-finite scores: use another checkpoint")
        # Filters come before the choice of k: the other order would return fewer than k.
        scores[:, left_out] = -np.inf
        if not includes_seen:
            for row, person in zip(scores, people, strict=True):
                row[person.items] = -np.inf  # of the whole history, not only what the model sees of it
        return [(found, row[found]) for row, found in zip(scores, top_k(scores, k), strict=True)]

    def scores(
        self, hidden: np.ndarray, people: Sequence[Person], numbers: np.ndarray | slice = EVERY_ITEM
    ) -> np.ndarray:
        """User embeddings (B, D) -> scores (B, n) of the items `numbers` (n,)"""
        table = self.engine.table
        scores = score_items(hidden, table if numbers is EVERY_ITEM else table[numbers])
        if any(person.adapter for person in people):
            ids = np.array([person.adapter for person in people])
            scores += self.engine.score_update(hidden, ids, numbers)
        return scores

    def includes_seen(self, filters: Filters) -> bool:
        if filters.include_seen is not None:
            return filters.include_seen
        return self.about.config.get("filter_seen") is False

    def best_of_candidates(self, person: Person, k: int, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
        """The same with a model of --task=ctr, whose scores are probabilities of a positive action."""
        allowed = np.ones(len(self.catalogue) + 1, bool)
        allowed[self.catalogue.left_out(filters)] = False
        if not self.includes_seen(filters):
            allowed[person.items] = False
        candidates = np.flatnonzero(allowed)
        if not len(candidates):
            return candidates, np.zeros(0, np.float32)
        probabilities = self.probabilities(person, candidates)
        (chosen,) = top_k(probabilities[None], k)
        return candidates[chosen], probabilities[chosen]

    def probabilities(
        self, person: Person, candidates: np.ndarray, times: np.ndarray | None = None
    ) -> np.ndarray:
        """Item numbers (C,) -> (C,) probabilities of a positive action on each, as the next one, at
        `times` (C,) [default: that of the request]."""
        batch = make_batch([person], self.reads)
        shape = (1, len(candidates))
        batch |= {"candidate_ids": candidates[None], "history_lengths": np.full(shape, batch["lengths"][0])}
        if self.reads.times:
            at = np.full(len(candidates), person.request_time(self.reads)) if times is None else times
            batch["candidate_times"] = at[None]
        if "contexts" in self.reads.codes:
            batch["candidate_contexts"] = np.zeros(shape, np.int64)
        return self.engine.probabilities(batch)[0]

    def items(self, numbers: np.ndarray, scores: np.ndarray) -> list[Item]:
        return [self.item(*pair) for pair in zip(numbers.tolist(), scores.tolist(), strict=True)]

    def item(self, number: int, score: float = 0.0) -> Item:
        shown, place = self.catalogue, number - 1
        return Item(shown.ids[place], shown.titles[place], score, shown.genres[place])

    def popular(self, k: int = 10, filters: Filters = EVERYTHING) -> list[Item]:
        """The k most used items of the training data, with their number of actions as score."""
        counts = np.concatenate([[0], self.catalogue.counts]).astype(np.float64)
        counts[self.catalogue.left_out(filters)] = -np.inf
        (chosen,) = top_k(counts[None], k)
        return self.items(chosen, counts[chosen])

    # ------------------------------------------------------------------ explanations

    @cached_property
    def lengths(self) -> np.ndarray:
        """(V,) of the item factors"""
        numbers, size = np.arange(len(self.catalogue) + 1), 2**16
        parts = (self.engine.table[numbers[i : i + size]] for i in range(0, len(numbers), size))
        return np.concatenate([np.linalg.norm(part, axis=1) for part in parts]).clip(min=1e-12)

    def similar(self, item: str, k: int = 10, filters: Filters = EVERYTHING) -> list[Item]:
        """The k items whose factors have the largest cosine with those of an item, which is the score."""
        number = self.catalogue.number(item)
        factor = self.engine.table[np.array([number])] / self.lengths[number]  # (1, D)
        cosines = score_items(factor, self.engine.table)[0] / self.lengths
        cosines[self.catalogue.left_out(filters)] = -np.inf
        cosines[number] = -np.inf
        (chosen,) = top_k(cosines[None], k)
        return self.items(chosen, cosines[chosen])

    def why(
        self, history: "Person | Iterable[str]", items: Sequence[str], most: int = 2, last: int | None = None
    ) -> list[list[Reason]]:
        """For each of `items` the (at most) `most` items of the history whose removal lowers its score most,
        largest first. Exact: each item of the history [default: those that the model sees, with `last` the
        latest so many] is removed in turn and the rest is read again, all in one batch."""
        person = self.as_person(history)
        numbers = np.array([self.catalogue.number(item) for item in items], np.int64)
        recent = dict.fromkeys(person.items[::-1][: min(last or len(person), self.reads.max_len)].tolist())
        removed = [number for number in recent if (person.items != number).any()]
        people = [person, *(person.keep(person.items != number) for number in removed)]
        scores = np.concatenate(
            [self.scores_of(people[i : i + AT_ONCE], numbers) for i in range(0, len(people), AT_ONCE)]
        )  # (1 + n, items)
        drops = scores[0] - scores[1:]
        reasons = []
        for drop in drops.T:
            places = [place for place in np.argsort(-drop, kind="stable")[:most] if drop[place] > 0]
            reasons.append([self.reason(removed[place], float(drop[place])) for place in places])
        return reasons

    def scores_of(self, people: Sequence[Person], numbers: np.ndarray) -> np.ndarray:
        """Scores (B, n) of the same n items for each person"""
        if self.is_ctr:
            return np.stack([self.probabilities(person, numbers) for person in people])
        return self.scores(self.engine.hidden(make_batch(people, self.reads)), people, numbers)

    def reason(self, number: int, drop: float) -> Reason:
        return Reason(self.catalogue.ids[number - 1], self.catalogue.titles[number - 1], drop)

    def session(self, history: "Person | Iterable[str]" = ()) -> "Session":
        """A session that goes on from a history, which may be empty. Raises UserError with a model of
        --task=ctr."""
        if self.is_ctr:
            raise UserError("a session needs a model of --task=matching")
        return Session(self, self.as_person(history))


class Session:
    """One person's history in a KV cache: adding an action costs the pass of that action alone, and the
    recommendations are exactly those of reading the whole history again."""

    def __init__(self, recommender: Recommender, person: Person):
        self.recommender = recommender
        self.set(person)

    def set(self, history: "Person | Iterable[str]") -> None:
        """Replace the history, e.g. by one with an item removed or moved; it is read anew."""
        self.person = self.recommender.as_person(history)
        self.state = self.hidden = None
        if len(self.person):
            self.read()

    def read(self) -> None:
        batch = make_batch([self.person], self.recommender.reads)
        self.state, self.hidden = self.recommender.engine.start(batch)

    def add(
        self,
        item: str,
        rating: str | float | None = None,
        time: float | None = None,
        next_time: float | None = None,
    ) -> None:
        """Append an action, an id or a title; `time` is when it happened [default: the time of the request
        before it], `next_time` the time of the request that follows [default: `time`]. Raises UserError as
        Recommender.person does, and then leaves the session as it was."""
        reads, before = self.recommender.reads, self.person
        asked = before.request_time(reads)
        if reads.times and time is None:
            time = asked
        times = (time,) if reads.times else ()
        new = self.recommender.person([item], [rating], at=next_time, times=times)
        self.person = before.followed_by(new, reads)
        # What the model made of the last action may depend on when the next request would come.
        as_expected = not reads.request_time or time == asked
        if self.state is not None and as_expected:
            action = make_batch([self.person.keep(slice(-1, None))], reads)
            self.hidden = self.recommender.engine.extend(self.state, action)
        if self.state is None or not as_expected or self.hidden is None:
            self.read()

    def recommend(self, k: int = 10, filters: Filters = EVERYTHING) -> list[Item]:
        """The k best items now. Raises UserError for an empty history."""
        if self.hidden is None:
            raise UserError("an empty history: add an item first")
        recommender = self.recommender
        (best,) = recommender.best_of(self.hidden[None], [self.person], k, filters)
        return recommender.items(*best)
