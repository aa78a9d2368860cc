"""Columns by any of their usual names, and their values as ids, times and numbers.

Values arrive as arrow arrays of any type, from text, JSON lines and Parquet alike, and leave in one form: ids
as text, times as seconds since 1970, ratings as numbers."""

import re
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from reclm.errors import UserError

ALIASES = {  # column -> its usual names, as `plain` writes them
    "user": "userid uid visitorid sessionid customerid reviewerid memberid accountid clientid viewerid",
    "item": "itemid iid movieid filmid articleid productid asin parentasin bookid isbn songid trackid "
    "artistid videoid newsid gameid appid animeid businessid venueid poiid locationid goodsid skuid "
    "stockcode",
    "rating": "overall score stars bookrating reviewscore",
    "timestamp": "time ts unixreviewtime timems unixtime datetime eventtime createdat invoicedate",
    "label": "click clicked isclick",
    "context": "",
    "split": "",
}
COARSE = {"timestamp": "date tdat"}  # names that give way to those above
PARTS_OF_DATE = ("year", "month", "day")  # columns that together are a timestamp
EXPECTED = {  # column -> its values, in words
    "user": "an id",
    "item": "an id",
    "rating": "a number",
    "timestamp": "seconds since 1970, zero or more, or an ISO date",
    "label": "0 or 1",  # 1 = positive, such as a click
    "context": "an id",  # known when the item is shown: a tag, a page
    "split": "train, valid or test",
}
IDS = ("user", "item")
SPLITS = {name: name for name in ("train", "valid", "test")}
SPLITS |= {"val": "valid", "validation": "valid", "dev": "valid"}  # names of others -> ours
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # no character of an id: a quote was not closed, or worse
LONGEST_ID = 1000  # characters
NO_IDS = ("null", "nan", "none", "na", "n/a")  # as text, most likely a missing id
UNITS = {1e11: (1, "seconds"), 1e14: (1e3, "milliseconds"), 1e17: (1e6, "microseconds")}  # below each limit
NANOSECONDS = (1e9, "nanoseconds")


@dataclass(frozen=True)
class Wishes:
    """How the user wants a file to be read: the settings of the same names."""

    columns: str | None = None
    positive_label: str | None = None
    drop_bad_rows: bool = False


# ---------------------------------------------------------------- names


def plain(name: str) -> str:
    """ "User-ID", "user_id:token" and "userId" -> "userid"."""
    return re.sub(r"[^a-z0-9]", "", name.strip().lower().partition(":")[0])


def is_known(name: str) -> bool:
    """Is this one of the usual names of a column?"""
    return any(plain(name) in (column, *names.split()) for column, names in ALIASES.items())


def parse_columns(text: str | None) -> dict[str, str]:
    """--columns=user=visitorid,item=itemid -> {"user": "visitorid", "item": "itemid"}. Raises UserError."""
    chosen = {}
    for part in filter(None, (text or "").split(",")):
        ours, equals, theirs = part.partition("=")
        if ours.strip() not in ALIASES or not equals or not theirs.strip():
            raise UserError(
                f"--columns={text}: {part!r} is not of the form COLUMN=NAME, where COLUMN is one of "
                f"{', '.join(ALIASES)} and NAME a column of the file, or its number if it has no header"
            )
        chosen[ours.strip()] = theirs.strip()
    return chosen


def find_column(ours: str, names: Iterable[str], file: Path) -> str | None:
    """The column of a file that is `ours` by one of its usual names; None if there is none. Raises UserError
    where two could be meant."""
    for usual in (ours, ALIASES[ours], COARSE.get(ours, "")):
        found = [name for name in names if plain(name) in usual.split()]
        if len(set(found)) > 1:
            raise UserError(
                f"{file}: {' and '.join(found)} can both be the {ours}: choose one with "
                f"--columns={ours}={found[0]}"
            )
        if found:
            return found[0]
    return None


