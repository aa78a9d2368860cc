"""scripts/bench/pq.py: the made-up catalogue has the structure it is said to have, and the script runs."""

import sys

import numpy as np
import pytest
from launch import MAIN, here, read_json

sys.path.insert(0, str(MAIN.parent / "scripts" / "bench"))
import pq


def test_the_catalogue_has_structure():
    dataset = pq.made_up(items=5_000, users=600)
    users = np.split(dataset.item_ids, dataset.offsets[1:-1])
    assert all(len(np.unique(items)) == len(items) for items in users)  # nobody uses an item twice
    groups = (dataset.item_ids - 1) // pq.GROUP
    stays = np.mean([(np.diff((items - 1) // pq.GROUP) == 0).mean() for items in users])
    assert 0.6 < stays < 0.8 and len(np.unique(groups)) > 40
    assert max(len(np.unique((items - 1) // pq.GROUP)) for items in users) <= pq.NEAR
    popularity = np.bincount((dataset.item_ids - 1) % pq.GROUP)
    assert popularity[0] > 2 * popularity[10] > 2 * popularity[60]
    assert np.array_equal(dataset.item_ids, pq.made_up(items=5_000, users=600).item_ids)


def test_the_first_users_are_the_same():
    dataset = pq.made_up(items=2_000, users=30)
    part = pq.first_users(dataset, 10)
    assert part.num_users == 10 and np.array_equal(part.item_ids, dataset.item_ids[: part.offsets[-1]])


def test_the_script_replaces_the_parts_that_it_measures(tmp_path):
    flags = ["--items=3000", "--out=record.json"]
    here("--parts=bytes,ranking", *flags, cwd=tmp_path, program=pq.main).ok()
    record = read_json(tmp_path / "record.json")
    assert len(record["ranking"]["rows"]) == 2 * len(record["bytes"]["rows"]) == 2 * len(pq.SIZES)
    sizes = {(row["D"], row["m"]): float(row["pq, MB"]) for row in record["bytes"]["rows"]}
    assert sizes["64", "8"] - sizes["64", "4"] == pytest.approx(4 * 3001 / 1e6, abs=0.006)
    here("--parts=bytes", *flags, cwd=tmp_path, program=pq.main).ok()
    assert read_json(tmp_path / "record.json")["ranking"] == record["ranking"]
    with pytest.raises(pq.UserError, match="--parts must be of ml-1m, bytes"):
        here("--parts=none", *flags, cwd=tmp_path, program=pq.main)
