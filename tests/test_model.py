"""The model against a float64 reference written from the papers, and identities it must keep."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from model import Attention, FeedForward, SequenceRecommender, TransformerBlock
from reclm.config import LossConfig, ModelConfig, TrainConfig
from reclm.data.dataset import Vocabulary
from reclm.nn.context import Context, rotate, rotations
from reclm.nn.layers import NORM_EPS
from reclm.run.optim import build_optimizer

SMALL = {"max_len": 16, "dim": 16, "n_heads": 4, "n_layers": 2, "dropout": 0.0}
ITEMS, USERS = 40, 9
TIMED = {"gated_residuals": True, "position_embedding": True} | {
    "time_tokens": "embedding",
    "request_time": True,
}
HSTU = {"model_name": "hstu"}  # its own equations: test_hstu.py


def config(**changes):
    return ModelConfig(**(SMALL | changes))


def build(seed=0, loss="bce", num_items=ITEMS, **changes):
    torch.manual_seed(seed)
    return SequenceRecommender(config(**changes), LossConfig(loss=loss), Vocabulary(num_items, USERS)).eval()


def random_batch(seed=0, rows=5, width=12):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, width + 1, rows)
    lengths[0] = width
    ids = rng.integers(1, ITEMS + 1, (rows, width)) * (np.arange(width) < lengths[:, None])
    times = torch.from_numpy(10.0 ** rng.uniform(0, 7, (rows, width + 1)).cumsum(1))
    return {
        "item_ids": torch.from_numpy(ids),
        "timestamps": times[:, :-1],
        "next_timestamps": times[:, 1:],
        "lengths": torch.from_numpy(lengths),
        "user_ids": torch.from_numpy(rng.integers(0, USERS, rows)),
        "num_before": torch.from_numpy(rng.integers(0, 300, rows)),
    }


def full_batch(length):
    return {"token_ids": torch.ones(1, length, dtype=torch.long)}


def rotary_table(length, head_dim):
    return rotations(torch.arange(length).float(), head_dim)


def context(cfg, length, window=0):
    positions = torch.arange(length)[None]
    return Context(positions, positions, rotary_table(length, cfg.head_dim), window)


# ---------------------------------------------------------------- the reference, in float64


def array(tensor):
    return tensor.detach().double().numpy()


def ref_rms_norm(x, gain, eps):
    """RMSNorm (arXiv 1910.07467, eq. 4)."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def ref_rotate(x):
    """RoPE of x (T, Dh) as in arXiv 2104.09864, eq. 34: x * cos + (x with its pairs crossed) * sin."""
    length, width = x.shape
    theta = np.repeat(10000.0 ** (-2 * np.arange(width // 2) / width), 2)  # one angle per pair
    angles = np.arange(length)[:, None] * theta
    crossed = np.stack([-x[:, 1::2], x[:, 0::2]], axis=-1).reshape(length, width)
    return x * np.cos(angles) + crossed * np.sin(angles)


def ref_attention(layer, x, n_heads, window=0):
    """x (T, D): one head and one position after the other."""
    wq, wk, wv, wo = (array(w.weight) for w in (layer.wq, layer.wk, layer.wv, layer.wo))
    length, width = len(x), len(wq) // n_heads
    groups = len(wq) // len(wk)
    out = np.zeros((length, n_heads, width))
    for head in range(n_heads):
        rows, shared = slice(head * width, (head + 1) * width), head // groups
        kv_rows = slice(shared * width, (shared + 1) * width)
        q, k, v = ref_rotate(x @ wq[rows].T), ref_rotate(x @ wk[kv_rows].T), x @ wv[kv_rows].T
        for t in range(length):
            first = max(0, t - window + 1) if window else 0
            weights = np.exp([q[t] @ k[s] / np.sqrt(width) for s in range(first, t + 1)])
            out[t, head] = weights / weights.sum() @ v[first : t + 1]
    return out.reshape(length, -1) @ wo.T


def ref_feed_forward(layer, x):
    gate = x @ array(layer.w1.weight).T
    return (gate / (1 + np.exp(-gate)) * (x @ array(layer.w3.weight).T)) @ array(layer.w2.weight).T


def ref_block(block, x, cfg):
    normed = ref_rms_norm(x, array(block.attention_norm.weight), NORM_EPS)
    branch = ref_attention(block.attention, normed, cfg.n_heads, cfg.window)
    x = x + ref_gate(block.attention_residual, x) * branch
    normed = ref_rms_norm(x, array(block.ffn_norm.weight), NORM_EPS)
    return x + ref_gate(block.ffn_residual, x) * ref_feed_forward(block.feed_forward, normed)


def ref_gate(residual, x):
    """LiGR (arXiv 2502.03417), or 1."""
    return 1.0 if residual.gate is None else 1 / (1 + np.exp(-x @ array(residual.gate.weight).T))


def ref_hidden(model, item_ids, user=None):
    """item_ids (T,) -> hidden (T, D) as SASRec's section III with a LLaMA2 block."""
    cfg, table = model.cfg, array(model.item_embedding.weight)
    x = table[item_ids] * np.sqrt(cfg.dim)
    for block in model.layers:
        x = ref_block(block, x, cfg)
    hidden = ref_rms_norm(x, array(model.norm.weight), NORM_EPS)
    if user is not None:
        hidden = hidden + array(model.user_embedding.weight)[user]
    return hidden, table


def random_gains(module):
    """Gains different from 1, so that a missing gain changes the result."""
    for part in module.modules():
        if isinstance(part, nn.RMSNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return module


# ---------------------------------------------------------------- shapes


def test_shapes():
    cfg = config(n_kv_heads=2)
    rotary = rotary_table(12, 4)
    assert rotary.shape == (12, 2, 2)
    assert rotate(torch.randn(3, 4, 12, 4), rotary).shape == (3, 4, 12, 4)
    x, ctx = torch.randn(3, 12, 16), context(cfg, 12)
    for part in (Attention(cfg), TransformerBlock(cfg)):
        assert part(x, ctx).shape == (3, 12, 16)
    assert FeedForward(cfg)(x).shape == (3, 12, 16)
    assert FeedForward(cfg).w1.weight.shape == (cfg.ffn_dim, 16)
    model, batch = build(), random_batch()
    assert model.encode(batch).shape == (5, 12, 16)
    assert model(batch).shape == (5, ITEMS + 1)
    assert model.item_table().shape == (ITEMS + 1, 16)


def test_loss_is_a_scalar_and_scores_are_float32():
    batch = random_batch()
    for dtype in ("float32", "bfloat16"):
        model = build(loss="softmax", dtype=dtype)
        assert model(batch).dtype == torch.float32
        assert model(batch | {"targets": batch["item_ids"]}).shape == ()


# ---------------------------------------------------------------- parity


def test_rope_is_the_papers():
    x = torch.randn(2, 3, 11, 8)
    out = rotate(x, rotary_table(11, 8))
    for b in range(2):
        for h in range(3):
            np.testing.assert_allclose(array(out[b, h]), ref_rotate(array(x[b, h])), atol=1e-5)


def test_rotation_in_real_arithmetic_is_the_complex_one(monkeypatch):
    """What torch.export and torch.compile take (test_export.py), on any leading shape of the angles."""
    x, rotary = torch.randn(2, 3, 11, 8), rotations(torch.rand(2, 1, 11) * 50, 8)
    expected = rotate(x, rotary)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rotary), expected, atol=1e-6, rtol=1e-6)


def test_rope_dot_products_depend_on_the_distance_only():
    q, k = torch.randn(8), torch.randn(8)
    rotary = rotary_table(20, 8)
    turned_q = rotate(q.expand(1, 1, 20, 8), rotary)[0, 0]
    turned_k = rotate(k.expand(1, 1, 20, 8), rotary)[0, 0]
    products = turned_q @ turned_k.T
    for distance in range(-10, 11):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert products.diagonal(1)[0] != pytest.approx(products.diagonal(2)[0].item(), abs=1e-3)


@pytest.mark.parametrize("n_kv_heads", [0, 1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("gated_residuals", [False, True])
def test_block_is_the_papers(n_kv_heads, window, gated_residuals):
    cfg = config(n_kv_heads=n_kv_heads, window=window, gated_residuals=gated_residuals)
    torch.manual_seed(1)
    block = random_gains(TransformerBlock(cfg))
    x = torch.randn(2, 10, 16)
    out = block(x, context(cfg, 10, window))
    for b in range(2):
        np.testing.assert_allclose(array(out[b]), ref_block(block, array(x[b]), cfg), atol=2e-5)


@pytest.mark.parametrize("user_embedding", ["none", "explicit"])
@pytest.mark.parametrize("window", [0, 4])
def test_scores_are_the_references(user_embedding, window):
    model = random_gains(build(user_embedding=user_embedding, window=window, n_kv_heads=2))
    batch = random_batch()
    got, hidden = model(batch), model.encode(batch)
    for b, length in enumerate(batch["lengths"].tolist()):
        user = batch["user_ids"][b].item() if user_embedding == "explicit" else None
        expected, table = ref_hidden(model, batch["item_ids"][b, :length].numpy(), user)
        np.testing.assert_allclose(array(hidden[b, :length]), expected, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(array(got[b]), expected[-1] @ table.T, atol=2e-4, rtol=1e-4)


# ---------------------------------------------------------------- identities


def test_as_many_kv_heads_as_heads_is_multi_head():
    plain, grouped, batch = build(n_kv_heads=0), build(n_kv_heads=4), random_batch()
    grouped.load_state_dict(plain.state_dict())
    assert torch.equal(plain(batch), grouped(batch))


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_grouped_query_is_multi_head_with_repeated_keys_and_values(n_kv_heads):
    grouped, full = build(n_kv_heads=n_kv_heads), build(n_kv_heads=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("wk.weight", "wv.weight")):
            heads = weight.view(n_kv_heads, 4, 16)
            state[name] = heads.repeat_interleave(4 // n_kv_heads, dim=0).reshape(16, 16)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(random_batch()), full(random_batch()), atol=1e-5, rtol=1e-5)


def test_window_that_covers_all_is_full_attention():
    full, batch = build(), random_batch()
    for window in (12, 13, 1000):
        windowed = build(window=window)
        windowed.load_state_dict(full.state_dict())
        assert windowed.context(full_batch(12)).mask is None
        assert torch.equal(full(batch), windowed(batch))
    narrow = build(window=11)
    narrow.load_state_dict(full.state_dict())
    assert not torch.equal(full(batch)[0], narrow(batch)[0])


@pytest.mark.parametrize("window", [1, 2, 5, 7])
def test_window_mask(window):
    mask = build(window=window).context(full_batch(8)).mask
    naive = [[q - window < k <= q for k in range(8)] for q in range(8)]
    assert mask[0, 0].tolist() == naive


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 3},
        {"window": 1},
        {"n_kv_heads": 2},
        {"n_layers": 1},
        {"dtype": "bfloat16"},
        TIMED,
        HSTU,
        HSTU | {"window": 3},
        HSTU | {"request_time": True},
        HSTU | {"dtype": "bfloat16"},
    ],
)
def test_last_position_alone_is_the_last_of_all(changes):
    """The fast path of evaluation against its plain twin; the tolerance is rounding of sums in another
    order (bfloat16 keeps 8 bits)."""
    model, batch = build(**changes), random_batch()
    last = model.encode(batch)[torch.arange(5), batch["lengths"] - 1]
    alone = model.encode(batch, last_only=True)
    assert alone.shape == (5, 1, 16)
    tolerance = 5e-2 if changes.get("dtype") else 1e-5
    torch.testing.assert_close(alone[:, 0], last, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"n_kv_heads": 2}, TIMED, HSTU])
def test_future_never_changes_the_past(changes):
    model, batch = build(**changes), random_batch()
    before = model.encode(batch)
    for changed in range(1, 12):
        ids = batch["item_ids"].clone()
        ids[:, changed:] = torch.randint(1, ITEMS + 1, ids[:, changed:].shape)
        after = model.encode(batch | {"item_ids": ids})
        torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-6, rtol=1e-6)
        assert (after[:, changed:] - before[:, changed:]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"user_embedding": "explicit"}, TIMED, HSTU])
