"""Parameter groups and the learning rate."""

import math

import pytest
import torch
from torch import nn

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig, TrainConfig
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.run.optim import build_optimizer, learning_rate, update_average


@pytest.fixture
def model():
    cfg = ModelConfig(dim=16, max_len=8, n_layers=2, user_embedding="explicit")
    return SequenceRecommender(cfg, LossConfig(), Vocabulary(10, 5))


def test_matrices_and_embeddings_decay_and_norms_never(model):
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3, embedding_decay=0.1))
    names = {id(weight): name for name, weight in model.named_parameters()}
    decay = {names[id(w)]: g["weight_decay"] for g in optimizer.param_groups for w in g["params"]}
    assert decay.keys() == set(names.values())  # every parameter, once
    matrices = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    for name, value in decay.items():
        module = name.split(".")[-2]
        assert value == (0.3 if module in matrices else 0.1 if "embedding" in module else 0.0), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_groups_follow_the_type_of_a_module_not_its_name():
    """An embedding counts under any name, a matrix named embedding does not; frozen weights are skipped."""
    layers = {
        "projection": nn.Embedding(3, 2),
        "position_embedding": nn.Linear(2, 2),
        "bag": nn.EmbeddingBag(3, 2),
    }
    layers["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    layers = nn.ModuleDict(layers)
    matrices, embeddings, gains = build_optimizer(layers, TrainConfig()).param_groups
    assert [id(w) for w in embeddings["params"]] == [id(layers["projection"].weight)]
    expected = [layers["position_embedding"].weight, layers["bag"].weight]
    assert [id(w) for w in matrices["params"]] == [id(w) for w in expected]
    assert [id(w) for w in gains["params"]] == [id(layers["position_embedding"].bias)]


def test_an_unknown_optimizer_is_refused(model):
    with pytest.raises(UserError, match="--optimizer=adamax must be one of adamw"):
        build_optimizer(model, TrainConfig(optimizer="adamax"))


def test_step_is_adamw(model):
    """Against AdamW (arXiv 1711.05101, algorithm 2) in float64, two steps."""
    cfg = TrainConfig(lr=0.01, weight_decay=0.3)
    for name in ("layers.0.attention.wq.weight", "item_embedding.weight"):
        optimizer = build_optimizer(model, cfg)
        weight = model.get_parameter(name)
        expected, decay = weight.detach().double(), 0.3 if "wq" in name else 0.0
        mean = square = torch.zeros_like(expected)
        for t in (1, 2):
            gradient = torch.randn_like(weight)
            model.zero_grad()
            weight.grad = gradient
            optimizer.step()
            gradient = gradient.double()
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.98 * square + 0.02 * gradient**2
            update = mean / (1 - 0.9**t) / ((square / (1 - 0.98**t)).sqrt() + 1e-8)
            expected = expected - cfg.lr * (update + decay * expected)
        torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_a_constant_rate_warms_up_then_stays():
    cfg = TrainConfig(lr=0.2, lr_min=1.0, warmup_steps=4)
    rates = [learning_rate(step, 10, cfg) for step in range(10)]
    assert rates == pytest.approx([0.05, 0.1, 0.15] + [0.2] * 7)


def test_cosine_schedule():
    cfg = TrainConfig(lr=0.2, warmup_steps=0, lr_min=0.1)
    rates = [learning_rate(step, 1000, cfg) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[500] == pytest.approx((0.2 + 0.02) / 2)
    assert rates[-1] == pytest.approx(0.02, rel=1e-3)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    for step in (100, 321):
        expected = 0.02 + (0.2 - 0.02) * (1 + math.cos(math.pi * step / 1000)) / 2
        assert rates[step] == pytest.approx(expected)


@pytest.mark.parametrize("lr_min", [0.0, 0.3, 1.0])
def test_rates_are_positive_and_never_above_lr(lr_min):
    for warmup in (0, 1, 7, 500):
        cfg = TrainConfig(lr=1e-3, warmup_steps=warmup, lr_min=lr_min)
        rates = [learning_rate(step, 50, cfg) for step in range(50)]
        assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates), (warmup, rates)


def test_average_by_hand():
    """Decay d after many steps, (1 + n) / (10 + n) in step n of the first ones."""
    averaged, trained = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for step, decay in ((0, 1 / 10), (5, 6 / 15), (10**6, 0.9)):
        expected = decay * averaged.weight.detach() + (1 - decay) * trained.weight.detach()
        update_average(averaged, trained, step, 0.9)
        torch.testing.assert_close(averaged.weight.detach(), expected)
