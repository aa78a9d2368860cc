"""reclm/run/checkpoint.py: files of version 4, the contents of a file, and the files that are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import TINY, here, read_json, read_rows, read_state, write_csv

from data import eval_batches, impression_batches
from main import open_checkpoint
from model import SequenceRecommender
from reclm.config import FIELDS, build_config, fixed_names
from reclm.draws import Draws
from reclm.errors import UserError
from reclm.nn.layers import LEVELS, Dropout
from reclm.run.checkpoint import NO_LONGER, VERSION, load_checkpoint, merge_config, read_vocabulary

FOLDER = Path(__file__).parent / "version4"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
MODEL = [flag for flag in TINY if "num_negatives" not in flag]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with a small dataset and all its optional side files."""
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "tiny.csv")
    films = [f"i{i},Film {i} ({1950 + i}),{'Drama' if i % 2 else 'Comedy|Drama'}" for i in range(25)]
    (tmp_path / "tiny.items.csv").write_text("\n".join(["item,title,genres", *films]) + "\n")
    return tmp_path


@pytest.mark.parametrize("version", [None, 3, VERSION + 1, VERSION])
def test_another_versions_weights_are_refused(tmp_path, version):
    """Version 2 changed the channel pairs of the rotation: older weights would be another model."""
    names = ("model", "optimizer", "progress", "history", "config", "dataset", "fingerprint")
    state = dict.fromkeys(names, {}) | ({"version": version} if version else {})
    path = tmp_path / "last.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match="damaged" if version == VERSION else "another version"):
        load_checkpoint(path)


# ---------------------------------------------------------------- files of version 4


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_version_4_is_evaluated(work, name):
    here("--eval_only=true", f"--ckpt_name={FOLDER / name}.pth", "--out_dir=.", cwd=work).ok()
    found = read_json(work / f"eval-{name}.json")["valid"]
    for metric, value in EXPECTED[name]["valid"].items():
        assert found[metric] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_version_4_is_trained_to_the_end(work, name, monkeypatch):
    """The second of its two epochs ends with the same weights and result as in version 4, given the same
    dropout: its masks were drawn by torch's generator."""

    def forward(self, x, draws):
        if not self.training:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * LEVELS) - LEVELS // 2
        return x * kept * (LEVELS / (LEVELS - round(self.p * LEVELS)))

    monkeypatch.setattr(Dropout, "forward", forward)
    monkeypatch.setattr(Draws, "of", lambda batch: None)
    here(f"--resume={FOLDER / name}.pth", "--out_dir=run", cwd=work).ok()
    result, wanted = read_json(work / "run" / "result.json"), EXPECTED[name]
    assert result["best_epoch"] == wanted["best"]
    for metric, value in wanted["final_test"].items():
        assert result["test"][metric] == pytest.approx(value, abs=1e-6)
    state = read_state(work / "run" / "last.pth")
    assert state["version"] == VERSION and [row["epoch"] for row in state["history"]] == [0, 1]
    squares = sum(weight.double().square().sum().item() for weight in state["model"].values())
    assert squares == pytest.approx(wanted["weights"], rel=1e-5)


def test_the_rate_of_version_4_decides_whether_a_run_may_go_on_longer(work):
    """--schedule=constant has become --lr_min=1; a cosine has a fixed end."""
    for name, code in (("hstu", 0), ("matching", 2)):
        shown = here(f"--resume={FOLDER / name}.pth", f"--out_dir={name}", "--num_epochs=3", cwd=work)
        assert shown.code == code, shown.text
    assert "--num_epochs=3 contradicts" in shown.errors[0] and not (work / name).exists()
    assert [row["lr"] for row in read_rows(work / "hstu")] == [0.01] * 3


def test_ctr_starts_from_a_file_of_version_4(work):
    flags = [*MODEL, "--dataset=tiny.csv", "--model_name=hstu", "--task=ctr", "--ctr_split=random"]
    start = ["--positive_from=3", f"--init_from={FOLDER}/hstu.pth", "--num_epochs=1", "--lr=1e-30"]
    assert "trained with repeats=keep" in here(*flags, *start, "--out_dir=run", cwd=work).errors[0]
    shown = here(*flags, *start, "--repeats=keep", "--out_dir=run", cwd=work).ok().stdout
    assert f"started from {FOLDER}/hstu.pth: 14 of 18 tensors; new: head" in shown
    ours, theirs = read_state(work / "run" / "best.pth")["model"], read_state(FOLDER / "hstu.pth")["model"]
    feedback = theirs.pop("inputs.action_embedding.weight")
    assert torch.equal(ours["inputs.code_embeddings.actions.weight"], feedback)
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


CHANGED = {
    "scores": "cosine", "random_windows": 0.5, "attention_norm": "max_len", "norm_eps": 1e-5,
    "time_weight": 1.0, "gbce_t": 0.5, "split_seed": 1, "unordered_ok": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_LONGER)
def test_a_file_of_version_4_with_a_setting_that_is_gone_is_refused(work, name):
    state = read_state(FOLDER / "matching.pth")
    assert state["config"][name] == NO_LONGER[name]
    state["config"][name] = CHANGED[name]
    torch.save(state, work / "old.pth")
    with pytest.raises(UserError, match=rf"old\.pth was trained with a --{name} other than"):
        load_checkpoint(work / "old.pth")
    shown = here("--eval_only=true", "--ckpt_name=old.pth", "--out_dir=.", cwd=work)
    assert shown.code == 2 and len(shown.errors) == 1 and shown.text.count("\n") == 1
    assert f"--{name}" in shown.errors[0] and "the version that wrote it" in shown.errors[0]


