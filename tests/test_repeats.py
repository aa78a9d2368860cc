"""Users who repeat items: which rows count, what the data decide, and both results from end to end."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_dataset
from launch import TINY, here, in_small_batches, read_json, read_rows, read_state, torchrun

import evaluate
from data import load_dataset
from reclm.config import DataConfig, build_config
from reclm.data.prepare import build_sequences, select_actions
from reclm.data.repeats import MANY, describe_targets, equal_to_earlier, one_per_item, settle_history
from reclm.errors import UserError

ROWS = [  # user, item, timestamp: in file order, neither sorted nor free of equal rows
    "ann,a,30", "ann,b,10", "ann,a,20", "ann,a,30", "ann,c,40", "ann,b,50", "ann,b,10", "ann,b,10",
    "bob,a,5", "bob,c,5", "bob,a,5", "bob,c,7", "bob,b,6", "bob,b,9",
]  # fmt: skip
HISTORIES = {  # --repeats -> the items of ann and of bob, and the note
    None: ("baacb", "acbcb", "4 rows equal to an earlier one are dropped; --repeats=keep keeps them"),
    "keep": ("bbbaaacb", "acabcb", None),
    "first": ("bac", "acb", "8 later actions on the same item dropped (--repeats=first)"),
    "last": ("acb", "acb", "8 earlier actions on the same item dropped (--repeats=last)"),
}


def write(path, rows, header="user,item,timestamp"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def load(path, task="matching", **settings):
    """(the items of each user as one text, the notes on dropped rows)"""
    dataset = load_dataset(DataConfig(dataset=str(path), **settings), task)
    items = dataset.items[dataset.item_ids - 1]
    histories = ["".join(part) for part in np.split(items, dataset.offsets[1:-1])]
    return histories, [note for note in dataset.notes if "dropped" in note]


@pytest.mark.parametrize("repeats", HISTORIES)
def test_which_rows_count(tmp_path, repeats):
    histories, notes = load(write(tmp_path / "plays.csv", ROWS), repeats=repeats)
    ann, bob, note = HISTORIES[repeats]
    assert histories == [ann, bob] and notes == ([note] if note else [])


def test_rows_that_differ_in_any_column_are_kept(tmp_path):
    rows = [f"{row},{5 if i == 3 else 1}" for i, row in enumerate(ROWS)]
    histories, notes = load(write(tmp_path / "rated.csv", rows, "user,item,timestamp,rating"))
    assert histories == ["baaacb", "acbcb"] and notes[0].startswith("3 rows equal")
    rows = [f"{row},{i}" for i, row in enumerate(ROWS)]
    read = load(write(tmp_path / "other.csv", rows, "user,item,timestamp,mood"))  # a column that is not read
    assert read[0] == ["baacb", "acbcb"]


@pytest.mark.parametrize("repeats", [None, "first"])
def test_without_timestamps_the_order_of_the_file_counts(tmp_path, repeats):
    rows = [row.rpartition(",")[0] for row in ROWS]
    histories, notes = load(write(tmp_path / "plays.csv", rows, "user,item"), repeats=repeats)
    assert histories == ([["abaacbbb", "acacbb"], ["abc", "acb"]][repeats == "first"])
    assert bool(notes) == (repeats == "first")


def test_named_data_are_used_as_they_are(tmp_path):
    (tmp_path / "ml-100k").mkdir()
    rows = [f"{user}\t{item}\t3\t{100 + item // 2}" for user in (1, 2) for item in (4, 4, 5, 6, 6)]
    (tmp_path / "ml-100k" / "u.data").write_text("\n".join(rows) + "\n")
    dataset = load_dataset(DataConfig(dataset="ml-100k", data_dir=str(tmp_path)))
    assert dataset.lengths.tolist() == [5, 5]
    first = load_dataset(DataConfig(dataset="ml-100k", data_dir=str(tmp_path), repeats="first"))
    assert first.lengths.tolist() == [3, 3]  # as asked for


@pytest.mark.parametrize(("repeats", "kept"), [(None, 10), ("keep", 14)])
def test_equal_impressions_are_one(tmp_path, repeats, kept):
    rows = [f"{row},{int(row[4] == 'a')},{('train', 'valid', 'test')[i % 3]}" for i, row in enumerate(ROWS)]
    rows[3], rows[6], rows[7], rows[10] = rows[0], rows[1], rows[1], rows[8]
    path = write(tmp_path / "shown.csv", rows, "user,item,timestamp,label,split")
    dataset = load_dataset(DataConfig(dataset=str(path), repeats=repeats), "ctr")
    assert len(dataset.item_ids) == kept
    assert any("4 rows equal" in note for note in dataset.notes) == (repeats is None)


def test_the_first_click_may_come_after_a_look():
    """Rows with label 0 are no actions, so they are not the first one on an item."""
    table = pd.DataFrame({"user": 1, "item": list("aabca"), "label": [0, 1, 1, 1, 1], "timestamp": range(5)})
    used, _, notes = select_actions(table, DataConfig(repeats="first"))
    assert used["timestamp"].tolist() == [0, 1, 2, 3] and notes[0].startswith("1 later")
    _, arrays = build_sequences(used, DataConfig(repeats="first"))
    assert "".join(arrays["items"][arrays["item_ids"] - 1]) == "abc"
    table["label"] = 0
    assert select_actions(table, DataConfig(repeats="last"))[0].equals(table)  # no action at all


def test_rare_items_are_counted_without_repeats(tmp_path):
    rows = [f"{user},{item},{t}" for user in "uvw" for t, item in enumerate("abc" + "d" * 5 * (user == "u"))]
    path = write(tmp_path / "plays.csv", rows)
    assert load(path, min_item_count=3)[0] == ["abcddddd", "abc", "abc"]
    assert load(path, min_item_count=3, repeats="last")[0] == ["abc", "abc", "abc"]


KINDS = {
    "int": lambda ids: ids,
    "str": lambda ids: ids.astype(str),
    "category": lambda ids: ids.astype("category"),
}


def random_table(kind, seed=0, size=400):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({name: rng.integers(0, 5, size) for name in ("user", "item", "timestamp", "rating")})
    table["timestamp"] = table["timestamp"] / 2
    for name in ("user", "item"):
        table[name] = KINDS[kind](10 * table[name])
    return table.iloc[::-1]  # the index is not the place of a row


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_by_pandas(kind, monkeypatch):
    table = random_table(kind)
    expected = table.duplicated().to_numpy()
    assert 0.2 < expected.mean() < 0.8
    assert equal_to_earlier(table).tolist() == expected.tolist()
    assert not equal_to_earlier(table[~expected]).any() and not equal_to_earlier(table[:0]).any()
    real = pd.util.hash_pandas_object
    monkeypatch.setattr(pd.util, "hash_pandas_object", lambda column, index: real(column, index=index) % 4)
    found = equal_to_earlier(table)  # rows that share a hash without being equal are never dropped
    assert found.any() and not (found & ~expected).any()


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timed", [True, False])
def test_one_action_per_item_by_brute_force(kind, which, timed):
    table = random_table(kind, size=120)
    table = table if timed else table.drop(columns="timestamp")
    is_action = table["rating"].to_numpy() > 0
    chosen = {}
    for place, row in enumerate(table.itertuples()):
        pair, when = (row.user, row.item), row.timestamp if timed else 0
        if not is_action[place]:
            chosen[place] = place
        elif pair not in chosen or (when < chosen[pair][0] if which == "first" else when >= chosen[pair][0]):
            chosen[pair] = (when, place)
    kept = sorted(value if isinstance(value, int) else value[1] for value in chosen.values())
    used, notes = one_per_item(table, is_action, DataConfig(repeats=which))
    assert np.flatnonzero(used).tolist() == kept and notes[0].startswith(f"{120 - len(kept)} ")


# ---------------------------------------------------------------- what the data decide


def test_targets_by_brute_force():
    rng = np.random.default_rng(1)
    histories = [rng.geometric(0.05, length).tolist() for length in rng.integers(0, 12, 80)]
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in histories])])
    item_ids = np.array([item for items in histories for item in items])
    ranked = [items for items in histories if len(items) >= 3]
    trained = {item for items in histories for item in (items[:-2] if len(items) >= 3 else items)}
    again = {back: sum(items[-back] in items[:-back] for items in ranked) for back in (1, 2)}
    unknown = sum(items[-1] not in trained for items in ranked)
    share, notes = describe_targets(offsets, item_ids)
    assert share == max(again.values()) / len(ranked) and again[1] != again[2] and unknown
    assert notes[0].startswith(
        f"{again[1]} of {len(ranked)} test targets ({again[1] / len(ranked):.1%}) repeat"
    )
    assert "--repeats=" in notes[0]
    assert notes[1].startswith(f"{unknown} of {len(ranked)} test targets are items without a training row")


def settled(dataset, **given):
    cfg = build_config(given)
    settle_history(cfg, dataset)
    return cfg.loss.exclude_history, cfg.eval.filter_seen


@pytest.mark.parametrize("again", [[1, 2, 3, 1], [1, 2, 1, 3]])  # the test target, the validation target
def test_the_history_is_kept_in_from_one_percent_on(again):
    none = [[1, 2, 3, 4]] * 99
    assert settled(make_dataset(none)) == (True, True)
    many = make_dataset([again] + none)
    assert many.repeats == MANY and settled(many) == (False, False)
    assert settled(make_dataset([again] + 2 * none)) == (True, True)  # fewer
    assert settled(many, filter_seen=True) == (False, True)
    assert settled(many, exclude_history=True) == (True, True)
    assert settled(make_dataset(none), filter_seen=False) == (False, False)


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with plays.csv, in which 60 users come back to 5 of 20 items each, some rows being there
    twice, and a run of it on two processes."""
    folder = tmp_path_factory.mktemp("plays")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(60):
        own = rng.choice(20, 5, replace=False)
        rows += [f"u{user},i{rng.choice(own)},{1000 + t}" for t in range(rng.integers(3, 12))]
    write(folder / "plays.csv", rows + rows[:7])
    flags = ["--dataset=plays.csv", *TINY, "--num_epochs=2", "--out_dir=run"]
    shown = torchrun(2, *flags, program=in_small_batches(folder), cwd=folder).ok().stdout
    assert "7 rows equal to an earlier one" in shown and "repeat an item of the user's history" in shown
    assert "(all users x all items, history kept in)" in shown and "new items alone (" in shown
    return folder


