"""--adapter and --train_only, adapter files, --init_match, and many adapters in one batch."""

# ruff: noqa: E402 (imports come after the check that peft is there)

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from launch import MAIN, TINY, here, read_json, read_state, snapshot, torchrun, write_csv
from test_bad_input import assert_refused

if importlib.util.find_spec("peft") is None:
    pytest.skip("pip install -r requirements-adapt.txt", allow_module_level=True)
safetensors = pytest.importorskip("safetensors.torch", reason="pip install -r requirements-adapt.txt")

import main
from main import open_checkpoint
from model import SequenceRecommender
from reclm.adapt import lora
from reclm.adapt.many import ManyAdapters
from reclm.config import LossConfig, ModelConfig, build_config
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.run.checkpoint import load_checkpoint
from reclm.run.init_from import Base, hash_weights, plain_title
from reclm.serve import Recommender

LAYERS = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1")
LAYERS += ("feed_forward.w2", "feed_forward.w3")
START = ("--init_from=base/best.pth", "--dataset=tiny.csv")
RUNS = {  # name: flags
    "lora": ("--adapter=lora", "--adapter_rank=4"),
    "dora": ("--adapter=dora", "--adapter_rank=2", "--adapter_targets=wq,w2,table", "--ema=0.9"),
    "table": ("--adapter=lora", "--adapter_rank=3", "--adapter_targets=table"),
    "hstu": ("--adapter=lora", "--model_name=hstu", "--init_from=hstu_base/best.pth"),
}


def train(cwd, name, *flags, program=here):
    return program(*TINY, "--num_epochs=2", *flags, f"--out_dir={name}", cwd=cwd).ok().stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """base/ and hstu_base/, trained on tiny.csv, and an adapter run of each entry of RUNS"""
    cwd = tmp_path_factory.mktemp("adapt")
    write_csv(cwd / "tiny.csv")
    films = [f"i{i},Film {i} ({1950 + i}),Drama" for i in range(25)]
    (cwd / "tiny.items.csv").write_text("\n".join(["item,title,genres", *films]) + "\n")
    train(cwd, "base", "--dataset=tiny.csv")
    train(cwd, "hstu_base", "--dataset=tiny.csv", "--model_name=hstu")
    for name, flags in RUNS.items():
        train(cwd, name, *START, *flags, "--lr=0.05")
    return cwd


def states(cwd, name):
    """(of the base, of the run)"""
    base = "hstu_base" if name == "hstu" else "base"
    return load_checkpoint(cwd / base / "best.pth"), load_checkpoint(cwd / name / "best.pth")


def opened(cwd, name):
    """(settings, data, model with the merged weights, the state) of a run"""
    path = cwd / name / "best.pth"
    with chdir(cwd):
        return *open_checkpoint({}, path), load_checkpoint(path)


def adapted(cwd, name):
    """The unmerged model of a run, as it was evaluated in training"""
    cfg, dataset, plain, state = opened(cwd, name)
    model = SequenceRecommender(cfg.model, cfg.loss, dataset.vocabulary)
    lora.adapt(model, cfg, Base(**state["base"]))
    model.load_state_dict(state["averaged"])
    return cfg, dataset, model.eval(), plain.eval()


def some_batch(dataset):
    return next(iter(main.TrainBatches(dataset, 16, LossConfig(), build_config({}).train).epoch(0)))[1][0]


def scores_of(model, batch):
    with torch.inference_mode():
        return model({name: x for name, x in batch.items() if name != "targets"})


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", RUNS)
def test_the_base_stays_as_it_was_to_the_last_bit(work, name):
    base, state = states(work, name)
    _, _, model, _ = adapted(work, name)
    weights, own = lora.split_weights(model, Base(**state["base"]))
    assert weights.keys() == base["model"].keys() and own
    for key, weight in base["model"].items():
        assert torch.equal(weights[key], weight), key
    changed = {key for key in weights if not torch.equal(state["model"][key], weights[key])}
    assert changed == {f"{key.rpartition('.')[0]}.weight" for key in own}


def test_only_adapters_are_in_the_optimizer(work):
    _, state = states(work, "lora")
    sizes = {"w1": (16, 64), "w3": (16, 64), "w2": (64, 16)}
    wanted = sum(4 * sum(sizes.get(layer[-2:], (16, 16))) for layer in LAYERS)
    moments = [max(x.numel() for x in value.values()) for value in state["optimizer"]["state"].values()]
    assert len(moments) == 2 * len(LAYERS) and sum(moments) == wanted
    shown = here("--describe", *TINY, *START, *RUNS["lora"], cwd=work).ok().stdout
    assert f"({wanted:,} of them trained)" in shown


