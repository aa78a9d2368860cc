"""AdamW with 8-bit moments by torchao. Checkpoints hold its state as plain tensors."""

import logging
import os
import shutil
from contextlib import nullcontext

import torch

from reclm.errors import UserError

# What torchao 0.18 does when it is imported is deprecated in torch 2.13.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
try:
    import torchao.optim
    from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned
except ImportError:
    raise UserError(
        "--optimizer=adamw8bit needs torchao: pip install -r requirements-adapt.txt, or use another optimizer"
    ) from None

BLOCK = 64  # numbers that share a scale; dim is often a multiple of it, and so is the size of each table then
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
QMAPS = {"exp_avg": (get_qmap_signed, True), "exp_avg_sq": (get_qmap_unsigned, False)}  # is it signed?


class AdamW8bit(torchao.optim.AdamW8bit):
    """torchao.optim.AdamW8bit. Weights of fewer than 4,096 numbers, or of a number that BLOCK does not
    divide, keep moments of 32 bits."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]):
        super().__init__(groups, lr=lr, betas=betas, block_size=BLOCK)

    def step(self) -> None:
        # torchao compiles its step. Where there is no compiler of C++, the step of a large table takes fifty
        # times as long and many times the memory.
        with nullcontext() if HAS_COMPILER else torch.compiler.set_stance("force_eager"):
            super().step()

    def state_dict(self) -> dict:
        """Moments of 8 bits as `name` (uint8, of the shape of the weight) and `name_scale` (a float32 per
        BLOCK), learning rates as floats."""
        saved = super().state_dict()
        groups = [group | {"lr": float(group["lr"])} for group in saved["param_groups"]]
        return {"state": {i: flat(values) for i, values in saved["state"].items()}, "param_groups": groups}

    def load_state_dict(self, saved: dict) -> None:
        state = {i: rebuilt(values) for i, values in saved["state"].items()}
        super().load_state_dict(saved | {"state": state})
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"])


def flat(values: dict) -> dict:
    plain = {}
    for name, value in values.items():
        if isinstance(value, OptimState8bit):
            plain |= {name: value.codes, f"{name}_scale": value.scale}
        else:
            plain[name] = value
    return plain


def rebuilt(plain: dict) -> dict:
    values = {name: value for name, value in plain.items() if not name.endswith("_scale")}
    for name, (qmap, signed) in QMAPS.items():
        if f"{name}_scale" in plain:
            levels = torch.tensor(qmap(), dtype=torch.float32)
            codes, scale = plain[name], plain[f"{name}_scale"]
            values[name] = OptimState8bit(codes, scale, levels, signed, dtype=torch.float32)
    return values