def choose_columns(names: Iterable[str], wishes: Wishes, file: Path, example: str = "") -> dict[str, str]:
    """The columns `names` of a file -> {ours: theirs}. `example` is the first row of a file without a header.
    Raises UserError if user or item is missing, a column occurs twice or two could be meant."""
    names, chosen = list(names), parse_columns(wishes.columns)
    for theirs in chosen.values():
        if theirs not in names:
            raise UserError(
                f"--columns={wishes.columns}: {file} has no column {theirs}; it has: {', '.join(names)}"
            )
    free = [name for name in names if name not in chosen.values()]
    for ours in ALIASES.keys() - chosen.keys():
        if theirs := find_column(ours, free, file):
            chosen[ours] = theirs
    if missing := [column for column in IDS if column not in chosen]:
        if example:
            raise UserError(
                f"{file} has no header: number its columns, as in --columns=user=1,item=2,timestamp=3; its "
                f"first row is: {example:.100}"
            )
        form = ",".join(f"{column}=NAME" for column in missing)
        raise UserError(
            f"{file} needs the columns user and item; its columns are: {', '.join(names)}; if others hold "
            f"these ids, use --columns={form}"
        )
    if twice := [theirs for theirs in chosen.values() if names.count(theirs) > 1]:
        raise UserError(f"{file} has the column {twice[0]} twice, remove one: {', '.join(names)}")
    parts = {plain(name): name for name in free if plain(name) in PARTS_OF_DATE}
    if "timestamp" not in chosen and len(parts) == len(PARTS_OF_DATE):
        chosen |= parts
    return {ours: chosen[ours] for ours in (*ALIASES, *PARTS_OF_DATE) if ours in chosen}


def describe_columns(chosen: dict[str, str], names: Iterable[str]) -> str:
    """ "user is userId, item is movieId; not read: genres", or "" if all columns bear our names."""
    renamed = [f"{ours} is {theirs}" for ours, theirs in chosen.items() if ours != theirs]
    ignored = [name for name in names if name not in chosen.values()]
    ignored = [f"column {name}" if name.isdigit() else name or "(no name)" for name in ignored]
    parts = [", ".join(renamed)] * bool(renamed)
    parts += [f"not read: {', '.join(ignored[:12])}{', ...' * (len(ignored) > 12)}"] * bool(ignored)
    return "; ".join(parts)


# ---------------------------------------------------------------- values


