"""A file of the user that has grown since a model was trained on it: what the model knows of it, and whether
rows that are held out now may have been training rows then."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from reclm.config import Config
from reclm.data.dataset import Dataset, Vocabulary
from reclm.data.impressions import SHARES, SPLITS
from reclm.errors import UserError

BY_ROW = ("timestamps", "ratings", "labels", "splits", "contexts")
TEXTS = ("titles", "genre_names")
NAMES = {
    "actions": "column rating",
    "contexts": "column context",
}  # of codes; others have that of their column


@dataclass(frozen=True)
class Trained:
    """The data of a training as its checkpoint describes them; None where it is older than that entry."""

    items: np.ndarray  # (V - 1,) original ids
    vocabulary: Vocabulary
    protocol: str
    num_rows: int | None  # Dataset.num_rows
    user_keys: np.ndarray | None  # (U,) Dataset.user_keys
    user_rows: np.ndarray | None  # (U,) rows per user
    last_time: float | None  # Dataset.last_time


def places(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(len(ids),) int64: where each id stands in `among`, compared as text; -1 where it does not."""
    return pd.Index(np.asarray(among).astype(str)).get_indexer(np.asarray(ids).astype(str))


def align(dataset: Dataset, then: Trained, cfg: Config) -> Dataset:
    """The part of a grown dataset that a model knows, numbered as in its training. Left out, with a note, are
    rows of new items, rows of users whose held-out rows it may have been trained on, and with
    --user_embedding=explicit new users. Raises UserError where a split is drawn anew, and where nothing is
    left to evaluate."""
    check_splits(dataset, then, cfg)
    explicit = cfg.model.user_embedding == "explicit"
    place = places(then.items, dataset.items)
    numbers = np.zeros(dataset.num_items + 1, np.int64)
    numbers[1 + place] = 1 + np.arange(len(then.items))
    numbers = numbers[dataset.item_ids]  # (rows,), 0 = a new item
    known = numbers > 0
    lengths = np.bincount(dataset.owner[known], minlength=dataset.num_users)
    doubtful = may_have_trained(dataset, then, lengths)
    lengths[doubtful] = 0
    users = places(then.user_keys, dataset.user_keys) if explicit else np.arange(dataset.num_users)
    order = np.full(dataset.num_users, -1)
    order[users] = np.arange(len(users))
    rows = np.flatnonzero(known & (lengths > 0)[dataset.owner] & (order >= 0)[dataset.owner])
    rows = rows[np.argsort(order[dataset.owner[rows]], kind="stable")]
    arrays = {name: getattr(dataset, name)[rows] for name in BY_ROW if len(getattr(dataset, name))}
    arrays |= {name: getattr(dataset, name)[place] for name in TEXTS if len(getattr(dataset, name))}
    if len(dataset.history_lengths):
        before, first = np.concatenate([[0], np.cumsum(known)]), dataset.offsets[dataset.owner[rows]]
        arrays["history_lengths"] = before[first + dataset.history_lengths[rows]] - before[first]
    aligned = replace(
        dataset,
        protocol=f"{dataset.protocol}, grown since training",
        notes=[describe_growth(dataset, then, (~known).sum(), doubtful.sum(), explicit), *dataset.notes],
        grown=True,
        users=dataset.users[users],
        profiles=dataset.profiles[users],
        offsets=np.concatenate([[0], np.cumsum(lengths[users])]),
        items=dataset.items[place],
        item_ids=numbers[rows],
        features=then.vocabulary.features,
        words={},
        **arrays,
    )
    check_not_empty(aligned)
    return aligned


def describe_growth(dataset: Dataset, then: Trained, unknown: int, doubtful: int, explicit: bool) -> str:
    """The note on what is new and what is left out: `unknown` rows, `doubtful` users."""
    new_users = max(0, dataset.num_users - then.vocabulary.num_users)
    if then.user_keys is not None:
        new_users = (places(dataset.user_keys, then.user_keys) < 0).sum()
    new = f"{new_users:,} users and {dataset.num_items - len(then.items):,} items"
    if then.num_rows is not None:
        new = f"{dataset.num_rows - then.num_rows:,} rows, {new}"
    out = [f"the {unknown:,} rows of new items, which the model does not know"] * bool(unknown)
    if explicit and new_users:
        out.append("the new users, for whom --user_embedding=explicit has no vectors")
    if doubtful:
        out.append(f"{doubtful:,} users, since their held-out rows may have been training rows")
    note = f"the data have grown since training, by {new}; left out: {'; '.join(out) or 'nothing'}"
    if then.user_rows is None:
        note += (
            "; this checkpoint cannot tell whether rows are gone: if so, test rows may have been trained on"
        )
    return note


