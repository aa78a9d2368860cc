"""Rows of tokens against a slow reference implementation, and the actions that are no targets."""

import math
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_rows
from launch import TINY, here, in_small_batches, read_json, read_rows, torchrun, write_csv
from test_main import assert_same_run, stop_after
from test_model import build as build_model
from test_model import random_batch

import evaluate as evaluation
from data import TrainBatches, eval_batches, load_dataset
from evaluate import evaluate, rank_users
from model import SequenceRecommender
from reclm.config import DataConfig, LossConfig, ModelConfig, TrainConfig, build_config
from reclm.data.dataset import Vocabulary
from reclm.data.features import choose_inputs
from reclm.nn.inputs import GAPS, HOURS, Inputs, calendar

ITEMS, FIELDS = 40, (3, 2, 5)
VOCABULARY = Vocabulary(ITEMS, 9, FIELDS, {"actions": 5})
FIRST_TIME = ITEMS + 1 + sum(FIELDS)


def full_batch():
    batch, rng = random_batch(), np.random.default_rng(3)
    shape = batch["item_ids"].shape
    gaps = torch.from_numpy(rng.choice([0, 1, 40, 3599, 3600, 90000], shape)).double()
    times = 1e9 + gaps.cumsum(1)
    after = torch.cat([times[:, 1:], times[:, -1:] + 7200], dim=1)
    real = torch.arange(shape[1]) < batch["lengths"][:, None]
    profiles = torch.stack([torch.from_numpy(rng.integers(0, size, shape[0])) for size in FIELDS], dim=1)
    actions = torch.from_numpy(rng.integers(1, 6, shape)) * real
    return batch | {
        "timestamps": times * real,
        "next_timestamps": after * real,
        "profiles": profiles,
        "actions": actions,
    }