def test_padding_never_changes_real_positions(changes):
    model, batch = build(**changes), random_batch()
    hidden, scores = model.encode(batch), model(batch)
    by_position = ("item_ids", "timestamps", "next_timestamps")
    wide = {name: nn.functional.pad(batch[name], (0, 4)) for name in by_position}
    torch.testing.assert_close(model(batch | wide), scores, atol=1e-5, rtol=1e-5)
    for row, length in enumerate(batch["lengths"].tolist()):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        alone |= {name: alone[name][:, :length] for name in by_position}
        torch.testing.assert_close(model.encode(alone)[0], hidden[row, :length], atol=1e-5, rtol=1e-5)
        garbage = batch["item_ids"].clone()
        garbage[row, length:] = 3
        torch.testing.assert_close(model(batch | {"item_ids": garbage}), scores, atol=1e-6, rtol=1e-6)


def test_window_limits_how_far_one_layer_sees():
    model = build(window=3, n_layers=1)
    batch = random_batch()
    before = model.encode(batch)
    ids = batch["item_ids"].clone()
    ids[:, 0] = 1 + ids[:, 0] % ITEMS
    after = model.encode(batch | {"item_ids": ids})
    torch.testing.assert_close(after[:, 3:], before[:, 3:], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after[:, 2], before[:, 2])