def test_what_the_data_decide_is_stored(trained):
    result, state = read_json(trained / "run" / "result.json"), read_state(trained / "run" / "best.pth")
    assert result["filter_seen"] is result["exclude_history"] is False
    assert state["config"]["filter_seen"] is state["config"]["exclude_history"] is False
    assert any("repeat an item" in note for note in result["notes"])
    assert 0 < result["test"]["new/users"] < 60 and "new/NDCG@10" in result["test"]


def test_both_results_do_not_depend_on_the_number_of_processes(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "USERS_AT_ONCE", 7)  # as in the run
    shown = here("--eval_only=true", "--out_dir=run", cwd=trained).ok().stdout
    evaluated, result = (read_json(trained / "run" / f"{name}.json") for name in ("eval-best", "result"))
    for split in ("valid", "test"):
        assert evaluated[split].keys() == result[split].keys() >= {"new/HR@10", "HR@10"}
        assert evaluated[split] == pytest.approx(result[split], rel=0, abs=2e-15)
    assert f"new items alone ({result['test']['new/users']} users whose item is new to them" in shown


def test_a_finished_run_is_resumed_and_the_history_can_be_left_out(trained):
    before = read_rows(trained / "run")
    here("--resume=auto", "--out_dir=run", cwd=trained).ok()
    assert read_rows(trained / "run") == before
    shown = here("--eval_only=true", "--out_dir=run", "--filter_seen=true", cwd=trained).ok().stdout
    assert shown.count("(all users x all items, history left out)") == 2
    left_out = read_json(trained / re.search("written to (.*)", shown)[1])["test"]
    kept_in = read_json(trained / "run" / "result.json")["test"]
    assert left_out["HR@1"] != kept_in["HR@1"]
    for name in ("new/HR@10", "new/NDCG@10", "new/users"):
        assert left_out[name] == pytest.approx(kept_in[name])


