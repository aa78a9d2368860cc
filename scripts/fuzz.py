"""Look for input that ends in a traceback, a hang or a changed file instead of one clear line.

    python scripts/fuzz.py --seconds=60            # random command lines, YAML files, data and checkpoints
    python scripts/fuzz.py --seconds=0 --seed=17   # the cases of one seed again

Every case is a folder with a few small files and one command line of main.py, which runs in this process. It
has to succeed or to end with exit code 2 and one line of error, within LIMIT seconds, and must change no file
that was there. The first case that does not is made as small as possible, printed and left in its folder.
"""

import argparse
import bz2
import faulthandler
import gzip
import io
import json
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

import hypothesis
import pyarrow as pa
import pyarrow.parquet
import torch
import yaml
from hypothesis import strategies as st
from launch import TINY, Result, here, snapshot

import main
from reclm.config import FIELDS
from reclm.errors import LONGEST, first_line

LIMIT = 20  # seconds of a run
PER_SEED = 25  # cases
MEMORY = 12 * 2**30  # bytes of address space: a case must not take the machine down
SECRETIVE = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:9"}  # no downloads
LONG = ("x" * 5000, "9" * 400)
CELLS = [*LONG, *"0|-1|1.5|1e400|-0|nan|inf|null|NA|true|::|\t|,|;|\"|'|\"\"|a\nb|\r|\0|\x1b[31m|\ufeff| ".split("|")]
CELLS += ["", "1 2", "9" * 19, "é", "日本", "a:b", "1600000000", "1600000000000", "1600000000000000000", "20220408"]
CELLS += "20221399|2022-04-08|2022-04-08T01:02:03.5+02:00|2022-13-45|0001-01-01|9999-12-31|1_000|0x10".split("|")
NUMBERS = "0 1 2 3 7 16 0.5 0.999 -1 1e3 1_0 0x10 1e-30 1e30 1e400 nan -inf 4294967296 9223372036854775808".split()
BYTES = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b'"', b"\n", b"\r", b"\x1f\x8b", b"PK\x03\x04", b"{", b"&a *a"]
VALUES = [None, True, -1, 0, 1, 2**63 - 1, 2**70, 1.5, float("nan"), float("inf"), "", "x", *LONG, "a\nb", "\x1b[31m"]
VALUES += [[], {}, [1], [[1], [2]], {"a": 1}]
TENSORS = [torch.zeros(0), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.full((3,), torch.nan)]
TENSORS += [torch.zeros(1).expand(2**40), torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse()]
COLUMNS = "user item rating timestamp label split context".split()
SIDES = {"items": "item title genres year".split(), "users": "user age zip gender".split()}
NAMES = {name: [*known] for name, known in main.NAMES.items()} | {
    "item_features": ["genres", "title", "genres,year", "genres,genres", "data.csv", "rows.npy", "."],
    "columns": ["user=item,item=user", "user=1,item=2", "user=user,user=item", "label=rating", "timestamp=split", "="],
    "ckpt_name": ["old.pth", "bad.pth", "data.csv", ".", "none/x.pth", "/dev/null"],
    "positive_label": ["1", "0", "train"],
}
NAMES |= {name: ["auto"] * (name == "resume") + NAMES["ckpt_name"] for name in ("resume", "init_from")}
NAMES |= {name: ["data.csv", ".", "old", "new", "none/new"] for name in ("out_dir", "data_dir")}
SMALL = [flag for flag in TINY if "negatives" not in flag]  # which tasks do not share
LEFT_OUT = {"compile", "num_epochs", "dataset"}  # slow by nature; dataset is set by every case
BASES = {  # checkpoints
    "matching": ["--profile_tokens=true", "--item_features=genres", "--time_tokens=embedding"],
    "ctr": ["--task=ctr", "--user_embedding=explicit", "--ema=0.5"],
}
STATES = {}  # what they hold


class Find(Exception):
    """What is wrong with a run."""


class TooLong(BaseException):
    """No Exception, which the program could catch."""


@dataclass
class Case:
    files: dict[str, bytes]
    flags: list[str]
    what: str  # was done to the files


# ---------------------------------------------------------------- files


