"""Metrics as pure functions: of ranks, as sums over users that add up over processes; and of the logits and
labels of all impressions, gathered from all processes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CUTOFFS = (1, 5, 10, 20, 50, 200)
# The first of these in a result selects the best epoch. 1: greater is better; -1: smaller is better.
CHOOSE_BY = {"NDCG@10": 1, "AUC": 1, "logloss": -1}


def choosing_metric(metrics: dict[str, float], prefix: str = "") -> tuple[str, float]:
    """(name, score) of the metric that selects the best epoch; its sign is set so that greater is better."""
    name = next(name for name in CHOOSE_BY if prefix + name in metrics)
    return name, CHOOSE_BY[name] * metrics[prefix + name]


def rank_of_target(scores: Tensor, target_ids: Tensor, total: Callable = lambda x: x) -> Tensor:
    """scores (B, V) float32, target_ids (B,) -> float64 ranks (B,), best is 1: 1 + the number of items with a
    higher score + half the number of others with an equal score.

    A tie thus gets its expected ("realistic") rank, e.g. the middle of the list if all scores are equal.
    Sorting would break ties by column, and a model with constant scores look good or bad by luck.

    Where other processes have the scores of other items, a target that is theirs is -1 here, and
    `total` sums a tensor over all."""
    here = (target_ids >= 0)[:, None]
    target = scores.gather(1, target_ids[:, None].clamp(min=0))  # (B, 1)
    target = total(torch.where(here, target, 0.0))
    better, equal = total(torch.stack([(scores > target).sum(1), (scores == target).sum(1)]))
    return 1 + better.double() + (equal.double() - 1) / 2  # without the target itself


def ranking_sums(ranks: Tensor) -> dict[str, float]:
    """ranks (B,) -> sums over users, in float64, of HR@K (rank <= K), NDCG@K (1 / log2(1 + rank) if rank <=
    K, as there is one relevant item) and MRR (1 / rank)."""
    ranks = ranks.double()
    gain = 1 / torch.log2(1 + ranks)
    sums = {}
    for k in CUTOFFS:
        hit = (ranks <= k).double()
        sums[f"HR@{k}"] = hit.sum().item()
        sums[f"NDCG@{k}"] = (hit * gain).sum().item()
    sums["MRR"] = (1 / ranks).sum().item()
    return sums


def area_under_curve(scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scores, labels, groups (N,), from 0 -> AUC, positives and negatives per group, float64 (G,) each.

    The AUC is the share of pairs (positive, negative) of a group in which the positive has the higher score;
    equal scores count half. It is NaN for a group with one class only."""
    places = torch.unique(scores, return_inverse=True)[1]  # equal scores get equal places
    order = places.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, then by score
    groups, places, labels = groups[order], places[order], labels[order].double()
    size = int(groups.max()) + 1
    positives = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, labels)
    negatives = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, 1 - labels)
    # A tie is the rows of one group with equal scores. Count the negatives below each tie in its group.
    new = (groups.diff(prepend=groups[:1] - 1) != 0) | (places.diff(prepend=places[:1] - 1) != 0)
    tie = new.cumsum(0) - 1
    in_tie = torch.zeros(int(tie[-1]) + 1, dtype=torch.float64).index_add_(0, tie, 1 - labels)
    before_group = negatives.cumsum(0) - negatives
    below = (in_tie.cumsum(0) - in_tie)[tie] - before_group[groups]
    wins = torch.zeros(size, dtype=torch.float64)
    wins.index_add_(0, groups, labels * (below + in_tie[tie] / 2))
    return wins / (positives * negatives), positives, negatives


def ctr_metrics(logits: Tensor, labels: Tensor, users: Tensor) -> dict[str, float]:
    """logits (N,) of a positive action, labels (N,) 0 or 1, users (N,) -> metrics over all impressions.

    logloss: mean, in nats. NE: normalised entropy, the logloss divided by that of always predicting the share
    of positives (He et al., ADKDD 2014, eq. 1). AUC. GAUC: mean AUC of the users with both classes, weighted
    by their impressions (DIN, arXiv 1706.06978, eq. 7). Without both classes AUC, NE, GAUC are left out."""
    logits, labels = logits.double(), labels.double()
    rate = labels.mean()
    metrics = {
        "logloss": F.binary_cross_entropy_with_logits(logits, labels).item(),
        "positives": rate.item(),
        "impressions": len(labels),
    }
    if 0 < rate < 1:
        metrics["AUC"] = area_under_curve(logits, labels, torch.zeros_like(users))[0].item()
        metrics["NE"] = metrics["logloss"] / -(rate * rate.log() + (1 - rate) * (1 - rate).log()).item()
    groups = users.unique(return_inverse=True)[1]
    areas, positives, negatives = area_under_curve(logits, labels, groups)
    weights = (positives + negatives) * areas.isfinite()
    if weights.any():
        metrics["GAUC"] = ((weights * areas.nan_to_num()).sum() / weights.sum()).item()
        metrics["GAUC_users"] = int(areas.isfinite().sum())
    return metrics
