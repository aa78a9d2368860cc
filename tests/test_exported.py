"""scripts/export.py: the graph against the model, in whole rows and action by action, and the folder."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from launch import MAIN, TINY, here, write_csv

from model import SequenceRecommender
from reclm.adapt.quantize import BITS, quantize_model
from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.serve import Catalogue, Recommender
from reclm.serve.about import About
from reclm.serve.exported import Layout, OnnxEngine, open_graph
from reclm.serve.person import Person, Reads, make_batch
from reclm.serve.step import check_exportable, most_actions, write_graph
from reclm.serve.trained import TorchEngine

sys.path.insert(0, str(MAIN.parent / "scripts"))
import export

NEEDS = "needs requirements-export.txt"
onnx, *_ = [pytest.importorskip(name, reason=NEEDS) for name in ("onnx", "onnxscript", "onnxruntime")]

NUM_ITEMS, MAX_LEN = 80, 12
MODELS = {  # together, everything that a graph can hold
    "llama": {
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "gated_residuals": True,
        "position_embedding": True,
        "profile_tokens": True,
        "action_embedding": True,
        "item_features": "genres",
    },
    "window": {"window": 5, "time_tokens": "embedding", "dtype": "bfloat16"},
    "hstu": {
        "n_layers": 1,
        "model_name": "hstu",
        "time_tokens": "embedding",
        "request_time": True,
        "profile_tokens": True,
        "action_embedding": True,
    },
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@dataclass
class Pair:
    """A model, its reference before any preparation, and the recommenders of both runtimes."""

    model: SequenceRecommender
    torch: Recommender
    onnx: Recommender
    path: object


def build(settings):
    """A model whose every weight has an effect, in float32."""
    cfg = ModelConfig(**{"dim": 32, "n_layers": 2, "n_heads": 2, "max_len": MAX_LEN} | settings)
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(
        NUM_ITEMS,
        9,
        (3, 4) if cfg.profile_tokens else (),
        {"actions": 5} if cfg.action_embedding else {},
        {"genres": rng.integers(0, 7, (NUM_ITEMS, 3))} if cfg.item_features else {},
    )
    torch.manual_seed(0)
    model = SequenceRecommender(cfg, LossConfig(), vocabulary).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.cfg = replace(cfg, dtype="float32")
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("graphs"), {}

    def get(name):
        if name not in made:
            made[name] = make_pair(name, folder / f"{name}.onnx")
        return made[name]

    return get


def make_pair(name, path):
    model = build(MODELS[name])
    cfg, reference = model.cfg, copy.deepcopy(model)
    times = cfg.time_tokens != "none"
    codes = {"actions": list("12345")} if cfg.action_embedding else {}
    profile = {"gender": ["F", "M"], "age": ["1", "18", "25"]} if cfg.profile_tokens else {}
    reads = Reads(MAX_LEN, times, cfg.request_time, 0.0, codes, profile, False)
    engine = TorchEngine(model)
    write_graph(engine.model, times, {"dataset": "made"}, path)
    layout = Layout(model.inputs.first_profile.tolist(), cfg.request_time, most_actions(model))
    catalogue = Catalogue(range(101, 101 + NUM_ITEMS), [], [], np.zeros(0))
    rest = catalogue, reads, About({"task": "matching"}, "made", "none", "never")
    ours = OnnxEngine(open_graph(path), layout)
    return Pair(reference, Recommender(engine, *rest), Recommender(ours, *rest), path)


def person(seed, length):
    rng = np.random.default_rng(seed)
    times = 1e9 + np.cumsum(rng.integers(0, 9000, length)).astype(float)
    items = rng.integers(1, NUM_ITEMS + 1, length)
    codes, profile = {"actions": rng.integers(0, 6, length)}, rng.integers(0, 3, 2)
    return Person(items, times, codes, profile, at=times[-1] + 3000.0)


@torch.no_grad()
def scores_of_model(pair, people):
    """(B, V) scores of the untouched model"""
    batch = make_batch(people, pair.torch.reads)
    return pair.model({name: torch.from_numpy(array) for name, array in batch.items()}).numpy()


# ---------------------------------------------------------------- the graph


@EVERY_MODEL
@pytest.mark.parametrize("lengths", [[1], [MAX_LEN], [3, 1, 7], [30, 2, 12, 5, 1, 40, 9]], ids=str)
def test_a_graph_gives_the_scores_of_the_model(pairs, name, lengths):
    pair, people = pairs(name), [person(seed, length) for seed, length in enumerate(lengths)]
    expected, engine = scores_of_model(pair, people), pair.onnx.engine
    batch = make_batch(people, pair.onnx.reads)
    hidden = engine.hidden(batch)
    np.testing.assert_allclose(hidden @ engine.table.T, expected, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(hidden, pair.torch.engine.hidden(batch), atol=1e-5, rtol=1e-5)
    (scores,) = engine.run(["scores"], engine.lay_out(batch))
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=1e-5)
    for ours, theirs in zip(scores, expected, strict=True):
        assert (np.argsort(-ours[1:])[:50] == np.argsort(-theirs[1:])[:50]).all()


def test_a_large_batch_is_cut(pairs, monkeypatch):
    engine, people = pairs("llama").onnx.engine, [person(seed, 9) for seed in range(5)]
    batch = make_batch(people, pairs("llama").onnx.reads)
    whole = engine.hidden(batch)
    monkeypatch.setattr("reclm.serve.exported.PAIRS", 300)  # two rows of 11 tokens at once
    sizes = []
    monkeypatch.setattr(
        engine, "run", lambda *args: sizes.append(len(args[1]["last"])) or OnnxEngine.run(engine, *args)
    )
    np.testing.assert_allclose(engine.hidden(batch), whole, atol=1e-6)
    assert sizes == [2, 2, 1]


@EVERY_MODEL
def test_a_session_equals_reading_the_history_again(pairs, name):
    pair, whole = pairs(name), person(3, 3 * MAX_LEN)
    reads, session = pair.onnx.reads, pair.onnx.session()
    kept, started = 0, None

    def check():
        expected = scores_of_model(pair, [session.person])[0]
        np.testing.assert_allclose(session.hidden @ pair.onnx.engine.table.T, expected, atol=1e-4, rtol=1e-5)

    for place in range(len(whole)):
        rating = whole.codes["actions"][place] if reads.codes else 0
        times = {}
        if reads.times:
            after = min(place + 1, len(whole) - 1)
            times = {"time": whole.times[place], "next_time": whole.times[after]}
        session.add(str(100 + whole.items[place]), str(rating) if rating else None, **times)
        kept, started = kept + (session.state is started), session.state
        check()
        if place == 5:  # an edit: the second item goes, the others stay
            session.set(session.person.keep(np.arange(6) != 1))
            check()
            started = session.state
    most = pair.onnx.engine.layout.most_actions
    assert most == (2 * MAX_LEN if name == "window" else MAX_LEN)
    assert kept >= most - 3, "the history was read again though there was room"


def test_a_profile_counts_in_a_session(pairs):
    pair = pairs("llama")
    found = []
    for gender in "FM":
        session = pair.onnx.session(pair.onnx.person(["101"], profile={"gender": gender}))
        session.add("102")
        found.append(session.hidden)
        expected = pair.torch.engine.hidden(make_batch([session.person], pair.torch.reads))[0]
        np.testing.assert_allclose(session.hidden, expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_graph_says_where_it_is_from_but_not_on_which_machine(pairs):
    proto = onnx.load(pairs("llama").path)
    assert {prop.key: prop.value for prop in proto.metadata_props} == {"dataset": "made"}
    assert str(MAIN.parent).encode() not in proto.SerializeToString()


@EVERY_MODEL
@pytest.mark.parametrize("kind", list(BITS))
def test_integers_are_stored_once_and_mean_what_they_mean_in_torch(pairs, tmp_path, kind, name):
    pair, path = pairs(name), tmp_path / "small.onnx"
    model = copy.deepcopy(pair.torch.engine.model)
    shutil.copyfile(pair.path, path)
    export.quantize(path, model, kind)
    tensors = onnx.load(path).graph.initializer
    blocks = sum(part.weight.numel() for part in model.layers.modules() if isinstance(part, torch.nn.Linear))
    codes = [tensor for tensor in tensors if tensor.name.endswith("_codes")]
    count = sum(math.prod(tensor.dims) for tensor in codes)
    assert count == (NUM_ITEMS + 1) * model.cfg.dim + blocks
    assert 8 * sum(len(tensor.raw_data) for tensor in codes) == BITS[kind] * count
    small = OnnxEngine(open_graph(path), pair.onnx.engine.layout)
    theirs = TorchEngine(quantize_model(model, kind))
    batch = make_batch([person(1, 9)], pair.onnx.reads)
    numbers = np.arange(NUM_ITEMS + 1)
    np.testing.assert_allclose(small.table, theirs.table[numbers], atol=1e-6)
    if model.cfg.dtype == "float32":  # exports compute in float32
        np.testing.assert_allclose(small.hidden(batch), theirs.hidden(batch), atol=1e-4)
    difference = np.abs(small.hidden(batch) - pair.onnx.engine.hidden(batch)).max()
    assert difference > 1e-3, "the weights of the blocks are not rounded"


@pytest.mark.parametrize(
    "settings", [{"user_embedding": "explicit"}, {"time_tokens": "tokens"}, {"task": "ctr"}], ids=str
)
def test_other_models_are_refused(settings):
    with pytest.raises(UserError, match="cannot be exported"):
        check_exportable(build(settings))


# ---------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoint of a tiny run, and its export with the users."""
    folder = tmp_path_factory.mktemp("exported")
    data = write_csv(folder / "data.csv")
    here(f"--dataset={data}", "--num_epochs=1", "--out_dir=run", *TINY, cwd=folder).ok()
    script("--with_users", cwd=folder, out="exported").ok()
    return folder


