"""Sophia with the Gauss-Newton-Bartlett estimate of the curvature."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reclm.draws import Draws

PERIOD = 10  # steps between two estimates of the curvature
SCORES_AT_ONCE = 2**22


class SophiaG(torch.optim.Optimizer):
    """Sophia-G (arXiv 2305.14342, algorithms 2 and 3), with the paper's betas, gamma and k:

        m <- beta1 m + (1 - beta1) g
        h <- beta2 h + (1 - beta2) B g'^2                  every 10 steps
        w <- (1 - lr weight_decay) w - lr clip(m / max(gamma h, eps), 1)

    g' is the gradient of the mean loss over the B targets of the step, with targets drawn from the model's
    own softmax; B g'^2 estimates the diagonal of the Gauss-Newton matrix. It takes a second, ordinary
    backward pass: no second derivatives, which torch's attention kernels do not have."""

    def __init__(self, groups: list[dict], lr: float, betas=(0.96, 0.99), gamma: float = 0.05, eps=1e-12):
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, again: Callable, num_targets: int) -> None:
        """One step with the gradients of the mean loss over `num_targets`, B. Every PERIOD steps,
        `again(relabel=draw_targets)` replaces them by those with drawn targets."""
        weights = [(w, group) for group in self.param_groups for w in group["params"] if w.grad is not None]
        for weight, group in weights:
            state, beta = self.state[weight], group["betas"][0]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["momentum"] = torch.zeros_like(weight)
                state["curvature"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - beta)
        if self.state[weights[0][0]]["step"] % PERIOD == 0:
            with torch.enable_grad():
                again(relabel=draw_targets)
            for weight, group in weights:
                beta = group["betas"][1]
                state = self.state[weight]
                state["curvature"].mul_(beta).addcmul_(
                    weight.grad, weight.grad, value=(1 - beta) * num_targets
                )
        for weight, group in weights:
            state = self.state[weight]
            state["step"] += 1
            scale = (group["gamma"] * state["curvature"]).clamp_(min=group["eps"])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_((state["momentum"] / scale).clamp_(-1, 1), alpha=group["lr"])


@torch.no_grad()
def draw_targets(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with each target replaced by an item drawn from the softmax of --loss=softmax, with the
    dropout masks that the next forward pass has."""
    with torch.random.fork_rng():
        table = model.item_table()
        hidden = model.encode(batch, table=table)  # (B, T, D)
        valid = batch["targets"] != 0  # (B, T)
        hidden, targets = hidden[valid], batch["targets"][valid]  # (M, D), (M,)
        _, excluded = model.negatives(batch, valid, targets)
        drawn, even = torch.empty_like(targets), Draws.of(batch).at(valid).uniform()
        size = max(1, SCORES_AT_ONCE // len(table))
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            scores = hidden[part] @ table.T  # (m, V)
            if excluded is not None:
                scores.scatter_(1, excluded.seen_items[excluded.owner[part]], -torch.inf)
                scores[:, excluded.cold_items] = -torch.inf
            scores[:, 0] = -torch.inf
            shares = scores.double().softmax(1).cumsum(1)
            drawn[part] = torch.searchsorted(shares, even[part] * shares[:, -1:])[:, 0]
    return batch | {"targets": batch["targets"].masked_scatter(valid, drawn)}
