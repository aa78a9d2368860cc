"""Incremental inference: encode a history once, then add one action at a time for the cost of its tokens.

    history = read(model, batch)                 # any batch of data.py, at least one action per row
    hidden = extend(model, history, action)      # (B, D); the action is now part of the history

Keys and values of a token depend only on the tokens up to it, so they stay in a KV cache: a ring of slots,
slot = position modulo size. With --window=W it holds W tokens, and new ones overwrite the oldest. The results
equal those of encoding the row again while it has at most max_len actions. Beyond, encoding it again would
start at a later action, which changes nothing only if no layer looks back that far: n_layers * window <
max_len. In other cases `extend` raises ValueError, and the caller reads the last actions again.

With --request_time the keys and values of an action depend on the time of the request that follows it: if the
next action came at another time, read the history again.

For inference only: parameters are used outside the model's `forward`, without gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reclm.config import ModelConfig
from reclm.nn.context import EMPTY, Context, KVCache, rotations


@dataclass
class History:
    """The state of B rows after the actions read so far. `extend` changes it in place."""

    caches: list[KVCache]  # per layer, (B, G, R, Dh): R slots
    positions: Tensor  # (B, R) position of the token in each slot; EMPTY if there is none
    times: Tensor | None  # (B, R) timestamps of these tokens in seconds; None without timestamps
    lengths: Tensor  # (B,) tokens read so far
    num_actions: Tensor  # (B,) actions read so far
    last: dict[str, Tensor]  # batch fields (B, 1) of the last action, and those of its user
    hidden: Tensor  # (B, D) after the last action


@torch.inference_mode()
def read(model: nn.Module, batch: dict[str, Tensor]) -> History:
    """Encode a batch of data.py, (B, T) actions. `hidden` of the result equals the last position of
    `model.encode`. Raises ValueError for a row without an action."""
    if not batch["lengths"].all():
        raise ValueError("an empty history cannot be read: start with the first action")
    row, queries = model.inputs.lay_out(batch)
    final = batch["lengths"][:, None] - 1  # (B, 1)
    last = final if queries is None else queries.gather(1, final)  # the last token of each row
    ctx, caches = model.context(row), [KVCache() for _ in model.layers]
    x = model.embed(row, model.item_table())
    hidden = model.add_user(model.through_blocks(x, ctx, caches, last[:, 0]), batch)[:, 0]
    size = model.inputs.max_tokens
    if model.cfg.window:  # all tokens of a new action are written before its first query attends
        size = min(size, model.cfg.window + model.inputs.tokens_per_action - 1)
    slots = torch.arange(size, device=last.device)
    held = last - (last - slots) % size  # (B, R): the latest position that belongs in each slot
    source = held.clamp(min=0)
    for cache in caches:
        index = source[:, None, :, None].expand(-1, cache.keys.shape[1], -1, cache.keys.shape[3])
        cache.keys, cache.values = cache.keys.gather(2, index), cache.values.gather(2, index)
    return History(
        caches,
        held.masked_fill(held < 0, EMPTY),
        None if ctx.times is None else ctx.times.gather(1, source),
        last[:, 0] + 1,
        batch["lengths"].clone(),
        {name: batch[name].gather(1, final) for name in per_action(model, batch)}
        | {"num_before": batch["num_before"] + final[:, 0]}
        | {name: batch[name] for name in ("user_ids", "profiles") if name in batch},
        hidden,
    )


@torch.inference_mode()
def extend(model: nn.Module, history: History, action: dict[str, Tensor]) -> Tensor:
    """Add one action to each row. `action` has the per-action fields of the batch, each (B,): item_ids and,
    where the rows have them, timestamps, next_timestamps (the time of the request to come) and codes. Returns
    hidden (B, D) after the action. Raises ValueError if a row is full."""
    cfg = model.cfg
    if is_full(model, history):
        raise ValueError(
            f"a row has {cfg.max_len} actions, as many as this model sees: call read() on the last ones"
        )
    names = per_action(model, history.last)
    if "timestamps" in names:  # the time of the action after the last one is known only now
        history.last["next_timestamps"] = action["timestamps"][:, None]
    pair = history.last | {
        name: torch.cat([history.last[name], action[name][:, None]], dim=1) for name in names
    }
    pair["lengths"] = torch.full_like(history.lengths, 2)
    row, queries = model.inputs.lay_out(pair, prefix=False)
    if queries is None:
        queries = torch.arange(2, device=history.lengths.device).expand(len(history.lengths), -1)
    first, last = queries[:, :1] + 1, queries[:, 1:]  # (B, 1) range of each row's new tokens, inclusive
    place = torch.arange(int((last - first).max()) + 1, device=first.device)  # (n,)
    index = (first + place).minimum(last)  # (B, n)
    shape = row["token_ids"].shape
    row = {name: x.gather(1, index) for name, x in row.items() if x.shape == shape}
    # A row may get fewer than n tokens. The surplus is overwritten before any query attends to it.
    positions = history.lengths[:, None] + place  # (B, n)
    slots = positions % history.positions.shape[1]
    history.positions.scatter_(1, slots, positions)
    if history.times is not None:
        history.times.scatter_(1, slots, row["timestamps"])
    query_times = row.get("next_timestamps") if cfg.request_time else row.get("timestamps")
    ctx = Context(
        positions,
        history.positions,
        rotations(positions.double(), cfg.head_dim)[:, None],
        cfg.window,
        history.times,
        query_times,
        slots=slots,
    )
    x = model.embed(row, model.item_table())
    hidden = model.add_user(model.through_blocks(x, ctx, history.caches), history.last)  # (B, n, D)
    history.lengths = history.lengths + (last - first)[:, 0] + 1
    history.num_actions = history.num_actions + 1
    history.last |= {name: action[name][:, None] for name in names}
    history.last["num_before"] = history.last["num_before"] + 1
    history.hidden = hidden.gather(1, (last - first)[..., None].expand(-1, -1, cfg.dim))[:, 0]
    return history.hidden


def forgets(cfg: ModelConfig) -> bool:
    """Does no layer look back to the first of max_len actions? Then a row goes on exactly beyond them."""
    return bool(cfg.window) and cfg.n_layers * cfg.window < cfg.max_len


def is_full(model: nn.Module, history: History) -> bool:
    """Would one more action make a row other than that of reading the last max_len again?"""
    return int(history.num_actions.max()) >= model.cfg.max_len and not forgets(model.cfg)


def per_action(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """The batch fields with one value per action that the model reads."""
    names = ["item_ids", "timestamps", "next_timestamps", *model.inputs.code_embeddings]
    return [name for name in names if name in batch]
