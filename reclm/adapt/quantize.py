"""Quantization of a trained model (--quantize): the item table and the matrices of the blocks as integers of
8 or 4 bits. Each row, at 4 bits each group of 32 weights of a block, has a scale and an offset:

    row = scale * codes + offset

Scale and offset are float16, so a row of the item table takes D + 4 bytes at 8 bits and D / 2 + 4 at 4 bits,
of the 4 D of float32. At 8 bits the codes span the range of the row. At 4 bits a few outliers would cost all
other weights precision: the range is narrowed step by step, on the side where that leaves the smaller squared
error, and the best of all ranges on the way is taken (greedy search, arXiv 1911.02079).

All else stays float32: norms, biases, heads, the tables of users, tokens, positions and times. The content of
items becomes part of their rows before. Weights are turned into floats where they are used, the item table a
chunk at a time: a quantized model is smaller, not faster. For inference only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.errors import UserError
from reclm.nn.pq import PQEmbedding

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # weights of a block that share a scale and an offset at 4 bits
STEPS = 200  # of the greedy search: each cuts off 1 / STEPS of the range of a row
CUT_OFF = 32  # steps, 16 % of the range, as in torch.choose_qparams_optimized
AT_ONCE = 2**12  # rows: 1 MiB of floats at D = 64 stays in the cache of a core
SCORED_AT_ONCE = 2**14  # rows: larger, as there is less to do with each


def quantize_model(model: nn.Module, kind: str) -> nn.Module:
    """Quantize a trained model in place. `kind` is a key of BITS, or "none", which changes nothing. Returns
    it, in evaluation mode. Raises UserError where groups do not divide a width, and for weights that float16
    cannot scale."""
    if kind == "none":
        return model
    bits = BITS[kind]
    check_widths(model, "quantize", kind)
    with torch.no_grad():
        table = model.eval().item_table()
        if isinstance(table, PQEmbedding):
            model.item_embedding = QuantizedPQ(table)
        else:
            model.item_embedding, model.content = QuantizedTable(table, bits), None
        replace_linears(model.layers, lambda linear: QuantizedLinear(linear, bits))
    return model


def check_widths(model: nn.Module, flag: str, kind: str) -> None:
    """Raises UserError, naming the layer, where the weights of a block do not divide into groups."""
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear) and module.in_features % group_size(module, BITS[kind]):
            raise UserError(
                f"--{flag}={kind} needs widths that are multiples of {GROUP}, but layers.{name} reads "
                f"{module.in_features}: use --{flag}=int8, or train with another --dim or --hidden_dim"
            )


def group_size(linear: nn.Linear, bits: int) -> int:
    """Weights that share a scale and an offset"""
    return GROUP if bits == 4 else linear.in_features


def replace_linears(layers: nn.Module, make) -> None:
    """Put make(linear) in the place of each nn.Linear of the blocks."""
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))


def num_bytes(module: nn.Module) -> int:
    """Bytes of the weights of a module, and of what stands in their place; not of computed constants."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


# ---------------------------------------------------------------- modules


