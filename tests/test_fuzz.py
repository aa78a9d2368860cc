"""scripts/fuzz.py: the same few cases each time, and faults planted into the program, which it must find."""

import signal
import sys
import time

import pytest
from launch import MAIN, Result

sys.path.insert(0, str(MAIN.parent / "scripts"))
import fuzz
from fuzz_cases import COLUMNS, SMALL, start


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "case"


def run(folder, *flags):
    fuzz.check(start(COLUMNS, [*SMALL, "--dataset=data.csv", *flags]), folder, folder.parent / "cache")


def test_a_few_cases(tmp_path):
    assert fuzz.fuzz(0, seed=0, folder=tmp_path, most=6) == (6, None)


def test_a_traceback_is_found_made_small_and_can_be_repeated(tmp_path, monkeypatch):
    right = fuzz.here

    def plant(*flags, **options):
        if "--config=bad.yaml" in flags:
            raise KeyError("planted")
        return right(*flags, **options) if "--out_dir=old" in flags else Result(0, "", "", 0)

    monkeypatch.setattr(fuzz, "here", plant)
    tried, found = fuzz.fuzz(0, seed=1, folder=tmp_path, most=40)
    assert tried > 1 and "FOUND KeyError: 'planted'" in found and "in plant" in found
    command = found.splitlines()[-2]
    assert command.endswith("--describe --config=bad.yaml --dataset=data.csv") and "main.py" in command
    assert found.endswith("--seconds=0 --seed=1") and (tmp_path / "case" / "bad.yaml").read_text() == "{}\n"


def test_bad_input_that_is_refused_is_no_find(folder):
    run(folder, "--describe")
    run(folder, "--dim=3")


def test_each_kind_of_find(folder, monkeypatch):
    def says(find, program):
        monkeypatch.setattr("main.describe", program)
        with pytest.raises(fuzz.Find, match=find):
            run(folder, "--describe")

    def error(text, code=2):
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(code)

    says("ZeroDivisionError", lambda given: 1 / 0)
    says("exit code 1 without", lambda given: error("x", 1))
    says("exit code 2 without", lambda given: error("x\ny"))
    says("exit code 2 without", lambda given: error("x\x1b[2J"))
    says("exit code 2 without", lambda given: sys.exit(2))
    says("an error of 5007 characters", lambda given: error("x" * 5000))
    says("changed data.csv", lambda given: (folder / "data.csv").write_text("x"))
    monkeypatch.setattr(fuzz, "LIMIT", 1)
    signal.signal(signal.SIGALRM, fuzz.stop)
    says("still running after 1 s", lambda given: time.sleep(20))
