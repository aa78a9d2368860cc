"""The user's own data: any file or files with one interaction per row, found and read as they are.

    delimited text (.csv .tsv .txt .dat .inter ...)    separator, header and encoding from the first lines
    rows of items (.txt)                               user item item ...
    JSON lines (.json .jsonl), Parquet                 one interaction per object or row

Text may be compressed (.gz .zip .zst .bz2). Side tables lie next to the file: see `side_files`."""

import json
import re
from collections.abc import Iterable
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import union_categoricals
from tqdm import tqdm

from reclm.data.columns import (
    IDS,
    Wishes,
    choose_columns,
    convert,
    describe_columns,
    encode,
    find_column,
    plain,
    to_ids,
)
from reclm.data.files import bare_name, open_bytes, sample_lines, split_line, split_lines
from reclm.data.formats import JSON_LINES, PARQUET, is_numeric, looks_like_header, open_table
from reclm.errors import UserError

SIDE_NAMES = {"ratings.csv": "movies.csv"}  # MovieLens: the item table of a file
TITLES = ("title", "name", "movietitle", "booktitle", "producttitle", "itemname")
GENRES = ("genres", "genre", "categories", "category")
TIME_LIKE = 1e8  # as a number, a timestamp and no id


def find_files(spec: str) -> tuple[Path, ...]:
    """The files that --dataset names: a path, a folder of Parquet files, a pattern (data/*.csv) or several of
    these, separated by commas. Empty if there are none."""
    found = []
    for part in [spec] if Path(spec).exists() else map(str.strip, spec.split(",")):
        path = Path(part)
        if path.is_dir():
            found += sorted(
                file for file in path.rglob("*") if file.suffix.lower() in PARQUET and file.is_file()
            )
        else:
            matches = [path] if path.exists() else map(Path, sorted(glob(part)))
            found += [match for match in matches if match.is_file()]
    return tuple(found)


def name_of_data(spec: str, files: tuple[Path, ...]) -> str:
    """The name of the data in folders and results: that of the folder or of the first file."""
    path = Path(spec) if Path(spec).is_dir() else files[0]
    name = path.resolve().name
    return name[: len(bare_name(path.resolve()))].rpartition(".")[0] or name


def side_files(file: Path) -> dict[str, Path]:
    """{"user" | "item": path} of the side tables next to `file`: NAME.users.csv and NAME.items.csv (or .tsv,
    .jsonl, .parquet, compressed or not), RecBole's NAME.user and NAME.item, or MovieLens' movies.csv."""
    name = bare_name(file)
    stem, found = name.rpartition(".")[0] or name, {}
    beside = {bare_name(other): other for other in sorted(file.parent.iterdir())}
    for column in IDS:
        names = [f"{stem}.{column}s{end}" for end in (".csv", ".tsv", *JSON_LINES, *PARQUET)]
        names += [f"{stem}.{column}"] * name.endswith(".inter")
        names += [SIDE_NAMES.get(name, "")] * (column == "item")
        if there := [beside[name] for name in names if name in beside]:
            found[column] = there[0]
    return found


def read_own(files: tuple[Path, ...], wishes: Wishes) -> tuple[pd.DataFrame, list[str]]:
    """(interactions of all files in their order, notes on how they were read). Raises UserError with the
    file and line of the first bad row."""
    tables, said, dropped = [], [], 0
    for file in tqdm(files, "reading", unit="file", leave=False, delay=1, disable=None):
        table, words, bad = read_interactions(file, wishes)
        tables.append(table)
        said += [word for word in words if word not in said]
        dropped += bad
    same_columns(files, tables)
    notes = [f"{files[0].name} is read as: {'; '.join(said)}"] * bool(said)
    if dropped:
        notes.append(f"{dropped:,} rows with a missing id or a bad value are dropped (--drop_bad_rows)")
    return concatenate(tables), notes


def same_columns(files: tuple[Path, ...], columns: list[Iterable[str]]) -> None:
    """Raises UserError unless all files have the same columns."""
    for file, theirs in zip(files, columns, strict=True):
        if set(theirs) != set(columns[0]):
            ours, first = ", ".join(theirs), ", ".join(columns[0])
            raise UserError(f"{file} has {ours}, but {files[0]} has {first}: give all the same columns")


def concatenate(tables: list[pd.DataFrame]) -> pd.DataFrame:
    if len(tables) == 1:
        return tables[0]
    columns = {}
    for name in tables[0]:
        parts = [table[name] for table in tables]
        if isinstance(parts[0].dtype, pd.CategoricalDtype):
            columns[name] = union_categoricals(parts, sort_categories=True)
        else:
            columns[name] = np.concatenate([part.to_numpy() for part in parts])
    return pd.DataFrame(columns)


