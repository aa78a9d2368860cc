"""Time buckets and the embedding of time between actions."""

import math

import pytest
import torch
from test_model import build, random_batch

from reclm.nn.layers import NUM_BUCKETS, log_buckets


def test_buckets_by_hand():
    seconds = torch.tensor([-5.0, 0.0, 1.0, 2.0, 60.0, 86400.0, 1e12], dtype=torch.float64)
    expected = [0, 0] + [int(math.log(1 + s) / 0.3) for s in (1, 2, 60, 86400)] + [NUM_BUCKETS - 1]
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
