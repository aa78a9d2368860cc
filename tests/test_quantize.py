"""Quantization and training for it, against torch's own greedy search, numpy and the float32 model."""

import signal
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from launch import MAIN, TINY, here, read_json, read_state, snapshot, torchrun, write_csv
from test_losses import NewTensors
from test_main import assert_same_run, stop_after
from torch import nn

from model import SequenceRecommender
from reclm.adapt import quantize
from reclm.adapt.qat import Rounded, train_for
from reclm.adapt.quantize import (
    BITS,
    QuantizedRows,
    QuantizedTable,
    num_bytes,
    quantize_model,
    quantize_rows,
)
from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.serve import Recommender
from reclm.serve.person import make_batch
from reclm.serve.service import Limits, Source
from reclm.serve.small_tables import SmallTable
from reclm.serve.top_k import score_items

sys.path.insert(0, str(MAIN.parent / "scripts" / "bench"))
import shrink

EACH = pytest.mark.parametrize("kind", list(BITS))
ITEMS, DIM = 50, 32


def made_rows(count=300, width=64, seed=0):
    """Rows of different sizes, some with an outlier, as item vectors have."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator) * torch.rand(count, 1, generator=generator)
    rows[::5, 3] *= 4
    return rows


def build(loss="sampled_softmax", **settings):
    torch.manual_seed(0)
    cfg = ModelConfig(dim=DIM, max_len=8, n_heads=2, dropout=0.0, **settings)
    vocabulary = Vocabulary(ITEMS, 4, (), cold_items=np.array([7]))
    return SequenceRecommender(cfg, LossConfig(loss=loss), vocabulary)


def batch(targets=True):
    torch.manual_seed(1)
    drawn = torch.randint(1, ITEMS + 1, (4, 9))
    made = {"item_ids": drawn[:, :-1], "lengths": torch.full((4,), 8), "user_ids": torch.arange(4)}
    made["num_before"] = torch.zeros(4, dtype=torch.long)
    extra = {"targets": drawn[:, 1:], "negatives": 1 + torch.randperm(ITEMS)[:16]}
    return made | (extra if targets else {})


def values_of(rows, bits):
    """By the formula of the module's docstring, in float64"""
    codes, scale, offset = quantize_rows(rows, bits)
    assert (scale > 0).all(), "codes of rows without a range are undefined"
    assert codes.dtype == torch.uint8 and codes.max().item() < 2**bits
    assert scale.dtype == offset.dtype == torch.float16
    return codes.double() * scale.double() + offset.double()


def errors(rows, values):
    return (rows.double() - values).square().sum(1)


# ---------------------------------------------------------------- rows


def test_8_bits_are_the_nearest_of_255_steps_over_the_range():
    rows = made_rows()
    x = rows.double().numpy()
    low = x.min(1, keepdims=True).astype(np.float16).astype(np.float64)
    scale = ((x.max(1, keepdims=True) - low) / 255).astype(np.float16).astype(np.float64)
    expected = np.clip(np.rint((x - low) / scale), 0, 255)
    codes, _, _ = quantize_rows(rows, 8)
    assert (codes.numpy() != expected).mean() < 1e-3  # halves, decided by the last bit of float32
    np.testing.assert_allclose(values_of(rows, 8), expected * scale + low, atol=float(scale.max()) * 1.01)
    assert (np.abs(values_of(rows, 8).numpy() - x) <= scale / 2 + np.abs(low) * 2**-11 + scale).all()


def torch_reference(row, bits=4):
    """The squared error of torch's own greedy search for one row, which ends at a local optimum"""
    high, low = torch.choose_qparams_optimized(row, len(row), n_bins=200, ratio=0.16, bit_width=bits)
    offset = low.half().double()
    scale = ((high.double() - offset) / (2**bits - 1)).half().double()
    codes = ((row.double() - offset) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + offset - row).square().sum()


def test_4_bits_are_no_worse_than_the_greedy_search_of_torch():
    rows = made_rows()
    ours = errors(rows, values_of(rows, 4))
    theirs = torch.stack([torch_reference(row) for row in rows])
    assert (ours <= theirs * 1.001 + 1e-9).all()
    plain = errors(rows, unclipped(rows))
    assert (ours <= plain * 1.001).all() and ours.sum() < 0.9 * plain.sum()


