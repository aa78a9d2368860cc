"""What the engines of scripts/prepare.py share: what they are for, and all that follows from sorted rows.

An engine drops equal rows and puts the others in the one order that prepare.py has as well: by user, time,
file and row within the file. No two rows are equal in these, so the order does not depend on how it is found.
Files are read by reclm/data/own.py in every engine: the same columns, the same ids, the same refusals."""

import importlib
from collections.abc import Iterable
from types import ModuleType

import numpy as np
import pandas as pd

from reclm.config import DataConfig
from reclm.data.own import read_side_table
from reclm.data.prepare import add_side_tables, fingerprint_of, note_short_users, settings_of
from reclm.data.readers import RawData
from reclm.data.repeats import describe_targets
from reclm.data.sources import Source, check_size
from reclm.errors import UserError

COLUMNS = {"user", "item", "rating", "timestamp"}  # that the engines know


def need(package: str) -> ModuleType:
    """Import a package of requirements-prepare.txt. Raises UserError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{package} is missing: pip install {package}, in the version of requirements-prepare.txt"
        ) from None


def check_scope(engine: str, source: Source, cfg: DataConfig, task: str) -> None:
    """Raises UserError for data and settings that only --engine=pandas knows."""
    if not source.is_own:
        raise UserError(f"{source.name} is no file of yours: use --engine=pandas for it")
    usual = settings_of(DataConfig(columns=cfg.columns), "matching")
    for name, value in settings_of(cfg, task).items():
        if value != usual[name]:
            raise UserError(f"--{name}={value} is for --engine=pandas, not for {engine}: leave one out")


def check_columns(source: Source, columns: Iterable[str]) -> None:
    """Raises UserError if others than COLUMNS were recognised in the files."""
    if more := sorted(set(columns) - COLUMNS):
        raise UserError(f"{source.files[0]} has the column {more[0]}: use --engine=pandas, which knows it")


def finish(
    source: Source, cfg: DataConfig, arrays: dict[str, np.ndarray], notes: list[list[str]], dropped: int
) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, arrays) as `prepare.make_arrays` has them. `arrays` has those of sorted rows, and users and
    items; `notes` those on the reading and those on the rows; `dropped` equal rows are left out."""
    lengths = np.diff(arrays["offsets"])
    columns = ["user", "item", *["timestamp"] * bool(len(arrays["timestamps"]))]
    protocol, of_size = check_size(source, RawData(pd.DataFrame(columns=columns)))
    of_users = note_short_users(lengths)
    repeats, of_targets = describe_targets(arrays["offsets"], arrays["item_ids"])
    of_rows = [f"{dropped:,} rows equal to an earlier one are dropped; --repeats=keep keeps them"]
    meta = {
        "repeats": repeats,
        "fingerprint": fingerprint_of(arrays["items"], arrays["users"], arrays),
        "notes": notes + of_size + of_rows * bool(dropped) + of_users + of_targets,
        "protocol": protocol,
        "num_rows": int(arrays["offsets"][-1]),
        "task": "matching",
        "settings": settings_of(cfg, "matching"),
    }
    arrays["cold_items"] = np.zeros(0, np.int64)
    sides = {f"{column}s": read_side_table(file, column) for column, file in source.side_files}
    add_side_tables(meta, arrays, RawData(pd.DataFrame(), **sides))
    return meta, arrays
