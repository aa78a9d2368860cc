"""--task=ctr from end to end: processes, files, --init_from a matching run, ranking own candidates."""

import hashlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from launch import (
    MAIN,
    TINY,
    here,
    in_small_batches,
    read_json,
    read_state,
    snapshot,
    torchrun,
    write_csv,
)
from sklearn.metrics import roc_auc_score
from test_bad_input import assert_refused

import evaluate
from evaluate import score_impressions
from main import open_checkpoint
from reclm.data import sources
from reclm.errors import run_script

sys.path.insert(0, str(MAIN.parent / "scripts"))
import recommend

SPLIT = ["--dataset=tiny.csv", "--ctr_split=random"]
MODEL = [flag for flag in TINY if "num_negatives" not in flag]
CTR = [*MODEL, *SPLIT, "--task=ctr"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A CTR run on two processes in `run`, and a matching run on the same rows in `matching`."""
    cwd = tmp_path_factory.mktemp("ctr")
    write_csv(cwd / "tiny.csv")
    same = ["--batch_size=3", "--num_epochs=2", "--out_dir=run"]
    shown = torchrun(2, *CTR, *same, cwd=cwd, program=in_small_batches(cwd)).ok().stdout
    assert shown.count("TEST, best validation epoch") == shown.count("protocol: CTR;") == 1
    here(*MODEL, *SPLIT, "--num_epochs=1", "--out_dir=matching", cwd=cwd).ok()
    return cwd


@pytest.fixture
def work(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "work", symlinks=True))


def test_the_number_of_processes_changes_no_metric(work, monkeypatch):
    """Trained and evaluated on two processes, then evaluated on one, without repeating --task."""
    monkeypatch.setattr(evaluate, "USERS_AT_ONCE", 7)  # as in the fixture
    result = read_json(work / "run" / "result.json")
    here("--eval_only=true", "--out_dir=run", cwd=work).ok()
    again = read_json(work / "run" / "eval-best.json")
    assert again["test"] == result["test"] and again["valid"] == result["valid"]
    assert result["test"].keys() >= {"AUC", "GAUC", "GAUC_users", "logloss", "NE"}
    assert not result.keys() & {"filter_seen", "loss", "num_users"} and result["num_processes"] == 2
    alone = ["--batch_size=3", "--num_epochs=2", "--out_dir=alone"]
    here(*CTR, *alone, cwd=work).ok()
    for split in ("valid", "test"):
        ours = read_json(work / "alone" / "result.json")[split]
        assert ours == pytest.approx(result[split], abs=1e-4)


def test_what_is_known_of_an_impression_may_be_another_in_evaluation(work):
    """Only with the split by time, where the rows and their order stay the same."""
    table = pd.read_csv(work / "tiny.csv")
    table.assign(timestamp=table["timestamp"] * 86400).to_csv(work / "days.csv", index=False)
    here(*MODEL, "--dataset=days.csv", "--task=ctr", "--num_epochs=1", "--out_dir=days", cwd=work).ok()
    here("--eval_only=true", "--ctr_history=train", "--out_dir=days", cwd=work).ok()
    past, train = (read_json(work / "days" / name) for name in ("result.json", "eval-best.json"))
    assert "training actions" not in past["protocol"] and "training actions" in train["protocol"]
    assert past["test"]["impressions"] == train["test"]["impressions"]
    assert past["test"]["logloss"] != train["test"]["logloss"]


def test_auc_is_that_of_scikit_learn_on_the_same_scores(work, monkeypatch):
    monkeypatch.chdir(work)
    _, dataset, model = open_checkpoint({}, Path("run/best.pth"))
    logits, labels, users = score_impressions(model, dataset, "test")
    table = pd.read_csv("tiny.csv")
    assert abs(len(logits) - 0.1 * len(table)) <= 1 and len(logits) == (dataset.splits == 2).sum()
    wanted = roc_auc_score(labels.numpy(), logits.numpy())
    assert read_json(work / "run" / "result.json")["test"]["AUC"] == pytest.approx(wanted, abs=1e-12)
    rows = np.flatnonzero(dataset.splits == 2)
    assert (dataset.ratings[rows] >= 4).tolist() == labels.bool().tolist()
    assert (np.repeat(np.arange(40), dataset.lengths)[rows] == users.numpy()).all()


def test_a_resumed_run_ends_in_the_same_weights(work):
    flags = [*CTR, "--lr_min=1", "--batch_size=3"]
    here(*flags, "--num_epochs=2", "--out_dir=whole", cwd=work).ok()
    here(*flags, "--num_epochs=1", "--out_dir=part", cwd=work).ok()
    here(*flags, "--num_epochs=2", "--out_dir=part", "--resume=auto", cwd=work).ok()
    ours, whole = (read_state(work / name / "last.pth")["model"] for name in ("part", "whole"))
    assert all(torch.equal(ours[name], weight) for name, weight in whole.items())


def test_a_split_with_one_class_has_no_auc_but_a_logloss(work, monkeypatch):
    monkeypatch.chdir(work)
    rows = [
        f"u{u},i{(u + t) % 9},{int(t % 2 or t > 5)},{('train', 'valid', 'test')[max(0, t - 5)]}"
        for u in range(30)
        for t in range(8)
    ]
    (work / "own.csv").write_text("\n".join(["user,item,label,split", *rows]) + "\n")
    shown = here(*MODEL, "--dataset=own.csv", "--task=ctr", "--num_epochs=2", "--out_dir=own", cwd=work).ok()
    result = read_json(work / "own" / "result.json")
    cfg, dataset, _ = open_checkpoint({"data_dir": "."}, work / "own" / "best.pth")
    assert cfg.model.action_embedding and dataset.codes["actions"].tolist() == (1 + dataset.labels).tolist()
    assert "AUC" not in result["test"] and 0 < result["test"]["logloss"] < 2
    assert re.search(r"AUC undefined: all labels are equal\n", shown.stdout)
    losses = [row["valid/logloss"] for row in read_state(work / "own" / "last.pth")["history"]]
    assert result["best_epoch"] == int(np.argmin(losses))


def test_the_recipe_of_tags_learns_what_the_tag_says(tmp_path, monkeypatch):
    """The label is 1 if either the tag or the item is odd, not both: only the context reveals it."""
    folder = tmp_path / "data" / "movielens-latest-x1"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 900), ("valid", 200), ("test", 200)):
        users, items, tags = rng.integers(0, (20, 4, 4), (count, 3)).T
        rows = zip(users, items, tags, (items + tags) % 2, strict=True)
        lines = ["user_id,item_id,tag_id,label", *(",".join(map(str, row)) for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    files = [folder / f"{name}.csv" for name in ("train", "valid", "test")]  # in reading order
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in files}
    monkeypatch.setattr(sources, "X1_MD5", md5)
    recipe = f"--config={MAIN.parent / 'configs' / 'ctr_movielens_latest.yaml'}"
    here(recipe, *MODEL, "--num_epochs=12", "--max_len=50", "--out_dir=tags", cwd=tmp_path).ok()
    result = read_json(tmp_path / "tags" / "result.json")
    assert result["test"]["AUC"] > 0.9 and "split as given" in result["protocol"]


# ---------------------------------------------------------------- starting from a matching run


def test_ctr_starts_from_the_weights_of_a_matching_run(work):
    frozen = [
        "--init_from=matching/best.pth",
        "--num_epochs=1",
        "--lr=1e-30",
        "--ema=.9",
        "--out_dir=started",
    ]
    shown = here(*CTR, *frozen, cwd=work).ok()
    assert "started from matching/best.pth" in shown.stdout and "new: head, inputs" in shown.stdout
    ours, theirs = (read_state(work / name / "best.pth")["model"] for name in ("started", "matching"))
    assert set(theirs) < set(ours)
    for name, weight in theirs.items():  # ours are averages over steps, but of equal numbers
        torch.testing.assert_close(ours[name], weight)


INIT = [*CTR, "--num_epochs=1", "--init_from=matching/best.pth"]
REFUSED = {
    "no such start": ([*CTR, "--init_from=none.pth"], ["--init_from=none.pth", "no such file"]),
    "start of another width": ([*INIT, "--dim=32"], ["--init_from=matching/best.pth", "--dim"]),
    "start that saw the test": ([*INIT, "--positive_from=3"], ["positive_from=4.0", "positive_from=3.0"]),
    "start from other rows": ([*INIT, "--dataset=more.csv"], ["draws anew"]),
    "one day": ([*CTR, "--ctr_split=time"], ["validate with", "--ctr_split=time"]),
    "no ratings": ([*CTR, "--dataset=bare.csv"], ["ratings", "column label"]),
    "nothing to drop": ([*CTR, "--dataset=bare.csv", "--drop_rating=3"], ["--drop_rating"]),
    "hours of nothing": ([*CTR, "--utc_offset=8"], ["--utc_offset", "--ctr_split=random"]),
    "rare items": ([*CTR, "--min_item_count=2"], ["--min_item_count=2", "--task=ctr"]),
    "no column split": ([*CTR, "--ctr_split=own"], ["--ctr_split=own", "column split"]),
    "nothing left": ([*CTR, "--min_positives=99"], ["--min_positives"]),
    "not finite": ([*CTR, "--positive_from=nan"], ["--positive_from"]),
    "one class trained": ([*CTR, "--positive_from=9"], ["--positive_from"]),
    "a loss": ([*CTR, "--loss=softmax"], ["--loss=softmax", "--task=ctr"]),
    "time tokens": ([*CTR, "--time_tokens=tokens"], ["--time_tokens=tokens"]),
    "rules without a task": ([*MODEL, "--dataset=tiny.csv", "--positive_from=3"], ["--positive_from=3"]),
    "another task": (["--eval_only=true", "--task=ctr", "--out_dir=matching"], ["task=ctr", "task=matching"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(work, case):
    flags, named = REFUSED[case]
    write_csv(work / "more.csv", num_users=41)
    lines = [",".join(line.split(",")[:2]) for line in (work / "tiny.csv").read_text().splitlines()]
    (work / "bare.csv").write_text("\n".join(lines))
    before = snapshot(work)
    assert_refused(here(*flags, cwd=work), *named)
    assert snapshot(work) == before


# ---------------------------------------------------------------- own candidates


SCORE = ["--candidates=c.csv", "--out=scored.csv", "--ckpt_name=run/best.pth"]


def test_own_candidates_are_ranked_behind_all_of_the_history(work, monkeypatch):
    """The same probabilities as with one row per candidate."""
    table = [("u3", "i7"), ("u5", "i1"), ("u3", "i1"), ("u3", "i24")]
    (work / "c.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in table))
    assert "4 candidates, written" in here(*SCORE, cwd=work, program=recommend.main).ok().stdout
    ranked = pd.read_csv(work / "scored.csv")
    assert ranked["user"].tolist() == ["u3"] * 3 + ["u5"] and ranked["place"].tolist() == [1, 2, 3, 1]
    assert ranked["score"][:3].is_monotonic_decreasing

    monkeypatch.chdir(work)
    _, dataset, model = open_checkpoint({}, Path("run/best.pth"))
    raw = pd.read_csv("tiny.csv").sort_values("timestamp", kind="stable")
    number = {item: i + 1 for i, item in enumerate(dataset.items)}
    for user, item, _, probability in ranked.itertuples(index=False):
        history = raw[raw["user"] == user]
        ids = [number[i] for i in history["item"]] + [number[item]]
        batch = {
            "item_ids": torch.tensor([ids]),
            "actions": torch.tensor([[*history["rating"], 0]]),
            "lengths": torch.tensor([len(ids)]),
            "num_before": torch.tensor([0]),
        }
        with torch.inference_mode():
            logit = model.eval().head(model.encode(batch)[:, -1])
        assert float(logit.sigmoid()) == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize(
    ("line", "named"),
    [("u3,i99", ["candidate 2", "item i99"]), ("nobody,i1", ["candidate 2", "user nobody"])],
)
def test_unknown_candidates_are_refused(work, line, named):
    (work / "c.csv").write_text(f"user,item\nu1,i1\n{line}\n")
    shown = here(*SCORE, cwd=work, program=lambda: run_script(recommend.main))
    assert shown.code == 2 and len(shown.errors) == 1 and all(name in shown.errors[0] for name in named)
    assert not (work / "scored.csv").exists()