def good_table(columns: list[str]) -> list[list[str]]:
    """A header and 60 rows."""
    values = {
        "user": lambda i: f"u{i // 6}", "item": lambda i: f"i{(i // 6 + i) % 8}", "rating": lambda i: 1 + i % 5,
        "timestamp": lambda i: 1600000000 + 3600 * i, "label": lambda i: i % 2, "context": lambda i: f"c{i % 3}",
        "split": lambda i: ("train", "train", "train", "train", "valid", "test")[i % 6],
        "title": lambda i: f"Film {i % 3} ({1990 + i % 9})", "genres": lambda i: "A|B" if i % 2 else "C",
        "year": lambda i: 1990 + i, "age": lambda i: 18 + i, "zip": lambda i: f"0{i}", "gender": lambda i: "FM"[i % 2],
    }  # fmt: skip
    return [[*columns], *([str(values[name](i)) for name in columns] for i in range(60))]


@st.composite
def tables(draw, columns: list[str]) -> list[list[str]]:
    """Good rows with up to three faults."""
    table = good_table(draw(st.permutations(columns)) if draw(st.integers(0, 3)) == 3 else columns)
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, len(table) - 1)), draw(st.integers(0, len(columns) - 1))
        cell = draw(st.sampled_from(CELLS) | st.text(max_size=5))
        change = draw(st.sampled_from("cell cell cell column drop twice shorter longer header few".split()))
        for line in table if change in ("column", "drop", "twice") else table[row : row + 1]:
            if change in ("cell", "column"):
                line[column : column + 1] = [cell] if line is not table[0] or change == "cell" else line[column:][:1]
            elif change in ("twice", "longer"):
                line.insert(column, line[column] if change == "twice" and column < len(line) else cell)
            elif change in ("drop", "shorter"):
                del line[column : column + 1]
        if change == "header":
            del table[0]
        if change == "few":
            del table[row + 1 :]
        if not table:
            break
    return table


def as_parquet(draw, table: list[list[str]]) -> bytes:
    """The table as Parquet, each column of any type that its values can have."""
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.null()]
    kinds += [pa.decimal128(20, 2), pa.bool_(), pa.date32(), pa.timestamp("ns", "UTC"), pa.timestamp("s"), pa.time64("us")]
    arrays = []
    for i in range(len(table[0])):
        array = pa.array([row[i] if i < len(row) and row[i] else None for row in table[1:]], pa.string())
        kind = draw(st.sampled_from(kinds))
        with suppress(pa.ArrowException):
            array = array.cast(pa.int64()).cast(kind) if pa.types.is_timestamp(kind) else array.cast(kind)
        shape = draw(st.sampled_from(["plain", "plain", "plain", "dictionary", "list"]))
        if shape == "dictionary":
            with suppress(pa.ArrowException):
                array = array.dictionary_encode()
        arrays.append(pa.array([[x] for x in array.to_pylist()]) if shape == "list" else array)
    file = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_arrays(arrays, [*table[0]]), file)
    return file.getvalue()


@st.composite
def data_files(draw, stem: str, columns: list[str]) -> tuple[str, bytes]:
    """(name, content) of a table in any form, perhaps damaged."""
    table, end = draw(tables(columns)), draw(st.sampled_from(".csv .csv .tsv .txt .dat .inter .jsonl .parquet".split()))
    if end == ".parquet" and table:
        with suppress(pa.ArrowException):
            return stem + end, draw(damaged(as_parquet(draw, table)))
    if end == ".jsonl":
        odd = draw(st.none() | st.tuples(st.integers(0, 59), st.sampled_from(VALUES)))
        rows = [dict(zip(table[0], row, strict=False)) for row in table[1:]] if table else []
        if draw(st.booleans()):
            rows = [{k: json.loads(v) if re.fullmatch(r"[1-9]\d*", v) else v for k, v in row.items()} for row in rows]
        if odd and odd[0] < len(rows) and columns[0] in rows[odd[0]]:
            rows[odd[0]][draw(st.sampled_from(columns))] = odd[1]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        sep = "\t" if end in (".tsv", ".inter") else draw(st.sampled_from([",", ",", "::", ";", "|", " "]))
        text = "".join(sep.join(row) + "\n" for row in table)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "shift-jis"]))
    content = draw(damaged(text.encode(encoding, "replace")))
    packed = draw(st.sampled_from(["", "", "", ".gz", ".bz2", ".zip"]))
    if packed:
        content = draw(damaged(pack(content, packed)))
    return stem + end + packed, content