class QuantizedRows(nn.Module):
    """N rows of W values: `codes` uint8 (N, W), or (N, W / 2) at 4 bits, `scale` and `offset` float16 (N, 1).
    W must be even at 4 bits. Raises UserError for what float16 cannot scale."""

    def __init__(self, rows: Tensor, bits: int):
        super().__init__()
        self.bits = bits
        codes, scale, offset = quantize_rows(rows, bits)
        if not (scale.isfinite().all() and offset.isfinite().all()):
            raise UserError("a model with weights that are not finite or beyond 65,504 cannot be quantized")
        self.register_buffer("codes", codes if bits == 8 else pack(codes))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def __len__(self) -> int:
        return len(self.codes)

    def forward(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Row numbers (...) -> their values, float32 (..., W)"""
        codes = self.codes[index]
        codes = codes if self.bits == 8 else unpack(codes)
        return dequantize(codes, self.scale[index], self.offset[index])


class QuantizedTable(QuantizedRows):
    """The item table: stands in the place of ItemEmbedding, and for its own `table`."""

    def table(self) -> "QuantizedTable":
        return self

    def scores(self, hidden: Tensor) -> Tensor:
        """User embeddings (B, D) -> scores (B, V), float32, as scale (codes . h) + offset (1 . h): only codes
        are turned into floats, a chunk at a time."""
        scores = hidden.new_empty(len(hidden), len(self))
        sums = hidden.sum(1, keepdim=True)
        for first in range(0, len(self), SCORED_AT_ONCE):
            part = slice(first, first + SCORED_AT_ONCE)
            scale, offset = self.scale[part].float().T, self.offset[part].float().T  # (1, v)
            scores[:, part] = self.products(hidden, self.codes[part]).mul_(scale).addmm_(sums, offset)
        return scores

    def products(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """(B, D) and the codes of v items -> (B, v)"""
        if self.bits == 8:
            return hidden @ codes.float().T
        first, second = hidden.chunk(2, dim=1)  # as `pack` has them
        return (first @ (codes & 15).float().T).addmm_(second, (codes >> 4).float().T)


class QuantizedPQ(PQEmbedding):
    """A PQEmbedding whose sub-vectors have 8 bits; with --quantize=int4 too, since they are few. Those of a
    sub-table that stand in one column share a scale and an offset."""

    def __init__(self, table: PQEmbedding):
        nn.Module.__init__(self)
        self.num_codes, self.num_centroids = table.num_codes, table.num_centroids
        self.register_buffer("codes", table.codes)
        self.register_buffer("first", table.first, persistent=False)
        self.columns = QuantizedRows(table.sub_tables().mT.flatten(0, 1), 8)  # D rows of k numbers

    @property
    def weight(self) -> Tensor:
        """(m k, D / m)"""
        return self.columns().unflatten(0, (self.num_codes, -1)).mT.flatten(0, 1)


class QuantizedLinear(nn.Module):
    """An nn.Linear whose weights are QuantizedRows."""

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        self.weights = QuantizedRows(linear.weight.reshape(-1, group_size(linear, bits)), bits)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return F.linear(x, self.weights().view(self.shape), self.bias)


# ---------------------------------------------------------------- numbers


def quantize_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, W) -> codes (N, W) uint8 from 0 to 2^bits - 1, scale and offset (N, 1) float16"""
    parts = [quantize_part(part, bits) for part in rows.detach().float().split(AT_ONCE)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def quantize_part(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = rows.aminmax(dim=1, keepdim=True)
    if bits == 4:
        low, high = clip(rows, low, high, bits)
    scale, offset = grid(low, high, bits)
    return encode(rows, scale, offset, bits).byte(), scale.half(), offset.half()


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Ranges (N, 1) -> scale and offset (N, 1), rounded to float16 but float32"""
    offset = low.half().float()
    scale = ((high - offset) / (2**bits - 1)).half().float()
    return torch.where(scale > 0, scale, 1.0), offset  # of equal values, such as the padding row: all codes 0


def encode(rows: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Rows (N, W) -> the nearest codes (N, W), float32"""
    return rows.sub(offset).div_(scale).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Codes (..., W), scale and offset (..., 1) -> values (..., W), float32"""
    return codes.float().mul_(scale).add_(offset)


def clip(rows: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The range (N, 1) of each row, and one within it that the greedy search finds better: (low, high)"""

    def error(low: Tensor, high: Tensor) -> Tensor:  # (N, 1), the root of the squared one
        scale, offset = grid(low, high, bits)
        exact = torch.addcmul(-offset / scale, rows, 1 / scale)
        codes = exact.round().clamp_(0, 2**bits - 1)
        return torch.linalg.vector_norm(codes.sub_(exact), dim=1, keepdim=True) * scale

    step = (high - low) / STEPS
    best, best_low, best_high = error(low, high), low, high
    for _ in range(CUT_OFF):
        from_left, from_right = error(low + step, high), error(low, high - step)
        left = from_left < from_right
        low, high = torch.where(left, low + step, low), torch.where(left, high, high - step)
        now = torch.minimum(from_left, from_right)
        better = now < best
        best = torch.where(better, now, best)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits, uint8 (N, W) -> (N, W / 2): the first half of a row in the low bits of each byte"""
    first, second = codes.chunk(2, dim=-1)
    return first | second << 4


def unpack(packed: Tensor) -> Tensor:
    """(..., W / 2) -> (..., W), the inverse of `pack`"""
    return torch.cat([packed & 15, packed >> 4], dim=-1)