def row_by_hand(batch, b, profile, time, request_time):
    """[(token, time, action, actions before it)] and the position that predicts what follows each action."""
    row, queries, length = [], [], int(batch["lengths"][b])
    times, after = batch["timestamps"][b].tolist(), batch["next_timestamps"][b].tolist()
    before = batch["num_before"][b].item()

    def dates(seconds, j=0):
        weekday = FIRST_TIME + GAPS + HOURS + int(seconds // 86400 + 3) % 7
        hour = FIRST_TIME + GAPS + int(seconds // 3600) % 24
        return [(weekday, seconds, 0, before + j), (hour, seconds, 0, before + j)]

    if profile:
        for field, code in enumerate(batch["profiles"][b].tolist()):
            row.append((ITEMS + 1 + sum(FIELDS[:field]) + code, times[0], 0, before))
    if time:
        row += dates(times[0])
    for j in range(length):
        row.append((batch["item_ids"][b, j].item(), times[j], batch["actions"][b, j].item(), before + j))
        if not request_time:
            queries.append(len(row) - 1)
        if time and (j < length - 1 or request_time):
            gap = after[j] - times[j]
            row += dates(after[j], j + 1) if gap >= 3600 else []
            row.append((FIRST_TIME + min(int(math.log1p(gap) / 0.3), 63), after[j], 0, before + j + 1))
        if request_time:
            queries.append(len(row) - 1)
    return row, queries


@pytest.mark.parametrize("request_time", [False, True])
@pytest.mark.parametrize(("profile", "time"), [(True, False), (False, True), (True, True)])
def test_rows_are_as_described(profile, time, request_time):
    request_time = request_time and time
    batch = full_batch()
    cfg = ModelConfig(
        max_len=16,
        profile_tokens=profile,
        action_embedding=True,
        time_tokens="tokens" if time else "none",
        request_time=request_time,
        position_embedding=True,
    )
    vocabulary = VOCABULARY if profile else Vocabulary(ITEMS + sum(FIELDS), 9, (), {"actions": 5})
    inputs = Inputs(cfg, vocabulary)
    if not profile:
        del batch["profiles"]
    row, positions = inputs.lay_out(batch)
    longest = 0
    for b in range(len(batch["lengths"])):
        expected, queries = row_by_hand(batch, b, profile, time, request_time)
        longest, size = max(longest, len(expected)), len(expected)
        got = [row[name][b, :size].tolist() for name in ("token_ids", "timestamps", "actions", "before")]
        assert list(zip(*got, strict=True)) == expected
        assert not row["token_ids"][b, size:].any()
        assert positions[b, : len(queries)].tolist() == queries
    assert row["token_ids"].shape[1] == longest <= inputs.max_tokens


@pytest.mark.parametrize("time_tokens", ["tokens", "embedding"])
def test_the_vector_of_a_token_is_the_sum_of_all_that_is_known_of_it(time_tokens):
    """One table for items and one for other tokens; the padding row is not trained."""
    model = all_inputs(time_tokens=time_tokens, position_embedding=True)
    inputs, table = model.inputs, torch.randn(ITEMS + 1, 16)
    table[0] = 0.0
    table.requires_grad_()
    row, _ = inputs.lay_out(full_batch())
    vectors = torch.cat([table, inputs.token_embedding.weight])[row["token_ids"]]
    vectors = vectors + inputs.position_embedding(row["before"])
    vectors = vectors + inputs.code_embeddings["actions"].weight[row["actions"]]
    if time_tokens == "embedding":
        vectors = vectors + inputs.time_embedding(row)
    got = inputs(row, table)
    torch.testing.assert_close(got, vectors)
    (gradient,) = torch.autograd.grad(got.square().sum(), table)
    assert not gradient[0].any() and gradient[1:].any()


def test_what_is_off_changes_nothing():
    """Without profile and time tokens a row is the history, and no weights are added."""
    batch, plain = full_batch(), build_model()
    row, queries = plain.inputs.lay_out(batch)
    assert torch.equal(row["token_ids"], batch["item_ids"]) and queries is None
    assert list(plain.inputs.parameters()) == [] and plain.content is None and plain.time_head is None
    without = {k: v for k, v in batch.items() if k not in ("profiles", "actions")}
    assert torch.equal(plain(batch), plain(without))


def test_calendar():
    monday = 4 * 86400 + 13 * 3600 + 59  # 5 January 1970
    assert [part.item() for part in calendar(torch.tensor([monday], dtype=torch.float64))] == [0, 13]


def all_inputs(**changes):
    """A model with all inputs."""
    torch.manual_seed(0)
    small = {"max_len": 16, "dim": 16, "n_heads": 4, "dropout": 0.0, "profile_tokens": True}
    cfg = ModelConfig(**small | {"action_embedding": True, "time_tokens": "tokens"} | changes)
    model = SequenceRecommender(cfg, LossConfig(loss="softmax"), VOCABULARY).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


BLOCKS = pytest.mark.parametrize("name", ["llama", "hstu"])
REQUEST = pytest.mark.parametrize("request_time", [False, True])


@BLOCKS
@REQUEST
def test_the_last_action_alone_gives_the_same_embedding(name, request_time):
    model, batch = all_inputs(model_name=name, request_time=request_time), full_batch()
    rows = torch.arange(len(batch["lengths"]))
    last = model.encode(batch)[rows, batch["lengths"] - 1]
    torch.testing.assert_close(model.encode(batch, last_only=True)[:, 0], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("time_tokens", ["none", "tokens"])
def test_padding_changes_nothing(time_tokens):
    """Even as many padding columns as tokens, as in a process's share of a batch."""
    model, batch = all_inputs(time_tokens=time_tokens), full_batch()
    by_column = [name for name, value in batch.items() if value.shape[1:] == (12,)]
    hidden = model.encode(batch)
    for more in range(1, 30):
        wide = batch | {name: torch.nn.functional.pad(batch[name], (0, more)) for name in by_column}
        torch.testing.assert_close(model.encode(wide)[:, :12], hidden, atol=1e-5, rtol=1e-5)


@BLOCKS
@REQUEST
@pytest.mark.parametrize("name_of_field", ["item_ids", "actions", "timestamps"])
def test_nothing_of_the_future_is_seen(name, request_time, name_of_field):
    model, batch, j = all_inputs(model_name=name, request_time=request_time), full_batch(), 5
    before = model.encode(batch)
    later = {name: value.clone() for name, value in batch.items()}
    if name_of_field == "timestamps":  # action j + 1 comes later; with request_time j may know
        later["timestamps"][:, j + 1 :] += 50000
        later["next_timestamps"][:, j:] += 50000
    else:
        later[name_of_field][:, j + 1 :] = 1 + later[name_of_field][:, j + 1 :] % 5
    after = model.encode(later)
    long = batch["lengths"] > j + 2
    known = j if name_of_field == "timestamps" and request_time else j + 1
    torch.testing.assert_close(after[long, :known], before[long, :known], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[long, j + 1 :], before[long, j + 1 :], atol=1e-3)


@pytest.mark.parametrize("field", ["profiles", "actions", "timestamps"])
def test_every_input_is_used(field):
    model, batch = all_inputs(), full_batch()
    changed = batch | {field: batch[field].clone()}
    if field == "timestamps":
        changed["next_timestamps"] = batch["next_timestamps"] + torch.arange(12) * 9000
        changed["timestamps"] += torch.arange(12) * 9000
    else:
        changed[field] = (changed[field] + 1) % 2
    assert not torch.allclose(model(batch), model(changed), atol=1e-3)


def test_only_items_are_candidates():
    model = all_inputs()
    assert model(full_batch()).shape[1] == ITEMS + 1
    assert model.inputs.token_embedding.weight.shape[0] == sum(FIELDS) + GAPS + HOURS + 7


# ---------------------------------------------------------------- on data


@pytest.fixture
def rated(tmp_path):
    """Ratings 1 to 5, a user and an item table in which one user and one item are missing."""
    write_rows = [f"{user},{item},{rating},{time}" for user, item, rating, time in tiny_rows()]
    (tmp_path / "rated.csv").write_text("\n".join(["user,item,rating,timestamp", *write_rows]))
    users = [f"{user},{'MF'[user % 2]},{10 + user},{user}0000" for user in range(1, 60)]
    (tmp_path / "rated.users.csv").write_text("\n".join(["user,gender,age,zip", *users]))
    genres = ("Drama", "Action|Drama")
    items = [f"{item},Film {item} ({1980 + item}),{genres[item % 2]}" for item in range(29)]
    (tmp_path / "rated.items.csv").write_text("\n".join(["item,title,genres", *items]))
    return str(tmp_path / "rated.csv")


def chosen(path, **message):
    cfg = build_config({"dataset": path, **message})
    return choose_inputs(load_dataset(cfg.data), cfg)


def test_negative_feedback_is_seen_but_never_a_target(rated):
    plain, masked = chosen(rated), chosen(rated, negative_below=3.0)
    made = {}
    for dataset in (plain, masked):
        batches = TrainBatches(dataset, 10, LossConfig(), TrainConfig(batch_size=8))
        steps = list(batches.epoch(0))
        for _, micro, targets in steps:
            assert targets == sum(int((batch["targets"] > 0).sum()) for batch in micro)
        made[dataset is masked] = [batch for _, micro, _ in steps for batch in micro]
    dropped = 0
    for before, after in zip(made[False], made[True], strict=True):
        assert torch.equal(before["item_ids"], after["item_ids"])  # visible as before
        for row, user in enumerate(after["user_ids"].tolist()):
            first = plain.offsets[user] + after["num_before"][row].item() + 1
            for t in range(after["lengths"][row]):
                bad = plain.ratings[first + t] < 3
                dropped += bad
                assert after["targets"][row, t] == (0 if bad else before["targets"][row, t])
    assert (
        dropped and batches.num_targets == sum(int((b["targets"] > 0).sum()) for b in made[False]) - dropped
    )


def test_fields_of_a_batch(rated):
    dataset = chosen(rated, profile_tokens=True, action_embedding=True)
    assert dataset.profile_sizes == (3, 8, 10)  # unknown and: M F; seven bands; regions 1 to 9
    batch = next(eval_batches(dataset, "test", 10, 4))
    for row, user in enumerate(batch["user_ids"].tolist()):
        assert batch["profiles"][row].tolist() == dataset.profiles[user].tolist()
        length = batch["lengths"][row]
        end = dataset.offsets[user + 1] - 1
        assert batch["actions"][row, :length].tolist() == dataset.ratings[end - length : end].tolist()
    assert any("1 of 60 users have no row in the user table" in note for note in dataset.notes)
    plain = next(eval_batches(chosen(rated), "test", 10, 4))
    assert "profiles" not in plain and "actions" not in plain


def test_the_fingerprint_covers_the_inputs_of_the_model(rated):
    same, other = chosen(rated), chosen(rated, negative_below=3.0)
    assert same.fingerprint == other.fingerprint == load_dataset(DataConfig(dataset=rated)).fingerprint
    prints = {chosen(rated, **{name: True}).fingerprint for name in ("profile_tokens", "action_embedding")}
    prints |= {chosen(rated, item_features=names).fingerprint for names in ("genres", "year")}
    assert len(prints | {same.fingerprint}) == 5


def test_metrics_of_those_whose_item_was_liked(rated):
    dataset = chosen(rated, negative_below=3.0)
    cfg = build_config({"dim": 16})
    model = SequenceRecommender(cfg.model, cfg.loss, dataset.vocabulary)
    metrics = evaluate(model, dataset, "test", cfg.eval)
    users, ranks, _ = rank_users(model, dataset, "test", cfg.eval)
    liked = [
        1 / rank
        for user, rank in zip(users.tolist(), ranks.tolist(), strict=True)
        if dataset.ratings[dataset.offsets[user + 1] - 1] >= 3
    ]
    assert metrics["liked/users"] == len(liked) < len(ranks)
    assert metrics["liked/MRR"] == pytest.approx(np.mean(liked))
    assert metrics["MRR"] == pytest.approx((1 / ranks).mean().item())


def test_own_side_tables_may_lack(tmp_path):
    path = write_csv(tmp_path / "bare.csv")
    dataset = load_dataset(DataConfig(dataset=str(path)))
    assert dataset.profiles.shape == (dataset.num_users, 0)
    assert all(codes.shape == (dataset.num_items, 0) for codes in dataset.words.values())


# ---------------------------------------------------------------- in a run

ALL = (
    "--profile_tokens=true --time_tokens=tokens --action_embedding=true --negative_below=3 --time_head=true "
    "--item_features=genres,year,title --id_dropout=.2 --position_embedding=true --dropout=.1"
).split()


@pytest.fixture
def work(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    users = [f"u{user},{'MF'[user % 2]},{10 + user}" for user in range(40)]
    (tmp_path / "tiny.users.csv").write_text("\n".join(["user,gender,age", *users]))
    items = [f"i{item},Film {item} ({1980 + item}),Drama" for item in range(25)]
    (tmp_path / "tiny.items.csv").write_text("\n".join(["item,title,genres", *items]))
    return tmp_path


def test_a_run_with_everything_on_is_the_same_on_any_number_of_processes(work, monkeypatch):
    """And with any number of users ranked at once: all in training, 7 in evaluation."""
    torchrun(2, "--dataset=tiny.csv", *TINY, *ALL, "--num_epochs=3", "--out_dir=a", cwd=work).ok()
    trained = read_json(work / "a" / "result.json")
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", 7)
    for launch in (here, partial(torchrun, 3, program=in_small_batches(work))):
        shown = launch("--eval_only=true", "--out_dir=a", cwd=work).ok()
        evaluated = read_json(work / "a" / "eval-best.json")["test"]
        for name, value in trained["test"].items():  # times: means of float32, in another order
            assert evaluated[name] == pytest.approx(value, abs=1e-5 if "time" in name else 1e-12), name
    for words in ("negative feedback: HR@10", "to the next action: NLL", "are negative feedback: never"):
        assert words in shown.stdout


def test_a_run_with_everything_on_resumes_to_the_same_bits(work, monkeypatch):
    flags = ["--dataset=tiny.csv", *TINY, *ALL, "--num_epochs=2"]
    here(*flags, "--out_dir=whole", cwd=work).ok()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert here(*flags, "--out_dir=run", cwd=work).code == 128 + signal.SIGTERM
    here(*flags, "--out_dir=run", "--resume=auto", cwd=work).ok()
    assert_same_run(work / "run", work / "whole")


def test_the_loss_of_an_epoch_is_a_mean_over_its_targets(work):
    """For any number of steps; negative feedback does not count."""
    flags = [*TINY, "--dataset=tiny.csv", "--negative_below=3", "--num_epochs=1", "--lr=1e-30", "--dropout=0"]
    flags += ["--num_negatives=25", "--share_negatives=true"]  # of 25 items: the same for every step
    for size in (5, 40):
        here(*flags, f"--batch_size={size}", f"--out_dir={size}", cwd=work).ok()
    (few,), (many,) = read_rows(work / "5"), read_rows(work / "40")
    assert few["loss"] == pytest.approx(many["loss"], rel=1e-5)
