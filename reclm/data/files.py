"""Files as people have them: plain or compressed, in any usual encoding, with any usual separator."""

import codecs
import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
from tqdm import tqdm

from reclm.errors import UserError, first_line

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}  # by the first bytes
PACKED = (".gz", ".bz2", ".zst", ".zip")
TAB_SEPARATED = (".tsv", ".inter", ".user", ".item")
SEPARATORS = ("::", "\t", ",", ";", "|", " ")  # in the order they are tried
SAMPLE = 2**17  # bytes of a file that its layout is guessed from
BLOCK = 2**24  # bytes that are parsed at once: also the longest record that can be read


@dataclass(frozen=True)
class Layout:
    """How the records of a text file are written."""

    sep: str
    names: tuple[str, ...]  # of all columns
    has_header: bool = False
    quoted: bool = False  # may fields be quoted ("a, b")?
    encoding: str = "utf-8-sig"


def bare_name(path: Path) -> str:
    """The name of a file in lower case, without the suffix of a compressed one."""
    name = path.name.lower()
    return next((name.removesuffix(end) for end in PACKED if name.endswith(end)), name)


@contextmanager
def open_bytes(path: Path, progress: bool = False) -> Iterator[Any]:
    """The decompressed content of a file, as a binary stream to read once. Raises UserError if it cannot be
    read; `progress` shows a bar over its (compressed) bytes once reading takes longer than a second."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            start = file.read(4)
            file.seek(0)
            if progress:
                size, shown = path.stat().st_size, {"unit": "B", "unit_scale": True, "disable": None}
                bar = tqdm.wrapattr(
                    file, "read", size, desc=f"reading {path.name}", leave=False, delay=1, **shown
                )
                file = stack.enter_context(bar)
            if start == b"PK\x03\x04":
                file = stack.enter_context(open_only_member(path, file))
            for magic, codec in COMPRESSED.items():
                if start.startswith(magic):
                    source = pa.PythonFile(file, mode="r")
                    file = stack.enter_context(pa.CompressedInputStream(source, codec))
            yield file
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"cannot read {path} ({reason})") from error


def open_only_member(path: Path, file: Any) -> Any:
    """The file in a .zip archive. Raises UserError unless there is exactly one, without a password."""
    archive = zipfile.ZipFile(file)
    members = [name for name in archive.namelist() if not name.endswith("/")]
    if len(members) != 1:
        there = ", ".join(members[:5]) or "none"
        raise UserError(f"{path} must hold exactly one file, it holds {len(members)} ({there}): unpack it")
    try:
        return archive.open(members[0])
    except RuntimeError as error:  # a password, or a compression that Python does not know
        raise UserError(f"cannot read {path} ({first_line(error)}): unpack it") from error


class Lines:
    """A binary stream for pyarrow, whose separators are single characters: "::" becomes a tab. Counts quotes,
    since an unclosed one swallows the rest of the file."""

    closed = False  # pyarrow asks

    def __init__(self, stream: Any, colons: bool):
        self.stream, self.colons, self.rest, self.quotes = stream, colons, b"", 0

    def read(self, size: int) -> bytes:
        block = bytes(self.stream.read(size))
        self.quotes += block.count(b'"')
        if not self.colons:
            return block
        if not block:
            block, self.rest = self.rest, b""
        else:  # up to the last whole line: a "::" must not be cut in two
            block, end, self.rest = (self.rest + block).rpartition(b"\n")
            block = block + end or self.read(size)
        return block.replace(b"::", b"\t")


# ---------------------------------------------------------------- what a file looks like


def sample_lines(path: Path) -> tuple[list[str], str]:
    """(the first lines of a text file, blank ones left out; its encoding). Raises UserError if it is empty or
    not text."""
    with open_bytes(path) as stream:
        start = bytes(stream.read(SAMPLE))
    whole = len(start) < SAMPLE
    encoding = "utf-8-sig"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in start[:1024]:
        raise UserError(f"{path} is not a text file: expected CSV, TSV, JSON lines or Parquet")
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start, whole)
    except UnicodeDecodeError:
        encoding = "latin-1"
        text = start.decode(encoding)
    lines = split_lines(text)
    lines = [line for line in (lines if whole or len(lines) < 2 else lines[:-1]) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty")
    return lines[:100], encoding


def split_lines(text: str) -> list[str]:
    """The lines of a file. Not str.splitlines, which also ends a line at \u2028 and others within a title."""
    return re.split(r"\r\n|\n|\r", text)


def split_line(line: str, sep: str, quoted: bool) -> list[str]:
    if sep == "::" or not quoted:
        return line.split(sep)
    return next(csv.reader([line], delimiter=sep), [])


def find_separator(lines: list[str], name: str) -> str | None:
    """The first of SEPARATORS that cuts all lines into the same number of fields, two or more; else that of
    the suffix; else None."""
    if name.endswith(TAB_SEPARATED):
        return "\t"
    for sep in SEPARATORS:
        counts = {len(split_line(line, sep, quoted=True)) for line in lines}
        if len(counts) == 1 and counts != {1}:
            return sep
    if name.endswith(".csv"):  # some line is malformed: let the reader name it
        return max((",", ";", "\t", "|"), key=lambda sep: (lines[0].count(sep), sep == ","))
    return None


def has_quotes(lines: list[str], sep: str) -> bool:
    """Are quotes part of the syntax? With tabs they mostly belong to a name: "Weird Al" Yankovic."""
    if sep != "\t":
        return sep != "::"
    return any(len(field) > 1 and field[0] == field[-1] == '"' for x in lines for field in x.split(sep))


# ---------------------------------------------------------------- text to tables


def records(path: Path, layout: Layout, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield (1-based line number, fields) of each non-blank record, slowly: to name the line of a bad one.
    `strict` raises UserError for misplaced quotes."""
    quoting = csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE
    line, sep = 0, layout.sep
    with open_bytes(path) as stream:
        lines = io.TextIOWrapper(stream, layout.encoding, newline="")
        if sep == "::":
            lines, sep = (text.replace("::", "\t") for text in lines), "\t"
        reader = csv.reader(lines, delimiter=sep, quoting=quoting, strict=strict)
        try:
            for fields in reader:
                line = reader.line_num
                if fields:
                    yield line, fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, after line {line}: {error}") from error


