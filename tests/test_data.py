"""Leave-one-out, batches, negatives, the cache: by hand, by brute force, over 1 to 3 processes."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import as_process, impressions_table, make_dataset, make_impressions, write_csv
from launch import MAIN
from scipy.stats import chisquare

import main
from data import TrainBatches, eval_batches, impression_batches, load_dataset
from model import SequenceRecommender
from reclm.config import DataConfig, LossConfig, ModelConfig, TrainConfig, build_config
from reclm.data.negatives import NegativeSampler
from reclm.data.prepare import build_sequences, prepare
from reclm.data.sources import find_dataset
from reclm.errors import UserError
from reclm.nn.losses import LOSSES
from reclm.run import dist
from reclm.run.engine import Engine
from reclm.run.layout import Layout

# Users of 1, 2, 3, 5 and 300 items.
FIVE = [[7], [1, 2], [3, 4, 5], [6, 1, 7, 2, 5], [1 + i % 8 for i in range(300)]]


def batches_of(dataset, max_len=20, loss=None, **train):
    train = {"batch_size": 8, "seed": 0} | train
    return TrainBatches(dataset, max_len, loss or LossConfig(num_negatives=5), TrainConfig(**train))


def epoch_of(batches, epoch=0, first_step=0):
    """[(step, micro-batches, number of targets), ...]"""
    return list(batches.epoch(epoch, first_step))


def equal_batches(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def equal_epochs(one, other):
    return len(one) == len(other) and all(
        a[0] == b[0] and a[2] == b[2] and all(map(equal_batches, a[1], b[1])) and len(a[1]) == len(b[1])
        for a, b in zip(one, other, strict=True)
    )


def rows_by_user(epoch):
    """{user: (inputs, targets)} without padding, over all batches."""
    rows = {}
    for _, micro, _ in epoch:
        for batch in micro:
            for row, (user, length) in enumerate(zip(batch["user_ids"], batch["lengths"], strict=True)):
                assert user.item() not in rows, "a user twice"
                cut = [batch[name][row].tolist() for name in ("item_ids", "targets")]
                assert not any(any(ids[length:]) for ids in cut)  # only padding after it
                rows[user.item()] = tuple(ids[:length] for ids in cut)
    return rows


# ---------------------------------------------------------------- split


def test_leave_one_out_by_hand():
    dataset = make_dataset(FIVE)
    assert dataset.num_users == 5 and dataset.num_items == 8
    assert dataset.lengths.tolist() == [1, 2, 3, 5, 300]
    assert dataset.ranked_users.tolist() == [2, 3, 4]
    assert dataset.train_lengths.tolist() == [1, 2, 1, 3, 298]
    # Users 0 and 2 have one training item: no next item to learn.
    rows = rows_by_user(epoch_of(batches_of(dataset, max_len=4)))
    long = FIVE[4][:298]
    assert rows == {1: ([1], [2]), 3: ([6, 1], [1, 7]), 4: (long[-5:-1], long[-4:])}


def test_whose_each_row_is_and_whether_it_trains():
    dataset = make_dataset(FIVE)
    rows = [(user, place) for user, items in enumerate(FIVE) for place in range(len(items))]
    assert list(zip(dataset.owner.tolist(), dataset.place.tolist(), strict=True)) == rows
    held_out = {(user, len(FIVE[user]) - back) for user in (2, 3, 4) for back in (1, 2)}
    assert dataset.in_training.tolist() == [row not in held_out for row in rows]


@pytest.mark.parametrize(("split", "held_out"), [("valid", 2), ("test", 1)])
def test_evaluation_by_hand(split, held_out):
    dataset = make_dataset(FIVE)
    found = {}
    for batch in eval_batches(dataset, split, max_len=4, batch_size=2):
        for row, user in enumerate(batch["user_ids"].tolist()):
            length = batch["lengths"][row]
            seen = [item for item in batch["seen_items"][row].tolist() if item]
            assert not batch["item_ids"][row, length:].any()
            found[user] = (batch["item_ids"][row, :length].tolist(), batch["target_ids"][row].item(), seen)
    expected = {}
    for user in (2, 3, 4):
        history = FIVE[user][:-held_out]
        expected[user] = (history[-4:], FIVE[user][-held_out], history)  # seen: ALL of the history
    assert found == expected


def test_no_held_out_item_is_trained_on():
    """Items 100 + user (valid) and 200 + user (test) occur nowhere else."""
    histories = [[1, 2, 3 + user % 3, 100 + user, 200 + user] for user in range(10)]
    dataset = make_dataset(histories)
    rows = rows_by_user(epoch_of(batches_of(dataset, max_len=50)))
    trained = {item for pair in rows.values() for ids in pair for item in ids}
    assert {int(dataset.items[item - 1]) for item in trained} == {1, 2, 3, 4, 5}


def test_targets_are_inputs_shifted(tiny_dataset):
    rows = rows_by_user(epoch_of(batches_of(tiny_dataset, max_len=6)))
    for user, (inputs, targets) in rows.items():
        first, last = tiny_dataset.offsets[user], tiny_dataset.offsets[user + 1]
        train = tiny_dataset.item_ids[first : last - 2].tolist()  # all users have 3 or more
        whole = train[-7:]
        assert (inputs, targets) == (whole[:-1], whole[1:])
        assert all(target == item % 30 + 1 for item, target in zip(inputs, targets, strict=True))


def test_sort_is_by_time_and_ties_keep_file_order():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"user": rng.integers(0, 7, 500), "item": np.arange(500)})
    table["timestamp"] = rng.integers(0, 4, 500) * 1.5
    table["rating"] = np.arange(500) % 5
    _, arrays = build_sequences(table)
    expected = []
    for user in range(7):
        rows = [tuple(row) for row in table[table.user == user].itertuples()]
        expected += sorted(rows, key=lambda row: row[3])  # Python's sort is stable
    assert arrays["item_ids"].tolist() == [row[2] + 1 for row in expected]
    assert arrays["timestamps"].tolist() == [row[3] for row in expected]
    assert arrays["ratings"].tolist() == [row[4] for row in expected]
    assert arrays["offsets"].tolist() == [0, *np.cumsum([sum(table.user == u) for u in range(7)])]


def test_shuffled_ties_stay_between_their_neighbours_in_time():
    items, times = list("abcdefghij"), [5, 1, 3, 3, 3, 3, 3, 3, 9, 9]
    table = pd.DataFrame({"user": 1, "item": items, "timestamp": times, "rating": range(10)})
    found = set()
    for seed in range(1, 9):
        meta, arrays = build_sequences(table, DataConfig(shuffle_ties=seed))
        order = [arrays["items"][i - 1] for i in arrays["item_ids"]]
        assert (order[0], order[7], sorted(order[1:7]), sorted(order[8:])) == (
            "b",
            "a",
            list("cdefgh"),
            list("ij"),
        )
        assert [items[int(rating)] for rating in arrays["ratings"]] == order  # rows stay complete
        assert arrays["timestamps"].tolist() == sorted(times)
        assert any(f"--shuffle_ties={seed}" in note for note in meta["notes"])
        found.add("".join(order))
    assert len(found) > 4
    cfg = DataConfig(shuffle_ties=3)
    again = build_sequences(table, cfg)[1]["item_ids"]
    assert (again == build_sequences(table, cfg)[1]["item_ids"]).all()
    with pytest.raises(UserError, match="--shuffle_ties needs timestamps.*have none"):
        build_sequences(table.drop(columns="timestamp"), cfg)


def test_without_timestamps_file_order_is_time_order():
    table = pd.DataFrame({"user": [2, 1, 2, 1, 2, 1], "item": [5, 9, 4, 8, 6, 7]})
    _, arrays = build_sequences(table)
    assert arrays["items"][arrays["item_ids"] - 1].tolist() == [9, 8, 7, 5, 4, 6]
    assert len(arrays["timestamps"]) == len(arrays["ratings"]) == 0


def test_string_ids_come_back(tmp_path):
    rows = [(f"u{u}", f"00{i}", 1, u + i) for u in range(3) for i in range(4)]
    dataset = load_dataset(DataConfig(dataset=str(write_csv(tmp_path / "s.csv", rows))))
    assert dataset.users.tolist() == ["u0", "u1", "u2"]
    assert dataset.items.tolist() == ["000", "001", "002", "003"]
    assert dataset.items[dataset.item_ids[:4] - 1].tolist() == ["000", "001", "002", "003"]


def test_min_item_count():
    histories = [[1, 2, 3, 4], [1, 9, 2, 3, 4], [1, 2, 8, 3]]  # 4 twice, 8 and 9 once
    dataset = make_dataset(histories, min_item_count=3)
    assert dataset.items.tolist() == [1, 2, 3] and dataset.lengths.tolist() == [3, 3, 3]
    assert any("3 items with fewer than 3" in note for note in dataset.notes)
    assert make_dataset([[1, 2, 3, 4], [4, 3, 2, 1]]).notes == []
    with pytest.raises(UserError, match="min_item_count"):
        make_dataset(histories, min_item_count=4)


def test_short_users_are_counted_in_the_notes():
    assert any(note.startswith("2 users with fewer than 3") for note in make_dataset(FIVE).notes)
    with pytest.raises(UserError, match="no user has 3"):
        make_dataset([[1, 2], [3]])


def test_fingerprint_is_of_ids_and_sequences():
    same = make_dataset([[1, 2, 3], [4, 5, 1]])
    assert same.fingerprint == make_dataset([[1, 2, 3], [4, 5, 1]]).fingerprint
    assert same.fingerprint != make_dataset([[1, 2, 3], [5, 4, 1]]).fingerprint
    assert same.fingerprint != make_dataset([[1, 2, 3], [6, 4, 1]]).fingerprint
    assert same.fingerprint != make_dataset([[1, 2, 3], [5, 4, 1], [1, 2, 3]]).fingerprint


# ---------------------------------------------------------------- epochs


@pytest.mark.parametrize("batch_size", [1, 7, 8, 59, 60, 64])
def test_every_training_user_once_an_epoch(tiny_dataset, batch_size):
    batches = batches_of(tiny_dataset, batch_size=batch_size)
    epoch = epoch_of(batches)
    users = set(np.flatnonzero(tiny_dataset.train_lengths >= 2).tolist())
    assert rows_by_user(epoch).keys() == users
    assert len(epoch) == len(batches) == -(-len(users) // batch_size)
    assert [step for step, _, _ in epoch] == list(range(len(batches)))
    sizes = [sum(len(part["lengths"]) for part in micro) for _, micro, _ in epoch]
    assert max(sizes) <= batch_size
    for _, micro, num_targets in epoch:
        assert num_targets == sum((part["targets"] != 0).sum() for part in micro)
    assert sum(num for _, _, num in epoch) == batches.num_targets


def test_more_than_a_pool_of_batches(tiny_dataset):
    """A pool is 16 batches: 60 users, 2 per batch, need two pools."""
    epoch = epoch_of(batches_of(tiny_dataset, batch_size=2))
    users = set(np.flatnonzero(tiny_dataset.train_lengths >= 2).tolist())
    assert rows_by_user(epoch).keys() == users


@pytest.mark.parametrize(
    "loss", [{}, {"share_negatives": False}, {"exclude_history": False}, {"loss": "softmax"}]
)
def test_an_epoch_is_a_function_of_seed_and_number(tiny_dataset, loss):
    loss = LossConfig(**{"num_negatives": 3} | loss)
    first = epoch_of(batches_of(tiny_dataset, loss=loss), 4)
    assert equal_epochs(first, epoch_of(batches_of(tiny_dataset, loss=loss), 4))
    assert not equal_epochs(first, epoch_of(batches_of(tiny_dataset, loss=loss), 5))
    assert not equal_epochs(first, epoch_of(batches_of(tiny_dataset, loss=loss, seed=1), 4))
    for skipped in (1, 3, len(first)):
        rest = epoch_of(batches_of(tiny_dataset, loss=loss), 4, first_step=skipped)
        assert equal_epochs(first[skipped:], rest)


def test_negatives_are_fresh_in_every_step_and_epoch(tiny_dataset):
    loss = LossConfig(num_negatives=6)
    drawn = []
    for seed in range(2):
        for epoch in range(2):
            for _, micro, _ in epoch_of(batches_of(tiny_dataset, loss=loss, seed=seed), epoch):
                drawn.append(tuple(micro[0]["negatives"].tolist()))
    assert len(set(drawn)) == len(drawn) > 20


def test_batches_differ_in_order_and_composition(tiny_dataset):
    batches = batches_of(tiny_dataset)
    composed = [batches.compose(np.random.default_rng((0, epoch))) for epoch in range(2)]
    as_sets = [{frozenset(rows.tolist()) for rows in part} for part in composed]
    assert as_sets[0] != as_sets[1]


def test_similar_lengths_lie_together():
    rng = np.random.default_rng(0)
    histories = [[1 + i % 9 for i in range(n)] for n in rng.integers(5, 100, 400)]
    batches = batches_of(make_dataset(histories), max_len=100, batch_size=10)
    epoch = epoch_of(batches)
    cells = sum(part["item_ids"].numel() for _, micro, _ in epoch for part in micro)
    assert batches.num_targets / cells > 0.9  # about 0.55 in random order


# ---------------------------------------------------------------- padding and parts never change a loss


def model_for(dataset, loss, max_len=20):
    torch.manual_seed(0)
    cfg = ModelConfig(dim=16, max_len=max_len, n_layers=1, dropout=0.0)
    return SequenceRecommender(cfg, loss, dataset.vocabulary)


NEGATIVES = [{}, {"exclude_history": False}, {"share_negatives": False}]


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in LOSSES for how in NEGATIVES])
def test_padding_never_enters_the_loss(tiny_dataset, name, how):
    loss = LossConfig(loss=name, num_negatives=6, **how)
    model = model_for(tiny_dataset, loss)
    narrow, wide = batches_of(tiny_dataset, loss=loss), batches_of(tiny_dataset, loss=loss)
    wide.sequences.build = partial(wide.sequences.build, width=20)
    epochs = [epoch_of(narrow), epoch_of(wide)]
    widths = [{micro[0]["item_ids"].shape[1] for _, micro, _ in epoch} for epoch in epochs]
    assert min(widths[0]) < 20 and widths[1] == {20}
    for (_, short, num), (_, long, same) in zip(*epochs, strict=True):
        assert num == same
        means = [sum(model(part).item() for part in micro) / num for micro in (short, long)]
        assert means[0] == pytest.approx(means[1], rel=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_gradient_accumulation_changes_nothing(tiny_dataset, loss, share):
    loss = LossConfig(loss=loss, num_negatives=6, share_negatives=share)
    model = model_for(tiny_dataset, loss)
    engine = Engine(model, model, cfg := build_config({}), Layout(cfg))
    run = SimpleNamespace(model=model, engine=engine, optimizer=engine.optimizer, device="cpu")
    results = []
    for parts in (1, 3):
        step, micro, num = epoch_of(batches_of(tiny_dataset, loss=loss, grad_accum_steps=parts))[1]
        assert len(micro) == parts
        total = main.accumulate_gradients(run, micro, num)
        results.append((total, [weight.grad.clone() for weight in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_more_parts_than_rows_leaves_no_empty_part(tiny_dataset):
    for _, micro, _ in epoch_of(batches_of(tiny_dataset, batch_size=2, grad_accum_steps=5)):
        assert 1 <= len(micro) <= 2 and all(len(part["lengths"]) for part in micro)


# ---------------------------------------------------------------- negatives


def draw_many(dataset, loss, users, targets, times=2000):
    sampler, rng = NegativeSampler(dataset, loss), np.random.default_rng(0)
    return np.stack([sampler.draw(rng, users, targets) for _ in range(times)])


def test_own_negatives_are_uniform_over_all_items_but_the_target():
    dataset = make_dataset([[1, 2, 3, 4, 5, 6]])
    targets = np.array([[1, 4, 6]])
    loss = LossConfig(num_negatives=4, share_negatives=False, exclude_history=False)
    draws = draw_many(dataset, loss, np.array([0]), targets)  # (2000, 1, 3, 4)
    for column, target in enumerate((1, 4, 6)):
        counts = np.bincount(draws[:, 0, column].ravel(), minlength=7)
        assert len(counts) == 7 and counts[0] == 0 and counts[target] == 0
        others = counts[[item for item in range(1, 7) if item != target]]
        assert chisquare(others).pvalue > 0.001


def test_own_negatives_outside_the_history_are_uniform():
    histories = [[2, 5, 2, 9, 1, 3], [1, 2, 3, 4, 5, 6, 7, 8, 10, 9], [7, 7], [4]]
    dataset = make_dataset(histories, num_items=10)
    loss = LossConfig(num_negatives=5, share_negatives=False, exclude_history=True)
    users = np.arange(4)
    targets = np.array([[5, 9], [3, 0], [7, 0], [4, 4]])
    draws = draw_many(dataset, loss, users, targets)
    assert not draws[:, targets == 0].any()  # nothing is drawn where there is no target
    trained = [{2, 5, 9}, set(range(1, 9)), {7}, {4}]  # without the last two items, if 3 or more
    for user, history in enumerate(trained):
        counts = np.bincount(draws[:, user, targets[user] > 0].ravel(), minlength=11)
        free = [item for item in range(1, 11) if item not in history]
        assert len(counts) == 11 and counts.sum() == counts[free].sum()
        assert chisquare(counts[free]).pvalue > 0.001, user


def test_outside_the_history_by_brute_force(tiny_dataset):
    loss = LossConfig(num_negatives=40, share_negatives=False, exclude_history=True)
    for _, micro, _ in epoch_of(batches_of(tiny_dataset, loss=loss)):
        for user, drawn in zip(micro[0]["user_ids"].tolist(), micro[0]["negatives"], strict=True):
            first, last = tiny_dataset.offsets[user], tiny_dataset.offsets[user + 1]
            history = set(tiny_dataset.item_ids[first : last - 2].tolist())
            drawn = set(drawn.ravel().tolist()) - {0}  # padding
            assert drawn and drawn <= set(range(1, 31)) - history


def test_shared_negatives_are_distinct_and_uniform():
    dataset = make_dataset([[1, 2, 3, 4, 5, 6, 7, 8]])
    draws = draw_many(dataset, LossConfig(num_negatives=3), np.array([0]), np.array([[1]]))
    assert draws.shape == (2000, 3)
    assert all(len(set(row)) == 3 for row in draws.tolist())
    counts = np.bincount(draws.ravel(), minlength=9)
    assert len(counts) == 9 and counts[0] == 0 and chisquare(counts[1:]).pvalue > 0.001


def test_shared_negatives_are_at_most_all_items(tiny_dataset):
    draws = draw_many(tiny_dataset, LossConfig(num_negatives=512), np.array([0]), np.array([[1]]), 2)
    assert [sorted(row) for row in draws.tolist()] == [list(range(1, 31))] * 2


@pytest.mark.parametrize("name", ["bce", "softmax"])
def test_seen_items_by_brute_force(tiny_dataset, name):
    loss = LossConfig(loss=name, exclude_history=True)
    hits = 0
    for _, micro, _ in epoch_of(batches_of(tiny_dataset, loss=loss)):
        batch = micro[0]
        for row, user in enumerate(batch["user_ids"].tolist()):
            first, last = tiny_dataset.offsets[user], tiny_dataset.offsets[user + 1]
            history = set(tiny_dataset.item_ids[first : last - 2].tolist())
            assert set(batch["seen_items"][row].tolist()) - {0} == history
            hits += len(history)
    assert hits > 100


@pytest.mark.parametrize("exclude_history", [True, False])
def test_seen_negatives_meet_the_right_positions(tiny_dataset, exclude_history):
    """`seen_items` has one row per sequence, the loss one per target: model.negatives joins them."""
    loss = LossConfig(num_negatives=12, exclude_history=exclude_history)
    model = model_for(tiny_dataset, loss)
    _, micro, _ = epoch_of(batches_of(tiny_dataset, loss=loss))[0]
    batch = micro[0]
    valid = batch["targets"] != 0
    _, excluded = model.negatives(batch, valid, batch["targets"][valid])
    expected = []
    for row in range(len(batch["lengths"])):
        for target in batch["targets"][row][: batch["lengths"][row]].tolist():
            left_out = {target} | set(batch["seen_items"][row].tolist() if exclude_history else [])
            expected.append([item in left_out for item in batch["negatives"].tolist()])
    assert excluded.tolist() == expected and excluded.any() and not excluded.all()


@pytest.mark.parametrize("exclude_history", [True, False])
def test_softmax_counts_what_the_user_has_not_seen(tiny_dataset, exclude_history):
    """The loss of a whole batch against a loop over positions and candidates."""
    loss = LossConfig(loss="softmax", exclude_history=exclude_history)
    model = model_for(tiny_dataset, loss).eval()
    _, micro, _ = epoch_of(batches_of(tiny_dataset, loss=loss))[0]
    batch, expected = micro[0], 0.0
    assert "negatives" not in batch and ("seen_items" in batch) == exclude_history
    scores = model.encode(batch) @ model.item_table().T  # (B, T, V)
    for row, user in enumerate(batch["user_ids"].tolist()):
        first, last = tiny_dataset.offsets[user], tiny_dataset.offsets[user + 1]
        history = set(tiny_dataset.item_ids[first : last - 2].tolist()) if exclude_history else set()
        for column in range(batch["lengths"][row]):
            target = batch["targets"][row, column].item()
            counted = [item for item in range(1, 31) if item == target or item not in history]
            expected += scores[row, column, counted].logsumexp(0) - scores[row, column, target]
    assert model(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_item_is_refused():
    with pytest.raises(UserError, match="only 1 item"):
        batches_of(make_dataset([[1, 1, 1, 1], [1, 1, 1]]))


def test_a_history_of_all_items_is_refused():
    dataset = make_dataset([[1, 2, 3, 1, 2], [1, 2, 1, 3, 3]])  # user 0 trains on 1, 2, 3
    loss = {"num_negatives": 2, "share_negatives": False, "exclude_history": True}
    with pytest.raises(UserError, match="user 0 has every item"):
        batches_of(dataset, loss=LossConfig(**loss))
    for useful in ("share_negatives", "exclude_history"):  # then none is drawn, or all may be
        batches_of(dataset, loss=LossConfig(**loss | {useful: not loss[useful]}))


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("loss", [{}, {"share_negatives": False}, {"loss": "softmax"}])
def test_processes_share_out_each_batch(tiny_dataset, monkeypatch, count, loss):
    loss = LossConfig(num_negatives=4, **loss)
    whole = epoch_of(batches_of(tiny_dataset, loss=loss, batch_size=7))
    parts = []
    for process in range(count):
        as_process(monkeypatch, process, count)
        parts.append(epoch_of(batches_of(tiny_dataset, loss=loss, batch_size=7)))
        assert [(step, num) for step, _, num in parts[-1]] == [(step, num) for step, _, num in whole]
    for step, (_, [batch], _) in enumerate(whole):
        pieces = [part[step][1][0] for part in parts]
        for process, piece in enumerate(pieces):
            for name, tensor in batch.items():
                shared = name == "negatives" and loss.share_negatives
                if len(batch["lengths"]) > process:
                    assert torch.equal(piece[name], tensor if shared else tensor[process::count]), name
                else:
                    assert not piece["targets"].any()
        counted = sum((piece["targets"] != 0).sum() for piece in pieces)
        assert counted == (batch["targets"] != 0).sum()


def test_a_batch_smaller_than_the_world(tiny_dataset, monkeypatch):
    as_process(monkeypatch, 2, 3)
    loss = LossConfig(num_negatives=4)
    model = model_for(tiny_dataset, loss)
    for _, [batch], num_targets in epoch_of(batches_of(tiny_dataset, loss=loss, batch_size=1)):
        assert len(batch["lengths"]) == 1 and not batch["targets"].any() and num_targets > 0
    loss_sum = model(batch)
    loss_sum.backward()  # the process still takes part in the gradient: all zeros, none missing
    assert loss_sum.item() == 0.0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


def test_fewer_users_than_processes_are_refused(monkeypatch):
    dataset = make_dataset([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 4]])  # two to train on
    as_process(monkeypatch, 0, 2)
    batches_of(dataset)
    as_process(monkeypatch, 0, 3)
    with pytest.raises(UserError, match="3 processes, but only 2 sequences"):
        batches_of(dataset)


@pytest.mark.parametrize("batch_size", [1, 7, 60, 100])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_evaluate_each_user_once_in_the_same_batches(tiny_dataset, monkeypatch, count, batch_size):
    whole = list(eval_batches(tiny_dataset, "test", 20, batch_size))
    parts = []
    for process in range(count):
        as_process(monkeypatch, process, count)
        parts.append(list(eval_batches(tiny_dataset, "test", 20, batch_size)))
    users = sorted(user for part in parts for batch in part for user in batch["user_ids"].tolist())
    assert users == tiny_dataset.ranked_users.tolist()
    for i, batch in enumerate(whole):
        assert equal_batches(batch, parts[i % count][i // count])


@pytest.mark.parametrize("what", ["training", "evaluation", "impressions"])
def test_the_share_of_the_data_is_not_the_number_of_the_process(tiny_dataset, monkeypatch, what):
    """Processes that share the tensors of one model read the same batches: here two of six
    have each of three shares."""

    def share():
        if what == "training":
            batches = epoch_of(batches_of(tiny_dataset, loss=LossConfig(num_negatives=4), batch_size=7))
            return [batch for _, micro, _ in batches for batch in micro]
        if what == "evaluation":
            return list(eval_batches(tiny_dataset, "test", 20, 7))
        return list(impression_batches(make_impressions(impressions_table()), "test", 5, 2))

    shares = []
    for process in range(3):
        as_process(monkeypatch, process, 3)
        shares.append(share())
    monkeypatch.setattr(dist, "num_processes", lambda: 6)
    for process in range(6):
        monkeypatch.setattr(dist, "rank", lambda process=process: process)
        monkeypatch.setattr(dist, "data_rank", lambda process=process: process // 2)
        ours = share()
        for number, other in enumerate(shares):
            same = len(ours) == len(other) and all(map(equal_batches, ours, other))
            assert same == (number == process // 2), (process, number)


# ---------------------------------------------------------------- preparing, and the cache


def test_preparing_needs_no_torch():
    """Any program with numpy and pandas can build and read the prepared data."""
    names = [f"reclm.data.{path.stem}" for path in (MAIN.parent / "reclm" / "data").glob("[a-z]*.py")]
    assert len(names) > 5
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=MAIN.parent, capture_output=True, text=True)
    assert shown.stdout == "False\n", shown.stderr


def test_texts_of_items_are_prepared(tmp_path):
    file = write_csv(tmp_path / "a.csv", [(u, i, 1, i) for u in range(3) for i in range(4)])
    assert len(load_dataset(DataConfig(dataset=str(file))).titles) == 0
    (tmp_path / "a.items.csv").write_text("item,title,genres\n2,Two (1990),War|Drama\n0,None,\n")
    dataset = load_dataset(DataConfig(dataset=str(file)))
    assert dataset.titles.tolist() == ["None", "", "Two (1990)", ""]
    assert dataset.genre_names.tolist() == ["", "", "War|Drama", ""]


def test_prepared_once(tiny_csv, tiny_dataset, monkeypatch):
    cfg = DataConfig(dataset=str(tiny_csv))
    first = load_dataset(cfg)
    assert (first.name, first.num_users) == ("tiny", 60)
    # Ids of a csv are text, so rows are sorted as text: "0", "1", "10", ...
    user = first.users.tolist().index("7")
    ours, theirs = (slice(*d.offsets[u : u + 2]) for d, u in ((first, user), (tiny_dataset, 7)))
    assert first.items[first.item_ids[ours] - 1].tolist() == [
        str(item) for item in tiny_dataset.items[tiny_dataset.item_ids[theirs] - 1]
    ]
    assert first.timestamps[ours].tolist() == tiny_dataset.timestamps[theirs].tolist()

    def fail(source, wishes):
        raise AssertionError("read again")

    monkeypatch.setattr("reclm.data.prepare.read_dataset", fail)
    again = load_dataset(cfg)
    assert again.item_ids.tolist() == first.item_ids.tolist() and again.fingerprint == first.fingerprint
    assert again.notes == first.notes and again.protocol == first.protocol
    with pytest.raises(AssertionError, match="read again"):
        load_dataset(DataConfig(dataset=str(tiny_csv), min_item_count=2))


def test_changed_file_is_read_again(tmp_path):
    rows = [(u, i, 1, i) for u in range(3) for i in range(4)]
    file = write_csv(tmp_path / "a.csv", rows)
    source = find_dataset(str(file), tmp_path)
    cfg = DataConfig()
    first, _ = prepare(source, cfg)
    assert prepare(source, cfg)[0] == first != prepare(source, DataConfig(min_item_count=2))[0]
    write_csv(file, [*rows, (0, 9, 1, 9)])
    second, _ = prepare(source, cfg)
    assert second != first and first.exists()
    assert len(np.load(second / "item_ids.npy")) == len(rows) + 1


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_a_failing_prepare_leaves_nothing(tmp_path, monkeypatch, when):
    cache = tmp_path / "cache"
    monkeypatch.setenv("RECLM_CACHE", str(cache))
    file = write_csv(tmp_path / "a.csv", [(u, i, 1, i) for u in range(3) for i in range(4)])
    source = find_dataset(str(file), tmp_path)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if when == "reading":
            patch.setattr("reclm.data.prepare.read_dataset", fail)
        else:
            patch.setattr("reclm.data.cache.json.dumps", fail)  # after the arrays
        with pytest.raises((OSError, UserError), match="disk full"):
            prepare(source, DataConfig())
    assert not cache.exists() or list(cache.iterdir()) == []
    assert prepare(source, DataConfig())[0].exists()
    assert len(list(cache.iterdir())) == 1


def test_arrays_without_timestamps_load(tmp_path):
    file = tmp_path / "plain.csv"
    file.write_text("user,item\n" + "".join(f"{u},{i}\n" for u in range(3) for i in range(4)))
    dataset = load_dataset(DataConfig(dataset=str(file)))
    assert len(dataset.timestamps) == len(dataset.ratings) == 0 and len(dataset.item_ids) == 12
    assert any("no column timestamp" in note for note in dataset.notes)


def test_prepared_arrays_cannot_be_changed(tiny_csv):
    dataset = load_dataset(DataConfig(dataset=str(tiny_csv)))
    with pytest.raises(ValueError, match="read-only"):
        dataset.item_ids[0] = 5
