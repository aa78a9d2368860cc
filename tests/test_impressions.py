"""Labels, splits and histories of impressions: by hand, by brute force, and on real data by the numbers of
ReChorus."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from conftest import impressions_table, known_before, make_impressions, tiny_rows, write_csv

from data import load_dataset
from reclm.config import DataConfig
from reclm.data.impressions import (
    DAY,
    SPLITS,
    label_impressions,
    positive_core,
    split_at_random,
    split_by_time,
)
from reclm.data.sources import find_dataset, read_dataset
from reclm.errors import UserError


def labelled(table, **settings):
    return label_impressions(table, DataConfig(**{"ctr_split": "own"} | settings))[0]


# ---------------------------------------------------------------- rows that count, and labels


@pytest.mark.parametrize(("positive_from", "least"), [(4.0, 4), (2.5, 3), (5.0, 5)])
def test_ratings_become_labels(positive_from, least):
    table = impressions_table().drop(columns="label")
    got = labelled(table, positive_from=positive_from)
    assert got["label"].tolist() == [int(rating >= least) for rating in table["rating"]]


def test_labels_say_it_themselves():
    table = impressions_table()
    assert labelled(table)["label"].tolist() == table["label"].tolist()
    assert len(labelled(table.drop(columns="rating"))) == len(table)


def test_a_rating_to_drop():
    table = impressions_table()
    kept = labelled(table, drop_rating=3.0)["context"].tolist()
    assert kept == [place for place, rating in enumerate(table["rating"]) if rating != 3]
    assert 0 < len(kept) < len(table)


def brute_force_core(rows, least):
    """Take out one user or item at a time, until none has too few positives."""
    while True:
        for side in (0, 1):
            for name in {row[side] for row in rows}:
                if sum(row[2] for row in rows if row[side] == name) < least:
                    rows = [row for row in rows if row[side] != name]
                    break
            else:
                continue
            break
        else:
            return rows


@pytest.mark.parametrize(("least", "seed"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_core_by_brute_force(least, seed):
    rng = np.random.default_rng(seed)
    users, items, labels = rng.integers(0, 20, 110), rng.integers(0, 16, 110), rng.integers(0, 2, 110)
    table = impressions_table(size=110, user=users, item=items, label=labels)
    rows = brute_force_core([*zip(users, items, labels, range(110), strict=True)], least)
    assert positive_core(table, least)["context"].tolist() == [row[3] for row in rows]
    once = table.groupby("user")["label"].transform("sum") >= least
    once &= table.groupby("item")["label"].transform("sum") >= least
    assert 0 < len(rows) < once.sum()  # one round is not enough


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("offset", [0, 8, -7, 5.5])
def test_split_by_the_calendar(offset):
    """A day belongs to one split: that of its date where utc_offset is the local time."""
    rng = np.random.default_rng(0)
    times = pd.Series(rng.integers(800 * DAY, 830 * DAY, 3000))
    got = split_by_time(pd.DataFrame({"timestamp": times}), DataConfig(utc_offset=offset))
    dates = [(datetime.fromtimestamp(t, UTC) + timedelta(hours=offset)).date() for t in times]
    first, last = min(dates), max(dates)
    for date, split in zip(dates, got, strict=True):
        tenths, whole = 10 * (date - first).days, (last - first).days
        assert split == (tenths > 8 * whole) + (tenths > 9 * whole)


def test_split_at_the_bounds_of_every_span():
    """Day 80 % of the way still trains, day 90 % still validates, however long the span is."""
    for span in (*range(1, 40), *range(50, 2000, 50)):
        days = np.arange(span + 1)
        table = pd.DataFrame({"timestamp": DAY * np.stack([days, days + 1], axis=1).ravel()})
        table["timestamp"] -= [0, 1] * (span + 1)  # the first and the last second of each
        expected = np.repeat((10 * days > 8 * span) + 1 * (10 * days > 9 * span), 2)
        assert split_by_time(table, DataConfig()).tolist() == expected.tolist(), span


@pytest.mark.parametrize("size", [10, 97, 1000])
def test_split_at_random(size, monkeypatch):
    """The draw is fixed; its distribution is tested with 300 other seeds."""
    table, generator = pd.DataFrame(index=range(size)), np.random.default_rng
    first = split_at_random(table, DataConfig()).tolist()
    assert split_at_random(table, DataConfig(positive_from=3.0)).tolist() == first
    draws = []
    for number in range(300):
        monkeypatch.setattr(np.random, "default_rng", lambda seed, number=number: generator((seed, number)))
        draws.append(split_at_random(table, DataConfig()))
    draws = np.stack(draws)
    assert draws[7].tolist() != draws[8].tolist()
    for split, share in ((0, 0.8), (1, 0.1), (2, 0.1)):
        counts = (draws == split).sum(1)
        assert (abs(counts - share * size) <= 1).all()
        # Each place gets it as often as any other: 6 standard deviations of 300 draws.
        assert (abs((draws == split).mean(0) - share) < 6 * np.sqrt(0.16 / 300) + 1 / size).all()


def test_split_as_given():
    table = impressions_table()
    got = labelled(table)["split"]
    assert got.tolist() == [SPLITS[name] for name in table["split"]]
    assert labelled(table, ctr_split=None)["split"].tolist() == got.tolist()  # where there is the column
    by_time = labelled(table.drop(columns="split"), ctr_split=None)
    assert by_time["split"].tolist() == labelled(table, ctr_split="time")["split"].tolist() != got.tolist()


def test_the_unknown_are_held_out_by_time_only():
    rows = [("a", "x", 0), ("b", "y", 1), ("a", "y", 2), ("b", "x", 9), ("c", "x", 9), ("a", "z", 9),
            ("c", "z", 10), ("a", "x", 10)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    table = table.assign(rating=[3, 4] * 4, timestamp=table["timestamp"] * DAY)
    kept, _, notes = label_impressions(table, DataConfig(ctr_split="time"))
    assert kept.index.tolist() == [0, 1, 2, 3, 7]
    assert notes[0].startswith("3 held-out impressions")
    kept, _, notes = label_impressions(table, DataConfig(ctr_split="random"))
    assert len(kept) == len(table) and "the future leaks" in notes[0]


# ---------------------------------------------------------------- histories


@pytest.mark.parametrize("delay", [None, 0.0, 1.0, 60.0, "untimed"])
@pytest.mark.parametrize("history", ["past", "train"])
def test_histories_by_brute_force(history, delay):
    table = impressions_table()
    if delay == "untimed":
        table, delay = table.drop(columns="timestamp"), None
    dataset = make_impressions(table, ctr_history=history, ctr_delay=delay)
    places = dataset.contexts - 1
    assert sorted(places) == list(range(len(table)))
    assert dataset.labels.tolist() == table["label"][places].tolist()
    assert dataset.splits.tolist() == [SPLITS[name] for name in table["split"][places]]
    assert dataset.items[dataset.item_ids - 1].tolist() == table["item"][places].tolist()
    expected = [*known_before(table, history, 1 if delay is None else delay)]
    for user, (first, last) in enumerate(zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)):
        assert (table["user"][places[first:last]] == dataset.users[user]).all()
        for row in range(first, last):
            seen = places[first : first + dataset.history_lengths[row]]
            assert seen.tolist() == expected[places[row]]


def test_what_is_known_by_default():
    table = impressions_table()
    for split, history in (("time", "past"), ("own", "train"), ("random", "train")):
        seen = [labelled(table, ctr_split=split, **given) for given in ({}, {"ctr_history": history})]
        assert seen[0].equals(seen[1])
        assert seen[0]["in_history"].tolist() == ((seen[0]["split"] == 0) | (history == "past")).tolist()


@pytest.mark.parametrize("split", ["time", "random"])
def test_matching_learns_from_what_trains_of_the_same_split(tmp_path, split):
    rows = [(user, item, rating, 9000 * time) for user, item, rating, time in tiny_rows()]
    rows += [(user, 100 + user, 4, 9_000_000) for user in range(60)]  # once each: at random some never train
    cfg = DataConfig(dataset=str(write_csv(tmp_path / "a.csv", rows)), ctr_split=split)
    whole, part = load_dataset(cfg, "ctr"), load_dataset(cfg)
    assert part.ids == whole.ids and part.num_items == whole.num_items and not len(part.labels)
    trains = whole.splits == SPLITS["train"]
    assert 0 < len(part.item_ids) == trains.sum() < len(trains)
    assert (len(set(part.item_ids)) < part.num_items) == (split == "random")
    for user in range(whole.num_users):
        first, last = whole.offsets[user : user + 2]
        ours = slice(*part.offsets[user : user + 2])
        # `past` or not, a user's training rows lie in order of time.
        assert part.item_ids[ours].tolist() == whole.item_ids[first:last][trains[first:last]].tolist()
        assert part.timestamps[ours].tolist() == whole.timestamps[first:last][trains[first:last]].tolist()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("without", "settings", "words"),
    [
        (["rating", "label"], {}, "--task=ctr needs ratings or a column label"),
        (["rating"], {"drop_rating": 3.0}, "--drop_rating needs ratings"),
        (["timestamp"], {"ctr_split": "time"}, "--ctr_split=time needs timestamps.*--ctr_split=random"),
        (["split"], {"ctr_split": "own"}, "--ctr_split=own needs a column split"),
        (["timestamp"], {"ctr_delay": 60.0}, "--ctr_delay needs timestamps"),
        ([], {"min_positives": 999}, "no interaction is left.*--min_positives"),
    ],
)
def test_refused(without, settings, words):
    with pytest.raises(UserError, match=words):
        labelled(impressions_table().drop(columns=without), **settings)


@pytest.mark.parametrize(
    ("gone", "words"), [("train", "train on"), ("valid", "validate with"), ("test", "test with")]
)
def test_a_split_of_nothing_is_refused(gone, words):
    table = impressions_table()
    with pytest.raises(UserError, match=rf"no impression is left to {words} \(--ctr_split=own\)"):
        labelled(table[table["split"] != gone])


# ---------------------------------------------------------------- real data


def test_real_ml_1m_gives_the_numbers_of_rechorus(real):
    table = read_dataset(find_dataset("ml-1m", real)).interactions
    got = labelled(table, min_positives=5, ctr_split="time", utc_offset=8)
    sizes = got.groupby("split")["label"].agg(["size", "sum"])
    assert sizes["size"].tolist() == [983_836, 5_190, 5_176]
    assert sizes["sum"].tolist() == [568_761, 2_651, 2_874]