def unclipped(rows):
    low, high = rows.aminmax(dim=1, keepdim=True)
    scale, offset = quantize.grid(low, high, 4)
    return quantize.encode(rows, scale, offset, 4).double() * scale.double() + offset.double()


def test_4_bits_are_close_to_the_best_of_all_ranges():
    """Brute force over every pair of cuts that the greedy search could reach."""
    rows = made_rows(40).double()
    low, high = rows.aminmax(dim=1, keepdim=True)
    step, best = (high - low) / 200, torch.full((40,), torch.inf).double()
    for left in range(33):
        for right in range(33 - left):
            offset = low + left * step
            scale = (high - right * step - offset) / 15
            values = ((rows - offset) / scale).round().clamp(0, 15) * scale + offset
            best = torch.minimum(best, (values - rows).square().sum(1))
    ours = errors(rows.float(), values_of(rows.float(), 4))
    assert ours.sum() < 1.03 * best.sum()


@EACH
def test_rows_without_a_range_are_exact(kind):
    """The padding row and cold items are 0 and stay 0."""
    rows = torch.tensor([0.0, 0.25, -3.0, 0.1])[:, None].repeat(1, 8)
    values = values_of(rows, BITS[kind])
    assert torch.equal(values[:3], rows[:3].double())
    assert torch.allclose(values[3], torch.tensor(0.1).double(), rtol=2**-11)


@EACH
def test_values_are_those_of_the_formula_whole_or_by_number(kind, monkeypatch):
    monkeypatch.setattr(quantize, "AT_ONCE", 7)
    rows, bits = made_rows(20), BITS[kind]
    table = QuantizedRows(rows, bits)
    torch.testing.assert_close(table().double(), values_of(rows, bits), rtol=0, atol=1e-6)
    index = torch.tensor([[3, 19, 0], [3, 3, 5]])
    assert torch.equal(table(index), table()[index])
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert torch.equal(quantize.unpack(quantize.pack(codes)), codes)


def test_a_row_takes_so_many_bytes():
    rows = made_rows(100, 64)
    assert num_bytes(QuantizedRows(rows, 8)) == 100 * (64 + 2 + 2)
    assert num_bytes(QuantizedRows(rows, 4)) == 100 * (32 + 2 + 2)


@EACH
def test_scores_are_products_with_the_values_and_make_no_float_table(kind, monkeypatch):
    monkeypatch.setattr(quantize, "SCORED_AT_ONCE", 64)
    rows, hidden = made_rows(1000, 32), torch.randn(3, 32)
    table = QuantizedTable(rows, BITS[kind])
    expected = hidden.double() @ values_of(rows, BITS[kind]).T
    with NewTensors(64 * 32 + 1) as made:
        scores = table.scores(hidden)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert made.shapes == [(3, 1000)]
    small = SmallTable(table)
    np.testing.assert_array_equal(score_items(hidden.numpy(), small), scores)
    np.testing.assert_array_equal(small[np.array([5, 999])], table()[[5, 999]])


# ---------------------------------------------------------------- models


def rounded_model(model, kind):
    """The same model with float weights of the quantized values, in groups as documented"""
    model, bits = deepcopy(model).eval(), BITS[kind]
    with torch.no_grad():
        weight = model.item_embedding.weight
        weight.copy_(values_of(weight, bits))
        for layer in model.layers.modules():
            if isinstance(layer, nn.Linear):
                weight = layer.weight
                groups = weight.reshape(-1, 32) if bits == 4 else weight
                weight.copy_(values_of(groups, bits).view(weight.shape))
    return model


@pytest.mark.parametrize("settings", [{}, {"model_name": "hstu"}, {"gated_residuals": True}], ids=str)
@EACH
def test_a_quantized_model_is_the_model_of_rounded_weights(kind, settings):
    model = build(**settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    expected = rounded_model(model, kind)(batch(targets=False))
    before = model.eval()(batch(targets=False))
    small = quantize_model(model, kind)
    scores = small(batch(targets=False))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert 1e-3 < (scores - before).abs().max() < before.abs().max()


@EACH
def test_a_quantized_model_of_impressions_is_that_of_rounded_weights(kind):
    model = build(task="ctr")
    nn.init.normal_(model.head.logit.weight)
    asked = batch(targets=False) | {"candidate_ids": torch.tensor([[1, 2, 9]]).repeat(4, 1)}
    asked["history_lengths"] = torch.full((4, 3), 8)
    expected, before = rounded_model(model, kind)(asked), model.eval()(asked)
    logits = quantize_model(model, kind)(asked)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, before, rtol=1e-4, atol=1e-4)


