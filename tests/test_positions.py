"""The embedding of how many actions came before."""

import math

import torch
from conftest import make_dataset
from test_model import build, random_batch

from data import TrainBatches, eval_batches
from reclm.config import LossConfig, ModelConfig, TrainConfig
from reclm.nn.layers import NUM_BUCKETS, PositionEmbedding


def test_each_action_gets_the_vector_of_its_number():
    module = PositionEmbedding(ModelConfig())
    got = module(torch.tensor([[0], [10**6]]) + torch.arange(3))
    for column in range(3):
        bucket = int(math.log(1 + column) / 0.1)
        assert torch.equal(got[0, column], module.embedding.weight[bucket])
        assert torch.equal(got[1, column], module.embedding.weight[NUM_BUCKETS - 1])
    assert len({tuple(vector) for vector in got[0].tolist()}) == 3


def test_it_counts_from_the_beginning_of_the_whole_history():
    dataset = make_dataset([[1 + i % 5 for i in range(50)], [1, 2, 3, 4]])
    batches = TrainBatches(
        dataset, 20, LossConfig(loss="softmax"), TrainConfig(batch_size=2, random_windows=1.0)
    )
    starts = set()
    for epoch in range(40):
        (_, (batch,), _) = next(batches.epoch(epoch))
        row = batch["user_ids"].tolist().index(0)
        first = batch["num_before"][row].item()
        assert batch["item_ids"][row].tolist() == [1 + i % 5 for i in range(first, first + 20)]
        assert batch["num_before"][1 - row] == 0
        starts.add(first)
    assert len(starts) > 10 and starts <= set(range(28))
    for split, first in (("valid", 28), ("test", 29)):
        (batch,) = eval_batches(dataset, split, 20, 8)
        assert dict(zip(batch["user_ids"].tolist(), batch["num_before"].tolist(), strict=True)) == {
            0: first,
            1: 0,
        }


def test_it_reaches_the_scores():
    batch = random_batch()
    model = build(position_embedding=True)
    later = batch | {"num_before": batch["num_before"] + 50}
    assert torch.equal(model(batch), model(later))  # 0 at first
    torch.nn.init.normal_(model.inputs.position_embedding.embedding.weight)
    assert not torch.equal(model(batch), model(later))
