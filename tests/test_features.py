"""Side tables and matrices: codes by hand, content in the item table, files that do not fit."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import impressions_table, make_dataset, make_impressions
from safetensors.numpy import save_file
from test_model import build, random_batch

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig, build_config
from reclm.data.dataset import Vocabulary
from reclm.data.features import (
    choose_inputs,
    item_texts,
    load_features,
    profile_codes,
    rating_levels,
    word_codes,
)
from reclm.errors import UserError
from reclm.nn.inputs import ItemContent

USERS = pd.DataFrame(
    {
        "user": [1, 2, 4, 5],
        "gender": ["M", "F", "M", ""],
        "age": [17, 18, 56, 30],
        "zip": ["48067", "T8H1N", "41000", "9"],
    }
)


def test_profile_codes():
    codes, meanings, texts = profile_codes(USERS, np.array([5, 1, 2, 3, 4]))  # 3 has no row
    gender, age, region = codes.T
    assert gender.tolist() == [0, 2, 1, 0, 2]  # F, M; "" is unknown
    assert age.tolist() == [3, 1, 2, 0, 4]  # bands that occur: below 18, 18 to 24, 25 to 34, from 56 on
    assert region.tolist() == [2, 1, 3, 0, 1]  # 4, 9, T
    assert texts == {"gender": ["F", "M"], "age": ["0", "18", "25", "56"], "zip": ["4", "9", "T"]}
    assert meanings.keys() == {f"column {name} of the user table" for name in texts}
    assert profile_codes(None, np.arange(3))[0].shape == (3, 0)


ITEMS = pd.DataFrame(
    {
        "item": [10, 20, 30],
        "title": ["The Thing (1982)", "The Fly (1986)", "Fly Away"],
        "genres": ["Horror|Sci-Fi", "Horror", ""],
    }
)


def test_word_codes():
    words = word_codes(ITEMS, np.array([30, 10, 20, 40]))
    assert words["genres"].tolist() == [[0, 0], [1, 2], [1, 0], [0, 0]]
    assert words["year"].tolist() == [[0, 0], [2, 1], [3, 1], [0, 0]]  # 1980s, 1982, 1986
    assert words["title"].tolist() == [[1, 0], [2, 0], [1, 2], [0, 0]]  # fly, the: those of two titles


def test_texts_as_they_stand_in_the_item_table():
    texts = item_texts(ITEMS, np.array([30, 10, 40]))  # nothing is known about the last one
    assert texts["titles"].tolist() == ["Fly Away", "The Thing (1982)", ""]
    assert texts["genre_names"].tolist() == ["", "Horror|Sci-Fi", ""]
    assert item_texts(ITEMS.drop(columns="title"), np.array([10])).keys() == {"genre_names"}
    assert item_texts(None, np.array([10])) == {}


def test_rating_levels():
    assert rating_levels(np.array([4.0, 0.5, 5.0, 4.0])).tolist() == [2, 1, 3, 2]
    with pytest.raises(UserError, match="101 different values"):
        rating_levels(np.arange(101.0))


# ---------------------------------------------------------------- files

FOUR = SimpleNamespace(
    name="made", num_items=4, items=np.array([10, 20, 30, 40]),
    words={"genres": np.array([[1], [2], [0], [1]]), "year": np.zeros((4, 0), int)},
)  # fmt: skip


def test_vectors_are_centred_and_of_length_one(tmp_path):
    raw = np.random.default_rng(0).normal(3, 2, (4, 5)).astype(np.float16)
    raw[2] = 0  # an item without features
    np.save(tmp_path / "a.npy", raw)
    rows = load_features(str(tmp_path / "a.npy"), FOUR)["a"]
    assert rows.dtype == np.float32 and not rows[2].any()
    known = raw[[0, 1, 3]].astype(np.float64)
    expected = known - known.mean(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(rows[[0, 1, 3]], expected, rtol=1e-2, atol=1e-3)


def test_several_modalities(tmp_path):
    arrays = {"text": np.eye(4, 6, dtype=np.float32), "image.v1": np.eye(4, 3, dtype=np.float32)}
    save_file(arrays, tmp_path / "b.safetensors")
    found = load_features(f"genres, {tmp_path / 'b.safetensors'}", FOUR)
    assert {name: rows.shape for name, rows in found.items()} == {
        "genres": (4, 1), "text": (4, 6), "image.v1": (4, 3)
    }  # fmt: skip


def saved(array):
    return lambda path: np.save(path, array)


NOT_FINITE = np.ones((4, 2))
NOT_FINITE[1:3, 0] = np.nan
BAD = {
    "rows": (saved(np.ones((3, 2))), ["has 3 rows", "has 4 items", "same --dataset"]),
    "nan": (saved(NOT_FINITE), ["not finite in 2 rows", "row 1 (item 20)", "zeros"]),
    "flat": (saved(np.ones(4)), ["shape (4,)", "one row per item"]),
    "words": (saved(np.array([["a"]] * 4)), ["expected a numeric matrix"]),
    "objects": (saved(np.array([[{}]] * 4, dtype=object)), ["truncated or not a numeric array"]),
    "cut": (lambda path: path.write_bytes(b"\x93NUMPY\x01"), ["truncated or not a numeric array"]),
    "none": (lambda path: None, ["neither one of genres, year, title nor an existing"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_does_not_fit_is_named(tmp_path, bad):
    write, named = BAD[bad]
    path = tmp_path / f"{bad}.npy"
    write(path)
    with pytest.raises(UserError) as caught:
        load_features(str(path), FOUR)
    assert all(part in str(caught.value) for part in [path.name, *named]), caught.value


def test_other_refusals(tmp_path, monkeypatch):
    (tmp_path / "c.safetensors").write_bytes(b"no")
    np.save(tmp_path / "genres.npy", np.ones((4, 2)))
    for spec, named in (
        ("year", "made has no year"),
        (str(tmp_path / "c.safetensors"), "truncated or not a numeric array"),
        ("plot", "'plot', which is neither"),
        (f"genres,{tmp_path / 'genres.npy'}", "has genres twice"),
    ):
        with pytest.raises(UserError, match=named):
            load_features(spec, FOUR)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load_features(str(tmp_path / "c.safetensors"), FOUR)


# ---------------------------------------------------------------- what a run uses of the data


def test_only_what_is_asked_for_is_an_input():
    """Contexts always are an input if the data have them: they are part of an impression."""
    table = impressions_table()
    dataset = replace(make_impressions(table), codes={})
    plain = choose_inputs(dataset, build_config({"task": "ctr", "action_embedding": False}))
    assert plain.codes.keys() == {"contexts"} and plain.fingerprint == dataset.fingerprint
    assert plain.vocabulary.code_sizes == {"contexts": len(table)}
    with_ratings = choose_inputs(dataset, build_config({"task": "ctr"}))
    assert with_ratings.codes.keys() == {"contexts", "actions"}
    assert with_ratings.codes["actions"].tolist() == dataset.ratings.tolist()  # 1 to 5 are the levels
    assert with_ratings.vocabulary.code_sizes == {"contexts": len(table), "actions": 5}
    assert with_ratings.fingerprint.startswith(f"{dataset.fingerprint}-")
    without = choose_inputs(make_impressions(table.drop(columns="rating")), build_config({"task": "ctr"}))
    assert without.codes["actions"].tolist() == (1 + without.labels).tolist()


LACKING = {
    "profile_tokens": (True, "needs a user table"),
    "item_features": ("genres", "has no genres for its items"),
    "action_embedding": (True, "needs ratings"),
    "negative_below": (3.0, "needs ratings"),
    "time_tokens": ("embedding", "needs timestamps"),
    "time_head": (True, "needs timestamps"),
    "request_time": (True, "needs timestamps"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_the_data_lack_is_refused(name):
    dataset = make_dataset([[1, 2, 3], [2, 3, 1]])
    empty = np.zeros(0)
    dataset = replace(dataset, timestamps=empty, ratings=empty, words={"genres": np.zeros((3, 0), int)})
    value, why = LACKING[name]
    more = {"model_name": "hstu"} if name == "request_time" else {}
    with pytest.raises(UserError, match=rf"--{name}.* made {why}|--{name} {why}, but made has none"):
        choose_inputs(dataset, build_config({name: value, **more}))
    chosen = choose_inputs(dataset, build_config({}))
    assert (chosen.profile_sizes, chosen.codes, chosen.features, len(chosen.negative)) == ((), {}, {}, 0)


# ---------------------------------------------------------------- in the item table

FEATURES = {
    "genres": np.array([[1, 2], [2, 0], [0, 0], [3, 1]]),
    "text": np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32),
}


def random_content(**changes):
    torch.manual_seed(0)
    content = ItemContent(ModelConfig(dim=8, n_heads=2, **changes), FEATURES)
    for weight in content.parameters():
        torch.nn.init.normal_(weight)
    return content


def test_the_item_table_by_hand():
    content, ids = random_content(), torch.randn(5, 8)
    table = content(ids)
    words = content.projections[0].weight
    for item in range(1, 5):
        expected = ids[item].double()
        codes = [code for code in FEATURES["genres"][item - 1] if code]
        parts = [
            words[codes].mean(0) if codes else torch.zeros(8),
            content.projections[1].weight @ torch.from_numpy(FEATURES["text"][item - 1]),
        ]
        for gate, part in zip(content.gates, parts, strict=True):
            expected += torch.sigmoid(gate.weight @ ids[item]) * part
        torch.testing.assert_close(table[item], expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table[0], ids[0])  # padding has no content


def test_id_dropout_drops_whole_ids_in_training_only():
    content, ids = random_content(id_dropout=0.5, item_features="genres"), torch.randn(5, 8)
    alone = content(torch.zeros(5, 8))
    content.train()
    torch.manual_seed(0)
    tables = [content(ids) for _ in range(40)]
    content.eval()
    whole = content(ids)
    kinds = [
        (torch.allclose(table[item], alone[item]), torch.allclose(table[item], whole[item]))
        for table in tables for item in range(1, 5)
    ]  # fmt: skip
    assert set(kinds) == {(True, False), (False, True)}
    assert 50 < sum(dropped for dropped, _ in kinds) < 110  # of 160


def test_content_enters_scores_and_inputs_and_begins_without_a_say():
    features = {"text": np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)}
    cfg = ModelConfig(max_len=16, dim=16, n_heads=4, dropout=0.0)
    vocabulary = Vocabulary(40, 9, features=features)
    torch.manual_seed(0)
    model, plain, batch = SequenceRecommender(cfg, LossConfig(), vocabulary).eval(), build(), random_batch()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(batch), plain(batch))
    before = model.encode(batch)
    torch.nn.init.normal_(model.content.projections[0].weight)
    assert not torch.allclose(model.encode(batch), before, atol=1e-3)
    torch.testing.assert_close(model(batch), model.encode(batch, last_only=True)[:, 0] @ model.item_table().T)
    loss = model(batch | {"targets": batch["item_ids"], "negatives": torch.arange(1, 9)})
    loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.content.parameters())
