"""scripts/bench/serve.py: figures by hand, and the parts on a tiny model."""

import importlib.util
import json
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch import MAIN, TINY, here, read_json, write_csv

sys.path.insert(0, str(MAIN.parent / "scripts"))
sys.path.insert(0, str(MAIN.parent / "scripts" / "bench"))

import load
import pages
import passes
import results
import run_client
import run_serving

from reclm.errors import UserError, run_script
from reclm.serve import Recommender


def load_bench():
    """scripts/bench/serve.py under another name: its own is that of scripts/serve.py"""
    spec = importlib.util.spec_from_file_location("bench_serve", Path(load.__file__).with_name("serve.py"))
    module = sys.modules["bench_serve"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve = load_bench()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_csv(folder / "tiny.csv")
    here("--dataset=tiny.csv", "--out_dir=run", "--num_epochs=1", *TINY, cwd=folder).ok()
    return folder / "run" / "best.pth"


@pytest.fixture
def bench(model, tmp_path):
    args = SimpleNamespace(rounds=1, soak=0.3, history="i1; i2", peers=[])
    found = serve.Bench(args, model, tmp_path)
    found.models = found.large = {"torch": model}
    return found


# ---------------------------------------------------------------- the client


def test_an_answer_is_whole_with_its_last_byte():
    answer = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}"
    assert [run_client.whole(answer[:end]) for end in (0, 20, len(answer) - 1)] == [0, 0, 0]
    assert run_client.whole(answer) == 429


def answering(answers, made):
    """Answer requests on the listening socket: with these statuses, None = close the connection, then 200."""
    with suppress(OSError):  # closed in the end
        while True:
            connection, _ = made.accept()
            while connection.recv(1000) in (b"one", b"two"):
                status = answers.pop(0) if answers else 200
                if status is None:
                    break
                time.sleep(0.02)
                connection.sendall(b"HTTP/1.1 %d x\r\ncontent-length: 1\r\n\r\n" % status)
                connection.sendall(b"!")
            connection.close()


