"""--engine=polars: rows are sorted on all cores of one machine, in less memory than pandas takes."""

from pathlib import Path

import numpy as np

from reclm.config import DataConfig
from reclm.data.columns import Wishes, doubts, find_doubtful
from reclm.data.prepare import number_ids
from reclm.data.sources import Source, read_dataset
from reclm.engines.finish import check_columns, check_scope, finish, need


def make_arrays(source: Source, cfg: DataConfig, task: str, work: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """See `prepare.make_arrays`; `work` is not used. Raises UserError."""
    pl = need("polars")
    check_scope("polars", source, cfg, task)
    raw = read_dataset(source, Wishes(cfg.columns))
    check_columns(source, raw.interactions)
    notes = raw.notes + doubts(raw.interactions, find_doubtful(raw.interactions))
    table, names = number_ids(raw.interactions)
    columns = list(table)
    rows = pl.DataFrame({name: table[name].to_numpy() for name in columns}).with_row_index("row")
    del raw, table
    same = [name for name in ("user", "timestamp") if name in columns]
    rows, count = rows.sort([*same, "row"]), len(rows)
    if "timestamp" in columns:
        rows = drop_equal(pl, rows, same, columns)

    def floats(name: str) -> np.ndarray:
        return rows[name].to_numpy() if name in columns else np.zeros(0)

    lengths = np.bincount(rows["user"].to_numpy(), minlength=len(names["user"]))
    arrays = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "item_ids": rows["item"].to_numpy().astype(np.int64) + 1,
        "timestamps": floats("timestamp"),
        "ratings": floats("rating"),
        "users": names["user"],
        "items": names["item"],
    }
    return finish(source, cfg, arrays, notes, count - len(rows))


def drop_equal(pl, rows, same: list[str], columns: list[str]):
    """Sorted rows without those that equal an earlier one in all `columns`. Equal rows agree in `same`, by
    which they are sorted, so only rows that agree in these with a neighbour are looked at."""
    as_before = pl.all_horizontal(pl.col(name) == pl.col(name).shift() for name in same).fill_null(False)
    tied = rows.filter(as_before | as_before.shift(-1).fill_null(False))
    again = tied.filter(~pl.struct(columns).is_first_distinct())["row"]
    return rows.filter(~pl.col("row").is_in(again.implode())) if len(again) else rows
