"""Metrics as pure functions of ranks: sums over users, so that they add up over ranks exactly."""

import torch
from torch import Tensor

CUTOFFS = (1, 5, 10, 20, 50, 200)


def rank_of_target(scores: Tensor, target_ids: Tensor) -> Tensor:
    """scores (B, V) float32, target_ids (B,) -> "realistic" ranks (B,) float64, best is 1.

    1 + items scored better + half of those scored equal. With all scores equal this is the middle of
    the list; `argsort` would report the order of the columns, and top-k membership luck."""
    target = scores.gather(1, target_ids[:, None])  # (B, 1)
    better = (scores > target).sum(1)
    equal = (scores == target).sum(1) - 1  # but for the target itself
    return 1 + better.double() + equal.double() / 2


def ranking_sums(ranks: Tensor) -> dict[str, float]:
    """ranks (B,) -> sums over the users of HR@K, NDCG@K (one relevant item: 1 / log2(1 + rank)), MRR."""
    ranks = ranks.double()
    gain = 1 / torch.log2(1 + ranks)
    sums = {}
    for k in CUTOFFS:
        hit = (ranks <= k).double()
        sums[f"HR@{k}"] = hit.sum().item()
        sums[f"NDCG@{k}"] = (hit * gain).sum().item()
    sums["MRR"] = (1 / ranks).sum().item()
    return sums
