"""The HSTU block of "Actions Speak Louder than Words" (arXiv 2402.17152, section 3.2).

    U, V, Q, K = SiLU(f1(norm(X)))                          (eq. 1)
    A V = SiLU(Q K' + rab) V / n                            (eq. 2), n = number of positions attended to
    Y = X + f2(norm(A V) * U)                               (eq. 3)

Weights are not normalised to sum to 1: how often something happened stays visible. `rab` is a learned
number for each distance in positions, and one for each (logarithmic) length of time passed. There is no
feed-forward layer: the gate U takes its place."""

from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reclm.config import ModelConfig
from reclm.nn.context import Context, KVCache, visible
from reclm.nn.layers import NORM_EPS, TIME_BUCKETS, Dropout, ResidualLinear, log_buckets

ROWS = 64  # queries worked on at once: keys behind the last of them are not looked at
SCORES = 2**18  # scores worked on at once, 1 MiB: stays in the cache of a core
KEPT_SCORES = 2**23  # kept for the backward pass of a block, some 50 MiB; where there are more: recomputed
GPU_SCALE = 32  # a GPU wants larger parts, of the three above
# Inputs of HSTUBlock.attend and their axis of queries or keys.
OF_QUERIES = [("q", 2), ("own", 3), ("positions", 1), ("query_times", 1)]
OF_KEYS = [("k", 2), ("v", 2), ("key_positions", 1), ("times", 1)]


def part_scale(tensor: Tensor) -> int:
    return 1 if tensor.device.type == "cpu" else GPU_SCALE


class Lookup(torch.autograd.Function):
    """table[index] for a table of numbers; its gradient in one pass (torch's goes index by index)."""

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(table)
        return table.index_select(0, index.flatten()).view(index.shape)  # on a CPU 3 times as fast as [index]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return torch.bincount(index.flatten(), grad.flatten(), ctx.size).to(grad.dtype), None


class RelativeBias(nn.Module):
    """rab of eq. 2, the same for all heads; 0 at first."""

    def __init__(self, max_len: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(max_len))
        self.time = nn.Parameter(torch.zeros(TIME_BUCKETS[0]))

    def forward(self, age: Tensor, passed: Tensor | None) -> Tensor:
        """age (1 or b, r, t): positions from key to query; passed (b, r, t): seconds, or None where the
        data have no timestamps -> (b, r, t)."""
        bias = Lookup.apply(self.position, age.clamp(0, len(self.position) - 1))
        if passed is None:
            return bias + 0 * self.time[0]  # so that every parameter has a gradient, as DDP wants
        return bias + Lookup.apply(self.time, log_buckets(passed))


