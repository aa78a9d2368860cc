"""Outputs that are closed, full or ASCII, and Python in isolated mode: main.py and the scripts."""

import os
import subprocess
import sys

import pytest
from launch import MAIN, TINY, here, python, write_csv

SHORT = ["--dataset=tiny.csv", *TINY, "--num_epochs=2"]


@pytest.fixture
def work(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    return tmp_path


SCRIPTS = sorted((MAIN.parent / "scripts").glob("*.py"))
PROGRAMS = [MAIN, *(path for path in SCRIPTS if "__main__" in path.read_text())]


RESULTS = MAIN.parent / "scripts" / "results.py"
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}


EACH = """
import runpy, sys
found = list(sys.path)
root, *programs = sys.argv[1:]
for program in programs:  # in one process, which imports torch once, and ours each time
    sys.path[:], sys.argv = found, [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (program, stop.code)
    for name, module in [*sys.modules.items()]:
        path = str(getattr(module, "__file__", ""))
        if path.startswith(root) and "site-packages" not in path:  # root may hold the environment
            del sys.modules[name]
"""


def test_isolated_in_the_c_locale(tmp_path):
    """python -I: neither the folder of the program nor PYTHON... variables count."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C"}
    command = [sys.executable, "-I", "-c", EACH, f"{MAIN.parent}/", *map(str, PROGRAMS)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("usage: ") == len(PROGRAMS)


@pytest.mark.parametrize(
    ("program", "flag"), [(MAIN, "--none=é"), (RESULTS, "--none=é"), (RESULTS, "--help")]
)
def test_flags_and_help_end_in_one_line(program, flag):
    """A flag that does not exist, and help that cannot be written (argparse hides that of main.py)."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(program), flag]
        done = subprocess.run(
            command, env=buffered | C_LOCALE, stdout=full, stderr=subprocess.PIPE, text=True, timeout=90
        )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")


def test_an_ascii_terminal_gets_results_and_plots(work):
    here(*SHORT, "--out_dir=run", cwd=work).ok()
    plot = ["plot_runs.py", "--out=é.png", "--title=é$\\frac{", "_é$=run"]
    for script, *flags in (["results.py", "run", "run"], plot):
        command = [sys.executable, str(MAIN.parent / "scripts" / script), *flags]
        done = subprocess.run(command, cwd=work, env=os.environ | C_LOCALE, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def launch_into(output, work, *flags, stderr=subprocess.PIPE):
    """main.py with its standard output on `output`, a file or None for a closed one."""
    command = [sys.executable, str(MAIN), *flags]
    before = (lambda: os.close(1)) if output is None else None
    env = os.environ | {"RECLM_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=work, env=env, stdout=output, stderr=stderr, preexec_fn=before, text=True, timeout=90
    )


def test_a_closed_output_does_not_stop_a_run(work):
    done = launch_into(None, work, *SHORT, "--out_dir=silent")
    assert done.returncode == 0, done.stderr
    assert (work / "silent" / "result.json").is_file()


@pytest.mark.parametrize("how", ["full", "pipe"])
def test_an_output_that_cannot_be_written_ends_in_one_line(work, how):
    if how == "full":
        with open("/dev/full", "w") as full:
            done = launch_into(full, work, *SHORT, "--out_dir=unseen")
    else:
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed:
            done = launch_into(closed, work, *SHORT, "--out_dir=unseen")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "standard output" in errors[0], done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    here(*SHORT, "--out_dir=unseen", "--resume=auto", cwd=work).ok()


def test_unicode_ids_in_the_c_locale(tmp_path):
    text = "user,item,timestamp\n" + "".join(
        f"ü{u},é{(u + t) % 9},{t}\n" for u in range(12) for t in range(8)
    )
    (tmp_path / "ü.csv").write_text(text)
    shown = python("--dataset=ü.csv", *TINY, "--num_epochs=1", "--out_dir=run", cwd=tmp_path, env=C_LOCALE)
    assert "\\u" in shown.ok().stdout  # what ASCII cannot show is escaped
