"""Read a file of interactions once. Started by scripts/bench/readers.py, for peers in their own environment.

Each function imports what it needs and returns a function that reads: path -> (rows, users, items), once the
table is in memory with users and items numbered from 0. Only that function is timed."""

import io
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

Read = Callable[[Path], tuple[int, int, int]]
COLUMNS = ["userId", "movieId", "rating", "timestamp"]


def with_tabs(path: Path) -> io.BytesIO:
    """The content of ratings.dat for libraries whose separators have one character."""
    return io.BytesIO(path.read_bytes().replace(b"::", b"\t"))


def pandas_table(path: Path):
    import pandas as pd

    if path.suffix == ".dat":
        return pd.read_csv(with_tabs(path), sep="\t", names=COLUMNS)
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


def ours() -> Read:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the spine
    from reclm.data.prepare import number_ids
    from reclm.data.sources import find_dataset, read_dataset

    def read(path: Path) -> tuple[int, int, int]:
        table, names = number_ids(read_dataset(find_dataset(str(path), path.parent)).interactions)
        return len(table), len(names["user"]), len(names["item"])

    return read


def preparation() -> Read:
    """Ours, from the file to the arrays on disk, or if they are there already until they are checked."""
    ours()
    from reclm.config import DataConfig
    from reclm.data.cache import read_cache
    from reclm.data.prepare import prepare
    from reclm.data.sources import find_dataset

    def read(path: Path) -> tuple[int, int, int]:
        folder, _ = prepare(find_dataset(str(path), path.parent), DataConfig(dataset=str(path)))
        _, arrays = read_cache(folder)
        return len(arrays["item_ids"]), len(arrays["users"]), len(arrays["items"])

    return read


def pandas() -> Read:
    import pandas as pd
    import pyarrow.parquet  # noqa: F401  else imported by the first read_parquet

    def read(path: Path) -> tuple[int, int, int]:
        table, sizes = pandas_table(path), []
        for name in COLUMNS[:2]:
            table[name], ids = pd.factorize(table[name])
            sizes.append(len(ids))
        return len(table), *sizes

    return read


def rectools() -> Read:
    import pandas as pd
    import pyarrow.parquet  # noqa: F401
    from rectools import Columns
    from rectools.dataset import Dataset

    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]

    def read(path: Path) -> tuple[int, int, int]:
        table = pandas_table(path).rename(columns=dict(zip(COLUMNS, names, strict=True)))
        table[Columns.Datetime] = pd.to_datetime(table[Columns.Datetime], unit="s")
        dataset = Dataset.construct(table)
        return len(dataset.interactions.df), dataset.user_id_map.size, dataset.item_id_map.size

    return read


def replay() -> Read:
    """With polars, the fastest of the table types that RePlay takes."""
    import polars as pl
    from replay.preprocessing import LabelEncoder, LabelEncodingRule

    def table(path: Path) -> pl.DataFrame:
        if path.suffix == ".dat":
            return pl.read_csv(with_tabs(path), separator="\t", has_header=False, new_columns=COLUMNS)
        return pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)

    def read(path: Path) -> tuple[int, int, int]:
        encoder = LabelEncoder([LabelEncodingRule(name) for name in COLUMNS[:2]])
        encoded = encoder.fit_transform(table(path))
        return len(encoded), *(len(encoder.mapping[name]) for name in COLUMNS[:2])

    return read


TOOLS = {tool.__name__: tool for tool in (ours, preparation, pandas, rectools, replay)}


def memory(name: str) -> float:
    """GiB of this process: resident now ("VmRSS") or at most so far ("VmHWM"). Linux only."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


if __name__ == "__main__":
    tool, path, result = sys.argv[1:]
    read = TOOLS[tool]()
    imported, begin, used = memory("VmRSS"), time.perf_counter(), time.process_time()
    size = read(Path(path))
    found = {
        "size": size,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - used,
        "memory_gib": memory("VmHWM") - imported,
    }
    Path(result).write_text(json.dumps(found))
