"""The cases of scripts/fuzz.py: good files with a few faults, and flags with good and bad values."""

import bz2
import gzip
import io
import json
import sys
import zipfile
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet
import torch
import yaml
from hypothesis.strategies import (
    binary,
    booleans,
    composite,
    integers,
    lists,
    permutations,
    sampled_from,
    text,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from launch import TINY

from main import NAMES
from reclm.config import FIELDS

NUMBERS = (
    "0 1 2 3 7 16 .5 .999 1e-30 1e30 -1 1e3 1_0 0x10 1e400 nan -inf 4294967296 9223372036854775808".split()
)
CELLS = ["", "\0", "\r", "a\nb", "\x1b[31m", "\ufeff", "|", "x" * 5000, "9" * 400, "9" * 19, *NUMBERS]
CELLS += ' |null|NA|true|::|\t|,|;|"|\'|""|1 2|é|日本|a:b|user|item|rating|timestamp|label'.split("|")
CELLS += "1600000000|1600000000000|1600000000000000000|20220408|20221399|2022-04-08|0001-01-01".split("|")
CELLS += "9999-12-31|2022-04-08T01:02:03.5+02:00|2022-13-45|12:30".split("|")
BYTES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b'"', b"\n", b"\r", b"\x1f\x8b", b"PK\3\4", b"{",
    b"&a *a",
]  # fmt: skip
VALUES = [
    None, True, -1, 0, 1, 2**63 - 1, 2**70, 10**400, 1.5, float("nan"), float("inf"), [], {}, [1],
    {"a": 1},
]  # fmt: skip
VALUES += ["", "1", "x" * 5000, "a\nb", "\x1b[31m", [[1], [2]]]
TENSORS = [torch.zeros(0), torch.zeros(3), torch.full((3,), torch.nan), torch.zeros(1).expand(2**40)]
TENSOR_TO = {  # other forms of the same tensor
    "row": lambda x: x[None], "nan": lambda x: x * torch.nan, "double": torch.Tensor.double,
    "zero": torch.zeros_like, "integer": torch.Tensor.long, "huge": lambda x: x + 2**62,
    "negative": lambda x: -1 - x, "bool": torch.Tensor.bool, "sparse": torch.Tensor.to_sparse,
    "complex": lambda x: x.to(torch.complex64), "empty": lambda x: x[:0] if x.ndim else x,
}  # fmt: skip
PARQUET = [
    pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.int64(), pa.uint64(), pa.float32(),
    pa.null(),
]  # fmt: skip
PARQUET += [pa.decimal128(20, 2), pa.bool_(), pa.date32(), pa.timestamp("ns", "UTC"), pa.timestamp("s")]
PARQUET += [pa.time64("us"), pa.duration("s"), pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.string())]

COLUMNS = "user item rating timestamp label split context".split()
SIDES = {"items": "item title genres year".split(), "users": "user age zip gender".split()}
FILES = ["old.pth", "bad.pth", "data.csv", ".", "none/x.pth", "/dev/null", ""]
KNOWN = {name: [*known] for name, known in NAMES.items()} | {  # values of settings that are any text
    "item_features": ["genres", "title", "genres,year", "genres,genres", "data.csv", "none.npy"],
    "columns": ["user=item,item=user", "user=1,item=2", "user=user,user=item", "label=rating"],
    "positive_label": ["0", "1", "train"], "ckpt_name": FILES, "init_from": FILES, "resume": ["auto", *FILES],
    "data_dir": FILES, "out_dir": [*FILES, "none/new"],
}  # fmt: skip
LEFT_OUT = {"compile", "num_epochs", "dataset"}  # slow with any data; and what every case gives
SMALL = [flag for flag in TINY if "negatives" not in flag] + ["--num_epochs=1"]
BASES = {  # runs whose checkpoints are damaged
    "matching": ["--profile_tokens=true", "--item_features=genres", "--time_tokens=embedding", "--ema=0.5"],
    "ctr": ["--task=ctr", "--user_embedding=explicit"],
}
STATES = {}  # their checkpoints


@dataclass
class Case:
    files: dict[str, bytes]
    flags: list[str]
    change: str = ""  # to a checkpoint


# ---------------------------------------------------------------- data


