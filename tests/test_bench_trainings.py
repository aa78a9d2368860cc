"""scripts/bench: optimizers.py, attention.py and the trainings that they compare."""

import json
import sys

import pytest
import torch
from launch import MAIN, TINY, here, read_json, write_csv

sys.path.insert(0, str(MAIN.parent / "scripts" / "bench"))

import attention
import optimizers
import trainings

from reclm.errors import UserError, run_script

TINY_FLAGS = dict(flag.strip("-").split("=") for flag in TINY)


def write_run(folder, curve, ndcg):
    """A finished run as main.py leaves it: 10 s of training and 1 s of evaluation per epoch."""
    folder.mkdir(parents=True)
    rows = [{"valid/NDCG@10": score, "train_seconds": 10.0, "eval_seconds": 1.0} for score in curve]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps({"test": {"NDCG@10": ndcg, "HR@10": 2 * ndcg}}))


def test_a_training_is_run_once(tmp_path, monkeypatch):
    flags = TINY_FLAGS | {"dataset": write_csv(tmp_path / "tiny.csv"), "num_epochs": 2}
    folder = trainings.trained(tmp_path / "run", trainings.as_flags(flags | {"data_dir": None}))
    assert [epoch for epoch, _ in enumerate(trainings.curve(folder))] == [0, 1]
    assert 0 <= trainings.test_metrics(folder)["NDCG@10"] <= 1
    monkeypatch.setattr(trainings.subprocess, "run", pytest.fail)
    assert trainings.trained(folder, []) == folder


def test_a_training_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"--dim=7.* failed \(exit 2\):\nerror: --dim=7 must be a multiple"):
        trainings.trained(tmp_path / "run", ["--dim=7"])


def test_the_seconds_of_a_curve_add_up(tmp_path):
    write_run(tmp_path / "run", [0.1, 0.18], 0.17)
    assert trainings.curve(tmp_path / "run") == [(11.0, 0.1), (22.0, 0.18)]


def test_the_rate_is_chosen_on_validation(tmp_path):
    """The best on the test item is another one."""
    for rate, curve, ndcg in (("0.006", [0.1, 0.12], 0.3), ("0.01", [0.15, 0.1], 0.2), ("0.02", [0.14], 0.1)):
        write_run(tmp_path / "runs" / f"adamw-{rate}-seed0-num_epochs=3", curve, ndcg)
    write_run(tmp_path / "runs" / "adamw-0.01-seed0", [0.16, 0.18, 0.19], 0.21)
    write_run(tmp_path / "runs" / "adamw-0.01-seed5", [0.1, 0.16], 0.19)
    flags = [f"--runs={tmp_path}/runs", "--parts=rates,quality", "--only", "adamw", "--seeds", "0", "5"]

    def program():
        run_script(optimizers.main)

    out = tmp_path / "out.json"
    here(*flags, f"--out={out}", cwd=tmp_path, program=program).ok()
    record = read_json(out)
    assert record["rates"]["results"] == {"adamw": {"0.006": 0.12, "0.01": 0.15, "0.02": 0.14}}
    of_seeds = {
        "0": {"NDCG@10": 0.21, "HR@10": 0.42, "epochs": 2},
        "5": {"NDCG@10": 0.19, "HR@10": 0.38, "epochs": None},
    }
    assert record["quality"]["results"]["adamw"] == {"0.01": of_seeds}
    assert record["quality"]["table"][0]["test NDCG@10"] == ".2000 ± .0141"
    assert record["quality"]["table"][0]["epochs to 0.17 on validation"] == "not reached"
    write_run(tmp_path / "runs" / "adamw-0.01-seed7", [0.16, 0.18], 0.23)
    here(*flags[:1], "--parts=quality", "--only", "adamw", "--seeds", "7", f"--out={out}",
         cwd=tmp_path, program=program).ok()  # fmt: skip
    of_seeds["7"] = {"NDCG@10": 0.23, "HR@10": 0.46, "epochs": 2}
    assert read_json(out)["quality"]["results"]["adamw"] == {"0.01": of_seeds}, "seeds are added"
    failed = here("--parts=none", cwd=tmp_path, program=program)
    assert failed.code == 2 and "--parts must be of small, large" in failed.errors[0]


def test_bytes_of_state(monkeypatch):
    """AdamW keeps two numbers per weight, Adafactor one per row and column, LOMO none."""
    monkeypatch.setattr(optimizers, "STEPS", 1)
    monkeypatch.setattr(optimizers, "keep_freed_memory", lambda: None)
    small = {"dim": 32, "n_heads": 2, "max_len": 8, "n_layers": 1, "batch_size": 8}
    found = {
        name: optimizers.cost(small | optimizers.VARIANTS[name][0], 2000, 20, 10)
        for name in ("adamw", "adafactor", "rowwise_adagrad", "lomo")
    }
    assert 8 < found["adamw"]["bytes"] < 8.01
    assert 4 * (1 / 32 + 1 / 2000) * 0.8 < found["adafactor"]["bytes"] < 0.25
    assert found["rowwise_adagrad"]["bytes"] < 0.2 * found["adamw"]["bytes"]
    assert found["lomo"]["bytes"] == 0
    assert all(row["ms"] > 0 for row in found.values())


def test_the_cache_of_a_session(monkeypatch, capsys):
    """Keys and values of 4 layers, 8 heads of width 32 by query heads per key head, W or T positions."""
    monkeypatch.setattr(attention, "LENGTHS", (12, 20))
    monkeypatch.setattr(attention, "WINDOWS", (4, 16))
    rows = attention.sessions(attention.argparse.Namespace(rounds=1))
    windows = {(row["T"], row["W"]) for row in rows}
    assert windows == {(12, 12), (12, 4), (12, 16), (20, 20), (20, 4), (20, 16)}
    for row in rows:
        positions = min(row["W"], row["T"] + 1)
        expected = 4 * 2 * 8 // row["query heads per key head"] * 32 * positions * 4 / 1024
        assert row["cache, KiB"] == pytest.approx(expected, rel=0.1), row


def test_adding_the_last_action_again_is_the_same_work():
    model, history = attention.open_session(10, 2, 0)
    found = []
    for _ in range(3):
        attention.add_action(model, history)
        found.append(history.hidden)
    assert torch.equal(found[0], found[2]) and int(history.num_actions[0]) == 9