def read_interactions(file: Path, wishes: Wishes) -> tuple[pd.DataFrame, list[str], int]:
    """(table, what was understood, number of rows dropped) of one file."""
    if bare_name(file) == "behaviors.tsv":
        raise UserError(
            f"{file} has a list of items per row (MIND): write one row per click instead, with the columns "
            "user,item,timestamp"
        )
    if not wishes.columns and (sep := separator_of_items(file)):
        return read_rows_of_items(file, sep), ["rows of: user item item ..."], 0
    opened = open_table(file)
    chosen = choose_columns(opened.names, wishes, file, opened.example)
    table, place, dropped = opened.read(chosen, wishes.drop_bad_rows)
    frame, more, bad = convert(table, wishes, place)
    said = [*opened.said, describe_columns(chosen, opened.names), *more]
    return frame, list(filter(None, said)), dropped + bad


def separator_of_items(file: Path) -> str | None:
    """The separator of a .txt file with a user and then items in each line; None for any other file. The
    lines differ in length, or have five fields or more and no time or decimal among them: `user item rating
    timestamp` is a table without a header."""
    if not bare_name(file).endswith(".txt"):
        return None
    lines, _ = sample_lines(file)
    sep = "\t" if "\t" in lines[0] else " " if " " in lines[0] else ","
    rows = [split_line(line.strip(), sep, quoted=False) for line in lines]
    widths = {len(row) for row in rows}
    if looks_like_header(rows[:1]) or min(widths) < 2:
        return None
    tabular = min(widths) < 5 or any(map(is_measure, (field for row in rows for field in row)))
    return None if len(widths) == 1 and tabular else sep


def is_measure(field: str) -> bool:
    """Is this a decimal, a date or a time rather than an id?"""
    date = re.search(r"[.:]|^\d{4}-\d\d-\d\d", field)
    return bool(date) or (is_numeric(field) and float(field) >= TIME_LIKE)


def read_rows_of_items(file: Path, sep: str) -> pd.DataFrame:
    users, counts, items = [], [], []
    with open_bytes(file, progress=True) as stream:
        content = bytes(stream.read())
    try:
        text = content.decode(sample_lines(file)[1])
    except UnicodeDecodeError:  # further down than the sample
        text = content.decode("latin-1")
    for number, line in enumerate(split_lines(text), 1):
        fields = [field for field in line.strip().split(sep) if field]
        if len(fields) == 1:
            raise UserError(f"{file}, line {number}: a user without items, expected: user item item ...")
        if fields:
            users.append(fields[0])
            items += fields[1:]
            counts.append(len(fields) - 1)
    users, items = (to_ids(encode(pa.chunked_array([pa.array(values)]))) for values in (users, items))
    return pd.DataFrame({"user": users.repeat(counts), "item": items})


# ---------------------------------------------------------------- side tables


def read_side_table(file: Path, column: str) -> pd.DataFrame:
    """A user or item table, all columns as text: `column` (user or item) first, `title` and `genres`
    ("Action|Comedy") under these names. Raises UserError without a column for the ids and another."""
    opened = open_table(file)
    theirs = find_column(column, opened.names, file) or next(
        (x for x in opened.names if plain(x) == "id"), None
    )
    rest = [name for name in opened.names if name != theirs]
    if theirs is None or not rest or len(set(opened.names)) < len(opened.names):
        raise UserError(
            f"{file} needs the column {column} and another, each once; it has: {', '.join(opened.names)}"
        )
    chosen = {column: theirs}
    for ours, names in (("title", TITLES), ("genres", GENRES)):
        found = next((name for usual in names for name in rest if plain(name) == usual), None)
        if column == "item" and found and ours not in rest:
            chosen[ours] = found
            rest.remove(found)
    chosen |= {name.partition(":")[0]: name for name in rest}
    table, place, _ = opened.read(chosen, False)
    if pa.types.is_nested(table[column].type):
        raise UserError(f"{place(0)}: {column} is a list or an object, expected an id")
    ids = to_ids(encode(table[column]))
    if (ids.codes < 0).any():
        raise UserError(f"{place(int((ids.codes < 0).argmax()))}: {column} is missing, expected an id")
    columns = {column: np.asarray(ids, dtype=object)}
    for name in chosen.keys() - {column}:
        columns[name] = [as_text(value) for value in table[name].to_pylist()]
    frame = pd.DataFrame({name: columns[name] for name in chosen})
    if "genres" in frame and column == "item":
        by_space = chosen["genres"].endswith(":token_seq")
        frame["genres"] = ["|".join(split_words(text, by_space)) for text in frame["genres"]]
    return frame


def as_text(value: object) -> str:
    """A value of a side table as text; lists, also nested ones, are joined by "|"."""
    if isinstance(value, list | tuple):
        return "|".join(filter(None, map(as_text, value)))
    if isinstance(value, float) and value == value // 1:
        value = int(value)
    return "" if value is None else str(value)


def split_words(text: str, by_space: bool = False) -> list[str]:
    """ "Action|Comedy", "Action, Comedy" and '["Action", "Comedy"]' -> ["Action", "Comedy"]."""
    if text.startswith("["):
        try:
            text = as_text(json.loads(text))
        except ValueError:
            text = text.strip("[]").replace("'", "")  # a list as Python writes it
    sep = " " if by_space else "|" if "|" in text else ","
    return [word.strip() for word in re.split(re.escape(sep), text) if word.strip()]
