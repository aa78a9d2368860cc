"""Small layers that the model and its inputs are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of all norms, as in LLaMA2
LEVELS = 2**16  # of Dropout's random numbers
TIME_BUCKETS = (64, 0.3)  # of log_buckets: the last one starts at e ** (63 * 0.3) seconds, some five years
PLACE_BUCKETS = (100, 0.1)  # the last one starts at e ** 9.9, some 20,000 actions


class ZeroLinear(nn.Linear):
    """Its weights start at 0 (model.init_weights): it has no effect at first."""


class ZeroEmbedding(nn.Embedding):
    """Its vectors start at 0."""


class ZeroEmbeddingBag(nn.EmbeddingBag):
    """Its vectors start at 0."""


class ResidualLinear(nn.Linear):
    """Writes into the residual stream: its initial weights are smaller the more blocks there are."""


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


def log_buckets(values: Tensor, buckets: tuple[int, float] = TIME_BUCKETS) -> Tensor:
    """Values (...) -> bucket numbers (...) int32, finer the smaller the value: buckets of a width in the
    natural logarithm of 1 + value (as HSTU's of time, arXiv 2402.17152). Negative values count as 0."""
    count, width = buckets
    return values.float().clamp(min=0).log1p().div(width).clamp(max=count - 1).int()


class PositionEmbedding(nn.Module):
    """A learned vector for the number of actions before this one, on a logarithmic scale: added to the item
    embedding. Rotary positions are distances within the last max_len actions; this tells a user's first
    session from the hundredth, and counts from the beginning of the WHOLE history, wherever it is cut."""

    def __init__(self, dim: int):
        super().__init__()
        self.embedding = ZeroEmbedding(PLACE_BUCKETS[0], dim)

    def forward(self, before: Tensor) -> Tensor:
        """Number of the user's actions before each token (B, S) -> (B, S, D)"""
        return self.embedding(log_buckets(before, PLACE_BUCKETS))


class TimeEmbedding(nn.Module):
    """A learned vector for the time since the action before, and with `request_time` one for the time until
    the next action, the one to predict: added to the item embedding of each action."""

    def __init__(self, dim: int, request_time: bool):
        super().__init__()
        self.since_last_embedding = ZeroEmbedding(TIME_BUCKETS[0], dim)
        self.until_next_embedding = ZeroEmbedding(TIME_BUCKETS[0], dim) if request_time else None

    def forward(self, row: dict[str, Tensor]) -> Tensor:
        """since_last, and with `request_time` until_next, (B, T) in seconds -> (B, T, D)"""
        x = self.since_last_embedding(log_buckets(row["since_last"]))
        if self.until_next_embedding is not None:
            x = x + self.until_next_embedding(log_buckets(row["until_next"]))
        return x
