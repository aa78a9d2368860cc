"""A file that has grown since training: what the model knows of it is evaluated, --init_from goes on."""

import json
from contextlib import chdir

import numpy as np
import pandas as pd
import pytest
from launch import TINY, here, write_csv
from test_bad_input import assert_refused

from evaluate import rank_users
from main import open_checkpoint
from reclm.config import EvalConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("grown")
    write_csv(cwd / "old.csv")
    here("--dataset=old.csv", *TINY, "--num_epochs=2", "--out_dir=run", cwd=cwd).ok()
    return cwd


EVALUATE = ("--eval_only", "--out_dir=run", "--ckpt_name=run/best.pth")


def grown(cwd, name, *rows):
    """old.csv and more rows (user, item, rating, timestamp)."""
    text = (cwd / "old.csv").read_text() + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (cwd / name).write_text(text)
    return f"--dataset={name}"


def metrics(cwd, *flags):
    shown = here(*EVALUATE, *flags, cwd=cwd).ok().stdout
    file = shown.strip().splitlines()[-1].removeprefix("written to ")
    return json.loads((cwd / file).read_text()), shown


def test_rows_of_unknown_items_change_nothing(trained):
    before, _ = metrics(trained)
    late = 10**9
    data = grown(trained, "more.csv", ("u0", "new", 5, late), ("u1", "newer", 5, late), ("u1", 2e99, 5, late))
    after, shown = metrics(trained, data)
    assert after["test"] == before["test"] and after["valid"] == before["valid"]
    assert "3 new items are unknown to the model, their 3 rows are left out; 0 users are new" in shown
    assert after["protocol"] == before["protocol"] + ", grown since training"


def test_targets_are_the_last_known_items_of_all_users(trained):
    """Users of the grown file, by pandas: their last action on a known item, ranked among the known items."""
    new_user = [("zoe", f"i{item}", 3, 10**9 + item) for item in (3, 1, 4, 99, 5, 9)]
    data = grown(trained, "users.csv", *new_user, ("u0", "i7", 3, 10**9), ("u2", "unknown", 1, 10**9))
    _, shown = metrics(trained, data)
    assert "2 new items" in shown and "1 users are new" in shown
    cfg, dataset, model = open_checkpoint_in(trained, data)
    users, _, _ = rank_users(model, dataset, "test", EvalConfig())
    table = pd.read_csv(trained / "users.csv", dtype=str)
    old = pd.read_csv(trained / "old.csv", dtype=str)
    table = (
        table[table.item.isin(old.item)].astype({"timestamp": float}).sort_values("timestamp", kind="stable")
    )
    last = table.groupby("user").item.last()
    found = {dataset.users[u]: dataset.items[dataset.item_ids[dataset.offsets[u + 1] - 1] - 1] for u in users}
    assert found == last.to_dict() and found["zoe"] == "i9" and found["u0"] == "i7"
    assert dataset.items.tolist() == sorted(old.item.unique())


def open_checkpoint_in(cwd, data):
    with chdir(cwd):
        return open_checkpoint({"dataset": data.partition("=")[2]}, cwd / "run" / "best.pth")


def test_what_cannot_have_grown_is_refused(trained):
    rows = (trained / "old.csv").read_text().splitlines(keepends=True)
    (trained / "fewer.csv").write_text("".join(rows[:-5]))
    assert_refused(here(*EVALUATE, "--dataset=fewer.csv", cwd=trained), "fingerprint")
    write_csv(trained / "other.csv", first_item=20)
    assert_refused(here(*EVALUATE, "--dataset=other.csv", cwd=trained), "fingerprint")


def test_codes_must_mean_the_same(trained):
    flags = (*TINY, "--num_epochs=1", "--action_embedding")
    here("--dataset=old.csv", *flags, "--out_dir=rated", cwd=trained).ok()
    evaluation = ("--eval_only", "--ckpt_name=rated/best.pth")
    here(*evaluation, grown(trained, "same.csv", ("u0", "i7", 3, 10**9)), cwd=trained).ok()
    refused = here(*evaluation, grown(trained, "half.csv", ("u0", "i7", 3.5, 10**9)), cwd=trained)
    assert_refused(refused, "actions of half has other values than in training")


