"""scripts/bench/prepare.py: made-up files, a real run of both parts, rows of a record that are replaced."""

import importlib.util
import sys

import pyarrow.parquet
from launch import MAIN, here, read_json

from reclm.errors import run_script

SCRIPT = MAIN.parent / "scripts" / "bench" / "prepare.py"
sys.path.insert(0, str(SCRIPT.parent))
spec = importlib.util.spec_from_file_location("bench_prepare", SCRIPT)  # scripts/prepare.py has the same name
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def test_files_are_of_bounded_size_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FILE", 1000)
    first, again = (bench.make_files(tmp_path / name, 2500) for name in ("first", "again"))
    tables = [pyarrow.parquet.read_table(file) for file in sorted(first.iterdir())]
    assert [len(table) for table in tables] == [1000, 1000, 500]
    assert tables == [pyarrow.parquet.read_table(file) for file in sorted(again.iterdir())]
    assert all(time % 60 == 1_600_000_000 % 60 for time in tables[0]["timestamp"].to_pylist())
    assert not tables[0].equals(tables[1]) and max(tables[0]["user"].to_pylist()) < 25


def test_the_script_replaces_what_it_measures(tmp_path):
    flags = ["--millions=.01,.02", "--steps=4", "--work=work", "--out=record.json"]

    def run(*more):
        return here(*flags, *more, cwd=tmp_path, program=lambda: run_script(bench.main))

    shown = run("--engines=pandas", "--millions=.01").ok().stdout
    assert "| pandas | 0.01 |" in shown
    before = read_json(tmp_path / "record.json")
    run("--parts=preparation", "--engines=polars,pandas", "--millions=.01").ok()
    after = read_json(tmp_path / "record.json")
    assert [row["engine"] for row in after["preparation"]] == ["pandas", "polars"]
    assert after["preparation"][0] != before["preparation"][0] and after["training"] == before["training"]
    row = after["training"][0]
    assert (
        row["steps/s"]["median"] > 0 and 0.1 < row["peak GiB"]["median"] < 2 and row["users"]["median"] == 100
    )
    assert "--engines must be of" in run("--engines=dask").errors[0]
