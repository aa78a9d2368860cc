"""What the state of each optimizer looks like in a checkpoint, which may come from a stranger."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reclm.run.in_backward import InBackward
from reclm.run.together import Together
from reclm.run.validate import check, is_number, is_plain


def adafactor(shape: tuple) -> dict[str, tuple]:
    if len(shape) < 2:
        return {"step": (), "variance": shape}
    return {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def adamw8bit(shape: tuple) -> dict[str, tuple]:
    """As reclm/run/eight_bit.py writes it."""
    moments = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    size = math.prod(shape)
    if size < 4096 or size % 64:
        return moments
    return moments | {"exp_avg_scale": (size // 64,), "exp_avg_sq_scale": (size // 64,)}


STATES = {  # class of an optimizer: the state {name: shape} of a weight of some shape
    "AdamW": lambda shape: {"step": (), "exp_avg": shape, "exp_avg_sq": shape},
    "AdamW8bit": adamw8bit,
    "Adafactor": adafactor,
    "Muon": lambda shape: {"momentum_buffer": shape},
    "SophiaG": lambda shape: {"step": (), "momentum": shape, "curvature": shape},
    "RowwiseAdagrad": lambda shape: {"row_sum": (shape[0], 1)},
}


def check_optimizer(saved: dict, optimizer: Any, path: Path, shape_of: Callable = torch.Tensor.size) -> dict:
    """The state to load: the saved moments and learning rates; all else follows from the settings. Raises
    UserError unless they fit the optimizer: the same groups of weights, tensors of the right shapes. torch
    checks the former alone, and writes into memory of other shapes. `shape_of` gives the shape of a weight of
    which this process may have a part."""
    now = optimizer.state_dict()["param_groups"]
    ours, theirs = ([len(group["params"]) for group in groups] for groups in (now, groups_of(saved)))
    check(path, ours == theirs, "the optimizer has other groups of weights")
    rates = [group.get("lr") for group in groups_of(saved)]
    check(path, all(is_number(rate) for rate in rates), f"the optimizer has the learning rates {rates!r:.60}")
    state = saved.get("state")
    check(path, isinstance(state, dict), "the optimizer has no state")
    weights = [
        (type(part).__name__, tuple(shape_of(weight)))
        for part in parts_of(optimizer)
        for group in part.param_groups
        for weight in group["params"]
    ]
    for index, values in state.items():
        good = isinstance(index, int) and 0 <= index < len(weights) and isinstance(values, dict)
        check(path, good, f"the optimizer has a state of weight {index!r:.60}")
        kind, shape = weights[index]
        known = kind in STATES  # else it is one that a user added
        shapes = STATES[kind](shape) if known else dict.fromkeys(values, shape)
        check(path, values.keys() == shapes.keys(), f"the optimizer has other values of weight {index}")
        for name, value in values.items():
            good = is_plain(value) and (
                tuple(value.shape) == shapes[name] or (not known and value.numel() == 1)
            )
            good = good and value.dtype == (torch.uint8 if f"{name}_scale" in shapes else torch.float32)
            check(path, good, f"the optimizer has another type or shape of {name!r:.60}")
    groups = [group | {"lr": rate} for group, rate in zip(now, rates, strict=True)]
    return {"state": state, "param_groups": groups}


def parts_of(optimizer: Any) -> list[torch.optim.Optimizer]:
    if isinstance(optimizer, InBackward):
        return [optimizer.optimizer]
    return optimizer.parts if isinstance(optimizer, Together) else [optimizer]


def groups_of(saved: dict) -> list[dict]:
    groups = saved.get("param_groups")
    good = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    return groups if good and all(isinstance(group.get("params"), list) for group in groups) else []
