"""Positions, timestamps and the KV cache that blocks need besides their input, and rotary embeddings."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from reclm.draws import Draws

EMPTY = 2**30  # position of an empty cache slot: later than every query, so nothing attends to it


class KVCache:
    """The KV cache of one layer: keys and values (B, G, S, Dh) of S tokens, for later tokens to attend to."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, G, n, Dh) of n tokens: all of an empty cache, else those of `slots`
        (B, n). Returns all keys and values of the cache."""
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            index = slots[:, None, :, None].expand_as(keys)  # (B, G, n, Dh)
            self.keys.scatter_(2, index, keys)
            self.values.scatter_(2, index, values)
        return self.keys, self.values


@dataclass(frozen=True)
class Context:
    """Everything that one pass of n tokens per row through the blocks needs, the same for all layers.

    A query attends to keys at positions <= its own, at most the last `window` of them. Each candidate
    (--task=ctr) is the next token after a part of the history: it attends to cached keys at positions < its
    own and to itself, not to other candidates."""

    positions: Tensor  # (1 or B, Q) of the queries in their rows
    key_positions: Tensor  # (1 or B, K) of the keys: those of the tokens themselves, or of the cache slots
    rotary: Tensor  # (n, Dh/2, 2) or (B, 1, n, Dh/2, 2) cosines and sines at the tokens' positions
    window: int = 0  # W; 0 = unlimited
    times: Tensor | None = None  # (B, K) timestamps of the keys in seconds; None if the data have none
    query_times: Tensor | None = None  # (B, Q) time of each query, with request_time of the item to predict
    last: Tensor | None = None  # (B,) the only token that is a query; None = all tokens are
    candidates: bool = False  # are the tokens candidates?
    slots: Tensor | None = None  # (B, n) cache slots to write the tokens to
    draws: Draws | None = None  # of the rows, for dropout in training

    def only(self, last: Tensor) -> "Context":
        """The same context with one query per row, the token `last` (B,)."""
        query_times = None if self.query_times is None else self.query_times.gather(1, last[:, None])
        return replace(self, positions=last[:, None], query_times=query_times, last=last)

    def queries(self, x: Tensor) -> Tensor:
        """(B, n, D) -> the tokens that are queries, (B, Q, D)"""
        return x if self.last is None else x.gather(1, self.last[:, None, None].expand(-1, 1, x.shape[2]))

    @property
    def query_rotary(self) -> Tensor:
        return self.rotary if self.last is None else self.rotary[self.last][:, None, None]

    @property
    def whole_rows(self) -> bool:
        """Is every token of the rows both a query and a key?"""
        return self.positions is self.key_positions

    @cached_property
    def mask(self) -> Tensor | None:
        """bool (1 or B, 1, Q, K), True where a query attends to a key; None = plain causal attention."""
        if self.whole_rows and not self.window:
            return None
        return visible(self.positions, self.key_positions, self.window, self.candidates)[:, None]


def visible(positions: Tensor, key_positions: Tensor, window: int, candidates: bool) -> Tensor:
    """Positions of queries (1 or B, Q) and keys (1 or B, K) -> bool (1 or B, Q, K), True = attends."""
    age = positions[:, :, None] - key_positions[:, None]  # distance in positions
    seen = age >= int(candidates)
    return seen & (age < window) if window else seen


def rotations(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Positions m (...) -> (..., Dh / 2, 2): cosine and sine of the angles m theta_j (RoPE, arXiv 2104.09864,
    eq. 15). Each pair of channels j has its own frequency theta_j, from 1 radian per position downwards."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None] * frequencies  # (..., Dh/2)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x (B, heads, n, Dh) -> the same shape, each pair of channels rotated by the angle of its position, so
    that dot products of queries and keys depend on distances only. A complex product takes one pass over x
    where sines and cosines take four, but torch.export and torch.compile do not support complex numbers."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, heads, n, Dh/2, 2)
    if torch.compiler.is_compiling():
        cos, sin = rotary.unbind(-1)
        turned = pairs * cos[..., None] + pairs.flip(-1) * torch.stack([-sin, sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).type_as(x)
