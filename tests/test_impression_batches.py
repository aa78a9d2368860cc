"""Candidates over windows of a history: each impression once, with its own fields and its own past."""

import numpy as np
import pytest
import torch
from conftest import as_process, impressions_table, known_before, make_impressions
from test_data import batches_of, epoch_of, equal_batches

from data import impression_batches
from reclm.data.impressions import SPLITS
from reclm.errors import UserError


def batches_of_split(dataset, split, max_len, batch_size=5, **train):
    """The batches of a split; for training, those of an epoch with two micro-batches per step."""
    if split != "train":
        return list(impression_batches(dataset, split, max_len, batch_size))
    train = {"batch_size": batch_size, "grad_accum_steps": 2} | train
    return [batch for _, micro, _ in epoch_of(batches_of(dataset, max_len, **train)) for batch in micro]


def shown_in(batches):
    """(batch, sequence, candidate) of all candidates except padding."""
    for batch in batches:
        for row, column in (batch["labels"] >= 0).nonzero().tolist():
            yield batch, row, column


def contexts_of(batches):
    return [batch["candidate_contexts"][row, column].item() for batch, row, column in shown_in(batches)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("max_len", [1, 2, 3, 5, 200])
@pytest.mark.parametrize("history", ["past", "train"])
def test_each_impression_once_behind_what_came_before_it(history, max_len, split):
    table = impressions_table()
    dataset = make_impressions(table, ctr_history=history)
    file = {name: table[name].to_numpy() for name in table}
    before, found = [*known_before(table, history)], []
    for batch, row, column in shown_in(batches_of_split(dataset, split, max_len)):
        place = batch["candidate_contexts"][row, column].item() - 1  # in the file: identifies it
        seen = batch["history_lengths"][row, column].item()
        found.append(place)
        assert dataset.items[batch["candidate_ids"][row, column] - 1] == file["item"][place]
        assert dataset.users[batch["user_ids"][row]] == file["user"][place]
        assert batch["candidate_times"][row, column] == file["timestamp"][place]
        assert batch["labels"][row, column] == file["label"][place]
        assert dataset.contexts[batch["rows"][row, column]] == place + 1
        past = before[place]
        assert min(len(past), -(-max_len // 2)) <= seen <= min(len(past), max_len)
        assert batch["num_before"][row] + seen == len(past)
        assert seen <= batch["lengths"][row] <= max_len
        last = past[len(past) - seen :]
        assert (
            dataset.items[batch["item_ids"][row, :seen].numpy() - 1].tolist() == file["item"][last].tolist()
        )
        assert batch["timestamps"][row, :seen].tolist() == file["timestamp"][last].tolist()
        assert (batch["contexts"][row, :seen] - 1).tolist() == last
    assert sorted(found) == np.flatnonzero(table["split"] == split).tolist()


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_lies_in_the_padding(split):
    dataset = make_impressions(impressions_table())
    for batch in batches_of_split(dataset, split, 5):
        count = (batch["labels"] >= 0).sum(1)
        assert (batch["labels"][torch.arange(batch["labels"].shape[1]) >= count[:, None]] == -1).all()
        for names, lengths in (
            (("item_ids", "timestamps", "contexts"), batch["lengths"]),
            (("candidate_ids", "history_lengths", "candidate_times", "candidate_contexts", "rows"), count),
        ):
            for name in names:
                behind = torch.arange(batch[name].shape[1]) >= lengths[:, None]
                assert not batch[name][behind].any(), name


def test_an_epoch_counts_its_targets(monkeypatch):
    table = impressions_table()
    dataset = make_impressions(table)
    batches = batches_of(dataset, 5, batch_size=7)
    epoch = epoch_of(batches)
    assert len(epoch) == len(batches)
    assert sum(num for _, _, num in epoch) == batches.num_targets == (table["split"] == "train").sum()
    for _, micro, num in epoch:
        assert num == sum((batch["labels"] >= 0).sum() for batch in micro)
    others = epoch_of(batches, 1)
    assert sorted(contexts_of([epoch[0][1][0]])) != sorted(contexts_of([others[0][1][0]]))
    as_process(monkeypatch, 0, 300)
    with pytest.raises(UserError, match=r"300 processes, but only \d+ sequences"):
        batches_of(dataset, 5)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("split", SPLITS)
def test_processes_together_have_what_one_has(monkeypatch, split, count):
    dataset = make_impressions(impressions_table())
    whole, parts = batches_of_split(dataset, split, 5, grad_accum_steps=1), []
    for process in range(count):
        as_process(monkeypatch, process, count)
        parts.append(batches_of_split(dataset, split, 5, grad_accum_steps=1))
    together = [batch for part in parts for batch in part]
    assert sorted(contexts_of(together)) == sorted(contexts_of(whole))
    for number, batch in enumerate(whole):
        if split != "train":  # whole batches are dealt out
            assert equal_batches(batch, parts[number % count][number // count])
            continue
        for process, part in enumerate(parts):  # each has its rows of every batch
            mine = {name: value[process::count] for name, value in batch.items()}
            if len(mine["lengths"]):
                assert equal_batches(mine, part[number])
            else:
                assert (part[number]["labels"] == -1).all()


def test_whose_history_is_empty():
    """A user's first impression has an empty history, but is still in a batch."""
    table = impressions_table(user=np.arange(300) % 100, timestamp=np.arange(300))
    table["split"] = np.repeat(["train", "valid", "test"], 100)
    dataset = make_impressions(table, ctr_history="past")
    for length, split in enumerate(SPLITS):
        for batch in batches_of_split(dataset, split, 5):
            assert batch["lengths"].tolist() == [length] * len(batch["lengths"])
            assert batch["history_lengths"].tolist() == [[length]] * len(batch["lengths"])
            assert batch["item_ids"].shape[1] == max(1, length)
