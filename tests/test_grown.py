"""A file that has grown since training: what the model knows of it is evaluated, --init_from goes on."""

import json
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import impressions_table, known_before, make_impressions
from launch import TINY, here, read_state, write_csv
from test_bad_input import assert_refused

from data import eval_batches
from main import open_checkpoint
from reclm.config import build_config
from reclm.data.dataset import Dataset
from reclm.data.grown import Trained, align, check_splits, may_have_trained
from reclm.errors import UserError

LATE = 10**9  # seconds, after all of old.csv
EVALUATE = ("--eval_only", "--ckpt_name=run/best.pth")
NEW = ("num_rows", "user_keys", "user_rows", "last_time")  # entries that older checkpoints lack


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("grown")
    write_csv(cwd / "old.csv")
    with open(cwd / "old.csv", "a") as file:
        file.write("short,i3,1,1000\nshort,i4,2,1001\n")  # two rows, both of training
    train(cwd, "run", "--dataset=old.csv", "--num_epochs=2")
    return cwd


def train(cwd, name, *flags):
    return here(*TINY, "--num_epochs=1", *flags, f"--out_dir={name}", cwd=cwd).ok().stdout


def grown(cwd, name, *rows, old="old.csv"):
    """The old file and more rows (user, item, rating, timestamp)."""
    (cwd / name).write_text((cwd / old).read_text() + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return f"--dataset={name}"


def metrics(cwd, *flags, run="run"):
    shown = here("--eval_only", f"--ckpt_name={run}/best.pth", *flags, cwd=cwd).ok().stdout
    file = shown.strip().splitlines()[-1].removeprefix("written to ")
    return json.loads((cwd / file).read_text()), shown


def opened(cwd, data, run="run"):
    with chdir(cwd):
        return open_checkpoint({"dataset": data.partition("=")[2]}, Path(run) / "best.pth")


def assert_same(cwd, data, run):
    """The metrics of a run on grown data are those on its own, to the last bit."""
    before, after = metrics(cwd, run=run)[0], metrics(cwd, data, run=run)[0]
    assert after["protocol"] == before["protocol"] + ", grown since training"
    assert (after["valid"], after["test"]) == (before["valid"], before["test"])


# ---------------------------------------------------------------- evaluation


def test_rows_of_unknown_items_change_nothing(trained):
    data = grown(trained, "more.csv", ("u0", "a", 5, LATE), ("u1", "z", 5, 7), ("zoe", "j", 5, LATE))
    assert_same(trained, data, "run")
    _, shown = metrics(trained, data)
    grown_by = (
        "NOTE: the data have grown since training, by 3 rows, 1 users and 3 items; left out: the 3 rows of"
    )
    assert f"{grown_by} new items, which the model does not know\n" in shown


def test_a_file_that_did_not_grow_is_not_said_to_have(trained):
    shutil.copy(trained / "old.csv", trained / "copy.csv")
    before, after = metrics(trained), metrics(trained, "--dataset=copy.csv")
    assert after[0]["test"] == before[0]["test"] and "grown" not in after[1]
    assert after[0]["protocol"] == before[0]["protocol"]


def by_hand(path, items):
    """{split: {user: (items of the history, target)}} of a file, from its known items alone."""
    table = pd.read_csv(path, dtype={"user": str, "item": str})
    found = {"valid": {}, "test": {}}
    for user, rows in table[table.item.isin(items)].sort_values("timestamp", kind="stable").groupby("user"):
        sequence = rows.item.tolist()
        if len(sequence) > 2:
            found["valid"][user] = (sequence[:-2][-16:], sequence[-2])
            found["test"][user] = (sequence[:-1][-16:], sequence[-1])
    return found


def evaluated(dataset, split):
    """What `by_hand` returns, from the batches that the model gets."""
    found = {}
    for batch in eval_batches(dataset, split, max_len=16, batch_size=7):
        for user, ids, target in zip(batch["user_ids"], batch["item_ids"], batch["target_ids"], strict=True):
            history = [dataset.items[i - 1] for i in ids.tolist() if i]
            found[dataset.users[user]] = (history, dataset.items[target - 1])
    return found


def test_histories_and_targets_are_those_of_known_items(trained):
    zoe = [("a zoe", f"i{item}", 3, LATE + item) for item in (3, 1, 4, 99, 5, 9)]
    early, unknown = ("u0", "i7", 3, 5), ("u2", "unknown", 1, LATE)
    data = grown(trained, "users.csv", *zoe, early, unknown, ("u3", "i1", 2, LATE), ("u4", "i1", 2, 1001))
    _, dataset, model = opened(trained, data)
    items = sorted(set(pd.read_csv(trained / "old.csv").item))
    expected = by_hand(trained / "users.csv", items)
    assert {"a zoe", "u0", "u39"} <= expected["test"].keys() and "short" not in expected["test"]
    for split, of_users in expected.items():
        assert evaluated(dataset, split) == of_users
    assert dataset.items.tolist() == items and len(model.item_embedding.weight) == len(items) + 1


def test_an_evaluation_of_grown_data_does_not_replace_the_one_before(trained, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("old.csv", "run/best.pth"):
        shutil.copy(trained / name, tmp_path / name)
    names = []
    for rows in ([], [("u0", "i7", 3, LATE)], [], [("u1", "i7", 3, LATE)]):
        grown(tmp_path, "old.csv", *rows)
        shown = here(*EVALUATE, cwd=tmp_path).ok().stdout
        names.append(shown.strip().splitlines()[-1].rpartition("/")[2])
    assert names == ["eval-best.json", "eval-best-2.json", "eval-best-2.json", "eval-best-3.json"]


def test_users_whose_held_out_rows_may_have_been_trained_on_are_left_out(trained):
    """A user of two rows trains on both: with a third, the second is held out. And where rows of a user are
    gone, an earlier one may be."""
    data = grown(trained, "third.csv", ("short", "i5", 3, LATE))
    before, (after, shown) = metrics(trained)[0], metrics(trained, data)
    assert "1 users, since their held-out rows may have been training rows" in shown
    assert after["test"] == before["test"]
    data = grown(trained, "fourth.csv", ("short", "i5", 3, LATE), ("short", "i6", 3, LATE + 1))
    _, dataset, _ = opened(trained, data)
    assert evaluated(dataset, "test")["short"] == (["i3", "i4", "i5"], "i6")
    text = (trained / "old.csv").read_text()
    (trained / "swapped.csv").write_text(text.replace("u5,i15,1,1000\n", "") + "u6,i1,1,9999\nu7,i1,1,9999\n")
    _, dataset, _ = opened(trained, "--dataset=swapped.csv")
    assert evaluated(dataset, "test").keys() == {f"u{i}" for i in range(40)} - {"u5"}


def test_what_cannot_have_grown_is_refused(trained):
    rows = (trained / "old.csv").read_text().splitlines(keepends=True)
    for name, text, words in (
        ("fewer.csv", rows[:-5], ["432 rows, in training 437"]),
        ("changed.csv", [*rows[:-1], "u0,i1,5,7\n"], ["437 rows, in training 437"]),
        (
            "other.csv",
            [row.replace("i1", "k1") for row in [*rows, *rows[1:]]],
            ["11 of the 25 items of the", "missing"],
        ),
        (
            "untimed.csv",
            [row.rpartition(",")[0] + "\n" for row in [*rows, rows[-1]]],
            ["protocol 'own file, f"],
        ),
    ):
        (trained / name).write_text("".join(text))
        refused = here(*EVALUATE, f"--dataset={name}", cwd=trained)
        assert_refused(refused, "best.pth", "fingerprint", *words)


def test_an_older_checkpoint_cannot_tell_whether_rows_are_gone(trained):
    state = read_state(trained / "run" / "best.pth")
    for name in NEW:
        del state[name]
    del state["vocabulary"]["meanings"]
    (trained / "older").mkdir()
    torch.save(state, trained / "older" / "best.pth")
    data = grown(trained, "old2.csv", ("u0", "new", 3, LATE))
    after, shown = metrics(trained, data, run="older")
    assert after["test"] == metrics(trained)[0]["test"]
    assert "by 0 users and 1 items" in shown and "cannot tell whether rows are gone" in shown


# ---------------------------------------------------------------- inputs


def test_ratings_must_be_those_of_training(trained):
    train(trained, "rated", "--dataset=old.csv", "--action_embedding")
    assert_same(trained, grown(trained, "level.csv", ("u0", "new", 3.5, LATE)), "rated")
    refused = here(
        "--eval_only", "--ckpt_name=rated/best.pth", grown(trained, "half.csv", ("u0", "i7", 3.5, LATE)),
        cwd=trained,
    )  # fmt: skip
    assert_refused(refused, "half has grown since training, and its column rating has values that the model")
    text = (trained / "old.csv").read_text().replace(",5,", ",4.5,")  # as many levels, another one
    (trained / "other5.csv").write_text(text + "u0,i7,3,9999\n")
    refused = here("--eval_only", "--ckpt_name=rated/best.pth", "--dataset=other5.csv", cwd=trained)
    assert_refused(refused, "column rating")


@pytest.fixture(scope="module")
def shop(trained):
    """A file with a user table and an item table, a run with each, and the same file grown by a row."""
    genres = [f"g{i % 4}|even" if i % 2 else f"g{i % 4}" for i in range(25)]
    items = pd.DataFrame({"item": [f"i{i}" for i in range(25)], "genres": genres})
    users = pd.DataFrame({"user": [f"u{i}" for i in range(40)], "city": ["Ulm", "Bonn"] * 20})
    for name, row in (("shop", ()), ("shop2", [("u0", "new", 5, LATE), ("a0", "i3", 5, LATE)])):
        grown(trained, f"{name}.csv", *row)
        users.to_csv(trained / f"{name}.users.csv", index=False)
        items.to_csv(trained / f"{name}.items.csv", index=False)
    train(trained, "content", "--dataset=shop.csv", "--item_features=genres", "--profile_tokens")
    return trained, users, items


def test_content_and_profiles_are_those_of_training(shop):
    cwd, users, items = shop
    more = pd.concat([items, pd.DataFrame({"item": ["new"], "genres": ["a first word"]})])
    more.to_csv(cwd / "shop2.items.csv", index=False)  # all words have other numbers now
    assert_same(cwd, "--dataset=shop2.csv", "content")
    for city in ("Aachen", "Ulm"):  # another number of values, and as many but others
        changed = users.replace("Bonn", "Aachen") if city == "Ulm" else users
        pd.concat([changed, pd.DataFrame({"user": ["a0"], "city": [city]})]).to_csv(
            cwd / "shop2.users.csv", index=False
        )
        refused = here("--eval_only", "--ckpt_name=content/best.pth", "--dataset=shop2.csv", cwd=cwd)
        assert_refused(refused, "column city of the user table")
    users.to_csv(cwd / "shop2.users.csv", index=False)


def test_vectors_of_users_are_found_by_id(trained):
    """A user whose id sorts first shifts the numbers of all others."""
    train(trained, "users", "--dataset=old.csv", "--user_embedding=explicit", "--num_epochs=2")
    zoe = [("a zoe", f"i{item}", 3, LATE + item) for item in (3, 1, 4, 5, 9)]
    data = grown(trained, "first.csv", *zoe)
    assert_same(trained, data, "users")
    _, shown = metrics(trained, data, run="users")
    assert "the new users, for whom --user_embedding=explicit has no vectors" in shown
    _, dataset, _ = opened(trained, grown(trained, "b.csv", *zoe, ("u9", "i1", 1, LATE)), "users")
    assert evaluated(dataset, "test")["u9"][1] == "i1" and dataset.num_users == 41
    text = [row for row in (trained / "first.csv").read_text().splitlines(True) if not row.startswith("u7,")]
    (trained / "gone.csv").write_text("".join([*text, *(f"u1,i1,1,{LATE + i}\n" for i in range(30))]))
    refused = here("--eval_only", "--ckpt_name=users/best.pth", "--dataset=gone.csv", cwd=trained)
    assert_refused(refused, "1 of the 41 users of the checkpoint are missing")


# ---------------------------------------------------------------- splits


CTR = ("--task=ctr", *(flag for flag in TINY if "num_negatives" not in flag), "--positive_from=3")


@pytest.fixture(scope="module")
def days(trained):
    """The old file, a day per step, and CTR runs on it."""
    table = pd.read_csv(trained / "old.csv")
    table["timestamp"] = 86400 * (table.timestamp - 900)
    table.to_csv(trained / "days.csv", index=False)
    for name in ("time", "random"):
        flags = (f"--ctr_split={name}", "--num_epochs=1", f"--out_dir=ctr_{name}")
        here("--dataset=days.csv", *CTR, *flags, cwd=trained).ok()
    return trained


def test_impressions_may_grow_by_time(days):
    new = [("u0", "new", 5, 86400 * 101), ("u1", "new", 1, 86400 * 109)]
    assert_same(days, grown(days, "clicks.csv", *new, old="days.csv"), "ctr_time")
    later = [(f"u{i}", "i3", 1 + i % 5, 86400 * (113 + i)) for i in range(9)]
    _, dataset, _ = opened(days, grown(days, "later.csv", *later, *new, old="days.csv"), "ctr_time")
    assert (dataset.splits == 2).sum() > 0 and dataset.timestamps[dataset.splits > 0].min() > 86400 * 111
    early = [(f"u{i}", "i3", 1 + i % 5, 86400 * (88 + i)) for i in range(9)]
    older = grown(days, "older.csv", *early, old="days.csv")
    refused = here("--eval_only", "--ckpt_name=ctr_time/best.pth", older, cwd=days)
    assert_refused(refused, "the training part of older ends earlier than in training")
    refused = here("--eval_only", "--ckpt_name=ctr_random/best.pth", "--dataset=later.csv", cwd=days)
    assert_refused(refused, "--ctr_split=random draws anew")


def trained_on(dataset, **changed):
    by_user = {"user_keys": dataset.user_keys, "user_rows": dataset.lengths}
    then = Trained(
        dataset.items, dataset.vocabulary, dataset.protocol, None, **by_user, last_time=dataset.last_time
    )
    return replace(then, **changed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("history", ["past", "train"])
def test_impressions_keep_the_known_part_of_their_history(seed, history):
    table = impressions_table(seed)
    whole = make_impressions(table, ctr_split="own", ctr_history=history)
    whole.profiles = np.zeros((whole.num_users, 0), np.int64)
    items = np.random.default_rng(seed).permutation(whole.items)[:12]  # in an order of their own
    cfg = build_config({"task": "ctr", "ctr_split": "own"})
    vocabulary = replace(whole.vocabulary, num_items=12)
    part = align(whole, trained_on(whole, items=items, vocabulary=vocabulary), cfg)
    expected = [
        [item for item in rows if table["item"][item] in items] for rows in known_before(table, history)
    ]
    seen = 0
    for row, of_file in enumerate(part.contexts - 1):  # the column context is the row of the file
        first = part.offsets[part.owner[row]]
        found = part.contexts[first : first + part.history_lengths[row]] - 1
        assert found.tolist() == expected[of_file]
        assert part.items[part.item_ids[row] - 1] == table["item"][of_file]
        assert part.users[part.owner[row]] == table["user"][of_file]
        seen += 1
    assert seen == table["item"].isin(items).sum() and part.items.tolist() == items.tolist()


@pytest.mark.parametrize("setting", ["cold_items=0.1", "shuffle_ties=1", "ctr_split=random"])
def test_what_is_drawn_is_not_drawn_again(setting, tiny_dataset):
    name, _, value = setting.partition("=")
    value = value if value == "random" else float(value) if "." in value else int(value)
    with pytest.raises(UserError, match=f"--{setting} draws anew"):
        check_splits(tiny_dataset, trained_on(tiny_dataset), build_config({name: value}))
    check_splits(tiny_dataset, trained_on(tiny_dataset), build_config({}))


def test_no_training_row_becomes_a_held_out_row():
    """By brute force: sequences grow at random places, users lose rows; whoever is not left out has no row
    held out that a model was trained on."""
    rng = np.random.default_rng(0)
    caught = left_out = 0
    for _ in range(500):
        before = [int(x) for x in rng.integers(1, 6, 8)]
        after, leak = [], []
        for length in before:
            rows = [(1, i) for i in range(length)]  # 1 = there at training
            trained_rows = set(rows if length == 2 else rows[:-2] if length > 2 else [])
            if rng.random() < 0.2:
                rows.pop(rng.integers(len(rows)))
            rows += [(0, i) for i in range(int(rng.integers(0, 3)) if len(rows) >= length else 0)]
            after.append(len(rows))
            leak.append(len(rows) >= 3 and not trained_rows.isdisjoint(rows[-2:]))
        old, new = (made(lengths) for lengths in (before, after))
        doubtful = may_have_trained(new, trained_on(old), new.lengths)
        assert not (np.array(leak) & ~doubtful).any()
        caught, left_out = caught + sum(leak), left_out + doubtful.sum()
    assert caught > 100 and left_out < 2 * caught


def made(lengths):
    """A Dataset of users with these numbers of rows."""
    empty, users = np.zeros(0), np.array([f"u{i}" for i in range(len(lengths))])
    rows = {"offsets": np.cumsum([0, *lengths]), "item_ids": np.ones(sum(lengths), np.int64)}
    return Dataset("made", "test", [], "", **rows, timestamps=empty, ratings=empty, users=users, items=users)


# ---------------------------------------------------------------- --init_from


STILL = ("--lr=1e-30", "--weight_decay=0", "--dropout=0")  # a run that leaves its weights as they are


def go_on(cwd, name, *flags, start="run"):
    return train(cwd, name, *flags, *STILL, f"--init_from={start}/best.pth")


def vectors(cwd, run, table="item_embedding"):
    """{id: vector} of a checkpoint."""
    state = read_state(cwd / run / "best.pth")
    rows = state["model"][f"{table}.weight"].numpy()
    if table == "item_embedding":
        return dict(zip(state["items"], rows[1:], strict=True))
    return dict(zip(state["user_keys"].tolist(), rows, strict=True))


@pytest.mark.parametrize("table", ["item_embedding", "user_embedding"])
def test_training_goes_on_with_new_ids(trained, table):
    flags = [] if table == "item_embedding" else ["--user_embedding=explicit"]
    train(trained, f"start_{table}", "--dataset=old.csv", *flags)
    new = [(f"u{user}", "an item", 4, LATE) for user in range(5)] + [("a zoe", "i3", 1, LATE)]
    data = grown(trained, "next.csv", *new)
    shown = go_on(trained, f"next_{table}", data, *flags, start=f"start_{table}")
    assert "new: none; 1 new items start untrained" in shown and "not in the data" not in shown
    assert ("1 new users start untrained" in shown) == bool(flags)
    before, after = (vectors(trained, f"{name}_{table}", table) for name in ("start", "next"))
    assert len(after) == len(before) + 1
    for name, vector in before.items():
        np.testing.assert_allclose(after[name], vector, atol=1e-6)


def test_items_may_be_gone_but_not_all(trained):
    rows = [row for row in (trained / "old.csv").read_text().splitlines(True) if ",i3," not in row]
    (trained / "without.csv").write_text("".join(rows))
    shown = go_on(trained, "without", "--dataset=without.csv")
    assert "0 new items start untrained; 1 items of the checkpoint are not in the data" in shown
    assert "users, rows that are held out here may have been training rows of run/best.pth" in shown
    result = json.loads((trained / "without" / "result.json").read_text())
    assert any("may have been training rows" in note for note in result["notes"])
    write_csv(trained / "foreign.csv", first_item=1000)
    refused = here("--dataset=foreign.csv", *TINY, "--init_from=run/best.pth", cwd=trained)
    assert_refused(refused, "none is in foreign")


def test_tables_of_codes_are_copied_only_where_they_mean_the_same(shop):
    cwd, users, items = shop
    flags = ("--item_features=genres", "--profile_tokens", "--action_embedding")
    items.to_csv(cwd / "shop2.items.csv", index=False)
    train(cwd, "codes", "--dataset=shop.csv", *flags, "--num_epochs=2")
    shown = go_on(cwd, "codes_same", "--dataset=shop2.csv", *flags, start="codes")
    assert "numbered anew" not in shown and "new: none; 1 new items" in shown
    tables = ("content.projections.0", "inputs.token_embedding", "inputs.code_embeddings.actions")
    before, same = (read_state(cwd / name / "best.pth")["model"] for name in ("codes", "codes_same"))
    for name in tables:
        assert torch.allclose(before[f"{name}.weight"], same[f"{name}.weight"], atol=1e-6), name
    for kind, table in (
        ("users", users.replace("Bonn", "Zell")),
        ("items", items.replace("g0", "h", regex=True)),
    ):
        table.to_csv(cwd / f"shop3.{kind}.csv", index=False)
    text = (cwd / "shop2.csv").read_text().replace(",5,", ",4.5,")  # as many levels, users, words: others
    (cwd / "shop3.csv").write_text(text)
    shown = go_on(cwd, "codes_other", "--dataset=shop3.csv", *flags, start="codes")
    wanted = "numbered anew, so untrained: column rating, column city of the user table, words of genres"
    assert wanted in shown and "new: content, inputs" in shown


def test_features_are_found_by_name(shop):
    cwd, _, _ = shop
    for seed, name in enumerate(("one", "two")):
        np.save(cwd / f"{name}.npy", np.random.default_rng(seed).normal(size=(25, 6)).astype(np.float32))
    train(cwd, "ordered", "--dataset=shop.csv", "--item_features=one.npy,two.npy", "--num_epochs=2")
    go_on(cwd, "turned", "--dataset=shop.csv", "--item_features=two.npy,one.npy", start="ordered")
    before, after = (read_state(cwd / name / "best.pth")["model"] for name in ("ordered", "turned"))
    for part in ("projections", "gates"):
        for i in (0, 1):
            one, other = before[f"content.{part}.{i}.weight"], after[f"content.{part}.{1 - i}.weight"]
            assert torch.allclose(one, other, atol=1e-6)


def test_vectors_of_unknown_users_are_not_copied(trained):
    train(trained, "keyless", "--dataset=old.csv", "--user_embedding=explicit")
    path = trained / "keyless" / "best.pth"
    torch.save({name: value for name, value in read_state(path).items() if name not in NEW}, path)
    data = grown(trained, "k.csv", ("a zoe", "i3", 1, LATE))
    flags = (data, *TINY, "--user_embedding=explicit", "--init_from=keyless/best.pth")
    assert_refused(here(*flags, cwd=trained), "does not tell whose vectors")
    evaluation = here("--eval_only", "--ckpt_name=keyless/best.pth", data, cwd=trained)
    assert_refused(evaluation, "does not tell whose vectors")


def test_a_start_does_not_know_held_out_rows(days):
    flags = ("--num_epochs=1", "--out_dir=no")
    for name, data, words in (
        ("random", grown(days, "rows.csv", ("u0", "i3", 1, 86400 * 103), old="days.csv"), "draws anew"),
        (
            "time",
            grown(days, "olds.csv", ("u0", "i3", 1, 86400 * 88), old="days.csv"),
            "ends earlier than in training",
        ),
    ):
        start = (f"--ctr_split={name}", f"--init_from=ctr_{name}/best.pth")
        assert_refused(here(data, *CTR, *start, *flags, cwd=days), words)


def test_a_resumed_run_keeps_its_data(trained):
    data = grown(trained, "resumed.csv", ("u0", "i7", 3, LATE))
    refused = here(data, "--resume=run/last.pth", cwd=trained)
    assert_refused(refused, "where the data have grown, a new run with --init_from=run/last.pth")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user_keys", torch.zeros(3, dtype=torch.int64)),
        ("user_rows", torch.zeros(41)),
        ("items", ["i1"]),
        ("items", [["i1"]] * 25),
        ("last_time", "late"),
    ],
)
def test_damaged_entries_are_refused(trained, tmp_path, name, value):
    torch.save(read_state(trained / "run" / "best.pth") | {name: value}, tmp_path / "bad.pth")
    data = grown(trained, "bad.csv", ("u0", "new", 3, LATE))
    refused = here("--eval_only", f"--ckpt_name={tmp_path}/bad.pth", data, cwd=trained)
    assert_refused(refused, "is damaged or foreign", name)
