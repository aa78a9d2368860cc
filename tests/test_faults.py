"""Nothing is lost, nothing wrong is believed, nothing hangs: one test per kind of fault."""

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import chdir, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launch import MAIN, TINY, Running, here, python, read_rows, read_state, snapshot, write_csv
from test_bad_input import assert_refused

sys.path.insert(0, str(MAIN.parent / "scripts"))
import results

from reclm.config import DataConfig
from reclm.data import download
from reclm.data.cache import cache_root, read_cache
from reclm.data.prepare import prepare
from reclm.data.sources import find_dataset
from reclm.errors import LONGEST, UserError, one_line, printable
from reclm.flags import parse_args
from reclm.run import lock
from reclm.run.lock import FolderLock
from reclm.run.output import check_out, write_whole

DATA = "--dataset=tiny.csv"
SHORT = ["--dataset=tiny.csv", *TINY, "--num_epochs=2", "--optimizer=adamw"]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    write_csv(cwd / "tiny.csv")
    here(*SHORT, "--out_dir=run", cwd=cwd).ok()
    return cwd


@pytest.fixture
def work(trained_once, tmp_path):
    """A copy of a folder with data and a run in run/."""
    for path in trained_once.rglob("*"):
        if path.is_file() and path.name != ".lock":
            copy = tmp_path / path.relative_to(trained_once)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


# ---------------------------------------------------------------- one run per folder


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    flags = [DATA, *TINY, "--num_epochs=500", "--keep_last=1", "--out_dir=run"]
    first = Running(0, *flags, cwd=tmp_path)
    first.wait_until(lambda: (tmp_path / "run" / "last.pth").exists())
    second = here(*flags, "--resume=auto", cwd=tmp_path)
    assert_refused(second, "run is in use", f"process {first.process.pid} on {socket.gethostname()}")
    assert first.process.poll() is None
    first.kill()
    epochs = [row["epoch"] for row in read_rows(tmp_path / "run")]
    assert epochs == list(range(len(epochs)))
    FolderLock(tmp_path / "run").release()
    assert not (tmp_path / "run" / ".owner").exists()


def test_an_owner_on_another_machine_counts_until_its_heartbeat_stops(tmp_path):
    owner = tmp_path / ".owner"
    owner.write_text(json.dumps({"process": 12, "host": "elsewhere"}))
    with pytest.raises(UserError, match="process 12 on elsewhere"):
        FolderLock(tmp_path)
    os.utime(owner, (0, time.time() - lock.STALE - 1))
    held = FolderLock(tmp_path)
    assert json.loads(owner.read_text())["process"] == os.getpid()
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path)
    held.release()
    FolderLock(tmp_path).release()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    held = FolderLock(tmp_path)
    os.utime(tmp_path / ".owner", (0, 0))
    end = time.time() + 10
    while (tmp_path / ".owner").stat().st_mtime == 0 and time.time() < end:
        time.sleep(0.01)
    assert (tmp_path / ".owner").stat().st_mtime > 0
    held.release()


# ---------------------------------------------------------------- resume


def last_is_gone(work):
    (work / "run" / "last.pth").unlink()


def last_is_a_folder(work):
    last_is_gone(work)
    (work / "run" / "last.pth").mkdir()


def no_checkpoint(work, **changes):
    """As if killed before its first one, with other settings."""
    for path in (work / "run").glob("*.pth"):
        path.unlink()
    config = work / "run" / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changes))


def foreign(work):
    no_checkpoint(work)
    (work / "run" / "config.yaml").write_text("name: another program\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (last_is_gone, "epoch_1.pth is there"),
        (last_is_a_folder, "last.pth is missing or not a file"),
        (lambda work: no_checkpoint(work, dataset="other.csv"), "has dataset=other.csv"),
        (lambda work: no_checkpoint(work, dim=32), "has dim=32, this run has dim=16"),
        (foreign, "not empty and no run of this version"),
    ],
)
def test_resume_overwrites_nothing_that_it_does_not_continue(work, change, named):
    change(work)
    before = snapshot(work)
    assert_refused(here(*SHORT, "--out_dir=run", "--resume=auto", cwd=work), named)
    assert snapshot(work) == before


