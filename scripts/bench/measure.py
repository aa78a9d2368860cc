"""Shared by all benchmarks: timing, peak memory, tables and result files.

Import it before torch and the spine: it sets sys.path and OMP_WAIT_POLICY.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads halve the speed of a shared CPU
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see reclm/serve/__init__.py
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the spine

import numpy as np
import psutil

from reclm.errors import UserError
from reclm.run.logger import say
from reclm.run.output import ScriptParser
from reclm.run.report import stamp


def seconds(works: Iterable[Callable], rounds: int = 5) -> list[float]:
    """Median seconds per call of each of `works`. Every round calls all of them, so that a slow phase of the
    machine affects all alike; a warm-up round is not counted."""
    times = [(work, []) for work in works]
    for _ in range(rounds + 1):
        for work, taken in times:
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for _, taken in times]


def own_peak() -> float:
    """Peak resident MiB of this process (Linux only); getrusage would start from the peak of the parent."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak_of(command: list, cwd: Path, **env: str) -> float:
    """Run a command to its end, with `env` added to the environment. Returns the peak resident GiB of it and
    all its children, sampled every 0.1 s. Raises UserError with the end of its output if it fails."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = psutil.Popen(command, cwd=cwd, env=os.environ | env, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):  # a child may end in between
                tree = [process, *process.children(recursive=True)]
                peak = max(peak, sum(part.memory_info().rss for part in tree))
            time.sleep(0.1)
        if process.returncode:
            log.seek(0)
            line = " ".join(map(str, command))
            raise UserError(f"{line} failed in {cwd} (exit {process.returncode}):\n{log.read()[-3000:]}")
    return peak / 2**30


def launcher(processes: int) -> list[str]:
    """The command before the name of a script: Python, with torchrun for more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def compare(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """{name: measurements, as {column: value}} -> {name: {column: `summary`}}, and after each name but the
    first "first / name": {column: ratio of the medians}. Any measurement but the last may lack columns."""
    first, found = next(iter(rounds)), {}
    for name, rows in rounds.items():
        found[name] = {key: summary([row[key] for row in rows if key in row]) for key in rows[-1]}
        if name != first:
            medians = {key: (found[first][key]["median"], found[name][key]["median"]) for key in rows[-1]}
            found[f"{first} / {name}"] = {key: ours / theirs for key, (ours, theirs) in medians.items()}
    return found


def summary(values: list[float]) -> dict[str, float]:
    """{"median", "min", "max"} of some numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(rows: Iterable[dict]) -> str:
    """A Markdown table, one row per dict of {column: text, number, list of numbers, or `summary`}."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(value: str | float | list | dict) -> str:
    """A value as text: 3 significant digits, or whole from 1000 on; a list as its `summary`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        value = summary(value)
    if isinstance(value, dict):
        return "{median} [{min}, {max}]".format(**{name: cell(x) for name, x in value.items()})
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def show(title: str, found: dict | list[dict]) -> None:
    """Print `found` as tables: one for the numbers of each dict, and one per list of rows."""
    if isinstance(found, list):
        say(f"{title}\n\n{table(found)}")
        return
    inside = [key for key, value in found.items() if isinstance(value, dict | list)]
    if len(inside) < len(found):
        say(table({title: key, "": value} for key, value in found.items() if key not in inside))
    for key in inside:
        show(f"{title}: {key}", found[key])


def arguments(doc: str, out: str) -> argparse.ArgumentParser:
    """A parser that shows `doc` and has --out, which must not exist."""
    parser = ScriptParser(doc)
    parser.add_argument("--out", type=new_file, default=out, help=f"new JSON file to write [default: {out}]")
    return parser


def new_file(name: str) -> Path:
    """Argument type: path of a file that must not exist. Raises UserError, before anything is measured."""
    if Path(name).exists():
        raise UserError(f"{name} exists and is not overwritten: name another file")
    return Path(name)


def write(out: Path, found: dict) -> None:
    """Write `found` as JSON, with date, commit and machine. Raises FileExistsError if `out` exists."""
    with open(out, "x") as file:
        json.dump(stamp() | found, file, indent=1)
    say(f"written to {out}")


def write_csv(
    path: Path, users: np.ndarray, items: np.ndarray, times: np.ndarray, header: str = "user,item,timestamp"
) -> None:
    """Write a dataset with one row per action, separated by tabs if the header is, else by commas."""
    separator = "\t" if "\t" in header else ","
    np.savetxt(path, np.stack([users, items, times], axis=1), "%d", separator, header=header, comments="")
