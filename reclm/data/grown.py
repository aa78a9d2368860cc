"""A file that has grown since a model was trained: evaluate what the model knows of it."""

from dataclasses import replace

import numpy as np
import pandas as pd

from reclm.data.dataset import Dataset, Vocabulary
from reclm.errors import UserError

BY_ROW = ("timestamps", "ratings", "labels", "splits", "contexts")


def find_ids(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(len(ids),) int64: the place of each id in `known`, as text; -1 where it is missing."""
    return pd.Index(np.asarray(known).astype(str)).get_indexer(np.asarray(ids).astype(str))


def align(dataset: Dataset, items: np.ndarray, known: Vocabulary) -> Dataset:
    """The part of `dataset` on the original ids `items` that a model was built for, numbered as in the model,
    whose vocabulary is `known`. Raises UserError where test rows may have been training rows."""
    if len(known.cold_items) or "random" in dataset.protocol:
        what = "--cold_items" if len(known.cold_items) else "a random split"
        raise UserError(f"{dataset.name} has grown since training, and {what} is drawn anew: train again")
    place = find_ids(items, dataset.items)
    numbers = np.concatenate([[0], place + 1])[dataset.item_ids]
    kept = numbers > 0
    before = np.concatenate([[0], np.cumsum(kept)])  # rows kept among the first n
    first = dataset.offsets[dataset.owner]
    by_row = {name: getattr(dataset, name)[kept] for name in BY_ROW if len(getattr(dataset, name))}
    if len(dataset.history_lengths):
        lengths = before[first + dataset.history_lengths] - before[first]
        by_row["history_lengths"] = lengths[kept]
    titles = {}
    for name in ("titles", "genre_names"):
        if len(getattr(dataset, name)):
            titles[name] = getattr(dataset, name)[find_ids(dataset.items, items)]
    unknown, rows = int((place < 0).sum()), int((~kept).sum())
    note = (
        f"the data have grown since training: {unknown:,} new items are unknown to the model, their {rows:,} "
        f"rows are left out; {dataset.num_users - known.num_users:,} users are new"
    )
    return replace(
        dataset,
        protocol=f"{dataset.protocol}, grown since training",
        notes=[*dataset.notes, note],
        offsets=before[dataset.offsets],
        item_ids=numbers[kept],
        items=np.asarray(items).astype(str),
        features=known.features,
        grown=True,
        **by_row,
        **titles,
    )


def has_grown(dataset: Dataset, items: np.ndarray, num_rows: int | None) -> bool:
    """Does the dataset have all `items` of a model, and more rows than the `num_rows` it was trained with?
    With fewer rows, training rows may have become test rows."""
    return len(dataset.item_ids) > (num_rows or 0) and (find_ids(dataset.items, items) >= 0).all()


def check_same_codes(dataset: Dataset, known: Vocabulary, explicit_users: bool) -> None:
    """Raises UserError where codes of grown data mean something else than in training."""
    ours = dataset.vocabulary
    what = [f"column {name}" for name, size in known.code_sizes.items() if ours.code_sizes.get(name) != size]
    what += ["user table"] * (tuple(known.profile_sizes) != tuple(ours.profile_sizes))
    if what:
        raise UserError(
            f"the {what[0]} of {dataset.name} has other values than in training, unknown to the model: train "
            "again, with --init_from"
        )
    if explicit_users:
        raise UserError("--user_embedding=explicit knows users by number, the data have others: train again")
