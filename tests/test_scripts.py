"""scripts/results.py and plot_runs.py: spreads by hand, every published number against its record."""

import json
import re
import subprocess
import sys

import pytest
from launch import MAIN, TINY, here, write_csv

sys.path.insert(0, str(MAIN.parent / "scripts"))
import evaluate_groups
import results

from reclm.errors import UserError

SCRIPT = MAIN.parent / "scripts" / "results.py"
RANKING = ("NDCG@10", "HR@10", "HR@1", "NDCG@20", "MRR")
FENCE = re.compile(r"^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE)


def write_result(folder, seed, score, protocol="P3", names=RANKING):
    metrics = dict.fromkeys(names, score)
    folder.mkdir()
    result = {
        "protocol": protocol, "commit": "abc", "date": "2026-01-02 03:04:05", "num_processes": 2,
        "machine": "m", "seed": seed, "seconds": 90.0, "best_epoch": 7, "valid": metrics, "test": metrics,
    }  # fmt: skip
    if names == RANKING:  # of ctr nothing is filtered
        result["filter_seen"] = True
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def run(*folders):
    return subprocess.run([sys.executable, str(SCRIPT), *folders], capture_output=True, text=True)


def test_mean_and_sample_deviation(tmp_path):
    folders = [write_result(tmp_path / str(i), i, score) for i, score in enumerate((0.1, 0.2, 0.3))]
    shown = run(*folders).stdout
    assert "test      NDCG@10 .2000 ± .1000" in shown  # sqrt((.01 + 0 + .01) / 2)
    assert "seeds     0, 1, 2" in shown and "minutes   1.5, 1.5, 1.5" in shown


def test_ctr_has_metrics_of_its_own(tmp_path):
    names = ("logloss", "AUC", "GAUC", "NE")
    folders = [write_result(tmp_path / str(i), i, 0.5 + i / 10, "CTR", names) for i in range(2)]
    shown = run(*folders).stdout
    assert "valid     AUC .5500 ± .0707" in shown and "test      logloss .5500" in shown
    assert "NDCG" not in shown and "protocol  CTR\n" in shown


def test_refuses_unfinished_runs_and_mixed_protocols(tmp_path):
    first = write_result(tmp_path / "a", 0, 0.1)
    other = write_result(tmp_path / "b", 0, 0.1, protocol="P2")
    for folders, word in (((first, other), "different protocols"), ((str(tmp_path / "c"),), "has not ended")):
        result = run(*folders)
        assert result.returncode != 0 and word in result.stderr and "Traceback" not in result.stderr


# ---------------------------------------------------------------- records and blocks


def test_every_published_block_is_that_of_its_records():
    """After a change of a record: python scripts/results.py --write"""
    blocks = results.read_blocks()
    for path in results.written_files():
        assert results.with_blocks(path.read_text(), blocks) == path.read_text(), path.name


def test_every_block_is_published_and_every_record_has_all_it_needs():
    published = {m[2] for path in results.written_files() for m in results.BLOCK.finditer(path.read_text())}
    assert published == set(results.read_blocks())
    for name, seeds in results.read_records().items():
        if "source" in seeds[0]:  # published by others
            continue
        for record in seeds:
            assert record.keys() >= {"seed", "commands", "commit", "date", "machine", "test"}, name
            assert all(command.startswith(("torchrun", "python")) for command in record["commands"])


def test_no_result_stands_outside_a_block():
    for path in results.written_files():
        if path.name not in ("log.md", "extend.md"):  # dated notes; code
            text = FENCE.sub("", results.BLOCK.sub("", path.read_text()))  # without shown output
            assert re.findall(r"(?<![\w.])0?\.\d{4}\b", text) == [], path.name


SPEEDS = {"x": {"tokens/s": {"median": 1234.4}}, "rows": [{"T": 200, "ms": 0.12}, {"T": 1000, "ms": 12.345}]}


@pytest.fixture
def records(tmp_path):
    rows = [
        {"run": "a/lr=1", "seed": seed, "test": {"liked/HR@10": value}, "machine": "m"}
        for seed, value in enumerate((0.1, 0.3))
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(SPEEDS))
    return tmp_path


def test_placeholders_by_hand(records):
    for template, filled in {
        "{a/lr=1 test/liked/HR@10}, {a/lr=1 n} seeds": ".2000 ± .1414, 2 seeds",
        "{a/lr=1 machine} {a/lr=1 seed:.1f}": "m 0.5",
        "{b.json x/tokens/s/median:,.0f}": "1,234",
        "{b.json x}": "|  | value |\n| --- | --- |\n| tokens/s | median: 1,234 |",
        "{b.json rows}": "| T | ms |\n| --- | --- |\n| 200 | 0.12 |\n| 1,000 | 12.3 |",
    }.items():
        assert results.fill(template, records) == filled
    for wrong in ("{c test/HR@10}", "{a/lr=1 test/HR@10}", "{c.json x}"):
        with pytest.raises(UserError, match="no record c|a/lr=1 has no test/HR@10"):
            results.fill(wrong, records)


def test_blocks_are_written_again_in_markdown_and_yaml(records):
    (records / "blocks.md").write_text("intro\n\n## one\n{a/lr=1 n} seeds\nof a\n\n## two\nb\n")
    blocks = results.read_blocks(records)
    text = "x\n<!-- block: one -->\nold\n<!-- end -->\ny\n# block: two\n# end\nz: 1\n"
    new = "x\n<!-- block: one -->\n2 seeds\nof a\n<!-- end -->\ny\n# block: two\n# b\n# end\nz: 1\n"
    assert results.with_blocks(text, blocks) == results.with_blocks(new, blocks) == new
    with pytest.raises(UserError, match="no block three"):
        results.with_blocks("# block: three\n# end\n", blocks)


def test_within_the_spread_of_the_seeds():
    assert results.within([0.1, 0.2, 0.3], 0.39, 0.004)[0]  # two deviations of .1
    assert not results.within([0.1, 0.2, 0.3], 0.41, 0.004)[0]
    assert results.within([0.2], 0.2039, 0.004)[0] and not results.within([0.2], 0.1959, 0.004)[0]


def test_a_record_is_made_from_a_run_and_remade(tmp_path, capfd):
    write_csv(tmp_path / "tiny.csv")
    here(*TINY, f"--dataset={tmp_path / 'tiny.csv'}", "--out_dir=run", cwd=tmp_path).ok()
    line = run("--record=made", str(tmp_path / "run")).stdout
    record = json.loads(line)
    assert record["run"] == "made" and "--out_dir" not in record["commands"][0]
    (tmp_path / "r.jsonl").write_text(line)
    assert results.check("made", tmp_path)
    assert "within .0040, the noise of a seed" in capfd.readouterr().out


# ---------------------------------------------------------------- groups of users


def test_two_groups_of_users_make_up_all_of_them(tmp_path):
    """Their means, weighted by their sizes, are those of the evaluation; the groups are those of a loop."""
    write_csv(tmp_path / "tiny.csv")
    here(*TINY, "--dataset=tiny.csv", "--out_dir=run", cwd=tmp_path).ok()
    whole = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    command = ("--rows=rating >= 5 and timestamp > 1008", "--out_dir=run")
    shown = here(*command, cwd=tmp_path, program=evaluate_groups.main).stdout
    lines = re.findall(r"^test +(.*?) +(\d+) users +HR@10 (.{6}) +NDCG@10 (.{6})$", shown, re.MULTILINE)
    assert [words for words, *_ in lines] == ["with such a row", "all others"]
    counts = [int(count) for _, count, *_ in lines]
    for name, column in (("HR@10", 2), ("NDCG@10", 3)):
        total = sum(count * float(line[column]) for count, line in zip(counts, lines, strict=True))
        assert abs(total / sum(counts) - whole[name]) < 1e-4
    rows = [row.split(",") for row in (tmp_path / "tiny.csv").read_text().splitlines()]
    user, rating, time = (rows[0].index(name) for name in ("user", "rating", "timestamp"))
    chosen = {row[user] for row in rows[1:] if int(row[rating]) >= 5 and int(row[time]) > 1008}
    assert 0 < counts[0] == len(chosen) < sum(counts)


def test_a_condition_that_is_none_is_one_line(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    here(*TINY, "--dataset=tiny.csv", "--num_epochs=1", "--out_dir=run", cwd=tmp_path).ok()
    with pytest.raises(UserError, match="--rows=price > 3: .*columns: user, item"):
        here("--rows=price > 3", "--out_dir=run", cwd=tmp_path, program=evaluate_groups.main)


# ---------------------------------------------------------------- curves


PLOT = SCRIPT.with_name("plot_runs.py")


def plot(*arguments):
    return subprocess.run([sys.executable, str(PLOT), *arguments], capture_output=True, text=True)


def test_curves_of_a_folder_and_of_a_file(tmp_path):
    rows = [{"train_seconds": 60.0, "valid/NDCG@10": 0.1}, {"train_seconds": 30.0, "valid/NDCG@10": 0.2}]
    for path in (tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import plot_runs

    assert plot_runs.read_curve(tmp_path) == ([1.0, 1.5], [0.1, 0.2])
    plot(
        f"--out={tmp_path / 'out.png'}", f"d = 1={tmp_path}", f"b={tmp_path / 'other.jsonl'}"
    ).check_returncode()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for path in ("none", "bad.jsonl"):
        result = plot(f"--out={tmp_path / 'out.png'}", f"a={tmp_path / path}")
        assert result.returncode != 0 and path in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out.png").exists()
