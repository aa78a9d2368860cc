"""Dropout, buckets, and the embeddings of positions and times."""

import math

import pytest
import torch
from conftest import make_dataset
from test_model import build, random_batch
from torch import nn

from data import TrainBatches, eval_batches
from reclm.config import LossConfig, TrainConfig
from reclm.draws import Draws
from reclm.nn.layers import PLACE_BUCKETS, TIME_BUCKETS, Dropout, PositionEmbedding, log_buckets

# ---------------------------------------------------------------- dropout


def draws_of(rows: int, seed: int = 0) -> Draws:
    torch.manual_seed(seed)
    return Draws.of({"lengths": torch.ones(rows)})


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].abs().item()


@pytest.mark.parametrize("p", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_it_drops_as_often_as_torchs_and_scales_the_same(p):
    """800,000 elements: the fraction kept lies within 5 standard deviations of 1 - p."""
    x = torch.ones(8, 1000, 100)
    ours, theirs = Dropout(p)(x, draws_of(8)), nn.Dropout(p)(x)
    kept = (ours != 0).float()
    assert abs(kept.mean().item() - (1 - p)) <= 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(ours.unique(), theirs.unique(), rtol=1e-4, atol=0)


def test_elements_are_independent():
    """Each 64 bits serve four neighbours: they, those next to them, rows and calls do not correlate."""
    dropout, draws, x = Dropout(0.3), draws_of(8), torch.ones(8, 50_000)
    kept, again = (dropout(x, draws) != 0 for _ in range(2))
    limit = 5 / x.numel() ** 0.5
    for lag in (1, 2, 3, 4, 5, 8):
        assert correlation(kept[:, :-lag], kept[:, lag:]) < limit, lag
    assert correlation(kept[:-1], kept[1:]) < 1.1 * limit and correlation(kept, again) < limit
    other = dropout(x, draws_of(8, seed=1)) != 0
    assert correlation(kept, other) < limit and correlation(kept[:-1], other[1:]) < 1.1 * limit


def test_each_bit_is_even_and_free_of_the_others():
    bits = draws_of(4).bits(50_000).flatten()
    bits = (bits[:, None] >> torch.arange(64) & 1).float()  # (200,000, 64)
    assert (bits.mean(0) - 0.5).abs().max() < 5 * 0.5 / len(bits) ** 0.5
    assert torch.corrcoef(bits.T).fill_diagonal_(0).abs().max() < 5 / len(bits) ** 0.5
    uniform = draws_of(200_000).uniform()
    assert uniform.min() >= 0 and uniform.max() < 1
    assert (uniform.flatten().histc(20, 0, 1) - 10_000).abs().max() < 5 * 10_000**0.5


def test_the_mask_of_a_row_depends_on_its_place_alone():
    x, dropout = torch.randn(6, 5, 7), Dropout(0.5)
    whole = dropout(x, draws_of(6))
    torch.manual_seed(0)
    draws = Draws.of({"lengths": torch.ones(2), "places": torch.tensor([4, 1])})
    assert torch.equal(dropout(x[[4, 1]], draws), whole[[4, 1]])
    valid = torch.rand(6, 5) < 0.5
    of_all = dropout(x[valid], draws_of(6).at(valid))
    torch.manual_seed(0)
    draws = Draws.of({"lengths": torch.ones(2), "places": torch.tensor([2, 3])}).at(valid[2:4])
    expected = of_all[valid[:2].sum() : valid[:4].sum()]
    assert torch.equal(dropout(x[2:4][valid[2:4]], draws), expected)
    assert dropout(x[:0], draws_of(0)).shape == (0, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3,), (5, 7, 3)])
def test_the_gradient_goes_through_the_same_mask(dtype, shape):
    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    out = Dropout(0.5)(x, draws_of(len(x)))
    out.sum().backward()
    assert out.dtype == dtype and out.shape == shape
    torch.testing.assert_close(out, x * x.grad)


def test_same_seed_same_mask_and_nothing_in_evaluation():
    x, dropout = torch.randn(50, 50), Dropout(0.5)
    masks = [dropout(x, draws_of(50, seed)) for seed in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(dropout.eval()(x, None), x)


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
