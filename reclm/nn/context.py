"""What blocks look at besides their input: positions, times, and the keys and values of earlier tokens."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

EMPTY = 2**30  # position of an empty slot of a cache: after every query, so nothing attends to it


class KVCache:
    """Keys and values of one layer (B, G, S, Dh), kept for tokens that come later."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keep a whole history, or write n more tokens into `slots` (B, n); returns all there is."""
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            index = slots[:, None, :, None].expand_as(keys)  # (B, G, n, Dh)
            self.keys.scatter_(2, index, keys)
            self.values.scatter_(2, index, values)
        return self.keys, self.values


@dataclass(frozen=True)
class Context:
    """Of a pass of n tokens per row through the blocks; the same for all layers.

    A query attends to the keys at positions <= its own, at most the last `window` of them. Candidates
    (--task=ctr) are the next token after a part of the history each, and do not see each other: they attend
    to the cached keys at positions < their own, and to themselves."""

    positions: Tensor  # (1 or B, Q) of the queries in their rows
    key_positions: Tensor  # (1 or B, K) of the keys: of these tokens themselves, or of a cache's slots
    rotary: Tensor  # (n, Dh/2, 2) or (B, 1, n, Dh/2, 2) cosines and sines of the tokens' positions
    window: int = 0  # W; 0 = unlimited
    times: Tensor | None = None  # (B, K) timestamps of the keys in seconds; None = not known
    query_times: Tensor | None = None  # (B, Q) when the outputs are asked for
    last: Tensor | None = None  # (B,) the only token that is a query; None = all of them
    candidates: bool = False
    slots: Tensor | None = None  # (B, n) where the tokens go in a cache

    def only(self, last: Tensor) -> "Context":
        """The same for one query per row, the token `last` (B,)."""
        query_times = None if self.query_times is None else self.query_times.gather(1, last[:, None])
        return replace(self, positions=last[:, None], query_times=query_times, last=last)

    def queries(self, x: Tensor) -> Tensor:
        """(B, n, D) -> the tokens whose output is wanted, (B, Q, D)"""
        return x if self.last is None else x.gather(1, self.last[:, None, None].expand(-1, 1, x.shape[2]))

    @property
    def query_rotary(self) -> Tensor:
        return self.rotary if self.last is None else self.rotary[self.last][:, None, None]

    @property
    def whole_rows(self) -> bool:
        """Are all tokens of the rows queries and keys?"""
        return self.positions is self.key_positions

    @cached_property
    def mask(self) -> Tensor | None:
        """bool (1 or B, 1, Q, K), True = attends; None = plain causal."""
        if self.whole_rows and not self.window:
            return None
        return visible(self.positions, self.key_positions, self.window, self.candidates)[:, None]


def visible(positions: Tensor, key_positions: Tensor, window: int, candidates: bool) -> Tensor:
    """Positions of queries (1 or B, Q) and keys (1 or B, K) -> bool (1 or B, Q, K): which keys each sees."""
    age = positions[:, :, None] - key_positions[:, None]  # how many positions ago
    seen = age >= int(candidates)
    return seen & (age < window) if window else seen


def rotations(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """positions (...) -> (..., head_dim / 2, 2): cosines and sines of m theta_j (RoPE, arXiv 2104.09864,
    eq. 15)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None] * frequencies  # (..., Dh/2)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, heads, n, Dh) by its position's angle, so that dot products
    depend on distance. As a complex product this is a single pass over x where sines and cosines take four,
    but neither torch.export nor torch.compile takes complex numbers."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, heads, n, Dh/2, 2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).type_as(x)
