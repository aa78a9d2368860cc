"""Losses against plain float64 loops, and the identities between them."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig, TrainConfig
from reclm.data.dataset import Vocabulary
from reclm.nn.losses import LOSSES, Excluded, bce, exclude_negatives, gbce, sampled_softmax, softmax
from reclm.run.optim import build_optimizer

V, D, M, N = 12, 5, 7, 6  # items are 1 .. 11
NAMES = ["bce", "gbce", "sampled_softmax"]


def inputs(seed=0, shared=True, with_excluded=False, positions=M):
    """float64 hidden, table, targets, negatives, excluded."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, D, generator=rng, dtype=torch.float64)
    table = torch.randn(V, D, generator=rng, dtype=torch.float64)
    targets = torch.randint(1, V, (positions,), generator=rng)
    if shared:
        negatives = 1 + torch.randperm(V - 1, generator=rng)[:N]
        excluded = negatives == targets[:, None]
    else:
        negatives = torch.randint(1, V, (positions, N), generator=rng)
        excluded = negatives == targets[:, None]
    if with_excluded:
        excluded = excluded | (torch.rand(positions, N, generator=rng) < 0.3)
    return hidden, table, targets, negatives, excluded


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def naive(name, hidden, table, targets, negatives, excluded, t=0.75):
    """A loop over positions and negatives."""
    total = 0.0
    for m in range(len(hidden)):
        positive = float(hidden[m] @ table[targets[m]])
        row = negatives if negatives.dim() == 1 else negatives[m]
        kept = [int(item) for n, item in enumerate(row) if excluded is None or not excluded[m, n]]
        scores = [float(hidden[m] @ table[item]) for item in kept]
        count = len(row)
        if name == "sampled_softmax":
            total -= math.log(math.exp(positive) / sum(map(math.exp, [positive, *scores])))
            continue
        sampling = count / (len(table) - 2)  # gSASRec, section 4: alpha = |negatives| / |I-|
        power = sampling * (t * (1 - 1 / sampling) + 1 / sampling) if name == "gbce" else 1.0  # eq. 14
        shift = math.log(count)
        total -= power * log_sigmoid(positive - shift)
        total -= sum(log_sigmoid(-(score - shift)) for score in scores)  # log(1 - s(x)) = log s(-x)
    return total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("with_excluded", [True, False])
def test_loss_is_the_naive_loop(name, shared, with_excluded):
    values = inputs(shared=shared, with_excluded=with_excluded)
    assert LOSSES[name](*values).item() == pytest.approx(naive(name, *values), rel=1e-12)
    none = (*values[:4], None)
    assert LOSSES[name](*none).item() == pytest.approx(naive(name, *none), rel=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.75, 0.99])
def test_gbce_calibration(t):
    values = inputs(with_excluded=True)
    assert gbce(*values, t=t).item() == pytest.approx(naive("gbce", *values, t=t), rel=1e-12)


def test_gbce_without_calibration_is_bce():
    values = inputs(with_excluded=True)
    assert gbce(*values, t=0.0).item() == pytest.approx(bce(*values).item(), rel=1e-12)
    assert gbce(*values, t=0.5).item() != pytest.approx(bce(*values).item(), rel=1e-3)


def test_gbce_with_all_negatives_is_bce():
    """gSASRec, section 5: beta = 1 when alpha = 1, whatever t is."""
    hidden, table, targets, _, _ = inputs()
    targets = torch.full_like(targets, V - 1)
    negatives = torch.arange(1, V - 1)  # all of the V - 2 others
    full = gbce(hidden, table, targets, negatives, t=0.75)
    assert full.item() == pytest.approx(bce(hidden, table, targets, negatives).item(), rel=1e-12)


def test_softmax_is_the_naive_loop_and_never_counts_row_0():
    hidden, table, targets, _, _ = inputs()
    table[0] = 50.0  # would dominate as a candidate
    expected = 0.0
    for m in range(M):
        scores = [math.exp(float(hidden[m] @ table[item])) for item in range(1, V)]
        expected -= math.log(scores[targets[m] - 1] / sum(scores))
    assert softmax(hidden, table, targets).item() == pytest.approx(expected, rel=1e-12)
    table.requires_grad_()
    softmax(hidden, table, targets).backward()
    assert not table.grad[0].any() and table.grad[1:].abs().sum(1).min() > 0


