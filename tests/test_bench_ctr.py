"""scripts/bench/ctr.py: both forms of training give the same model, and the script runs."""

import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import write_csv
from launch import MAIN, here, read_json

sys.path.insert(0, str(MAIN.parent / "scripts" / "bench"))
import ctr

from data import load_dataset
from reclm.config import build_config
from reclm.data.features import choose_inputs
from reclm.errors import UserError
from reclm.nn.heads import CTRHead

DAY = 86400


@pytest.fixture
def csv(tmp_path):
    """20 users with 5 to 19 impressions, over some 40 days: more than one in a window."""
    rng = np.random.default_rng(5)
    rows = [
        (user, rng.integers(12), rng.integers(1, 6), DAY * (user + t) + 10 * t)
        for user in range(20)
        for t in range(5 + (7 * user) % 15)
    ]
    return write_csv(tmp_path / "shown.csv", rows)


def make_run(csv, **settings):
    """A run with random weights, so that zero-initialised ones have an effect."""
    cfg = build_config(
        {"task": "ctr", "dataset": str(csv), "dim": 16, "batch_size": 6, "device": "cpu"} | settings
    )
    run = ctr.new_run(cfg, choose_inputs(load_dataset(cfg.data, "ctr"), cfg))
    torch.manual_seed(2)
    for weight in run.model.parameters():
        torch.nn.init.normal_(weight.detach(), std=0.2)
    return run


@pytest.mark.parametrize("model_name", ["llama", "hstu"])
@pytest.mark.parametrize("max_len", [20, 4])  # with 4, histories are cut into windows
def test_rows_and_sequences_are_the_same_model(csv, model_name, max_len):
    """The same logit of each impression, and the same loss."""
    settings = {"model_name": model_name, "time_tokens": "embedding", "position_embedding": True}
    run = make_run(csv, max_len=max_len, **settings)
    model, single = run.model.eval(), ctr.one_by_one(run.dataset, max_len)
    for _, (batch,), num_targets in run.batches.epoch(0):
        there = batch["labels"] >= 0
        asked = batch["rows"][there]
        parts = ctr.row_batches(single, asked.numpy(), 7)
        assert sum(len(part["rows"]) for part in parts) == num_targets
        loss, losses = model(batch), [model(part) for part in parts]
        assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-5)
        logits = model({name: x for name, x in batch.items() if name != "labels"})[there]
        of_row = dict(zip(asked.tolist(), logits.tolist(), strict=True))
        for part in parts:
            part.pop("labels")
            expected = [of_row[row] for row in part["rows"][:, 0].tolist()]
            torch.testing.assert_close(model(part)[:, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_row_has_its_impression_and_what_was_before(csv):
    dataset = make_run(csv, max_len=20).dataset
    rows = np.flatnonzero(dataset.splits == 0)[::-1]
    found = []
    for batch in ctr.row_batches(ctr.one_by_one(dataset, 20), rows, 16):
        assert len(batch["rows"]) <= 16 and (batch["lengths"].diff() <= 0).all()
        for i, row in enumerate(batch["rows"][:, 0].tolist()):
            first = dataset.offsets[batch["user_ids"][i]]
            history = dataset.item_ids[first : first + dataset.history_lengths[row]].tolist()
            assert batch["item_ids"][i, : batch["lengths"][i]].tolist() == history
            assert batch["candidate_ids"][i].tolist() == [dataset.item_ids[row]]
            assert batch["labels"][i].tolist() == [dataset.labels[row]]
            found.append(row)
    assert sorted(found) == sorted(rows)


def test_each_round_ranks_all_that_is_compared(monkeypatch):
    """By the numbers of candidates that go through the blocks together."""
    cfg = build_config({"task": "ctr", "dim": 8, "max_len": 6, "time_tokens": "embedding"})
    widths, default, forward = [], ctr.spine.CANDIDATES_AT_ONCE, CTRHead.forward

    def spy(self, hidden):
        widths.append(hidden.shape[1])
        return forward(self, hidden)

    monkeypatch.setattr(CTRHead, "forward", spy)
    found = ctr.ranking(cfg, users=2, counts=[1, 5], sizes=[2, 3, 500], rounds=1)
    one_round = [1, 5, 2, 2, 1, 3, 2, 5, 5, *[1] * ctr.ONE_BY_ONE]
    assert widths == 2 * one_round  # the first is not counted
    assert default == ctr.spine.CANDIDATES_AT_ONCE
    assert [row["at once"] for row in found["by number at once, of 5"]] == [2, 3, default, 500]


def test_one_by_one_is_measured_for_a_few_and_multiplied(monkeypatch):
    times = [2.0, 4.0, 1.0, 5.0]  # 1 candidate, 50, 50 as many at once as by default, 10 one by one
    monkeypatch.setattr(ctr, "seconds", lambda works, rounds: times[: len(works)])
    cfg = build_config({"task": "ctr", "dim": 8, "max_len": 6})
    found = ctr.ranking(cfg, users=2, counts=[1, 50], sizes=[], rounds=1)
    of_one, of_fifty = found["by number"]
    assert of_one == {
        "candidates": 1, "ms": 2000, "times the first": 1, "us per candidate": 1_000_000,
        "history encoded per candidate, ms (extrapolated)": 500, "times as long": 0.25,
    }  # fmt: skip
    assert of_fifty["times the first"] == 2 and of_fifty["us per candidate"] == 40_000
    assert (
        of_fifty["history encoded per candidate, ms (extrapolated)"] == 25_000
        and of_fifty["times as long"] == 6.25
    )
    assert [row["ms"] for row in found["by number at once, of 50"]] == [1000]


def test_both_forms_train_on_the_same_impressions(csv, monkeypatch):
    counts = []
    monkeypatch.setattr(ctr, "step", lambda run, batch: counts.append(count(batch)))
    cfg = make_run(csv).cfg
    found = ctr.training(cfg, num_batches=2, row_batch=5, rounds=1)
    steps = [num_targets for *_, num_targets in islice(make_run(csv).batches.epoch(0), 2)]
    assert found["impressions"] == sum(steps)
    assert counts == 2 * [(n, n, alone) for alone in (False, True) for n in steps]  # a round not counted


def count(batch):
    """(number of candidates, divisor of the loss, is there one candidate per row?)"""
    _, parts, num_targets = batch
    shown = sum(int((part["labels"] >= 0).sum()) for part in parts)
    return shown, num_targets, all(part["labels"].shape[1] == 1 for part in parts)


def test_the_script(csv, tmp_path):
    flags = [f"--dataset={csv}", "--out=out.json", "--dim=8", "--n_layers=1", "--max_len=8", "--rounds=1"]
    flags += ["--users=2", "--candidates=1,4", "--at_once=2", "--batches=1"]
    shown = here(*flags, cwd=tmp_path, program=ctr.main).ok().stdout
    found = read_json(tmp_path / "out.json")
    assert found["config"]["task"] == "ctr" and found["config"]["dim"] == 8
    assert [row["candidates"] for row in found["ranking"]["by number"]] == [1, 4]
    rates = found["training"]["impressions_per_s"]
    assert found["training"]["ratio"] == pytest.approx(rates["sequences"] / rates["rows"])
    assert "| candidates | ms |" in shown and "| sequences |" in shown
    with pytest.raises(UserError, match="is not overwritten"):
        here(*flags, cwd=tmp_path, program=ctr.main)
