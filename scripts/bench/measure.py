"""What all benchmarks share: a clock, peak memory, tables and files.

Import it before torch and the spine: it says where they are and how their threads wait.
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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads halve a shared CPU
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the spine

import numpy as np
import psutil

from reclm.errors import UserError
from reclm.run.logger import say
from reclm.run.report import stamp


def seconds(works: Iterable[Callable], rounds: int = 5) -> list[float]:
    """Median seconds of each. Every round calls all of them, so that a machine that slows down slows down
    all of them; a first round is not counted."""
    times = [(work, []) for work in works]
    for _ in range(rounds + 1):
        for work, taken in times:
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for _, taken in times]


def own_peak() -> float:
    """Peak resident MiB of this process alone: getrusage would start from the peak of its parent."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak_of(command: list, cwd: Path, **env: str) -> float:
    """Run a command to its end. Returns the peak resident GiB of it and all its children. Raises UserError
    with the end of what it printed where it fails."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = psutil.Popen(command, cwd=cwd, env=os.environ | env, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):  # a child may end meanwhile
                tree = [process, *process.children(recursive=True)]
                peak = max(peak, sum(part.memory_info().rss for part in tree))
            time.sleep(0.1)
        if process.returncode:
            log.seek(0)
            line = " ".join(map(str, command))
            raise UserError(f"{line} failed in {cwd} (exit {process.returncode}):\n{log.read()[-3000:]}")
    return peak / 2**30


def launcher(processes: int) -> list[str]:
    """What comes before the name of a script."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def compare(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """{name: measurements, as {column: value}} -> {name: {column: median and range}}, and behind each but the
    first "first / name": {column: ratio of the medians}. A measurement may lack columns, but not the last."""
    first, found = next(iter(rounds)), {}
    for name, rows in rounds.items():
        found[name] = {key: summary([row[key] for row in rows if key in row]) for key in rows[-1]}
        if name != first:
            medians = {key: (found[first][key]["median"], found[name][key]["median"]) for key in rows[-1]}
            found[f"{first} / {name}"] = {key: ours / theirs for key, (ours, theirs) in medians.items()}
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(rows: Iterable[dict]) -> str:
    """Markdown, one row per dict of {column: text, number, numbers, or a `summary` of numbers}."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(value: str | float | list | dict) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        value = summary(value)
    if isinstance(value, dict):
        return "{median} [{min}, {max}]".format(**{name: cell(x) for name, x in value.items()})
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def show(title: str, found: dict | list[dict]) -> None:
    """Print all that was found: the numbers of a dict are a table, and so is each list of rows."""
    if isinstance(found, list):
        say(f"{title}\n\n{table(found)}")
        return
    inside = [key for key, value in found.items() if isinstance(value, dict | list)]
    if len(inside) < len(found):
        say(table({title: key, "": value} for key, value in found.items() if key not in inside))
    for key in inside:
        show(f"{title}: {key}", found[key])


def arguments(doc: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=new_file, default=out, help=f"JSON file [default: {out}]")
    return parser


def new_file(name: str) -> Path:
    """The type of a flag: results are never overwritten, and that is said before anything is measured."""
    if Path(name).exists():
        raise UserError(f"{name} exists and is not overwritten: name another file")
    return Path(name)


def write(out: Path, found: dict) -> None:
    """What was found, and when, by which code and on what machine."""
    with open(out, "x") as file:
        json.dump(stamp() | found, file, indent=1)
    say(f"written to {out}")


def write_csv(
    path: Path, users: np.ndarray, items: np.ndarray, times: np.ndarray, header: str = "user,item,timestamp"
) -> None:
    """A data set, one row per action; with tabs where the header has them."""
    separator = "\t" if "\t" in header else ","
    np.savetxt(path, np.stack([users, items, times], axis=1), "%d", separator, header=header, comments="")


def run(main: Callable[[], None]) -> None:
    """Bad input is one line, not a traceback."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
