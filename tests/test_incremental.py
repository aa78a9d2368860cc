"""Extending a KV cache action by action equals encoding the whole row, for every kind of row."""

import pytest
import torch

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary
from reclm.nn.context import EMPTY
from reclm.nn.incremental import extend, read

NUM_ITEMS, MAX_LEN, B = 30, 24, 3
SIZES = {"n_layers": 3, "n_heads": 4, "dim": 32, "max_len": MAX_LEN}
ROWS = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "position": {"position_embedding": True},
    "feedback": {"action_embedding": True},
    "profile": {"profile_tokens": True, "window": 6},
    "time embedding": {"time_tokens": "embedding"},
    "request time": {"time_tokens": "embedding", "request_time": True},
    "time tokens": {"time_tokens": "tokens", "profile_tokens": True, "position_embedding": True},
    "time tokens, window": {"time_tokens": "tokens", "window": 5},
    "time tokens, request time": {"time_tokens": "tokens", "request_time": True, "action_embedding": True},
    "user": {"user_embedding": "explicit"},
}
BLOCKS = {
    "llama": {"n_kv_heads": 2, "gated_residuals": True},
    "hstu": {"model_name": "hstu"},
}
EVERY_BLOCK = pytest.mark.parametrize("block", BLOCKS)


def build(**settings):
    """A model whose every weight has an effect."""
    cfg = ModelConfig(**SIZES | settings)
    vocabulary = Vocabulary(
        NUM_ITEMS,
        B,
        (3, 4) if cfg.profile_tokens else (),
        {"actions": 5} if cfg.action_embedding else {},
    )
    torch.manual_seed(0)
    model = SequenceRecommender(cfg, LossConfig(), vocabulary).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def sequences(length, first=0):
    """Whole rows of actions first .. length - 1, sessions between some of them, and what follows the last."""
    rng = torch.Generator().manual_seed(1)
    gaps = torch.randint(0, 4000, (B, 100), generator=rng)
    times = 1e9 + gaps.double().cumsum(1)
    fields = {
        "item_ids": torch.randint(1, NUM_ITEMS + 1, (B, 100), generator=rng),
        "actions": torch.randint(1, 6, (B, 100), generator=rng),
        "timestamps": times,
        "next_timestamps": torch.cat([times[:, 1:], times[:, -1:]], dim=1),
    }
    return {name: value[:, first:length] for name, value in fields.items()} | {
        "lengths": torch.full((B,), length - first),
        "num_before": torch.full((B,), 7 + first),
        "user_ids": torch.arange(B),
        "profiles": torch.randint(0, 3, (B, 2), generator=torch.Generator().manual_seed(2)),
    }


def ragged(batch, lengths):
    """The first `lengths` actions of each row, padded on the right with values that must not matter."""
    width = int(lengths.max())
    shown = {name: x[:, :width].clone() for name, x in batch.items() if x.dim() > 1 and name != "profiles"}
    padding = torch.arange(width) >= lengths[:, None]
    shown["item_ids"][padding] = 0
    return batch | shown | {"lengths": lengths}


def action(batch, places):
    """The action at `places` (B,) of each row."""
    names = ("item_ids", "actions", "timestamps", "next_timestamps")
    return {name: batch[name].gather(1, places[:, None])[:, 0] for name in names}


@EVERY_BLOCK
@pytest.mark.parametrize("row", ROWS)
def test_extending_a_row_gives_its_hidden_states(block, row):
    model = build(**BLOCKS[block] | ROWS[row])
    whole = sequences(MAX_LEN)
    expected = model.encode(whole)  # (B, T, D)
    lengths = torch.tensor([1, 3, 6])  # rows need not be equally long
    history = read(model, ragged(whole, lengths))
    everyone = torch.arange(B)
    torch.testing.assert_close(history.hidden, expected[everyone, lengths - 1], rtol=1e-5, atol=1e-5)
    for _ in range(MAX_LEN - int(lengths.max())):
        hidden = extend(model, history, action(whole, lengths))
        torch.testing.assert_close(hidden, expected[everyone, lengths], rtol=1e-5, atol=1e-5)
        lengths = lengths + 1


@EVERY_BLOCK
def test_the_cache_of_a_window_stays_as_long_as_the_window(block):
    model = build(**BLOCKS[block], window=5)
    history = read(model, sequences(20))
    assert {cache.keys.shape[2] for cache in history.caches} == {5}
    extend(model, history, action(sequences(MAX_LEN), torch.full((B,), 20)))
    assert {cache.values.shape[2] for cache in history.caches} == {5}
    assert history.positions.sort(1).values.tolist() == [[16, 17, 18, 19, 20]] * B


def test_grouped_query_heads_are_not_kept_twice():
    history = read(build(**BLOCKS["llama"]), sequences(4))
    assert history.caches[0].keys.shape == (B, 2, MAX_LEN + 1, 8)
    assert (history.positions == EMPTY).sum(1).tolist() == [MAX_LEN - 3] * B


@EVERY_BLOCK
@pytest.mark.parametrize("row", ["window", "time embedding", "position", "time tokens, window"])
def test_past_max_len_a_window_goes_on_exactly(block, row):
    """Equal to reading the last max_len actions again: no layer sees what was dropped."""
    model = build(**BLOCKS[block] | ROWS[row] | {"window": 5})
    whole = sequences(3 * MAX_LEN)
    history = read(model, sequences(MAX_LEN))
    for place in range(MAX_LEN, 3 * MAX_LEN):
        hidden = extend(model, history, action(whole, torch.full((B,), place)))
    again = model.encode(sequences(3 * MAX_LEN, first=2 * MAX_LEN), last_only=True)[:, 0]
    torch.testing.assert_close(hidden, again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, MAX_LEN // 3])
def test_past_max_len_a_row_that_would_change_is_refused(window):
    model = build(window=window)  # three layers see MAX_LEN actions back: the first of them would be missed
    history = read(model, sequences(MAX_LEN - 1))
    extend(model, history, action(sequences(MAX_LEN), torch.full((B,), MAX_LEN - 1)))
    with pytest.raises(ValueError, match=r"call read\(\) on the last"):
        extend(model, history, action(sequences(MAX_LEN + 1), torch.full((B,), MAX_LEN)))


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="first action"):
        read(build(), ragged(sequences(3), torch.tensor([1, 0, 2])))
