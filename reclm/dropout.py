"""Dropout whose random numbers do not cost more than the block they protect."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16


class Dropout(nn.Dropout):
    """nn.Dropout (arXiv 1207.0580), faster on a CPU, where torch draws the mask one element at a time on
    one core: here each 64-bit draw serves four elements. p is rounded to 1 / 65,536."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...): each element 0 with probability p, else times 1 / (1 - p)."""
        threshold = round(self.p * LEVELS)
        if not self.training or threshold == 0:
            return x
        if x.device.type != "cpu":  # fused there, with random numbers from all cores
            return F.dropout(x, self.p)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -LEVELS/2 .. LEVELS/2 - 1
        kept = draws >= threshold - LEVELS // 2
        return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - threshold))
