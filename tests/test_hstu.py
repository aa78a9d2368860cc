"""HSTU against a float64 reference written from the paper, one position after the other."""

import math

import numpy as np
import pytest
import torch
from launch import here, read_json, write_csv
from test_model import array, build, random_batch

from reclm.config import ModelConfig
from reclm.nn import hstu
from reclm.nn.context import Context
from reclm.nn.layers import TIME_BUCKETS


def silu(x):
    return x / (1 + np.exp(-x))


def ref_layer_norm(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
    return scaled * array(norm.weight) + array(norm.bias)


def ref_block(block, x, window=0, times=None, query_times=None):
    """x (T, D) of one sequence -> (T, D): arXiv 2402.17152, eq. 1 to 3."""
    bias, width = block.relative_bias, block.head_dim
    normed = ref_layer_norm(x, block.attention_norm)
    u, v, q, k = (silu(normed @ array(w.weight).T) for w in (block.wu, block.wv, block.wq, block.wk))
    out = np.zeros_like(x)
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if not window or s > t - window]
        n = len(seen)
        for head in range(x.shape[1] // width):
            part = slice(head * width, (head + 1) * width)
            for s in seen:
                rab = array(bias.position)[t - s]
                if times is not None:
                    seconds = query_times[t] - times[s]
                    rab += array(bias.time)[min(TIME_BUCKETS[0] - 1, int(math.log(1 + seconds) / 0.3))]
                out[t, part] += silu(q[t, part] @ k[s, part] + rab) * v[s, part] / n
    return x + (ref_layer_norm(out, block.output_norm) * u) @ array(block.wo.weight).T


def random_block(seed=0, **changes):
    torch.manual_seed(seed)
    cfg = ModelConfig(model_name="hstu", max_len=150, dim=8, n_heads=2, dropout=0.0, **changes)
    block = hstu.HSTUBlock(cfg).double()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return block


def sequences(rows=3, length=11, seed=0):
    """x (B, T, D), timestamps (B, T + 1) with gaps from seconds to years."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(rows, length, 8)))
    gaps = 10.0 ** rng.uniform(-2, 9, (rows, length + 1))
    return x, torch.from_numpy(1e9 + gaps.cumsum(1))


def whole_rows(length, times=None, query_times=None, window=0):
    positions = torch.arange(length)[None]
    return Context(positions, positions, None, window, times, query_times)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("time", ["none", "own", "request"])
def test_block_is_the_papers(window, time):
    block, (x, times) = random_block(), sequences()
    known, asked = times[:, :-1], times[:, 1:] if time == "request" else times[:, :-1]
    if time == "none":
        known = asked = None
    got = block(x, whole_rows(x.shape[1], known, asked, window))
    for row in range(len(x)):
        clock = () if known is None else (array(known[row]), array(asked[row]))
        expected = ref_block(block, array(x[row]), window, *clock)
        np.testing.assert_allclose(array(got[row]), expected, atol=1e-9)


def test_parts_are_the_whole(monkeypatch):
    """More rows than ROWS and more scores than SCORES at once, kept or recomputed, against one part;
    gradients too."""
    x, times = sequences(rows=5, length=135)
    found = []
    for rows, scores, kept in ((64, 1, 0), (64, 2**18, 0), (64, 2**18, 2**23), (10**6, 10**9, 2**23)):
        for name, value in (("ROWS", rows), ("SCORES", scores), ("KEPT_SCORES", kept)):
            monkeypatch.setattr(hstu, name, value)
        block, inputs = random_block(), x.clone().requires_grad_()
        out = block(inputs, whole_rows(135, times[:, :-1], times[:, :-1]))
        (out**2).sum().backward()
        found.append([out, inputs.grad, *(weight.grad for weight in block.parameters())])
    for part in found[:-1]:
        for one, other in zip(part, found[-1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_gradients():
    block, (x, times) = random_block(), sequences(rows=2, length=5)
    ctx = whole_rows(5, times[:, :-1], times[:, :-1])
    names = [name for name, _ in block.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x, ctx))

    weights = [weight.detach().clone().requires_grad_() for weight in block.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *weights))


def test_too_many_scores_are_not_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(hstu, "KEPT_SCORES", 140 * 140)
    block, (x, times) = random_block(), sequences(rows=2, length=140)
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x, whole_rows(140, times[:, :-1], times[:, :-1]))
    assert max(sizes) < 140 * 140


def test_request_time_reaches_the_scores_only_when_asked_for():
    batch = random_batch()
    later = batch | {"next_timestamps": batch["next_timestamps"] * 1.7}
    for request_time in (False, True):
        model = build(model_name="hstu", request_time=request_time)
        for layer in model.layers:
            torch.nn.init.normal_(layer.relative_bias.time)
        assert torch.equal(model(batch), model(later)) != request_time


def test_without_timestamps_the_time_bias_is_off():
    batch = random_batch()
    timeless = {name: value for name, value in batch.items() if "timestamps" not in name}
    model = build(model_name="hstu", loss="softmax")
    before = model(timeless)
    for layer in model.layers:
        torch.nn.init.normal_(layer.relative_bias.time)
    assert torch.equal(model(timeless), before) and not torch.equal(model(batch), before)
    model(timeless | {"targets": timeless["item_ids"]}).backward()  # DDP: a gradient for every parameter
    assert all(weight.grad is not None for weight in model.parameters())


def test_runs_name_what_they_knew_of_time(tmp_path):
    data = write_csv(tmp_path / "timed.csv")
    flags = [f"--dataset={data}", "--model_name=hstu", "--dim=8", "--num_epochs=1", "--device=cpu"]
    shown = here(*flags, "--request_time=true", "--out_dir=a", cwd=tmp_path).ok().stdout
    assert "NOTE: the model knows the time of the item to predict" in shown
    assert "history left out, request time known" in shown
    assert read_json(tmp_path / "a" / "result.json")["request_time"] is True
    shown = here(*flags, "--out_dir=b", cwd=tmp_path).ok().stdout
    assert "request time" not in shown and "the model knows" not in shown


def test_last_query_alone_sees_all_of_a_long_history():
    """Longer than ROWS, where queries are processed in parts, but a single query is not."""
    torch.manual_seed(0)
    batch = random_batch(rows=3, width=hstu.ROWS + 9)
    model = build(model_name="hstu", max_len=hstu.ROWS + 9)
    last = model.encode(batch)[torch.arange(3), batch["lengths"] - 1]
    torch.testing.assert_close(model.encode(batch, last_only=True)[:, 0], last, atol=1e-5, rtol=1e-5)
