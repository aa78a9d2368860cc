"""Ranks against brute force, sums against scikit-learn and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from reclm.metrics import CUTOFFS, rank_of_target, ranking_sums


def brute_force_rank(scores, target):
    """The mean of the best and the worst place that the target has among its equals."""
    best = 1 + sum(score > scores[target] for score in scores)
    worst = sum(score >= scores[target] for score in scores)
    return (best + worst) / 2


@pytest.mark.parametrize("levels", [2, 4, 1000])  # few levels: many ties
def test_rank_is_brute_force(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (50, 23)).astype(np.float32)
    targets = rng.integers(0, 23, 50)
    ranks = rank_of_target(torch.from_numpy(scores), torch.from_numpy(targets))
    assert ranks.dtype == torch.float64
    assert ranks.tolist() == [brute_force_rank(row, t) for row, t in zip(scores, targets, strict=True)]


@pytest.mark.parametrize("items", [1, 2, 9, 10])
def test_equal_scores_give_the_middle(items):
    scores = torch.full((items, items), 3.5)
    assert rank_of_target(scores, torch.arange(items)).tolist() == [(1 + items) / 2] * items


def test_excluded_items_are_behind_every_target():
    scores = torch.tensor([[-torch.inf, -5.0, -torch.inf, -6.0]])
    assert rank_of_target(scores, torch.tensor([1])).tolist() == [1]
    assert rank_of_target(scores, torch.tensor([3])).tolist() == [2]


def test_sums_by_hand():
    ranks = torch.tensor([1.0, 3.0, 10.0, 10.5, 60.0, 201.0])
    sums = ranking_sums(ranks)
    assert [sums[f"HR@{k}"] for k in (1, 5, 10, 20, 50, 200)] == [1, 2, 3, 4, 4, 5]
    assert sums["NDCG@1"] == 1
    assert sums["NDCG@5"] == pytest.approx(1 + 1 / 2)
    assert sums["NDCG@10"] == pytest.approx(1 + 1 / 2 + 1 / math.log2(11))
    assert sums["NDCG@20"] == pytest.approx(1 + 1 / 2 + 1 / math.log2(11) + 1 / math.log2(11.5))
    assert sums["MRR"] == pytest.approx(1 + 1 / 3 + 1 / 10 + 1 / 10.5 + 1 / 60 + 1 / 201)


def test_sums_are_scikit_learns():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(40, 300)).astype(np.float32), rng.integers(0, 300, 40)
    scores[np.arange(40), targets] += rng.uniform(0, 4, 40)
    ranks = rank_of_target(torch.from_numpy(scores), torch.from_numpy(targets))
    sums = ranking_sums(ranks)
    relevant = np.eye(300)[targets]
    top = np.argsort(-scores, axis=1)
    for k in CUTOFFS:
        assert sums[f"NDCG@{k}"] / 40 == pytest.approx(ndcg_score(relevant, scores, k=k), rel=1e-9), k
        assert sums[f"HR@{k}"] == (top[:, :k] == targets[:, None]).sum()
    assert 0 < sums["HR@1"] < sums["HR@200"] < 40.5


def test_sums_add_up_over_ranks():
    ranks = torch.rand(30, dtype=torch.float64) * 100 + 1
    parts = [ranking_sums(ranks[r::3]) for r in range(3)]
    for name, total in ranking_sums(ranks).items():
        assert total == pytest.approx(sum(part[name] for part in parts), rel=1e-12)


def test_no_users_give_zero():
    assert set(ranking_sums(torch.zeros(0)).values()) == {0.0}
