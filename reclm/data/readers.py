"""Read raw files into tables: rows in file order, ids unchanged, every row checked.

A reader takes the files of one dataset and returns `RawData`. It raises `UserError` with the file
and the line of the first bad row.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_integer_dtype, is_string_dtype

from reclm.data.impressions import positive_core
from reclm.errors import UserError

IDS = ("user", "item")
RATED = "user item rating timestamp"  # columns of GroupLens' rating files, in order
SPLITS = {name: name for name in ("train", "valid", "test")}
SPLITS |= {"val": "valid", "validation": "valid", "dev": "valid"}  # names of others -> ours
NO_IDS = ("null", "nan", "none", "na", "n/a")  # as text, most likely a missing id
COLUMNS = {  # columns of interactions -> the values allowed in each
    "user": "an id",
    "item": "an id",
    "rating": "a number",
    "timestamp": "seconds, zero or more",
    "label": "0 or 1",  # 1 = positive, such as a click
    "context": "an id",  # known when the item is shown: a tag, a page
    "split": "train, valid or test",
}
FITS: dict[str, Callable[[pd.Series], pd.Series]] = {  # allowed values -> check of a numeric column
    "an id": lambda numbers: (numbers % 1 == 0) & (numbers.abs() <= 2**53),
    "a number": lambda numbers: np.isfinite(numbers),
    "seconds, zero or more": lambda numbers: (numbers >= 0) & (numbers < np.inf),
    "0 or 1": lambda numbers: numbers.isin((0, 1)),
}
ML_100K_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir"
    " Horror Musical Mystery Romance Sci-Fi Thriller War Western"
)
M1_LISTS = 3  # train, validation, test
M1_MIN_COUNT = 20
X1_COLUMNS = {"user_id": "user", "item_id": "item", "label": "label", "tag_id": "context"}


@dataclass
class RawData:
    """The tables that a reader returns, with original ids (int64 or str)."""

    interactions: pd.DataFrame  # user, item and any others of COLUMNS; rows in file order
    users: pd.DataFrame | None = None  # user and any others, such as gender, age, occupation, zip
    items: pd.DataFrame | None = None  # item, title ("Toy Story (1995)"), genres ("Action|Comedy")


def _read_movielens(files: tuple[Path, ...], *tables: tuple[str, str, str], **options) -> list:
    """Read the `tables` (file name, separator, columns); None for each whose file is not in `files`."""
    path, found = {file.name: file for file in files}, []
    for name, sep, columns in tables:
        encoding = "latin-1" if name in ("movies.dat", "u.item") else "utf-8-sig"
        text = {"encoding": encoding, "names": columns.split(), "dtype": {"zip": str, "year": str}}
        found.append(_read_text(path[name], sep, **text, **options) if name in path else None)
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
    ratings, users, items = _read_movielens(files, ratings, users, items, header=0)
    if items is not None:
        items["title"] += " (" + items.pop("year") + ")"
        items["genres"] = items["genres"].str.replace(" ", "|")
    return RawData(ratings, users, items)


def _read_sasrec(files: tuple[Path, ...]) -> RawData:
    """One "user item" pair per line, in time order."""
    return RawData(_read_text(files[0], " ", names=["user", "item"]))


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
        header = _csv_header(file)
        if sorted(header) != sorted(X1_COLUMNS):
            raise UserError(
                f"{file} needs the columns {', '.join(X1_COLUMNS)}, each once; it has: {', '.join(header)}"
            )
        part = _read_text(file, ",", header=0, names=[X1_COLUMNS[name] for name in header])
        parts.append(part[list(X1_COLUMNS.values())].assign(split=file.stem))
    return RawData(pd.concat(parts, ignore_index=True))


def _read_csv(files: tuple[Path, ...]) -> RawData:
    """The user's .csv or .tsv; ids stay text as written ("007" is not "7")."""
    file, quoting = files[0], csv.QUOTE_MINIMAL
    text = {column: str for column, must_be in COLUMNS.items() if must_be == "an id"}
    wanted = wanted_columns(file)
    sep = _separator(file)
    table = _read_text(file, sep, quoting=quoting, header=0, usecols=wanted, dtype=text)
    return RawData(table, *_read_side_tables(files))


def _read_parquet(files: tuple[Path, ...]) -> RawData:
    wanted = wanted_columns(files[0])  # raises UserError if it is not parquet
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(files[0], columns=wanted).to_pandas(ignore_metadata=True)
    for column in table.select_dtypes("category"):
        table[column] = table[column].astype(table[column].cat.categories.dtype)
    _check_values(table, lambda row: f"{files[0]}, row {row + 1}", text_ids=True)
    return RawData(table, *_read_side_tables(files))


def _read_side_tables(files: tuple[Path, ...]) -> list[pd.DataFrame | None]:
    """NAME.users.csv and NAME.items.csv, all columns as text; None for each that is not in `files`."""
    tables = []
    for column in IDS:
        file = next((file for file in files if file.name.endswith(f".{column}s.csv")), None)
        if file is None:
            tables.append(None)
            continue
        header = _csv_header(file)
        if column not in header or len(header) < 2 or len(set(header)) < len(header):
            raise UserError(
                f"{file} needs the column {column} and another, each once; it has: {', '.join(header)}"
            )
        text = dict.fromkeys(header, str)
        options = {"quoting": csv.QUOTE_MINIMAL, "header": 0, "dtype": text}
        tables.append(_read_text(file, ",", checked=(column,), **options))
    return tables


