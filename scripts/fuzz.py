"""Look for input that ends in a traceback, a hang or a changed file instead of one clear line.

    python scripts/fuzz.py --seconds=60            # random command lines, YAML files, data and checkpoints
    python scripts/fuzz.py --seconds=0 --seed=17   # the cases of one seed again

A case is a folder with a few files and one command line of main.py, which runs in this process. It has to
succeed, or to end with exit code 2 and one line of error, within LIMIT seconds, and may change no file that
was there. The first case that does not is made as small as possible, printed and left in its folder.
"""

import argparse
import faulthandler
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fuzz_cases import BASES, COLUMNS, SMALL, STATES, Case, cases, start
from launch import MAIN, Result, here, snapshot

from reclm.errors import LONGEST, first_line

LIMIT = 20  # seconds of a run
PER_SEED = 25  # cases
MEMORY = 12 * 2**30  # bytes of address space: a case must not take the machine down
NO_DOWNLOADS = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:9"}


class Find(Exception):
    """What is wrong with a run."""


class TooLong(BaseException):
    """Not an Exception, which the program might catch."""


def check(case: Case, folder: Path, cache: Path) -> None:
    """Run a case in the folder. Raises Find."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    before = snapshot(folder)
    signal.alarm(LIMIT)
    try:
        result = here(*case.flags, cwd=folder, env={"RECLM_CACHE": str(cache), **NO_DOWNLOADS})
    except TooLong:
        raise Find(f"still running after {LIMIT} s") from None
    except Exception as error:
        raise Find(f"{type(error).__name__}: {first_line(error)}") from error
    finally:
        signal.alarm(0)
    if problem := judge(result, before, snapshot(folder)):
        raise Find(f"{problem}\n{result.text[-1000:]}")


def judge(result: Result, before: dict, after: dict) -> str:
    """What is wrong with a run that ended, or ""."""
    changed = [path for path in before if after.get(path) != before[path]]
    if changed or result.code == 0:
        return f"changed {', '.join(changed)}" if changed else ""
    line = result.stderr[result.stderr.find("error:") :].removesuffix("\n")
    if result.code != 2 or len(result.errors) != 1 or not line.isprintable():
        return f"exit code {result.code} without exactly one printable line of error"
    return f"an error of {len(line)} characters" if len(line) > len("error: ") + LONGEST else ""


def fuzz(seconds: float, seed: int, folder: Path, most: int = PER_SEED) -> tuple[int, str | None]:
    """(number of cases, report of the first find or None): `most` cases of each of seed, seed + 1, ..."""
    work, cache, end, tried, found = folder / "case", folder / "cache", time.time() + seconds, 0, None
    signal.signal(signal.SIGALRM, stop)
    for task, flags in BASES.items():
        check(
            start(COLUMNS, [*SMALL, *flags, "--num_epochs=2", "--out_dir=old", "--dataset=data.csv"]),
            work,
            cache,
        )
        STATES[task] = torch.load(work / "old" / "epoch_0.pth", weights_only=True)

    def attempt(case: Case) -> None:
        nonlocal tried, found
        tried += 1
        try:
            check(case, work, cache)
        except Find:
            found = case
            raise

    options = hypothesis.settings(
        max_examples=most, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=[*hypothesis.HealthCheck], verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    while True:
        try:
            hypothesis.seed(seed)(options(hypothesis.given(cases())(attempt)))()
        except Find as find:
            return tried, report(find, found, work, seed)
        seed += 1
        if time.time() > end:
            return tried, None


def stop(*_) -> None:
    raise TooLong


def report(find: Find, case: Case, folder: Path, seed: int) -> str:
    """What was found and what repeats it."""
    trace = "".join(traceback.format_exception(find.__cause__)[-8:]) if find.__cause__ else ""
    return (
        f"{trace}FOUND {find}\n  cd {folder} && python {MAIN} {shlex.join(case.flags)}\n"
        + f"  changed in bad.pth: {case.change}\n" * bool(case.change)
        + f"search again: python scripts/fuzz.py --seconds=0 --seed={seed}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    faulthandler.enable()
    tried, found = fuzz(args.seconds, args.seed, Path(tempfile.mkdtemp(prefix="reclm-fuzz-")))
    print(found or f"{tried} cases, no find")
    raise SystemExit(bool(found))