def test_none_changes_nothing():
    model = build()
    names = [type(module) for module in model.modules()]
    assert quantize_model(model, "none") is model
    train_for(model, "none")
    assert [type(module) for module in model.modules()] == names


def test_the_bytes_of_a_model_are_counted_by_hand():
    model, ffn = build(n_layers=1), 96
    matrices = 4 * DIM * DIM + 3 * DIM * ffn
    norms = 3 * DIM
    assert num_bytes(model) == 4 * ((ITEMS + 1) * DIM + matrices + norms)
    assert num_bytes(quantize_model(deepcopy(model), "int4")) == (
        (ITEMS + 1) * (DIM // 2 + 4) + matrices // 32 * 20 + 4 * norms
    )
    rows = 4 * DIM + 2 * ffn + DIM  # outputs of wq wk wv wo, w1 w3, w2
    assert num_bytes(quantize_model(deepcopy(model), "int8")) == (
        (ITEMS + 1) * (DIM + 4) + matrices + 4 * rows + 4 * norms
    )


@EACH
def test_content_becomes_part_of_the_rows(kind):
    torch.manual_seed(0)
    cfg = ModelConfig(dim=DIM, max_len=8, item_features="genres")
    features = {"genres": np.random.default_rng(0).integers(0, 5, (ITEMS, 2))}
    vocabulary = Vocabulary(ITEMS, 4, (), features=features)
    model = SequenceRecommender(cfg, LossConfig(), vocabulary).eval()
    nn.init.normal_(model.content.projections[0].weight)
    table = model.item_table().detach()
    small = quantize_model(model, kind)
    assert small.content is None
    expected = values_of(table, BITS[kind])
    torch.testing.assert_close(small.item_table()().double(), expected, rtol=0, atol=1e-6)


def test_groups_that_do_not_divide_a_width_are_named():
    cfg = ModelConfig(dim=48, max_len=8)
    model = SequenceRecommender(cfg, LossConfig(), Vocabulary(ITEMS, 4, ()))
    names = [name for name, _ in model.named_modules()]
    for call, flag in ((quantize_model, "quantize"), (train_for, "qat")):
        with pytest.raises(UserError, match=f"--{flag}=int4 needs .* 32, but layers.0.attention.wq reads 48"):
            call(model, "int4")
    assert [name for name, _ in model.named_modules()] == names
    quantize_model(model, "int8")


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_weights_that_float16_cannot_scale_are_refused(value):
    model = build()
    with torch.no_grad():
        model.item_embedding.weight[3, 0] = value
    with pytest.raises(UserError, match="not finite or beyond 65,504"):
        quantize_model(model, "int4")


# ---------------------------------------------------------------- training for it


@EACH
def test_rounding_is_the_identity_in_the_backward_pass(kind):
    rows = made_rows(20, 32).requires_grad_()
    factors = torch.randn(20, 32)
    rounded = Rounded.apply(rows, BITS[kind])
    torch.testing.assert_close(rounded.double(), values_of(rows, BITS[kind]), rtol=0, atol=1e-6)
    (rounded * factors).sum().backward()
    assert torch.equal(rows.grad, factors)


@pytest.mark.parametrize("loss", ["sampled_softmax", "softmax"])
@EACH
def test_a_step_has_the_gradients_of_the_rounded_model(kind, loss):
    """Loss and gradients are those at the rounded weights, of which it changes the exact ones."""
    model = build(loss)
    expected = rounded_model(model, kind).train()
    trained = deepcopy(model)
    train_for(trained, kind)
    assert trained.state_dict().keys() == model.state_dict().keys()
    losses = [part.train()(batch()) for part in (trained, expected)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for value in losses:
        value.backward()
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert torch.equal(trained.item_embedding.weight, model.item_embedding.weight)
    assert not trained.item_embedding.weight.grad[0].any(), "padding is trained"


# ---------------------------------------------------------------- commands

WIDE = [*TINY, "--dim=32", "--dataset=tiny.csv", "--num_negatives=16"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a run of a small world, which it learns, and one trained for int4."""
    folder = tmp_path_factory.mktemp("quantize")
    write_csv(folder / "tiny.csv")
    here(*WIDE, "--num_epochs=12", "--out_dir=run", cwd=folder).ok()
    here(*WIDE, "--num_epochs=3", "--qat=int4", "--ema=.9", "--out_dir=qat", cwd=folder).ok()
    return folder


def test_evaluations_of_formats_lie_side_by_side(work):
    found = {}
    for kind in ("none", "int8", "int4"):
        shown = here("--eval_only=true", "--out_dir=run", f"--quantize={kind}", cwd=work).ok().stdout
        name = "eval-best.json" if kind == "none" else f"eval-best-{kind}.json"
        found[kind] = read_json(work / "run" / name)
        assert found[kind]["quantize"] == kind and shown.count(f"best.pth, {kind} (") == 2 * (kind != "none")
    quality = {kind: result["test"]["NDCG@10"] for kind, result in found.items()}
    assert quality["none"] > 0.5, "not learned"
    assert quality["int8"] == pytest.approx(quality["none"], rel=0.01)
    assert quality["int4"] == pytest.approx(quality["none"], rel=0.1)
    assert found["none"]["bytes"] > 3 * found["int8"]["bytes"] > 4 * found["int4"]["bytes"]
    before = snapshot(work / "run")
    here("--eval_only=true", "--out_dir=run", "--quantize=int4", cwd=work).ok()
    after = snapshot(work / "run")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"eval-best-int4.json"}


def test_a_checkpoint_trained_for_int4_is_an_ordinary_one_of_the_values_it_was_tested_with(work):
    plain, trained = (read_state(work / name / "best.pth") for name in ("run", "qat"))
    assert plain["model"].keys() == trained["model"].keys()
    result = read_json(work / "qat" / "result.json")
    assert result["quantize"] == "int4"
    here("--eval_only=true", "--out_dir=qat", "--quantize=int4", cwd=work).ok()
    evaluated = read_json(work / "qat" / "eval-best-int4.json")
    for name, value in result["test"].items():
        assert evaluated["test"][name] == pytest.approx(value, abs=1e-9), name
    shown = here("--eval_only=true", "--out_dir=qat", cwd=work).ok().stdout
    assert "best.pth (trained with --qat=int4) (" in shown


def test_training_for_it_resumes_to_the_same_bits(work, monkeypatch):
    flags = [*WIDE, "--num_epochs=2", "--qat=int4"]
    here(*flags, "--out_dir=whole", cwd=work).ok()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert here(*flags, "--out_dir=part", cwd=work).code == 128 + signal.SIGTERM
    here(*flags, "--out_dir=part", "--resume=auto", cwd=work).ok()
    assert_same_run(work / "part", work / "whole")
    message = here(*flags[:-1], "--qat=int8", "--out_dir=part", "--resume=auto", cwd=work).errors
    assert len(message) == 1 and "--qat=int8 contradicts" in message[0]


def test_two_processes_train_for_it_as_one_does(work):
    flags = [*WIDE, "--num_epochs=1", "--qat=int8"]
    torchrun(2, *flags, "--out_dir=two", cwd=work).ok()
    here(*flags, "--out_dir=one", cwd=work).ok()
    ours, theirs = (read_state(work / name / "last.pth")["model"] for name in ("two", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-3, msg=name)


@EACH
def test_a_quantized_recommender_scores_as_the_evaluation_does(work, kind):
    small = Recommender.load(work / "run" / "best.pth", quantize=kind)
    plain = Recommender.load(work / "run" / "best.pth")
    assert small.about.trained == f"{plain.about.trained}, {kind}"
    assert num_bytes(small.engine.model.item_embedding) == 26 * (4 + 32 * BITS[kind] // 8)
    values = small.engine.table[np.arange(26)]
    for user in ("u1", "u5"):
        person = small.user(user)
        hidden = small.engine.hidden(make_batch([person], small.reads))
        np.testing.assert_allclose(score_items(hidden, small.engine.table), hidden @ values.T, atol=1e-5)
        assert small.recommend(person, 1)[0].id == plain.recommend(person, 1)[0].id
    cosines = values[1:] @ values[4] / np.linalg.norm(values[1:], axis=1) / np.linalg.norm(values[4])
    best = max((value, number) for number, value in enumerate(cosines.tolist(), 1) if number != 4)
    found = small.similar(small.catalogue.ids[3], 1)[0]
    assert found.id == small.catalogue.ids[best[1] - 1] and found.score == pytest.approx(best[0], abs=1e-5)
    session = small.session()
    for item in ("i3", "i4", "i5"):
        session.add(item)
    again = small.recommend(["i3", "i4", "i5"], 3)
    assert [item.id for item in session.recommend(3)] == [item.id for item in again]
    assert small.why(["i3", "i4"], [again[0].id])


def test_a_server_keeps_the_format_when_it_loads_again(work):
    source = Source(work / "run" / "best.pth", quantize="int4")
    for _ in range(2):
        model = source.load(Limits())
        assert isinstance(model.recommender.engine.table, SmallTable)


def test_an_export_is_as_it_was_written(tmp_path):
    with pytest.raises(UserError, match="is an export: export its checkpoint with --quantize=int4"):
        Recommender.load(tmp_path, quantize="int4")


# ---------------------------------------------------------------- scripts/bench/shrink.py


def test_the_share_that_is_kept_has_the_error_of_a_mean_over_users():
    base = [np.array([1.0, 0.0, 0.5, 0.0]), np.array([1.0, 1.0, 0.5, 0.0])]
    assert shrink.share_kept(base, base) == {"mean": 1.0, "se": 0.0}
    assert shrink.share_kept([2 * base[0], 2 * base[1]], base) == {"mean": 2.0, "se": 0.0}
    ours = [base[0], np.array([1.0, 0.0, 0.5, 0.0])]
    mean, kept = np.array([1.0, 0.5, 0.5, 0.0]), 1.5 / 2
    off = np.array([1.0, 0.0, 0.5, 0.0]) - kept * mean
    found = shrink.share_kept(ours, base)
    assert found == pytest.approx({"mean": kept, "se": off.std(ddof=1) / 2 / mean.mean()})


def test_the_table_of_the_bench_is_that_of_the_evaluations(work, monkeypatch):
    monkeypatch.setattr(shrink, "MANY_ITEMS", 500)
    monkeypatch.setattr(shrink, "exported_bytes", lambda path, kind: 1000 // (1 + len(kind)))
    flags = ["run/best.pth", "--qat_int4=qat/best.pth", "--rounds=1", "--out=shrink.json"]
    here(*flags, cwd=work, program=lambda: shrink.run_script(shrink.main)).ok()
    found, rows = read_json(work / "shrink.json"), {}
    rows = {row[""]: row for row in found["table"]}
    assert list(rows) == ["float32", "int8", "int4", "int4, trained for it"]
    here("--eval_only=true", "--out_dir=run", "--quantize=int8", cwd=work).ok()
    expected = read_json(work / "run" / "eval-best-int8.json")
    assert found["formats"]["int8"]["NDCG@10"]["mean"] == pytest.approx(expected["test"]["NDCG@10"])
    assert found["formats"]["int8"]["bytes in memory"] == expected["bytes"]
    assert rows["int8"]["NDCG@10"] == f"{expected['test']['NDCG@10']:.4f}".removeprefix("0")
    assert found["million items"]["int4"]["bytes"] == 501 * 36
    refused = here(
        "run/best.pth",
        "--qat_int8=a,b",
        "--out=no.json",
        cwd=work,
        program=lambda: shrink.run_script(shrink.main),
    )
    assert refused.errors == ["error: --qat_int8 names 2 checkpoints, there are 1"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--qat=int3"], "int3"),
        (["--quantize=int2"], "int2"),
        (["--quantize=int4"], "--quantize=int4 is for --eval_only=true: to train for it use --qat"),
        (["--qat=int4", "--compile=true"], "--qat=int4 does not go with --compile=True: leave one out"),
        (["--qat=int8", "--item_features=genres"], "--qat=int8 does not go with --item_features=genres"),
        (["--qat=int8", "--item_table=pq"], "--qat=int8 needs --item_table=dense"),
        (["--qat=int4", "--dim=48"], "layers.0.attention.wq reads 48: use --qat=int8"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_claims_no_folder(work, flags, named):
    before = snapshot(work)
    result = here(*WIDE, "--num_epochs=1", *flags, "--out_dir=bad", cwd=work)
    assert result.code and len(result.errors) == 1 and named in result.errors[0], result.text
    assert snapshot(work) == before
