"""docs/extend.md: every patch applies, touches as many files as stated, and trains."""

import re
import shutil
import subprocess
import sys

import pytest
from launch import MAIN, TINY, environment, read_json, write_csv

ROOT = MAIN.parent
PAGE = (ROOT / "docs" / "extend.md").read_text()
SECTIONS = re.findall(r"^## (.+?): (\d) files?.*?```diff\n(.*?)```.*?```bash\n(.*?)```", PAGE, re.M | re.S)
MOST = {  # files of code that a change may cost
    "A loss": 1,
    "A block": 2,
    "A data set": 1,
    "An input of actions": 3,
    "A task": 5,
    "An optimizer": 1,
}


@pytest.fixture
def copy(tmp_path):
    for name in ("main.py", "model.py", "data.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "reclm", tmp_path / "reclm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data" / "steam").mkdir(parents=True)
    write_csv(tmp_path / "data" / "steam" / "steam.csv")
    return tmp_path


def apply(patch, folder):
    done = subprocess.run(["git", "apply", "-"], input=patch, cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_every_kind_of_change_is_there():
    assert [name for name, *_ in SECTIONS] == list(MOST)


@pytest.mark.parametrize(("name", "files", "patch", "command"), SECTIONS, ids=[s[0] for s in SECTIONS])
def test_a_patch_touches_as_many_files_as_it_says(name, files, patch, command, copy):
    before = {path: path.read_text() for path in copy.rglob("*.py")}
    apply(patch, copy)
    touched = [path for path in copy.rglob("*.py") if before.get(path) != path.read_text()]
    assert len(touched) == int(files) <= MOST[name]
    assert command.startswith("python main.py --")


@pytest.mark.parametrize("is_task", [False, True])
def test_all_patches_together_train(is_task, copy):
    """One run uses all but the task, another one the task."""
    flags = [flag for flag in TINY if not is_task or "num_negatives" not in flag]
    for _, _, patch, command in SECTIONS:
        apply(patch, copy)
        if ("--task" in command) == is_task:
            flags += command.split()[2:]
    flags += ["--dataset=steam", "--ctr_split=random", "--positive_from=3"] if is_task else []
    flags += ["--num_epochs=1", "--out_dir=out"]
    command = [sys.executable, "main.py", *flags]
    done = subprocess.run(command, cwd=copy, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = read_json(copy / "out" / "result.json")
    if is_task:
        assert result["task"] == "pairwise" and 0 <= result["test"]["AUC"] <= 1
    else:
        assert (result["loss"], result["model_name"], result["dataset"]) == ("bpr", "alibi", "steam")
        config = (copy / "out" / "config.yaml").read_text()
        assert "optimizer: nadam" in config and "weekday_embedding: true" in config
        assert result["test"]["NDCG@10"] > 0
