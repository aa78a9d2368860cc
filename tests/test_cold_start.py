"""Cold items never occur in training, and every test target is one of them."""

import numpy as np
import pytest
import torch
from conftest import tiny_rows, write_csv

from data import TrainBatches, eval_batches, load_dataset
from evaluate import evaluate
from model import SequenceRecommender
from reclm.config import DataConfig, LossConfig, ModelConfig, TrainConfig, build_config
from reclm.errors import UserError


@pytest.fixture
def path(tmp_path):
    return str(write_csv(tmp_path / "a.csv", tiny_rows()))


def test_what_is_left_of_a_user(path):
    whole = load_dataset(DataConfig(dataset=path))
    cold = load_dataset(DataConfig(dataset=path, cold_items=0.2))
    held_out = set(cold.cold_items.tolist())
    assert len(held_out) == 6 and cold.num_items == whole.num_items == 30
    expected = {}
    for u, user in enumerate(whole.users):
        items = whole.item_ids[whole.offsets[u] : whole.offsets[u + 1]].tolist()
        places = [place for place, item in enumerate(items) if item in held_out]
        if places:
            left = [item for item in items[: places[-1]] if item not in held_out]
            if len(left) >= 2:
                expected[user] = [*left, items[places[-1]]]
    got = {
        user: cold.item_ids[cold.offsets[u] : cold.offsets[u + 1]].tolist()
        for u, user in enumerate(cold.users)
    }
    assert got == expected and 0 < len(got) < whole.num_users
    assert any("6 items are kept out of training" in note for note in cold.notes)


def test_neither_training_nor_validation_sees_them(path):
    dataset = load_dataset(DataConfig(dataset=path, cold_items=0.2))
    cold = torch.tensor(dataset.cold_items.tolist())
    for _, micro, _ in TrainBatches(dataset, 20, LossConfig(), TrainConfig()).epoch(0):
        for batch in micro:
            assert not torch.isin(torch.cat([batch["item_ids"], batch["targets"]]), cold).any()
    for split, are in (("valid", False), ("test", True)):
        for batch in eval_batches(dataset, split, 20, 8):
            assert (torch.isin(batch["target_ids"], cold) == are).all()
            assert not torch.isin(batch["item_ids"], cold).any()


@pytest.mark.parametrize("loss", ["bce", "gbce", "sampled_softmax", "softmax"])
def test_the_loss_never_moves_them(path, loss):
    """Cold items are neither candidates nor inputs, so they get no gradient and their rows stay 0."""
    dataset = load_dataset(DataConfig(dataset=path, cold_items=0.2))
    cfg = LossConfig(loss=loss, num_negatives=25)
    model = SequenceRecommender(ModelConfig(dim=8, n_heads=2), cfg, dataset.vocabulary)
    batches = TrainBatches(dataset, 20, cfg, TrainConfig(batch_size=60))
    (_, (batch,), _), *_ = batches.epoch(0)
    model(batch).backward()
    weight, cold = model.item_embedding.weight, dataset.cold_items.tolist()
    assert not weight[cold].any() and not weight.grad[cold].any()
    others = np.setdiff1d(np.arange(1, 31), cold)
    assert weight[others].any(1).all()
    assert weight.grad[others].any(1).sum() > 15


def test_too_small_a_share_is_refused(path):
    with pytest.raises(UserError, match="--cold_items=0.01 holds out 0 items"):
        load_dataset(DataConfig(dataset=path, cold_items=0.01))
    with pytest.raises(UserError, match="--cold_items needs --share_negatives=true"):
        build_config({"cold_items": 0.1, "share_negatives": False})


def test_ranked_among_all_and_among_themselves(path):
    dataset = load_dataset(DataConfig(dataset=path, cold_items=0.2))
    cfg = build_config({"dim": 8, "n_heads": 2, "num_negatives": 25})
    torch.manual_seed(0)
    model = SequenceRecommender(cfg.model, cfg.loss, dataset.vocabulary)
    torch.nn.init.normal_(model.item_embedding.weight)  # as if their content distinguished them
    metrics = evaluate(model, dataset, "test", cfg.eval)
    expected = []
    for batch in eval_batches(dataset, "test", 200, 100):
        for target, scores in zip(batch["target_ids"].tolist(), model(batch).tolist(), strict=True):
            expected.append(1 / (1 + sum(scores[i] > scores[target] for i in dataset.cold_items.tolist())))
    assert metrics["cold/MRR"] == pytest.approx(np.mean(expected))
    assert metrics["MRR"] < metrics["cold/MRR"]
    assert not any(name.startswith("cold/") for name in evaluate(model, dataset, "valid", cfg.eval))