def pack(content: bytes, end: str) -> bytes:
    if end != ".zip":
        return gzip.compress(content, mtime=0) if end == ".gz" else bz2.compress(content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("inside.csv"), content)
    return file.getvalue()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Mostly as it was, else cut off, or with other bytes in one place."""
    how = draw(st.sampled_from(["", "", "", "", "cut", "flip", "insert", "repeat"]))
    at = draw(st.integers(0, len(content)) if how else st.just(0))
    if how == "cut":
        return content[:at]
    extra = draw(st.sampled_from(BYTES) | st.binary(min_size=1, max_size=4)) if how in ("flip", "insert") else b""
    rest = content if how == "repeat" else content[at + len(extra) * (how == "flip") :]
    return content[:at] + extra + rest if how else content


# ---------------------------------------------------------------- settings and checkpoints


def values_of(name: str) -> st.SearchStrategy[str]:
    """Values of a setting, as text: of its type, or anything."""
    kind = FIELDS[name].type
    known = [str(word) for part in (kind, *get_args(kind)) for word in get_args(part) if isinstance(word, str)]
    known += NAMES.get(name, []) + ["true", "false"] * (kind in (bool, bool | None))
    anything = st.sampled_from(NUMBERS + CELLS) | st.text(max_size=6)
    good = st.sampled_from(known or NUMBERS)
    return (good | good | anything).map(lambda text: text.replace("\0", ""))


flag = st.sampled_from(sorted(FIELDS.keys() - LEFT_OUT)).flatmap(
    lambda name: values_of(name).map(lambda text: (name, text))
)


@st.composite
def yaml_files(draw) -> bytes:
    pairs = draw(st.lists(flag, max_size=3))
    values = {name: draw(st.sampled_from([text, *VALUES])) for name, text in pairs}
    if draw(st.integers(0, 4)) == 4:
        values = draw(st.sampled_from([[values], {"model": values}, {1: 2}, {"--lr": 1}, "x", None, 7]))
    return draw(damaged(yaml.safe_dump(values, allow_unicode=True).encode()))


@st.composite
def checkpoints(draw) -> tuple[str, str, bytes]:
    """(the task, what was changed, content) of a checkpoint with one entry at any depth removed or replaced."""
    task = draw(st.sampled_from(sorted(STATES)))
    state = inner = deepcopy(STATES[task])
    path = [draw(st.sampled_from(sorted(state)))]
    while isinstance(inner[path[-1]], dict | list) and inner[path[-1]] and draw(st.integers(0, 3)):
        inner = inner[path[-1]]
        path.append(draw(st.sampled_from([*inner] if isinstance(inner, dict) else [*range(len(inner))])))
    value = inner[path[-1]]
    new = draw(st.sampled_from(["keep", "remove", "reshape", *range(len(VALUES + TENSORS))]))
    if new == "remove":
        del inner[path[-1]]
    elif new == "reshape" and isinstance(value, torch.Tensor):
        inner[path[-1]] = draw(st.sampled_from([value[None], value.double(), value[:0] if value.ndim else value]))
    elif isinstance(new, int):
        inner[path[-1]] = (VALUES + TENSORS)[new]
    file = io.BytesIO()
    torch.save(state, file)
    change = (VALUES + TENSORS)[new] if isinstance(new, int) else new
    return task, f"{path}: {change!r:.80}", file.getvalue() if new != "keep" else draw(damaged(file.getvalue()))


@st.composite
def cases(draw) -> Case:
    """One kind of input is bad; the flags may be as well."""
    kind = draw(st.sampled_from(["flags", "yaml", "data", "data", "sides", "checkpoint"]))
    files, what, flags = {}, "", [*SMALL, "--num_epochs=1"]
    sides = {f"data.{name}.csv": as_csv(good_table(columns)) for name, columns in SIDES.items()}
    columns = COLUMNS[: draw(st.sampled_from([7, 2, 3, 4, 5]))] if kind != "checkpoint" else COLUMNS
    data, content = "data.csv", as_csv(good_table(columns))
    flags += draw(st.sampled_from([["--describe"], ["--describe"], ["--out_dir=new"], ["--task=ctr", "--describe"]]))
    if kind == "data":
        data, content = draw(data_files("data", columns))
        sides = {}
        flags += ["--drop_bad_rows"] * draw(st.booleans())
    elif kind == "sides":
        side = draw(st.sampled_from(sorted(SIDES)))
        name, bad = draw(data_files(f"data.{side}", SIDES[side]))
        sides = {name: bad}
        flags += [draw(st.sampled_from(["--profile_tokens=true", "--item_features=genres,title,year"]))]
    elif kind == "yaml":
        files["bad.yaml"] = draw(yaml_files())
        flags.append("--config=bad.yaml")
    elif kind == "checkpoint":
        task, what, files["bad.pth"] = draw(checkpoints())
        flags = draw(
            st.sampled_from(
                [
                    ["--eval_only", "--ckpt_name=bad.pth", "--out_dir=."],
                    ["--resume=bad.pth", "--out_dir=new"],
                    [*SMALL, *BASES[task], "--num_epochs=1", "--init_from=bad.pth", "--out_dir=new"],
                ]
            )
        )
    for name, text in draw(st.lists(flag, min_size=1, max_size=4) if kind == "flags" else st.lists(flag, max_size=1)):
        flags.append(f"--{name}={text}")
    if kind == "flags":
        flags += draw(st.lists(st.text(max_size=6).map(lambda text: text.replace("\0", "")), max_size=1))
    return Case({data: content, **sides, **files}, [*flags, f"--dataset={data}"], what)


def as_csv(table: list[list[str]]) -> bytes:
    return "".join(",".join(row) + "\n" for row in table).encode()


# ---------------------------------------------------------------- runs


def judge(result: Result, before: dict, after: dict) -> str:
    """What is wrong with a run, or ""."""
    changed = [path for path in before if after.get(path) != before[path]]
    if changed:
        return f"changed {', '.join(changed)}"
    if result.code == 0:
        return ""
    line = result.stderr[result.stderr.find("error:") :].removesuffix("\n")
    if result.code != 2 or len(result.errors) != 1 or not line.isprintable():
        return f"exit code {result.code} without exactly one printable line of error"
    return f"an error of {len(line)} characters" if len(line) > len("error: ") + LONGEST else ""


def check(case: Case, folder: Path, cache: Path) -> None:
    """Run a case in the folder. Raises Find."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    before = snapshot(folder)
    result = None
    signal.alarm(LIMIT)
    try:
        result = here(*case.flags, cwd=folder, env={"RECLM_CACHE": str(cache), **SECRETIVE})
    except TooLong:
        problem = f"still running after {LIMIT} s"
    except Exception as error:
        raise Find(f"{type(error).__name__}: {first_line(error)}") from error
    else:
        problem = judge(result, before, snapshot(folder))
    finally:
        signal.alarm(0)
    if problem:
        raise Find(f"{problem}\n{result.text[-1000:] if result else ''}")