@pytest.mark.parametrize("name", RUNS)
def test_merged_weights_give_the_same_scores(work, name):
    _, dataset, model, plain = adapted(work, name)
    batch = some_batch(dataset)
    torch.testing.assert_close(scores_of(plain, batch), scores_of(model, batch), atol=1e-5, rtol=1e-5)
    base, state = states(work, name)
    path = work / ("hstu_base" if name == "hstu" else "base") / "best.pth"
    found = lora.with_adapter(base, path, work / name / lora.FILE)["model"]
    assert all(torch.equal(found[key], weight) for key, weight in state["model"].items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_layer_against_the_papers(kind):
    """In float64, with other numbers than those that training starts from."""
    torch.manual_seed(0)
    model = SequenceRecommender(ModelConfig(dim=16), LossConfig(), Vocabulary(20, 3)).double()
    flags = {"adapter": kind, "adapter_rank": 3, "adapter_targets": "wq,table", "init_from": "some"}
    weight, table = model.layers[1].attention.wq.weight.clone(), model.item_embedding.weight.detach().clone()
    lora.adapt(model, build_config(flags), Base("some", "", [], torch.zeros(0, dtype=torch.long)))
    model.double()
    own = dict(model.named_parameters())
    prefix, x = "layers.1.attention.wq", torch.randn(5, 16, dtype=torch.float64)
    for parameter in own.values():
        if parameter.requires_grad:
            torch.nn.init.uniform_(parameter, 0.5, 1.0)
    a, b = (own[f"{prefix}.lora_{part}.default.weight"] for part in "AB")
    update = weight + 16 / 3 * b @ a
    if kind == "dora":
        length = own[f"{prefix}.lora_magnitude_vector.default.weight"]
        update = torch.stack([length[i] * row / row.square().sum().sqrt() for i, row in enumerate(update)])
    torch.testing.assert_close(model.layers[1].attention.wq(x), x @ update.T)
    a, b = (own[f"item_embedding.parametrizations.weight.0.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(model.item_table(), table + 16 / 3 * b @ a)
    merged = lora.merge(*lora.split_weights(model, Base("some", "", [], None)))
    torch.testing.assert_close(merged[f"{prefix}.weight"], update)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_resumed_run_ends_with_the_same_bits(work, name):
    flags = (*START, *RUNS[name], "--lr_min=1")
    train(work, f"{name}_whole", *flags)
    train(work, f"{name}_parts", *flags, "--num_epochs=1")
    shown = here("--resume=auto", f"--out_dir={name}_parts", "--num_epochs=2", cwd=work).ok().stdout
    assert "resuming" in shown
    whole, parts = (read_state(work / f"{name}_{which}" / "last.pth") for which in ("whole", "parts"))
    for entry in ("model", "trained", "averaged"):
        assert whole[entry].keys() == parts[entry].keys()
        assert all(torch.equal(weight, parts[entry][key]) for key, weight in whole[entry].items()), entry
    for i, values in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][i][key]) for key, value in values.items())
    files = [safetensors.load_file(work / f"{name}_{which}" / lora.FILE) for which in ("whole", "parts")]
    assert all(torch.equal(weight, files[1][key]) for key, weight in files[0].items())


def test_a_checkpoint_of_an_adapter_is_evaluated_as_any_other(work):
    here("--eval_only=true", "--ckpt_name=dora/best.pth", cwd=work).ok()
    found, wanted = read_json(work / "dora" / "eval-best.json"), read_json(work / "dora" / "result.json")
    assert found["test"] == wanted["test"]
    refused = here("--eval_only=true", "--ckpt_name=dora/best.pth", "--adapter=lora", cwd=work)
    assert_refused(refused, "--adapter=lora contradicts")


def test_two_processes_train_the_same_adapter(work):
    flags = (*START, *RUNS["lora"], "--num_epochs=1")
    train(work, "one", *flags)
    train(work, "two", *flags, program=lambda *flags, cwd: torchrun(2, *flags, cwd=cwd))
    one, two = (safetensors.load_file(work / name / lora.FILE) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 2 * len(LAYERS)
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=1e-4, rtol=1e-3)
    assert any(weight.abs().max() > 1e-3 for key, weight in two.items() if key.endswith("lora_B"))


