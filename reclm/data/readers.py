"""Read the raw files of the named datasets into tables: rows in file order, ids unchanged, every row checked.

A reader takes the files of one dataset and returns `RawData`. It raises `UserError` with the file
and the line of the first bad row. The user's own data are read by own.py."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from reclm.data.columns import IDS, refuse, to_numbers
from reclm.data.files import Layout, line_of_row, read_text, sample_lines
from reclm.data.impressions import positive_core
from reclm.errors import UserError

RATED = "user item rating timestamp"  # columns of GroupLens' rating files, in order
TYPES = {  # of columns that are not what pyarrow would guess, or must be checked
    "user": pa.int64(), "item": pa.int64(), "rating": pa.float64(), "timestamp": pa.float64(),
    "label": pa.int64(), "context": pa.int64(), "zip": pa.string(), "year": pa.string(),
}  # fmt: skip
LEAST = {"rating": -np.finfo(float).max, "timestamp": 0}  # the smallest value allowed
ML_100K_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir"
    " Horror Musical Mystery Romance Sci-Fi Thriller War Western"
)
M1_LISTS = 3  # train, validation, test
M1_MIN_COUNT = 20
X1_COLUMNS = {"user_id": "user", "item_id": "item", "label": "label", "tag_id": "context"}


@dataclass
class RawData:
    """The tables that a reader returns, with original ids: int64, or categoricals of text."""

    interactions: pd.DataFrame  # user, item and any others of columns.ALIASES; rows in file order
    users: pd.DataFrame | None = None  # user and any others, such as gender, age, occupation, zip
    items: pd.DataFrame | None = None  # item, title ("Toy Story (1995)"), genres ("Action|Comedy")
    notes: list[str] = field(default_factory=list)  # how the files were read


def read_table(
    file: Path, sep: str, columns: str, has_header: bool = False, encoding: str = "utf-8-sig"
) -> pd.DataFrame:
    """A delimited file whose columns are known. Raises UserError for the first malformed row."""
    layout = Layout(sep, tuple(columns.split()), has_header, sep == ",", encoding)
    types = {name: TYPES.get(name) for name in layout.names}
    try:
        frame = read_text(file, layout, types)[0].to_pandas()
    except pa.ArrowInvalid:
        frame = read_checked(file, layout, types)
    if frame.empty:
        raise UserError(f"{file} is empty")
    for name in frame.columns.intersection(list(LEAST)):
        if not (frame[name] >= LEAST[name]).all() or frame[name].max() == np.inf:
            return read_checked(file, layout, types)
    return frame


def read_checked(file: Path, layout: Layout, types: dict[str, pa.DataType | None]) -> pd.DataFrame:
    """`read_table`, slowly. Raises UserError for the first value that is not of its type or too small; an
    integer may be written 1.0."""
    table, _ = read_text(file, layout, dict.fromkeys(layout.names, pa.string()))
    frame = table.to_pandas()
    for name, kind in types.items():
        if kind in (pa.int64(), pa.float64()):
            numbers = to_numbers(table[name])
            bad = ~(numbers >= LEAST.get(name, -np.inf)) | ((numbers % 1 != 0) & (kind == pa.int64()))
            if bad.any():
                refuse(name, table[name], int(bad.argmax()), lambda row: line_of_row(file, layout, row))
            frame[name] = numbers.astype(kind.to_pandas_dtype())
    return frame


def _read_movielens(files: tuple[Path, ...], *tables: tuple[str, str, str], has_header=False) -> list:
    """Read the `tables` (file name, separator, columns); None for each whose file is not in `files`."""
    path, found = {file.name: file for file in files}, []
    for name, sep, columns in tables:
        encoding = "latin-1" if name in ("movies.dat", "u.item") else "utf-8-sig"
        found.append(read_table(path[name], sep, columns, has_header, encoding) if name in path else None)
    return found


def _read_grouplens_1m(files: tuple[Path, ...]) -> RawData:
    """ratings.dat, with users.dat and movies.dat if present."""
    users = ("users.dat", "::", "user gender age occupation zip")
    items = ("movies.dat", "::", "item title genres")
    return RawData(*_read_movielens(files, ("ratings.dat", "::", RATED), users, items))


def _read_grouplens_100k(files: tuple[Path, ...]) -> RawData:
    """u.data, with u.user and u.item if present."""
    users = ("u.user", "|", "user age gender occupation zip")
    items = ("u.item", "|", f"item title released video url {ML_100K_GENRES}")
    ratings, users, items = _read_movielens(files, ("u.data", "\t", RATED), users, items)
    if items is not None:
        flags = items[ML_100K_GENRES.split()] == 1
        items["genres"] = ["|".join(flags.columns[row]) for row in flags.to_numpy()]
        items = items[["item", "title", "genres"]]
    return RawData(ratings, users, items)


def _read_recbole_100k(files: tuple[Path, ...]) -> RawData:
    """The wheel's copy of the same rows: tab-separated, with its own headers."""
    users = ("ml-100k.user", "\t", "user age gender occupation zip")
    items = ("ml-100k.item", "\t", "item title year genres")
    ratings = ("ml-100k.inter", "\t", RATED)
    ratings, users, items = _read_movielens(files, ratings, users, items, has_header=True)
    if items is not None:
        items["title"] += " (" + items.pop("year") + ")"
        items["genres"] = items["genres"].str.replace(" ", "|")
    return RawData(ratings, users, items)


