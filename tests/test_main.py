"""The commands of a user from end to end: processes, files, resume, signals. Tiny data, real processes."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import (
    TINY,
    Running,
    here,
    in_small_batches,
    is_running,
    read_json,
    read_rows,
    read_state,
    snapshot,
    torchrun,
    write_csv,
)

import evaluate
from reclm.errors import UserError
from reclm.run import checkpoint
from reclm.run.process import StopRequest

# With three rows a step or fewer, the third of three processes has none in some of the steps. A constant
# learning rate, so that the first epochs are the same however many are to follow.
LONGER = ["--dataset=tiny.csv", *TINY, "--lr_min=1"]
SAME = [*LONGER, "--batch_size=3"]
SLOW = [*TINY, "--dataset=tiny.csv", "--batch_size=1", "--num_epochs=4", "--out_dir=run"]
SLOW += ["--max_len=6", "--ema=.9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder where both commands of the README have been run on two processes."""
    cwd = tmp_path_factory.mktemp("trained")
    write_csv(cwd / "tiny.csv")
    shown = torchrun(2, "--eval_only=false", *SAME, "--num_epochs=16", cwd=cwd).ok()
    assert shown.stdout.count("TEST, best validation epoch") == 1  # one process speaks for all
    shown = torchrun(2, "--eval_only=true", "--ckpt_name=epoch_15.pth", cwd=cwd).ok()
    assert shown.stdout.count("TEST of") == shown.stdout.count("written to") == 1
    return cwd


def run_dir(cwd: Path) -> Path:
    return (cwd / "runs" / "latest").resolve()


def assert_same_run(resumed: Path, whole: Path) -> None:
    """Weights and optimizer to the last bit, and each epoch logged once."""
    rows = read_rows(resumed)
    assert rows == read_rows(whole)[: len(rows)]
    ours, theirs = read_state(resumed / "last.pth"), read_state(whole / f"epoch_{len(rows) - 1}.pth")
    assert ours["progress"]["epoch"] == theirs["progress"]["epoch"] == len(rows)
    assert_equal(ours["model"], theirs["model"])
    assert_equal(ours.get("trained", {}), theirs.get("trained", {}))
    for number, moments in theirs["optimizer"]["state"].items():
        assert_equal(ours["optimizer"]["state"][number], moments)


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# ---------------------------------------------------------------- the two commands