def why_other_data(dataset: Dataset, then: Trained, explicit: bool) -> str:
    """Why the data cannot be those of the training with rows added; "" if they can. `explicit`: does the
    model know its users by number?"""
    gone = (places(then.items, dataset.items) < 0).sum()
    if gone:
        return f"{gone:,} of the {len(then.items):,} items of the checkpoint are missing"
    if then.num_rows is not None and dataset.num_rows <= then.num_rows:
        return f"{dataset.num_rows:,} rows, in training {then.num_rows:,}"
    if dataset.protocol != then.protocol:
        return f"protocol {dataset.protocol!r}, in training {then.protocol!r}"
    if explicit and then.user_keys is None:
        return "this checkpoint does not tell whose vectors those of --user_embedding=explicit are"
    if explicit and (gone := (places(then.user_keys, dataset.user_keys) < 0).sum()):
        return f"{gone:,} of the {len(then.user_keys):,} users of the checkpoint are missing"
    return ""


def check_splits(dataset: Dataset, then: Trained, cfg: Config) -> None:
    """Raises UserError where rows held out of grown data may have been training rows, as the split is another
    one than in training."""
    data = cfg.data
    drawn = {
        "ctr_split": data.ctr_split == "random",
        "cold_items": data.cold_items,
        "shuffle_ties": data.shuffle_ties,
    }
    for name in filter(drawn.get, drawn):
        raise UserError(
            f"{dataset.name} has grown since training, so --{name}={getattr(data, name)} draws anew: "
            "rows that are held out now may have been training rows; train again"
        )
    if (
        (len(dataset.splits) or data.ctr_split)
        and then.last_time is not None
        and (dataset.last_time or 0) < then.last_time
    ):
        raise UserError(
            f"the training part of {dataset.name} ends earlier than in training, since older rows were added "
            "or later ones removed: some rows that are held out now were training rows; train again"
        )


def may_have_trained(dataset: Dataset, then: Trained, lengths: np.ndarray) -> np.ndarray:
    """(U,) bool: users whose held-out rows a model may have been trained on, by their `lengths` (U,) now.

    All but the last two rows of a user are training rows, so rows that are added leave them in training, but
    for one case: users of two rows train on both. Where rows are gone, nothing is certain."""
    if then.user_rows is None or len(dataset.splits):
        return np.zeros(dataset.num_users, bool)
    place = places(then.user_keys, dataset.user_keys)
    before = np.zeros(dataset.num_users, np.int64)
    before[place[place >= 0]] = then.user_rows[place >= 0]
    return (lengths >= 3) & ((lengths < before) | ((lengths == 3) & (before == 2)))


def check_not_empty(dataset: Dataset) -> None:
    parts = {"user of three rows": dataset.ranked_users}
    if len(dataset.splits):
        parts = {f"impression to {name}": np.flatnonzero(dataset.splits == SPLITS[name]) for name in SHARES}
    for what, rows in parts.items():
        if not len(rows):
            raise UserError(f"of what the model knows of {dataset.name}, no {what} is left: train again")


def other_codes(ours: Vocabulary, theirs: Vocabulary) -> list[str]:
    """Names of the codes (of Vocabulary.meanings) that stand for other values in one than in the other; of a
    checkpoint without meanings, those whose number differs."""
    if theirs.meanings:
        names = sorted(ours.meanings.keys() | theirs.meanings.keys())
        return [name for name in names if ours.meanings.get(name) != theirs.meanings.get(name)]
    names = sorted(ours.code_sizes.keys() | theirs.code_sizes.keys())
    sizes = [name for name in names if ours.code_sizes.get(name) != theirs.code_sizes.get(name)]
    return sizes + ["user table"] * (tuple(ours.profile_sizes) != tuple(theirs.profile_sizes))


def check_same_codes(dataset: Dataset, then: Vocabulary) -> None:
    """Raises UserError where codes of grown data stand for other values than in training."""
    if names := other_codes(dataset.vocabulary, then):
        what = " and ".join(NAMES.get(name, name) for name in names)
        raise UserError(
            f"{dataset.name} has grown since training, and its {what} has values that the model does not "
            "know, or lacks some: train on with --init_from"
        )
