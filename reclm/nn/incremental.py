"""Read a history once, then add actions one at a time: the hidden state of the whole row for the work of its
new tokens.

    history = read(model, batch)                 # any batch of data.py, at least one action per row
    hidden = extend(model, history, action)      # (B, D), and the action is part of the history

Keys and values of a token depend on the tokens before it alone, so they are kept (KVCache) in a ring of
slots, position modulo its size. With --window=W the ring holds W tokens and goes round. A row of more than
`max_len` actions that is computed again begins with a later action, which changes its result unless no layer
can see that far back: the ring is exact while n_layers * window < max_len. Elsewhere `extend` refuses, and
the caller reads the last actions again.

With --request_time an action is added together with the time of the request that follows, and its keys and
values depend on it: where the next action came at another time, read the history again.

For inference alone: parameters are used outside of the model's `forward`, and there are no gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reclm.nn.context import EMPTY, Context, KVCache, rotations


@dataclass
class History:
    """B rows as far as they have been read. `extend` changes it in place."""

    caches: list[KVCache]  # of each layer, (B, G, R, Dh): R slots
    positions: Tensor  # (B, R) of the token in each slot; EMPTY where there is none
    times: Tensor | None  # (B, R) timestamps of these tokens
    lengths: Tensor  # (B,) tokens read so far
    num_actions: Tensor  # (B,) actions of each row read so far
    last: dict[str, Tensor]  # fields (B, 1) of a batch: the last action
    hidden: Tensor  # (B, D) after it


@torch.inference_mode()
def read(model: nn.Module, batch: dict[str, Tensor]) -> History:
    """`batch` as of data.py, (B, T) actions. `hidden` of the result is that of `model.encode`. Raises
    ValueError for a row without an action."""
    if not batch["lengths"].all():
        raise ValueError("an empty history cannot be read: start with the first action")
    row, queries = model.inputs.lay_out(batch)
    final = batch["lengths"][:, None] - 1  # (B, 1)
    last = final if queries is None else queries.gather(1, final)  # the last token of each row
    ctx, caches = model.context(row), [KVCache() for _ in model.layers]
    x = model.embed(row, model.item_table())
    hidden = model.add_user(model.through_blocks(x, ctx, caches, last[:, 0]), batch)[:, 0]
    size = model.inputs.max_tokens
    if model.cfg.window:  # room for all tokens of an action at once
        size = min(size, model.cfg.window + model.inputs.tokens_per_action - 1)
    slots = torch.arange(size, device=last.device)
    held = last - (last - slots) % size  # (B, R): the last position that belongs into each slot
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
    """Add an action to each row: item_ids (B,) and what else the rows have, timestamps, next_timestamps (when
    what follows is asked for) and codes. Returns hidden (B, D) after it. Raises ValueError where a row is
    full."""
    cfg = model.cfg
    exact = cfg.window and cfg.n_layers * cfg.window < cfg.max_len
    if history.num_actions.max() >= cfg.max_len and not exact:
        raise ValueError(
            f"a row has {cfg.max_len} actions, all that this model sees: read the last ones again"
        )
    names = per_action(model, history.last)
    if "timestamps" in names:  # only now is it known when the last action was followed by another one
        history.last["next_timestamps"] = action["timestamps"][:, None]
    pair = history.last | {
        name: torch.cat([history.last[name], action[name][:, None]], dim=1) for name in names
    }
    pair["lengths"] = torch.full_like(history.lengths, 2)
    row, queries = model.inputs.lay_out(pair, prefix=False)
    if queries is None:
        queries = torch.arange(2, device=history.lengths.device).expand(len(history.lengths), -1)
    first, last = queries[:, :1] + 1, queries[:, 1:]  # of each row's new tokens, the last one inclusive
    place = torch.arange(int((last - first).max()) + 1, device=first.device)  # (n,)
    index = (first + place).minimum(last)  # (B, n)
    shape = row["token_ids"].shape
    row = {name: x.gather(1, index) for name, x in row.items() if x.shape == shape}
    # Rows may get fewer than n tokens: what is written behind them is overwritten before any query sees it.
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


def per_action(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """The fields of a batch that have a value for each action and that the model reads."""
    names = ["item_ids", "timestamps", "next_timestamps", *model.inputs.code_embeddings]
    return [name for name in names if name in batch]