def line_of_row(path: Path, layout: Layout, row: int) -> str:
    """ "FILE, line N" of row 0, 1, ... after the header."""
    line, _ = next(islice(records(path, layout), row + layout.has_header, None))
    return f"{path}, line {line}"


def refuse_wrong_counts(path: Path, layout: Layout) -> None:
    """Raises UserError for the first record with another number of fields than there are columns."""
    for line, fields in records(path, layout):
        if len(fields) != len(layout.names):
            raise UserError(f"{path}, line {line}: {len(fields)} fields, expected {len(layout.names)}")


def read_text(
    path: Path, layout: Layout, types: dict[str, pa.DataType | None], drop_bad: bool = False
) -> tuple[pa.Table, int]:
    """(the columns `types` of a delimited file, number of records dropped); the type None is guessed. With
    `drop_bad`, a record with too few or too many fields is dropped; else it raises UserError with its line.
    Raises pa.ArrowInvalid for a value that is not of its type."""
    dropped = []
    read = pa.csv.ReadOptions(
        block_size=BLOCK,
        column_names=layout.names,
        skip_rows=int(layout.has_header),
        encoding=layout.encoding.removesuffix("-sig"),
    )
    parse = pa.csv.ParseOptions(
        delimiter="\t" if layout.sep == "::" else layout.sep,
        quote_char='"' if layout.quoted else False,
        newlines_in_values=layout.quoted,
        invalid_row_handler=(lambda row: dropped.append(1) or "skip") if drop_bad else None,
    )
    convert = pa.csv.ConvertOptions(
        column_types={name: kind for name, kind in types.items() if kind},
        include_columns=list(types),
        null_values=[],
        strings_can_be_null=False,
    )
    with open_bytes(path, progress=True) as stream:
        lines = Lines(stream, layout.sep == "::")
        try:
            table = pa.csv.read_csv(pa.PythonFile(lines, mode="r"), read, parse, convert)
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                return pa.table({name: pa.array([], kind or pa.null()) for name, kind in types.items()}), 0
            if "parse error" in str(error):
                refuse_wrong_counts(path, layout)
            raise
    if layout.quoted and lines.quotes % 2:
        for _ in records(path, layout, strict=True):
            pass
    return table, len(dropped)