def test_a_run_without_a_checkpoint_starts_again(work):
    no_checkpoint(work)
    here(*SHORT, "--out_dir=run", "--resume=auto", cwd=work).ok()
    assert [row["epoch"] for row in read_rows(work / "run")] == [0, 1]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_latest_that_is_no_link_is_left_alone(work, kind):
    latest = work / "runs" / "latest"
    (work / "runs").mkdir()
    if kind == "file":
        latest.write_text("my notes")
    else:
        (work / "run").rename(latest)
    before = snapshot(latest.parent)
    shown = here(*SHORT, cwd=work).ok()
    assert "latest is not a link to a run and is left alone" in shown.stdout
    after = snapshot(latest.parent)
    assert {path: after[path] for path in before} == before
    if kind == "folder":  # a copy of runs/ in which links became folders
        here("--eval_only=true", cwd=work).ok()
        assert (latest / "eval-best.json").exists()


def test_a_file_system_without_links(work, monkeypatch):
    def fail(*args):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", fail)
    for seed in (0, 1):
        here(*SHORT, f"--seed={seed}", cwd=work).ok()
        here("--eval_only=true", cwd=work).ok()
    newest = max(path for path in (work / "runs").iterdir() if path.is_dir())
    assert (work / "runs" / "latest").read_text() == newest.name
    assert yaml.safe_load((newest / "config.yaml").read_text())["seed"] == 1


def test_an_evaluation_never_replaces_one_with_other_settings(work):
    flags = ("--eval_only=true", "--out_dir=run")
    for more, name in (((), ""), (("--negative_below=2",), "-2"), ((), ""), (("--negative_below=2",), "-2")):
        shown = here(*flags, *more, cwd=work).ok()
        assert f"written to run/eval-best{name}.json" in shown.stdout
    (work / "run" / "eval-last.json").write_text("notes")
    here(*flags, "--ckpt_name=last.pth", cwd=work).ok()
    assert (work / "run" / "eval-last.json").read_text() == "notes"


# ---------------------------------------------------------------- files that scripts write


def out(path, overwrite=False):
    return argparse.Namespace(out=path, overwrite=overwrite)


