"""Actions that occur twice: equal rows, and users who come back to an item."""

from itertools import pairwise

import numpy as np
import pandas as pd

from reclm.config import Config, DataConfig
from reclm.data.cache import PART, parts, release
from reclm.data.dataset import Dataset, count_items

# Share of targets on items that the user has used before, from which on the history stays in the ranking.
# Leaving it out makes these targets impossible to find, which costs less than the noise of a seed below 1 %;
# keeping it in where nobody comes back would only ask whether a model can rank the history last.
MANY = 0.01


def drop_equal_rows(table: pd.DataFrame, cfg: DataConfig, is_own: bool) -> tuple[pd.DataFrame, list[str]]:
    """Rows as read -> (those to use, notes). Without --repeats, rows of the user's own file that equal an
    earlier one in all columns are dropped, if one of these is the time: then they are most likely one action,
    written twice."""
    if cfg.repeats or not is_own or "timestamp" not in table:
        return table, []
    equal = equal_to_earlier(table)
    if not equal.any():
        return table, []
    note = f"{equal.sum():,} rows equal to an earlier one are dropped; --repeats=keep keeps them"
    return table[~equal], [note]


def equal_to_earlier(table: pd.DataFrame) -> np.ndarray:
    """(rows,) bool: is the row equal in all columns to one that stands before it?"""
    # By sorting a hash of each row: DataFrame.duplicated takes three times the memory.
    key = np.zeros(len(table), np.uint64)
    for name in table:
        key *= np.uint64(0x9E3779B97F4A7C15)  # odd: no bit is lost; wraps around
        key += pd.util.hash_pandas_object(table[name], index=False).to_numpy()
    order = np.argsort(key, kind="stable")  # equal rows become neighbours, in file order
    key = key[order]
    second = 1 + np.flatnonzero(key[1:] == key[:-1])
    earlier, later = order[second - 1], order[second]
    for name in table:  # different rows may share a hash
        same = np.asarray(table[name].iloc[later].array == table[name].iloc[earlier].array, bool)
        earlier, later = earlier[same], later[same]
    equal = np.zeros(len(table), bool)
    equal[later] = True
    return equal


def one_per_item(table: pd.DataFrame, is_action: np.ndarray, cfg: DataConfig) -> tuple[np.ndarray, list[str]]:
    """((rows,) bool: the rows to use, notes). With --repeats=first or last a user's actions on an item but
    the first or last in time are left out, ties in file order. Rows that are no actions stay."""
    if cfg.repeats not in ("first", "last"):
        return np.ones(len(table), bool), []
    rows = np.flatnonzero(is_action)
    pair = pd.factorize(table["user"])[0][rows]
    item_index, items = pd.factorize(table["item"])
    pair *= len(items)
    pair += item_index[rows]
    times = [table["timestamp"].to_numpy()[rows]] if "timestamp" in table else []
    order = np.lexsort((*times, pair))
    pair = pair[order]
    again = pair[1:] == pair[:-1]
    other, what = (order[1:], "later") if cfg.repeats == "first" else (order[:-1], "earlier")
    used = np.ones(len(table), bool)
    used[rows[other[again]]] = False
    return used, [f"{(~used).sum():,} {what} actions on the same item dropped (--repeats={cfg.repeats})"]


def describe_targets(offsets: np.ndarray, item_ids: np.ndarray) -> tuple[float, list[str]]:
    """Sequences as in Dataset -> (share of targets on items that the user has used before, the larger one of
    validation and test; notes on the test targets)."""
    lengths = np.diff(offsets)
    users = np.flatnonzero(lengths >= 3)
    ends = offsets[users + 1]
    repeated = [0, 0]
    edges = np.searchsorted(offsets, [*range(0, offsets[-1], PART), offsets[-1]])
    for first, last in pairwise(np.unique(edges)):  # the rows of some users at once, to bound memory
        rows = item_ids[offsets[first] : offsets[last]]
        for i, back in enumerate((2, 1)):  # validation and test target, counted from the end of a sequence
            repeated[i] += count_repeated(offsets[first : last + 1] - offsets[first], rows, back)
        release(item_ids)
    held_out, notes = (item_ids[ends - 2], item_ids[ends - 1]), []
    of_item = count_items(item_ids, max((int(part.max()) for part in parts(item_ids)), default=0))
    of_training = of_item - sum(np.bincount(part, minlength=len(of_item)) for part in held_out)
    unknown = (of_training[held_out[1]] == 0).sum()
    if repeated[1]:
        share = repeated[1] / len(users)
        notes.append(
            f"{repeated[1]:,} of {len(users):,} test targets ({share:.1%}) repeat an item of the user's "
            "history: results for new items alone are given as well; --repeats=first drops repeats"
        )
    if unknown:
        notes.append(
            f"{unknown:,} of {len(users):,} test targets are items without a training row: no model can have "
            "learned them"
        )
    return max(repeated) / len(users), notes


def count_repeated(offsets: np.ndarray, item_ids: np.ndarray, back: int) -> int:
    """Sequences as in Dataset -> number of users who had the item of their row `back`, counted from the end,
    before."""
    lengths = np.diff(offsets)
    users = np.flatnonzero(lengths >= 3)
    ends, target = offsets[users + 1], np.zeros(len(lengths), np.int32)
    target[users] = item_ids[ends - back]
    same = item_ids == np.repeat(target, lengths)
    for after in range(1, back + 1):  # the target itself, and what follows
        same[ends - after] = False
    owners = np.searchsorted(offsets, np.flatnonzero(same), side="right") - 1
    return len(np.unique(owners))


def settle_history(cfg: Config, dataset: Dataset) -> None:
    """Decide by the data whether the history is left out of the loss and of the ranking, where neither a flag
    nor another setting has."""
    left_out = dataset.repeats < MANY
    if cfg.loss.exclude_history is None:
        cfg.loss.exclude_history = left_out
    if cfg.eval.filter_seen is None:
        cfg.eval.filter_seen = left_out
