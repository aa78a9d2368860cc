"""Data of --task=ctr: which item was shown to which user, was it liked, and is it for training or test?

An impression is a row of the table of interactions, with a label 0 or 1. Its history is what the user did
before it, as far as that may be known (`order_impressions`)."""

import numpy as np
import pandas as pd

from reclm.config import DataConfig
from reclm.errors import UserError

SPLITS = {"train": 0, "valid": 1, "test": 2, "asked": 3}  # the last: candidates without a label
SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
DAY = 86400


def label_impressions(table: pd.DataFrame, cfg: DataConfig) -> tuple[pd.DataFrame, str, list[str]]:
    """Interactions in file order -> those that count, with the columns `label` (0 or 1), `split` (of SPLITS)
    and `in_history` (bool: may a later impression know of it?); the protocol in words, and notes. Raises
    UserError."""
    table, rules = label_rows(table, cfg)
    how = cfg.ctr_split or ("own" if "split" in table else "time")
    if cfg.utc_offset and how != "time":
        raise UserError(f"--utc_offset has no effect with --ctr_split={how}: leave it out")
    splitter, words = SPLITTERS[how]
    table = table.assign(split=splitter(table, cfg))
    train = table["split"] == SPLITS["train"]
    if how == "time":
        known = table["user"].isin(table["user"][train]) & table["item"].isin(table["item"][train])
        note = f"{(~known).sum():,} held-out impressions of users or items that never train are dropped"
        table, train = table[known], train[known]
    else:
        note = f"--ctr_split={how}: training rows may be later than test rows, so the future leaks"
    check_splits(table, how)
    past = (cfg.ctr_history or ("past" if how == "time" else "train")) == "past"
    of_history = "" if past else ", of what trains,"
    rules += [
        words.format(cfg.utc_offset),
        f"all that its user did before{of_history} is known of an impression",
    ]
    return table.assign(in_history=past | train), "; ".join(["CTR", *rules]), [note]


def label_rows(table: pd.DataFrame, cfg: DataConfig) -> tuple[pd.DataFrame, list[str]]:
    """The rows that count, each with a label, and the rules that they follow."""
    rules = []
    if cfg.drop_rating is not None:
        if "rating" not in table:
            raise UserError("--drop_rating needs ratings, but the data have none: leave it out")
        table = table[table["rating"] != cfg.drop_rating]
        rules.append(f"ratings of {cfg.drop_rating:g} dropped")
    if "label" in table:
        label = table["label"].astype(np.int8)
    elif "rating" in table:
        label = (table["rating"] >= cfg.positive_from).astype(np.int8)
        rules.append(f"ratings of {cfg.positive_from:g} or more are positive")
    else:
        raise UserError("--task=ctr needs ratings or a column label, but the data have neither")
    table = table.assign(label=label)
    if cfg.min_positives:
        table = positive_core(table, cfg.min_positives)
        rules.append(f"users and items with {cfg.min_positives} positives or more")
    if table.empty:
        raise UserError("no interaction is left: use a lower --min_positives or no --drop_rating")
    return table, rules


def check_splits(table: pd.DataFrame, how: str) -> None:
    for name, purpose in {"train": "train on", "valid": "validate with", "test": "test with"}.items():
        labels = table["label"][table["split"] == SPLITS[name]]
        if labels.empty:
            remedy = "; try --ctr_split=random" if how == "time" else ""
            raise UserError(
                f"no impression is left to {purpose} (--ctr_split={how}): too little data{remedy}"
            )
        if name == "train" and labels.nunique() < 2:
            raise UserError(
                f"all {len(labels):,} impressions that train have the label {labels.iloc[0]}: there is "
                "nothing to learn; use another --positive_from"
            )


def positive_core(table: pd.DataFrame, least: int) -> pd.DataFrame:
    """The largest part of the table in which each user and each item has `least` positives or more."""
    size = None
    while size != len(table):
        size = len(table)
        positives = table[table["label"] == 1]
        users, items = (positives[name].value_counts() for name in ("user", "item"))
        enough_of_user = table["user"].map(users).fillna(0) >= least
        enough_of_item = table["item"].map(items).fillna(0) >= least
        table = table[enough_of_user & enough_of_item]
    return table


def split_by_time(table: pd.DataFrame, cfg: DataConfig) -> np.ndarray:
    """Whole days: the first 80 % of the SPAN of time train, the next 10 % validate, the rest tests."""
    if "timestamp" not in table:
        raise UserError("--ctr_split=time needs timestamps, but the data have none: use --ctr_split=random")
    days = (table["timestamp"].to_numpy() + 3600 * cfg.utc_offset) // DAY
    days -= days.min()
    bounds = np.cumsum(list(SHARES.values()))[:-1] * days.max()
    return np.searchsorted(bounds, days, side="left").astype(np.int8)


def split_at_random(table: pd.DataFrame, cfg: DataConfig) -> np.ndarray:
    """8:1:1."""
    order = np.random.default_rng(0).permutation(len(table))
    bounds = np.round(np.cumsum(list(SHARES.values()))[:-1] * len(table))
    return np.searchsorted(bounds, order, side="right").astype(np.int8)


def split_as_given(table: pd.DataFrame, cfg: DataConfig) -> np.ndarray:
    if "split" not in table:
        raise UserError("--ctr_split=own needs a column split of train, valid and test: use another one")
    return table["split"].map(SPLITS).to_numpy(np.int8)


SPLITTERS = {
    "time": (split_by_time, "80/10/10 by the span of time, whole days at UTC{:+g}"),
    "random": (split_at_random, "8:1:1 at random"),
    "own": (split_as_given, "split as given"),
}


def order_impressions(
    table: pd.DataFrame, user_index: np.ndarray, cfg: DataConfig
) -> tuple[np.ndarray, dict, list[str]]:
    """A labelled table in file order and the number of each row's user -> the order of the rows, and for the
    ordered rows labels, splits, contexts and history_lengths: how many rows, from the first of its user on,
    are the history of each; no notes.

    A user's rows: those that can be in a history, oldest first, then the others, by split and time. Ties keep
    file order; without timestamps file order is order in time."""
    times = table["timestamp"].to_numpy() if "timestamp" in table else np.zeros(len(table))
    in_history = table["in_history"].to_numpy()
    by_time = np.lexsort((times, user_index))
    before = np.cumsum(in_history[by_time]) - in_history[by_time]  # rows of a history, over all users
    users = user_index[by_time]
    new_user = np.diff(users, prepend=-1) > 0
    before -= np.maximum.accumulate(np.where(new_user, before, 0))
    history_lengths = np.empty(len(table), np.int64)
    history_lengths[by_time] = before
    place = np.where(in_history, -1, table["split"])
    order = np.lexsort((times, place, user_index))
    arrays = {
        "labels": table["label"].to_numpy(np.int64)[order],
        "splits": table["split"].to_numpy(np.int64)[order],
        "history_lengths": history_lengths[order],
    }
    if "context" in table:
        arrays["contexts"] = pd.factorize(table["context"], sort=True)[0][order] + 1
    return order, arrays, []
