"""Raw tables -> the arrays of a dataset, built once and cached."""

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from reclm.config import DataConfig
from reclm.data.cache import cache_root, parts, read_cache, write_cache
from reclm.data.columns import IDS, Wishes, doubts, find_doubtful
from reclm.data.dataset import hash_ids
from reclm.data.features import as_texts, item_texts, meaning, profile_codes, word_codes
from reclm.data.impressions import SPLITS, label_impressions, order_impressions
from reclm.data.readers import RawData
from reclm.data.repeats import describe_targets, drop_equal_rows, one_per_item
from reclm.data.sources import Source, check_size, read_dataset
from reclm.errors import UserError, choose

CACHE_VERSION = 8  # part of the cache key: raise it when `prepare` changes what it writes


def prepare(source: Source, cfg: DataConfig, task: str = "matching") -> tuple[Path, list[str]]:
    """The folder with the prepared arrays of `source` (reclm/data/cache.py), built on first use or if it was
    damaged, and notes. Its key covers the content of the files, the reader, the task and the data settings.
    Raises UserError if the data cannot be read or used."""
    choose("task", task, PREPARE)
    if source.reader == "prepared":
        return check_prepared(source.files[0].parent, cfg, task), []
    places = {"dataset": None, "data_dir": None}  # the location of the files does not affect the result
    settings = (CACHE_VERSION, source.reader, task, replace(cfg, **places))
    key = hashlib.sha256(repr(settings).encode())
    for path in (*source.files, *(file for _, file in source.side_files)):
        with open(path, "rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    root, notes = cache_root()
    folder = root / f"{source.name}-{key.hexdigest()[:16]}"
    if read_cache(folder) is not None:
        return folder, notes
    if folder.exists():
        notes.append(f"the prepared data in {folder} were damaged and have been made again")
        shutil.rmtree(folder, ignore_errors=True)
    write_cache(folder, *make_arrays(source, cfg, task))
    return folder, notes


def settings_of(cfg: DataConfig, task: str) -> dict:
    """All settings that prepared data depend on."""
    return {"task": task} | {k: v for k, v in asdict(cfg).items() if k not in ("dataset", "data_dir")}


def check_prepared(folder: Path, cfg: DataConfig, task: str) -> Path:
    """The folder of scripts/prepare.py. Raises UserError if it is damaged or made with other settings."""
    found, again = read_cache(folder), "prepare the data again (scripts/prepare.py)"
    if found is None:
        raise UserError(f"{folder} was changed, or not written to its end: {again}")
    theirs = found[0].get("settings", {})
    for name, ours in settings_of(cfg, task).items():
        if ours != theirs.get(name) and (ours or name != "columns"):
            other = f"was prepared with --{name}={theirs.get(name)}, this run has --{name}={ours}"
            raise UserError(f"{folder} {other}: use the same, or {again}")
    return folder


def make_arrays(source: Source, cfg: DataConfig, task: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, arrays) of Dataset from the files of `source`. Raises UserError if they cannot be used."""
    for name in ("columns", "drop_bad_rows", "positive_label"):
        if getattr(cfg, name) and not source.is_own:
            raise UserError(
                f"--{name} is for files of your own, it has no effect on {source.name}: leave it out"
            )
    select, _ = PREPARE[task]
    raw = read_dataset(source, Wishes(cfg.columns, cfg.positive_label, cfg.drop_bad_rows))
    of_source, of_size = check_size(source, raw)
    numbered, names = number_ids(raw.interactions)
    table, of_rows = drop_equal_rows(numbered, cfg, source.is_own)
    num_rows = len(table)
    table, protocol, of_table = select(table, cfg)
    meta, arrays = build_sequences(table, cfg, task, names)
    of_values = doubts(raw.interactions, find_doubtful(raw.interactions))
    notes_of_data = raw.notes + of_values + of_size + of_rows + of_table + meta["notes"]
    meta |= {"notes": notes_of_data, "protocol": protocol or of_source, "num_rows": num_rows}
    add_side_tables(meta, arrays, raw)
    if "contexts" in arrays:
        meta["meanings"]["contexts"] = meaning(table["context"])
        meta["values"]["contexts"] = as_texts(np.unique(table["context"]))
    return meta | {"task": task, "settings": settings_of(cfg, task)}, arrays


def add_side_tables(meta: dict, arrays: dict[str, np.ndarray], raw: RawData) -> None:
    """Add what the user and item tables say, by the users and items in `arrays`."""
    arrays["profiles"], meta["meanings"], meta["values"] = profile_codes(raw.users, arrays["users"])
    arrays |= word_codes(raw.items, arrays["items"]) | item_texts(raw.items, arrays["items"])


def number_ids(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """(the table with users and items as numbers, {"user" | "item": the sorted ids that they stand for}):
    all that follows is faster and smaller with numbers."""
    names, numbers = {}, {}
    for column in IDS:
        values = table[column]
        if isinstance(values.dtype, pd.CategoricalDtype):  # all used and sorted, see columns.to_ids
            numbers[column], names[column] = values.cat.codes, np.asarray(values.cat.categories).astype(str)
        else:
            numbers[column], names[column] = pd.factorize(values, sort=True)
            names[column] = np.asarray(names[column])
    return table.assign(**numbers), names


def build_sequences(
    table: pd.DataFrame,
    cfg: DataConfig | None = None,
    task: str = "matching",
    names: dict[str, np.ndarray] | None = None,
) -> tuple[dict, dict]:
    """Interactions (user, item[, rating][, timestamp]) in file order, or the table of `label_impressions`
    -> ({"notes", "fingerprint", "repeats"}, {name: array of Dataset}). `names` are those of `number_ids`.

    Rows are sorted by (user, time), impressions as `order_impressions` describes. The sort is STABLE: ties
    keep file order, or with --shuffle_ties the random order of that seed. Raises UserError if a
    setting needs a missing column or, for matching, no user has 3 rows."""
    cfg, notes = cfg or DataConfig(), []
    if cfg.min_item_count > 1:
        counts = table["item"].map(table["item"].value_counts())
        dropped = table["item"][counts < cfg.min_item_count].nunique()
        table = table[counts >= cfg.min_item_count]
        notes.append(f"{dropped:,} items with fewer than {cfg.min_item_count} interactions dropped")
    if cfg.shuffle_ties:
        if "timestamp" not in table:
            raise UserError("--shuffle_ties needs timestamps, but the data have none: leave it out")
        table = table.iloc[np.random.default_rng(cfg.shuffle_ties).permutation(len(table))]
        notes.append(f"ties in time are in random order (--shuffle_ties={cfg.shuffle_ties})")
    user_index, users = pd.factorize(table["user"], sort=True)
    item_index, items = pd.factorize(table["item"], sort=True)
    _, put_in_order = PREPARE[task]
    order, of_task, more = put_in_order(table, user_index, cfg)
    user_index, item_index = user_index[order], item_index[order]

    def column(name: str) -> np.ndarray:  # not table.iloc[order]: one column at a time takes less memory
        return table[name].to_numpy(np.float64)[order] if name in table else np.zeros(0)

    users, items = np.asarray(users), np.asarray(items)
    if names:
        users, items = names["user"][users], names["item"][items]
    users, items = (x.astype(str) if x.dtype == object else x for x in (users, items))
    arrays = {
        "offsets": np.concatenate([[0], np.cumsum(np.bincount(user_index, minlength=len(users)))]),
        "item_ids": item_index.astype(np.int64) + 1,
        "timestamps": column("timestamp"),
        "ratings": column("rating"),
        "users": users,
        "items": items,
        "cold_items": np.zeros(0, np.int64),
    }
    arrays |= of_task
    repeats, of_targets = 0.0, []
    if cfg.cold_items:
        arrays, note = hold_out(arrays, cfg.cold_items)
        of_targets = [note]
    elif "splits" not in arrays:  # impressions have a split instead of targets
        repeats, of_targets = describe_targets(arrays["offsets"], arrays["item_ids"])
    meta = {"notes": notes + more + of_targets, "repeats": repeats}
    return meta | {"fingerprint": fingerprint_of(items, users, arrays)}, arrays


def fingerprint_of(items: np.ndarray, users: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    """Hash of original ids and sequences, 16 hex digits."""
    digest = hash_ids((items, users))
    for name in ("offsets", "item_ids", "labels", "splits"):
        for part in parts(arrays.get(name, np.zeros(0))):
            digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def select_actions(table: pd.DataFrame, cfg: DataConfig) -> tuple[pd.DataFrame, str, list[str]]:
    """(interactions that --repeats keeps, "", notes), or with --ctr_split `label_impressions`, whose splits
    `which_actions` needs."""
    if cfg.ctr_split:
        return label_impressions(table, cfg)
    used, notes = one_per_item(table, which_actions(table, cfg)[0], cfg)
    return (table if used.all() else table[used]), "", notes


def order_actions(
    table: pd.DataFrame, user_index: np.ndarray, cfg: DataConfig
) -> tuple[np.ndarray, dict, list[str]]:
    """(order of the actions to use, by user and time; {}; notes). Raises UserError if no user has 3."""
    is_action, notes = which_actions(table, cfg)
    kept = np.flatnonzero(is_action)
    times = [table["timestamp"].to_numpy()[kept]] if "timestamp" in table else []
    order = kept[np.lexsort((*times, user_index[kept]))]
    lengths = np.bincount(user_index[kept], minlength=user_index.max(initial=-1) + 1)
    return order, {}, notes + note_short_users(lengths)


def which_actions(table: pd.DataFrame, cfg: DataConfig) -> tuple[np.ndarray, list[str]]:
    """((rows,) bool: True for rows that are actions of matching, notes). Users and items of the other rows
    keep their numbers, so that the numbers agree with --task=ctr."""
    is_action, notes = np.ones(len(table), bool), []
    if cfg.ctr_split:
        is_action &= table["split"] == SPLITS["train"]
        notes.append("only training impressions of --task=ctr are used (--ctr_split), for --init_from")
    if "label" in table and "rating" not in table:
        is_action &= table["label"] == 1
        notes.append("rows with label 0 are dropped: shown, but not acted on")
    return is_action, notes


def note_short_users(lengths: np.ndarray) -> list[str]:
    """A note on users (lengths (U,)) too short to evaluate. Raises UserError if all are."""
    short = int((lengths < 3).sum())
    if short == len(lengths):
        raise UserError(
            "no user has 3 or more interactions (one each to train, validate and test): "
            "use more data, a lower --min_item_count or --repeats=keep"
        )
    if short:
        return [f"{short:,} users with fewer than 3 interactions train but are not evaluated"]
    return []


def hold_out(arrays: dict[str, np.ndarray], share: float) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of `build_sequences` and the share of items to hold out -> (arrays for cold start, a note).

    The cold items are drawn at random with a fixed seed. Each user's sequence ends with the last action on a
    cold item, the test target; earlier actions on cold items are removed. So training and validation never
    contain one. Users without such a target, or with fewer than two actions before it, are dropped. Raises
    UserError if no user remains."""
    num_items = len(arrays["items"])
    count = round(share * num_items)
    cold_items = np.sort(np.random.default_rng(0).choice(num_items, count, replace=False)) + 1
    offsets, item_ids = arrays["offsets"], arrays["item_ids"]
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    cold = np.isin(item_ids, cold_items)
    last = np.full(len(offsets) - 1, -1)
    np.maximum.at(last, owner[cold], np.flatnonzero(cold))  # row of each user's last cold item, or -1
    row = np.arange(len(item_ids))
    kept = (~cold & (row < last[owner])) | (row == last[owner])
    lengths = np.bincount(owner[kept], minlength=len(last))
    users = lengths >= 3
    if not users.any():
        raise UserError(
            f"--cold_items={share} holds out {count:,} items, but no user has one of them after two others: "
            "use more data or a larger share"
        )
    kept &= users[owner]
    by_row = {name: arrays[name][kept] for name in ("item_ids", "timestamps", "ratings") if len(arrays[name])}
    note = (
        f"cold start (--cold_items={share}): {count:,} items are kept out of training; each user's test item "
        f"is their last one of these, ranked among all ({(~users).sum():,} users without one are dropped)"
    )
    return arrays | by_row | {
        "offsets": np.concatenate([[0], np.cumsum(lengths[users])]),
        "users": arrays["users"][users],
        "cold_items": cold_items,
    }, note  # fmt: skip


# By task: select(interactions, cfg) -> (rows to use, protocol or "" for that of the source, notes), and
# order(rows, user index of each, cfg) -> (order of the rows, further arrays of Dataset, notes).
PREPARE = {
    "matching": (select_actions, order_actions),
    "ctr": (label_impressions, order_impressions),
}
