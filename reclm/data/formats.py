"""The formats of own data: delimited text, JSON lines and Parquet, each opened as an `Opened` table."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from reclm.data.columns import is_known
from reclm.data.files import (
    BLOCK,
    TAB_SEPARATED,
    Layout,
    bare_name,
    find_separator,
    has_quotes,
    line_of_row,
    open_bytes,
    read_text,
    sample_lines,
    split_line,
)
from reclm.errors import UserError, first_line

PARQUET, JSON_LINES = (".parquet", ".pq"), (".json", ".jsonl", ".ndjson")
SHOWN = {"\t": "tab", " ": "space"}
KNOWN = {  # files without a header -> their columns, "-" for one that is not read
    "ratings.dat": "user item rating timestamp",  # MovieLens-1M and 10M
    "u.data": "user item rating timestamp",  # MovieLens-100K
    "yoochoose-clicks.dat": "user timestamp item -",
    "yoochoose-buys.dat": "user timestamp item - -",
    "userid-timestamp-artid-artname-traid-traname.tsv": "user timestamp - - item -",  # Last.fm 1K
    "loc-gowalla_totalcheckins.txt": "user timestamp - - item",
    "gowalla_totalcheckins.txt": "user timestamp - - item",
    "loc-brightkite_totalcheckins.txt": "user timestamp - - item",
    "brightkite_totalcheckins.txt": "user timestamp - - item",
}
ID, NUMBER, TEXT = pa.dictionary(pa.int32(), pa.string()), pa.float64(), pa.string()
TYPES = {"user": ID, "item": ID, "context": ID, "split": ID, "rating": NUMBER, "label": NUMBER}
TYPES |= dict.fromkeys(("year", "month", "day"), NUMBER)

Place = Callable[[int], str]  # row 0, 1, ... -> "FILE, line N"


@dataclass
class Opened:
    """A table whose columns are known and whose rows are not read yet."""

    names: tuple[str, ...]  # of all columns
    read: Callable[[dict[str, str], bool], tuple[pa.Table, Place, int]]
    """({our name: theirs}, drop malformed records?) -> (the table under our names, the place of a row, the
    number of records dropped)"""
    said: list[str] = field(default_factory=list)  # what was understood, also while reading
    example: str = ""  # the first row of a file without a header


def open_table(file: Path) -> Opened:
    """Raises UserError for a file of another format."""
    name = bare_name(file)
    if name.endswith((".xlsx", ".xls")):
        raise UserError(f"{file} is an Excel file: save it as CSV")
    if name.endswith(PARQUET):
        return open_parquet(file)
    return open_json_lines(file) if name.endswith(JSON_LINES) else open_text(file)


def open_parquet(file: Path) -> Opened:
    try:
        names = pa.parquet.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is not a parquet file ({first_line(error)})") from error

    def read(chosen: dict[str, str], drop_bad: bool) -> tuple[pa.Table, Place, int]:
        try:
            table = pa.parquet.read_table(file, columns=list(chosen.values()), partitioning=None)
            table = pa.table({ours: bytes_to_text(table[theirs]) for ours, theirs in chosen.items()})
            table.validate(full=True)  # reading does not look whether texts are UTF-8
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is damaged ({first_line(error)}): write it again") from error
        return table, lambda row: f"{file}, row {row + 1}", 0

    return Opened(tuple(names), read)


def bytes_to_text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bytes as text, all else as it is."""
    is_bytes = pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
    return values.cast(pa.string()) if is_bytes else values


# ---------------------------------------------------------------- JSON lines


def open_json_lines(file: Path) -> Opened:
    lines, _ = sample_lines(file)
    if lines[0].lstrip().startswith(("{'", "{u'")):
        raise UserError(
            f"{file}, line 1 is a Python dict, not JSON (single quotes): convert the file with python -c "
            "'import ast, json, sys; [print(json.dumps(ast.literal_eval(x))) for x in sys.stdin]' < IN > OUT"
        )
    rows = [parse_json_line(file, i + 1, line) for i, line in enumerate(lines)]
    names = tuple({name: None for row in rows for name in row})
    kinds = {name: json_type([row.get(name) for row in rows]) for name in names}

    def read(chosen: dict[str, str], drop_bad: bool) -> tuple[pa.Table, Place, int]:
        wanted = {theirs: kinds[theirs] for theirs in chosen.values()}
        for ours, theirs in chosen.items():
            if wanted[theirs] == pa.int64() and TYPES.get(ours, NUMBER) == NUMBER:
                wanted[theirs] = NUMBER  # 5 in the first lines, 4.5 further down
        schema = pa.schema(list(wanted.items()))
        parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        blocks = pa.json.ReadOptions(block_size=BLOCK)
        with open_bytes(file, progress=True) as stream:
            try:
                table = pa.json.read_json(pa.PythonFile(stream, mode="r"), blocks, parse)
            except pa.ArrowInvalid as error:
                refuse_json(file, schema, error)
        table = pa.table({ours: table[theirs] for ours, theirs in chosen.items()})
        return table, lambda row: line_of_object(file, row), 0

    return Opened(names, read)