def test_what_exists_is_not_overwritten(tmp_path):
    old, data = tmp_path / "old.csv", tmp_path / "data.csv"
    old.write_text("old")
    data.write_text("data")
    check_out(out(tmp_path / "new.csv"), [".csv"], [data])
    check_out(out(old, overwrite=True), [".csv"], [data])
    for wrong, words in (
        (out(old), "exists: choose another name or add --overwrite"),
        (out(data, True), "is an input of this command"),
        (out(tmp_path / "none" / "a.csv"), "there is no folder"),
        (out(tmp_path / "a.txt"), "must end in .csv"),
        (out(tmp_path), "must end in .csv"),
    ):
        with pytest.raises(UserError, match=words):
            check_out(wrong, [".csv"], [data])


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(work):
        work.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*a.txt \(No space left on device\): free some space"):
        write_whole(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [600, 3_000, 30_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, size):
    """No file may grow beyond `size` bytes: config, cache, curves or checkpoints fail, the earliest first."""
    write_csv(tmp_path / "tiny.csv")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    limited = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + limit
    program = tmp_path / "limited.py"
    root = Path(__file__).parent.parent
    program.write_text(
        f"import sys; sys.path.insert(0, {str(root)!r})\nimport main\n{limited}\nmain.main()\n"
    )
    cache = {"RECLM_CACHE": str(tmp_path / "cache")}
    shown = Running(0, *SHORT, "--out_dir=run", cwd=tmp_path, env=cache, program=program).finish()
    assert_refused(shown, "cannot", "free some space")
    here(*SHORT, "--out_dir=run", "--resume=auto", cwd=tmp_path, env=cache).ok()
    assert [row["epoch"] for row in read_rows(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"protocol": "P3"}', b"\xff\xfe", "7"])
def test_a_result_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="result.json is (damaged|no result)"):
        results.read_results([str(tmp_path)])


# ---------------------------------------------------------------- the cache


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [cut, flip, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_text("?" * 999)],
)
@pytest.mark.parametrize("name", ["item_ids.npy", "offsets.npy", "meta.json"])
def test_damaged_arrays_are_made_again(tmp_path, monkeypatch, name, damage):
    monkeypatch.setenv("RECLM_CACHE", str(tmp_path / "cache"))
    source = find_dataset(str(write_csv(tmp_path / "a.csv")), tmp_path)
    folder, notes = prepare(source, DataConfig())
    assert notes == []
    meta, arrays = read_cache(folder)
    kept = {key: np.array(array) for key, array in arrays.items()}
    damage(folder / name)
    assert read_cache(folder) is None
    again, notes = prepare(source, DataConfig())
    assert again == folder and "damaged and have been made again" in notes[0]
    assert read_cache(folder)[0] == meta
    assert all(np.array_equal(kept[key], array) for key, array in read_cache(folder)[1].items())
    assert prepare(source, DataConfig())[1] == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECLM_CACHE", str(tmp_path / "file" / "cache"))
    root, (note,) = cache_root()
    assert root.is_dir() and "is not writable" in note and str(root) in note
    monkeypatch.delenv("RECLM_CACHE")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_root()[0] == root


# ---------------------------------------------------------------- checkpoints from strangers


def changed(state, *path_and_value):
    *path, value = path_and_value
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


def with_ema(state):
    return changed(state, "config", "ema", 0.5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: changed(s, "config", "dim", "wide"), "--dim"),
        (lambda s: changed(s, "config", "window", None), "--window is null"),
        (lambda s: changed(s, "config", "evil", 1), "no setting 'evil'"),
        (lambda s: changed(s, "config", "n_layers", -3), "--n_layers"),
        (lambda s: changed(s, "config", []), "config is of type list"),
        (lambda s: changed(s, "progress", "epoch", "two"), "epoch='two'"),
        (lambda s: changed(s, "progress", "epoch", -5), "epoch=-5"),
        (lambda s: changed(s, "progress", "evil", 1), "unknown entry 'evil'"),
        (lambda s: changed(s, "progress", "seconds", float("nan")), "seconds=nan"),
        (lambda s: changed(s, "history", ["row"]), "row 0 of history"),
        (lambda s: changed(s, "history", 7), "history is of type int"),
        (lambda s: changed(s, "model", "norm.weight", 3), "model['norm.weight']"),
        (lambda s: changed(s, "model", "norm.weight", torch.zeros(3)), "does not fit this architecture"),
        (
            lambda s: changed(s, "trained", {"norm.weight": torch.zeros(3)}) and with_ema(s),
            "does not fit this",
        ),
        (lambda s: changed(s, "version", torch.zeros(3)), "another version"),
        (lambda s: changed(s, "config", "utc_offset", 10**400), "config: int too large"),
        (lambda s: changed(s, "evil", 1), "unknown entry 'evil'"),
        (lambda s: changed(s, "dataset", 5), "dataset is of type int"),
        (lambda s: changed(s, "optimizer", {}), "other groups of weights"),
        (lambda s: changed(s, "user_keys", s["user_keys"].to_sparse()), "user_keys is a sparse tensor"),
        (
            lambda s: changed(s, "vocabulary", "cold_items", torch.zeros(1).to_sparse()),
            "item features and vocabulary",
        ),
        (lambda s: changed(s, "optimizer", "param_groups", 1), "other groups of weights"),
        (
            lambda s: changed(s, "optimizer", "state", 0, "exp_avg", torch.zeros(1, 2)),
            "another type or shape of 'exp_avg'",
        ),
        (
            lambda s: changed(s, "optimizer", "state", 0, "step", torch.ones(1).to_sparse()),
            "type or shape of 'step'",
        ),
        (lambda s: changed(s, "optimizer", "state", 1, "step", 3), "type or shape of 'step'"),
        (lambda s: s["optimizer"]["state"][1].pop("step") and s, "other values of weight 1"),
        (lambda s: changed(s, "optimizer", "param_groups", 0, "lr", "x"), "the learning rates ['x', "),
        (lambda s: changed(s, "optimizer", "state", 99, {}), "a state of weight 99"),
        (lambda s: changed(s, "dataset", "a\x1b[2Jb") and changed(s, "fingerprint", "x"), r"a\x1b[2Jb"),
    ],
)
def test_a_checkpoint_is_data_from_a_stranger(work, change, named):
    last = work / "run" / "last.pth"
    torch.save(change(read_state(last)), last)
    before = snapshot(work)
    shown = here("--resume=auto", "--out_dir=run", "--num_epochs=3", "--lr_min=1", cwd=work)
    shown = here(*SHORT, "--resume=auto", "--out_dir=run", cwd=work) if "num_epochs" in shown.text else shown
    assert_refused(shown, named)
    assert snapshot(work) == before and "\x1b" not in shown.text


