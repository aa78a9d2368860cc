"""What a ranker says of a candidate."""

import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import ModelConfig


class ClickHead(nn.Module):
    """The logit of a positive action, from what the blocks made of the candidate."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.hidden = nn.Linear(cfg.dim, cfg.dim)
        self.logit = nn.Linear(cfg.dim, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, D) -> (B, C)"""
        return self.logit(F.silu(self.hidden(hidden)))[..., 0]


def click_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits and targets (B, C), 1 + the label or 0 where there is no candidate -> the SUM of the binary
    cross entropy over the M candidates, a scalar"""
    shown = targets != 0
    return F.binary_cross_entropy_with_logits(logits[shown], (targets[shown] - 1).float(), reduction="sum")