class HSTUBlock(nn.Module):
    """Pointwise aggregated attention with relative bias, gated; residual."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.wu, self.wv, self.wq, self.wk = (nn.Linear(cfg.dim, cfg.dim, bias=False) for _ in range(4))
        self.wo = ResidualLinear(cfg.dim, cfg.dim, bias=False)
        self.attention_norm = nn.LayerNorm(cfg.dim, eps=NORM_EPS)
        self.output_norm = nn.LayerNorm(cfg.dim, eps=NORM_EPS)
        self.relative_bias = RelativeBias(cfg.max_len)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor, ctx: Context, cache: KVCache | None = None) -> Tensor:
        """(B, n, D) -> (B, Q, D)"""
        normed = self.attention_norm(x)
        wanted = ctx.queries(normed)
        u = F.silu(self.wu(wanted))  # (B, Q, D)
        q, (k, v) = self.heads(self.wq(wanted)), self.keys_values(normed)
        if ctx.candidates:
            out = self.attend_in_parts(q, cache.keys, cache.values, ctx, own=torch.stack([k, v], dim=1))
        else:
            k, v = (k, v) if cache is None else cache.add(k, v, ctx.slots)
            out = self.attend_in_parts(q, k, v, ctx)  # (B, H, Q, Dh)
        out = out.transpose(1, 2).flatten(2)  # (B, Q, D)
        return ctx.queries(x) + self.wo(self.dropout(self.output_norm(out) * u))

    def read(self, x: Tensor, ctx: Context, cache: KVCache) -> None:
        """The keys and values of tokens (B, n, D) alone, into an empty cache."""
        cache.add(*self.keys_values(self.attention_norm(x)))

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D) -> (B, H, n, Dh) each"""
        return self.heads(self.wk(normed)), self.heads(self.wv(normed))

    def heads(self, x: Tensor) -> Tensor:
        """(B, n, D) -> SiLU of it, (B, H, n, Dh)"""
        return F.silu(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, own: Tensor | None = None
    ) -> Tensor:
        """`attend` on a few sequences and queries at a time: most scores of the future are not computed.
        Where there are many they are not kept, either, but computed again in the backward pass: then they
        take SCORES numbers, whatever B and n are."""
        inputs = {"q": q, "k": k, "v": v, "own": own, "positions": ctx.positions}
        inputs |= {"key_positions": ctx.key_positions, "query_times": ctx.query_times, "times": ctx.times}
        inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if torch.compiler.is_exporting():  # the loops below are over sizes
            return self.attend(**inputs, ctx=ctx)
        return self.loop_over_sequences(inputs, ctx)

    @torch.compiler.disable  # sizes change with every batch
    def loop_over_sequences(self, inputs: dict[str, Tensor], ctx: Context) -> Tensor:
        (batch, heads, queries, _), length = inputs["q"].shape, inputs["k"].shape[2]
        scale = part_scale(inputs["q"])
        size = max(1, scale * SCORES // (heads * min(scale * ROWS, queries) * length))
        attend = self.attend
        if batch * heads * queries * length > scale * KEPT_SCORES:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        # Positions that are the same for all sequences are not split.
        parts = [x.split(size) if len(x) == batch else repeat(x) for x in inputs.values()]
        parts = (dict(zip(inputs, part, strict=True)) for part in zip(*parts, strict=False))
        return torch.cat([self.loop_over_queries(attend, ctx, **part) for part in parts])

    def loop_over_queries(self, attend, ctx: Context, **inputs: Tensor) -> Tensor:
        """The inputs of `attend`, but all queries of the sequences."""
        step, queries = part_scale(inputs["q"]) * ROWS, inputs["q"].shape[2]
        rows = []
        for first in range(0, queries, step):
            count = min(step, queries - first)
            part = {
                name: inputs[name].narrow(axis, first, count) for name, axis in OF_QUERIES if name in inputs
            }
            if ctx.whole_rows:  # no query of this part sees a later key
                part |= {
                    name: inputs[name].narrow(axis, 0, first + count)
                    for name, axis in OF_KEYS
                    if name in inputs
                }
            rows.append(attend(**inputs | part, ctx=ctx))
        return torch.cat(rows, dim=2)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        key_positions: Tensor,
        ctx: Context,
        own: Tensor | None = None,
        **clock: Tensor,
    ) -> Tensor:
        """Eq. 2: q (b, H, r, Dh), k and v (b, H, t, Dh) at positions (1 or b, r) and (1 or b, t), and with
        `clock` query_times (b, r) and times (b, t) -> (b, H, r, Dh). With the `own` keys and values of
        candidates, (b, 2, H, r, Dh), each sees the keys before it, and itself."""
        age = positions[:, :, None] - key_positions[:, None]  # (1 or b, r, t)
        passed = clock["query_times"][:, :, None] - clock["times"][:, None] if clock else None  # (b, r, t)
        scores = q @ k.transpose(-1, -2) + self.relative_bias(age, passed)[:, None]  # (b, H, r, t)
        seen = visible(positions, key_positions, ctx.window, ctx.candidates)  # (1 or b, r, t)
        count = int(ctx.candidates) + seen.sum(-1, keepdim=True)[:, None]  # (1 or b, 1, r, 1)
        out = (F.silu(scores) * seen[:, None] / count) @ v
        if own is not None:
            k, v = own.unbind(1)
            now = age.new_zeros(1, 1, 1)
            bias = self.relative_bias(now, now if clock else None)  # (1, 1, 1)
            out = out + F.silu((q * k).sum(-1, keepdim=True) + bias) / count * v
        return out
