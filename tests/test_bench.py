"""scripts/bench.py and scripts/costs.py: what they count, by hand; one real measurement of ours."""

import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launch import write_csv

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench  # noqa: E402
import costs  # noqa: E402

from reclm.errors import UserError  # noqa: E402

ROW = {
    "targets": 600, "positions": 800, "train_seconds": 2.0, "epoch_seconds": 10.0, "eval_users": 50,
    "eval_seconds": 0.5, "prepare_seconds": 3.0, "peak_memory_gib": 1.5,
}  # fmt: skip


def test_medians_ranges_and_ratios():
    ours = [ROW, ROW | {"train_seconds": 1.0, "prepare_seconds": 0.2}, ROW | {"train_seconds": 4.0}]
    theirs = [ROW | {"targets": 60, "prepare_seconds": 9.0}, ROW | {"targets": 60, "prepare_seconds": 2.0}]
    results = {"ours": bench.summarise(ours), "peer": bench.summarise(theirs)}
    assert results["ours"]["train_tokens_per_s"] == {"median": 300, "min": 150, "max": 600}
    assert results["ours"]["prepare_seconds"] == {"median": 1.6, "min": 0.2, "max": 3.0}  # without the first
    ratios = bench.compare(results)
    assert ratios["train_tokens_per_s.peer"] == 10 and ratios["train_positions_per_s.peer"] == 1
    assert ratios["prepare_seconds.peer"] == pytest.approx(0.8)
    lines = bench.table(results, ratios).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5
    assert "300 [150, 600]" in lines[2] and lines[4].startswith("| ours / peer | 10 | 1 |")


def test_memory_is_that_of_all_children(tmp_path):
    nest, hold = tmp_path / "nest.py", tmp_path / "hold.py"
    nest.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])")
    hold.write_text("import time; x = bytearray(2**27); time.sleep(1.5)")
    peak = bench.watch_memory(psutil.Popen([sys.executable, nest, nest, hold]))  # a grandchild holds it
    assert 2**27 < peak < 2**28


def test_time_to_a_score_is_told_or_that_it_was_not_reached():
    done = {"reached_seconds": 61.2, "best": 0.151, "seconds": 61.2}
    text = bench.describe_time_to(0.15, {"ours": done, "peer": done | {"reached_seconds": None}})
    assert "ours       61" in text and "peer       not in 61 (best 0.1510)" in text


def test_ours_is_measured_through_its_own_loop(tmp_path):
    (tmp_path / "work").mkdir()
    spec = {"csv": str(write_csv(tmp_path / "tiny.csv")), "ranks": 1, "threads": 1, "dim": 8, "max_len": 16}
    row = bench.measure("ours", {}, spec, tmp_path / "work")
    targets = sum(users_items(tmp_path / "tiny.csv")) - 3 * len(users_items(tmp_path / "tiny.csv"))
    assert row["targets"] == row["positions"] == targets
    assert row["eval_users"] == len(users_items(tmp_path / "tiny.csv"))
    summary = bench.summarise([row, row])
    assert all(0 < value["median"] < math.inf for value in summary.values())


def users_items(path):
    """Interactions of each user in a CSV: the last two are held out, and the first has no input before it."""
    users = [line.split(",")[0] for line in path.read_text().splitlines()[1:]]
    return [users.count(user) for user in dict.fromkeys(users)]


def test_a_peer_that_cannot_be_installed_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot install ./no-such-package: .*; leave it out of --peers"):
        bench.make_venv(tmp_path / "venv", ["./no-such-package"])
    assert not (tmp_path / "venv" / "installed").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peers=nobody"], "--peers knows recbole"),
        (["--model_name=hstu"], "only RecTools has HSTU blocks"),
        (["--rounds=1"], "--rounds is at least 2"),
        (["--out={}"], "is not overwritten"),
        (["--peers=", "--dataset=none.csv"], "none.csv"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    held = tmp_path / "held.json"
    held.write_text("{}")
    flags = [flag.format(held) for flag in flags]
    command = [sys.executable, str(SCRIPTS / "bench.py"), *flags]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode != 0 and words in ran.stderr and held.read_text() == "{}"
    assert len(ran.stderr.strip().splitlines()) == 1


def test_shares_and_limit_of_a_step(monkeypatch):
    monkeypatch.setattr(costs, "seconds", lambda work, repeats=5: 2.0)  # each product and the step: 2 s
    run = costs.trainer(costs.made_up(users=40, items=30, length=12), dim=8, n_layers=1, batch_size=8)
    found = costs.operators(run, steps=1)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert {"matrix products", "attention", "softmax", "optimizer"} <= found["shares"].keys()
    # 7 linear maps, forward and twice backward; 3 products of the loss; attention: 1 forward, 2.5 backward.
    products = 3 * 7 + 3 + 1 + 2.5
    assert found["efficiency"] == pytest.approx(products) and found["limit_ms"] == 2000 * products


def test_products_of_operators():
    flops = {}
    for name, shapes in {
        "aten::mm": [[5, 2], [2, 3]],
        "aten::addmm_": [[5, 3], [5, 2], [2, 3], [], []],
        "aten::_scaled_dot_product_flash_attention_for_cpu": [[1, 2, 10, 4]] * 3,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": [[1, 2, 10, 4]] * 4,
        "aten::mul": [[5, 2], [5, 2]],
    }.items():
        products = costs.matrix_products(name, shapes)
        flops[name.removeprefix("aten::")] = sum(times * product.flops for product, times in products)
    whole = 2 * 2 * 10 * 10 * 4  # one product of attention without causality
    assert list(flops.values()) == [60, 60, whole, 2.5 * whole, 0]


def test_made_up_sequences_hold_every_item_where_there_is_room():
    dataset = costs.made_up(users=20, items=50, length=12)
    assert set(dataset.item_ids) == set(range(1, 51)) and dataset.lengths.min() >= 6
    assert dataset.offsets[-1] == len(dataset.item_ids)
    assert costs.made_up(users=5, items=1000, length=8).item_ids.max() <= 1000


def test_phases_cover_a_step():
    run = costs.trainer(costs.made_up(users=40, items=30, length=12), dim=8, n_layers=1, batch_size=8)
    phases = costs.phases(run, steps=2)
    assert len(phases["ms"]) == 5 and all(value > 0 for value in phases["ms"].values())
    tokens = sum(batch[2] for batch, _ in zip(run.batches.epoch(0), range(2), strict=False))
    assert phases["tokens_per_s"] == pytest.approx(tokens / (sum(phases["ms"].values()) * 2 / 1e3))


def test_the_chunked_softmax_takes_less_memory():
    """A limit as wide as the claim: a quarter of all logits. Both in processes of their own."""
    chunked, whole = (costs.softmax_memory(kind, 4_000, 4_000) for kind in ("chunked", "materialised"))
    assert chunked < whole / 4
