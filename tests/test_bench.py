"""scripts/bench: counts and tables by hand, and one real run per kind (ctr.py: test_bench_ctr.py)."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from launch import MAIN, here, read_json, write_csv

sys.path.insert(0, str(MAIN.parent / "scripts" / "bench"))

import costs
import measure
import pair
import peers
import readers
import run_ours

from data import load_dataset
from reclm.config import DataConfig, build_config
from reclm.errors import UserError, run_script
from reclm.nn.losses import softmax

ROW = {
    "targets": 600, "positions": 800, "train_seconds": 2.0, "epoch_seconds": 10.0, "eval_users": 50,
    "eval_seconds": 0.5, "prepare_seconds": 3.0, "peak_memory_gib": 1.5,
}  # fmt: skip


# ---------------------------------------------------------------- measure.py


def test_seconds_are_medians_of_rounds_in_turn(monkeypatch):
    now, order = [0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def work(name, durations):
        order.append(name)
        now[0] += durations.pop(0)

    a, b = [100, 1, 2, 9], [100, 20, 10, 30]  # the first is a warm-up
    assert measure.seconds([lambda: work("a", a), lambda: work("b", b)], 3) == [2, 20]
    assert order == ["a", "b"] * 4


def test_memory_is_that_of_all_children(tmp_path):
    nest, hold = tmp_path / "nest.py", tmp_path / "hold.py"
    nest.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])")
    hold.write_text("import time; x = bytearray(2**27); time.sleep(1.5)")
    peak = measure.peak_of([sys.executable, nest, nest, hold], tmp_path)  # a grandchild holds it
    assert 2**27 < peak * 2**30 < 2**28


def test_a_command_that_fails_says_why(tmp_path):
    command = [sys.executable, "-c", "import os; raise SystemExit(os.environ['WHY'] + ' in ' + os.getcwd())"]
    with pytest.raises(UserError, match=rf"\(exit 1\):\nno luck in {tmp_path}"):
        measure.peak_of(command, tmp_path, WHY="no luck")


def test_a_table_of_text_numbers_and_ranges():
    ranges = {"median": 1234.5, "min": 0.0421, "max": 20_000}
    shown = measure.table([{"a": "x", "b": 3.14159}, {"a": ranges, "b": [3, 1, 2]}])
    cells = "| a | b |", "| --- | --- |", "| x | 3.14 |", "| 1,234 [0.0421, 20,000] | 2 [1, 3] |"
    assert shown == "\n".join(cells) + "\n"


def test_all_that_was_found_is_shown(capsys):
    measure.show("cost", {"n": 1, "parts": {"x": 2.0}, "rows": [{"y": 3}, {"y": 4}]})
    shown = capsys.readouterr().out
    for part in ("| n | 1 |", "| cost: parts |", "| x | 2 |", "cost: rows", "| 3 |\n| 4 |"):
        assert part in shown


def test_results_are_stamped_and_never_overwritten(tmp_path):
    out = tmp_path / "out.json"
    measure.write(out, {"x": 1})
    assert read_json(out).keys() == {"date", "commit", "machine", "x"}
    with pytest.raises(FileExistsError):
        measure.write(out, {"x": 2})
    with pytest.raises(UserError, match="is not overwritten"):
        measure.new_file(out)
    assert read_json(out)["x"] == 1


# ---------------------------------------------------------------- peers.py


def test_medians_ranges_and_ratios():
    ours = [ROW, ROW | {"train_seconds": 1.0, "prepare_seconds": 0.2}, ROW | {"train_seconds": 4.0}]
    theirs = [ROW | {"targets": 60, "prepare_seconds": 9.0}, ROW | {"targets": 60, "prepare_seconds": 2.0}]
    results = peers.results_of({"ours": ours, "peer": theirs})
    assert list(results) == ["ours", "peer", "ours / peer"]
    assert results["ours"]["trained tokens/s"] == {"median": 300, "min": 150, "max": 600}
    assert results["ours"]["preparation, s"] == {"median": 3.0, "min": 0.2, "max": 3.0}
    ratios = results["ours / peer"]
    assert ratios["trained tokens/s"] == 10 and ratios["positions/s"] == 1
    assert ratios["preparation, s"] == pytest.approx(3 / 5.5)
    assert len({tuple(sorted(row)) for row in results.values()}) == 1 and len(ratios) == 6


def test_time_to_a_score_is_told_or_that_it_was_not_reached():
    done = {"reached_seconds": 61.2, "best": 0.151, "seconds": 61.2}
    text = peers.describe_time_to(0.15, {"ours": done, "peer": done | {"reached_seconds": None}})
    assert "| ours | 61.2 | 0.151 |" in text and "| peer | not in 61 | 0.151 |" in text


def test_ours_is_measured_through_its_own_loop(tmp_path):
    (tmp_path / "work").mkdir()
    spec = {"csv": str(write_csv(tmp_path / "tiny.csv")), "ranks": 1, "threads": 1, "dim": 8, "max_len": 16}
    row = peers.run_tool("ours", {}, spec, tmp_path / "work")
    lengths = users_items(tmp_path / "tiny.csv")
    assert row["targets"] == row["positions"] == sum(lengths) - 3 * len(lengths)
    assert row["eval_users"] == len(lengths)
    assert all(0 < value < math.inf for value in peers.columns(row).values())


def test_the_epoch_that_is_timed_is_a_whole_one(tmp_path, monkeypatch):
    train, steps, found = run_ours.program.accumulate_gradients, [], {}

    def spy(run, *batch):
        steps.append(run.progress.step)
        return train(run, *batch)

    monkeypatch.setattr(run_ours.program, "accumulate_gradients", spy)
    spec = {"csv": str(write_csv(tmp_path / "tiny.csv")), "result": str(tmp_path / "result.json")}
    spec = peers.SPEC | spec | {"dim": 8, "max_len": 16, "batch_size": 8}
    here(cwd=tmp_path, program=lambda: found.update(run_ours.ours(spec))).ok()
    assert found["steps"] == 5 and steps == [0, 1, 2, 3, 4] * 2  # the first warms up


def users_items(path):
    """Interactions of each user in a CSV: the last two are held out, and the first has no input before it."""
    users = [line.split(",")[0] for line in path.read_text().splitlines()[1:]]
    return [users.count(user) for user in dict.fromkeys(users)]


def test_the_sizes_of_the_comparison_reach_our_settings():
    spec = peers.SPEC | {"csv": "x.csv", "dim": 32, "max_len": 50}
    flat = build_config(run_ours.settings(spec)).flat()
    assert (flat["dim"], flat["max_len"], flat["loss"], flat["batch_size"]) == (32, 50, "softmax", 128)
    assert flat["exclude_history"] is False and flat["dataset"] == "x.csv"
    defaults = build_config(run_ours.settings(spec | {"time_to": 0.1})).flat()
    assert defaults == build_config({"dataset": "x.csv"}).flat()


def test_peers_read_the_rows_that_we_do(tmp_path):
    args = peers.argparse.Namespace(dataset=str(write_csv(tmp_path / "tiny.csv")), data_dir=None)
    paths = peers.write_interactions(args, tmp_path)
    csv, inter = (Path(paths[name]).read_text().splitlines() for name in ("csv", "inter"))
    assert csv[0] == "user,item,timestamp" and inter[0].startswith("user_id:token\titem_id:token\t")
    assert inter[1:] == [line.replace(",", "\t") for line in csv[1:]]
    rows = [tuple(map(int, line.split(","))) for line in csv[1:]]
    dataset = load_dataset(DataConfig(dataset=args.dataset))
    assert [item for _, item, _ in rows] == dataset.item_ids.tolist()
    assert [place for user, _, place in rows if user == 1] == list(range(dataset.lengths[1]))


def test_a_peer_that_cannot_be_installed_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot install ./no-such-package: .*; leave it out of --peers"):
        peers.make_venv(tmp_path / "venv", ["./no-such-package"])
    assert not (tmp_path / "venv" / "installed").exists()


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        (peers, ["--peers=nobody"], "--peers must be of recbole"),
        (peers, ["--model_name=hstu"], "only RecTools has HSTU blocks"),
        (peers, ["--rounds=0"], "--rounds and --steps must be at least 1"),
        (peers, ["--out=held.json"], "held.json exists and is not overwritten"),
        (peers, ["--peers=", "--dataset=none.csv"], "none.csv"),
        (readers, ["--peers=recbole"], "--peers must be of rectools, replay"),
        (readers, ["--repeats=0"], "--rounds and --repeats must be at least 1"),
        (costs, [], "costs.json exists and is not overwritten"),
        (costs, ["--out=new.json", "--plot=held.json"], "held.json exists and is not overwritten"),
        (pair, ["--before=nowhere"], "--before=nowhere has no main.py"),
        (
            pair,
            [f"--before={MAIN.parent}", "--rounds=0"],
            "--rounds, --processes and --users must be at least 1",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, program, flags, words):
    for name in ("held.json", "costs.json"):
        (tmp_path / name).write_text("{}")
    stopped = here(*flags, cwd=tmp_path, program=lambda: run_script(program.main))
    assert stopped.code == 2 and len(stopped.errors) == 1 and words in stopped.errors[0]
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {"held.json": "{}", "costs.json": "{}"}


# ---------------------------------------------------------------- readers.py


def write_ratings(folder):
    """A small ml-1m/ratings.dat -> its rows."""
    (folder / "ml-1m").mkdir()
    rows = [(user, 10 * item, 1 + item % 5, 1000 + user + item) for user in (1, 2, 3) for item in range(1, 5)]
    text = "".join("::".join(map(str, row)) + "\n" for row in rows)
    (folder / "ml-1m" / "ratings.dat").write_text(text)
    return rows


def test_the_formats_hold_the_same_ratings_of_new_users_each_time(tmp_path):
    rows = write_ratings(tmp_path)
    args = readers.argparse.Namespace(data_dir=tmp_path, repeats=2)
    files, count = readers.write_files(args, tmp_path)
    repeated = [(user + 3 * i, *rest) for i in (0, 1) for user, *rest in rows]
    lines = [",".join(map(str, row)) for row in repeated]
    assert files["csv"].read_text().splitlines() == ["userId,movieId,rating,timestamp", *lines]
    assert files["dat"].read_text().splitlines() == [line.replace(",", "::") for line in lines]
    table = pyarrow.parquet.read_table(files["parquet"])
    assert list(zip(*table.to_pydict().values(), strict=True)) == repeated and count == len(repeated)


OURS = Path(sys.executable)


@pytest.mark.parametrize("form", ["csv", "dat", "parquet"])
def test_all_read_the_same_table(tmp_path, form):
    write_ratings(tmp_path)
    files, _ = readers.write_files(readers.argparse.Namespace(data_dir=tmp_path, repeats=2), tmp_path)
    tools = {"dat": ["ours", "pandas"], "csv": ["pandas", "preparation"], "parquet": ["ours", "preparation"]}
    for tool in tools[form]:
        row = readers.measure(tool, OURS, files[form], tmp_path / "cache")
        assert (
            row["size"] == [24, 6, 4]
            and min(row["M rows/s"], row["CPU s/M rows"]) > 0
            and 0 <= row["memory, GiB"] < 1
        )
    assert (tmp_path / "cache").exists() == ("preparation" in tools[form])


def test_readers_take_turns_and_start_without_a_cache(tmp_path, monkeypatch):
    write_ratings(tmp_path)
    calls = []

    def measure(tool, python, file, cache):
        assert python == OURS and cache.exists() == (calls[-1:] == [("preparation", file.suffix)])
        calls.append((tool, file.suffix))
        cache.mkdir(exist_ok=True) if tool == "preparation" else None
        return {"size": [9, 3, 4], "M rows/s": len(calls), "CPU s/M rows": 1.0, "memory, GiB": 1.0}

    monkeypatch.setattr(readers, "measure", measure)
    flags = "--data_dir=.", "--peers=", "--repeats=2", "--rounds=2"
    shown = here(*flags, cwd=tmp_path, program=readers.main).ok().stdout
    tools = ["ours", "pandas", "preparation", "preparation"]
    assert calls == 2 * [(tool, form) for form in (".csv", ".dat", ".parquet") for tool in tools]
    found = read_json(tmp_path / "readers.json")
    assert found["rows"] == 24 and "| preparation, parquet | M rows/s | CPU s/M rows | memory, GiB |" in shown
    assert found["results"]["reading"]["csv"]["ours"]["M rows/s"] == {"median": 7, "min": 1, "max": 13}
    assert list(found["results"]["preparation"]["csv"])[:2] == ["preparation", "from the cache"]


def test_tools_that_read_another_table_are_not_compared(tmp_path, monkeypatch):
    sizes = {"ours": (9, 3, 4), "pandas": (9, 3, 5)}
    row = {"M rows/s": 1.0, "memory, GiB": 1.0}
    monkeypatch.setattr(readers, "measure", lambda tool, *_: {"size": sizes[tool]} | row)
    with pytest.raises(UserError, match=r"disagree on the rows, .* x.csv: .*\(9, 3, 4\), .*\(9, 3, 5\)"):
        readers.one_round({name: (name, OURS) for name in sizes}, tmp_path / "x.csv", tmp_path)


# ---------------------------------------------------------------- costs.py


@pytest.fixture
def tiny_run():
    return costs.half_run(costs.made_up(users=40, items=30, length=12), dim=8, n_layers=1, batch_size=8)


def test_shares_and_limit_of_a_step(monkeypatch, tiny_run):
    monkeypatch.setattr(costs, "seconds", lambda works, rounds=5: [2.0])  # each product and the step: 2 s
    found = costs.operators(tiny_run, steps=1)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert {"matrix products", "attention", "softmax", "optimizer"} <= found["shares"].keys()
    # 7 linear maps, forward and twice backward; 3 products of the loss; attention: 1 forward, 2.5 backward.
    products = 3 * 7 + 3 + 1 + 2.5
    assert found["efficiency"] == pytest.approx(products) and found["limit_ms"] == 2000 * products


def test_products_of_operators():
    flops = []
    for name, shapes in {
        "aten::mm": [[5, 2], [2, 3]],
        "aten::addmm_": [[5, 3], [5, 2], [2, 3], [], []],
        "aten::_scaled_dot_product_flash_attention_for_cpu": [[1, 2, 10, 4]] * 3,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": [[1, 2, 10, 4]] * 4,
        "aten::mul": [[5, 2], [5, 2]],
    }.items():
        products = costs.matrix_products(name, shapes)
        flops.append(sum(times * 2 * math.prod(left) * right[-1] for left, right, times in products))
    whole = 2 * 2 * 10 * 10 * 4  # one product of attention without causality
    assert flops == [60, 60, whole, 2.5 * whole, 0]


def test_made_up_sequences_hold_every_item_where_there_is_room():
    dataset = costs.made_up(users=20, items=50, length=12)
    assert set(dataset.item_ids) == set(range(1, 51)) and dataset.lengths.min() >= 6
    assert dataset.offsets[-1] == len(dataset.item_ids)
    assert costs.made_up(users=5, items=1000, length=8).item_ids.max() <= 1000


def test_phases_cover_a_step(tiny_run):
    phases = costs.phases(tiny_run, steps=2)
    assert len(phases["ms"]) == 5 and all(value > 0 for value in phases["ms"].values())
    tokens = sum(batch[2] for batch, _ in zip(tiny_run.batches.epoch(0), range(2), strict=False))
    assert phases["tokens_per_s"] == pytest.approx(tokens / (sum(phases["ms"].values()) * 2 / 1e3))


def test_the_chunked_softmax_takes_less_memory():
    """A limit as wide as the claim: a quarter of all logits. Both in processes of their own."""
    peaks = [costs.alone(costs.peak_of_loss, loss, 4_000, 4_000) for loss in (softmax, costs.whole_softmax)]
    assert peaks[0] < peaks[1] / 4


def test_costs_go_into_a_file_and_a_picture(tmp_path, monkeypatch):
    """The script with all that is measured replaced, but for a step by phase."""
    monkeypatch.setattr(costs, "ML_1M", {"users": 300, "items": 30, "length": 12})
    shares = {"shares": {"matrix products": 0.75, "dropout": 0.25}, "efficiency": 0.5}
    rows = [{"T": 200, "ms": 1.0}, {"T": 400, "ms": 2.0}]
    replaced = {"operators": shares, "memory": rows, "block_costs": rows}
    replaced |= {"growth": {"D": {32: 1.0, 64: 3.0}}, "launches": {"large": {"items": 7}}}
    for name, found in replaced.items():
        monkeypatch.setattr(costs, name, lambda *_, found=found: found)
    shown = here(cwd=tmp_path, program=costs.main).ok().stdout
    found = read_json(tmp_path / "costs.json")
    assert found["growth"] == {"D": {"32": 1.0, "64": 3.0}} and found["phases"]["tokens_per_s"] > 0
    assert "| 400 | 2 |" in shown and "| matrix products | 0.75 |" in shown
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- pair.py


def test_made_up_catalogues_are_whole_and_cheap(tmp_path):
    pair.write_made_up(tmp_path / "data.csv", items=3_000, users=8)
    dataset = load_dataset(DataConfig(dataset=str(tmp_path / "data.csv")))
    assert dataset.num_items == 3_000
    trained = dataset.lengths[dataset.train_lengths >= 2]
    assert len(trained) == len(dataset.ranked_users) == 8 and 20 <= trained.min() <= trained.max() <= 200


@pytest.mark.parametrize(("epochs", "expected"), [([9.0], 9.0), ([9.0, 1.0, 2.0], 1.5)])
def test_the_first_of_several_epochs_does_not_count(tmp_path, monkeypatch, epochs, expected):
    def main_py(command, cwd, **env):
        assert command[-2] == "--lr=1" and (cwd, env["OMP_NUM_THREADS"]) == (tmp_path, "1")
        rows = [{"train_seconds": seconds, "eval_seconds": 2 * seconds} for seconds in epochs]
        folder = Path(command[-1].removeprefix("--out_dir="))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0.5

    monkeypatch.setattr(pair, "peak_of", main_py)
    found = pair.train(tmp_path, ["--lr=1"], 2, tmp_path / "cache")
    assert found == {"training, s": expected, "evaluation, s": 2 * expected, "memory, GiB": 0.5}


def test_checkouts_take_turns(tmp_path, monkeypatch):
    calls = []

    def train(checkout, flags, processes, cache):
        calls.append((checkout, flags, cache.name))
        return {"training, s": 6.0 if cache.name == "after" else len(calls)}

    monkeypatch.setattr(pair, "train", train)
    (tmp_path / "main.py").touch()
    here("--before=.", "--rounds=3", "--lr=1", cwd=tmp_path, program=pair.main).ok()
    both = [(MAIN.parent, ["--lr=1"], "after"), (tmp_path, ["--lr=1"], "before")]
    assert calls == 3 * both
    results = read_json(tmp_path / "pair.json")["results"]
    assert results["before"]["training, s"] == {"median": 4, "min": 2, "max": 6}
    assert results["after / before"]["training, s"] == 1.5


def test_a_checkout_against_itself(tmp_path):
    """The script as its user starts it, with runs of main.py."""
    flags = ["--rounds=1", "--processes=1", "--items=60", "--users=6", "--num_epochs=1", "--dim=8"]
    command = [sys.executable, pair.__file__, f"--before={MAIN.parent}", *flags, "--device=cpu"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = read_json(tmp_path / "pair.json")
    assert found["flags"] == ["--num_epochs=1", "--dim=8", "--device=cpu"] and found["items"] == 60
    assert found["before"].removesuffix("-dirty") == found["commit"].removesuffix("-dirty")
    assert all(row["training, s"] > 0 for rows in found["rounds"].values() for row in rows)
    assert 0.5 < found["results"]["after / before"]["memory, GiB"] < 2
    assert "| after / before | " in ran.stdout
