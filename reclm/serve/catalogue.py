"""The items of a model: find one by id or title, search as you type, and filter."""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from reclm.errors import UserError

YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
ARTICLES = "the a an le la les l il lo gli i el los las un una une der die das ein eine de het".split()
MOST_SHOWN = 3  # titles that an error message suggests


@dataclass(frozen=True)
class Filters:
    """Which items may be recommended. Numbers are those of Catalogue."""

    genres: tuple[str, ...] = ()  # one of them; empty = any
    years: tuple[int, int] | None = None  # first and last year; items without a year are then left out
    exclude: tuple[int, ...] = ()  # none of these
    candidates: tuple[int, ...] | None = None  # only these
    min_count: int = 0  # items with fewer actions in the training data are left out
    include_seen: bool | None = None  # items of the person's history, too; None = as the model was evaluated


def plain(text: str) -> str:
    """A title without case, accents, punctuation and articles at its beginning or, moved, at its end:
    "Matrix, The", "The Matrix" and "MATRIX" are "matrix"."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(c for c in text if not unicodedata.combining(c)).replace("&", " and ")
    words = re.findall(r"\w+", text.replace("'", ""))
    moved = "," in text and len(words) > 1 and words[-1] in ARTICLES and text.rpartition(",")[2].strip()
    if moved and re.fullmatch(r"\w+'?", moved):
        words = words[:-1]
    elif len(words) > 1 and words[0] in ARTICLES:
        words = words[1:]
    return " ".join(words)


def names_of(title: str) -> list[str]:
    """The plain names that find a title: whole, and each part in parentheses ("Postino, Il (The Postman)"),
    with the year at the end and without."""
    year = YEAR.search(title)
    bare = YEAR.sub("", title)
    parts = [bare, re.sub(r"\([^)]*\)", " ", bare).strip(), *re.findall(r"\(([^)]*)\)", bare)]
    names = dict.fromkeys(plain(re.sub(r"^a\.?k\.?a\.?\s+", "", part.strip())) for part in parts)
    names = [name for name in names if name]
    return names + [f"{name} {year[1]}" for name in names if year]


class Catalogue:
    """Items are numbered 1..V-1, as in the model; 0 is no item. Titles and genres may be empty."""

    def __init__(self, ids: Iterable, titles: Iterable[str], genres: Iterable[str], counts: np.ndarray):
        """Ids, titles and genres ("Crime|Drama") have one entry per item or, except for ids, none; `counts`
        (V - 1,) are actions in the training data. Raises UserError where their numbers differ."""
        self.ids = [str(item) for item in ids]
        self.titles = list(titles) or self.ids
        self.genres = list(genres) or [""] * len(self.ids)
        self.counts = counts if len(counts) else np.zeros(len(self.ids), np.int64)
        if not len(self.ids) == len(self.titles) == len(self.genres) == len(self.counts):
            raise UserError("the items of this model are damaged: ids, titles and genres differ in number")
        self.titled = self.titles is not self.ids

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def by_id(self) -> dict[str, int]:
        return {item: number for number, item in enumerate(self.ids, 1)}

    @cached_property
    def by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, title in enumerate(self.titles, 1):
            for name in names_of(title):
                found.setdefault(name, []).append(number)
        return found

    @cached_property
    def years(self) -> np.ndarray:
        """(V - 1,) int64 years at the end of the titles, 0 where there is none"""
        found = [YEAR.search(title) for title in self.titles]
        return np.array([int(year[1]) if year else 0 for year in found])

    @cached_property
    def genre_sets(self) -> list[set[str]]:
        return [set(text.split("|")) if text else set() for text in self.genres]

    @cached_property
    def genre_names(self) -> list[str]:
        return sorted(set().union(*self.genre_sets))

    def number(self, text: str) -> int:
        """The item with this id, or else this title, in any case, with or without year and article. Raises
        UserError for an unknown one, naming the closest titles, and for a title that several items have."""
        text = text.strip()
        if text in self.by_id:
            return self.by_id[text]
        year, name = YEAR.search(text), plain(YEAR.sub("", text))
        found = self.by_name.get(f"{name} {year[1]}" if year else name, []) if self.titled else []
        exact = [number for number in found if self.titles[number - 1].casefold() == text.casefold()]
        found = exact or found
        if len(found) == 1:
            return found[0]
        if found:
            shown = "; ".join(f"{self.titles[n - 1]} (id {self.ids[n - 1]})" for n in found[:MOST_SHOWN])
            raise UserError(f"{text!r:.80} may be {shown}: give the year or the id")
        raise UserError(f"there is no item {text!r:.80}: {self.suggest(text)}")

    def suggest(self, text: str) -> str:
        if not self.titled:
            return f"use an id, such as {', '.join(self.ids[:MOST_SHOWN])}"
        close = difflib.get_close_matches(plain(text[:200]), self.by_name, 5 * MOST_SHOWN, cutoff=0)
        likely = self.search(text, MOST_SHOWN) if plain(text) else []
        numbers = dict.fromkeys([*likely, *(self.by_name[name][0] for name in close)])
        return "closest are " + "; ".join(self.titles[number - 1] for number in [*numbers][:MOST_SHOWN])

    def id_number(self, item: str) -> int:
        """The number of the item with this id. Raises UserError if there is none."""
        if item not in self.by_id:
            raise UserError(f"there is no item with the id {item!r:.80}")
        return self.by_id[item]

    @cached_property
    def searched(self) -> list[tuple[int, str]]:
        """(number, " plain title year"), the most used items first"""
        order = np.argsort(-self.counts, kind="stable") + 1
        return [(n, " " + " ".join(dict.fromkeys(names_of(self.titles[n - 1])))) for n in order.tolist()]

    def search(self, query: str, k: int = 10) -> list[int]:
        """Numbers of at most k items in whose title each word of the query begins a word; those whose title
        begins with the query come first, then the most used ones."""
        words = [f" {word}" for word in plain(query[:200]).split()]
        if not words:
            return [number for number, _ in self.searched[:k]]
        found = [(n, text) for n, text in self.searched if all(word in text for word in words)]
        begins = "".join(words)
        found.sort(key=lambda entry: not entry[1].startswith(begins))
        return [number for number, _ in found[:k]]

    @lru_cache(maxsize=32)  # noqa: B019 (a catalogue lives as long as its model)
    def left_out(self, filters: Filters) -> np.ndarray:
        """The numbers of items that may not be recommended, and 0; seen items are not among them. Raises
        UserError for an unknown genre, for genres or years that the data do not have, and for a range of
        years that is empty."""
        allowed = np.ones(len(self) + 1, bool)
        allowed[0] = False
        if filters.genres:
            known = {name.casefold(): name for name in self.genre_names}
            unknown = [name for name in filters.genres if name.casefold() not in known]
            if unknown:
                names = ", ".join(self.genre_names) or "none: the item table has no genres"
                raise UserError(f"there is no genre {unknown[0]!r:.60}: known are {names}")
            wanted = {known[name.casefold()] for name in filters.genres}
            allowed[1:] &= [not wanted.isdisjoint(genres) for genres in self.genre_sets]
        if filters.years is not None:
            first, last = filters.years
            if first > last:
                raise UserError(f"the years {first}:{last} are an empty range: the earlier one comes first")
            if not self.years.any():
                raise UserError("the titles of these items have no years: leave --years out")
            allowed[1:] &= (self.years >= first) & (self.years <= last)
        if filters.min_count > 0:
            allowed[1:] &= self.counts >= filters.min_count
        if filters.candidates is not None:
            listed = np.zeros(len(allowed), bool)
            listed[list(filters.candidates)] = True
            allowed &= listed
        allowed[list(filters.exclude)] = False
        left_out = np.flatnonzero(~allowed)
        left_out.flags.writeable = False  # it is kept for the next call
        return left_out
