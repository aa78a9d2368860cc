"""Dropout, buckets, and the embeddings of positions and times."""

import math

import pytest
import torch
from conftest import make_dataset
from test_model import build, random_batch
from torch import nn

from data import TrainBatches, eval_batches
from reclm.config import LossConfig, TrainConfig
from reclm.nn.layers import PLACE_BUCKETS, TIME_BUCKETS, Dropout, PositionEmbedding, log_buckets

# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_it_drops_as_often_as_torchs_and_scales_the_same(p):
    """800,000 elements: the fraction kept lies within 5 standard deviations of 1 - p."""
    x = torch.ones(8, 1000, 100)
    torch.manual_seed(0)
    ours, theirs = Dropout(p)(x), nn.Dropout(p)(x)
    kept = (ours != 0).float()
    assert abs(kept.mean().item() - (1 - p)) <= 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(ours.unique(), theirs.unique(), rtol=1e-4, atol=0)


def test_elements_are_independent():
    """Each 64-bit draw serves four neighbours: they, and neighbours of neighbours, must not correlate."""
    torch.manual_seed(1)
    kept = (Dropout(0.3)(torch.ones(400_000)) != 0).double()
    for lag in (1, 2, 3, 4, 5, 8):
        correlation = torch.corrcoef(torch.stack([kept[:-lag], kept[lag:]]))[0, 1]
        assert abs(correlation.item()) < 5 / 400_000**0.5, lag


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7, 3)])
def test_the_gradient_goes_through_the_same_mask(dtype, shape):
    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    assert out.dtype == dtype and out.shape == shape
    torch.testing.assert_close(out, x * x.grad)


def test_same_seed_same_mask_and_nothing_in_evaluation():
    x, dropout = torch.randn(50, 50), Dropout(0.5)
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(dropout(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(dropout.eval()(x), x)


# ---------------------------------------------------------------- times


def test_buckets_by_hand():
    seconds = torch.tensor([-5.0, 0.0, 1.0, 2.0, 60.0, 86400.0, 1e12], dtype=torch.float64)
    expected = [0, 0] + [int(math.log(1 + s) / 0.3) for s in (1, 2, 60, 86400)] + [TIME_BUCKETS[0] - 1]
    assert log_buckets(seconds).tolist() == expected
    assert len(set(expected[1:])) == 6


def with_times_that_count(**changes):
    model = build(time_tokens="embedding", **changes)
    for weight in model.inputs.time_embedding.parameters():
        torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("request_time", [False, True])
def test_each_action_gets_the_vectors_of_its_intervals(request_time):
    inputs = with_times_that_count(request_time=request_time).inputs
    times = torch.tensor([[100.0, 100.0, 103.0]], dtype=torch.float64)
    later = torch.tensor([[100.0, 103.0, 1e6]], dtype=torch.float64)
    batch = {"item_ids": torch.tensor([[1, 2, 3]]), "timestamps": times, "next_timestamps": later}
    module, (row, _) = inputs.time_embedding, inputs.lay_out(batch)
    got = module(row)
    since, until = [0.0, 0.0, 3.0], [0.0, 3.0, 1e6 - 103]
    for position in range(3):
        expected = module.since_last_embedding.weight[int(math.log(1 + since[position]) / 0.3)]
        if request_time:
            bucket = int(math.log(1 + until[position]) / 0.3)
            expected = expected + module.until_next_embedding.weight[bucket]
        torch.testing.assert_close(got[0, position], expected)


def test_request_time_reaches_the_scores_only_when_asked_for():
    batch = random_batch()
    later = batch | {"next_timestamps": batch["next_timestamps"] * 1.7}
    for request_time in (False, True):
        model = with_times_that_count(request_time=request_time)
        assert torch.equal(model(batch), model(later)) != request_time


def test_a_fresh_model_does_not_listen_to_the_clock():
    batch = random_batch()
    other = batch | {"timestamps": batch["timestamps"] * 0.3}
    model = build(time_tokens="embedding")
    assert torch.equal(model(batch), model(other))


# ---------------------------------------------------------------- positions


def test_each_action_gets_the_vector_of_its_number():
    module = PositionEmbedding(8)
    got = module(torch.tensor([[0], [10**6]]) + torch.arange(3))
    for column in range(3):
        bucket = int(math.log(1 + column) / 0.1)
        assert torch.equal(got[0, column], module.embedding.weight[bucket])
        assert torch.equal(got[1, column], module.embedding.weight[PLACE_BUCKETS[0] - 1])
    assert len({tuple(vector) for vector in got[0].tolist()}) == 3


def test_positions_count_from_the_beginning_of_the_whole_history():
    dataset = make_dataset([[1 + i % 5 for i in range(50)], [1, 2, 3, 4]])
    batches = TrainBatches(dataset, 20, LossConfig(loss="softmax"), TrainConfig(batch_size=2))
    (_, (batch,), _) = next(batches.epoch(0))
    row = batch["user_ids"].tolist().index(0)
    assert batch["num_before"][row] == 27  # of 48 training actions the last one is a target alone
    assert batch["item_ids"][row].tolist() == [1 + i % 5 for i in range(27, 47)]
    assert batch["num_before"][1 - row] == 0
    for split, first in (("valid", 28), ("test", 29)):
        (batch,) = eval_batches(dataset, split, 20, 8)
        assert dict(zip(batch["user_ids"].tolist(), batch["num_before"].tolist(), strict=True)) == {
            0: first,
            1: 0,
        }


def test_positions_reach_the_scores():
    batch = random_batch()
    model = build(position_embedding=True)
    later = batch | {"num_before": batch["num_before"] + 50}
    assert torch.equal(model(batch), model(later))  # 0 at first
    torch.nn.init.normal_(model.inputs.position_embedding.embedding.weight)
    assert not torch.equal(model(batch), model(later))