def good_table(columns: list[str]) -> list[list[str]]:
    """A header and 60 rows."""
    values = {
        "user": lambda i: f"u{i // 6}", "item": lambda i: f"i{(i // 6 + i) % 8}",
        "rating": lambda i: 1 + i % 5, "label": lambda i: i % 2, "context": lambda i: f"c{i % 3}",
        "timestamp": lambda i: 1600000000 + 3600 * i,
        "split": lambda i: "train train train train valid test".split()[i % 6], "year": lambda i: 1990 + i,
        "genres": lambda i: "A|B" if i % 2 else "C", "title": lambda i: f"Film {i % 3} ({1990 + i % 9})",
        "age": lambda i: 18 + i, "zip": lambda i: f"0{i}", "gender": lambda i: "FM"[i % 2],
    }  # fmt: skip
    return [[*columns], *([str(values[name](i)) for name in columns] for i in range(60))]


def as_text(table: list[list[str]], sep: str = ",") -> str:
    return "".join(sep.join(row) + "\n" for row in table)


@composite
def tables(draw, columns: list[str]) -> list[list[str]]:
    """Good rows with up to three faults."""
    table = good_table(draw(permutations(columns)) if draw(integers(0, 3)) == 3 else columns)
    faults = sampled_from("set drop insert set-column drop-column insert-column header end".split())
    for fault in draw(lists(faults, max_size=3)):
        row, at = draw(integers(0, len(table) - 1)), draw(integers(0, len(columns) - 1))
        cell = draw(sampled_from(CELLS) | text(max_size=5))
        for line in table if "column" in fault else table[row : row + 1]:
            if "set" in fault:
                line[at : at + 1] = [cell]
            elif "drop" in fault:
                del line[at : at + 1]
            elif "insert" in fault:
                line.insert(at, cell)
        if fault == "set-column":
            table[0] = [*columns]
        table = table[row:] if fault == "header" else table[: row + 1] if fault == "end" else table
    return table


@composite
def parquet(draw, table: list[list[str]]) -> bytes:
    """The table with each column of any type that its values can have."""
    arrays = []
    for i in range(len(table[0])):
        array = pa.array([row[i] if i < len(row) and row[i] else None for row in table[1:]], pa.string())
        for kind in draw(lists(sampled_from(PARQUET), max_size=2)):  # to a timestamp by way of an integer
            with suppress(pa.ArrowException):
                array = (
                    pa.array([[x] for x in array.to_pylist()])
                    if pa.types.is_nested(kind)
                    else array.cast(kind)
                )
        arrays.append(array)
    file = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_arrays(arrays, table[0]), file)
    return file.getvalue()


@composite
def json_lines(draw, table: list[list[str]]) -> bytes:
    rows = [dict(zip(table[0], row, strict=False)) for row in table[1:]]
    if draw(booleans()):
        rows = [{k: int(v) if v.isdecimal() and len(v) < 400 else v for k, v in row.items()} for row in rows]
    if rows and rows[0] and draw(booleans()):
        row = draw(sampled_from(rows))
        row[draw(sampled_from([*rows[0]]))] = draw(sampled_from(VALUES))
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "replace")


@composite
def data_files(draw, stem: str, columns: list[str]) -> dict[str, bytes]:
    """{name: content} of a table in any form, perhaps damaged."""
    table = draw(tables(columns))
    end = draw(sampled_from(".csv .csv .tsv .txt .dat .inter .jsonl .parquet".split()))
    if end == ".parquet":
        return {stem + end: draw(damaged(draw(parquet(table))))}
    if end == ".jsonl":
        content = draw(json_lines(table))
    else:
        sep = "\t" if end in (".tsv", ".inter") else draw(sampled_from([",", ",", "::", ";", "|", " "]))
        encodings = "utf-8 utf-8 utf-8 utf-8-sig utf-16 utf-16-le latin-1 shift-jis".split()
        content = as_text(table, sep).encode(draw(sampled_from(encodings)), "replace")
    content, packed = draw(damaged(content)), draw(sampled_from(["", "", "", ".gz", ".bz2", ".zip"]))
    return {stem + end + packed: draw(damaged(pack(content, packed))) if packed else content}


def pack(content: bytes, end: str) -> bytes:
    if end == ".zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("inside.csv"), content)
        return file.getvalue()
    return gzip.compress(content, mtime=0) if end == ".gz" else bz2.compress(content)


@composite
def damaged(draw, content: bytes) -> bytes:
    """Mostly as it was, else cut off, or with other bytes in one place."""
    how = draw(sampled_from(["", "", "", "", "", "cut", "replace", "insert"]))
    if not how:
        return content
    at, new = draw(integers(0, len(content))), draw(sampled_from(BYTES) | binary(min_size=1, max_size=4))
    if how == "cut":
        return content[:at]
    return content[:at] + new + content[at + len(new) * (how == "replace") :]


# ---------------------------------------------------------------- settings and checkpoints