def refuse_to_wait(*_) -> None:
    raise TooLong


def fuzz(seconds: float, seed: int, folder: Path, most: int = PER_SEED) -> tuple[int, str | None]:
    """(number of cases, None, or a report of the first find), `most` cases from each of seed, seed + 1, ..."""
    signal.signal(signal.SIGALRM, refuse_to_wait)
    count, end, found = 0, time.time() + seconds, None
    work, cache = folder / "case", folder / "cache"
    for task, flags in BASES.items():
        start = Case({"data.csv": as_csv(good_table(COLUMNS))}, [*SMALL, *flags, "--num_epochs=2"], "")
        start.files |= {f"data.{name}.csv": as_csv(good_table(columns)) for name, columns in SIDES.items()}
        start.flags += ["--out_dir=old", "--dataset=data.csv"]
        check(start, work, cache)
        STATES[task] = torch.load(work / "old" / "epoch_0.pth", weights_only=True)

    def one(case: Case) -> None:
        nonlocal count, found
        count += 1
        try:
            check(case, work, cache)
        except Find:
            found = case
            raise

    options = hypothesis.settings(
        max_examples=most, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=[*hypothesis.HealthCheck], verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    while True:
        try:
            hypothesis.seed(seed)(options(hypothesis.given(cases())(one)))()
        except Find as find:
            return count, report(find, found, work, seed)
        seed += 1
        if time.time() > end:
            return count, None


def report(find: Find, case: Case, folder: Path, seed: int) -> str:
    """What was found and what repeats it."""
    trace = "".join(traceback.format_exception(find.__cause__)[-8:]) if find.__cause__ else ""
    shown = "\n".join(f"  {name}: {content[:200]!r}" for name, content in case.files.items() if name != "bad.pth")
    command = f"cd {folder} && python {Path(main.__file__)} {shlex.join(case.flags)}"
    again = f"python scripts/fuzz.py --seconds=0 --seed={seed}"
    return f"{trace}FOUND: {find}\n{command}\n{shown}\nchanged: {case.what}\nsearch again: {again}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    faulthandler.enable()
    number, found = fuzz(args.seconds, args.seed, Path(tempfile.mkdtemp(prefix="reclm-fuzz-")))
    print(found or f"{number} cases, no find")
    raise SystemExit(bool(found))
