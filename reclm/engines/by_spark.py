"""--engine=spark: files are read and rows sorted by many processes, on one machine or many.

    read     one task per file: reclm/data/own.py in a worker -> typed rows, with the number of the file and
             the row within it, in work/rows
    users    rows per user, by id; items by id: their places are their numbers
    sort     equal rows dropped, the others by (user, time, file, row): a range of users and times per task,
             which writes NAME.00000, NAME.00001, ... into `work`
    join     these parts, in order, are the arrays

All machines share the folder of the files and that of --out. The package is sent to the workers, which need
numpy, pandas and pyarrow."""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from reclm.config import DataConfig
from reclm.data.columns import Wishes, doubts, find_doubtful
from reclm.data.own import read_interactions, same_columns
from reclm.data.sources import Source
from reclm.engines.finish import check_columns, check_scope, finish, need
from reclm.errors import UserError, first_line

ROOT = Path(__file__).parents[2]
ROWS = {
    "user": pa.string(), "item": pa.string(), "timestamp": pa.float64(), "rating": pa.float64(),
    "file": pa.int32(), "row": pa.int64(),
}  # fmt: skip
SCHEMA = "user string, item string, timestamp double, rating double, file int, row long"
REFUSED = "refused."  # before the number of a file with a bad row, in `work`
BATCH = 2**16  # rows that a worker hands over at once
ARRAYS = {"item_ids": np.int64, "timestamps": np.float64, "ratings": np.float64}


