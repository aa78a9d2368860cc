"""What a ranker says of a candidate."""

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
        return self.logit(nn.functional.silu(self.hidden(hidden)))[..., 0]
