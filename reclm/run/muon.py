"""Muon (kellerjordan.github.io/posts/muon) in float32.

torch's rounds to bfloat16, which turns differences in the last bit of a gradient, as other numbers of
processes give, into differences in the third digit of an update: losses would agree to five digits only."""

import math

import torch
from torch import Tensor

from reclm.run.each_weight import EachWeight

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic polynomial of a step
STEPS = 5


class Muon(EachWeight):
    """For matrices w (n, m) with gradient g; the update is momentum with all its singular values near 1:

        b <- momentum b + (1 - momentum) g
        w <- (1 - lr weight_decay) w - lr 0.2 sqrt(max(n, m)) orthogonal((1 - momentum) g + momentum b)

    The factor gives an update the size of AdamW's (arXiv 2502.16982, eq. 4), so that both have one rate."""

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    def update(self, weight: Tensor, group: dict) -> None:
        state, momentum = self.state[weight], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        update = orthogonal_of(weight.grad.lerp(state["momentum_buffer"], momentum))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(weight.shape)))


def orthogonal_of(update: Tensor) -> Tensor:
    """`orthogonal`, also of a DTensor (reclm/run/parallel.py), of which each process gathers the whole."""
    if not hasattr(update, "full_tensor"):
        return orthogonal(update)
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * update.device_mesh.ndim
    whole = DTensor.from_local(
        orthogonal(update.full_tensor()), update.device_mesh, everywhere, run_check=False
    )
    return whole.redistribute(placements=update.placements)


def orthogonal(x: Tensor) -> Tensor:
    """(n, m) -> the same singular vectors, with singular values of 0.7 to 1.2, by the iteration of Newton and
    Schulz. Values far below the norm stay smaller: 0 stays 0."""
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
