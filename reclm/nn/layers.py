"""Small layers used by the model and its inputs."""

import math

import torch
from torch import Tensor, nn

from reclm.draws import Draws

NORM_EPS = 1e-6  # of all norms, as in LLaMA2
LEVELS = 2**16  # distinct random numbers that Dropout compares with p
TIME_BUCKETS = (64, 0.3)  # of log_buckets: the last one starts at e ** (63 * 0.3) seconds, five years
PLACE_BUCKETS = (100, 0.1)  # the last one starts at e ** 9.9 actions, about 20,000


class ZeroLinear(nn.Linear):
    """nn.Linear whose weight starts at 0; SequenceRecommender.init_weights initialises by type."""


class ZeroEmbedding(nn.Embedding):
    """nn.Embedding whose vectors start at 0."""


class ZeroEmbeddingBag(nn.EmbeddingBag):
    """nn.EmbeddingBag whose vectors start at 0."""


class ResidualLinear(nn.Linear):
    """nn.Linear that writes into the residual stream: the more blocks, the smaller its initial weights."""


# An item table: (V, D), or a module that stands for one, with `forward` to look up rows and `scores` of all
# items (`rows` and `score_items` in losses.py): PQEmbedding, or QuantizedTable of reclm/adapt/quantize.py.
Table = Tensor | nn.Module


class ItemEmbedding(nn.Embedding):
    """The vectors of the items. PQEmbedding and modules of reclm/adapt can stand in its place."""

    def table(self) -> Table:
        return self.weight

    def local(self, ids: Tensor) -> Tensor:
        """Item ids (...) -> rows of `weight`"""
        return ids


class Dropout(nn.Dropout):
    """nn.Dropout (arXiv 1207.0580) whose masks do not depend on how sequences are shared among processes.
    Each 64 bits that are drawn serve four elements, so p is rounded to a multiple of 1 / 65,536."""

    def forward(self, x: Tensor, draws: Draws | None) -> Tensor:
        """(M, ...) -> (M, ...): in training each element is 0 with probability p, else scaled by
        1 / (1 - p). `draws` are those of the M rows; None in evaluation."""
        threshold = round(self.p * LEVELS)
        if not self.training or threshold == 0:
            return x
        number = math.prod(x.shape[1:])
        levels = draws.bits(-(-number // 4)).view(torch.int16)[:, :number].reshape(x.shape)
        kept = levels >= threshold - LEVELS // 2
        return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - threshold))


def log_buckets(values: Tensor, buckets: tuple[int, float] = TIME_BUCKETS) -> Tensor:
    """Values (...) -> bucket numbers (...) int32, from 0. `buckets` is their number and their width on the
    scale of ln(1 + value), so small values get finer buckets (as HSTU's for time, arXiv 2402.17152). Negative
    values count as 0."""
    count, width = buckets
    return values.float().clamp(min=0).log1p().div(width).clamp(max=count - 1).int()


class PositionEmbedding(nn.Module):
    """A trained vector per number of earlier actions (in log-scale buckets), added to the item embedding.

    Rotary positions only express distances within the last max_len actions. This counts from the start of
    the WHOLE history, wherever it is cut, so it tells a user's first session from the hundredth."""

    def __init__(self, dim: int):
        super().__init__()
        self.embedding = ZeroEmbedding(PLACE_BUCKETS[0], dim)

    def forward(self, before: Tensor) -> Tensor:
        """`before` (B, S), the number of the user's actions before each token -> (B, S, D)"""
        return self.embedding(log_buckets(before, PLACE_BUCKETS))


class TimeEmbedding(nn.Module):
    """A trained vector per time since the previous action (in log-scale buckets of seconds), and with
    `request_time` one per time until the action to predict, added to the item embedding."""

    def __init__(self, dim: int, request_time: bool):
        super().__init__()
        self.since_last_embedding = ZeroEmbedding(TIME_BUCKETS[0], dim)
        self.until_next_embedding = ZeroEmbedding(TIME_BUCKETS[0], dim) if request_time else None

    def forward(self, row: dict[str, Tensor]) -> Tensor:
        """`since_last`, and with `request_time` `until_next`, (B, S) in seconds -> (B, S, D)"""
        x = self.since_last_embedding(log_buckets(row["since_last"]))
        if self.until_next_embedding is not None:
            x = x + self.until_next_embedding(log_buckets(row["until_next"]))
        return x
