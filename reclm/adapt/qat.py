"""Training for quantization (--qat): the forward pass uses the values that weights have once quantized, as
reclm/adapt/quantize.py rounds them; the backward pass takes rounding for the identity (straight-through
estimator, arXiv 1308.3432). The weights themselves stay
float32 and keep their names, so a checkpoint is an ordinary one, and --quantize of it gives the values that
were trained with. Validation and test of such a run are those of the quantized model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.adapt.quantize import BITS, check_widths, dequantize, group_size, quantize_rows, replace_linears
from reclm.nn.layers import ItemEmbedding


def train_for(model: nn.Module, kind: str) -> None:
    """Make a model train for --quantize=`kind`, in place; "none" changes nothing. Call it before wrappers
    and the optimizer. Raises UserError where groups do not divide a width."""
    if kind == "none":
        return
    bits = BITS[kind]
    check_widths(model, "qat", kind)
    model.item_embedding = RoundedEmbedding(model.item_embedding, bits)
    replace_linears(model.layers, lambda linear: RoundedLinear(linear, bits))


class Rounded(torch.autograd.Function):
    """Rows (N, W) -> the values that they have once quantized; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx, rows: Tensor, bits: int) -> Tensor:
        return dequantize(*quantize_rows(rows, bits))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class RoundedEmbedding(ItemEmbedding):
    """The item table; its parameter is that of `embedding`."""

    def __init__(self, embedding: ItemEmbedding, bits: int):
        super().__init__(*embedding.weight.shape, embedding.padding_idx, _weight=embedding.weight)
        self.weight, self.bits = embedding.weight, bits

    def table(self) -> Tensor:
        return Rounded.apply(self.weight, self.bits)


class RoundedLinear(nn.Module):
    """An nn.Linear of a block; its parameters are those of `linear`."""

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.bits, self.width = bits, group_size(linear, bits)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        rows = Rounded.apply(self.weight.reshape(-1, self.width), self.bits)
        return F.linear(x, rows.view(self.weight.shape), self.bias)