@pytest.mark.parametrize("part", ["blocks", "table"])
def test_a_part_is_trained(work, part):
    train(work, f"only_{part}", *START, f"--train_only={part}", "--num_epochs=1")
    base, state = states(work, f"only_{part}")
    pairs = {name: (weight, base["model"][name]) for name, weight in state["model"].items()}
    changed = {name for name, pair in pairs.items() if not torch.equal(*pair)}
    of_blocks = {name for name in base["model"] if not name.startswith("item_embedding")}
    assert changed == (of_blocks if part == "blocks" else base["model"].keys() - of_blocks)
    assert not (work / f"only_{part}" / lora.FILE).exists()


def test_nothing_changes_without_the_flags(work):
    """Same objects, same entries in a checkpoint, and peft is not imported."""
    model = SequenceRecommender(ModelConfig(dim=16), LossConfig(), Vocabulary(20, 3))
    before = dict(model.named_parameters())
    assert lora.adapt(model, build_config({"init_from": "some"}), Base("some", "", [], None)) is None
    assert all(before[name] is weight for name, weight in model.named_parameters())
    assert all(weight.requires_grad for weight in before.values())
    assert read_state(work / "base" / "best.pth").keys().isdisjoint({"trained", "averaged", "base"})
    code = "import main, sys; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=MAIN.parent)


# ---------------------------------------------------------------- files


def test_an_adapter_is_one_small_file_that_names_its_base(work):
    path = work / "lora" / lora.FILE
    adapter = lora.read_adapter(path)
    assert (adapter.name, adapter.kind, adapter.rank, adapter.targets) == ("lora", "lora", 4, "all")
    assert adapter.base == hash_weights(read_state(work / "base" / "best.pth")["model"])
    assert adapter.base_name == "base/best.pth"
    names = {f"layers.0.{layer}.lora_{part}" for layer in LAYERS for part in "AB"}
    assert adapter.weights.keys() == names
    assert path.stat().st_size < 4 * sum(weight.numel() for weight in adapter.weights.values()) + 2500


def recommended(work, *flags):
    sys.path.insert(0, str(MAIN.parent / "scripts"))
    import recommend

    return here("--history=i3;i4;i5", "--k=4", *flags, cwd=work, program=recommend.main)


def test_recommend_takes_an_adapter(work):
    """The list of the base with it is that of the run."""
    base, with_it, run = (
        recommended(work, *flags).stdout
        for flags in (
            ["--ckpt_name=base/best.pth"],
            ["--ckpt_name=base/best.pth", f"--adapter=lora/{lora.FILE}"],
            ["--ckpt_name=lora/best.pth"],
        )
    )
    assert with_it == run and with_it != base


def test_an_adapter_of_another_base_is_refused_by_name(work):
    base = work / "lora" / "best.pth"  # merged, so not the base
    with pytest.raises(UserError) as caught:
        lora.with_adapter(load_checkpoint(base), base, work / "lora" / lora.FILE)
    for word in ("lora/adapter.safetensors", "base/best.pth", "lora/best.pth"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match="not the folder"):
        Recommender.load(work, merged=work / "lora" / lora.FILE)


def damage(path, how):
    about = {"format": lora.FORMAT, "kind": "lora", "rank": "4", "alpha": "16.0", "targets": "all"}
    with safetensors.safe_open(path, "pt") as file:
        about |= file.metadata()
    weights = safetensors.load_file(path)
    name = "layers.0.attention.wq.lora_A"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "text":
        path.write_text("no adapter")
    elif how == "foreign":
        safetensors.save_file(weights, path)
    else:
        if how == "rank":
            about["rank"] = "many"
        if how == "shape":
            weights[name] = weights[name][:2]
        if how == "half":
            del weights[name]
        if how == "layer":
            weights["layers.7.attention.wq.lora_A"] = weights[name].clone()
        safetensors.save_file(weights, path, metadata=about)