def test_explicit_user_embedding_adds_the_users_factor():
    """SASRec, section III.E: r = (U_u + F) . M_i."""
    implicit, explicit, batch = build(), build(user_embedding="explicit"), random_batch()
    missing = explicit.load_state_dict(implicit.state_dict(), strict=False)
    assert missing.missing_keys == ["user_embedding.weight"] and not missing.unexpected_keys
    added = explicit.user_embedding.weight[batch["user_ids"]] @ explicit.item_embedding.weight.T
    torch.testing.assert_close(explicit(batch) - implicit(batch), added, atol=1e-5, rtol=1e-4)
    others = batch | {"user_ids": (batch["user_ids"] + 1) % USERS}
    assert (explicit(others) - explicit(batch)).abs().amax(1).min() > 1e-2
    assert torch.equal(implicit(others), implicit(batch))


def test_input_and_output_share_one_item_embedding():
    model = build()
    assert model.item_table().data_ptr() == model.item_embedding.weight.data_ptr()
    tall = [name for name, weight in model.named_parameters() if weight.shape[0] == ITEMS + 1]
    assert tall == ["item_embedding.weight"]


@pytest.mark.parametrize("loss", ["bce", "gbce", "sampled_softmax", "softmax"])
def test_padding_row_stays_zero_in_training(loss):
    model = build(loss=loss).train()
    batch = random_batch()
    batch["targets"] = batch["item_ids"].roll(-1, 1) * (batch["item_ids"] != 0)
    batch["negatives"] = torch.arange(1, 9)
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.5, lr=0.1))
    before = model.item_embedding.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
        optimizer.step()
    assert not model.item_embedding.weight[0].any()
    assert not torch.equal(model.item_embedding.weight, before)


