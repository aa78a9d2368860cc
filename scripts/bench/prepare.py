"""Measure scripts/prepare.py by engine and size, and trainings on what it wrote. Linux only.

    pip install -r requirements-dev.txt -r requirements-prepare.txt
    python scripts/bench/prepare.py                                # everything: hours, 20 GB of disk
    python scripts/bench/prepare.py --parts=preparation --engines=polars --millions=10
    python scripts/bench/prepare.py --parts=training --millions=10,100 --rounds=3

preparation  seconds and peak GiB of scripts/prepare.py, with all processes that it starts (pages that they
             share count once for each), from Parquet files to the prepared folder
training     steps/s and peak GiB of one process that trains on that folder, and does all else that a run does
             with the data but to rank every user (scripts/bench/run_prepared.py)

The made-up interactions: 100 per user on average, items by a power law, times in whole minutes, so with many
ties, in Parquet files of two million rows in no order. Engines must agree on the fingerprint. Spark has
local[2] and 4 GiB for Java. Of --rounds, sizes and engines in turn, medians are shown. The system has the
files in its cache, as far as there is memory. --out is a record: what is measured again is replaced."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from measure import peak_of, say, show, summary
from trainings import ROOT

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser, write_whole
from reclm.run.report import stamp

RECORD = ROOT / "configs" / "records" / "prepare.json"
ENGINES = ("pandas", "polars", "spark")
FILE = 2_000_000  # rows of a file
ITEMS, PER_USER = 50_000, 100
MINUTES = 500_000  # about a year
SPARK = {"PYSPARK_SUBMIT_ARGS": "--master local[2] --driver-memory 4g pyspark-shell"}
THREADS = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS"), "2")


def make_files(folder: Path, rows: int) -> Path:
    """Write the interactions, unless they are there -> their folder."""
    if folder.exists():
        return folder
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    popularity = 1 / np.arange(1, ITEMS + 1)
    ends = np.cumsum(popularity / popularity.sum())
    for number, first in enumerate(range(0, rows, FILE)):
        rng, count = np.random.default_rng(number), min(FILE, rows - first)
        table = {
            "user": rng.integers(0, max(1, rows // PER_USER), count),
            "item": np.searchsorted(ends[:-1], rng.random(count)),
            "timestamp": 1_600_000_000 + 60 * rng.integers(0, MINUTES, count),
        }
        pa.parquet.write_table(pa.table(table), work / f"{number:04}.parquet")
    work.rename(folder)
    return folder


def prepare(args: argparse.Namespace, engine: str, millions: float) -> dict:
    """Run scripts/prepare.py once -> {"seconds", "peak GiB", "fingerprint"}; what it wrote stays."""
    rows = round(millions * 1e6)
    source, out = make_files(args.work / f"{rows}", rows), args.work / f"prepared-{rows}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, ROOT / "scripts" / "prepare.py", f"--engine={engine}", f"--input={source}"]
    begin = time.perf_counter()
    peak = peak_of([*command, f"--out={out}"], args.work, **SPARK, **THREADS)
    seconds = time.perf_counter() - begin
    meta = json.loads((out / "meta.json").read_text())[0]
    return {"seconds": seconds, "peak GiB": peak, "fingerprint": meta["fingerprint"]}


def preparation(args: argparse.Namespace) -> list[dict]:
    """A row per engine and size. Raises UserError if engines differ."""
    found = {}
    for _ in range(args.rounds):
        for millions in args.millions:
            for engine in args.engines:
                row = prepare(args, engine, millions)
                say(f"{engine}, {millions:g} million rows: {row}")
                found.setdefault((engine, millions), []).append(row)
    marks = {(millions, row["fingerprint"]) for (_, millions), rows in found.items() for row in rows}
    if len(marks) > len(args.millions):
        raise UserError(f"the engines disagree: {sorted(marks)}")
    return [
        {"engine": engine, "million rows": millions} | in_short(rows, "seconds", "peak GiB")
        for (engine, millions), rows in found.items()
    ]


def training(args: argparse.Namespace) -> list[dict]:
    """A row per size."""
    found, result = {}, args.work / "result.json"
    for _ in range(args.rounds):
        for millions in args.millions:
            folder = args.work / f"prepared-{round(millions * 1e6)}"
            if not folder.exists():
                prepare(args, args.engines[0], millions)
            script = Path(__file__).with_name("run_prepared.py")
            peak_of([sys.executable, script, folder, str(args.steps), result], args.work, OMP_NUM_THREADS="1")
            row = json.loads(result.read_text())
            say(f"{millions:g} million rows: {row}")
            found.setdefault(millions, []).append(row)
    columns = ("users", "items", "seconds to open", "steps/s", "peak GiB")
    return [{"million rows": millions} | in_short(rows, *columns) for millions, rows in found.items()]


def in_short(rows: list[dict], *columns: str) -> dict:
    return {name: summary([row[name] for row in rows]) for name in columns}


PARTS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "preparation": preparation,
    "training": training,
}


def replaced(old: list[dict], new: list[dict]) -> list[dict]:
    """The rows of a record, those of the same engine and size by the new ones."""
    rows = {(row.get("engine"), row["million rows"]): row for row in [*old, *new]}
    return [rows[key] for key in sorted(rows, key=lambda key: (key[1], key[0] or ""))]


def read_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} [both]")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)} [all]")
    parser.add_argument("--millions", default="10,30,100", help="of rows [10,30,100]")
    parser.add_argument("--steps", type=int, default=300, help="of training [300]")
    parser.add_argument("--rounds", type=int, default=1, help="[1]")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/prepare"), help="folder that is kept [runs/prepare]"
    )
    parser.add_argument("--out", type=Path, default=RECORD, help=f"JSON file to write [{RECORD.name}]")
    args = parser.parse_args()
    args.parts, args.engines = args.parts.split(","), args.engines.split(",")
    try:
        args.millions = [float(size) for size in args.millions.split(",")]
    except ValueError:
        raise UserError(f"--millions={args.millions} must be numbers, separated by commas") from None
    for name, known in (("parts", PARTS), ("engines", ENGINES)):
        if not set(getattr(args, name)) <= set(known):
            raise UserError(f"--{name} must be of {', '.join(known)}")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = read_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.parts:
        rows = [row | stamp() | {"load": os.getloadavg()[0]} for row in PARTS[name](args)]
        show(name, [{key: row[key] for key in row if key not in stamp()} for row in rows])
        record[name] = replaced(record.get(name, []), rows)
        text = json.dumps(record, indent=1)
        write_whole(args.out, lambda path, text=text: path.write_text(text + "\n"))
    say(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