@composite
def settings(draw, most: int = 1, least: int = 0) -> dict[str, str]:
    """{name: value} with values of the setting's type, or any."""
    chosen = {}
    for name in draw(lists(sampled_from(sorted(FIELDS.keys() - LEFT_OUT)), min_size=least, max_size=most)):
        kinds = (FIELDS[name].type, *get_args(FIELDS[name].type))
        good = [word for kind in kinds for word in get_args(kind) if isinstance(word, str)]
        good += KNOWN.get(name, []) + ["true", "false"] * (bool in kinds)
        value = draw(
            sampled_from(good or NUMBERS) if draw(integers(0, 2)) else sampled_from(CELLS) | text(max_size=6)
        )
        chosen[name] = value.replace("\0", "")  # which no command line can hold
    return chosen


@composite
def yaml_files(draw) -> bytes:
    values = {name: draw(sampled_from([value, *VALUES])) for name, value in draw(settings(3)).items()}
    whole = draw(
        sampled_from([*[values] * 5, [values], {"model": values}, {1: 2}, {"--lr": 1}, "x", None, 7])
    )
    return draw(damaged(yaml.safe_dump(whole, allow_unicode=True).encode()))


@composite
def checkpoints(draw, task: str) -> tuple[bytes, str]:
    """(content, what was changed) of a checkpoint with one entry at any depth removed or replaced."""
    state = inner = deepcopy(STATES[task])
    path = [draw(sampled_from(sorted(state)))]
    while isinstance(value := inner[path[-1]], dict | list) and value and draw(integers(0, 3)):
        inner = value
        path.append(draw(sampled_from([*value] if isinstance(value, dict) else range(len(value)))))
    new = draw(sampled_from(["nothing", "removed", *(TENSOR_TO if isinstance(value, torch.Tensor) else [])]))
    if new == "nothing" and draw(booleans()):
        new = draw(sampled_from(range(len(VALUES + TENSORS))))
        inner[path[-1]], new = (VALUES + TENSORS)[new], f"{(VALUES + TENSORS)[new]!r:.80}"
    elif new == "removed":
        del inner[path[-1]]
    elif new != "nothing":
        inner[path[-1]] = TENSOR_TO[new](value)
    file = io.BytesIO()
    torch.save(state, file)
    return draw(damaged(file.getvalue())), f"{path}: {new}"


@composite
def cases(draw) -> Case:
    """Bad input of one kind, mostly; other flags may be bad as well."""
    kind, columns = draw(sampled_from("flags yaml data data sides checkpoint".split())), COLUMNS
    goal = draw(
        sampled_from([["--describe"], ["--describe"], ["--out_dir=new"], ["--describe", "--task=ctr"]])
    )
    if kind != "checkpoint":
        columns = columns[: draw(sampled_from([7, 2, 3, 4, 5]))]
    case, data = start(columns, [*SMALL, *goal]), "data.csv"
    if kind == "data":
        case.files = draw(data_files("data", columns))
        case.flags += ["--drop_bad_rows"] * draw(booleans())
        data = next(iter(case.files))
    elif kind == "sides":
        side = draw(sampled_from(sorted(SIDES)))
        del case.files[f"data.{side}.csv"]
        case.files |= draw(data_files(f"data.{side}", SIDES[side]))
        case.flags.append("--profile_tokens" if side == "users" else "--item_features=genres,title,year")
    elif kind == "yaml":
        case.files["bad.yaml"] = draw(yaml_files())
        case.flags.append("--config=bad.yaml")
    elif kind == "checkpoint":
        task = draw(sampled_from(sorted(BASES)))
        case.files["bad.pth"], case.change = draw(checkpoints(task))
        evaluation, again = (
            ["--eval_only", "--ckpt_name=bad.pth", "--out_dir=."],
            ["--resume=bad.pth", "--out_dir=new"],
        )
        new = [*SMALL, *BASES[task], "--init_from=bad.pth", "--out_dir=new"]
        case.flags = draw(sampled_from([evaluation, again, new])).copy()
    given = draw(settings(4, 1) if kind == "flags" else settings())
    stray = draw(lists(text(max_size=6), max_size=1)) if kind == "flags" and draw(integers(0, 4)) == 4 else []
    case.flags += [f"--{name}={value}" for name, value in given.items()] + [
        x.replace("\0", "") for x in stray
    ]
    case.flags.append(f"--dataset={data}")
    return case


def start(columns: list[str], flags: list[str]) -> Case:
    """Good data and side tables."""
    tables = {"data.csv": columns} | {f"data.{side}.csv": names for side, names in SIDES.items()}
    return Case({name: as_text(good_table(names)).encode() for name, names in tables.items()}, [*flags])