def test_content_is_that_of_training(trained):
    genres = [f"g{i % 4}|even" if i % 2 else f"g{i % 4}" for i in range(25)]
    table = pd.DataFrame({"item": [f"i{i}" for i in range(25)], "genres": genres})
    table.to_csv(trained / "shop.items.csv", index=False)
    (trained / "shop.csv").write_text((trained / "old.csv").read_text())
    flags = (*TINY, "--num_epochs=1", "--item_features=genres")
    here("--dataset=shop.csv", *flags, "--out_dir=content", cwd=trained).ok()
    evaluation = ("--eval_only", "--ckpt_name=content/best.pth")
    before = here(*evaluation, cwd=trained).ok().stdout
    grown(trained, "shop2.csv", ("u0", "new", 5, 10**9))
    more = pd.concat([table, pd.DataFrame({"item": ["new"], "genres": ["a first word"]})])
    more.to_csv(trained / "shop2.items.csv", index=False)  # all words have other numbers now
    after = here(*evaluation, "--dataset=shop2.csv", cwd=trained).ok().stdout
    assert after.split("TEST of")[1].split("written")[0] == before.split("TEST of")[1].split("written")[0]
    on = here("--dataset=shop2.csv", *flags, "--init_from=content/best.pth", cwd=trained).ok().stdout
    assert "new: content" in on and "1 new items start untrained" in on


def test_impressions_may_grow_by_time(trained):
    flags = ("--task=ctr", *TINY[:-1], "--num_epochs=1", "--device=cpu", "--positive_from=3")
    flags = [flag for flag in flags if "num_negatives" not in flag]
    table = pd.read_csv(trained / "old.csv")
    table["timestamp"] = 86400.0 * (table.timestamp - 999)
    table.to_csv(trained / "days.csv", index=False)
    here("--dataset=days.csv", *flags, "--out_dir=ctr", cwd=trained).ok()
    evaluation = ("--eval_only", "--ckpt_name=ctr/best.pth")
    before = here(*evaluation, cwd=trained).ok().stdout
    new = pd.DataFrame([("u0", "new", 5, 86400.0), ("u1", "new", 1, 86400.0)], columns=list(table))
    pd.concat([table, new]).to_csv(trained / "clicks.csv", index=False)
    after = here(*evaluation, "--dataset=clicks.csv", cwd=trained).ok().stdout
    assert "grown since training" in after
    assert after.split("TEST of")[1].split("written")[0] == before.split("TEST of")[1].split("written")[0]
    here("--dataset=days.csv", *flags, "--ctr_split=random", "--out_dir=random", cwd=trained).ok()
    refused = here("--eval_only", "--ckpt_name=random/best.pth", "--dataset=clicks.csv", cwd=trained)
    assert_refused(refused, "a random split is drawn anew")


def test_training_goes_on_with_new_items(trained):
    data = grown(trained, "next.csv", *[(f"u{user}", "new", 4, 10**9) for user in range(5)])
    flags = ("--lr=1e-30", "--weight_decay=0", "--num_epochs=1", "--init_from=run/best.pth", "--out_dir=next")
    shown = here(data, *[flag for flag in TINY if "lr=" not in flag], *flags, cwd=trained).ok().stdout
    assert "1 new items start untrained, 0 items of the checkpoint are not in the data" in shown
    _, old, before = open_checkpoint_in(trained, "--dataset=old.csv")
    with chdir(trained):
        _, new, after = open_checkpoint({}, trained / "next" / "best.pth")
    for i, item in enumerate(old.items):
        place = new.items.tolist().index(item)
        row = after.item_embedding.weight[1 + place].detach().numpy()
        np.testing.assert_allclose(row, before.item_embedding.weight[1 + i].detach().numpy(), atol=1e-6)
    resumed = here(data, "--resume=run/last.pth", "--out_dir=elsewhere", cwd=trained)
    assert_refused(resumed, "--init_from=")
    write_csv(trained / "foreign.csv", first_item=1000)
    refused = here("--dataset=foreign.csv", *TINY, "--init_from=run/best.pth", cwd=trained)
    assert_refused(refused, "none is in foreign")