@pytest.mark.parametrize(("task", "delay"), [("ctr", 0.0), ("matching", None)])
def test_histories_of_version_5_held_the_same_second(tmp_path, task, delay):
    state = read_state(FOLDER / "ctr.pth") | {"version": 5}
    state["config"] = {"task": task, "pad_to": "max_len"}
    torch.save(state, tmp_path / "old.pth")
    config = load_checkpoint(tmp_path / "old.pth")["config"]
    assert build_config(config).data.ctr_delay == delay and "pad_to" not in config


def test_a_time_head_of_version_5_is_refused(tmp_path):
    state = read_state(FOLDER / "matching.pth") | {"version": 5}
    state["config"]["time_head"] = True
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"old\.pth has an older kind of --time_head"):
        load_checkpoint(tmp_path / "old.pth")


# ---------------------------------------------------------------- the data in a file


def test_items_and_their_texts(work):
    here(*TINY, "--dataset=tiny.csv", "--num_epochs=1", "--out_dir=run", cwd=work).ok()
    state = load_checkpoint(work / "run" / "best.pth")
    numbers = [name.removeprefix("i") for name in state["items"]]
    assert sorted(numbers, key=int) == [str(i) for i in range(25)] and numbers == sorted(numbers)
    assert state["titles"] == [f"Film {i} ({1950 + int(i)})" for i in numbers]
    assert state["genre_names"] == ["Drama" if int(i) % 2 else "Comedy|Drama" for i in numbers]
    vocabulary = read_vocabulary(state)
    assert (vocabulary.num_items, vocabulary.num_users) == (25, 40)
    for name in ("profile_sizes", "code_sizes", "features", "cold_items"):
        assert len(getattr(vocabulary, name)) == 0


KINDS = {
    "plain": [],
    "content, profiles and feedback": [
        "--item_features=genres,year,some.npy", "--profile_tokens=true", "--action_embedding=true",
        "--user_embedding=explicit", "--time_tokens=embedding", "--ema=.9",
    ],
    "hstu, tokens of time, cold items": [
        "--model_name=hstu", "--time_tokens=tokens", "--cold_items=.2", "--item_features=some.npy",
    ],
    "ctr": ["--task=ctr", "--dataset=own.csv", "--profile_tokens=true", "--item_features=genres"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_built_from_the_file_alone(work, kind):
    """Without the data, its scores equal those of the trained model to the last bit."""
    users = [f"u{u},{'FM'[u % 2]},{20 + u}" for u in range(39)]  # of the last one nothing is known
    rng = np.random.default_rng(0)
    header, *rows = (work / "tiny.csv").read_text().splitlines()
    splits = rng.choice(["train", "valid", "test"], len(rows), p=[0.8, 0.1, 0.1])
    rows = [f"{row},{i % 3},{split}" for i, (row, split) in enumerate(zip(rows, splits, strict=True))]
    (work / "own.csv").write_text("\n".join([f"{header},context,split", *rows]) + "\n")
    for name in ("tiny", "own"):
        (work / f"{name}.users.csv").write_text("\n".join(["user,gender,age", *users]) + "\n")
    (work / "own.items.csv").write_text((work / "tiny.items.csv").read_text())
    np.save(work / "some.npy", rng.normal(size=(25, 5)))

    flags = [*(MODEL if "ctr" in kind else TINY), "--dataset=tiny.csv", *KINDS[kind], "--num_epochs=2"]
    here(*flags, "--out_dir=run", cwd=work).ok()
    path = Path("run/last.pth")
    _, dataset, trained = open_checkpoint({}, path)
    if kind == "ctr":
        assert trained.cfg.task == "ctr" and dataset.codes.keys() == {"actions", "contexts"}
        batches = list(impression_batches(dataset, "test", 16, 50))
    else:
        batches = list(eval_batches(dataset, "test", 16, 50))
    for batch in batches:
        batch.pop("labels", None)
    for file in [*work.glob("*.csv"), *work.glob("*.npy")]:
        file.unlink()

    state = load_checkpoint(path)
    cfg = build_config(state["config"])
    model = SequenceRecommender(cfg.model, cfg.loss, read_vocabulary(state))
    model.load_state_dict(state["model"])
    assert torch.equal(model.cold_items, trained.cold_items) and len(model.cold_items) == 5 * ("cold" in kind)
    with torch.inference_mode():
        for batch in batches:
            ours, theirs = model.eval()(batch), trained.eval()(batch)
            assert torch.equal(ours, theirs) and ours.std() > 0
    assert len(batches) > 0 and len(state["items"]) == 25


# ---------------------------------------------------------------- what a file fixes

OTHER = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.05}


@pytest.mark.parametrize("parts", [("model", "data"), ("model", "data", "trajectory")])
def test_what_is_fixed_cannot_be_changed_and_all_else_can(parts):
    saved = build_config({}).flat()
    fixed = fixed_names(saved, *parts)
    for name, value in saved.items():
        other = OTHER.get(type(value), lambda value: f"other than {value}")(value)
        assert other != value
        if name in fixed:
            with pytest.raises(UserError, match=rf"--{name}=.* contradicts a\.pth, which has {name}="):
                merge_config({name: other}, {"config": saved}, Path("a.pth"), *parts)
        else:
            merged = merge_config({name: other}, {"config": saved}, Path("a.pth"), *parts)
            assert merged == saved | {name: other}
        assert merge_config({name: value}, {"config": saved}, Path("a.pth"), *parts) == saved
    assert set(fixed) <= FIELDS.keys() and 0 < len(fixed) < len(saved)
