"""Raw tables -> the arrays of a data set, made once and kept in a cache."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from reclm.config import DataConfig
from reclm.data.features import item_texts, profile_codes, word_codes
from reclm.data.impressions import SPLITS, label_impressions, order_impressions
from reclm.data.sources import Source, read_dataset
from reclm.errors import UserError, choose

CACHE_VERSION = 4  # part of the cache key: raise it when `prepare` changes what it writes


def prepare(source: Source, cfg: DataConfig, task: str = "matching") -> Path:
    """The folder with the prepared arrays of a source: made now, or found by the key of its inputs. Raises
    UserError."""
    select, _ = choose("task", task, PREPARE)
    places = {"dataset": None, "data_dir": None}  # where the files lie is not what is in them
    settings = (CACHE_VERSION, source.reader, task, replace(cfg, **places))
    key = hashlib.sha256(repr(settings).encode())
    for path in source.files:
        with open(path, "rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    root = Path(os.environ.get("RECLM_CACHE") or Path.home() / ".cache" / "reclm")
    folder = root / f"{source.name}-{key.hexdigest()[:16]}"
    if folder.exists():
        return folder
    raw = read_dataset(source)
    table, protocol, notes = select(raw.interactions, cfg)
    meta, arrays = build_sequences(table, cfg, task)
    meta |= {"notes": notes + meta["notes"], "protocol": protocol or source.protocol, "task": task}
    arrays["profiles"] = profile_codes(raw.users, arrays["users"])
    arrays |= word_codes(raw.items, arrays["items"]) | item_texts(raw.items, arrays["items"])
    root.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed: a killed run leaves nothing that looks whole.
    work = Path(tempfile.mkdtemp(dir=root, prefix=".preparing-"))
    try:
        for name, array in arrays.items():
            np.save(work / f"{name}.npy", array)
        (work / "meta.json").write_text(json.dumps(meta))
        try:
            work.rename(folder)
        except OSError:  # another run was faster: its folder is the same
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def build_sequences(
    table: pd.DataFrame, cfg: DataConfig | None = None, task: str = "matching"
) -> tuple[dict, dict]:
    """Tidy interactions (user, item[, rating][, timestamp]) in file order, or impressions as
    `label_impressions` makes them -> notes and arrays.

    Rows are sorted by (user, time) with a STABLE sort, so ties keep file order, or with --shuffle_ties the
    random order of that seed. Raises UserError."""
    cfg, notes = cfg or DataConfig(), []
    if cfg.min_item_count > 1:
        counts = table["item"].map(table["item"].value_counts())
        dropped = table["item"][counts < cfg.min_item_count].nunique()
        table = table[counts >= cfg.min_item_count]
        notes.append(f"{dropped:,} items with fewer than {cfg.min_item_count} interactions dropped")
    if cfg.shuffle_ties:
        if "timestamp" not in table:
            raise UserError("--shuffle_ties needs timestamps, but these data have none: leave it out")
        table = table.iloc[np.random.default_rng(cfg.shuffle_ties).permutation(len(table))]
        notes.append(f"ties in time are in a random order (--shuffle_ties={cfg.shuffle_ties})")
    user_index, users = pd.factorize(table["user"], sort=True)
    item_index, items = pd.factorize(table["item"], sort=True)
    _, put_in_order = PREPARE[task]
    order, of_task, more = put_in_order(table, user_index, cfg)
    table, user_index, item_index = table.iloc[order], user_index[order], item_index[order]

    def column(name: str, dtype: type = np.float64) -> np.ndarray:
        return table[name].to_numpy(dtype) if name in table else np.zeros(0, dtype)

    users, items = np.asarray(users), np.asarray(items)
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
    if cfg.cold_items:
        arrays, note = hold_out(arrays, cfg.cold_items)
        more = [*more, note]
    fingerprint = hashlib.sha256("\n".join(map(str, [*items, *users])).encode())
    for name in ("offsets", "item_ids", "labels", "splits"):
        fingerprint.update(arrays.get(name, np.zeros(0)).tobytes())
    return {"notes": notes + more, "fingerprint": fingerprint.hexdigest()[:16]}, arrays


def select_actions(table: pd.DataFrame, cfg: DataConfig) -> tuple[pd.DataFrame, str, list[str]]:
    """All interactions; with --ctr_split as impressions, so that `which_actions` knows those that train."""
    return label_impressions(table, cfg) if cfg.ctr_split else (table, "", [])


def order_actions(
    table: pd.DataFrame, user_index: np.ndarray, cfg: DataConfig
) -> tuple[np.ndarray, dict, list[str]]:
    """The rows that matching learns from, by user and time; no further arrays; notes."""
    is_action, notes = which_actions(table, cfg)
    kept = np.flatnonzero(is_action)
    times = [table["timestamp"].to_numpy()[kept]] if "timestamp" in table else []
    order = kept[np.lexsort((*times, user_index[kept]))]
    lengths = np.bincount(user_index[kept], minlength=user_index.max(initial=-1) + 1)
    return order, {}, notes + note_short_users(lengths)


def which_actions(table: pd.DataFrame, cfg: DataConfig) -> tuple[np.ndarray, list[str]]:
    """(rows,) bool: what matching learns from. The users and items of the other rows keep their numbers, so
    that they are the same as with --task=ctr."""
    is_action, notes = np.ones(len(table), bool), []
    if cfg.ctr_split:
        is_action &= table["split"] == SPLITS["train"]
        notes.append("only the training part of the impressions of --task=ctr, for --init_from")
    if "label" in table and "rating" not in table:
        is_action &= table["label"] == 1
        notes.append("rows with the label 0 were shown but are no actions: left out")
    return is_action, notes


def note_short_users(lengths: np.ndarray) -> list[str]:
    short = int((lengths < 3).sum())
    if short == len(lengths):
        raise UserError(
            "no user has 3 interactions or more (one each to train, validate and test): "
            "too little data, or --min_item_count is too high"
        )
    if short:
        return [f"{short:,} users with fewer than 3 interactions train but are not evaluated"]
    return []


def hold_out(arrays: dict[str, np.ndarray], share: float) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of `build_sequences` -> the same without a random `share` of the items, and a note.

    What is left of a user: all actions with other items up to the last action with one of these, and that
    one, which is the test target. So training and validation never see them, and every user's test target is
    one. Users without such an action, or with fewer than two before it, are left out. Raises UserError."""
    num_items = len(arrays["items"])
    count = round(share * num_items)
    cold_items = np.sort(np.random.default_rng(0).choice(num_items, count, replace=False)) + 1
    offsets, item_ids = arrays["offsets"], arrays["item_ids"]
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    cold = np.isin(item_ids, cold_items)
    last = np.full(len(offsets) - 1, -1)
    np.maximum.at(last, owner[cold], np.flatnonzero(cold))  # row of each user's last action with one
    row = np.arange(len(item_ids))
    kept = (~cold & (row < last[owner])) | (row == last[owner])
    lengths = np.bincount(owner[kept], minlength=len(last))
    users = lengths >= 3
    if not users.any():
        raise UserError(
            f"--cold_items={share} holds out {count:,} items, and no user has one of them after two others: "
            "too little data, or too small a share"
        )
    kept &= users[owner]
    by_row = {name: arrays[name][kept] for name in ("item_ids", "timestamps", "ratings") if len(arrays[name])}
    note = (
        f"cold start (--cold_items={share}): {count:,} items are kept out of training; the test item is each "
        f"user's last one of them, ranked among all ({(~users).sum():,} users without one are left out)"
    )
    return arrays | by_row | {
        "offsets": np.concatenate([[0], np.cumsum(lengths[users])]),
        "users": arrays["users"][users],
        "cold_items": cold_items,
    }, note  # fmt: skip


# For each task: interactions -> those that count, a protocol of its own or "", and notes; and the number of
# each row's user -> the order of the rows, further arrays, and notes.
PREPARE = {
    "matching": (select_actions, order_actions),
    "ctr": (label_impressions, order_impressions),
}
