"""What optimizers share that update each weight by itself."""

import torch


class EachWeight(torch.optim.Optimizer):
    """A subclass has `update(weight, group)`, which takes a step of one weight with a gradient."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)
