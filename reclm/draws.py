"""Random numbers for each sequence of a batch, by its place in the batch of ALL processes.

They are a hash of (seed of the step, place, number of the draw), so a sequence gets the same dropout masks in
whichever process and micro-batch it is, on a CPU or a GPU. A generator would have to be drawn from for the
whole batch in every process. The hash is SplitMix64 (Steele et al., OOPSLA 2014), with shifts by half a word,
which torch does in one step: its shift of an int64 keeps the sign."""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2**64 / golden ratio, made odd
FACTORS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class Draws:
    """The random numbers of the rows of a batch, or of positions."""

    def __init__(self, keys: Tensor):
        self.keys, self.count = keys, 0  # (M,) int64, and how often numbers were drawn

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> "Draws":
        """Of the rows of a batch; torch's generator, seeded alike in all processes, says which. Without
        "places" the batch is taken to be whole."""
        places = batch.get("places")
        if places is None:
            places = torch.arange(len(batch["lengths"]), device=batch["lengths"].device)
        key = torch.randint(-(2**63), 2**63 - 1, ()).item()
        return cls(mix(places * GOLDEN + key))

    def at(self, valid: Tensor) -> "Draws":
        """Of the M positions `valid` (B, T)."""
        return Draws(self.bits(valid.shape[1])[valid])

    def bits(self, number: int) -> Tensor:
        """(M, number) int64, 64 even and independent bits each; others in each call"""
        self.count += 1
        keys = mix(self.keys + self.count)
        return mix(keys[:, None] + GOLDEN * torch.arange(1, number + 1, device=keys.device))

    def uniform(self) -> Tensor:
        """(M, 1) float64 in 0 <= u < 1"""
        return (self.bits(1) >> 11).double() / 2**53 + 0.5


def mix(x: Tensor) -> Tensor:
    """Hash each int64, in place."""
    low, high = x.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)  # of a little-endian machine
    for factor in FACTORS:
        low.bitwise_xor_(high)
        x.mul_(factor)
    low.bitwise_xor_(high)
    return x