def test_an_error_is_not_glued_to_the_progress_bar(work):
    """The average of the weights is damaged, which only the evaluation reads."""
    first = work / "run" / "epoch_0.pth"
    state = with_ema(read_state(first)) | {"trained": read_state(first)["model"]}
    state["model"]["norm.weight"][:] = torch.nan
    torch.save(state, work / "damaged.pth")
    shown = here("--resume=damaged.pth", "--out_dir=new", cwd=work)
    assert_refused(shown, "non-finite scores")
    assert shown.stderr.splitlines()[-1] == shown.errors[0]


def test_the_optimizer_is_set_by_the_settings_and_not_by_the_checkpoint(work):
    state = read_state(work / "run" / "epoch_0.pth")
    for group in state["optimizer"]["param_groups"]:
        group |= {"betas": None, "maximize": True}
    torch.save(state, work / "foreign.pth")
    for path in ("foreign.pth", "run/epoch_0.pth"):
        here(f"--resume={path}", f"--out_dir={Path(path).stem}", cwd=work).ok()
    assert read_rows(work / "foreign") == read_rows(work / "epoch_0") == read_rows(work / "run")


def test_a_finished_run_cannot_go_on_elsewhere(work):
    """Its best epoch is not there, so there would be nothing to test at the end."""
    before = snapshot(work)
    shown = here("--resume=run/last.pth", "--out_dir=new", cwd=work)
    assert_refused(shown, "has all its 2 epochs", "new/best.pth is missing", "--eval_only=true")
    assert snapshot(work) == before


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dim=100000000000000000000"], "--dim=100000000000000000000 is too large"),
        (["--n_layers=100000000000000000000"], "--n_layers"),
        (["--max_len=1000000000000"], "--max_len"),
        (["--grad_accum_steps=100000000000000000000"], "--grad_accum_steps"),
        (["--dim=1073741824"], "due to dim, n_layers, hidden_dim"),
        (["--n_layers=1000000000"], "GiB of memory"),
        (["--hidden_dim=4000000000"], "GiB of memory"),
        (["--max_len=4000000000"], "due to max_len"),
        (["--num_negatives=4000000000", "--share_negatives=false"], "due to num_negatives, batch_size"),
        (["--window=16"], "--window=16 has no effect with --max_len=16"),
        (["--init_from="], "--init_from"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_anything_is_made(work, flags, named):
    before = snapshot(work)
    shown = here(DATA, *TINY, *flags, "--out_dir=new", cwd=work)
    assert_refused(shown, named)
    assert snapshot(work) == before and shown.seconds < 30


def test_running_out_of_memory_names_the_step_and_what_to_lower(work, monkeypatch):
    def fail(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("main.accumulate_gradients", fail)
    shown = here(*SHORT, "--out_dir=new", cwd=work)
    assert_refused(shown, "out of memory at epoch 0, step 0", "--batch_size")


# ---------------------------------------------------------------- named data


def test_a_part_of_a_named_dataset_does_not_carry_its_protocol(tmp_path):
    (tmp_path / "data" / "ml-1m").mkdir(parents=True)
    rows = [f"{u}::{i}::5::{1000 + i}" for u in range(1, 9) for i in range(1, 9)]
    (tmp_path / "data" / "ml-1m" / "ratings.dat").write_text("\n".join(rows) + "\n")
    shown = here("--dataset=ml-1m", *TINY, "--num_epochs=1", cwd=tmp_path).ok()
    assert "protocol: not ml-1m, but 64 rows" in shown.stdout and "P2" not in shown.stdout
    assert "64 rows instead of 1,000,209, 8 users instead of 6,040" in shown.stdout


def test_the_real_ones_do(real):
    for name, protocol in (("ml-1m", "P2"), ("ml-1m-sasrec", "P3"), ("ml-100k", "ML-100K")):
        folder, notes = prepare(find_dataset(name, real), DataConfig())
        assert read_cache(folder)[0]["protocol"].startswith(protocol) and notes == []


# ---------------------------------------------------------------- own data


def own(tmp_path, header, *rows):
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]) + "\n")
    return "--dataset=mine.csv"


