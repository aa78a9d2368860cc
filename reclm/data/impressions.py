"""Data of --task=ctr: labelled impressions, their split, and the history that each of them may use.

An impression is one row of the table of interactions: a user, an item and a label, 0 or 1. Its history is a
prefix of the user's actions, chosen by --ctr_history and --ctr_delay (`count_history`)."""

import numpy as np
import pandas as pd

from reclm.config import DataConfig
from reclm.errors import UserError

SPLITS = {"train": 0, "valid": 1, "test": 2}
SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
DAY = 86400


def label_impressions(table: pd.DataFrame, cfg: DataConfig) -> tuple[pd.DataFrame, str, list[str]]:
    """Interactions in file order -> (table, protocol, notes). The table holds the rows that count, with three
    more columns: `label` (0 or 1), `split` (a value of SPLITS) and `in_history` (bool: may a later impression
    have this row in its history?). Raises UserError where a split would be empty or has a single label."""
    table, rules = label_rows(table, cfg)
    how = cfg.ctr_split or ("own" if "split" in table else "time")
    if cfg.utc_offset and how != "time":
        raise UserError(f"--utc_offset has no effect with --ctr_split={how}: leave it out")
    splitter, words = SPLITTERS[how]
    table = table.assign(split=splitter(table, cfg))
    train = table["split"] == SPLITS["train"]
    if how == "time":
        known = table["user"].isin(table["user"][train]) & table["item"].isin(table["item"][train])
        left = int((~known).sum())
        note = f"{left:,} held-out impressions of users or items without training rows are dropped"
        notes = [note] * bool(left)
        table, train = table[known], train[known]
    else:
        notes = [f"--ctr_split={how}: training rows may be later than test rows, so the future leaks"]
    check_splits(table, how)
    past = (cfg.ctr_history or ("past" if how == "time" else "train")) == "past"
    actions = "actions" if past else "training actions"
    delay = describe_delay(history_delay(table, cfg))
    rules += [words.format(cfg.utc_offset), f"history: the user's {actions} {delay}"]
    return table.assign(in_history=past | train), "; ".join(["CTR", *rules]), notes


def history_delay(table: pd.DataFrame, cfg: DataConfig) -> float:
    """Seconds between an impression and the latest action that its history may hold; 0 also admits earlier
    rows of the same second. Raises UserError for a delay without timestamps."""
    timed = "timestamp" in table
    if cfg.ctr_delay and not timed:
        raise UserError("--ctr_delay needs timestamps, but the data have none: leave it out")
    return float(timed) if cfg.ctr_delay is None else cfg.ctr_delay


def describe_delay(seconds: float) -> str:
    return f"at least {seconds:g} s before it" if seconds else "before it, in file order within a second"


def label_rows(table: pd.DataFrame, cfg: DataConfig) -> tuple[pd.DataFrame, list[str]]:
    """(rows that count, each with a label; the rules they follow, in words)."""
    rules = []
    if cfg.drop_rating is not None:
        if "rating" not in table:
            raise UserError("--drop_rating needs ratings, but the data have none: leave it out")
        table = table[table["rating"] != cfg.drop_rating]
        rules.append(f"ratings of {cfg.drop_rating:g} dropped")
    if "label" in table:
        if cfg.positive_from != DataConfig.positive_from:
            raise UserError(
                f"--positive_from={cfg.positive_from:g} has no effect on a column label: leave it out"
            )
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
                f"all {len(labels):,} training impressions have the label {labels.iloc[0]}: there is "
                "nothing to learn; use another --positive_from"
            )


def positive_core(table: pd.DataFrame, least: int) -> pd.DataFrame:
    """The largest subset of rows in which each user and each item has at least `least` positives."""
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
    """(rows,) SPLITS by whole days: the first 80 % of the SPAN of time train, the next 10 % validate, the
    rest test (the protocol of ReChorus, arXiv 2405.18058)."""
    if "timestamp" not in table:
        raise UserError("--ctr_split=time needs timestamps, but the data have none: use --ctr_split=random")
    days = (table["timestamp"].to_numpy() + 3600 * cfg.utc_offset) // DAY
    days -= days.min()
    bounds = np.cumsum(list(SHARES.values()))[:-1] * days.max()
    return np.searchsorted(bounds, days, side="left").astype(np.int8)


def split_at_random(table: pd.DataFrame, cfg: DataConfig) -> np.ndarray:
    """(rows,) SPLITS, 8:1:1, always the same draw."""
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
    """A labelled table in file order and the index of each row's user -> (order of the rows, arrays, notes).
    The arrays, for the ordered rows: labels, splits, contexts, and history_lengths, the number of the user's
    first rows that form the history of each.

    Per user: rows that can be in a history, oldest first, then the others, by split and time. Ties keep file
    order; without timestamps the file order counts as the order in time."""
    times = table["timestamp"].to_numpy() if "timestamp" in table else np.zeros(len(table))
    in_history = table["in_history"].to_numpy()
    history_lengths = count_history(times, user_index, in_history, history_delay(table, cfg))
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


def count_history(
    times: np.ndarray, user_index: np.ndarray, in_history: np.ndarray, delay: float
) -> np.ndarray:
    """(rows,): for each row, how many `in_history` rows of its user lie at least `delay` seconds before it;
    with a delay of 0 those of the same second that stand earlier in the file count as well.

    Actions and queries (each row at its time minus the delay) are merged by one sort, then counted."""
    rows = np.arange(len(times))
    after_actions = np.full(len(rows), 2 * len(rows))
    ties = np.concatenate([2 * rows + 1, after_actions if delay else 2 * rows])
    merged = np.lexsort((ties, np.concatenate([times, times - delay]), np.tile(user_index, 2)))
    counts = np.cumsum(np.concatenate([in_history, np.zeros(len(rows), bool)])[merged])
    is_query = merged >= len(rows)
    history_lengths = np.empty(len(rows), np.int64)
    history_lengths[merged[is_query] - len(rows)] = counts[is_query]
    of_earlier_users = np.cumsum(np.bincount(user_index, in_history)) - np.bincount(user_index, in_history)
    return history_lengths - of_earlier_users.astype(np.int64)[user_index]