def texts_of_ids(values: pa.Array) -> list[str | None]:
    """Distinct ids as text; None where the value cannot be an id. A number is written without a point:
    integers from Parquet must meet the same ids in a CSV file."""
    kind = values.type
    if pa.types.is_integer(kind):
        return values.cast(pa.string()).to_pylist()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return [str(int(x)) if x is not None and x == x // 1 else None for x in values.to_pylist()]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return [None] * len(values)
    texts = [text and text.strip() or None for text in values.to_pylist()]
    texts = [
        text if text and len(text) <= LONGEST_ID and not CONTROL.search(text) else None for text in texts
    ]
    there = [text for text in texts if text]
    if any(text.endswith(".0") for text in there) and all(re.fullmatch(r"-?\d+(\.0)?", x) for x in there):
        return [text and text.removesuffix(".0") for text in texts]  # written by a program with missing ids
    return texts


def encode(values: pa.ChunkedArray) -> pa.DictionaryArray:
    """The values as numbers into a dictionary of the distinct ones."""
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    return values.unify_dictionaries().combine_chunks()


def to_ids(array: pa.DictionaryArray) -> pd.Categorical:
    """Ids as a categorical of texts in sorted order; missing where the value is no id."""
    texts = texts_of_ids(array.dictionary)
    numbers, names = pd.factorize(np.array(texts, dtype=object), sort=True)  # -1 = None
    numbers = np.append(numbers, -1).astype(np.int32)  # and for rows without a value
    rows = array.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
    return pd.Categorical.from_codes(numbers[rows], pd.Index(names, dtype=object))


def to_numbers(values: pa.ChunkedArray) -> np.ndarray:
    """(rows,) float64; nan where the value is no finite number."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        return to_numbers(values.cast(kind.value_type))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = pa.compute.cast(values, pa.float64(), safe=False).to_numpy()
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        numbers = pd.to_numeric(pd.Series(values.to_numpy(zero_copy_only=False)), errors="coerce")
        numbers = numbers.to_numpy(np.float64)
    else:
        return np.full(len(values), np.nan)
    finite = np.isfinite(numbers)
    return numbers if finite.all() else np.where(finite, numbers, np.nan)


def to_times(values: pa.ChunkedArray) -> tuple[np.ndarray, str]:
    """((rows,) float64 seconds since 1970, nan where a value is no time or of another form than most; the
    unit in words, "" for seconds). Numbers may be seconds, milliseconds, microseconds or nanoseconds, told
    apart by their size, or dates like 20220408; texts ISO dates, UTC where they name no zone."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        return to_times(values.cast(kind.value_type))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micro = values.cast(pa.timestamp("us", tz=getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return not_negative(pa.compute.cast(micro, pa.float64(), safe=False).to_numpy() / 1e6), ""
    numbers = to_numbers(values)
    missing = np.isnan(numbers)
    known = numbers[~missing] if missing.any() else numbers
    if 2 * len(known) < len(values) and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        array = encode(values)
        parsed = pd.to_datetime(
            pd.Series(array.dictionary.to_pylist(), dtype=object).where(lambda text: ~is_number(text)),
            format="ISO8601", utc=True, errors="coerce",
        )  # fmt: skip
        seconds = (parsed - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
        rows = array.indices.to_numpy(zero_copy_only=False)
        return not_negative(seconds.to_numpy(np.float64)[rows]), "ISO dates"
    if not len(known):
        return numbers, ""
    least, most = known.min(), known.max()
    if least >= 19000101 and most <= 21001231 and not (known % 1).any():
        days = pd.to_datetime(
            pd.Series(numbers).astype("Int64").astype(str), format="%Y%m%d", errors="coerce"
        )
        if days.notna().sum() == len(known):
            seconds = (days - pd.Timestamp(0)) / pd.Timedelta(seconds=1)
            return not_negative(seconds.to_numpy(np.float64)), "dates like 20220408"
    limits = [-np.inf, *UNITS, np.inf]
    unit = bisect(limits, least) - 1
    if most >= limits[unit + 1]:
        unit = bisect(limits, np.median(known)) - 1
        numbers = np.where((numbers >= limits[unit]) & (numbers < limits[unit + 1]), numbers, np.nan)
    scale, name = [*UNITS.values(), NANOSECONDS][unit]
    return not_negative(numbers if scale == 1 else numbers / scale), "" if scale == 1 else name


def is_number(texts: pd.Series) -> pd.Series:
    return pd.to_numeric(texts, errors="coerce").notna()


def not_negative(seconds: np.ndarray) -> np.ndarray:
    good = seconds >= 0
    return seconds if good.all() else np.where(good, seconds, np.nan)


def to_labels(values: pa.ChunkedArray, wishes: Wishes) -> np.ndarray:
    """(rows,) float64, 0 or 1; nan where it is neither. With --positive_label, 1 where the value is that."""
    if wishes.positive_label is not None:
        words = to_ids(encode(values))
        if wishes.positive_label not in words.categories:
            there = ", ".join(words.categories[:10])
            raise UserError(f"--positive_label={wishes.positive_label}: the column label has only {there}")
        labels = (words == wishes.positive_label).astype(float)
        return np.where(words.codes < 0, np.nan, labels)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int64())
    numbers = to_numbers(values)
    return np.where(np.isin(numbers, (0, 1)), numbers, np.nan)


def convert(
    table: pa.Table, wishes: Wishes, place: Callable[[int], str]
) -> tuple[pd.DataFrame, list[str], int]:
    """(tidy table, what was understood, number of rows dropped) of a table with our column names. Raises
    UserError for the first bad value of a column, unless --drop_bad_rows; `place` names the file and line of
    a row."""
    columns, said, bad_rows = {}, [], np.zeros(len(table), bool)
    if wishes.positive_label is not None and "label" not in table.column_names:
        raise UserError("--positive_label has no effect without a column label: leave it out")
    for name in table.column_names:
        values = table[name]
        if pa.types.is_nested(values.type):
            raise UserError(f"{place(0)}: {name} is a list or an object, expected one value per row")
        columns[name], bad, words = convert_column(name, values, wishes)
        if bad.any() and not wishes.drop_bad_rows:
            refuse(name, values, int(bad.argmax()), place, "" if bad.all() else ", as in other rows")
        said += words
        bad_rows |= bad
    if set(PARTS_OF_DATE) <= set(columns):
        columns["timestamp"] = join_date({name: columns.pop(name) for name in PARTS_OF_DATE})
        bad = np.isnan(columns["timestamp"]) & ~bad_rows
        if bad.any() and not wishes.drop_bad_rows:
            where = place(int(bad.argmax()))
            raise UserError(f"{where}: year, month and day are no date, or --drop_bad_rows=true")
        bad_rows |= bad
    frame = pd.DataFrame(columns, copy=False)
    if bad_rows.any():
        frame = frame[~bad_rows].reset_index(drop=True)
        ids = frame.select_dtypes("category")
        frame = frame.assign(**{name: ids[name].cat.remove_unused_categories() for name in ids})
    if "label" in frame:
        frame["label"] = frame["label"].astype(np.int64)
    return frame, said, int(bad_rows.sum())


def convert_column(name: str, values: pa.ChunkedArray, wishes: Wishes) -> tuple:
    """(the column, (rows,) bool: bad values, what was understood)."""
    if name == "timestamp":
        times, unit = to_times(values)
        return times, np.isnan(times), [f"timestamps are {unit}"] * bool(unit)
    if name == "label":
        labels = to_labels(values, wishes)
        return labels, np.isnan(labels), []
    if name not in (*IDS, "context", "split"):
        numbers = to_numbers(values)
        return numbers, np.isnan(numbers), []
    array = encode(values)
    ids = to_ids(array)
    said = ["spaces around ids are removed"] * has_spaces(array.dictionary)
    if name == "split":
        known = [SPLITS.get(word.lower()) for word in ids.categories]
        splits = np.array([*known, None], dtype=object)[ids.codes]
        return splits, pd.isna(splits), []
    bad = ids.codes < 0
    if wishes.drop_bad_rows:  # then NULL means that the id is missing
        bad |= np.append(ids.categories.str.lower().isin(NO_IDS), True)[ids.codes]
    return ids, bad, said


def has_spaces(distinct: pa.Array) -> bool:
    """Are there spaces around a text?"""
    if pa.types.is_integer(distinct.type):
        return False
    return any(isinstance(text, str) and text != text.strip() for text in distinct.to_pylist())


def refuse(name: str, values: pa.ChunkedArray, row: int, place: Callable[[int], str], like: str = "") -> None:
    """Raises UserError for the value in a row; `like` adds to what times are expected to be."""
    value = values[row].as_py()
    found = "is missing" if value is None else f"is '{str(value)[:60]}'"
    more = ""
    if name == "label" and isinstance(value, str):
        more = ", or name the positive one with --positive_label"
    elif name in IDS:
        more = ", or --drop_bad_rows=true"
    elif name == "timestamp":
        more = like
    raise UserError(f"{place(row)}: {name} {found}, expected {EXPECTED.get(name, 'a number')}{more}")


def join_date(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Years, months and days -> (rows,) float64 seconds since 1970; nan where there is no such date."""
    dates = pd.to_datetime(pd.DataFrame(parts), errors="coerce")
    return not_negative(((dates - pd.Timestamp(0)) / pd.Timedelta(seconds=1)).to_numpy(np.float64))


def find_doubtful(table: pd.DataFrame) -> dict[str, tuple[str, int]]:
    """{column of ids: (the first id that may mean a missing one, number of rows with such an id)}"""
    found = {}
    for column in IDS:
        if isinstance(table[column].dtype, pd.CategoricalDtype):
            words = table[column].cat.categories
            missing = np.flatnonzero(words.str.lower().isin(NO_IDS))
            if count := int(np.isin(table[column].cat.codes, missing).sum()):
                found[column] = words[missing[0]], count
    return found


def doubts(columns: Iterable[str], doubtful: dict[str, tuple[str, int]]) -> list[str]:
    """Notes on columns and values (`find_doubtful`) that are read as they are but may mean another thing."""
    both = "the column label decides what is positive (--task=ctr); ratings are only an input"
    return [both] * ({"label", "rating"} <= set(columns)) + [
        f"{count:,} rows have the {column} '{word}', read as an id: if it means that the id is missing, drop "
        "them with --drop_bad_rows=true"
        for column, (word, count) in doubtful.items()
    ]
