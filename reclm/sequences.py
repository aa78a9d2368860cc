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

from reclm.cold_start import hold_out
from reclm.config import DataConfig
from reclm.datasets import Source, read_dataset
from reclm.errors import UserError
from reclm.features import profile_codes, word_codes
from reclm.impressions import SPLITS, label_impressions, order_impressions

CACHE_VERSION = 3  # part of the cache key: raise it when `prepare` changes what it writes


def prepare(source: Source, cfg: DataConfig, task: str = "matching") -> Path:
    """The folder with the prepared arrays of a source: made now, or found by the key of its inputs."""
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
    table, protocol, notes = raw.interactions, source.protocol, []
    if task == "ctr" or cfg.ctr_split:
        table, protocol, notes = label_impressions(table, cfg)
    meta, arrays = build_sequences(table, cfg, task)
    meta |= {"notes": notes + meta["notes"], "protocol": protocol}
    arrays["profiles"] = profile_codes(raw.users, arrays["users"])
    arrays |= word_codes(raw.items, arrays["items"])
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
    random order of that seed. For --cold_items see reclm/cold_start.py. Raises UserError."""
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
    if task == "ctr":
        order, num_seen = order_impressions(table, user_index)
    else:
        is_action, more = which_actions(table, cfg)
        notes += more
        table, user_index, item_index = table[is_action], user_index[is_action], item_index[is_action]
        order = np.lexsort((*([table["timestamp"]] if "timestamp" in table else []), user_index))
        notes += note_short_users(np.bincount(user_index, minlength=len(users)))

    def column(name: str, dtype=np.float64) -> np.ndarray:
        return table[name].to_numpy(dtype)[order] if name in table else np.zeros(0, dtype)

    users, items = np.asarray(users), np.asarray(items)
    users, items = (x.astype(str) if x.dtype == object else x for x in (users, items))
    arrays = {
        "offsets": np.concatenate([[0], np.cumsum(np.bincount(user_index, minlength=len(users)))]),
        "item_ids": item_index[order].astype(np.int64) + 1,
        "timestamps": column("timestamp"),
        "ratings": column("rating"),
        "users": users,
        "items": items,
        "cold_items": np.zeros(0, np.int64),
    }
    if task == "ctr":
        arrays |= {"labels": column("label", np.int64), "splits": column("split", np.int64)}
        contexts = (
            pd.factorize(table["context"], sort=True)[0] + 1 if "context" in table else np.zeros(0, int)
        )
        arrays |= {"num_seen": num_seen, "contexts": contexts[order] if len(contexts) else contexts}
    if cfg.cold_items:
        arrays, note = hold_out(arrays, cfg.cold_items)
        notes.append(note)
    fingerprint = hashlib.sha256("\n".join(map(str, [*items, *users])).encode())
    for name in ("offsets", "item_ids", "labels", "splits"):
        fingerprint.update(arrays.get(name, np.zeros(0)).tobytes())
    return {"notes": notes, "fingerprint": fingerprint.hexdigest()[:16]}, arrays


def which_actions(table: pd.DataFrame, cfg: DataConfig) -> tuple[np.ndarray, list[str]]:
    """(rows,) bool: what matching learns from. The users and items of the other rows keep their numbers, so
    that they are those of a ranker."""
    is_action, notes = np.ones(len(table), bool), []
    if cfg.ctr_split:
        is_action &= table["split"] == SPLITS["train"]
        notes.append("only what trains of a ranker's impressions, for --init_from")
    if "label" in table and "rating" not in table:
        is_action &= table["label"] == 1
        notes.append("what has the label 0 was shown, but it is no action: left out")
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