def test_every_request_is_noted_once_with_its_time(monkeypatch):
    monkeypatch.setattr(run_client, "PAUSE", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as made:
        answers = [200, 200, 429, None]
        threading.Thread(target=answering, args=(answers, made), daemon=True).start()
        port, sent = made.getsockname()[1], ["one", "two"]
        rows = run_client.main({"port": port, "requests": sent, "phases": [[0.3, 1]]})
    assert rows[:5, 2].tolist() == [200, 200, 429, run_client.BROKEN, 200] and (rows[5:, 2] == 200).all()
    assert (rows[rows[:, 2] > 0, 1] >= 20).all() and (np.diff(rows[:, 0]) >= 0).all() and rows[0, 0] < 0.3


# ---------------------------------------------------------------- figures of load


def rows_of(*parts):
    """(begin, end, milliseconds, status): ten requests per second"""
    return np.array([(t, ms, s) for a, b, ms, s in parts for t in np.arange(10 * a, 10 * b) / 10])


def test_figures_count_good_answers_only():
    rows = rows_of((0, 2, 5.0, 200), (2, 4, 1.0, 429))
    assert load.figures(rows, 4) == {"requests/s": 5, "p50, ms": 5, "p99, ms": 5}
    assert load.statuses(rows) == {"200": 20, "429": 20}
    with pytest.raises(UserError, match="no request with 200, but {'429': 20}"):
        load.figures(rows[20:], 4)


def test_a_burst_is_over_when_the_p99_is_back():
    before, during = (0, 2, 10.0, 200), [(2, 4, 80.0, 200), (4, 5, 1.0, 429)]
    found = load.burst_figures(rows_of(before, *during, (5, 6, 50.0, 200), (6, 9, 12.0, 200)))
    assert found["p99 before, ms"] == 10 and found["p99 during, ms"] == 80 and found["p99 after, ms"] == 50
    assert found["seconds until back"] == 1.0 and found["other answers"] == 0
    assert found["answered with 200"] == pytest.approx(2 / 3)
    assert found["refused with 429"] == pytest.approx(1 / 3)
    never = load.burst_figures(rows_of(before, *during, (5, 9, 50.0, 200), (8, 9, 1.0, 500)))
    assert never["seconds until back"] == load.BURST[2][0] and never["other answers"] == 10


def test_the_server_under_load(bench, monkeypatch):
    """A real one, for moments"""
    pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
    monkeypatch.setattr(load, "SECONDS", 0.2)
    monkeypatch.setattr(load, "WARM_UP", 0.1)
    monkeypatch.setattr(load, "CONNECTIONS", (1, 2))
    monkeypatch.setattr(load, "WORKERS", (1,))
    monkeypatch.setattr(load, "BURST", ((0.2, 1), (0.2, 4), (0.2, 1)))
    monkeypatch.setattr(load, "HISTORY", 5)
    found = load.http(bench)
    names = [f"{what}, {n} at once" for what in ("torch, 1 worker", "empty") for n in (1, 2)]
    assert sorted(found["rounds"]) == sorted([*names, "torch, burst"])
    for name in names:
        [row] = found["rounds"][name]
        assert row["other answers"] == 0 and row["requests/s"] > 5 and 0 < row["p50, ms"] <= row["p99, ms"]
    soaked = found["soak"]
    assert soaked["errors"] == 0 < soaked["requests"] and 50 < soaked["MiB at the begin"] < 2000


def test_a_server_that_does_not_start_says_why(tmp_path):
    starting = load.serving(tmp_path / "none.pth", 1, tmp_path / "log")
    with pytest.raises(UserError, match="(?s)does not answer:.*error: no "), starting:
        pass


# ---------------------------------------------------------------- passes


def test_a_session_is_compared_with_the_whole_history(model, monkeypatch):
    monkeypatch.setattr(passes, "ADDITIONS", 20)
    recommender = Recommender.load(model)
    found = passes.session_costs(recommender, seed=0)
    assert found.pop("largest difference of scores") < 1e-5
    assert all(value > 0 for value in found.values()) and len(found) == 4
    extend = recommender.engine.extend
    monkeypatch.setattr(recommender.engine, "extend", lambda *given: 1.01 * extend(*given))
    assert passes.session_costs(recommender, seed=0)["largest difference of scores"] > 1e-4


def test_quality_of_an_export_by_hand(tmp_path):
    best = [np.array([3, 1]), np.array([2, 5])]
    other = [np.array([3, 1]), np.array([5, 4])]
    scores = np.array([[9.0, 1, 2], [9.0, 3, 4]])
    found = passes.differences(scores, best, [1, 4], scores - [[7, 0, 0], [0, 0, 0.25]], other)
    (tmp_path / "model.onnx").write_bytes(b"12345")
    (tmp_path / "README.md").write_bytes(b"12")
    assert passes.joined([found], tmp_path) == {
        "bytes": 7, "bytes of the model": 5, "users": 2, "NDCG@10": (1 / np.log2(3)) / 2,
        "users with the same ten in the same order": 1, "overlap of the ten": 0.75,
        "largest difference of scores": 0.25,
    }  # fmt: skip


def test_a_checkpoint_equals_itself(bench, model):
    """The part `export` with a checkpoint in the place of both exports"""
    bench.models = {"exported": model}
    bench.export = lambda *_: model
    rows = {name: found[0] for name, found in passes.export(bench)["rounds"].items()}
    assert list(rows) == ["checkpoint", "float32", "int8"] and rows["checkpoint"] == rows["int8"]
    assert rows["int8"]["users"] == rows["int8"]["users with the same ten in the same order"] == 40
    assert rows["int8"]["overlap of the ten"] == 1 and 0 < rows["int8"]["NDCG@10"] < 1


def test_items_reasons_and_everybody(bench, model, monkeypatch):
    for name, value in {"MANY_ITEMS": 5_000, "REPEATS": 2, "EXPLAINED": 3}.items():
        monkeypatch.setattr(passes, name, value)
    for rows in (*passes.items(bench)["rounds"].values(), *passes.why(bench)["rounds"].values()):
        assert all(value > 0 for value in rows[0].values())
    found = run_serving.main({"model": str(model)})
    assert found["eval_users"] == 40 and found["eval_seconds"] > 0


# ---------------------------------------------------------------- the record


def run(model, folder, *flags):
    flags = [f"--ckpt_name={model}", "--peers=", "--out=out.json", *flags]
    return here(*flags, cwd=folder, program=lambda: run_script(serve.main))


def test_parts_are_recorded_and_replaced_one_by_one(model, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 7.0])
    monkeypatch.setitem(
        serve.PARTS, "why", lambda bench: {"rounds": {"a": [{"ms": next(values)} for _ in "123"]}}
    )
    monkeypatch.setitem(serve.PARTS, "items", lambda bench: {"rounds": {"b": [{"ms": 5.0}]}, "same": "yes"})
    shown = run(model, tmp_path, "--parts=why,items").ok().stdout
    assert (
        "why: a, ms: 2 [1, 3]\n" in shown
        and "items: same: yes\n" in shown
        and shown.count("load average") == 4
    )
    record = read_json(tmp_path / "out.json")
    assert record.keys() >= {
        "date",
        "commit",
        "machine",
        "cpu",
        "cores",
        "memory, GiB",
        "model",
        "why",
        "items",
    }
    assert record["why"].keys() == {"date", "commit", "machine", "command", "load", "results", "rounds"}
    assert record["why"]["command"] == "python scripts/bench/serve.py --parts=why --rounds=3 --soak=600"
    refused = run(model, tmp_path, "--parts=items")
    assert refused.code == 2 and "add --update" in refused.errors[0]
    monkeypatch.setitem(serve.PARTS, "items", lambda bench: {"rounds": {"b": [{"ms": next(values)}]}})
    run(model, tmp_path, "--parts=items", "--update").ok()
    again = read_json(tmp_path / "out.json")
    assert again["why"] == record["why"] and again["items"]["results"]["b"]["ms"]["median"] == 7