READERS: dict[str, Callable[[tuple[Path, ...]], RawData]] = {
    "grouplens-1m": _read_grouplens_1m,
    "sasrec-txt": _read_sasrec,
    "reczoo-m1": _read_m1,
    "reczoo-x1": _read_x1,
    "grouplens-100k": _read_grouplens_100k,
    "recbole-100k": _read_recbole_100k,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


# ---------------------------------------------------------------- tables


def wanted_columns(file: Path) -> list[str]:
    """The columns of the user's table that are in COLUMNS, in file order. Raises UserError if user or item is
    missing or one of them occurs twice."""
    header = _parquet_header(file) if file.suffix.lower() == ".parquet" else _csv_header(file)
    if "user" not in header or "item" not in header:
        there = ", ".join(header)
        raise UserError(f"{file} needs the columns user and item; its columns are: {there}")
    wanted = [column for column in header if column in COLUMNS]
    if len(wanted) != len(set(wanted)):
        raise UserError(f"{file} has a column twice, remove one: {', '.join(header)}")
    return wanted


def _csv_header(file: Path) -> list[str]:
    for _, fields in _records(file, _separator(file), quoting=csv.QUOTE_MINIMAL):
        return fields
    raise UserError(f"{file} is empty")


def _parquet_header(file: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {file} needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_schema(file).names
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{file} is not a parquet file ({error})") from error


def _separator(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _records(
    file: Path, sep: str, encoding: str = "utf-8-sig", quoting: int = csv.QUOTE_NONE
) -> Iterator[tuple[int, list[str]]]:
    """Yield (1-based line number, fields) of each non-blank record. Raises UserError if unreadable."""
    line = 0
    try:
        with open(file, encoding=encoding, newline="") as stream:
            lines = stream
            if sep == "::":  # csv and pandas' fast parser take one character
                lines, sep = (text.replace("::", "\t") for text in stream), "\t"
            reader = csv.reader(lines, delimiter=sep, quoting=quoting, strict=True)
            for fields in reader:
                line = reader.line_num
                if fields:
                    yield line, fields
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}, after line {line}: {error}") from error


def _read_text(
    file: Path,
    sep: str,
    encoding: str = "utf-8-sig",
    quoting: int = csv.QUOTE_NONE,
    checked: Iterable[str] = COLUMNS,
    **options,
) -> pd.DataFrame:
    """Read a delimited file and check every row; `options` go to pandas.read_csv.

    pandas pads short rows and truncates long ones, so the fields are counted first.
    """
    expected, line = len(options.get("names", ())), 0
    for line, fields in _records(file, sep, encoding, quoting):
        expected = expected or len(fields)  # without names, the header defines the number
        if len(fields) != expected:
            raise UserError(f"{file}, line {line}: {len(fields)} fields, expected {expected}")
    if line == 0:
        raise UserError(f"{file} is empty")

    options = {"header": None, "dtype": {}, "low_memory": False, "na_filter": False, **options}
    source = io.BytesIO(file.read_bytes().replace(b"::", b"\t")) if sep == "::" else file
    common = {"encoding": encoding, "quoting": quoting, "index_col": False}
    table = pd.read_csv(source, sep="\t" if sep == "::" else sep, **common, **options)

    def place(row: int) -> str:
        record = row if options["header"] is None else row + 1
        line, _ = next(islice(_records(file, sep, encoding, quoting), record, None))
        return f"{file}, line {line}"

    _check_values(table, place, not options["dtype"].keys().isdisjoint(IDS), checked)
    return table


def doubts(table: pd.DataFrame) -> list[str]:
    """Notes on values that were read as they are, but may mean something else."""
    notes = []
    if {"label", "rating"} <= set(table.columns):
        notes.append("the column label decides what is positive (--task=ctr); ratings are only an input")
    for column in IDS:
        if is_string_dtype(table[column]):
            missing = table[column][table[column].str.lower().isin(NO_IDS)]
            if len(missing):
                notes.append(
                    f"{len(missing):,} rows have the {column} '{missing.iloc[0]}', read as an id: drop them "
                    "if it means that the id is missing"
                )
    return notes


def _check_values(
    table: pd.DataFrame, place: Callable[[int], str], text_ids: bool, checked: Iterable[str] = COLUMNS
) -> None:
    """Check the columns `checked` and convert them to numbers, in place, except text ids and the split.

    Raises UserError for the first bad value of a column; `place` maps a row to its file and line.
    """
    for column in table.columns.intersection(list(checked)):
        values, must_be = table[column], COLUMNS[column]
        if is_integer_dtype(values) and must_be in ("an id", "a number"):
            continue
        if column == "split":
            bad = ~values.isin(SPLITS)
            table[column] = values.map(SPLITS)
        elif must_be == "an id" and text_ids and is_string_dtype(values):
            bad = values.isna() | (values.str.strip() == "")
        else:
            # Via text, because pandas would convert a date or True to a number.
            text = values if values.dtype.kind in "iuf" else values.astype(str)
            numbers = pd.to_numeric(text, errors="coerce")
            bad = ~FITS[must_be](numbers)
            whole = must_be in ("an id", "0 or 1") and not bad.any()
            table[column] = numbers.astype("int64") if whole else numbers
        if bad.any():
            row = int(np.argmax(bad.to_numpy()))
            found = f"{column} is '{values.iloc[row]}'"
            raise UserError(f"{place(row)}: {found}, expected {must_be}")
