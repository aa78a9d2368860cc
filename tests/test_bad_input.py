"""Bad input gives ONE line, `error: ...`, naming the cause; nothing is created, changed or overwritten."""

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import TINY, Result, here, python, read_state, snapshot, torchrun, write_csv

from reclm.run.checkpoint import VERSION

DATA = "--dataset=tiny.csv"


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("trained-once")
    write_csv(cwd / "tiny.csv")
    write_csv(cwd / "other.csv", first_item=100)
    here(DATA, *TINY, "--num_epochs=2", cwd=cwd).ok()
    return cwd


@pytest.fixture
def work(trained_once, tmp_path) -> Path:
    """A copy of a folder with two datasets and one run."""
    return Path(shutil.copytree(trained_once, tmp_path / "work", symlinks=True))


def assert_refused(shown: Result, *named: str) -> None:
    assert shown.code != 0, shown.text
    assert len(shown.errors) == 1, shown.text
    for name in named:
        assert name in shown.errors[0]
    # torchrun reports a failed process with its own traceback; none may lead through our files
    ours = re.findall(r'File ".*/(?:main|data|model|evaluate|reclm/(?:\w+/)?\w+)\.py"', shown.text)
    assert not ours, shown.text
    if "torch.distributed.elastic" not in shown.text:
        assert "Traceback" not in shown.text


def rows(*lines: str) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        header = "user,item,rating,timestamp"
        good = ["a,1,5,1", "a,2,5,2", "a,3,5,3", "b,1,5,1"]
        (work / "bad.csv").write_text("\n".join([header, *good, *lines]) + "\n")

    return write


def features(count: int, value: float = 1.0) -> Callable[[Path], None]:
    return lambda work: np.save(work / "few.npy", np.full((count, 3), value))


def columns(count: int) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        lines = [",".join(line.split(",")[:count]) for line in (work / "tiny.csv").read_text().splitlines()]
        (work / "bare.csv").write_text("\n".join(lines))

    return write


bare, untimed = columns(2), columns(3)  # no ratings and no times; no times


def last(work: Path) -> Path:
    return (work / "runs" / "latest").resolve() / "last.pth"


def cut_in_half(work: Path) -> None:
    content = last(work).read_bytes()
    last(work).write_bytes(content[: len(content) // 2])


def pickled_int(work: Path) -> None:
    (work / "foreign.pth").write_bytes(pickle.dumps(5))


def saved_dict(work: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(3)}}, work / "foreign.pth")


def some_bytes(work: Path) -> None:
    (work / "foreign.pth").write_bytes(bytes(range(256)) * 40)


def empty_file(work: Path) -> None:
    (work / "foreign.pth").touch()


def evil_pickle(work: Path) -> None:
    """A pickle that would create a file called pwned if it were loaded without restrictions."""

    class Evil:
        def __reduce__(self):
            return open, ("pwned", "w")

    torch.save(Evil(), work / "foreign.pth")


def other_weights(work: Path) -> None:
    state = read_state(last(work))
    state["model"].pop("norm.weight")
    torch.save(state, work / "foreign.pth")


def with_scores(work: Path) -> None:
    """A checkpoint as version 4 could write it."""
    state = read_state(last(work))
    state["version"], state["config"]["scores"] = 4, "cosine"
    torch.save(state, work / "foreign.pth")


def newer(work: Path) -> None:
    torch.save(read_state(last(work)) | {"version": VERSION + 1}, work / "foreign.pth")


def changed_data(work: Path) -> None:
    write_csv(work / "tiny.csv", num_items=26)


def same_ids_in_another_order(work: Path) -> None:
    header, *lines = (work / "tiny.csv").read_text().splitlines()
    lines = [line[:-4] + str(3000 - int(line[-4:])) for line in lines]
    (work / "tiny.csv").write_text("\n".join([header, *lines]))


def no_runs(work: Path) -> None:
    shutil.rmtree(work / "runs")


def yaml_text(text: str) -> Callable[[Path], None]:
    return lambda work: (work / "my.yaml").write_text(text)


def nothing(work: Path) -> None:
    pass