def line_of_object(file: Path, row: int) -> str:
    """ "FILE, line N" of object 0, 1, ..."""
    with open_bytes(file) as stream:
        lines = (i for i, line in enumerate(io.TextIOWrapper(stream, errors="replace"), 1) if line.strip())
        return f"{file}, line {next(islice(lines, row, None))}"


def parse_json_line(file: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(
            f"{file}, line {number} is not JSON ({reason}): expected one object per line"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {number} is not a JSON object: expected one per line")
    return row


def json_type(values: list) -> pa.DataType:
    """The type of a column, from its first values."""
    there = [value for value in values if value is not None]
    if there and all(isinstance(value, bool) for value in there):
        return pa.bool_()
    if there and all(type(value) is int and abs(value) < 2**63 for value in there):
        return pa.int64()
    if there and all(type(value) in (int, float) for value in there):
        return pa.float64()
    if any(isinstance(value, list | dict) for value in there):
        try:
            return pa.array(there).type
        except pa.ArrowException:
            return pa.list_(pa.string())
    return pa.string()


def refuse_json(file: Path, schema: pa.Schema, error: Exception) -> None:
    """Raises UserError for the first line that is no JSON object or has a value of another type."""
    with open_bytes(file) as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, "utf-8-sig", "replace"), 1):
            row = parse_json_line(file, number, line) if line.strip() else {}
            for name, kind in zip(schema.names, schema.types, strict=True):
                value = row.get(name)
                if value is not None and json_type([value]) not in (kind, pa.int64()):
                    what = f"{name} is {value!r:.60}, of another type than in the first lines"
                    raise UserError(f"{file}, line {number}: {what}")
    raise UserError(f"{file} cannot be read as JSON lines ({first_line(error)})") from None


# ---------------------------------------------------------------- delimited text


def open_text(file: Path) -> Opened:
    lines, encoding = sample_lines(file)
    sep = find_separator(lines, bare_name(file))
    if sep is None:
        raise UserError(
            f"{file} is no table: none of :: tab , ; | and space cuts its lines into equally many fields; "
            "expected CSV with a header such as user,item,timestamp"
        )
    quoted, said = has_quotes(lines, sep), []
    rows = [[field.strip() for field in split_line(line, sep, quoted)] for line in lines[:2]]
    if sep != ("\t" if bare_name(file).endswith(TAB_SEPARATED) else ","):
        said.append(f"separator {SHOWN.get(sep, repr(sep))}")
    if encoding != "utf-8-sig":
        said.append(f"encoding {encoding}, as it is not UTF-8")
    has_header = looks_like_header(rows)
    names = tuple(rows[0]) if has_header else names_without_header(file, rows[0])
    said += ["no header"] * (not has_header)
    layout = Layout(sep, names, has_header, quoted, encoding)
    opened = Opened(names, None, said, "" if has_header else lines[0])
    opened.read = lambda chosen, drop_bad: read_delimited(file, layout, chosen, drop_bad, said)
    return opened


def looks_like_header(rows: list[list[str]]) -> bool:
    """Usual names of columns, or texts above a row with a number."""
    if any(is_known(name) for name in rows[0]):
        return True
    return not any(map(is_numeric, rows[0])) and len(rows) > 1 and any(map(is_numeric, rows[1]))


def names_without_header(file: Path, row: list[str]) -> tuple[str, ...]:
    """The columns of a file without a header: those of a known file, or "user item", else their numbers."""
    known = KNOWN.get(bare_name(file), "user item").split()
    numbers = [str(i + 1) for i in range(len(row))]
    if len(known) != len(row):
        return tuple(numbers)
    return tuple(name if name != "-" else number for name, number in zip(known, numbers, strict=True))


def is_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_delimited(
    file: Path, layout: Layout, chosen: dict[str, str], drop_bad: bool, said: list[str]
) -> tuple[pa.Table, Place, int]:
    """See Opened.read. The columns are read as the types they should have, which is fast, and where a value
    does not fit as text, to find its row."""
    types = {theirs: TYPES.get(ours, TEXT) for ours, theirs in chosen.items()}
    if "timestamp" in chosen:
        types[chosen["timestamp"]] = type_of_times(file, layout, chosen["timestamp"])
    for kinds in (types, dict.fromkeys(types, TEXT)):
        try:
            table, dropped = read_text(file, layout, kinds, drop_bad)
            break
        except pa.ArrowInvalid as error:
            if "UTF8" in str(error) and layout.encoding == "utf-8-sig":
                said.append("encoding latin-1, as it is not UTF-8")
                return read_delimited(file, replace(layout, encoding="latin-1"), chosen, drop_bad, said)
            reason = first_line(error)
    else:
        raise UserError(f"{file} cannot be read ({reason})")
    table = pa.table({ours: table[theirs] for ours, theirs in chosen.items()})
    return table, lambda row: line_of_row(file, layout, row), dropped


def type_of_times(file: Path, layout: Layout, name: str) -> pa.DataType:
    lines, _ = sample_lines(file)
    line = lines[min(len(lines) - 1, int(layout.has_header))]
    fields = split_line(line, layout.sep, layout.quoted)
    place = layout.names.index(name)
    return NUMBER if place >= len(fields) or is_numeric(fields[place]) else ID
