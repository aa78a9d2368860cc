"""Candidates over a history (--task=ctr). The reference is the plain causal model, given each
candidate as the last action of a row of its own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary

V, LENGTH = 50, 12
VARIANTS = {
    "llama": {},
    "hstu": {"model_name": "hstu"},
    "grouped queries": {"n_heads": 4, "n_kv_heads": 2},
    "window": {"window": 4},
    "hstu with a window": {"model_name": "hstu", "window": 4},
    "gates": {"gated_residuals": True},
    "profile": {"profile_tokens": True},
    "times and positions": {"time_tokens": "embedding", "position_embedding": True},
    "user": {"user_embedding": "explicit"},
    "one layer": {"n_layers": 1},
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def make_model(num_contexts=3, **settings):
    torch.manual_seed(0)
    settings = {"dim": 16, "n_layers": 2, "n_heads": 2, "max_len": LENGTH, "dropout": 0.0} | settings
    cfg = ModelConfig(task="ctr", **settings)
    profile = (3, 4) if cfg.profile_tokens else ()
    vocabulary = Vocabulary(V - 1, 9, profile, {"actions": 5, "contexts": num_contexts})
    model = SequenceRecommender(cfg, LossConfig(), vocabulary)
    for name, weight in model.named_parameters():  # so that every weight has an effect
        if weight.dim() < 2 or not weight.any() or "embedding" in name:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    return model.eval()


def make_batch(candidates=5, users=3):
    rng = torch.Generator().manual_seed(1)

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=rng)

    times = draw(0, 10**5, users, LENGTH + 1).cumsum(1).double()
    lengths = torch.tensor([LENGTH, 7, 0])[:users]
    real = torch.arange(LENGTH) < lengths[:, None]
    seen = (torch.rand(users, candidates, generator=rng) * (1 + lengths[:, None])).long()
    seen[:, 0] = lengths  # the whole history, and none of it
    seen[:, 1] = 0
    return {
        "item_ids": draw(1, V, users, LENGTH) * real,
        "actions": draw(1, 6, users, LENGTH) * real,
        "contexts": draw(1, 4, users, LENGTH) * real,
        "lengths": lengths,
        "user_ids": torch.arange(users),
        "num_before": draw(0, 90, users),
        "profiles": draw(0, 3, users, 2),
        "timestamps": times[:, :-1] * real,
        "next_timestamps": times[:, 1:] * real,
        "candidate_ids": draw(1, V, users, candidates),
        "history_lengths": seen,
        "candidate_times": times.gather(1, seen) + draw(0, 10**4, users, candidates),
        "candidate_contexts": draw(1, 4, users, candidates),
    }


def as_last_action(batch, user, candidate):
    """A batch of one row: the history of the candidate, then the candidate as the next action."""
    seen = int(batch["history_lengths"][user, candidate])
    last = {
        "item_ids": batch["candidate_ids"],
        "contexts": batch["candidate_contexts"],
        "timestamps": batch["candidate_times"],
        "actions": torch.zeros_like(batch["candidate_ids"]),  # not known
    }
    row = {
        name: torch.cat([batch[name][user, :seen], value[user, candidate, None]])[None]
        for name, value in last.items()
    }
    row |= {name: batch[name][user, None] for name in ("user_ids", "num_before", "profiles")}
    return row | {"lengths": torch.tensor([seen + 1]), "next_timestamps": row["timestamps"]}


@torch.inference_mode()
@EVERY_VARIANT
def test_a_candidate_is_scored_as_the_last_action_of_its_own_row(variant):
    model, batch = make_model(**variant), make_batch()
    logits = model(batch)  # (B, C)
    assert logits.shape == (3, 5)
    for user in range(3):
        for candidate in range(5):
            hidden = model.encode(as_last_action(batch, user, candidate))[:, -1:]
            alone = model.head(hidden)[0, 0]
            torch.testing.assert_close(logits[user, candidate], alone, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("at_once", [1, 2, 4])
@EVERY_VARIANT
def test_how_many_are_scored_at_once_changes_nothing(variant, at_once, monkeypatch):
    model, batch = make_model(**variant), make_batch()
    whole = model(batch)
    calls = []
    monkeypatch.setattr(
        model, "embed", lambda row, *args, f=model.embed: (calls.append(row), f(row, *args))[1]
    )
    monkeypatch.setattr(model_module, "CANDIDATES_AT_ONCE", at_once)
    torch.testing.assert_close(model(batch), whole, atol=2e-5, rtol=1e-5)
    assert len(calls) == 1 + -(-5 // at_once)  # the history once


@torch.inference_mode()
@EVERY_VARIANT
def test_candidates_and_later_actions_are_not_seen(variant):
    model, batch = make_model(**variant), make_batch()
    before = model(batch)
    other = batch | {"candidate_ids": batch["candidate_ids"].clone(), "actions": batch["actions"].clone()}
    other["candidate_ids"][:, 2] = 1 + other["candidate_ids"][:, 2] % (V - 1)
    other["actions"][0, 5:] = 1 + other["actions"][0, 5:] % 5
    after = model(other)
    moved = (before - after).abs() > 1e-4
    sees = batch["history_lengths"] > 5
    sees[1:] = False
    if not variant.get("window"):
        assert moved[:, 2].all() and moved[sees].all()
    sees[:, 2] = True
    assert not moved[~sees].any()


def test_the_feedback_on_a_candidate_is_no_input():
    """Padded candidates do not count; the loss is the binary cross entropy of the others."""
    model, batch = make_model(), make_batch()
    logits = model(batch)
    labels = torch.tensor([[0, 1, -1, 1, 0], [1, 1, 0, -1, -1], [0, -1, -1, -1, -1]])
    loss = model(batch | {"labels": labels})
    real = labels >= 0
    wanted = F.binary_cross_entropy(logits[real].sigmoid(), labels[real].float(), reduction="sum")
    torch.testing.assert_close(loss, wanted)


@EVERY_VARIANT
def test_every_weight_learns(variant):
    """DDP requires it: weights that only serve the history in the last layer must not exist."""
    model, batch = make_model(**variant), make_batch()
    model(batch | {"labels": torch.arange(15).view(3, 5) % 2}).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    silent = [name for name, p in model.named_parameters() if not p.grad.any() or not p.grad.isfinite().all()]
    assert silent == []


@torch.inference_mode()
@pytest.mark.parametrize("variant", [{}, {"n_heads": 4, "n_kv_heads": 2}, {"model_name": "hstu"}])
def test_bfloat16_is_close_to_float32(variant):
    full, half, batch = make_model(**variant), make_model(dtype="bfloat16", **variant), make_batch()
    expected, got = full(batch), half(batch)
    assert got.dtype == torch.float32 and not torch.equal(expected, got)
    assert (expected - got).norm() / expected.norm() < 0.03


@torch.inference_mode()
def test_ten_thousand_candidates_fit():
    model, batch = make_model(), make_batch()
    many = 10_000
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, V, (3, many)))
    batch |= {
        "candidate_ids": ids,
        "history_lengths": batch["lengths"][:, None].expand(-1, many),
        "candidate_times": batch["candidate_times"][:, :1].expand(-1, many),
        "candidate_contexts": batch["candidate_contexts"][:, :1].expand(-1, many),
    }
    logits = model(batch)
    for user in range(3):  # the logit of an item does not depend on its place
        by_item = [logits[user, ids[user] == item] for item in range(1, V)]
        assert all((group.max() - group.min()) < 1e-4 for group in by_item)
        assert torch.stack([group[0] for group in by_item]).std() > 0.01
