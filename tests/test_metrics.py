"""Ranks against brute force, sums against scikit-learn and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from reclm.metrics import (
    CUTOFFS,
    area_under_curve,
    choosing_metric,
    ctr_metrics,
    rank_of_target,
    ranking_sums,
)


def brute_force_rank(scores, target):
    """The mean of the best and the worst rank of the target among equal scores."""
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


def test_sums_add_up_over_processes():
    ranks = torch.rand(30, dtype=torch.float64) * 100 + 1
    parts = [ranking_sums(ranks[index::3]) for index in range(3)]
    for name, total in ranking_sums(ranks).items():
        assert total == pytest.approx(sum(part[name] for part in parts), rel=1e-12)


def test_no_users_give_zero():
    assert set(ranking_sums(torch.zeros(0)).values()) == {0.0}


# ---------------------------------------------------------------- impressions


def shown(levels, size=400, seed=0):
    """Logits of few or many values, labels that follow them a little, and users: some of one class only."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-levels, levels, size) * 3 / levels
    labels = (rng.random(size) < 1 / (1 + np.exp(-logits))).astype(int)
    users = 7 * rng.integers(0, 40, size)
    labels[users % 5 == 0] = users[users % 5 == 0] % 2
    return logits, labels, users


def measured(logits, labels, users):
    return ctr_metrics(torch.tensor(logits), torch.tensor(labels), torch.tensor(users))


def pairs_won(scores, labels):
    """The AUC by its definition."""
    better, worse = scores[labels == 1], scores[labels == 0]
    return np.mean([(a > b) + (a == b) / 2 for a in better for b in worse])


@pytest.mark.parametrize("levels", [1, 3, 1000])  # few levels: many ties
def test_areas_by_brute_force(levels):
    scores, labels, users = shown(levels)
    groups = np.unique(users, return_inverse=True)[1]
    areas, positives, negatives = area_under_curve(*map(torch.tensor, (scores, labels, groups)))
    both = 0
    for group in range(groups.max() + 1):
        of_group = labels[groups == group]
        assert (positives[group], negatives[group]) == (of_group.sum(), (1 - of_group).sum())
        if 0 < of_group.sum() < len(of_group):
            both += 1
            assert areas[group] == pytest.approx(pairs_won(scores[groups == group], of_group), rel=1e-12)
        else:
            assert areas[group].isnan()
    assert 20 < both < len(areas)


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_ctr_metrics_are_scikit_learns(levels):
    logits, labels, users = shown(levels)
    got = measured(logits, labels, users)
    chances = 1 / (1 + np.exp(-logits))
    assert got["AUC"] == pytest.approx(roc_auc_score(labels, logits), rel=1e-12)
    assert got["logloss"] == pytest.approx(log_loss(labels, chances), rel=1e-12)
    assert got["NE"] == pytest.approx(log_loss(labels, chances) / log_loss(labels, [labels.mean()] * 400))
    assert (got["positives"], got["impressions"]) == (pytest.approx(labels.mean()), 400)
    mine = [users == user for user in np.unique(users)]
    mine = [rows for rows in mine if 0 < labels[rows].mean() < 1]
    areas, sizes = [pairs_won(logits[rows], labels[rows]) for rows in mine], [rows.sum() for rows in mine]
    assert got["GAUC"] == pytest.approx(np.average(areas, weights=sizes), rel=1e-12)
    assert got["GAUC"] != pytest.approx(np.mean(areas), rel=1e-6)
    assert got["GAUC_users"] == len(mine)


def test_the_order_of_impressions_changes_nothing():
    columns = shown(3)
    order = np.random.default_rng(1).permutation(400)
    first, second = measured(*columns), measured(*(column[order] for column in columns))
    assert first.keys() == second.keys()
    exact = [first[name] == second[name] for name in ("AUC", "GAUC", "GAUC_users", "positives")]
    assert all(exact) and first["logloss"] == pytest.approx(second["logloss"], rel=1e-12)


def test_what_is_not_defined_is_left_out():
    logits = torch.tensor([0.0, 2.0, -1.0])
    for label in (0, 1):
        got = ctr_metrics(logits, torch.full((3,), label), torch.tensor([0, 0, 1]))
        assert got.keys() == {"logloss", "positives", "impressions"} and got["positives"] == label
        wrong = -logits.double() if label else logits.double()
        assert got["logloss"] == pytest.approx(wrong.exp().log1p().mean().item())
    got = ctr_metrics(logits, torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]))  # each user has one label
    assert got["AUC"] == 1 and "NE" in got and not {"GAUC", "GAUC_users"} & got.keys()


@pytest.mark.parametrize("prefix", ["", "valid/"])
def test_an_epoch_is_chosen_by_the_first_there_is(prefix):
    values = {
        f"{prefix}{name}": value for name, value in {"logloss": 0.6, "AUC": 0.7, "NDCG@10": 0.1}.items()
    }
    for expected in (("NDCG@10", 0.1), ("AUC", 0.7), ("logloss", -0.6)):  # the lowest loss
        assert choosing_metric(values, prefix) == expected
        values.pop(prefix + expected[0])