def test_a_checkpoint_of_a_version_that_kept_all_rows(tmp_path, trained):
    """It has no --repeats and explicit values; its data have the rows twice."""
    csv = (trained / "plays.csv").read_text()
    (tmp_path / "plays.csv").write_text(csv)
    flags = ["--dataset=plays.csv", *TINY, "--num_epochs=1", "--exclude_history=true", "--out_dir=run"]
    here(*flags, "--repeats=keep", cwd=tmp_path).ok()
    path = tmp_path / "run" / "best.pth"
    state = read_state(path)
    assert state["config"].pop("repeats") == "keep"
    torch.save(state, path)
    shown = here("--eval_only=true", "--out_dir=run", cwd=tmp_path).ok().stdout
    assert "equal to an earlier" not in shown and "history left out" in shown
    assert read_json(tmp_path / "run" / "eval-best.json")["test"] == pytest.approx(
        read_json(tmp_path / "run" / "result.json")["test"]
    )
    refused = here("--eval_only=true", "--repeats=first", "--out_dir=run", cwd=tmp_path)
    assert "--repeats=first contradicts" in refused.errors[0]


def test_too_few_rows_without_repeats(tmp_path):
    path = write(tmp_path / "plays.csv", [f"u{u},{i % 2},{i}" for u in range(3) for i in range(5)])
    load(path)
    with pytest.raises(UserError, match="no user has 3 .*--repeats=keep"):
        load(path, repeats="first")