def _read_sasrec(files: tuple[Path, ...]) -> RawData:
    """One "user item" pair per line, in time order."""
    return RawData(read_table(files[0], " ", "user item"))


def _read_m1(files: tuple[Path, ...]) -> RawData:
    """The rows of ratings.dat, the last file, that the item lists (list index = user) contain: ids, ratings
    and order are those of ratings.dat."""
    parts = []
    for file in files[:M1_LISTS]:
        try:
            lists = pd.Series(json.loads(file.read_text()))
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error})") from error
        items = lists.explode().dropna()
        parts.append(pd.DataFrame({"user": items.index, "item": items.to_numpy("int64")}))
    listed = pd.concat(parts, ignore_index=True)
    ratings = _read_grouplens_1m(files[M1_LISTS:]).interactions
    # Inferred by matching the files: reczoo kept the 20-core (users and items with 20 or more ratings,
    # repeated until all have them) and numbered the ids in text order: "1", "10", "100", ...
    core = positive_core(ratings.assign(label=1), M1_MIN_COUNT).drop(columns="label")
    for column in IDS:
        original = np.array(sorted(core[column].unique(), key=str))
        if listed[column].max() + 1 != len(original):
            raise UserError(f"{files[-1]} is not MovieLens-1M's ({column}s differ from ml-1m-m1): replace it")
        listed[column] = original[listed[column]]
    both = core.merge(listed, how="inner", on=["user", "item"])
    if not len(both) == len(core) == len(listed):
        raise UserError(f"{files[-1]} is not MovieLens-1M's (ratings differ from ml-1m-m1): replace it")
    return RawData(core.reset_index(drop=True))


def _read_x1(files: tuple[Path, ...]) -> RawData:
    """train.csv, valid.csv and test.csv, concatenated; the columns of each may be in any order."""
    parts = []
    for file in files:
        header = sample_lines(file)[0][0].strip().split(",")
        if sorted(header) != sorted(X1_COLUMNS):
            raise UserError(
                f"{file} needs the columns {', '.join(X1_COLUMNS)}, each once; it has: {', '.join(header)}"
            )
        part = read_table(file, ",", " ".join(X1_COLUMNS[name] for name in header), has_header=True)
        parts.append(part[list(X1_COLUMNS.values())].assign(split=file.stem))
    return RawData(pd.concat(parts, ignore_index=True))


READERS: dict[str, Callable[[tuple[Path, ...]], RawData]] = {
    "grouplens-1m": _read_grouplens_1m,
    "sasrec-txt": _read_sasrec,
    "reczoo-m1": _read_m1,
    "reczoo-x1": _read_x1,
    "grouplens-100k": _read_grouplens_100k,
    "recbole-100k": _read_recbole_100k,
}
