"""Recommendations for all users of the training data, under any number of processes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv, parquet

from reclm.run import dist
from reclm.run.logger import progress_bar
from reclm.serve.catalogue import Catalogue, Filters
from reclm.serve.recommender import AT_ONCE, Recommender

FORMAT = csv.WriteOptions(quoting_style="needed")


def recommend_to_all(recommender: Recommender, k: int, filters: Filters) -> dict[str, np.ndarray]:
    """{"user": indices of users, "item": item numbers, "place": from 1, "score"}, each (n,), of the k best
    items of every user, by user and place, in every process."""
    lengths = np.diff(recommender.histories.offsets)
    order = np.argsort(-lengths, kind="stable")  # so there is little padding
    order = order[: np.count_nonzero(lengths)]
    parts = [order[i : i + AT_ONCE] for i in range(0, len(order), AT_ONCE)]
    # Whole batches are dealt out: the last bits of a score depend on the batch alone, not on the processes.
    mine = parts[dist.data_rank() :: dist.data_world()]
    mine = in_threads(lambda part: best_of_users(recommender, part, k, filters), mine, sum(map(len, parts)))
    rows = [row for part in dist.gather_from_processes(mine) for row in part]
    rows.sort(key=lambda row: row[0])
    counts = np.array([len(items) for _, items, _ in rows], np.int64)
    return {
        "user": np.repeat([user for user, _, _ in rows], counts),
        "item": np.concatenate([items for _, items, _ in rows]),
        "place": np.concatenate([np.arange(1, count + 1) for count in counts]),
        "score": np.concatenate([scores for _, _, scores in rows]),
    }


def in_threads(work: Callable[[np.ndarray], list], parts: list[np.ndarray], total: int) -> list:
    """All that `work` lists for the parts, with a progress bar of the users of all processes, `total`.

    Each thread works on a part of its own: several that share each operation of a part would be half as
    fast. Their number is that of torch, which OMP_NUM_THREADS sets [default: cores]."""
    found, share = [], sum(map(len, parts)) / max(total, 1)
    alone = partial(torch.set_num_threads, 1)
    with (
        ThreadPoolExecutor(torch.get_num_threads(), initializer=alone) as pool,
        progress_bar(total, " users") as bar,
    ):
        for part, rows in zip(parts, pool.map(work, parts), strict=True):
            found += rows
            bar.update(round(len(part) / share))
    return found


def best_of_users(
    recommender: Recommender, users: np.ndarray, k: int, filters: Filters
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """[(user, item numbers, scores)]"""
    people = [recommender.user_at(user) for user in users.tolist()]
    best = recommender.best(people, k, filters)
    return [(user, *row) for user, row in zip(users.tolist(), best, strict=True)]


def as_table(columns: dict[str, np.ndarray], users: np.ndarray, catalogue: Catalogue) -> pa.Table:
    """Columns with the indices "user" (n,) into `users`, the item numbers "item" (n,) and others -> a table
    of ids, with titles if there are any."""
    ids, titles = (np.array(texts, object) for texts in (catalogue.ids, catalogue.titles))
    shown = columns | {"user": users.astype(object)[columns["user"]], "item": ids[columns["item"] - 1]}
    if catalogue.titled:
        shown["title"] = titles[columns["item"] - 1]
    return pa.table(shown)


def write_table(table: pa.Table, path: Path) -> None:
    """Write .parquet or .csv, as the suffix of the path says."""
    if path.suffix.lower() == ".csv":
        csv.write_csv(table, path, FORMAT)
    else:
        parquet.write_table(table, path)