EVAL = "--eval_only=true"
BARE = "--dataset=bare.csv"
CTR = ["--task=ctr", "--ctr_split=random"]
KNOWS_TIMES = ["--model_name=hstu", "--request_time=true"]
FOREIGN = [EVAL, "--ckpt_name=foreign.pth"]
CASES = {
    # flags and settings
    "unknown flag": (["--learning_rate=1"], nothing, ["--learning_rate"]),
    "stray word": ([DATA, "train"], nothing, ["train"]),
    "wrong type": ([DATA, "--dim=many"], nothing, ["dim", "many"]),
    "float for int": ([DATA, "--num_epochs=1.5"], nothing, ["num_epochs", "1.5"]),
    "not a boolean": ([DATA, "--eval_only=maybe"], nothing, ["eval_only", "maybe"]),
    "no choice": ([DATA, "--dtype=float16"], nothing, ["dtype", "float16", "bfloat16"]),
    "no such loss": ([DATA, "--loss=hinge"], nothing, ["--loss=hinge", "bce, gbce, sampled_softmax"]),
    "no such block": ([DATA, "--model_name=bert"], nothing, ["--model_name=bert", "llama, hstu"]),
    "no such task": ([DATA, "--task=rank"], nothing, ["--task=rank", "matching, ctr"]),
    "no such optimizer": ([DATA, "--optimizer=sgd"], nothing, ["--optimizer=sgd", "adamw"]),
    "removed flag": ([DATA, "--schedule=constant"], nothing, ["--schedule", "--lr_min=1"]),
    "removed, in yaml": (["--config=my.yaml"], yaml_text("scores: cosine\n"), ["my.yaml", "--scores"]),
    "negative": ([DATA, "--lr=-1"], nothing, ["--lr=-1"]),
    "nan setting": ([DATA, "--lr=nan"], nothing, ["--lr", "nan"]),
    "null in yaml": (["--config=my.yaml"], yaml_text("ckpt_name: null\n"), ["my.yaml: --ckpt_name is null"]),
    "more than a float": ([DATA, f"--ema={'9' * 400}"], nothing, ["too large to convert to float"]),
    "negative seed": ([DATA, "--seed=-1"], nothing, ["--seed=-1"]),
    "huge seed": ([DATA, *TINY, f"--seed={10**20}"], nothing, [f"--seed={10**20}"]),
    "heads": ([DATA, "--dim=16", "--n_heads=3"], nothing, ["--dim=16", "--n_heads=3"]),
    "unknown yaml key": (["--config=my.yaml"], yaml_text("dimm: 16\n"), ["dimm"]),
    "wrong type in yaml": (["--config=my.yaml"], yaml_text("dim: many\n"), ["dim", "many"]),
    "broken yaml": (["--config=my.yaml"], yaml_text("dim: [16\n"), ["config", "line 2"]),
    "list for yaml": (["--config=my.yaml"], yaml_text("- dim\n"), ["config", "- dim"]),
    "no yaml": (["--config=none.yaml"], nothing, ["none.yaml"]),
    # data
    "no data": (["--dataset=none.csv"], nothing, ["none.csv"]),
    "no such name": (["--dataset=ml-2m"], nothing, ["ml-2m", "ml-1m"]),
    "missing field": (["--dataset=bad.csv"], rows("c,1,5"), ["bad.csv, line 6"]),
    "rating": (["--dataset=bad.csv"], rows("c,1,good,1"), ["bad.csv, line 6", "good"]),
    "nan time": (["--dataset=bad.csv"], rows("c,1,5,nan"), ["bad.csv, line 6", "timestamp"]),
    "negative time": (["--dataset=bad.csv"], rows("c,1,5,-7"), ["bad.csv, line 6", "-7"]),
    "too short": (
        ["--dataset=short.csv"],
        lambda work: (work / "short.csv").write_text("user,item\na,1\na,2\nb,1\n"),
        ["no user has 3"],
    ),
    "all filtered": ([DATA, "--min_item_count=1000"], nothing, ["min_item_count"]),
    "no columns": (
        ["--dataset=short.csv"],
        lambda work: (work / "short.csv").write_text("a,1,x\na,2,x\n"),
        ["short.csv", "no header", "--columns"],
    ),
    # what rows contain
    "no profiles": ([DATA, "--profile_tokens=true"], nothing, ["--profile_tokens", "user table", "tiny"]),
    "no genres": ([DATA, "--item_features=genres"], nothing, ["--item_features=genres", "tiny"]),
    "no features": ([DATA, "--item_features=none.npy"], nothing, ["none.npy"]),
    "too few features": ([DATA, "--item_features=few.npy"], features(24), ["few.npy", "24 rows", "25 items"]),
    "nan features": ([DATA, "--item_features=few.npy"], features(25, np.nan), ["few.npy", "item i0"]),
    "id dropout": ([DATA, "--id_dropout=.1"], nothing, ["--id_dropout=0.1", "--item_features"]),
    "bare users": (
        ["--dataset=tiny.csv"],
        lambda work: (work / "tiny.users.csv").write_text("name,age\nu1,7\n"),
        ["tiny.users.csv", "user", "name, age"],
    ),
    "users in a list": (
        ["--dataset=tiny.csv"],
        lambda work: (work / "tiny.users.jsonl").write_text('{"user": ["u1"], "age": 7}\n'),
        ["tiny.users.jsonl, line 1: user is a list"],
    ),
    "a long line": (
        ["--dataset=tiny.csv"],
        lambda work: (work / "tiny.csv").write_text(f"{'x' * 5000},y\n1,2\n"),
        ["tiny.csv needs the columns", " ... ", "--columns=user=NAME"],
    ),
    "no ratings": ([BARE, "--negative_below=3"], bare, ["--negative_below", "ratings"]),
    "no actions": ([BARE, "--action_embedding=true"], bare, ["--action_embedding", "ratings"]),
    "no times, tokens": ([BARE, "--time_tokens=tokens"], bare, ["--time_tokens", "timestamps"]),
    "no times, head": ([BARE, "--time_head=true"], bare, ["--time_head", "timestamps"]),
    "no times, request": ([BARE, *KNOWS_TIMES], bare, ["--request_time", "timestamps"]),
    "no times, ctr": ([BARE, *CTR, "--time_tokens=embedding"], untimed, ["--time_tokens", "timestamps"]),
    "no profiles, ctr": ([BARE, *CTR, "--profile_tokens=true"], untimed, ["--profile_tokens", "user table"]),
    "no genres, ctr": ([BARE, *CTR, "--item_features=genres"], untimed, ["--item_features=genres", "bare"]),
    "all negative": ([DATA, "--negative_below=6"], nothing, ["--negative_below"]),
    "nan negative": ([DATA, "--negative_below=nan"], nothing, ["negative_below", "nan"]),
    "request time and time head": (
        [DATA, "--time_head=true", "--request_time=true", "--time_tokens=tokens"],
        nothing,
        ["--request_time=true", "--time_head=true"],
    ),
    "too few cold items": ([DATA, "--cold_items=.01"], nothing, ["--cold_items=0.01"]),
    # checkpoints
    "no run": ([EVAL], no_runs, ["runs/latest", "--eval_only=false"]),
    "no such checkpoint": ([EVAL, "--ckpt_name=epoch_7.pth"], nothing,
                           ["epoch_7.pth", "epoch_0.pth, epoch_1.pth, best.pth, last.pth"]),
    "truncated": ([EVAL, "--ckpt_name=last.pth"], cut_in_half, ["last.pth", "truncated"]),
    "truncated, resumed": (["--resume=auto"], cut_in_half, ["last.pth", "truncated"]),
    "pickled int": (FOREIGN, pickled_int, ["foreign.pth", "checkpoint"]),
    "saved dict": (FOREIGN, saved_dict, ["foreign.pth", "not a checkpoint"]),
    "some bytes": (FOREIGN, some_bytes, ["foreign.pth", "checkpoint"]),
    "empty file": (FOREIGN, empty_file, ["foreign.pth", "checkpoint"]),
    "evil pickle": (FOREIGN, evil_pickle, ["foreign.pth", "checkpoint"]),
    "settings that are gone": (FOREIGN, with_scores, ["foreign.pth", "--scores", "dot"]),
    "newer version": (FOREIGN, newer, ["foreign.pth", "another version"]),
    "other weights": (FOREIGN, other_weights, ["foreign.pth", "norm.weight"]),
    "other data": ([EVAL, "--dataset=other.csv"], nothing, ["best.pth", "trained on tiny", "is other"]),
    "changed data": ([EVAL], changed_data, ["best.pth", "fingerprint"]),
    "changed data, resumed": (["--resume=auto"], changed_data, ["last.pth", "fingerprint"]),
    "changed order": ([EVAL], same_ids_in_another_order, ["best.pth", "fingerprint"]),
    "other dim": ([EVAL, "--dim=32"], nothing, ["--dim=32", "dim=16"]),
    "other lr, resumed": (["--resume=auto", "--lr=0.5"], nothing, ["--lr=0.5", "lr=0.01"]),
    "longer, resumed": (["--resume=auto", "--num_epochs=3"], nothing, ["--num_epochs=3", "num_epochs=2"]),
    "no such resume": (["--resume=none.pth"], nothing, ["none.pth"]),
    "resume a passed point": (["--resume=runs/latest/epoch_0.pth"], nothing, ["epoch_0.pth"]),
    # the machine
    "no gpu": ([DATA, *TINY, "--device=cuda"], nothing, ["--device=cuda"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(work, case):
    """One line of error; no run folder is created, and runs/latest is unchanged."""
    flags, prepare, named = CASES[case]
    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    prepare(work)
    before = snapshot(work)
    assert_refused(here(*flags, cwd=work), *named)
    assert snapshot(work) == before


def test_abbreviated_flag_in_a_real_process(work):
    before = snapshot(work)
    shown = python(DATA, "--num_epo=1", cwd=work)
    assert_refused(shown, "--num_epo")
    assert shown.code == 2 and snapshot(work) == before


def test_out_dir_of_another_run(work):
    (work / "notes").mkdir()
    (work / "notes" / "thesis.txt").write_text("years of work")
    before = snapshot(work)
    for folder, resume in (("runs/latest", []), ("notes", []), ("notes", ["--resume=auto"])):
        shown = here(DATA, *TINY, f"--out_dir={folder}", *resume, cwd=work)
        assert_refused(shown, f"--out_dir={folder}", "not empty")
        assert snapshot(work) == before


def test_out_dir_is_a_file(work):
    before = snapshot(work)
    assert_refused(here(DATA, *TINY, "--out_dir=tiny.csv", cwd=work), "tiny.csv")
    assert snapshot(work) == before


def test_broken_weights_cannot_be_evaluated(work):
    state = read_state(last(work))
    state["model"]["norm.weight"][3] = torch.nan
    torch.save(state, work / "foreign.pth")
    before = snapshot(work)
    assert_refused(here(*FOREIGN, cwd=work), "non-finite scores to 40 user(s)", "u")
    assert snapshot(work) == before


# ---------------------------------------------------------------- two processes: still one line, and an end

SLOW_MAIN_PROCESS = """
import argparse, os, time
if os.environ.get("RANK") == "0":
    original = argparse.ArgumentParser.__init__
    def slow(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.prog == "main.py":
            print("slow", flush=True)
            time.sleep(2)
    argparse.ArgumentParser.__init__ = slow
"""


def test_two_processes_unknown_flag_and_a_slow_main_process(work, tmp_path):
    """Only process 0 speaks: if it is late, process 1 must not end before, or torchrun kills the message."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_MAIN_PROCESS)
    before = snapshot(work)
    shown = torchrun(2, DATA, "--learning_rate=1", cwd=work, env={"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert "slow" in shown.stdout
    assert_refused(shown, "--learning_rate")
    assert snapshot(work) == before


def test_two_processes_missing_data(work):
    before = snapshot(work)
    assert_refused(torchrun(2, "--dataset=none.csv", cwd=work, timeout=60), "none.csv")
    assert snapshot(work) == before


def test_two_processes_out_dir_of_another_run(work):
    before = snapshot(work)
    shown = torchrun(2, DATA, *TINY, f"--out_dir={last(work).parent}", cwd=work, timeout=60)
    assert_refused(shown, "--out_dir=", "not empty")
    assert snapshot(work) == before


def test_two_processes_one_user(work):
    (work / "one.csv").write_text("user,item\n" + "a,1\na,2\na,3\na,4\nb,1\n")
    before = snapshot(work)
    assert_refused(
        torchrun(2, "--dataset=one.csv", *TINY, cwd=work, timeout=60), "2 processes", "1 sequences"
    )
    assert snapshot(work) == before


def test_two_processes_loss_becomes_nan(work):
    flags = ["--lr=1e30", "--clip_norm=0", "--warmup_steps=0", "--out_dir=nan"]
    shown = torchrun(2, DATA, *TINY, *flags, cwd=work, timeout=60)
    assert_refused(shown, "epoch 0, step", "--lr")
    assert "in process" in shown.errors[0] or "overflow" in shown.errors[0]
    assert not list((work / "nan").glob("*.pth"))


def test_nan_later_leaves_the_saved_epochs(work):
    """If weights become NaN in a later epoch, the epochs saved before stay and are readable."""
    state = read_state(last(work))
    state["model"]["norm.weight"][3] = torch.inf
    state["config"]["lr_min"] = 1.0  # so that it can be extended
    torch.save(state, last(work))
    before = {name: content for name, content in snapshot(work).items() if name.endswith(".pth")}
    shown = here("--resume=auto", "--num_epochs=4", cwd=work)
    assert_refused(shown, "in process 0 at epoch 2, step 0")
    assert {k: v for k, v in snapshot(work).items() if k.endswith(".pth")} == before
