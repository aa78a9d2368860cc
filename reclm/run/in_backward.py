"""Update each weight within the backward pass, as soon as its gradient is complete, and free the gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from reclm.run import dist


class InBackward:
    """An optimizer whose steps are taken by the backward pass: at no time is there a gradient of the whole
    model (LOMO, arXiv 2306.09782, section 3.1). The weights are those that the optimizer gives otherwise,
    bit for bit in one process.

    With `clip_norm`, a step takes two passes, as in section 3.3 of the paper: the first only measures the
    norm of the gradient, the second clips by it and updates. Processes average each gradient by itself, so
    the model must not be wrapped in DDP, which holds all gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float):
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.factor = None if clip_norm else 1.0  # of gradients; None = only measure them
        self.squares = 0.0  # of all gradients of this pass, summed
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.register_post_accumulate_grad_hook(self.take_gradient)

    @torch.no_grad()
    def take_gradient(self, weight: Tensor) -> None:
        """Called by the backward pass for each weight, in the same order in all processes."""
        dist.average_over_processes(weight.grad)
        self.squares += weight.grad.norm().square()
        if self.factor is not None:
            weight.grad.mul_(self.factor)
            self.optimizer.step()  # of this weight alone: no other has a gradient
        weight.grad = None

    def norm(self) -> Tensor:
        """The L2 norm of the gradient of the last pass, before clipping, a scalar."""
        return torch.as_tensor(self.squares).sqrt()

    def step(self, again: Callable) -> None:
        """End a step: with `clip_norm`, the second pass, by `again()`."""
        if self.clip_norm:
            # As torch.nn.utils.clip_grad_norm_ does.
            self.factor = (self.clip_norm / (self.norm() + 1e-6)).clamp(max=1.0)
            again()
            self.factor = None

    def zero_grad(self) -> None:
        self.squares = 0.0

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def state_dict(self) -> dict:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)
