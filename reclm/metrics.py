"""Metrics as pure functions: of ranks, as sums over users, which add up over processes exactly; and of the
scores and labels of all impressions, gathered from all processes."""

import torch
import torch.nn.functional as F
from torch import Tensor

CUTOFFS = (1, 5, 10, 20, 50, 200)
# The first of these that a result has chooses the epoch; 1: the more the better, -1: the less.
CHOOSE_BY = {"NDCG@10": 1, "AUC": 1, "logloss": -1}


def choosing_metric(metrics: dict[str, float], prefix: str = "") -> tuple[str, float]:
    """The name of the metric that an epoch is chosen by, and its value, greater is better."""
    name = next(name for name in CHOOSE_BY if prefix + name in metrics)
    return name, CHOOSE_BY[name] * metrics[prefix + name]


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


def area_under_curve(scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scores, labels and groups (N,), groups counted from 0 -> for each group (G,) float64 the AUC of its
    rows, the share of pairs (positive, negative) in which the positive has the higher score, a pair of equals
    counting half, NaN where it has one class only; and how many positives and negatives it has."""
    places = torch.unique(scores, return_inverse=True)[1]  # equal scores: equal places
    order = places.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, then by score
    groups, places, labels = groups[order], places[order], labels[order].double()
    size = int(groups.max()) + 1
    positives = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, labels)
    negatives = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, 1 - labels)
    # Rows of a group with the same score are a tie; of each, how many negatives lie below it in its group?
    new = (groups.diff(prepend=groups[:1] - 1) != 0) | (places.diff(prepend=places[:1] - 1) != 0)
    tie = new.cumsum(0) - 1
    in_tie = torch.zeros(int(tie[-1]) + 1, dtype=torch.float64).index_add_(0, tie, 1 - labels)
    before_group = negatives.cumsum(0) - negatives
    below = (in_tie.cumsum(0) - in_tie)[tie] - before_group[groups]
    wins = torch.zeros(size, dtype=torch.float64)
    wins.index_add_(0, groups, labels * (below + in_tie[tie] / 2))
    return wins / (positives * negatives), positives, negatives


def ctr_metrics(logits: Tensor, labels: Tensor, users: Tensor) -> dict[str, float]:
    """logits (N,) of a positive action, labels (N,) 0 or 1, users (N,) -> means over all impressions.

    AUC; logloss in nats; normalised entropy NE, the logloss over that of predicting the share of positives
    (He et al., ADKDD 2014, eq. 1); GAUC, the AUC among each user's impressions, weighted by their number
    (DIN, arXiv 1706.06978, eq. 7), over the users with both classes. What is not defined is left out."""
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
