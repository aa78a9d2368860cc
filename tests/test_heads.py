"""The time to the next action: buckets, densities and medians against scipy, what the head sees, its loss."""

import math

import numpy as np
import pytest
import torch
from conftest import as_process, make_dataset
from scipy.stats import rv_histogram
from test_model import build, random_batch

from data import eval_batches
from evaluate import evaluate, time_metrics
from reclm.config import ModelConfig, build_config
from reclm.errors import UserError
from reclm.nn.heads import (
    BOUNDS,
    NUM_BUCKETS,
    RECENT,
    TIME_ERRORS,
    TIME_WEIGHT,
    TimeHead,
    distribution_errors,
    log_time,
    past_gaps,
    time_buckets,
    time_errors,
    time_loss,
)

GAPS = torch.tensor([0.0, 0, 1, 17, 59, 60, 61, 3600, 86400, 1e8]).double()


def random_distributions(count):
    """(count, K) log-probabilities, some of them concentrated on few buckets."""
    torch.manual_seed(0)
    return (4 * torch.randn(count, NUM_BUCKETS)).log_softmax(-1)


def as_histograms(log_probabilities):
    """The same as distributions of gap + u, by scipy."""
    for row in log_probabilities.double().exp():
        density = row / BOUNDS.diff()
        yield rv_histogram((density.numpy(), BOUNDS.numpy()), density=True)


def fraction(number):
    return (number + 1) * (math.sqrt(5) - 1) / 2 % 1


# ---------------------------------------------------------------- buckets, density, median


def test_buckets_are_seconds_at_first_and_cover_all_gaps():
    assert BOUNDS[:61].tolist() == list(range(61)) and BOUNDS.diff().min() > 0
    assert BOUNDS[-1] > 3e9  # a century
    got = time_buckets(GAPS)
    assert ((BOUNDS[got] <= GAPS) & (BOUNDS[got + 1] > GAPS)).all()
    assert time_buckets(torch.tensor([-5.0, 1e30])).tolist() == [0, NUM_BUCKETS - 1]  # a clock that went back


def test_errors_are_those_of_the_histogram():
    distributions, numbers = random_distributions(len(GAPS)), torch.arange(len(GAPS)) * 7
    got = distribution_errors(distributions, GAPS, numbers)
    assert list(got) == TIME_ERRORS
    for m, histogram in enumerate(as_histograms(distributions)):
        x = GAPS[m].item() + fraction(7 * m)
        # z = log(1 + x) has the density of x times dx / dz = 1 + x.
        assert got["time_NLL"][m].item() == pytest.approx(-math.log(histogram.pdf(x) * (1 + x)), rel=1e-5)
        error = abs(math.log1p(x) - math.log1p(histogram.median()))
        assert got["time_MAE"][m].item() == pytest.approx(error, abs=1e-5)


def test_log_time_spreads_a_second_evenly():
    x = log_time(torch.zeros(1000, dtype=torch.float64), torch.arange(1000)).exp() - 1
    assert x.min() >= 0 and x.max() < 1
    assert np.histogram(x, 10, (0, 1))[0] == pytest.approx(100, abs=2)
    assert log_time(torch.tensor([-5.0]), torch.tensor([0])).item() >= 0


# ---------------------------------------------------------------- what the head sees


def test_past_gaps_by_hand():
    rng = np.random.default_rng(0)
    times = 1e9 + rng.choice([0, 0, 1, 30, 5000, 1e7], (3, 14)).cumsum(1)
    codes, statistics = past_gaps(torch.from_numpy(times))
    for row, column in np.ndindex(times.shape):
        gaps = np.diff(times[row, : column + 1])
        expected = [1 + time_buckets(torch.tensor([gap])).item() for gap in gaps[-RECENT:]]
        assert codes[row, column].tolist() == [0] * (RECENT - len(expected)) + expected
        mean, zeros = (np.log1p(gaps).mean(), (gaps == 0).mean()) if len(gaps) else (0, 0)
        wanted = [mean, zeros, math.log1p(len(gaps))]
        assert statistics[row, column].tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_later_action_changes_nothing_before_it():
    times = torch.arange(20).double().square()[None]
    later = times.clone()
    later[0, 12:] += 1e6
    for one, other in zip(past_gaps(times), past_gaps(later), strict=True):
        assert torch.equal(one[:, :12], other[:, :12]) and not torch.equal(one[:, 12:], other[:, 12:])


