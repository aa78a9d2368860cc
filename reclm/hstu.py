"""The HSTU block of "Actions Speak Louder than Words" (arXiv 2402.17152, section 3.2).

    U, V, Q, K = SiLU(f1(norm(X)))                          (eq. 1)
    A V = SiLU(Q K' + rab) V / n                            (eq. 2), n = number of positions attended to
    Y = X + f2(norm(A V) * U)                               (eq. 3)

Weights are not normalised to sum to 1: how often something happened stays visible. `rab` is a learned
number for each distance in positions, and one for each (logarithmic) length of time passed. There is no
feed-forward layer: the gate U takes its place."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reclm.config import ModelConfig
from reclm.dropout import Dropout
from reclm.intervals import NUM_BUCKETS, log_buckets

ROWS = 64  # queries worked on at once: keys behind the last of them are not looked at
SCORES = 2**18  # scores worked on at once, 1 MiB: stays in the cache of a core
KEPT_SCORES = 2**23  # kept for the backward pass of a block, some 50 MiB; where there are more: recomputed
GPU_SCALE = 32  # a GPU wants larger parts, of the three above


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
        self.time = nn.Parameter(torch.zeros(NUM_BUCKETS))

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
        self.cfg = cfg
        self.wu, self.wv, self.wq, self.wk = (nn.Linear(cfg.dim, cfg.dim, bias=False) for _ in range(4))
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.attention_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.output_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.relative_bias = RelativeBias(cfg.max_len)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor, ctx) -> Tensor:
        """(B, T, D) -> (B, T, D), with model.Context; position t sees positions <= t, at most W of them."""
        normed = self.attention_norm(x)
        wanted = ctx.wanted(normed)
        heads = (self.cfg.n_heads, self.cfg.dim // self.cfg.n_heads)
        u = F.silu(self.wu(wanted))  # (B, T, D)
        q = F.silu(self.wq(wanted)).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, Dh)
        k = F.silu(self.wk(normed)).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, Dh)
        v = F.silu(self.wv(normed)).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, Dh)
        out = self.attend_in_parts(q, k, v, ctx).transpose(1, 2).flatten(2)  # (B, T, D)
        return ctx.wanted(x) + self.wo(self.dropout(self.output_norm(out) * u))

    @torch.compiler.disable  # its loops are over sizes that change with every batch
    def attend_in_parts(self, q: Tensor, k: Tensor, v: Tensor, ctx) -> Tensor:
        """`attend` on a few sequences and queries at a time: most scores of the future are not computed.
        Where there are many they are not kept, either, but computed again in the backward pass: then they
        take SCORES numbers, whatever B and T are."""
        batch, heads, length, _ = k.shape
        asked = (
            torch.arange(length, device=q.device).expand(batch, -1) if ctx.last is None else ctx.last[:, None]
        )
        inputs = [q, k, v, asked] + ([] if ctx.times is None else [ctx.query_times, ctx.times])
        scale = part_scale(q)
        size = max(1, scale * SCORES // (heads * min(scale * ROWS, q.shape[2]) * length))
        parts = zip(*(tensor.split(size) for tensor in inputs), strict=True)
        attend = self.attend
        if batch * heads * q.shape[2] * length > scale * KEPT_SCORES:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([self.attend_in_rows(attend, *part) for part in parts])

    def attend_in_rows(self, attend, q, k, v, asked, query_times=None, times=None) -> Tensor:
        """asked (b, queries): the position of each query; query_times (b, queries) and times (b, t): when
        it is asked and when the keys happened. The rest as for `attend`."""
        step = part_scale(q) * ROWS
        all_asked = q.shape[2] == k.shape[2]
        asked = asked[:1] if all_asked else asked  # then it is the same for all sequences
        rows = []
        for first in range(0, q.shape[2], step):
            r = slice(first, first + step)
            t = slice(0, first + step if all_asked else None)
            clock = () if times is None else (query_times[:, r], times[:, t])
            inputs = (q[:, :, r], k[:, :, t], v[:, :, t], asked[:, r], *clock)
            rows.append(attend(*inputs))
        return torch.cat(rows, dim=2)

    def attend(self, q, k, v, asked, query_times=None, times=None) -> Tensor:
        """Eq. 2: q (b, H, r, Dh), k and v (b, H, t, Dh) -> (b, H, r, Dh)."""
        age = asked[:, :, None] - torch.arange(k.shape[2], device=k.device)  # (1 or b, r, t)
        passed = None if times is None else query_times[:, :, None] - times[:, None]  # (b, r, t)
        scores = q @ k.transpose(-1, -2) + self.relative_bias(age, passed)[:, None]  # (b, H, r, t)
        seen = (age >= 0) & (age < (self.cfg.window or k.shape[2]))  # (1 or b, r, t)
        if self.cfg.attention_norm == "length":
            count = seen.sum(-1, keepdim=True)[:, None]  # (1 or b, 1, r, 1)
        else:
            count = self.cfg.max_len
        return (F.silu(scores) * seen[:, None] / count) @ v