def make_arrays(source: Source, cfg: DataConfig, task: str, work: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """See `prepare.make_arrays`; the long arrays are memory maps of files in `work`, a folder that all
    workers can write to. Raises UserError."""
    need("pyspark")
    check_scope("spark", source, cfg, task)
    spark = start_spark(work)
    try:
        return sort_files(spark, source, cfg, work)
    finally:
        with suppress(Exception):  # after a signal in the middle of a call, Java answers no more
            spark.stop()


def sort_files(spark, source: Source, cfg: DataConfig, work: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """`make_arrays` in a session of Spark."""
    columns, notes = read_files(spark, source, Wishes(cfg.columns), work)
    rows = spark.read.parquet(str(work / "rows"))
    count = rows.count()
    if "timestamp" in columns:  # written, since all that follows needs it
        drop_equal(rows, columns).write.parquet(str(work / "once"))
        rows = spark.read.parquet(str(work / "once"))
    users = rows.groupBy("user").count().orderBy("user").toArrow()
    items = rows.select("item").distinct().orderBy("item").toArrow()
    offsets = np.concatenate([[0], np.cumsum(users["count"].to_numpy())])
    arrays = {"offsets": offsets, "users": to_texts(users["user"]), "items": to_texts(items["item"])}
    numbers = items.append_column("number", pa.array(np.arange(1, len(items) + 1)))
    rows = rows.selectExpr("*", "timestamp + 0.0 as time")  # 0.0 for -0.0, which Spark would put before it
    rows = rows.join(spark.createDataFrame(numbers), "item").orderBy("user", "time", "file", "row")
    names = {"item_ids": "number", "timestamps": "timestamp", "ratings": "rating"}
    names = {ours: name for ours, name in names.items() if name in (*columns, "number")}
    write = partial(write_part, names=names, work=work)
    parts = rows.select(*names.values()).mapInArrow(write, "part int, rows long").collect()
    if sum(part.rows for part in parts) != offsets[-1]:
        raise AssertionError(f"sorted {sum(part.rows for part in parts)} rows of {offsets[-1]}")
    for name in ARRAYS:
        arrays[name] = np.zeros(0)
        if name in names:
            arrays[name] = join_parts(name, sorted(part.part for part in parts), work)
    return finish(source, cfg, arrays, notes, count - int(offsets[-1]))


def to_texts(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(str)


def start_spark(work: Path):
    """The session of spark-submit, or one on this machine. Raises UserError without Java."""
    java = Path(os.environ.get("JAVA_HOME", "")) / "bin" / "java"
    if not shutil.which("java") and not java.is_file():
        raise UserError(
            "Spark needs Java 17 or later: apt-get install openjdk-17-jre-headless, or set JAVA_HOME"
        )
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    warnings.filterwarnings("ignore", "PySpark does not yet", FutureWarning)  # of pandas 3, which is not used
    try:
        spark = (
            SparkSession.builder.appName("prepare").config("spark.ui.showConsoleProgress", True).getOrCreate()
        )
    except Exception as error:  # of many types
        raise UserError(f"Spark does not start ({first_line(error)}): it needs Java 17 or later") from None
    spark.sparkContext.setLogLevel("ERROR")
    spark.sparkContext.addPyFile(shutil.make_archive(str(work / f"package{work.name}"), "zip", ROOT, "reclm"))
    return spark


# ---------------------------------------------------------------- reading


def read_files(spark, source: Source, wishes: Wishes, work: Path) -> tuple[list[str], list[str]]:
    """Write work/rows -> (its columns, notes). Raises UserError with the file and row of a bad row."""
    files = [file.absolute() for file in source.files]
    read = partial(read_some, files=files, wishes=wishes, work=work)
    numbers = spark.range(len(files), numPartitions=len(files))  # a task each
    numbers.mapInArrow(read, SCHEMA).write.parquet(str(work / "rows"))
    for file in sorted(work.glob(REFUSED + "*")):
        raise UserError(file.read_text())
    read = [json.loads((work / f"read.{number:06}").read_text()) for number in range(len(files))]
    same_columns(source.files, [found["columns"] for found in read])
    check_columns(source, read[0]["columns"])
    said = list(dict.fromkeys(word for found in read for word in found["said"]))
    notes = [f"{files[0].name} is read as: {'; '.join(said)}"] * bool(said)
    doubtful = {}
    for column in ("user", "item"):
        if there := [found["doubtful"][column] for found in read if column in found["doubtful"]]:
            doubtful[column] = min(word for word, _ in there), sum(count for _, count in there)
    return read[0]["columns"], notes + doubts(read[0]["columns"], doubtful)


def read_some(batches: Iterator[pa.RecordBatch], files: list[Path], wishes: Wishes, work: Path) -> Iterator:
    """In a worker: numbers of files -> their rows. What is to be said of a file is left in `work`, and so is
    the line of a UserError, after which no more are read."""
    for batch in batches:
        for number in batch["id"].to_pylist():
            if any(work.glob(REFUSED + "*")):  # an exception would be tried again, and end in pages of Java
                return
            try:
                table, said, _ = read_interactions(files[number], wishes)
            except UserError as error:
                (work / f"{REFUSED}{number:06}").write_text(str(error))
                return
            found = {"columns": list(table), "said": said, "doubtful": find_doubtful(table)}
            (work / f"read.{number:06}").write_text(json.dumps(found))
            for first in range(0, len(table), BATCH):
                yield to_batch(table.iloc[first : first + BATCH], number, first)


def to_batch(table: pd.DataFrame, number: int, first: int) -> pa.RecordBatch:
    """Rows `first`, `first` + 1, ... of a file as ROWS; nulls in columns that it lacks."""
    columns = {"file": np.full(len(table), number), "row": np.arange(first, first + len(table))}
    for name in ("user", "item"):
        values = table[name].array
        columns[name] = pa.array(values.categories, pa.string()).take(pa.array(values.codes))
    columns |= {name: table[name].to_numpy() for name in ("timestamp", "rating") if name in table}
    arrays = [
        pa.array(columns[name], kind) if name in columns else pa.nulls(len(table), kind)
        for name, kind in ROWS.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, list(ROWS))


def drop_equal(rows, columns: list[str]):
    """The first row, in the order of files, of those that are equal in all columns."""
    from pyspark.sql import functions as F

    # Numbers are taken from that row, since Spark groups 0.0 and -0.0, which are equal, under the first.
    numbers = [name for name in columns if name in ("timestamp", "rating")]
    first = F.min(F.struct("file", "row", *numbers)).alias("first")
    kept = [f"first.{name}" for name in ("file", "row", *numbers)]
    return rows.groupBy(*columns).agg(first).select("user", "item", *kept)


# ---------------------------------------------------------------- writing


def write_part(batches: Iterator[pa.RecordBatch], names: dict[str, str], work: Path) -> Iterator:
    """In a worker: write the sorted rows of one task -> (its number, number of rows)."""
    from pyspark import TaskContext

    task, rows = TaskContext.get(), 0
    part, attempt = task.partitionId(), task.taskAttemptId()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(work / f".{name}.{part:06}.{attempt}", "wb")) for name in names
        }
        for batch in batches:
            rows += len(batch)
            for name, column in names.items():
                files[name].write(batch[column].to_numpy(zero_copy_only=False).astype(ARRAYS[name]).tobytes())
    for name in names:  # a task may be tried again, or twice at once: each part is whole
        os.replace(work / f".{name}.{part:06}.{attempt}", work / f"{name}.{part:06}")
    yield pa.RecordBatch.from_pydict(
        {"part": pa.array([part], pa.int32()), "rows": pa.array([rows], pa.int64())}
    )


def join_parts(name: str, parts: list[int], work: Path) -> np.ndarray:
    """Put the parts of an array behind each other -> a memory map of work/NAME.npy."""
    files, kind = [work / f"{name}.{part:06}" for part in parts], np.dtype(ARRAYS[name])
    rows = sum(file.stat().st_size for file in files) // kind.itemsize
    header = {"descr": kind.str, "fortran_order": False, "shape": (rows,)}
    with open(work / f"{name}.npy", "wb") as whole:
        np.lib.format.write_array_header_1_0(whole, header)
        for file in files:
            with open(file, "rb") as part:
                shutil.copyfileobj(part, whole, 2**24)
            file.unlink()
    return np.load(work / f"{name}.npy", mmap_mode="r")
