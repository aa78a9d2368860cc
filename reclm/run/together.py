"""Several optimizers, each for some of the weights, used as one."""

from itertools import accumulate

import torch


class Together:
    """A run and a checkpoint see one optimizer: its groups and weights are those of the first part, then
    those of the second, and so on."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """{"state", "param_groups"} as of one torch.optim.Optimizer: weights are numbered over all parts."""
        state, groups = {}, []
        for part, first in zip(self.parts, self.first_weights(), strict=True):
            saved = part.state_dict()
            state |= {first + index: values for index, values in saved["state"].items()}
            groups += [
                group | {"params": [first + index for index in group["params"]]}
                for group in saved["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict) -> None:
        groups = iter(saved["param_groups"])
        for part, first in zip(self.parts, self.first_weights(), strict=True):
            last = first + num_weights(part)
            part.load_state_dict(
                {
                    "state": {i - first: v for i, v in saved["state"].items() if first <= i < last},
                    "param_groups": [
                        group | {"params": [index - first for index in group["params"]]}
                        for _, group in zip(part.param_groups, groups, strict=False)
                    ],
                }
            )

    def first_weights(self) -> list[int]:
        """The number of the first weight of each part."""
        return [0, *accumulate(num_weights(part) for part in self.parts[:-1])]


def num_weights(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
