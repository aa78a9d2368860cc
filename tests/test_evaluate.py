"""Ranking against brute force, on 1 to 3 processes, and for models with a known answer."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUM_ITEMS, as_process, impressions_table, make_dataset, make_impressions

import evaluate as evaluation
import main
from data import TrainBatches
from evaluate import evaluate, rank_users, score_impressions
from model import SequenceRecommender
from reclm.config import EvalConfig, LossConfig, ModelConfig, TrainConfig, build_config
from reclm.errors import UserError
from reclm.metrics import CUTOFFS
from reclm.run.engine import Engine
from reclm.run.layout import Layout
from reclm.run.optim import learning_rate


def build(dataset, seed=0, loss="softmax", **changes):
    torch.manual_seed(seed)
    cfg = ModelConfig(**{"dim": 16, "max_len": 10, "n_layers": 1, "dropout": 0.1} | changes)
    return SequenceRecommender(cfg, LossConfig(loss=loss), dataset.vocabulary)


def histories(dataset, split):
    """(user, history, target) of every evaluated user."""
    held_out = {"valid": 2, "test": 1}[split]
    for user in range(dataset.num_users):
        items = dataset.item_ids[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
        if len(items) >= 3:
            yield user, items[: len(items) - held_out], items[len(items) - held_out]


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("user_embedding", ["none", "explicit"])
def test_ranks_by_brute_force(tiny_dataset, split, filter_seen, user_embedding, monkeypatch):
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", 7)
    model = build(tiny_dataset, user_embedding=user_embedding)
    cfg = EvalConfig(filter_seen=filter_seen)
    users, ranks, _ = rank_users(model, tiny_dataset, split, cfg)
    expected = {}
    for user, history, target in histories(tiny_dataset, split):
        recent = history[-10:]
        batch = {"item_ids": [recent], "lengths": [len(recent)], "user_ids": [user]}
        scores = model({name: torch.tensor(value) for name, value in batch.items()})[0].tolist()
        candidates = set(range(1, NUM_ITEMS + 1)) - (set(history) if filter_seen else set()) - {target}
        better = sum(scores[item] > scores[target] for item in candidates)
        equal = sum(scores[item] == scores[target] for item in candidates)
        expected[user] = 1 + better + equal / 2
    assert dict(zip(users.tolist(), ranks.tolist(), strict=True)) == expected
    metrics = evaluate(model, tiny_dataset, split, cfg)
    values = np.array(list(expected.values()))
    for k in CUTOFFS:
        assert metrics[f"HR@{k}"] == pytest.approx((values <= k).mean())
        assert metrics[f"NDCG@{k}"] == pytest.approx(((values <= k) / np.log2(values + 1)).mean())
    assert metrics["MRR"] == pytest.approx((1 / values).mean())


@pytest.fixture(scope="module")
def plays():
    """60 users play 12 of 30 items again and again; about half of the targets repeat."""
    rng = np.random.default_rng(3)
    favourites = [rng.choice(NUM_ITEMS, 12, replace=False) + 1 for _ in range(60)]
    return make_dataset([rng.choice(own, rng.integers(3, 16)) for own in favourites], num_items=NUM_ITEMS)


def rank_among(scores, target, items):
    """1 + better + equal / 2 of the target among the other `items`, by brute force."""
    others = set(items) - {target}
    better = sum(scores[item] > scores[target] for item in others)
    return 1 + better + sum(scores[item] == scores[target] for item in others) / 2


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("filter_seen", [True, False])
def test_repeated_targets_by_brute_force(plays, split, filter_seen, monkeypatch):
    """With the history left out, a target in it is not given away: it stays out with the rest of it."""
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", 7)
    model, cfg = build(plays).eval(), EvalConfig(filter_seen=filter_seen)
    everything = range(1, NUM_ITEMS + 1)
    expected, new = {}, {}
    for user, history, target in histories(plays, split):
        recent = history[-10:]
        batch = {"item_ids": [recent], "lengths": [len(recent)], "user_ids": [user]}
        scores = model({name: torch.tensor(value) for name, value in batch.items()})[0].tolist()
        unseen = set(everything) - set(history)
        if target not in history:
            new[user] = rank_among(scores, target, unseen)
        left_out = [-np.inf if item in history else score for item, score in enumerate(scores)]
        expected[user] = rank_among(left_out if filter_seen else scores, target, everything)
        if filter_seen and target in history:  # behind all that can be recommended
            assert expected[user] == 1 + len(unseen) + (len(set(history)) - 1) / 2
    found = {}
    for count in (1, 2, 3):  # processes
        parts = []
        for index in range(count):
            as_process(monkeypatch, index, count)
            parts.append(rank_users(model, plays, split, cfg))
        users, ranks, new_ranks = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
        assert sorted(users) == sorted(expected)
        assert dict(zip(users, ranks, strict=True)) == expected
        assert dict(zip(users, new_ranks, strict=True)) == dict.fromkeys(expected, 0) | new
        found[count] = sorted(zip(users, ranks, new_ranks, strict=True))
    assert found[1] == found[2] == found[3]

    as_process(monkeypatch, 0, 1)
    metrics = evaluate(model, plays, split, cfg)
    assert 10 < metrics["new/users"] == len(new) < 50
    for prefix, ranks in (("", expected), ("new/", new)):
        values = np.array(list(ranks.values()))
        assert metrics[f"{prefix}HR@10"] == pytest.approx((values <= 10).mean())
        assert metrics[f"{prefix}NDCG@10"] == pytest.approx(((values <= 10) / np.log2(values + 1)).mean())
        assert metrics[f"{prefix}MRR"] == pytest.approx((1 / values).mean())


def test_one_pass_over_the_scores_gives_both_results(plays):
    model = build(plays)
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    metrics = evaluate(model, plays, "test", EvalConfig(filter_seen=False))
    assert metrics.keys() >= {"HR@10", "new/HR@10", "new/NDCG@10", "new/users"}
    assert sum(calls) == len(plays.ranked_users)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_without_repeats_there_is_one_result(filter_seen):
    dataset = make_dataset([[1, 2, 3, 4], [3, 1, 2], [5, 4, 3, 2, 1]])
    metrics = evaluate(build(dataset), dataset, "test", EvalConfig(filter_seen=filter_seen))
    assert not [name for name in metrics if name.startswith("new/")]


class Favourites(torch.nn.Module):
    """Scores an item by how often the user has used it."""

    def __init__(self, num_items):
        super().__init__()
        self.cfg, self.nothing = ModelConfig(max_len=30), torch.nn.Parameter(torch.zeros(1, num_items + 1))

    def forward(self, batch):
        counts = self.nothing.repeat(len(batch["item_ids"]), 1)
        return counts.scatter_add_(1, batch["item_ids"], torch.ones_like(batch["item_ids"]).float())


def test_one_of_eight_favourites_cannot_be_known():
    """Each user plays 8 of 300 items at random, so the next one is known with a probability of 1/8. Ranking
    the target among the items that the user has not played would find it always."""
    rng = np.random.default_rng(0)
    favourites = [rng.choice(300, 8, replace=False) + 1 for _ in range(1000)]
    dataset = make_dataset([rng.choice(own, 40) for own in favourites], num_items=300)
    model = Favourites(300)
    kept_in = evaluate(model, dataset, "test", EvalConfig(filter_seen=False))
    assert 0.04 < kept_in["HR@1"] < 1 / 8 + 0.03 and kept_in["HR@10"] > 0.97
    left_out = evaluate(model, dataset, "test", EvalConfig(filter_seen=True))
    assert left_out["HR@1"] == left_out["HR@50"] == 0 < left_out["MRR"]
    assert kept_in["new/users"] == left_out["new/users"] < 20


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_ranks_are_bit_equal_on_any_number_of_processes(tiny_dataset, monkeypatch, batch_size):
    """Scores too: they decide ties."""
    model, seen = build(tiny_dataset), {}
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", batch_size)

    def record(scores, *more):
        seen["scores"].append(scores.clone())
        return original(scores, *more)

    original = evaluation.rank_of_target
    monkeypatch.setattr(evaluation, "rank_of_target", record)
    results = {}
    for count in (1, 2, 3):
        found = {}
        for index in range(count):
            as_process(monkeypatch, index, count)
            seen["scores"] = [torch.zeros(0, NUM_ITEMS)]
            users, ranks, _ = rank_users(model, tiny_dataset, "valid", EvalConfig())
            scores = torch.cat(seen["scores"])
            for user, value, row in zip(users.tolist(), ranks.tolist(), scores.tolist(), strict=True):
                assert user not in found
                found[user] = (value, row)
        results[count] = found
    assert results[1].keys() == set(tiny_dataset.ranked_users.tolist())
    assert results[1] == results[2] == results[3]


AT_ONCE = pytest.mark.parametrize(
    ("name", "value"), [("USERS_AT_ONCE", 1), ("USERS_AT_ONCE", 7), ("MAX_TOKENS", 1), ("MAX_TOKENS", 30)]
)


@AT_ONCE
def test_how_many_are_ranked_at_once_changes_no_result(tiny_dataset, monkeypatch, name, value):
    model = build(tiny_dataset, time_head=True)
    before = rank_users(model, tiny_dataset, "test", EvalConfig())
    metrics = evaluate(model, tiny_dataset, "test", EvalConfig())
    assert metrics.keys() >= {"NDCG@10", "time_NLL"}
    sizes = []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0]["lengths"])))
    monkeypatch.setattr(evaluation, name, value)
    after = rank_users(model, tiny_dataset, "test", EvalConfig())
    assert all(map(torch.equal, before, after))
    assert max(sizes) == {1: 1, 7: 7, 30: 3}[value] and sum(sizes) == 60  # of at most 10 actions each
    assert evaluate(model, tiny_dataset, "test", EvalConfig()) == pytest.approx(metrics, rel=1e-5)


@AT_ONCE
def test_how_many_are_scored_at_once_changes_no_result_of_ctr(monkeypatch, name, value):
    dataset = make_impressions(impressions_table(), ctr_split="own", ctr_history="past")
    model = build(dataset, task="ctr", action_embedding=False)
    torch.nn.init.normal_(model.head.logit.weight)
    logits, labels, owner = score_impressions(model, dataset, "test")
    assert logits.std() > 0.1
    rows = np.flatnonzero(dataset.splits == 2)  # in this order, whatever that of the batches
    assert labels.tolist() == dataset.labels[rows].tolist() and owner.tolist() == dataset.owner[rows].tolist()
    monkeypatch.setattr(evaluation, name, value)
    after = score_impressions(model, dataset, "test")
    torch.testing.assert_close(after[0], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(after[1], labels) and torch.equal(after[2], owner)


def test_scores_held_at_once_are_limited(tiny_dataset, monkeypatch):
    model = build(tiny_dataset)
    expected = evaluate(model, tiny_dataset, "test", EvalConfig())
    sizes = []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    monkeypatch.setattr(evaluation, "MAX_SCORES", 4 * (NUM_ITEMS + 1))
    assert evaluate(model, tiny_dataset, "test", EvalConfig()) == pytest.approx(expected)
    assert set(sizes) == {4}
    monkeypatch.setattr(evaluation, "MAX_TOKENS", 3 * 10)  # histories of at most 10 actions
    sizes.clear()
    assert evaluate(model, tiny_dataset, "test", EvalConfig()) == pytest.approx(expected)
    assert set(sizes) == {3}
    monkeypatch.setattr(evaluation, "MAX_SCORES", 1)
    assert evaluate(model, tiny_dataset, "test", EvalConfig()) == pytest.approx(expected)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_constant_model_ranks_in_the_middle(tiny_dataset, filter_seen):
    model = build(tiny_dataset)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    metrics = evaluate(model, tiny_dataset, "test", EvalConfig(filter_seen=filter_seen))
    middles = []
    for _, history, _ in histories(tiny_dataset, "test"):
        candidates = NUM_ITEMS - (len(set(history)) if filter_seen else 0)
        middles.append((1 + candidates) / 2)
    expected = np.mean([middle <= 10 for middle in middles])
    assert metrics["HR@10"] == pytest.approx(expected)
    assert metrics["HR@1"] == 0
    if filter_seen:
        assert 0 < expected < 1
    else:
        assert metrics["HR@20"] == 1 and expected == 0  # all at 15.5 of 30


def test_dropout_is_off(tiny_dataset):
    model = build(tiny_dataset, dropout=0.5).train()
    first = rank_users(model, tiny_dataset, "valid", EvalConfig())[1]
    model.train()
    assert torch.equal(first, rank_users(model, tiny_dataset, "valid", EvalConfig())[1])


def test_evaluation_leaves_no_trace(tiny_dataset):
    model = build(tiny_dataset)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, tiny_dataset, "valid", EvalConfig())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_name_the_user(tiny_dataset, value, monkeypatch):
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", 7)  # those of all batches are counted
    model = build(tiny_dataset, user_embedding="explicit")
    with torch.no_grad():
        model.user_embedding.weight[7] = value
    with pytest.raises(UserError, match=r"non-finite scores to 1 user.*first to 7:"):
        evaluate(model, tiny_dataset, "test", EvalConfig())
    with torch.no_grad():
        model.norm.weight.fill_(value)
    with pytest.raises(UserError, match="60 user"):
        evaluate(model, tiny_dataset, "test", EvalConfig())


def test_lost_users_are_noticed(tiny_dataset, monkeypatch):
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", 7)
    as_process(monkeypatch, 1, 2)  # without a process group the users of the other process are missing
    with pytest.raises(AssertionError, match="of 60"):
        evaluate(build(tiny_dataset), tiny_dataset, "test", EvalConfig())


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_learns_the_next_item(tiny_dataset, loss):
    cfg = TrainConfig(lr=0.01, batch_size=16, warmup_steps=10)
    model = build(tiny_dataset, loss=loss, dim=32, dropout=0.0)
    model.loss.num_negatives = 20
    batches = TrainBatches(tiny_dataset, 10, model.loss, cfg)
    engine = Engine(model, model, whole := build_config(asdict(cfg)), Layout(whole))
    optimizer = engine.optimizer
    run = SimpleNamespace(model=model, engine=engine, optimizer=optimizer, device="cpu")
    before = evaluate(model, tiny_dataset, "test", EvalConfig(filter_seen=False))["NDCG@10"]
    model.train()
    num_epochs = 30
    for epoch in range(num_epochs):
        for step, micro, num_targets in batches.epoch(epoch):
            lr = learning_rate(epoch * len(batches) + step, num_epochs * len(batches), cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            main.accumulate_gradients(run, micro, num_targets)
            optimizer.step()
    after = evaluate(model, tiny_dataset, "test", EvalConfig(filter_seen=False))["NDCG@10"]
    assert before < 0.5 and after > 0.9