@pytest.mark.parametrize("how", ["cut", "text", "foreign", "rank", "shape", "half", "layer", "gone"])
def test_a_damaged_file_is_one_line(work, tmp_path, how):
    path = tmp_path / "some.safetensors"
    if how != "gone":
        shutil.copy(work / "lora" / lora.FILE, path)
        damage(path, how)
    state = load_checkpoint(work / "base" / "best.pth")
    with pytest.raises(UserError, match=r"some\.safetensors") as caught:
        lora.with_adapter(state, Path("base.pth"), path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- refusals


REFUSED = {
    "no base": (["--dataset=tiny.csv", "--adapter=lora"], "needs --init_from=BASE.pth"),
    "no base for a part": (["--dataset=tiny.csv", "--train_only=table"], "needs --init_from=BASE.pth"),
    "rank 0": ([*START, "--adapter=lora", "--adapter_rank=0"], "--adapter_rank=0"),
    "rank": ([*START, "--adapter=lora", "--adapter_rank=17"], "is larger than wq: it must be at most 16"),
    "target": ([*START, "--adapter=lora", "--adapter_targets=wq,w9"], "no layer 'w9', but wq, wk, wv"),
    "rank without": ([*START, "--adapter_rank=4"], "--adapter_rank=4 has no effect with --adapter=none"),
    "targets without": ([*START, "--adapter_targets=wq"], "--adapter_targets=wq has no effect"),
    "part and adapter": ([*START, "--adapter=lora", "--train_only=table"], "table has no effect"),
    "match without": (["--dataset=tiny.csv", "--init_match=title"], "--init_match=title needs --init_from"),
    "vectors of users": ([*START, "--adapter=lora", "--user_embedding=explicit"], "no adapter holds"),
    "new table": ([*START, "--adapter=lora", "--adapter_targets=table", "--init_match=none"], "table is new"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_before_a_folder(work, case):
    flags, words = REFUSED[case]
    assert_refused(here(*TINY, *flags, "--out_dir=refused", cwd=work), words)
    assert not (work / "refused").exists()


def test_missing_peft_is_one_line(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    shown = here(*TINY, *START, "--adapter=lora", "--out_dir=refused", cwd=work)
    assert_refused(shown, "pip install -r requirements-adapt.txt")
    assert not (work / "refused").exists()


def test_a_checkpoint_with_a_foreign_base_is_refused(work):
    state = read_state(work / "lora" / "last.pth")
    (work / "foreign").mkdir()
    shutil.copy(work / "lora" / "best.pth", work / "foreign")
    for entry, value in (("fresh", ["no.such"]), ("new_items", torch.tensor([26])), ("name", 3)):
        torch.save(state | {"base": state["base"] | {entry: value}}, work / "foreign" / "last.pth")
        before = snapshot(work / "foreign")
        refused = here("--resume=foreign/last.pth", "--out_dir=foreign", "--num_epochs=2", cwd=work)
        assert_refused(refused, "foreign/last.pth is damaged or foreign")
        assert snapshot(work / "foreign") == before


# ---------------------------------------------------------------- other data


@pytest.fixture(scope="module")
def other(work):
    """Other users and ids: films 20 .. 24 of tiny.csv, with other punctuation, and five that are new"""
    rows = [f"{u},{100 + (u + t) % 10},{t}" for u in range(30) for t in range(4 + u % 5)]
    (work / "other.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    films = [f"{100 + i},film: {20 + i} ({1970 + i})" for i in range(5)]
    films += [f"{105 + i},New {i} (2001)" for i in range(5)]
    (work / "other.items.csv").write_text("\n".join(["item,title", *films]) + "\n")
    return work


BY_TITLE = {
    "by_title": ["--adapter=lora"],
    "by_title_blocks": ["--train_only=blocks"],
    "by_title_table": ["--adapter=lora", "--adapter_targets=wq,table"],
}


@pytest.mark.parametrize("name", BY_TITLE)
def test_films_are_found_by_title(other, name):
    flags = ["--dataset=other.csv", "--init_from=base/best.pth", "--init_match=title", *BY_TITLE[name]]
    shown = train(other, name, *flags)
    assert "5 of 10 items are shared by title and year; 5 new items start untrained" in shown
    base, state = states(other, name)
    old, new = base["model"]["item_embedding.weight"], state["trained"]
    place = [base["items"].index(f"i{20 + i}") for i in range(5)]
    kept = new["item_embedding.parametrizations.weight.original"]
    assert torch.equal(kept[1:6], old[1:][place])
    rows = new["item_embedding.parametrizations.weight.0.rows.weight"]
    assert rows.shape == (5, 16) and not torch.equal(rows, kept[6:])  # trained
    merged = state["model"]["item_embedding.weight"]
    if "table" in name:
        assert not torch.equal(merged[1:6], old[1:][place])
    else:
        assert torch.equal(merged[1:6], old[1:][place]) and torch.equal(merged[6:], rows)
    if "--adapter=lora" in flags:
        adapter = lora.read_adapter(other / name / lora.FILE)
        assert torch.equal(adapter.weights["item_embedding.rows"], rows)
        with pytest.raises(UserError, match=r"other items, .*best\.pth of its run"):
            lora.with_adapter(base, Path("base.pth"), other / name / lora.FILE)
        here("--eval_only", f"--ckpt_name={name}/best.pth", cwd=other).ok()


def test_other_items_keep_the_blocks_alone(other):
    flags = ("--dataset=other.csv", "--init_from=base/best.pth", "--init_match=none", "--adapter=lora")
    shown = train(other, "none", *flags)
    assert "all 10 items start untrained" in shown
    base, state = states(other, "none")
    weights = lora.read_adapter(other / "none" / lora.FILE).weights
    assert torch.equal(weights["item_embedding.weight"], state["model"]["item_embedding.weight"])
    assert torch.equal(state["trained"]["norm.weight"], base["model"]["norm.weight"])


def test_weights_that_the_base_lacks_are_part_of_the_adapter(work):
    """As those of another input: the file is of no use without them, and the base has no place for them."""
    train(work, "more", *START, "--adapter=lora", "--position_embedding=true", "--num_epochs=1")
    base, state = states(work, "more")
    name = "inputs.position_embedding.embedding.weight"
    weights = lora.read_adapter(work / "more" / lora.FILE).weights
    assert torch.equal(weights[name], state["model"][name]) and weights[name].any()
    with pytest.raises(UserError, match=rf"base\.pth lacks \({name}\).* use best\.pth of its run"):
        lora.with_adapter(base, Path("base.pth"), work / "more" / lora.FILE)


def test_what_cannot_be_matched_is_refused(other):
    start = ("--dataset=other.csv", "--init_from=base/best.pth", "--out_dir=refused")
    assert_refused(here(*TINY, *start, cwd=other), "none is in other")
    write_csv(other / "untitled.csv")
    flags = ("--dataset=untitled.csv", *start[1:], "--init_match=title")
    assert_refused(here(*TINY, *flags, cwd=other), "untitled has no titles")
    assert plain_title("Star Wars: Episode IV (1977)") == plain_title("star wars episode IV 1977")


# ---------------------------------------------------------------- many


def random_adapters(model, count, with_table=True):
    """Adapters of several ranks, kinds and targets"""
    random = torch.Generator().manual_seed(3)
    modules = model.layers.named_modules(prefix="layers")
    layers = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    adapters = []
    for i in range(count):
        rank, weights = 1 + i % 5, {}
        for layer in layers[i % 3 :] + ["item_embedding"] * (with_table and i % 2):
            size, width = model.get_submodule(layer).weight.shape
            weights[f"{layer}.lora_A"] = 0.3 * torch.randn(rank, width, generator=random)
            weights[f"{layer}.lora_B"] = 0.02 * torch.randn(size, rank, generator=random)
            if layer == "item_embedding":
                weights[f"{layer}.lora_B"][0] = 0
            elif i % 4 == 0:
                weights[f"{layer}.magnitude"] = 0.5 + torch.rand(size, generator=random)
        adapters.append(lora.Adapter(f"a{i}", "lora", rank, 16.0, "", "", "", "", weights))
    return adapters


@pytest.mark.parametrize("name", ["llama", "hstu"])
def test_a_hundred_adapters_in_one_batch(name):
    torch.manual_seed(1)
    cfg = ModelConfig(model_name=name, dim=16, max_len=8)
    model = SequenceRecommender(cfg, LossConfig(), Vocabulary(40, 3)).eval()
    adapters = random_adapters(model, 100)
    lengths = torch.randint(1, 9, (101,))
    items = torch.randint(1, 41, (101, 8)) * (torch.arange(8) < lengths[:, None])
    batch = {"item_ids": items, "lengths": lengths, "num_before": torch.zeros(101, dtype=torch.long)}
    one_by_one = [scores_of(model, {key: x[:1] for key, x in batch.items()})]
    plain = model.state_dict()
    for i, adapter in enumerate(adapters, 1):
        alone = copy.deepcopy(model)
        alone.load_state_dict(lora.merge(plain, adapter.weights, adapter.alpha))
        one_by_one.append(scores_of(alone, {key: x[i : i + 1] for key, x in batch.items()}))
    one_by_one = torch.cat(one_by_one)
    many, table = ManyAdapters(model, adapters, False), model.item_table()
    ids = torch.randperm(101)  # rows in any order
    many.chosen.ids = ids
    with torch.inference_mode():
        hidden = model.encode({key: x[ids] for key, x in batch.items()}, last_only=True)[:, 0]
        together = hidden @ table.T + many.score_update(hidden, ids, slice(None))
    error = (together - one_by_one[ids]).abs().max() / one_by_one.abs().max()
    assert error < 1e-6, error
    assert (one_by_one[1:] - one_by_one[:1]).abs().max() > 0.1


@pytest.fixture(scope="module")
def markets(work):
    """A folder of adapters of base/, one of them with an update of the table"""
    (work / "markets").mkdir()
    for name in ("lora", "dora", "table"):
        shutil.copy(work / name / lora.FILE, work / "markets" / f"{name}.safetensors")
    return sorted((work / "markets").glob("*"))


def test_each_person_of_a_batch_names_an_adapter(work, markets):
    served = Recommender.load(work / "base" / "best.pth", adapters=markets)
    assert served.adapters == ["dora", "lora", "table"]
    history = ["i3", "i4", "i5"]
    names = ["lora", None, "table", "dora", "lora"]
    lists = served.recommend_batch([served.person(history, adapter=name) for name in names])
    for name, found in zip(names, lists, strict=True):
        alone = Recommender.load(work / (name or "base") / "best.pth")
        wanted = alone.recommend(history)
        assert [item.id for item in found] == [item.id for item in wanted]
        assert [item.score for item in found] == pytest.approx([item.score for item in wanted], abs=1e-5)
        session = served.session(served.person(history[:2], adapter=name))
        session.add(history[2])
        assert [item.id for item in session.recommend()] == [item.id for item in wanted]
        if name:
            reasons = served.why(served.person(history, adapter=name), ["i6"])[0]
            assert [r.id for r in reasons] == [r.id for r in alone.why(history, ["i6"])[0]]
    assert lists[0] != lists[1]
    with pytest.raises(UserError, match="no adapter 'mars', but dora, lora, table"):
        served.person(history, adapter="mars")


def test_requests_name_an_adapter(work, markets):
    pytest.importorskip("fastapi", reason="pip install -r requirements-serve.txt")
    pytest.importorskip("httpx2", reason="pip install -r requirements-dev.txt")
    from starlette.testclient import TestClient

    from reclm.serve.app import make_app
    from reclm.serve.choose import adapter_files
    from reclm.serve.service import Limits, Source

    assert adapter_files(str(work / "markets")) == markets
    assert {work / name / lora.FILE for name in RUNS} <= set(adapter_files(str(work)))
    assert adapter_files("a.safetensors, b.safetensors") == [Path("a.safetensors"), Path("b.safetensors")]
    source = Source(work / "base" / "best.pth", adapters=markets)
    with TestClient(make_app(source.load(Limits()), Limits())) as client:
        assert client.get("/model").json()["adapters"] == ["dora", "lora", "table"]
        for name in ("lora", "dora", None):
            asked = {"items": ["i3", "i4"], "adapter": name}
            shown = client.post("/recommend", json=asked).json()["items"]
            wanted = Recommender.load(work / (name or "base") / "best.pth").recommend(["i3", "i4"])
            assert [item["id"] for item in shown] == [item.id for item in wanted]
        refused = client.post("/recommend", json={"items": ["i3"], "adapter": "mars"})
        assert refused.status_code == 404 and "no adapter 'mars'" in json.loads(refused.text)["error"]


def test_files_that_cannot_be_served_together(work, markets, tmp_path):
    base = work / "base" / "best.pth"
    (tmp_path / "lora").mkdir()
    shutil.copy(markets[0], tmp_path / "lora" / lora.FILE)
    with pytest.raises(UserError, match="two adapters are called lora"):
        Recommender.load(base, adapters=[markets[1], tmp_path / "lora" / lora.FILE])
    with pytest.raises(UserError, match="serve it alone"):
        model = SequenceRecommender(ModelConfig(dim=16), LossConfig(), Vocabulary(20, 3))
        ManyAdapters(model, random_adapters(model, 2), True)
    from reclm.serve.choose import adapter_files

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no"):
        adapter_files(str(tmp_path / "empty"))