def actions(users=6, count=6, more=""):
    return [f"u{u},i{(u + i) % 9}{more}" for u in range(users) for i in range(count)]


def test_values_that_may_mean_something_else_are_counted(tmp_path):
    data = own(tmp_path, "user,item,label,rating", *actions(more=",1,5"), "NULL,i1,1,5", "null,i2,0,3")
    shown = here(data, *TINY, "--num_epochs=1", cwd=tmp_path).ok().stdout
    assert "NOTE: the column label decides what is positive" in shown
    assert "NOTE: 2 rows have the user 'NULL'" in shown


def test_splits_by_other_names(tmp_path):
    names = ["train", "train", "train", "val", "dev", "test"]
    rows = [f"{row},{i % 2},{names[i % 6]}" for i, row in enumerate(actions())]
    data = own(tmp_path, "user,item,label,split", *rows)
    shown = here(data, "--dim=16", "--task=ctr", "--num_epochs=1", cwd=tmp_path).ok().stdout
    assert "impressions to train 18" in shown and "valid 12" in shown and "test 6" in shown


def test_three_actions_each_leave_nothing_to_train_on(tmp_path):
    data = own(tmp_path, "user,item", *actions(count=3))
    shown = here(data, *TINY, cwd=tmp_path)
    assert_refused(shown, "nothing is left to train on", "users of four actions or more")


def test_a_checkpoint_knows_its_data_by_content_not_by_path(work):
    (work / "moved").mkdir()
    (work / "tiny.csv").rename(work / "moved" / "shop.csv")
    here("--eval_only=true", "--out_dir=run", "--dataset=moved/shop.csv", cwd=work).ok()
    write_csv(work / "other.csv", first_item=100)
    assert_refused(here("--eval_only=true", "--out_dir=run", "--dataset=other.csv", cwd=work), "fingerprint")