@pytest.mark.parametrize("changes", [{}, TIMED, HSTU])
def test_every_parameter_gets_a_gradient(changes):
    model, batch = build(user_embedding="explicit", loss="softmax", **changes).train(), random_batch()
    model(batch | {"targets": batch["item_ids"]}).backward()
    assert [name for name, weight in model.named_parameters() if not weight.grad.abs().sum() > 0] == []


EVERYTHING = TIMED | {"profile_tokens": True, "user_embedding": "explicit"}
ALL_MODELS = {
    "llama": EVERYTHING,
    "hstu": EVERYTHING | HSTU | {"gated_residuals": False},
    "time head": {"time_tokens": "tokens", "time_head": True},
    "ctr": {"task": "ctr", "action_embedding": True},
}
EVERY_MODEL = pytest.mark.parametrize("changes", ALL_MODELS.values(), ids=ALL_MODELS.keys())


def build_large(cls=SequenceRecommender, **changes):
    """A model with all kinds of weights, and enough of each for statistics."""
    rng = np.random.default_rng(0)
    features = {"words": rng.integers(1, 50, (400, 3)), "text": rng.normal(size=(400, 96)).astype(np.float32)}
    codes = {"actions": 50, "contexts": 60}
    torch.manual_seed(0)
    cfg = config(dim=64, hidden_dim=192, n_layers=3, **changes)
    return cls(cfg, LossConfig(), Vocabulary(400, 500, (30, 40), codes, features, np.array([7, 300])))


