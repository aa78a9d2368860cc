"""The HSTU block of "Actions Speak Louder than Words" (arXiv 2402.17152, section 3.2).

    U, V, Q, K = SiLU(f1(norm(X)))                          (eq. 1)
    A V = SiLU(Q K' + rab) V / n                            (eq. 2), n = number of positions attended to
    Y = X + f2(norm(A V) * U)                               (eq. 3)

Unlike softmax weights, these do not sum to 1, so the output shows how often something happened. `rab` is a
trained bias per distance in positions, plus one per log-scale bucket of the time between key and query. The
gate U takes the place of a feed-forward layer."""

from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reclm.config import ModelConfig
from reclm.nn.context import Context, KVCache, visible
from reclm.nn.layers import NORM_EPS, TIME_BUCKETS, Dropout, ResidualLinear, log_buckets

ROWS = 64  # queries per chunk: keys after the last of them are skipped
SCORES = 2**18  # scores per chunk, 1 MiB: fits into the cache of a core
KEPT_SCORES = 2**23  # most scores that a block keeps for its backward pass, about 50 MiB; more are recomputed
GPU_SCALE = 32  # factor on the three above on a GPU, which is faster with larger chunks
# Inputs of HSTUBlock.attend and the axis along which each is cut into queries or keys.
OF_QUERIES = [("q", 2), ("own", 3), ("positions", 1), ("query_times", 1)]
OF_KEYS = [("k", 2), ("v", 2), ("key_positions", 1), ("times", 1)]


def part_scale(tensor: Tensor) -> int:
    return 1 if tensor.device.type == "cpu" else GPU_SCALE


class Lookup(torch.autograd.Function):
    """table[index] for a table (n,) and an index of any shape, with its gradient in one pass: torch's own
    backward adds index by index."""

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
    """rab of eq. 2, the same for all heads; starts at 0."""

    def __init__(self, max_len: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(max_len))
        self.time = nn.Parameter(torch.zeros(TIME_BUCKETS[0]))

    def forward(self, age: Tensor, passed: Tensor | None) -> Tensor:
        """`age` (1 or b, r, t), positions from key to query, and `passed` (b, r, t), seconds, or None if the
        data have no timestamps -> the bias (1 or b, r, t)."""
        bias = Lookup.apply(self.position, age.clamp(0, len(self.position) - 1))
        if passed is None:
            return bias + 0 * self.time[0]  # DDP needs a gradient for every parameter
        return bias + Lookup.apply(self.time, log_buckets(passed))


class HSTUBlock(nn.Module):
    """Pointwise aggregated attention with a relative bias, gated by U, with a residual connection."""

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
        return ctx.queries(x) + self.wo(self.dropout(self.output_norm(out) * u, ctx.draws))

    def read(self, x: Tensor, ctx: Context, cache: KVCache) -> None:
        """Put the keys and values of tokens (B, n, D) into an empty cache; compute no output."""
        cache.add(*self.keys_values(self.attention_norm(x)))

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D) -> keys and values, (B, H, n, Dh) each"""
        return self.heads(self.wk(normed)), self.heads(self.wv(normed))

    def heads(self, x: Tensor) -> Tensor:
        """(B, n, D) -> SiLU(x), split into heads (B, H, n, Dh)"""
        return F.silu(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, own: Tensor | None = None
    ) -> Tensor:
        """q (B, H, Q, Dh), k and v (B, H, K, Dh) -> (B, H, Q, Dh): `attend` in chunks of sequences and
        queries, which skips most scores that the causal mask would hide. Beyond KEPT_SCORES they are not kept
        but recomputed in the backward pass, so memory holds one chunk for any B and n."""
        inputs = {"q": q, "k": k, "v": v, "own": own, "positions": ctx.positions}
        inputs |= {"key_positions": ctx.key_positions, "query_times": ctx.query_times, "times": ctx.times}
        inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if torch.compiler.is_exporting():  # torch.export cannot loop over dynamic sizes
            return self.attend(**inputs, ctx=ctx)
        return self.loop_over_sequences(inputs, ctx)

    def compile(self, *args, **kwargs) -> None:
        """nn.Module.compile, but for the loops, whose sizes change with every batch. As a decorator,
        `disable` would import the compiler, for a second, in every program."""
        self.loop_over_sequences = torch.compiler.disable(self.loop_over_sequences)
        super().compile(*args, **kwargs)

    def loop_over_sequences(self, inputs: dict[str, Tensor], ctx: Context) -> Tensor:
        (batch, heads, queries, _), length = inputs["q"].shape, inputs["k"].shape[2]
        scale = part_scale(inputs["q"])
        size = max(1, scale * SCORES // (heads * min(scale * ROWS, queries) * length))
        attend = self.attend
        if batch * heads * queries * length > scale * KEPT_SCORES:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        # Tensors that all sequences share, of batch size 1, are repeated instead of split.
        parts = [x.split(size) if len(x) == batch else repeat(x) for x in inputs.values()]
        parts = (dict(zip(inputs, part, strict=True)) for part in zip(*parts, strict=False))
        return torch.cat([self.loop_over_queries(attend, ctx, **part) for part in parts])

    def loop_over_queries(self, attend, ctx: Context, **inputs: Tensor) -> Tensor:
        """The inputs of `attend` with all queries of some sequences -> (b, H, Q, Dh)."""
        step, queries = part_scale(inputs["q"]) * ROWS, inputs["q"].shape[2]
        rows = []
        for first in range(0, queries, step):
            count = min(step, queries - first)
            part = {
                name: inputs[name].narrow(axis, first, count) for name, axis in OF_QUERIES if name in inputs
            }
            if ctx.whole_rows:  # causal: no query of this chunk attends to a later key
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
        """Eq. 2: q (b, H, r, Dh), k and v (b, H, t, Dh) at `positions` (1 or b, r) and `key_positions` (1 or
        b, t) -> (b, H, r, Dh). `clock` is query_times (b, r) and times (b, t) in seconds, if known. `own`
        (b, 2, H, r, Dh) is the keys and values of candidates, which also attend to themselves."""
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
