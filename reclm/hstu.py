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
        u = F.silu(self.wu(wanted))  # (B, T, D)
        q, k, v = self.heads(self.wq(wanted)), self.heads(self.wk(normed)), self.heads(self.wv(normed))
        if ctx.memory is None:
            out = self.attend_in_parts(q, k, v, ctx)  # (B, H, T, Dh)
        else:  # candidates, each behind the part of the history that it sees
            out = self.attend_in_parts(q, *ctx.memory, ctx, own=torch.stack([k, v], dim=1))
        out = out.transpose(1, 2).flatten(2)  # (B, T, D)
        return ctx.wanted(x) + self.wo(self.dropout(self.output_norm(out) * u))

    def remember(self, x: Tensor, ctx) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, Dh) of a history (B, T, D)."""
        normed = self.attention_norm(x)
        return self.heads(self.wk(normed)), self.heads(self.wv(normed))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> SiLU of it, (B, H, T, Dh)"""
        return F.silu(x).unflatten(-1, (self.cfg.n_heads, -1)).transpose(1, 2)

    @torch.compiler.disable  # its loops are over sizes that change with every batch
    def attend_in_parts(self, q: Tensor, k: Tensor, v: Tensor, ctx, own: Tensor | None = None) -> Tensor:
        """`attend` on a few sequences and queries at a time: most scores of the future are not computed.
        Where there are many they are not kept, either, but computed again in the backward pass: then they
        take SCORES numbers, whatever B and T are."""
        batch, heads, length, _ = k.shape
        everywhere = torch.arange(length, device=q.device).expand(batch, -1)
        asked = everywhere if ctx.last is None else ctx.last[:, None]
        inputs = {"q": q, "k": k, "v": v, "asked": asked if own is None else ctx.position}
        if own is not None:
            inputs["own"] = own
        if ctx.times is not None:
            inputs |= {"query_times": ctx.query_times, "times": ctx.times}
        scale = part_scale(q)
        size = max(1, scale * SCORES // (heads * min(scale * ROWS, q.shape[2]) * length))
        parts = zip(*(tensor.split(size) for tensor in inputs.values()), strict=True)
        attend = self.attend
        if batch * heads * q.shape[2] * length > scale * KEPT_SCORES:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        parts = (dict(zip(inputs, part, strict=True)) for part in parts)
        return torch.cat([self.attend_in_rows(attend, **part) for part in parts])

    def attend_in_rows(self, attend, q, k, v, asked, own=None, **clock) -> Tensor:
        """asked (b, queries): the position of each query; query_times (b, queries) and times (b, t): when
        it is asked and when the keys happened. The rest as for `attend`."""
        step = part_scale(q) * ROWS
        all_asked = own is None and q.shape[2] == k.shape[2]
        asked = asked[:1] if all_asked else asked  # then it is the same for all sequences
        rows = []
        for first in range(0, q.shape[2], step):
            r = slice(first, first + step)
            t = slice(0, first + step if all_asked else None)
            part = {"own": own[..., r, :]} if own is not None else {}
            if clock:
                part |= {"query_times": clock["query_times"][:, r], "times": clock["times"][:, t]}
            rows.append(attend(q[:, :, r], k[:, :, t], v[:, :, t], asked[:, r], **part))
        return torch.cat(rows, dim=2)

    def attend(self, q, k, v, asked, own=None, query_times=None, times=None) -> Tensor:
        """Eq. 2: q (b, H, r, Dh), k and v (b, H, t, Dh) -> (b, H, r, Dh). With the `own` keys and values of
        candidates, (b, 2, H, r, Dh), each sees the keys before it, and itself."""
        age = asked[:, :, None] - torch.arange(k.shape[2], device=k.device)  # (1 or b, r, t)
        passed = None if times is None else query_times[:, :, None] - times[:, None]  # (b, r, t)
        scores = q @ k.transpose(-1, -2) + self.relative_bias(age, passed)[:, None]  # (b, H, r, t)
        youngest = 0 if own is None else 1
        seen = (age >= youngest) & (age < (self.cfg.window or k.shape[2] + youngest))  # (1 or b, r, t)
        if self.cfg.attention_norm == "length":
            count = youngest + seen.sum(-1, keepdim=True)[:, None]  # (1 or b, 1, r, 1)
        else:
            count = self.cfg.max_len
        out = (F.silu(scores) * seen[:, None] / count) @ v
        if own is not None:
            k, v = own.unbind(1)
            now = age.new_zeros(1, 1, 1)
            bias = self.relative_bias(now, None if times is None else now)  # (1, 1, 1)
            out = out + F.silu((q * k).sum(-1, keepdim=True) + bias) / count * v
        return out