def script(*flags, cwd, out):
    flags = ("--ckpt_name=run/best.pth", f"--out={out}", *flags)
    return here(*flags, cwd=cwd, program=lambda: export.run_script(export.main))


@pytest.fixture
def exported(trained, tmp_path):
    """A copy of the export to damage, in a copy of the folder of the run"""
    shutil.copytree(trained / "exported", tmp_path / "exported")
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "exported"


@pytest.fixture
def at_once(monkeypatch, trained):
    """Take the graph of the export that is there, since making one takes seconds."""
    graph = trained / "exported" / "model.onnx"
    monkeypatch.setattr(export, "write_graph", lambda *args: shutil.copyfile(graph, args[-1]))


def run_python(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_export_recommends_as_its_checkpoint_does_without_torch_and_pandas(trained):
    code = f"""
import json, sys
sys.path.insert(0, {str(MAIN.parent)!r})
from reclm.serve import Recommender
recommender = Recommender.load("exported")
print(json.dumps([item.id for item in recommender.recommend(["i3", "i4"], k=9)]))
print(json.dumps([item.id for item in recommender.recommend(recommender.user("u7"), k=9)]))
print(json.dumps([name for name in ("torch", "pandas", "onnx", "tqdm") if name in sys.modules]))
"""
    listed, of_user, imported = map(json.loads, run_python(code, trained).splitlines())
    recommender = Recommender.load(trained / "run" / "best.pth")
    assert listed == [item.id for item in recommender.recommend(["i3", "i4"], k=9)]
    assert of_user == [item.id for item in recommender.recommend(recommender.user("u7"), k=9)]
    assert imported == []
    ours = Recommender.load(trained / "exported")
    assert ours.about == recommender.about and ours.reads == recommender.reads
    assert (ours.catalogue.counts == recommender.catalogue.counts).all()


def test_the_lines_in_readme_print_five_titles(trained):
    text = (trained / "exported" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) == 10
    best = Recommender.load(trained / "exported").recommend(re.findall(r"'(i\d+)'", code), k=5)
    assert run_python(code, trained / "exported").splitlines() == [item.title for item in best]


@pytest.mark.parametrize("name", ["model.onnx", "items.parquet", "README.md", "histories.npz"])
def test_an_edited_or_missing_file_is_one_line(exported, name):
    content = (exported / name).read_bytes()
    (exported / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} is truncated or was edited"):
        Recommender.load(exported)
    (exported / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        Recommender.load(exported)


def test_a_damaged_or_foreign_folder_is_one_line(exported, tmp_path):
    with pytest.raises(UserError, match="is not an export"):
        Recommender.load(tmp_path)
    path = exported / "config.json"
    config = json.loads(path.read_text())
    for damage, message in (
        ({"format": 99}, "another version"),
        ({"reads": {"what": 1}}, "damaged"),
        ({"files": None}, "damaged"),
        ({"files": {}}, "damaged"),
    ):
        path.write_text(json.dumps(config | damage))
        with pytest.raises(UserError, match=message):
            Recommender.load(exported)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="is not an export"):
        Recommender.load(exported)


def test_only_an_export_is_overwritten(exported, at_once):
    folder = exported.parent
    assert "exists" in script(cwd=folder, out="exported").errors[0]
    script("--overwrite", "--quantize=int8", cwd=folder, out="exported").ok()
    assert not (exported / "histories.npz").exists(), "the users stay out unless they are asked for"
    with pytest.raises(UserError, match="comes without its users"):
        Recommender.load(exported).user("u1")
    (exported / "thesis.txt").write_text("mine")
    refused = script("--overwrite", cwd=folder, out="exported")
    assert refused.code == 2 and "not an export and nothing else" in refused.errors[0]
    assert (exported / "thesis.txt").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == {"exported", "run"}


def test_what_fails_leaves_nothing(exported, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_graph", full)
    failed = script(cwd=exported.parent, out="other")
    assert failed.code == 2 and "No space left" in failed.errors[0]
    (exported.parent / "run" / "histories.npz").unlink()
    failed = script("--with_users", cwd=exported.parent, out="other")
    assert failed.code == 2 and "no histories.npz" in failed.errors[0]
    assert {path.name for path in exported.parent.iterdir()} == {"exported", "run"}


def test_a_missing_extra_is_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    failed = script(cwd=exported.parent, out="other")
    assert failed.code == 2 and "pip install -r requirements-export.txt" in failed.errors[0]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is not installed: pip install"):
        Recommender.load(exported)
