"""Parameter groups and the learning rate."""

import math

import pytest
import torch
from launch import TINY, here, read_state, write_csv
from torch import nn

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig, TrainConfig
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.run.optim import build_optimizer, choose_warmup, learning_rate, update_average


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
    matrices, embeddings, gains = build_optimizer(layers, TrainConfig(optimizer="adamw")).param_groups
    assert [id(w) for w in embeddings["params"]] == [id(layers["projection"].weight)]
    expected = [layers["position_embedding"].weight, layers["bag"].weight]
    assert [id(w) for w in matrices["params"]] == [id(w) for w in expected]
    assert [id(w) for w in gains["params"]] == [id(layers["position_embedding"].bias)]


def test_an_unknown_optimizer_is_refused(model):
    with pytest.raises(UserError, match="--optimizer=adamax must be one of adamw, adamw8bit, adafactor"):
        build_optimizer(model, TrainConfig(optimizer="adamax"))


def test_step_is_adamw(model):
    """Against AdamW (arXiv 1711.05101, algorithm 2) in float64, two steps."""
    cfg = TrainConfig(optimizer="adamw", lr=0.01, weight_decay=0.3)
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


WARMUPS = [(6, 0), (9, 0), (80, 8), (999, 99), (1000, 100), (10**6, 100)]


@pytest.mark.parametrize(("total", "expected"), WARMUPS)
def test_a_short_run_warms_up_for_a_tenth_of_it(total, expected):
    steps, note = choose_warmup(TrainConfig(), total)
    assert steps == expected
    sentence = f"over {expected} of this run's {total} steps, not over 100 (--warmup_steps)"
    assert (sentence in note) == (total < 1000)
    assert choose_warmup(TrainConfig(warmup_steps=100), total) == (100, "")  # as it is


@pytest.mark.parametrize("total", [6, 80, 1000, 3000])
def test_the_rate_is_reached_and_long_runs_are_as_before(total):
    rates, before = (
        [learning_rate(step, total, cfg) for step in range(total)]
        for cfg in (TrainConfig(lr=0.2), TrainConfig(lr=0.2, warmup_steps=100))
    )
    assert max(rates) > 0.19 and rates.index(max(rates)) <= total // 10
    assert (rates == before) == (total >= 1000)


def test_the_warm_up_of_a_run_is_said_and_stored(tmp_path):
    """Also with a constant rate, where a longer run can be resumed: its first steps had this warm-up."""
    write_csv(tmp_path / "tiny.csv")
    flags = [flag for flag in TINY if "warmup" not in flag]
    flags += ["--dataset=tiny.csv", "--lr_min=1", "--batch_size=4", "--out_dir=run"]
    shown = here(*flags, "--num_epochs=3", cwd=tmp_path).ok().stdout
    assert "NOTE: the learning rate warms up over 3 of this run's 30 steps" in shown
    state = read_state(tmp_path / "run" / "last.pth")
    assert state["config"]["warmup_steps"] == 3
    shown = here(*flags, "--num_epochs=10", "--resume=auto", cwd=tmp_path).ok().stdout
    assert "warms up" not in shown
    assert read_state(tmp_path / "run" / "last.pth")["config"]["warmup_steps"] == 3


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