@pytest.mark.parametrize("rows", [None, 2])
def test_softmax_leaves_out_the_history_of_each_sequence(monkeypatch, rows):
    """Against a loop over candidates, with gradients of autograd through it; whole and in parts. The ids of a
    history may repeat and are padded with 0; items held out count for nobody."""
    if rows:
        monkeypatch.setattr("reclm.nn.losses.CHUNK_POSITIONS", rows)
        monkeypatch.setattr("reclm.nn.losses.CHUNK_SCORES", {"cpu": 0})
    hidden, table, targets, _, _ = inputs()
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    seen = torch.tensor([[2, 5, 5, 0, 0], [7, 1, 3, 9, 0], [4, 4, 4, 4, 4]])
    seen[0, 4] = targets[0]  # a target counts, even if seen
    cold = torch.tensor([6, 8])
    targets[6] = 8  # or held out, or not
    values, results = [hidden.requires_grad_(), table.requires_grad_()], []
    expected = 0.0
    for m in range(M):
        out = {*seen[owner[m]].tolist(), *cold.tolist()} - {targets[m].item()}
        kept = [item for item in range(1, V) if item not in out]
        assert 1 < len(kept) < V - 1
        scores = table[kept] @ hidden[m]
        expected = expected + scores.logsumexp(0) - table[targets[m]] @ hidden[m]
    for loss in (expected, softmax(hidden, table, targets, None, Excluded(seen, owner, cold))):
        results.append([loss.detach(), *torch.autograd.grad(2 * loss, values)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cold", [[6, 8], []])
def test_shared_negatives_leave_out_the_history_of_each_sequence(seed, cold):
    """Against a dense mask (B, V); the order of the negatives does not matter."""
    hidden, table, targets, _, _ = inputs()
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    seen = torch.tensor([[2, 5, 5, 0, 0], [7, 1, 3, 9, 0], [11, 4, 4, 4, 4], [0, 0, 0, 0, 0]])
    seen[0, 4] = targets[0]
    cold = torch.tensor(cold, dtype=torch.long)
    negatives = 1 + torch.randperm(V - 1, generator=torch.Generator().manual_seed(seed))[:N]
    mask = torch.zeros(4, V, dtype=torch.bool).scatter_(1, seen, True)
    mask[:, cold] = True
    expected = mask[owner][:, negatives] | (negatives == targets[:, None])
    got = exclude_negatives(negatives, targets, Excluded(seen, owner, cold))
    assert got.tolist() == expected.tolist()
    for name in NAMES:
        values = (hidden, table, targets, negatives)
        assert LOSSES[name](*values, got).item() == pytest.approx(naive(name, *values, expected), rel=1e-12)
    assert torch.equal(exclude_negatives(negatives, targets, None), negatives == targets[:, None])


def test_sampled_softmax_over_all_items_is_softmax():
    hidden, table, targets, _, _ = inputs()
    negatives = 1 + torch.randperm(V - 1)
    excluded = negatives == targets[:, None]
    sampled = sampled_softmax(hidden, table, targets, negatives, excluded)
    assert sampled.item() == pytest.approx(softmax(hidden, table, targets).item(), rel=1e-12)
    counted_twice = sampled_softmax(hidden, table, targets, negatives)
    assert counted_twice.item() > sampled.item() * 1.01


def test_one_negative_is_sasrecs_equation():
    """SASRec, section III.D: -sum_t log s(r_pos) + log(1 - s(r_neg)): no shift."""
    hidden, table, targets, negatives, _ = inputs(shared=False)
    negatives = negatives[:, :1]
    expected = 0.0
    for m in range(M):
        positive = 1 / (1 + math.exp(-float(hidden[m] @ table[targets[m]])))
        negative = 1 / (1 + math.exp(-float(hidden[m] @ table[negatives[m, 0]])))
        expected -= math.log(positive) + math.log(1 - negative)
    assert bce(hidden, table, targets, negatives).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_own_negatives_equal_shared_ones_when_the_ids_are_equal(name):
    hidden, table, targets, negatives, excluded = inputs(with_excluded=True)
    shared = LOSSES[name](hidden, table, targets, negatives, excluded)
    own = LOSSES[name](hidden, table, targets, negatives.expand(M, N), excluded)
    assert own.item() == pytest.approx(shared.item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_excluded_negatives_have_no_effect(name):
    hidden, table, targets, negatives, _ = inputs(shared=False)
    excluded = torch.zeros(M, N, dtype=torch.bool)
    excluded[:, 2] = True
    negatives[:, 2] = 0  # row 0 is used here only
    table.requires_grad_(), hidden.requires_grad_()
    loss = LOSSES[name](hidden, table, targets, negatives, excluded)
    loss.backward()
    assert not table.grad[0].any()
    other = negatives.clone()
    other[:, 2] = 3
    assert LOSSES[name](hidden, table, targets, other, excluded).item() == loss.item()
    assert LOSSES[name](hidden, table, targets, other, None).item() != pytest.approx(loss.item())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [True, False])
def test_all_negatives_excluded_gives_no_nan(name, shared):
    hidden, table, targets, negatives, _ = inputs(shared=shared)
    table.requires_grad_(), hidden.requires_grad_()
    loss = LOSSES[name](hidden, table, targets, negatives, torch.ones(M, N, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and table.grad.isfinite().all()
    if name == "sampled_softmax":
        assert loss.item() == 0.0


@pytest.mark.parametrize("items", [50, 20_000, 20_050])
def test_softmax_of_many_items(items):
    """Small and large catalogues, in float32."""
    torch.manual_seed(0)
    hidden, table = torch.randn(9, 4), torch.randn(items + 1, 4)
    targets = torch.randint(1, items + 1, (9,))
    targets[:2] = torch.tensor([1, items])  # both ends
    small = [x.double().requires_grad_() for x in (hidden, table)]
    scores = small[0] @ small[1][1:].T
    expected = -scores.log_softmax(1).gather(1, targets[:, None] - 1).sum()
    expected.backward()
    hidden.requires_grad_(), table.requires_grad_()
    loss = softmax(hidden, table, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), small[0].grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(table.grad.double(), small[1].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", [255, 256, 257, 600])
def test_softmax_in_chunks_of_positions(positions):
    torch.manual_seed(0)
    hidden, table = torch.randn(positions, 2), torch.randn(20_010, 2)
    targets = torch.randint(1, 20_010, (positions,))
    expected = -(hidden @ table[1:].T).log_softmax(1).gather(1, targets[:, None] - 1).sum()
    assert softmax(hidden, table, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("items", [V, 20_010])
def test_no_positions_give_zero(name, shared, items):
    hidden = torch.zeros(0, D, requires_grad=True)
    table = torch.randn(items, D, requires_grad=True)
    negatives = torch.arange(1, N + 1) if shared else torch.zeros(0, N, dtype=torch.long)
    excluded = None if name == "softmax" else torch.zeros(0, N, dtype=torch.bool)
    loss = LOSSES[name](hidden, table, torch.zeros(0, dtype=torch.long), negatives, excluded)
    loss.backward()
    assert loss.shape == () and loss.item() == 0.0
    assert table.grad is not None and not table.grad.any()  # zeros, no NaN


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [True, False])
def test_gradients(name, shared):
    hidden, table, targets, negatives, excluded = inputs(shared=shared, with_excluded=True)
    hidden.requires_grad_(), table.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, e: LOSSES[name](h, e, targets, negatives, excluded), (hidden, table)
    )


@pytest.mark.parametrize("name", list(LOSSES))
def test_large_scores_do_not_overflow(name):
    hidden, table, targets, negatives, excluded = inputs()
    hidden = (hidden * 1000).float().requires_grad_()
    excluded = None if name == "softmax" else excluded
    loss = LOSSES[name](hidden, table.float(), targets, negatives, excluded)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


def training(loss, items, rows=20, length=9, cold_items=(), **changes):
    """A model and a batch; the last row has padding."""
    torch.manual_seed(0)
    cfg = ModelConfig(dim=16, max_len=length, profile_tokens=True, **changes)
    vocabulary = Vocabulary(items, rows, (3, 4), cold_items=np.array(cold_items, np.int64))
    drawn = torch.randint(1, items + 1, (rows, length + 1))
    drawn[-1, 4:] = 0
    batch = {
        "item_ids": drawn[:, :-1],
        "targets": drawn[:, 1:],
        "lengths": (drawn[:, :-1] != 0).sum(1),
        "user_ids": torch.arange(rows),
        "num_before": torch.zeros(rows, dtype=torch.long),
        "profiles": torch.ones(rows, 2, dtype=torch.long),
        "seen_items": torch.cat([drawn, drawn[:, :3]], dim=1),
        "negatives": 1 + torch.randperm(items)[:32],
    }
    return SequenceRecommender(cfg, LossConfig(loss=loss), vocabulary), batch


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_loss_of_a_model_leaves_out_what_a_dense_mask_would(loss):
    """History and items held out, each position with those of its own sequence."""
    cold = [3, 17, 40]
    model, batch = training(loss, 60, cold_items=cold, dropout=0.0)
    batch["targets"][0, 2] = 17  # a target counts even so
    real = batch["targets"] != 0
    hidden, table = model.encode(batch)[real].detach().double(), model.item_table().detach().double()
    targets, items = batch["targets"][real], torch.arange(61)
    mask = torch.zeros(20, 61, dtype=torch.bool).scatter_(1, batch["seen_items"], True)  # (B, V)
    mask[:, cold] = mask[:, 0] = True
    excluded = mask[:, None].expand(-1, 9, -1)[real] | (items == targets[:, None])  # (M, V)
    negatives = items if loss == "softmax" else batch["negatives"]
    name = "sampled_softmax" if loss == "softmax" else loss
    expected = naive(name, hidden, table, targets, negatives, excluded[:, negatives])
    assert model(batch).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_step_makes_nothing_of_the_size_of_the_catalogue(loss):
    """No (B, V), no (M, V), and of (V, D) gradients alone: there may be millions of items. All else that a
    step makes here is smaller than V numbers."""
    model, batch = training(loss, 20_010)
    optimizer = build_optimizer(model, TrainConfig())
    table = tuple(model.item_embedding.weight.shape)
    model(batch).backward()
    optimizer.step()  # from here on it has its moments
    optimizer.zero_grad()
    parts = [NewTensors(len(model.item_embedding.weight)) for _ in range(3)]
    with parts[0]:
        total = model(batch)
    with parts[1]:
        total.backward()
    with parts[2]:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    forward, backward, step = (part.shapes for part in parts)
    if loss == "softmax":  # its gradient, and the scores of 128 positions at a time
        assert forward == [table, (128, table[0]), (20 * 9 - 6 - 128, table[0])]
    else:
        assert forward == []
    # torch makes a gradient for each lookup of the table (inputs, targets, negatives) and adds them up.
    assert set(backward) == {table} and len(backward) <= (2 if loss == "softmax" else 5)
    assert step == []


class NewTensors(TorchDispatchMode):
    """Shapes of all tensors of at least `least` numbers that are made, views and work in place left out."""

    def __init__(self, least):
        super().__init__()
        self.least, self.shapes = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(made)):
            if x.numel() >= self.least and x.untyped_storage().data_ptr() not in old:
                self.shapes.append(tuple(x.shape))
        return made


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def test_softmax_of_a_frozen_table_has_the_same_gradient_of_hidden():
    torch.manual_seed(0)
    table, targets, found = torch.randn(20, 8), torch.randint(1, 20, (30,)), []
    for frozen in (False, True):
        hidden = torch.linspace(-1, 1, 240).view(30, 8).requires_grad_()
        softmax(hidden, table.clone().requires_grad_(not frozen), targets).backward()
        found.append(hidden.grad)
    assert torch.equal(*found) and found[0].abs().sum() > 0
