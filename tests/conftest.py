"""Fixtures: a small world in which the next item is always the current one + 1."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests share the machine

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from reclm.config import DataConfig
from reclm.data.dataset import Dataset
from reclm.data.impressions import label_impressions
from reclm.data.prepare import build_sequences
from reclm.run import dist

torch.set_num_threads(1)

NUM_USERS, NUM_ITEMS = 60, 30


def write_csv(path, rows):
    """Write rows of (user, item, rating, timestamp) as a dataset file."""
    lines = ["user,item,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_rows():
    rng = np.random.default_rng(7)
    rows = []
    for user in range(NUM_USERS):
        start, length = int(rng.integers(NUM_ITEMS)), int(rng.integers(3, 26))
        for i in range(length):
            rows.append((user, (start + i) % NUM_ITEMS, 1 + i % 5, 1000 + 10 * i))
    return rows


def make_dataset(histories, num_items=None, min_item_count=1):
    """A Dataset built from lists of item ids. With `num_items`, an extra user of one item each makes every id
    1 .. num_items appear, so that ids stay as given."""
    rows = [(user, item, t) for user, items in enumerate(histories) for t, item in enumerate(items)]
    if num_items:
        there = {item for items in histories for item in items}
        missing = [item for item in range(1, num_items + 1) if item not in there]
        rows += [(len(histories) + i, item, 0) for i, item in enumerate(missing)]
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    meta, arrays = build_sequences(table, DataConfig(min_item_count=min_item_count))
    return Dataset(name="made", protocol="test", **meta, **arrays)


def impressions_table(seed=0, size=300, **columns):
    """Unordered impressions, many at the same time; `context` is the row number in the file."""
    rng = np.random.default_rng(seed)
    drawn = {
        "user": rng.integers(0, 12, size),
        "item": rng.integers(0, 20, size),
        "rating": rng.integers(1, 6, size),
        "timestamp": 3600 * rng.integers(0, 240, size) * (rng.random(size) < 0.8),
        "label": rng.integers(0, 2, size),
        "split": rng.choice(["train", "valid", "test"], size, p=[0.6, 0.2, 0.2]),
        "context": np.arange(size),
    }
    return pd.DataFrame(drawn | columns)


def make_impressions(table, **settings):
    """A Dataset built from a table of impressions, with contexts as an input."""
    cfg = DataConfig(**settings)
    table, protocol, notes = label_impressions(table, cfg)
    meta, arrays = build_sequences(table, cfg, "ctr")
    codes = {"contexts": arrays["contexts"]} if "contexts" in arrays else {}
    meta |= {"notes": notes + meta["notes"], "task": "ctr", "codes": codes}
    return Dataset(name="made", protocol=protocol, **meta, **arrays)


def known_before(table, history, delay=1):
    """For each row of `impressions_table`, the row numbers of its history, oldest first, by brute force."""
    times = table["timestamp"] if "timestamp" in table else [0] * len(table)
    rows = [*zip(table["user"], times, range(len(table)), table["split"], strict=True)]
    known = [row for row in rows if history == "past" or row[3] == "train"]
    for user, time, place, _ in rows:
        before = [(row[1], row[2]) for row in known if row[0] == user]
        if delay and "timestamp" in table:
            yield [other for when, other in sorted(before) if when <= time - delay]
        else:
            yield [other for when, other in sorted(before) if (when, other) < (time, place)]


def as_process(monkeypatch, index, count):
    """Make the program believe that this process is number `index` of `count`, with its share of the data."""
    for name in ("rank", "data_rank"):
        monkeypatch.setattr(dist, name, lambda: index)
    for name in ("num_processes", "data_world"):
        monkeypatch.setattr(dist, name, lambda: count)


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("tiny") / "tiny.csv", tiny_rows())


@pytest.fixture(scope="session")
def tiny_dataset(tiny_csv):
    meta, arrays = build_sequences(pd.read_csv(tiny_csv))
    return Dataset(name="tiny", protocol="test", **meta, **arrays)


@pytest.fixture
def real():
    """The folder with the real datasets."""
    folder = os.environ.get("RECLM_DATA")
    if not folder:
        pytest.skip("RECLM_DATA does not name the folder with the real data sets")
    return Path(folder)


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RECLM_CACHE", str(tmp_path_factory.mktemp("cache")))