def test_feature_files_may_be_moved(work):
    vectors = np.random.default_rng(0).normal(size=(25, 3))
    np.save(work / "v.npy", vectors)
    here(*SHORT, "--item_features=v.npy", "--out_dir=featured", cwd=work).ok()
    (work / "moved").mkdir()
    (work / "v.npy").rename(work / "moved" / "v.npy")
    evaluation = ["--eval_only", "--out_dir=featured"]
    here(*evaluation, "--item_features=moved/v.npy", cwd=work).ok()
    assert_refused(here(*evaluation, cwd=work), "v.npy")
    np.save(work / "moved" / "w.npy", vectors)
    assert_refused(here(*evaluation, "--item_features=moved/w.npy", cwd=work), "contradicts")


# ---------------------------------------------------------------- nothing hangs


def test_a_fifo_is_no_file(work):
    os.mkfifo(work / "pipe.csv")
    os.mkfifo(work / "pipe.yaml")
    (work / "data" / "ml-1m").mkdir(parents=True)
    os.mkfifo(work / "data" / "ml-1m" / "ratings.dat")
    offline = {"RECLM_GROUPLENS_URL": "http://127.0.0.1:9"}
    for flags in (["--dataset=pipe.csv"], ["--config=pipe.yaml"], ["--dataset=ml-1m"]):
        shown = here(*flags, *TINY, cwd=work, env=offline)
        assert shown.code == 2 and len(shown.errors) == 1 and shown.seconds < 30


def test_a_download_that_drips_ends(tmp_path, monkeypatch):
    """A byte every 50 ms: less than 1,000 bytes per second after what stands for a minute."""

    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            with suppress(OSError):  # the other side gives up
                for _ in range(1000):
                    self.wfile.write(b"x")
                    time.sleep(0.05)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(download, "PATIENCE", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RECLM_GROUPLENS_URL", f"http://127.0.0.1:{server.server_port}")
        begin = time.time()
        with pytest.raises(UserError, match=r"cannot download .*only \d+ bytes in .*run again to resume"):
            download.fetch_grouplens("ml-1m", ("ratings.dat",), tmp_path)
        assert time.time() - begin < 20
        server.shutdown()


def test_a_yaml_that_expands_without_end(work):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (work / "bomb.yaml").write_text("\n".join(lines))
    (work / "large.yaml").write_text("# x\n" * 300_000)
    with chdir(work):
        for name, words in (("bomb.yaml", "aliases"), ("large.yaml", "more than 1,000,000 bytes")):
            with pytest.raises(UserError, match=words):
                parse_args([f"--config={name}"])


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "0"}, "RANK without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE without RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one is not a number"),
    ],
)
def test_half_an_environment_of_torchrun(work, env, named):
    rest = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"} if len(env) > 1 else {}
    shown = here(*SHORT, cwd=work, env=env | rest)
    assert shown.code == 2 and shown.seconds < 30
    if env.get("RANK") in ("0", None):  # only the main process prints
        assert_refused(shown, named)


def test_a_port_in_use(work):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        assert_refused(python(*SHORT, cwd=work, env=env), "cannot join 2 processes at 127.0.0.1:" + port)


def test_a_process_that_dies_is_noticed(tmp_path):
    """torchrun ends the others."""
    write_csv(tmp_path / "tiny.csv")
    run = Running(2, DATA, *TINY, "--num_epochs=500", "--keep_last=1", "--out_dir=run", cwd=tmp_path)
    run.wait_until(lambda: (tmp_path / "run" / "last.pth").exists() and len(run.processes()) == 2)
    os.kill(run.processes()[1], signal.SIGKILL)
    begin = time.time()
    assert run.finish().code != 0 and time.time() - begin < 60


# ---------------------------------------------------------------- text


def test_control_characters_are_shown_and_not_obeyed():
    assert printable("a\x1b[2J\tb\nc\x07é") == "a\\x1b[2J\tb\nc\\x07é"


def test_a_message_is_one_line_that_keeps_its_end():
    assert one_line("a\nb\tc\x1b") == "a b\\tc\\x1b"
    line = one_line(f"--lr={'x' * 5000}: choose a smaller one")
    assert len(line) == LONGEST and line.startswith("--lr=xx") and line.endswith(": choose a smaller one")
