"""scripts/bench_ctr.py: both forms of training are the same model, and the script runs."""

import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import write_csv
from launch import MAIN, read_json

sys.path.insert(0, str(MAIN.parent / "scripts"))
import bench_ctr

import main as program
from data import load_dataset
from reclm.config import build_config
from reclm.data.features import choose_inputs
from reclm.errors import UserError

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
    """A run with random weights; all that starts at 0 has a say."""
    cfg = build_config(
        {"task": "ctr", "dataset": str(csv), "dim": 16, "batch_size": 6, "device": "cpu"} | settings
    )
    run = program.Run(cfg, choose_inputs(load_dataset(cfg.data, "ctr"), cfg), None, None)
    torch.manual_seed(2)
    for weight in run.model.parameters():
        torch.nn.init.normal_(weight.detach(), std=0.2)
    return run


@pytest.mark.parametrize("model_name", ["llama", "hstu"])
def test_rows_and_sequences_are_the_same_model(csv, model_name):
    """The same logit of each impression, and the same loss, where no history is cut."""
    run = make_run(csv, model_name=model_name, time_tokens="embedding", position_embedding=True, max_len=20)
    model = run.model.eval()
    for _, (batch,), num_targets in run.batches.epoch(0):
        there = batch["targets"] > 0
        asked = batch["rows"][there]
        parts = bench_ctr.Rows(run.dataset, asked.numpy(), 20).batches(7)
        assert sum(len(part["rows"]) for part in parts) == num_targets
        loss, losses = model(batch), [model(part) for part in parts]
        assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-5)
        logits = model({name: x for name, x in batch.items() if name != "targets"})[there]
        of_row = dict(zip(asked.tolist(), logits.tolist(), strict=True))
        for part in parts:
            part.pop("targets")
            expected = [of_row[row] for row in part["rows"][:, 0].tolist()]
            torch.testing.assert_close(model(part)[:, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_row_has_the_last_actions_before_its_impression(csv):
    dataset = make_run(csv, max_len=20).dataset
    rows = np.flatnonzero(dataset.splits == 0)
    found = 0
    for batch in bench_ctr.Rows(dataset, rows, 3).batches(16):
        for i, row in enumerate(batch["rows"][:, 0].tolist()):
            first = dataset.offsets[batch["user_ids"][i]]
            history = dataset.item_ids[first : first + dataset.history_lengths[row]][-3:].tolist()
            assert batch["item_ids"][i, : batch["lengths"][i]].tolist() == history
            assert batch["candidate_ids"][i].tolist() == [dataset.item_ids[row]]
            assert batch["targets"][i].tolist() == [1 + dataset.labels[row]]
            found += 1
    assert found == len(rows)


def test_each_round_ranks_all_that_is_compared(monkeypatch):
    """By the numbers of candidates that go through the blocks together."""
    cfg = build_config({"task": "ctr", "dim": 8, "max_len": 6, "time_tokens": "embedding"})
    model, widths, default = bench_ctr.spine.SequenceRecommender, [], bench_ctr.spine.CANDIDATES_AT_ONCE
    context = model.candidate_context

    def spy(self, row, candidates):
        widths.append(candidates["token_ids"].shape[1])
        return context(self, row, candidates)

    monkeypatch.setattr(model, "candidate_context", spy)
    found = bench_ctr.ranking(cfg, users=2, counts=[1, 5], sizes=[2, 3, 500], rounds=1)
    one_round = [1, 5, *[1] * bench_ctr.ONE_BY_ONE, 2, 2, 1, 3, 2, 5, 5]
    assert widths == 2 * one_round  # the first is not counted
    assert bench_ctr.spine.CANDIDATES_AT_ONCE == found["default"] == default
    assert list(found["at_once"]) == [2, 3, default, 500]


def test_one_by_one_is_measured_for_a_few_and_multiplied(monkeypatch):
    monkeypatch.setattr(bench_ctr, "interleaved", lambda works, rounds: dict.fromkeys(works, 2.0))
    cfg = build_config({"task": "ctr", "dim": 8, "max_len": 6})
    found = bench_ctr.ranking(cfg, users=1, counts=[1, 50], sizes=[], rounds=1)
    assert found["once"] == {1: 2000, 50: 2000}
    assert found["anew"] == {1: 2000 / bench_ctr.ONE_BY_ONE, 50: 50 * 2000 / bench_ctr.ONE_BY_ONE}


def test_both_forms_train_on_the_same_impressions(csv, monkeypatch):
    counts = []
    monkeypatch.setattr(bench_ctr.costs, "step", lambda run, batch: counts.append(count(batch)))
    cfg = make_run(csv).cfg
    found = bench_ctr.training(cfg, num_batches=2, row_batch=5, rounds=1)
    steps = [num_targets for *_, num_targets in islice(make_run(csv).batches.epoch(0), 2)]
    assert found["impressions"] == sum(steps)
    assert counts == 2 * [(n, n, alone) for alone in (False, True) for n in steps]  # a round not counted


def count(batch):
    """Candidates, what the loss is divided by, and are they one a row?"""
    _, parts, num_targets = batch
    shown = sum(int((part["targets"] > 0).sum()) for part in parts)
    return shown, num_targets, all(part["targets"].shape[1] == 1 for part in parts)


def call(monkeypatch, *flags):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench_ctr.py", *flags])
    bench_ctr.main()
    torch.set_num_threads(threads)


def test_the_script(csv, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    flags = [f"--dataset={csv}", f"--out={out}", "--dim=8", "--n_layers=1", "--max_len=8", "--rounds=1"]
    call(monkeypatch, *flags, "--users=2", "--candidates=1,4", "--at_once=2", "--batches=1")
    found = read_json(out)
    assert found["config"]["task"] == "ctr" and found["ranking"]["once"].keys() == {"1", "4"}
    rates = found["training"]["impressions_per_s"]
    assert found["training"]["ratio"] == pytest.approx(rates["sequences"] / rates["rows"])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 2) + (2 + 2) + (2 + 2)
    with pytest.raises(UserError, match="is not overwritten"):
        call(monkeypatch, *flags)