@EVERY_MODEL
def test_weights_begin_as_the_table_says(changes):
    """By their current names: a new matrix must be added here with its initialisation."""
    model = build_large(**changes)
    unit, residual, zero = 64**-0.5, 1 / np.sqrt(2 * 3), 0.0
    embeddings = ("item_embedding", "user_embedding", "token_embedding")
    std = dict.fromkeys((*embeddings, "wq", "wk", "wv", "wu", "w1", "w3", "hidden"), unit)
    std |= {"wo": unit * residual, "w2": 192**-0.5 * residual, "gate": zero, "logit": zero}
    std |= dict.fromkeys(("position_embedding", "time_embedding", "code_embeddings", "logits"), zero)
    std |= {"of_hidden": unit, "of_recent": 128**-0.5, "inner": 128**-0.5, "of_statistics": 3**-0.5}
    std |= dict.fromkeys(("projections", "gates"), zero)  # of content
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            assert "norm" not in name or (weight == float(name.endswith("weight"))).all(), name
            continue
        (expected,) = [value for part, value in std.items() if part in name.split(".")]
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(weight.mean().item()) <= 0.05 * expected, name
    assert not model.item_embedding.weight[[0, 7, 300]].any()


@EVERY_MODEL
def test_the_name_of_a_module_decides_nothing(changes):
    """With all modules renamed, initial weights are bit-identical and the optimizer groups are the same."""

    class Renamed(SequenceRecommender):
        def init_weights(self):
            items = self.item_embedding
            for module in list(self.modules()):
                children = list(module.children())
                module._modules.clear()
                for i, child in enumerate(children):
                    module.add_module(f"embedding_norm_gate_wo_{i}", child)
            self._modules["item_embedding"] = items  # the method asks for it, and finds it once more
            super().init_weights()

    found = []
    for cls in (SequenceRecommender, Renamed):
        model = build_large(cls, **changes)
        place = {id(weight): i for i, weight in enumerate(model.parameters())}
        groups = build_optimizer(model, TrainConfig()).param_groups
        found.append(
            (list(model.parameters()), [[place[id(w)] for w in group["params"]] for group in groups])
        )
    (plain, groups), (renamed, same_groups) = found
    assert groups == same_groups and all(groups)
    assert sorted(sum(groups, [])) == list(range(len(plain)))
    assert all(torch.equal(one, other) for one, other in zip(plain, renamed, strict=True))


def test_dropout_acts_in_training_only():
    model, batch = build(dropout=0.5), random_batch()
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


def test_same_seed_same_weights():
    first, second, other = build(seed=3), build(seed=3), build(seed=4)
    assert torch.equal(first(random_batch()), second(random_batch()))
    assert not torch.equal(first(random_batch()), other(random_batch()))


@pytest.mark.parametrize("changes", [{}, HSTU])
def test_bfloat16_is_close_to_float32(changes):
    full, half = build(**changes), build(dtype="bfloat16", **changes)
    half.load_state_dict(full.state_dict())
    expected, got = full(random_batch()), half(random_batch())
    assert not torch.equal(expected, got)  # else it is not bfloat16
    assert (expected - got).norm() / expected.norm() < 0.03
    assert all(weight.dtype == torch.float32 for weight in half.parameters())


@pytest.mark.parametrize("changes", [{}, HSTU])
def test_compiled_blocks_give_the_same_numbers(changes):
    plain = build(n_layers=1, loss="softmax", **changes)
    compiled = copy.deepcopy(plain)
    for layer in compiled.layers:
        # All of torch.compile but its code generator, which takes half a minute.
        layer.compile(dynamic=True, backend="aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for width in (12, 9):
        batch = random_batch(width=width)
        batch["targets"] = batch["item_ids"]
        compiled.zero_grad(), plain.zero_grad()
        losses = [model(batch) for model in (plain, compiled)]
        torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)
        for loss in losses:
            loss.backward()
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
