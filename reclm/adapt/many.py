"""Many adapters on one model: each row of a batch is read, and scored, by the adapter that it names.

The updates of N adapters lie in one tensor per layer, padded with zeros to the largest rank. Those of the
rows of a batch are gathered and applied in batched products, so a batch costs the same for one adapter and
for a hundred. Adapter 0 is none: the base alone."""

import threading

import torch
from torch import Tensor, nn

from reclm.adapt.lora import Adapter
from reclm.errors import UserError

TABLE = "item_embedding"


class Chosen(threading.local):
    """The adapters of the batch that this thread works on, (B,) int64; None = the base for all."""

    ids: Tensor | None = None


def stack(adapters: list[Adapter], layer: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (N + 1, r, in), alpha / r B (N + 1, out, r) and, of DoRA, m / |W + alpha / r B A| (N + 1, out) of a
    layer with the weight (out, in); zeros and ones where an adapter does not update it."""
    r = max(adapter.rank for adapter in adapters)
    a = weight.new_zeros(len(adapters) + 1, r, weight.shape[1])
    b = weight.new_zeros(len(adapters) + 1, weight.shape[0], r)
    gain = weight.new_ones(len(adapters) + 1, weight.shape[0])
    for i, adapter in enumerate(adapters, 1):
        if f"{layer}.lora_A" in adapter.weights:
            a[i, : adapter.rank] = adapter.weights[f"{layer}.lora_A"]
            b[i, :, : adapter.rank] = adapter.alpha / adapter.rank * adapter.weights[f"{layer}.lora_B"]
        if f"{layer}.magnitude" in adapter.weights:
            gain[i] = adapter.weights[f"{layer}.magnitude"].to(weight) / (weight + b[i] @ a[i]).norm(dim=1)
    return a, b, gain


class AdaptedLinear(nn.Module):
    """A layer of the base with the updates of all adapters."""

    def __init__(self, layer: nn.Linear, updates: tuple[Tensor, Tensor, Tensor], chosen: Chosen):
        super().__init__()
        self.layer, self.chosen = layer, chosen
        self.a, self.b, self.gain = updates

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, in) -> (B, n, out)"""
        ids, y = self.chosen.ids, self.layer(x)
        if ids is None:
            return y
        y = torch.baddbmm(y, torch.bmm(x, self.a[ids].mT), self.b[ids].mT)
        return y * self.gain[ids][:, None]


class ManyAdapters:
    """The adapters that were put on a model, in place; `names[i]` is number i + 1. Set `chosen.ids` before a
    pass through the model. Raises UserError for an update of the item table that is not low-rank in it."""

    def __init__(self, model: nn.Module, adapters: list[Adapter], has_content: bool):
        self.chosen, self.names = Chosen(), [adapter.name for adapter in adapters]
        layers = {name.rpartition(".")[0] for adapter in adapters for name in adapter.weights}
        table = model.item_embedding.weight.detach()
        self.of_table = None
        if TABLE in layers:
            if has_content:
                raise UserError(
                    "an adapter of the item table cannot be served next to others where --item_features add "
                    "to its rows: serve it alone, from best.pth of its run"
                )
            self.of_table = stack(adapters, TABLE, table)
            model.inputs.register_forward_hook(self.update_inputs)
        for layer in sorted(layers - {TABLE}):
            parent, _, child = layer.rpartition(".")
            plain = model.get_submodule(layer)
            updates = stack(adapters, layer, plain.weight.detach())
            setattr(model.get_submodule(parent), child, AdaptedLinear(plain, updates, self.chosen))

    def update_inputs(self, inputs: nn.Module, given: tuple, x: Tensor) -> Tensor:
        """The tokens (B, S, D) that `inputs` made of a row, with the updates of their items."""
        ids, row = self.chosen.ids, given[0]
        if ids is None:
            return x
        a, b, _ = self.of_table
        items = row["token_ids"].masked_fill(row["token_ids"] >= b.shape[1], 0)  # padding has no update
        return torch.baddbmm(x, b[ids[:, None], items], a[ids])

    def score_update(self, hidden: Tensor, ids: Tensor, items: Tensor | slice) -> Tensor | float:
        """hidden (B, D) by the adapters `ids` (B,) -> (B, n): what these add to the scores of `items` (n,)"""
        if self.of_table is None:
            return 0.0
        a, b, _ = self.of_table
        low = torch.bmm(hidden[:, None], a[ids].mT)  # (B, 1, r)
        return torch.bmm(low, b[ids][:, items].mT)[:, 0]
