"""Compare how fast raw interactions are read, with pandas, RecTools and RePlay.

    pip install -r requirements-dev.txt
    python scripts/bench/readers.py --data_dir=data --out=readers.json

The ratings of MovieLens-1M, repeated with new users each time, are written as CSV, as ratings.dat (with "::")
and as Parquet, into a temporary folder. What is measured, each time in a process of its own (see
scripts/bench/run_reading.py), imports not counted:

reading      file -> table in memory, users and items numbered from 0. Ours recognises columns and formats
             and checks every value; the others are told the format and take the values as they are
preparation  ours from the file to the sorted arrays on disk, without a cache, and again with it

Every tool may use two threads. Rounds alternate between the tools; the tables show medians, with the range.
The operating system has the files in memory, so the disk is not measured.

M rows/s      millions of rows per second
CPU s/M rows  seconds of all threads per million rows: other jobs affect them less
memory, GiB   peak resident memory above that after the imports
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import peers
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from measure import arguments, compare, peak_of, say, show, table, write
from run_reading import COLUMNS

from reclm.data.sources import find_dataset, read_dataset
from reclm.errors import UserError, run_script

FORMATS = ("csv", "dat", "parquet")
THREADS = "2"  # of every tool


def read_args() -> argparse.Namespace:
    parser = arguments(__doc__, "readers.json")
    peers.add_peers(parser, "rectools,replay", ("rectools", "replay"))
    parser.add_argument("--data_dir", default="data", help="folder with ml-1m/ratings.dat [default: data]")
    parser.add_argument("--repeats", type=int, default=20, help="of the ratings [default: 20]")
    args = parser.parse_args()
    if args.rounds < 1 or args.repeats < 1:
        raise UserError("--rounds and --repeats must be at least 1")
    return args


def write_files(args: argparse.Namespace, work: Path) -> tuple[dict[str, Path], int]:
    """Write the ratings --repeats times, with new users each time -> ({format: path}, number of rows)."""
    ratings = read_dataset(find_dataset("ml-1m", args.data_dir)).interactions.astype(np.int64)
    ratings.columns = COLUMNS
    paths = {name: work / f"ratings.{name}" for name in FORMATS}
    no_header = pa.csv.WriteOptions(include_header=False)
    schema = pa.Schema.from_pandas(ratings)
    with (
        open(paths["csv"], "wb") as csv,
        open(paths["dat"], "wb") as dat,
        pa.parquet.ParquetWriter(paths["parquet"], schema) as parquet,
    ):
        csv.write(",".join(COLUMNS).encode() + b"\n")
        shift = ratings["userId"].max()
        for _ in range(args.repeats):
            part, text = pa.Table.from_pandas(ratings), io.BytesIO()
            pa.csv.write_csv(part, text, no_header)
            csv.write(text.getvalue())
            dat.write(text.getvalue().replace(b",", b"::"))
            parquet.write_table(part)
            ratings["userId"] += shift
    return paths, args.repeats * len(ratings)


def measure(tool: str, python: Path, file: Path, cache: Path) -> dict:
    """Read `file` once in a process of its own -> {"size": (rows, users, items), column: value}.
    Raises UserError if it fails."""
    result = cache.with_name("result.json")
    env = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS"), THREADS) | {"RECLM_CACHE": str(cache)}
    script = Path(__file__).with_name("run_reading.py")
    peak_of([python, script, tool, file, result], file.parent, **env)
    found = json.loads(result.read_text())
    millions = found["size"][0] / 1e6
    return {
        "size": found["size"],
        "M rows/s": millions / found["seconds"],
        "CPU s/M rows": found["cpu_seconds"] / millions,
        "memory, GiB": found["memory_gib"],
    }


def one_round(tools: dict[str, tuple[str, Path]], file: Path, work: Path) -> dict[str, dict]:
    """Measure each tool once -> {name: row}. Raises UserError where they find other rows, users or items."""
    cache, rows = work / "cache", {}
    shutil.rmtree(cache, ignore_errors=True)
    for name, (tool, python) in tools.items():
        rows[name] = measure(tool, python, file, cache)
        show(f"{file.name}, {name}", {key: value for key, value in rows[name].items() if key != "size"})
    sizes = {name: tuple(row.pop("size")) for name, row in rows.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"the tools disagree on the rows, users and items of {file.name}: {sizes}")
    return rows


def main() -> None:
    args = read_args()
    ours = dict.fromkeys(("ours", "pandas"), Path(sys.executable))
    reading = {name: (name, python) for name, python in (ours | peers.pythons_of(args)).items()}
    preparation = dict.fromkeys(("preparation", "from the cache"), ("preparation", Path(sys.executable)))
    rounds = {form: [] for form in FORMATS}
    with tempfile.TemporaryDirectory() as folder:
        files, rows = write_files(args, Path(folder))
        for _ in range(args.rounds):
            for form, found in rounds.items():
                found.append(one_round(reading | preparation, files[form], Path(folder)))
    results = {"reading": {}, "preparation": {}}
    for form, found in rounds.items():
        for part, tools in {"reading": reading, "preparation": preparation}.items():
            results[part][form] = compare({name: [row[name] for row in found] for name in tools})
            say(table({f"{part}, {form}": name} | row for name, row in results[part][form].items()))
    write(args.out, {"rows": rows, "results": results, "rounds": rounds})


if __name__ == "__main__":
    run_script(main)
