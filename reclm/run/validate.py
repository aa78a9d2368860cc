"""A checkpoint may come from a stranger: every part is checked by type, range and shape before it is used."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reclm.errors import UserError
from reclm.flags import parse_settings

TYPES = {  # of the entries of a checkpoint
    "version": int, "model": dict, "trained": dict, "averaged": dict, "base": dict, "optimizer": dict,
    "progress": dict, "history": list,
    "config": dict, "dataset": str, "protocol": str, "fingerprint": str, "ids": str, "num_rows": int,
    "user_keys": Tensor, "user_rows": Tensor, "last_time": float,
    "vocabulary": dict, "items": (list, Tensor), "titles": list, "genre_names": list,
    "item_counts": Tensor, "values": dict,
}  # fmt: skip
PROGRESS = {  # of Progress: type and least value
    "epoch": (int, 0), "step": (int, 0), "loss_sum": (float, -math.inf), "num_targets": (int, 0),
    "seconds": (float, 0), "best_score": (float, -math.inf), "best_epoch": (int, -1), "bad_epochs": (int, 0),
}  # fmt: skip


def check_state(state: dict, path: Path) -> None:
    """Check what load_checkpoint returns, except for shapes, which depend on the model. Raises UserError."""
    for name, value in state.items():
        check(path, name in TYPES, f"it has an unknown entry {name!r:.60}")
        check(path, isinstance(value, TYPES[name]), f"{name} is of type {type(value).__name__}")
        check(path, not isinstance(value, Tensor) or is_plain(value), f"{name} is a sparse tensor")
    check_lengths(state, path)
    for name in {"model", "trained", "averaged"} & state.keys():
        for key, weight in state[name].items():
            good = isinstance(key, str) and is_plain(weight)
            check(path, good, f"{name}[{key!r:.60}] is of type {type(weight).__name__}")
    if "base" in state:
        check_base(state["base"], path)
    for name, value in state["progress"].items():
        check(path, name in PROGRESS, f"progress has an unknown entry {name!r:.60}")
        wanted, least = PROGRESS[name]
        good = is_number(value) and (wanted is float or isinstance(value, int)) and value >= least
        check(path, good, f"progress has {name}={value!r:.60}")
    for i, row in enumerate(state["history"]):
        good = isinstance(row, dict) and all(isinstance(k, str) and is_number(v) for k, v in row.items())
        good = good and isinstance(row.get("epoch"), int) and "loss" in row
        check(path, good, f"row {i} of history is no epoch")
    try:
        parse_settings(state["config"])
    except UserError as error:
        check(path, False, f"config: {error}")


def check_base(base: dict, path: Path) -> None:
    """Check the entries of init_from.Base. Raises UserError."""
    good = base.keys() == {"name", "weights", "fresh", "new_items"} and is_plain(base["new_items"])
    good = good and base["new_items"].dim() == 1 and base["new_items"].dtype == torch.int64
    good = good and isinstance(base["fresh"], list) and isinstance(base["weights"], str)
    good = good and all(isinstance(text, str) for text in [base["name"], *base["fresh"]])
    check(path, good, "base is no base")


def check_lengths(state: dict, path: Path) -> None:
    """Check that ids and item features have one row per item or user. Raises UserError."""
    if "vocabulary" not in state:
        return
    known, items = state["vocabulary"], state.get("items", [])
    good = items.dim() == 1 if isinstance(items, Tensor) else all(isinstance(item, str) for item in items)
    check(path, good and len(items) == known.get("num_items"), "items and vocabulary disagree")
    for name in {"user_keys", "user_rows"} & state.keys():
        good = state[name].shape == (known.get("num_users"),) and not state[name].is_floating_point()
        check(path, good, f"{name} and vocabulary disagree")
    for name in {"titles", "genre_names", "item_counts"} & state.keys():
        rows = state[name]
        good = rows.dim() == 1 if isinstance(rows, Tensor) else all(isinstance(text, str) for text in rows)
        check(path, good and len(rows) in (0, len(items)), f"{name} and items disagree")
    for name, texts in state.get("values", {}).items():
        good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        check(path, good, f"the values of {name!r:.60} are no texts")
    features = known.get("features")
    good = is_plain(known.get("cold_items"))
    good = good and isinstance(features, dict) and all(is_plain(rows) for rows in features.values())
    good = good and all(rows.dim() == 2 and len(rows) == len(items) for rows in features.values())
    check(path, good, "item features and vocabulary disagree")


def is_plain(value: Any) -> bool:
    """Is this a tensor that is not sparse?"""
    return isinstance(value, Tensor) and value.layout == torch.strided


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def check(path: Path, good: bool, what: str) -> None:
    if not good:
        raise UserError(f"{path} is damaged or foreign: {what}; use another --ckpt_name or --resume")