def test_training_leaves_all_files(trained):
    folder = run_dir(trained)
    assert folder.parent == trained / "runs"
    names = {path.name for path in folder.iterdir()}
    wanted = {f"epoch_{n}.pth" for n in range(16)} | {"best.pth", "last.pth", "config.yaml"}
    wanted |= {
        "histories.npz",
        "metrics.jsonl",
        "result.json",
        "curves.png",
        "tensorboard",
        "eval-epoch_15.json",
    }
    assert names == wanted
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(list((folder / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert [row["epoch"] for row in read_rows(folder)] == list(range(16))


def test_result_says_what_makes_it_again(trained):
    result = read_json(run_dir(trained) / "result.json")
    assert result["dataset"] == "tiny" and result["num_processes"] == 2 and result["seed"] == 0
    assert "leave-one-out" in result["protocol"] and result["num_users"] == 40 and result["num_items"] == 25
    assert result["commit"] and 0 < result["seconds"] < 100
    rows = read_rows(run_dir(trained))
    best = max(rows, key=lambda row: row["valid/NDCG@10"])
    assert result["best_epoch"] == best["epoch"]
    assert result["valid"] == {k.removeprefix("valid/"): v for k, v in best.items() if k.startswith("valid/")}
    assert result["test"].keys() >= {"HR@10", "NDCG@10"}


def test_it_learns(trained):
    result = read_json(run_dir(trained) / "result.json")
    assert result["test"]["NDCG@10"] > 0.5  # by chance: 0.18
    rows = read_rows(run_dir(trained))
    assert rows[-1]["loss"] < rows[0]["loss"] / 2


def test_evaluation_does_not_depend_on_processes(trained, tmp_path, monkeypatch):
    """It does not depend on the number of users ranked at once either: all in the fixture, 7 here."""
    folder, flags = run_dir(trained), ["--eval_only=true", "--ckpt_name=epoch_15.pth"]
    results = [read_json(folder / "eval-epoch_15.json")]
    monkeypatch.setattr(evaluate, "USERS_AT_ONCE", 7)
    here(*flags, cwd=trained).ok()
    results.append(read_json(folder / "eval-epoch_15.json"))
    torchrun(3, *flags, cwd=trained, program=in_small_batches(tmp_path)).ok()
    results.append(read_json(folder / "eval-epoch_15.json"))
    assert [result["num_processes"] for result in results] == [2, 1, 3]
    for split in ("valid", "test"):
        assert results[0][split] == results[1][split] == results[2][split]


def test_evaluation_of_the_best_is_the_result(trained):
    here("--eval_only=true", cwd=trained).ok()  # best.pth
    folder = run_dir(trained)
    result, evaluated = read_json(folder / "result.json"), read_json(folder / "eval-best.json")
    assert evaluated["test"] == result["test"] and evaluated["valid"] == result["valid"]


def test_a_second_training_leaves_the_first_alone(trained):
    first = run_dir(trained)
    before = snapshot(first)
    here("--dataset=tiny.csv", *TINY, "--num_epochs=1", cwd=trained).ok()
    second = run_dir(trained)
    assert second != first and {first.name, second.name, "latest"} == set(os.listdir(trained / "runs"))
    assert snapshot(first) == before
    (trained / "runs" / "latest").unlink()
    (trained / "runs" / "latest").symlink_to(first.name)  # as the other tests expect


def test_config_yaml_makes_the_run_again(tmp_path):
    """And flags override it."""
    write_csv(tmp_path / "tiny.csv")
    here("--dataset=tiny.csv", *TINY, "--num_epochs=2", "--out_dir=a", cwd=tmp_path).ok()
    here("--config=a/config.yaml", "--out_dir=b", cwd=tmp_path).ok()
    assert_same_run(tmp_path / "b", tmp_path / "a")
    here("--config=a/config.yaml", "--out_dir=c", "--num_epochs=1", "--seed=1", cwd=tmp_path).ok()
    assert [row["epoch"] for row in read_rows(tmp_path / "c")] == [0]
    assert read_rows(tmp_path / "c")[0]["loss"] != read_rows(tmp_path / "a")[0]["loss"]


def test_training_does_not_depend_on_processes(trained, tmp_path):
    """With dropout. batch_size is that of ALL processes; of three one has no row in some of the steps. The
    third run goes on where one of a single process was, on three, and cuts the batches further."""
    write_csv(tmp_path / "tiny.csv")
    here(*SAME, "--num_epochs=2", "--out_dir=on1", cwd=tmp_path).ok()
    torchrun(3, *SAME, "--num_epochs=1", "--out_dir=on3", cwd=tmp_path).ok()
    assert_close_runs(tmp_path / "on1", run_dir(trained), 2)
    assert_close_runs(tmp_path / "on3", run_dir(trained), 1)
    shutil.rmtree(tmp_path / "on3")
    here(*SAME, "--num_epochs=1", "--grad_accum_steps=2", "--out_dir=on3", cwd=tmp_path).ok()
    torchrun(3, *SAME, "--num_epochs=2", "--out_dir=on3", "--resume=auto", cwd=tmp_path).ok()
    assert_close_runs(tmp_path / "on3", run_dir(trained), 2)


def assert_close_runs(ours: Path, theirs: Path, epochs: int) -> None:
    """Equal but for rounding: the loss to six digits."""
    pairs = list(zip(read_rows(ours), read_rows(theirs), strict=False))[:epochs]
    assert [one["loss"] for one, _ in pairs] == pytest.approx([two["loss"] for _, two in pairs], rel=1e-6)
    one, two = (read_state(folder / f"epoch_{epochs - 1}.pth")["model"] for folder in (ours, theirs))
    for name, weight in two.items():
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- interrupted and resumed


def saved_epoch(folder: Path) -> int:
    """The epoch that last.pth holds whole; -1 if there is none."""
    try:
        names = [path.name for path in checkpoint.epoch_files(folder) if path.samefile(folder / "last.pth")]
    except OSError:
        return -1
    return int(names[-1][6:-4]) if names else -1


def test_two_processes_stopped_then_one_killed_then_finished(trained, tmp_path):
    """SIGTERM saves the middle of an epoch; a process that dies takes the other one down; and what goes on
    from there is, to the last bit, the run that nothing disturbed."""
    write_csv(tmp_path / "tiny.csv")
    folder, command = tmp_path / "run", [*SAME, "--out_dir=run", "--resume=auto"]  # auto: new at first

    run = Running(2, *command, "--num_epochs=16", cwd=tmp_path)
    run.wait_until(lambda: saved_epoch(folder) >= 0)
    os.killpg(run.process.pid, signal.SIGTERM)  # torchrun's; those that it started are groups of their own
    shown = run.finish(15)
    assert shown.code != 0
    assert shown.stdout.count("stopped at epoch") == 1
    assert "continue with: --resume=auto --out_dir=run" in shown.stdout
    stopped = read_state(folder / "last.pth")["progress"]
    assert stopped["step"] > 0

    run = Running(2, *command, "--num_epochs=16", cwd=tmp_path)
    run.wait_until(lambda: saved_epoch(folder) >= stopped["epoch"])
    pids = run.processes()
    assert sorted(pids) == [0, 1]
    os.kill(pids[1], signal.SIGKILL)
    shown = run.finish(20)
    assert shown.code != 0 and not any(is_running(pid) for pid in pids.values())
    assert f"resuming from run/last.pth: epoch {stopped['epoch']}, step {stopped['step']}" in shown.stdout
    assert not (folder / "result.json").exists()

    killed = read_state(folder / "last.pth")["progress"]
    assert killed["epoch"] > stopped["epoch"] and killed["step"] == 0
    torchrun(2, *command, f"--num_epochs={killed['epoch'] + 1}", cwd=tmp_path).ok()
    assert_same_run(folder, run_dir(trained))
    assert not list(folder.glob(".*"))


def test_torchrun_restarts_what_dies(trained, tmp_path):
    """Each of two processes is killed once, process 0 with the lock of the folder. torch 2.13 alone restarts
    with the addresses of the attempt before, and may hang."""
    write_csv(tmp_path / "tiny.csv")
    folder = tmp_path / "run"
    flags = [*SAME, "--num_epochs=16", "--save_every=4", "--out_dir=run", "--resume=auto"]
    run = Running(2, *flags, cwd=tmp_path, restarts=3)
    for victim, epoch in ((0, 1), (1, 3)):
        run.wait_until(lambda n=epoch: len(checkpoint.epoch_files(folder)) > n and len(run.processes()) == 2)
        os.kill(run.processes()[victim], signal.SIGKILL)
    shown = run.finish().ok()
    assert shown.stdout.count("resuming from run/last.pth") == 2
    assert_same_run(folder, run_dir(trained))


def test_one_process_ctrl_c_then_sigkill_then_finished(tmp_path):
    """With dropout, a schedule and averaged weights, whose next values must be those of the undisturbed
    run."""
    write_csv(tmp_path / "tiny.csv")
    here(*SLOW, "--out_dir=whole", cwd=tmp_path).ok()
    state = read_state(tmp_path / "whole" / "last.pth")
    assert any(not torch.equal(state["trained"][name], weight) for name, weight in state["model"].items())
    folder = tmp_path / "run"

    run = Running(0, *SLOW, cwd=tmp_path)
    run.wait_until(lambda: saved_epoch(folder) >= 0)
    run.process.send_signal(signal.SIGINT)
    shown = run.finish(15)
    assert shown.code == 128 + signal.SIGINT and "Traceback" not in shown.text
    assert "continue with: --resume=auto --out_dir=run" in shown.stdout
    stopped = read_state(folder / "last.pth")["progress"]
    assert stopped["step"] > 0

    run = Running(0, *SLOW, "--resume=auto", cwd=tmp_path)
    run.wait_until(lambda: saved_epoch(folder) >= stopped["epoch"])
    time.sleep(0.1)  # into the next epoch
    run.kill()
    assert not (folder / "result.json").exists()
    here(*SLOW, "--resume=auto", cwd=tmp_path).ok()
    assert_same_run(folder, tmp_path / "whole")
    assert len(read_rows(folder)) == 4 and not list(folder.glob(".*"))


def test_saved_in_the_background_then_killed_then_finished(tmp_path):
    """What is written in mid-epoch is the state of its step, whatever training changes meanwhile."""
    write_csv(tmp_path / "tiny.csv")
    here(*SLOW, "--num_epochs=2", "--out_dir=whole", cwd=tmp_path).ok()
    folder, flags = tmp_path / "run", [*SLOW, "--num_epochs=2", "--save_every=7", "--resume=auto"]

    def in_an_epoch() -> bool:
        return (folder / "last.pth").is_file() and read_state(folder / "last.pth")["progress"]["step"] > 0

    run = Running(0, *flags, cwd=tmp_path)
    run.wait_until(in_an_epoch)
    run.kill()
    assert read_state(folder / "last.pth")["progress"]["step"] % 7 == 0
    here(*flags, cwd=tmp_path).ok()
    assert_same_run(folder, tmp_path / "whole")


def test_a_full_disk_in_the_background_is_one_line(tmp_path, monkeypatch):
    write_csv(tmp_path / "tiny.csv")
    written, save = [], checkpoint.save_checkpoint

    def full(state, out_dir, names):
        written.append(names)
        if len(written) == 3:
            raise UserError("cannot save run/last.pth (No space left on device): free some disk space")
        save(state, out_dir, names)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    shown = here(*SLOW, "--save_every=2", cwd=tmp_path)
    assert shown.code == 2 and len(shown.errors) == 1 and "No space left on device" in shown.errors[0]
    assert written == [["last.pth"]] * 3
    monkeypatch.undo()
    here(*SLOW, "--resume=auto", cwd=tmp_path).ok()
    here(*SLOW, "--out_dir=whole", cwd=tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_draws_are_a_function_of_seed_epoch_and_step(monkeypatch):
    def draw(*place: int, process: int) -> float:
        monkeypatch.setenv("RANK", str(process))
        checkpoint.seed_step(*place)
        return torch.rand(()).item()

    places = [(seed, epoch, step) for seed in (0, 1) for epoch in (0, 1) for step in range(5)]
    draws = [draw(*place, process=0) for place in places]
    assert len(set(draws)) == len(draws)
    assert draws == [draw(*place, process=2) for place in places]


def stop_after(monkeypatch, number: int) -> None:
    """As if SIGTERM arrived in that step, counted from 1."""
    steps = []

    def stopped(request) -> bool:
        steps.append(1)
        return len(steps) == number

    monkeypatch.setattr(StopRequest, "__bool__", stopped)


@pytest.mark.parametrize("step", [1, 5])  # of 5 steps in an epoch
def test_stopped_in_the_first_or_the_last_step_of_an_epoch(tmp_path, monkeypatch, step):
    write_csv(tmp_path / "tiny.csv")
    flags = ["--dataset=tiny.csv", *TINY, "--num_epochs=2"]
    here(*flags, "--out_dir=whole", cwd=tmp_path).ok()
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert here(*flags, "--out_dir=run", cwd=tmp_path).code == 128 + signal.SIGTERM
    shown = here(*flags, "--out_dir=run", "--resume=auto", cwd=tmp_path).ok()
    assert f"resuming from run/last.pth: epoch 0, step {step}" in shown.stdout
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    """What StopRequest promises."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        request = StopRequest()
        assert not request
        signal.raise_signal(signal.SIGINT)
        assert request and request.signal == signal.SIGINT
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- where a run goes on


def test_resume_auto_finds_runs_latest(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    here(*LONGER, "--num_epochs=1", cwd=tmp_path).ok()
    here("--resume=auto", "--num_epochs=2", cwd=tmp_path).ok()
    assert len(list((tmp_path / "runs").glob("2*"))) == 1
    assert [row["epoch"] for row in read_rows(run_dir(tmp_path))] == [0, 1]


@pytest.mark.parametrize("resume", [["--resume=auto"], ["--resume=auto", "--out_dir=runs/latest"]])
def test_resume_auto_finds_a_named_run_through_latest(tmp_path, resume):
    """runs/latest points at runs/mine, whose out_dir was named by the user."""
    write_csv(tmp_path / "tiny.csv")
    here(*LONGER, "--num_epochs=1", "--out_dir=runs/mine", cwd=tmp_path).ok()
    assert run_dir(tmp_path).name == "mine"
    shown = here(*resume, "--num_epochs=2", cwd=tmp_path)
    assert shown.code == 0, shown.text
    assert [row["epoch"] for row in read_rows(tmp_path / "runs" / "mine")] == [0, 1]


@pytest.mark.parametrize("moved", [False, True])
def test_resume_by_absolute_path(tmp_path, moved):
    """A run continues in the folder of its checkpoint, even after the folder was moved."""
    write_csv(tmp_path / "tiny.csv")
    here(*LONGER, "--num_epochs=1", "--out_dir=run", cwd=tmp_path).ok()
    folder = tmp_path / ("other" if moved else "run")
    (tmp_path / "run").rename(folder)
    shown = here(f"--resume={folder / 'last.pth'}", "--num_epochs=2", cwd=tmp_path)
    assert shown.code == 0, shown.text
    assert [row["epoch"] for row in read_rows(folder)] == [0, 1]


def test_resume_with_another_out_dir_copies_nothing_over(tmp_path):
    """From the middle of an old run into a new folder; the old folder is unchanged."""
    write_csv(tmp_path / "tiny.csv")
    here("--dataset=tiny.csv", *TINY, "--num_epochs=3", "--out_dir=old", cwd=tmp_path).ok()
    before = snapshot(tmp_path / "old")
    here("--resume=old/epoch_0.pth", "--out_dir=new", cwd=tmp_path).ok()
    assert snapshot(tmp_path / "old") == before
    assert_same_run(tmp_path / "new", tmp_path / "old")


def test_resume_of_a_finished_run_reports_again(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    here("--dataset=tiny.csv", *TINY, "--num_epochs=1", "--out_dir=run", cwd=tmp_path).ok()
    before = {name: content for name, content in snapshot(tmp_path / "run").items() if name.endswith(".pth")}
    result = read_json(tmp_path / "run" / "result.json")
    here("--resume=auto", "--out_dir=run", cwd=tmp_path).ok()
    assert read_json(tmp_path / "run" / "result.json")["test"] == result["test"]
    assert {k: v for k, v in snapshot(tmp_path / "run").items() if k.endswith(".pth")} == before


def test_a_start_that_failed_can_be_started_again(tmp_path):
    """No epoch was saved. With other settings it is another run, and takes another folder."""
    write_csv(tmp_path / "tiny.csv")
    flags = ["--dataset=tiny.csv", *TINY, "--num_epochs=1", "--resume=auto"]
    if not torch.cuda.is_available():
        assert here(*flags, "--out_dir=run", "--device=cuda", cwd=tmp_path).code == 2
    diverging = ["--clip_norm=0", "--warmup_steps=0", "--lr=1e30"]
    assert here(*flags, *diverging, "--out_dir=run", cwd=tmp_path).code == 2
    assert "has lr=1e+30" in here(*flags, *diverging[:2], "--out_dir=run", cwd=tmp_path).errors[0]
    here(*flags, "--out_dir=new", cwd=tmp_path).ok()


# ---------------------------------------------------------------- keeping, stopping, saving


def test_keep_last_spares_what_is_named(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    flags = ["--dataset=tiny.csv", *TINY, "--num_epochs=6", "--out_dir=run"]
    here(*flags, "--keep_last=2", "--ckpt_name=epoch_0.pth", cwd=tmp_path).ok()
    names = {path.name for path in (tmp_path / "run").glob("*.pth")}
    assert names == {"epoch_0.pth", "epoch_4.pth", "epoch_5.pth", "best.pth", "last.pth"}
    assert read_state(tmp_path / "run" / "epoch_0.pth")["progress"]["epoch"] == 1


def test_patience_stops_early(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    flags = [*LONGER, "--num_epochs=50", "--patience=2", "--out_dir=run"]
    shown = here(*flags, "--lr=1e-9", cwd=tmp_path).ok()  # nothing changes
    assert "stopping early" in shown.stdout
    rows = read_rows(tmp_path / "run")
    result = read_json(tmp_path / "run" / "result.json")
    assert len(rows) == result["best_epoch"] + 3 < 50


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")]
)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, error):
    names = ["epoch_0.pth", "last.pth", "best.pth"]
    checkpoint.save_checkpoint({"value": 1}, tmp_path, names)
    before = snapshot(tmp_path)

    def write_some(state, file) -> None:
        file.write(b"some bytes")
        raise error

    monkeypatch.setattr(torch, "save", write_some)
    for again in (names, ["epoch_1.pth", "last.pth"]):
        with pytest.raises(UserError, match="cannot save .*--resume=auto") as caught:
            checkpoint.save_checkpoint({"value": 2}, tmp_path, again)
        assert "\n" not in str(caught.value)
        assert snapshot(tmp_path) == before


def test_saving_replaces_all_names(tmp_path):
    checkpoint.save_checkpoint({"value": 1}, tmp_path, ["epoch_0.pth", "last.pth", "best.pth"])
    checkpoint.save_checkpoint({"value": 2}, tmp_path, ["epoch_1.pth", "last.pth"])
    values = {path.name: read_state(path)["value"] for path in tmp_path.iterdir()}
    assert values == {"epoch_0.pth": 1, "best.pth": 1, "epoch_1.pth": 2, "last.pth": 2}


def test_no_hard_links_here(tmp_path, monkeypatch):
    """exFAT and many network and cloud mounts have no hard links: files are copied instead."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save_checkpoint({"value": 1}, tmp_path, ["epoch_0.pth", "last.pth"])
    assert read_state(tmp_path / "last.pth")["value"] == 1


def test_prune_and_find(tmp_path):
    for name in ("epoch_2.pth", "epoch_10.pth", "epoch_9.pth", "best.pth", "epoch_x.pth", "epoch_1.pth.bak"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in checkpoint.epoch_files(tmp_path)] == [
        "epoch_2.pth", "epoch_9.pth", "epoch_10.pth",
    ]  # fmt: skip
    there = "epoch_2.pth, epoch_9.pth, epoch_10.pth, best.pth"
    with pytest.raises(UserError, match=f"no checkpoint nope.pth .*{there}"):
        checkpoint.find_checkpoint("nope.pth", tmp_path)
    assert checkpoint.find_checkpoint("epoch_9.pth", tmp_path) == tmp_path / "epoch_9.pth"
    checkpoint.prune(tmp_path, 0, "best.pth")
    assert len(list(tmp_path.iterdir())) == 6
    checkpoint.prune(tmp_path, 1, str(tmp_path / "epoch_2.pth"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"epoch_2.pth", "epoch_10.pth", "best.pth", "epoch_x.pth", "epoch_1.pth.bak"}


def test_checkpoint_holds_nothing_but_data(trained):
    """It loads without running code and contains all that a resumed run needs."""
    state = checkpoint.load_checkpoint(run_dir(trained) / "last.pth")
    assert state["progress"]["epoch"] == 16 and state["progress"]["step"] == 0
    assert state["config"]["dim"] == 16 and state["dataset"] == "tiny"
    assert [row["epoch"] for row in state["history"]] == list(range(16))
    assert not any(name.startswith("module.") for name in state["model"])
    assert state["vocabulary"]["num_items"] == len(state["items"]) == 25 and "i7" in state["items"]
    checkpoint.Progress(**state["progress"])


def test_resumed_into_a_new_folder_the_run_has_its_own_best(tmp_path):
    """The best so far stayed in the old folder: the new one must still end with a best.pth and a result."""
    write_csv(tmp_path / "tiny.csv")
    here("--dataset=tiny.csv", *TINY, "--num_epochs=2", "--out_dir=old", cwd=tmp_path).ok()
    state = read_state(tmp_path / "old" / "epoch_0.pth")
    state["progress"]["best_score"] = 2.0  # no later epoch can be better than this
    torch.save(state, tmp_path / "start.pth")
    here("--resume=start.pth", "--out_dir=new", cwd=tmp_path).ok()
    assert read_json(tmp_path / "new" / "result.json")["best_epoch"] == 1
    assert (tmp_path / "new" / "best.pth").is_file()
