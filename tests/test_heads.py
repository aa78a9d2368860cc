"""The time to the next action: densities that integrate to 1, the median, the two forecasts by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import as_process, make_dataset
from scipy.stats import norm
from test_model import build, random_batch

from data import eval_batches
from evaluate import evaluate, time_metrics
from reclm.config import ModelConfig, build_config
from reclm.data.dataset import gap_statistics
from reclm.errors import UserError
from reclm.nn.heads import (
    COMPONENTS,
    NARROWEST,
    TIME_ERRORS,
    TIME_WEIGHT,
    TimeHead,
    forecast_errors,
    log_time,
    time_errors,
)


def random_head(seed=0):
    torch.manual_seed(seed)
    head = TimeHead(ModelConfig(dim=8, n_heads=2))
    torch.nn.init.normal_(head.linear.weight, std=0.3)
    return head


def by_hand(head, hidden):
    """(weights, means, scales) in float64"""
    out = (head.linear.weight.double() @ hidden.double() + head.linear.bias.double()).detach().numpy()
    weights, means, scales = out[:COMPONENTS], out[COMPONENTS : 2 * COMPONENTS], out[2 * COMPONENTS :]
    weights = np.exp(weights - weights.max())
    return weights / weights.sum(), means, 0.05 + np.log1p(np.exp(scales))


def test_likelihood_is_that_of_the_mixture():
    head, hidden, gaps = random_head(), torch.randn(6, 8), torch.tensor([0.0, 0, 1, 59, 1e4, 1e8]).double()
    got = head(hidden, log_time(gaps))
    for m in range(6):
        weights, means, scales = by_hand(head, hidden[m])
        u = (m + 1) * (math.sqrt(5) - 1) / 2 % 1
        z = math.log(1 + gaps[m] + u)
        assert got[m].item() == pytest.approx(
            -math.log((weights * norm.pdf(z, means, scales)).sum()), rel=1e-4
        )


def test_median_halves_the_mass():
    head, hidden = random_head(), torch.randn(20, 8)
    for m, median in enumerate(head.median(hidden).tolist()):
        weights, means, scales = by_hand(head, hidden[m])
        assert (weights * norm.cdf(median, means, scales)).sum() == pytest.approx(0.5, abs=1e-4)


def test_log_time_spreads_a_second_evenly():
    z = log_time(torch.zeros(1000, dtype=torch.float64)).double().exp() - 1
    assert z.min() >= 0 and z.max() < 1
    assert np.histogram(z, 10, (0, 1))[0] == pytest.approx(100, abs=2)
    assert log_time(torch.tensor([-5.0])).item() >= 0  # a clock that went back


def test_it_learns_a_known_distribution():
    """Two log-normal humps, told apart by the input: the likelihood approaches the true entropy."""
    torch.manual_seed(0)
    head = TimeHead(ModelConfig(dim=8, n_heads=2))
    torch.nn.init.zeros_(head.linear.weight)
    adam = torch.optim.Adam(head.parameters(), lr=0.02)
    which = torch.arange(4000) % 2
    hidden = torch.nn.functional.one_hot(which, 8).float()
    z = torch.where(which == 0, 5 + 0.5 * torch.randn(4000), 10 + torch.randn(4000))
    for _ in range(300):
        adam.zero_grad()
        loss = head(hidden, z).mean()
        loss.backward()
        adam.step()
    entropy = 0.5 * math.log(2 * math.pi * math.e) + 0.5 * math.log(0.5)  # mean of both
    assert abs(loss.item() - entropy) < 0.03
    assert head.median(hidden[:2]).tolist() == pytest.approx([5, 10], abs=0.1)


# ---------------------------------------------------------------- on data


def timed_dataset():
    rng = np.random.default_rng(0)
    dataset = make_dataset([list(rng.integers(1, 20, rng.integers(3, 12))) for _ in range(30)], num_items=20)
    for first, last in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True):
        dataset.timestamps[first:last] = 1e6 + np.exp(rng.uniform(0, 9, last - first)).round().cumsum()
    return dataset


def test_forecasts_by_hand():
    dataset = timed_dataset()
    spread = gap_statistics(dataset, NARROWEST)
    squares, means, last_gaps = [], [], []
    for u in range(dataset.num_users):
        times = dataset.timestamps[dataset.offsets[u] :][: dataset.train_lengths[u]]
        z = np.log(1.5 + np.diff(times))
        means += list(z)
        squares += list((z - z.mean()) ** 2) if len(z) else []
        last_gaps += list(np.diff(z) ** 2)
    assert spread["mean"] == pytest.approx(np.mean(means))
    assert spread["user_mean"] == pytest.approx(math.sqrt(np.mean(squares)))
    assert spread["last_gap"] == pytest.approx(math.sqrt(np.mean(last_gaps)))

    batch = next(eval_batches(dataset, "test", 100, 100))
    head, hidden = random_head(), torch.randn(len(batch["lengths"]), 8)
    errors = time_errors(head, hidden, batch) | forecast_errors(batch, spread)
    for row, user in enumerate(batch["user_ids"].tolist()):
        times = dataset.timestamps[dataset.offsets[user] : dataset.offsets[user + 1]]
        u = (user + 1) * (math.sqrt(5) - 1) / 2 % 1
        z = math.log(1 + times[-1] - times[-2] + u)
        nll = head(hidden[row : row + 1], torch.tensor([z])).item()
        assert errors["time_NLL"][row].item() == pytest.approx(nll, rel=1e-3)
        known = np.log(1.5 + np.diff(times[:-1]))
        for name, forecast in (("last_gap", known[-1]), ("user_mean", known.mean())):
            assert errors[f"time_MAE_{name}"][row].item() == pytest.approx(abs(z - forecast), abs=1e-4)
            nll = -norm.logpdf(z, forecast, spread[name])
            assert errors[f"time_NLL_{name}"][row].item() == pytest.approx(nll, abs=1e-4)


def test_too_few_gaps_to_learn_from():
    """Three actions per user: none is left between two training actions."""
    spread = gap_statistics(make_dataset([[1, 2, 3], [2, 3, 1]]), NARROWEST)
    assert spread["mean"] == 0 and spread["last_gap"] == spread["user_mean"] == 0.05


def test_metrics_do_not_depend_on_the_processes(monkeypatch):
    dataset, cfg = timed_dataset(), build_config({}).eval
    monkeypatch.setattr("evaluate.USERS_AT_ONCE", 4)
    model = build(num_items=20, time_head=True, max_len=16)
    whole = time_metrics(model, dataset, "test")
    assert set(whole) == set(TIME_ERRORS)
    assert whole == {name: evaluate(model, dataset, "test", cfg)[name] for name in TIME_ERRORS}
    monkeypatch.setattr("evaluate.mean_over_processes", lambda sums, count: (sums | {"count": count}, count))
    parts = []
    for index in range(3):
        as_process(monkeypatch, index, 3)
        parts.append(time_metrics(model, dataset, "test"))
    count = sum(part["count"] for part in parts)
    assert count == len(dataset.ranked_users)
    for name in TIME_ERRORS:
        assert sum(part[name] for part in parts) / count == pytest.approx(whole[name], rel=1e-9)


def test_the_loss_is_joint_and_gradients_reach_the_blocks():
    model = build(loss="softmax", time_head=True, dropout=0.0)
    batch = random_batch()
    batch["targets"] = batch["item_ids"].roll(-1, 1) * (batch["item_ids"] != 0)
    valid = batch["targets"] != 0
    gaps = (batch["next_timestamps"] - batch["timestamps"])[valid]
    alone = build(loss="softmax", dropout=0.0)
    alone.load_state_dict(model.state_dict(), strict=False)
    times = model.time_head(model.encode(batch)[valid], log_time(gaps)).sum()
    torch.testing.assert_close(model(batch), alone(batch) + TIME_WEIGHT * times)
    model.zero_grad()
    torch.nn.init.normal_(model.time_head.linear.weight)
    model.time_head(model.encode(batch)[valid], log_time(gaps)).sum().backward()
    assert model.layers[0].attention.wq.weight.grad.any()


def test_the_time_to_predict_must_not_be_told():
    with pytest.raises(UserError, match="--request_time=true reveals the time that --time_head"):
        build_config({"time_head": True, "request_time": True, "time_tokens": "embedding"})
