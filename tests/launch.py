"""Helpers that run main.py as a user does, on data small enough to finish in seconds."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import main

MAIN = Path(__file__).parent.parent / "main.py"
TINY = (
    "--dim=16 --n_layers=1 --n_heads=2 --max_len=16 --num_negatives=8 --batch_size=8 "
    "--lr=0.01 --warmup_steps=5 --device=cpu"
).split()
TIMEOUT = 90  # seconds of one launch: two busy cores need about 8

_cache = tempfile.TemporaryDirectory(prefix="reclm-test-cache-")  # prepared data, shared by all launches


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    @property
    def errors(self) -> list[str]:
        return re.findall(r"^error:.*", self.text, re.MULTILINE)

    def ok(self) -> "Result":
        assert self.code == 0, self.text
        return self


def torchrun(
    nproc: int,
    *flags: str,
    cwd: Path,
    env: dict | None = None,
    timeout: float = TIMEOUT,
    program: Path = MAIN,
) -> Result:
    return Running(nproc, *flags, cwd=cwd, env=env, program=program).finish(timeout)


def python(*flags: str, cwd: Path, env: dict | None = None, timeout: float = TIMEOUT) -> Result:
    return Running(0, *flags, cwd=cwd, env=env).finish(timeout)


def here(*flags: str, cwd: Path, env: dict | None = None, program: Callable = main.main) -> Result:
    """`python main.py`, or the `program` of a script, inside this process: saves the seconds of importing
    torch. A traceback of it is an exception in here."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    out, err, code, begin = io.StringIO(), io.StringIO(), 0, time.time()
    torch.set_num_threads(1)
    try:
        with (
            chdir(cwd),
            mock.patch.dict(os.environ, clear=True, **environment(env)),
            mock.patch.object(sys, "argv", ["main.py", *flags]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            program()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue(), time.time() - begin)


def environment(extra: dict | None = None) -> dict:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RECLM_DATA", "RANK", "WORLD_SIZE")}
    ours = {"RECLM_CACHE": _cache.name, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
    return inherited | ours | (extra or {})


class Running:
    """A running launch; `nproc` 0 is a plain `python main.py`."""

    def __init__(
        self,
        nproc: int,
        *flags: str,
        cwd: Path,
        env: dict | None = None,
        program: Path = MAIN,
        restarts: int = 0,
    ):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        launcher += [f"--max-restarts={restarts}"]
        command = [sys.executable, *(launcher if nproc else []), str(program), *flags]
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.begin = time.time()
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment(env), stdout=self.out, stderr=self.err,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def finish(self, timeout: float = TIMEOUT) -> Result:
        """Wait for the end; a launch that times out is killed and fails the test."""
        late = False
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
            self.kill()
        out, err = (self.read(stream) for stream in (self.out, self.err))
        assert not late, f"still running after {timeout} s\n{out}\n{err}"
        return Result(self.process.returncode, out, err, time.time() - self.begin)

    @staticmethod
    def read(stream) -> str:
        stream.seek(0)
        return stream.read().decode(errors="replace").replace("\r", "\n")

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        end = time.time() + timeout
        while not condition():
            if self.process.poll() is not None or time.time() > end:
                self.kill()
                raise AssertionError(f"ended or hung too early\n{self.finish().text}")
            time.sleep(0.005)

    def processes(self) -> dict[int, int]:
        """{process index: process id} of the running processes of main.py."""
        found = {}
        for pid in descendants(self.process.pid):
            with suppress(OSError):  # ended in the meantime
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                number = re.search(rb"\0RANK=(\d+)", b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
                if number and str(MAIN).encode() in command:
                    found[int(number[1])] = pid
        return found

    def kill(self) -> None:
        """SIGKILL to all of it at once. Each process that torchrun starts is a process group of its own."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def in_small_batches(folder: Path) -> Path:
    """A main.py that ranks 7 users at once, so that even small data are shared between two processes."""
    path = folder / "in_small_batches.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(MAIN.parent)!r})\n"
        "import evaluate, main\nevaluate.USERS_AT_ONCE = 7\nmain.main()\n"
    )
    return path


# ---------------------------------------------------------------- data and what runs leave


def write_csv(path: Path, num_users: int = 40, num_items: int = 25, first_item: int = 0) -> Path:
    """Users cycle through the items, so that the last item determines the next."""
    rows = ["user,item,rating,timestamp"]
    for user in range(num_users):
        for step in range(8 + user % 7):
            item = first_item + (3 * user + step) % num_items
            rows.append(f"u{user},i{item},{1 + step % 5},{1000 + step}")
    path.write_text("\n".join(rows) + "\n")
    return path


def write_movielens(folder: Path, titles: list[str], genres: tuple[str, str]) -> Path:
    """A small MovieLens-1M in GroupLens' layout under data/: 60 users, one of two genres per title."""
    (folder / "data" / "ml-1m").mkdir(parents=True)
    made = {
        "ratings.dat": [
            f"{u}::{1 + (3 * u + t) % len(titles)}::{1 + (u + t) % 5}::{1000 + 40000 * t}"
            for u in range(1, 61) for t in range(6 + u % 9)
        ],
        "users.dat": [f"{u}::{'FM'[u % 2]}::25::{u % 20}::4806{u % 10}" for u in range(1, 61)],
        "movies.dat": [f"{i}::{title}::{genres[i % 2]}" for i, title in enumerate(titles, 1)],
    }  # fmt: skip
    for name, rows in made.items():
        (folder / "data" / "ml-1m" / name).write_text("\n".join(rows) + "\n")
    return folder


def read_rows(folder: Path) -> list[dict]:
    """metrics.jsonl, without the times it took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {"train_seconds", "eval_seconds", "targets_per_second"}
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def snapshot(folder: Path) -> dict[str, tuple]:
    """{path: content}: equal only if nothing was written, created or removed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder",)
        else:
            found[name] = (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
    return found