def test_a_part_without_its_packages_is_left_out(model, tmp_path, monkeypatch):
    monkeypatch.setitem(serve.NEEDED, "http", ("no_such_package",))
    assert (
        "http is left out: no_such_package is not installed"
        in run(model, tmp_path, "--parts=http").ok().stdout
    )
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--parts=all", "must be of batch"),
        ("--rounds=0", "at least 1"),
        ("--peers=recbole", "--peers must be of"),
    ],
)
def test_bad_flags_are_one_line(model, tmp_path, flag, words):
    stopped = run(model, tmp_path, flag)
    assert stopped.code == 2 and len(stopped.errors) == 1 and words in stopped.errors[0]


@pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="pip install -r requirements-dev.txt")
def test_edits_on_both_pages_are_timed(bench, monkeypatch):
    try:
        pages.find_chromium()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(pages, "HISTORY", 4)
    monkeypatch.setattr(pages, "EDITS", 3)
    found = pages.page(bench)
    assert found["bytes of the file"] == (bench.work / "films.html").stat().st_size
    for name in ("served", "file"):
        (row,) = found["rounds"][name]
        assert 0 < row["p50, ms"] <= row["p99, ms"]


def test_all_tools_take_turns_and_files_are_compared(bench, monkeypatch):
    calls, bench.args.rounds, bench.args.peers = [], 2, ["implicit"]

    def once(name):
        calls.append(name)
        return {"eval_users": 40, "eval_seconds": len(calls)}

    monkeypatch.setattr(serve.peers, "pythons_of", lambda args, packages: {"implicit": Path("python")})
    monkeypatch.setattr(serve.peers, "write_interactions", lambda *_: {"csv": "x"})
    monkeypatch.setattr(serve.peers, "run_tool", lambda name, *_: once(name))
    monkeypatch.setattr(serve, "to_everybody", lambda bench, processes: once(processes))
    monkeypatch.setattr(serve, "file_for_everybody", lambda bench, processes: b"%d" % (processes // 3))
    found = serve.batch(bench)
    assert calls == 2 * [2, 1, "implicit"] and found["files of 1, 2, 3 processes"] == "DIFFERENT"
    assert found["rounds"]["implicit"] == [{"users/s": 40 / 3}, {"users/s": 40 / 6}]


def test_the_command_line_is_timed_alone(bench, monkeypatch):
    commands = []
    monkeypatch.setattr(passes, "run", lambda command: commands.append(command))
    monkeypatch.setattr(serve, "peak_of", lambda command, cwd: commands.append(command) or 0.5)
    rows = serve.start(bench)["rounds"]["torch"]
    assert len(rows) == serve.STARTS and rows[0]["memory, MiB"] == 512 and commands[0] == commands[1]
    assert [str(part) for part in commands[0][-2:]] == ["--history=i1; i2", "--k=5"]


def test_a_benchmarks_summary_has_a_form_of_its_own(tmp_path):
    value = {"part": {"results": {"a, b": {"p50, ms": {"median": 2.0, "min": 1.0, "max": 1234.5}}}}}
    (tmp_path / "x.json").write_text(json.dumps(value))
    filled = results.fill("{x.json part/results/a, b/p50, ms:,.1f} ms", tmp_path)
    assert filled == "2.0 (1.0 to 1,234.5) ms"