@pytest.mark.parametrize("source", ["hidden", "gap before"])
def test_it_learns_a_known_distribution(source):
    """Uniform over 10 s or over 40 s, as the input decides: the likelihood approaches the true entropy."""
    torch.manual_seed(0)
    head = TimeHead(ModelConfig(dim=8, n_heads=2, dropout=0.0))
    adam = torch.optim.Adam(head.parameters(), lr=0.01)
    which = torch.arange(4000) % 2
    hidden, codes = torch.zeros(4000, 8), torch.zeros(4000, RECENT, dtype=torch.long)
    if source == "hidden":
        hidden = torch.nn.functional.one_hot(which, 8).float()
    else:
        codes[:, -1] = 1 + which
    gaps = (torch.rand(4000) * torch.where(which == 0, 10, 40)).floor()
    for _ in range(150):
        adam.zero_grad()
        loss = torch.nn.functional.nll_loss(head(hidden, codes, torch.zeros(4000, 3)), time_buckets(gaps))
        loss.backward()
        adam.step()
    assert abs(loss.item() - (math.log(10) + math.log(40)) / 2) < 0.03


# ---------------------------------------------------------------- on data


def timed_dataset():
    rng = np.random.default_rng(0)
    dataset = make_dataset([list(rng.integers(1, 20, rng.integers(3, 12))) for _ in range(30)], num_items=20)
    for first, last in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True):
        dataset.timestamps[first:last] = 1e6 + np.exp(rng.uniform(0, 9, last - first)).round().cumsum()
    return dataset


def test_errors_are_those_of_the_target(tmp_path):
    dataset = timed_dataset()
    batch = next(eval_batches(dataset, "test", 100, 100))
    torch.manual_seed(0)
    head = TimeHead(ModelConfig(dim=8, n_heads=2))
    torch.nn.init.normal_(head.logits.weight)
    head.eval()
    hidden = torch.randn(len(batch["lengths"]), 8)
    errors = time_errors(head, hidden, batch)
    for row, user in enumerate(batch["user_ids"].tolist()):
        times = torch.from_numpy(dataset.timestamps[dataset.offsets[user] : dataset.offsets[user + 1]])
        past = [value[:, -1] for value in past_gaps(times[None, :-1])]
        gap, number = times[-1:] - times[-2:-1], torch.tensor([user])
        expected = distribution_errors(head(hidden[row : row + 1], *past), gap, number)
        for name, value in expected.items():
            assert errors[name][row].item() == pytest.approx(value.item(), rel=1e-5)


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
    torch.nn.init.normal_(model.time_head.logits.weight)
    batch = random_batch()
    batch["targets"] = batch["item_ids"].roll(-1, 1) * (batch["item_ids"] != 0)
    valid = batch["targets"] != 0
    alone = build(loss="softmax", dropout=0.0)
    alone.load_state_dict(model.state_dict(), strict=False)
    times = time_loss(model.time_head, model.encode(batch)[valid], batch, valid)
    torch.testing.assert_close(model(batch), alone(batch) + TIME_WEIGHT * times)
    hidden, (codes, statistics) = model.encode(batch)[valid], past_gaps(batch["timestamps"])
    gaps = (batch["next_timestamps"] - batch["timestamps"])[valid]
    chosen = model.time_head(hidden, codes[valid], statistics[valid]).gather(1, time_buckets(gaps)[:, None])
    torch.testing.assert_close(times, -chosen.sum())
    model.zero_grad()
    times.backward()
    assert model.layers[0].attention.wq.weight.grad.any()


def test_the_time_to_predict_must_not_be_told():
    with pytest.raises(UserError, match="--request_time=true reveals the time that --time_head"):
        build_config({"time_head": True, "request_time": True, "time_tokens": "embedding"})
