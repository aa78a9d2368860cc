"""scripts/recommend.py on a trained model, and the users that a run leaves in histories.npz."""

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from launch import MAIN, TINY, here, snapshot, torchrun, write_csv

from data import histories
from main import open_checkpoint
from reclm.data.histories import Histories, read_histories
from reclm.errors import UserError, run_script
from reclm.serve import Recommender, everybody
from reclm.serve.person import make_batch
from reclm.serve.typed import read_profile, read_time

sys.path.insert(0, str(MAIN.parent / "scripts"))
import recommend

SCRIPT = MAIN.parent / "scripts" / "recommend.py"
MORE = [
    "--max_len=10",
    "--time_tokens=embedding",
    "--request_time=true",
    "--action_embedding=true",
    "--profile_tokens=true",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run with titles in runs/latest, one that reads everything in `all`, a CTR model in `ctr`."""
    cwd = tmp_path_factory.mktemp("recommend")
    write_csv(cwd / "films.csv")
    items = "".join(f"i{i},Film {i:02} ({1980 + i}),{('War', 'War|Drama')[i % 2]}\n" for i in range(25))
    (cwd / "films.items.csv").write_text("item,title,genres\n" + items)
    people = "".join(f"u{u},{'FM'[u % 2]},{18 + u}\n" for u in range(40))
    (cwd / "films.users.csv").write_text("user,gender,age\n" + people)
    for flags in ([], [*MORE, "--out_dir=all"], ["--task=ctr", "--ctr_split=random", "--out_dir=ctr"]):
        small = [flag for flag in TINY if "ctr" not in str(flags) or "negatives" not in flag]
        here("--dataset=films.csv", *small, *flags, "--num_epochs=4", cwd=cwd).ok()
    shutil.rmtree(cwd / "ctr" / "tensorboard")
    for name in ("", ".items", ".users"):  # nothing below may read them
        (cwd / f"films{name}.csv").rename(cwd / f"moved{name}.csv")
    return cwd


def run(runs, *flags):
    return here(*flags, cwd=runs, program=lambda: run_script(recommend.main))


def lines(result):
    """[(place, title, score)] of the printed table"""
    rows = [line.split() for line in result.ok().stdout.splitlines() if line[:4].strip().isdigit()]
    return [(int(row[0]), " ".join(row[1:4]), float(row[-1])) for row in rows]


def test_a_user_gets_titles(runs):
    shown = run(runs, "--user=u3", "--k=4")
    recommender = Recommender.load(runs / "runs" / "latest" / "best.pth")
    wanted = recommender.recommend(recommender.user("u3"), 4)
    assert lines(shown) == [(i + 1, item.title, round(item.score, 3)) for i, item in enumerate(wanted)]
    raw = pd.read_csv(runs / "moved.csv")
    last = raw[raw["user"] == "u3"].sort_values("timestamp")["item"].iloc[-1]
    assert f"1970-01-01  Film {int(last[1:]):02}" in shown.stdout and "War" in shown.stdout


def test_it_runs_from_another_folder_without_the_data(runs, tmp_path):
    """As typed, in a new process: no flag of the raw data, and nothing but the two files is read."""
    for name in ("best.pth", "histories.npz"):
        shutil.copy(runs / "runs" / "latest" / name, tmp_path / name)
    command = [
        sys.executable,
        str(SCRIPT),
        "--ckpt_name=./best.pth",
        "--history=film 03; FILM 04; i5",
        "--why",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.count("because of Film 0") == 10 and "Film 06 (1986)" in done.stdout


def test_filters_and_a_list_that_is_too_short(runs, tmp_path):
    (tmp_path / "only.txt").write_text("Film 07\n\nfilm 08 (1988)\ni9\ni10\n")
    flags = ["--history=i1", f"--candidates={tmp_path / 'only.txt'}", "--exclude=i9", "--genres=drama"]
    shown = run(runs, *flags)
    assert [title for _, title, _ in lines(shown)] == ["Film 07 (1987)"]
    assert "No more than 1 items are allowed" in shown.stdout
    titles = {title for _, title, _ in lines(run(runs, "--history=i1", "--years=1985:1987"))}
    assert titles == {f"Film 0{i} (198{i})" for i in (5, 6, 7)}
    seen = lines(run(runs, "--history=i1;i2", "--k=99", "--include_seen"))
    assert len(seen) == 25 == len(lines(run(runs, "--history=i1;i2", "--k=99"))) + 2


def test_a_history_in_a_file_with_ratings_profile_and_time(runs, tmp_path):
    text = "\ufeffFilm 03=5@1970-01-01\ni4 = 1 @ 1970-01-01T00:10\nfilm 05@1970-01-01T00:20\n"
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    flags = ["--ckpt_name=all/best.pth", f"--history={tmp_path / 'mine.txt'}", "--profile=gender=F, age=30"]
    shown = lines(run(runs, *flags, "--at=1970-01-01T00:30", "--k=3"))
    recommender = Recommender.load(runs / "all" / "best.pth")
    known = {"profile": {"gender": "F", "age": "30"}, "times": [0.0, 600.0, 1200.0]}
    person = recommender.person(["i3", "i4", "i5"], ["5", "1", None], at=1800.0, **known)
    assert person.codes["actions"].tolist() == [5, 1, 0] and person.profile.all()
    assert [round(item.score, 3) for item in recommender.recommend(person, 3)] == [row[2] for row in shown]
    assert lines(run(runs, *flags, "--at=1970-01-01T00:20:01", "--k=3")) != shown


def test_similar_items(runs):
    found = lines(run(runs, "--similar=film 03", "--k=5"))
    assert len(found) == 5 and all(-1 <= row[2] <= 1 and row[1] != "Film 03 (1983)" for row in found)


def test_everybody_under_any_number_of_processes(runs, tmp_path, monkeypatch):
    flags = ["--users=all", "--k=3", "--years=1980:1989"]
    program = tmp_path / "small.py"  # many batches, so that each process has some
    program.write_text(
        f"import sys\nsys.path[:0] = [{str(MAIN.parent)!r}, {str(SCRIPT.parent)!r}]\n"
        "import reclm.serve.everybody as module\nmodule.AT_ONCE = 7\nimport recommend\nrecommend.main()\n"
    )
    for count in (2, 3):
        shown = torchrun(count, *flags, f"--out=all{count}.csv", cwd=runs, program=program).ok().stdout
        assert "for 40 users, written to all" in shown and shown.count("written") == 1
    monkeypatch.setattr(everybody, "AT_ONCE", 7)
    run(runs, *flags, "--out=all1.csv").ok()
    run(runs, *flags, "--out=all1.parquet").ok()
    assert (runs / "all1.csv").read_bytes() == (runs / "all2.csv").read_bytes()
    assert (runs / "all1.csv").read_bytes() == (runs / "all3.csv").read_bytes()
    table = pd.read_csv(runs / "all1.csv")
    assert pd.read_parquet(runs / "all1.parquet")["item"].tolist() == table["item"].tolist()
    assert list(table) == ["user", "item", "place", "score", "title"]
    recommender = Recommender.load(runs / "runs" / "latest" / "best.pth")
    seen = pd.read_csv(runs / "moved.csv").groupby("user")["item"].agg(set)
    for user, rows in table.groupby("user"):
        assert not seen[user] & set(rows["item"]) and rows["place"].tolist() == [*range(1, len(rows) + 1)]
        allowed = {f"i{i}" for i in range(10)} - seen[user]
        assert len(rows) == min(3, len(allowed)) and set(rows["item"]) <= allowed
    wanted = recommender.recommend(recommender.user("u7"), 25)
    wanted = [item.id for item in wanted if int(item.id[1:]) < 10][:3]
    assert table[table["user"] == "u7"]["item"].tolist() == wanted


def test_two_stages(runs):
    """The best of the matching model, in the order of the CTR model, which reads ratings and the profile."""
    flags = ["--user=u3", "--k=5", "--rerank=ctr/best.pth"]
    shown = lines(run(runs, *flags))
    ctr = Recommender.load(runs / "ctr" / "best.pth")
    person = ctr.user("u3")
    wanted = ctr.recommend(person, 5)  # fewer than 200 items: the same as without the first stage
    assert [(row[1], row[2]) for row in shown] == [(item.title, round(item.score, 3)) for item in wanted]
    assert all(0 < row[2] < 1 for row in shown)
    typed = lines(run(runs, "--history=i1=1;i2=5;i3", "--k=3", "--rerank=ctr/best.pth"))
    wanted = ctr.recommend(ctr.person(["i1", "i2", "i3"], ["1", "5", None]), 3)
    assert [row[2] for row in typed] == [round(item.score, 3) for item in wanted]
    assert "because of" in run(runs, *flags, "--why").ok().stdout


def test_the_users_of_a_run_are_those_of_the_data(runs, monkeypatch):
    """Batches made from histories.npz equal those of data.py, with every field that the model reads."""
    monkeypatch.chdir(runs)
    _, dataset, model = open_checkpoint({"dataset": "moved.csv"}, Path("all/best.pth"))
    recommender = Recommender.load("all/best.pth")
    users = np.arange(dataset.num_users - 1)  # data.py reads the row after a history, too
    lengths = np.minimum(dataset.lengths, model.cfg.max_len)[users]
    ends = dataset.offsets[users + 1]
    wanted = histories(dataset, users, ends - lengths, lengths, int(lengths.max()))
    people = [recommender.user(user) for user in dataset.users[users]]
    batch = make_batch(people, recommender.reads)
    wanted["next_timestamps"][users, lengths - 1] = [person.times[-1] for person in people]  # unknown there
    assert batch.keys() == wanted.keys() and (lengths < dataset.lengths[users]).any()
    for name, array in batch.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_a_user_of_a_ctr_run_has_all_actions_in_the_order_of_time(runs):
    kept = read_histories(runs / "ctr" / "histories.npz")
    raw = pd.read_csv(runs / "moved.csv").sort_values("timestamp", kind="stable")
    recommender = Recommender.load(runs / "ctr" / "best.pth")
    for user, rows in raw.groupby("user"):
        person = recommender.user(user)
        assert [recommender.catalogue.ids[n - 1] for n in person.items] == rows["item"].tolist()
        assert person.codes["actions"].tolist() == rows["rating"].tolist()
    assert len(kept) == 40


def test_an_evaluation_writes_the_users_of_an_older_run(runs, tmp_path):
    folder = shutil.copytree(runs / "runs" / "latest", tmp_path / "old")
    (folder / "histories.npz").unlink()
    shown = run(runs, f"--out_dir={folder}", "--user=u1")
    assert shown.code == 2 and "evaluate the run once" in shown.errors[0]
    flags = ["--eval_only=true", f"--out_dir={folder}", "--dataset=moved.csv"]
    here(*flags, cwd=runs).ok()
    assert len(lines(run(runs, f"--out_dir={folder}", "--user=u1"))) == 10
    (tmp_path / "other").mkdir()
    given = [f"--ckpt_name={folder / 'best.pth'}", f"--out_dir={tmp_path / 'other'}", "--dataset=moved.csv"]
    here("--eval_only=true", *given, cwd=runs).ok()
    assert [path.name for path in (tmp_path / "other").iterdir()] == [
        "eval-best.json"
    ]  # they lie beside the model


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], ["exactly one of --user, --history"]),
        (["--user=u1", "--history=i1"], ["exactly one"]),
        (["--user=u99"], ["no user 'u99'", "40 ids"]),
        (["--history=Film 99"], ["'Film 99'", "closest are"]),
        (["--history=;  ;"], ["--history", "empty"]),
        (["--history=moved.csv\0"], ["no item"]),
        (["--history=i1=5"], ["does not read ratings"]),
        (["--history=i1", "--profile=gender=F"], ["profile field 'gender'"]),
        (["--history=i1", "--profile=F"], ["--profile=F must look like"]),
        (["--user=u1", "--profile=gender=F"], ["--profile is for --history"]),
        (["--history=i1", "--at=noon"], ["'noon' must look like"]),
        (["--ckpt_name=all/best.pth", "--history=i1@1970-01-01;i2"], ["times for some items only"]),
        (["--history=i1", "--at=2001-01-01"], ["does not read times"]),
        (["--ckpt_name=all/best.pth", "--user=u1", "--at=1970-01-01"], ["before the last action of user u1"]),
        (["--history=i1", "--k=0"], ["--k=0"]),
        (["--history=i1", "--k=many"], ["--k", "many"]),
        (["--history=i1", "--years=new"], ["--years=new must look like"]),
        (["--history=i1", "--genres=Krimi"], ["no genre 'Krimi'", "Drama, War"]),
        (["--history=i1", "--candidates=none.txt"], ["--candidates=none.txt does not exist"]),
        (["--history=i1", "--out=x.csv"], ["others have none"]),
        (["--users=all"], ["need --out"]),
        (["--users=all", "--out=x.txt"], [".parquet or .csv"]),
        (["--users=all", "--out=moved.csv"], ["exists", "--overwrite"]),
        (["--candidates=none.csv", "--out=x.csv"], ["none.csv does not exist"]),
        (["--user=u1", "--rerank=runs/latest/best.pth"], ["--rerank takes a checkpoint of --task=ctr"]),
        (["--history=i1", "--ckpt_name=none.pth"], ["no checkpoint none.pth", "best.pth"]),
        (["--history=i1", "--ckpt_name=moved.csv"], ["not a checkpoint"]),
        (["--history=i1", "--color=red"], ["--color=red"]),
    ],
)
def test_bad_input_is_one_line(runs, flags, named):
    before = snapshot(runs)
    shown = run(runs, *flags)
    assert shown.code == 2 and len(shown.errors) == 1 and not shown.stdout.strip(), shown.text
    assert all(name in shown.errors[0] for name in named), shown.errors
    assert snapshot(runs) == before


@pytest.mark.parametrize("how", ["truncated", "foreign", "other lengths", "other items"])
def test_damaged_histories_are_refused(runs, tmp_path, how):
    folder = shutil.copytree(runs / "runs" / "latest", tmp_path / "run")
    path = folder / "histories.npz"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif how == "foreign":
        np.savez(path, users=np.array(["u1"]))
    else:
        with np.load(path) as file:
            given = {"offsets": np.array([0, 3])} if "lengths" in how else {"item_ids": file["item_ids"] + 1}
            np.savez(path, **dict(file) | given)
    shown = run(runs, f"--out_dir={folder}", "--user=u1")
    assert shown.code == 2 and len(shown.errors) == 1 and "histories.npz" in shown.errors[0]
    if how == "truncated":  # as the message says
        assert "delete it, then evaluate" in shown.errors[0]
        path.unlink()
        here("--eval_only=true", f"--out_dir={folder}", "--dataset=moved.csv", cwd=runs).ok()
        assert len(lines(run(runs, f"--out_dir={folder}", "--user=u1"))) == 10
    assert len(lines(run(runs, f"--out_dir={folder}", "--history=i1"))) == 10  # needs none


def test_a_checkpoint_without_what_recommending_needs_is_refused(runs, tmp_path):
    state = torch.load(runs / "runs" / "latest" / "best.pth", weights_only=True)
    del state["item_counts"]
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(UserError, match="before recommendations existed"):
        Recommender.load(tmp_path / "old.pth")
    with pytest.raises(UserError, match="there is no checkpoint"):
        Recommender.load(tmp_path / "none.pth")


def test_what_is_typed():
    assert read_profile("a=1, b = x=y ,") == {"a": "1", "b": "x=y"} and read_profile(None) == {}
    moment = datetime(2001, 5, 1, 20, tzinfo=UTC).timestamp()
    assert read_time("2001-05-01T20:00") == read_time("2001-05-01T22:00+02:00") == moment


def test_an_export_of_the_library_starts_without_torch():
    """`import reclm.serve` is what other runtimes start with."""
    code = "import sys, reclm.serve; print([m for m in ('torch', 'pandas', 'pyarrow') if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(MAIN.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not [name for name in vars(Histories) if name.startswith("torch")]
