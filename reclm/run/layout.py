"""Where the weights of a model lie in the processes. Here each process has all, but for the rows of an item
table that are dealt (--deal_items); see reclm/run/parallel.py for others.

What is read from and written to checkpoints are whole weights, so that any layout continues what another
began."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from reclm.config import Config
from reclm.run import dist
from reclm.run.exchange import Exchange


class Layout:
    """--parallel=ddp, or one process."""

    is_plain = True  # are weights tensors that a whole model's can be copied to?

    def __init__(self, cfg: Config):
        dist.read_alike(1)
        self.exchange = Exchange() if cfg.processes.deal_items else None
        self.tables: dict[int, nn.Module] = {}  # those whose rows are dealt, by the id of the weight

    def place(self, model: nn.Module) -> None:
        """Lay out the weights, in place, of a model that is whole in every process but for dealt rows."""
        for module in model.modules():
            if hasattr(module, "exchange"):
                self.tables[id(module.weight)] = module

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in training: it adds up the gradients of all processes."""
        dealt = [name for name, weight in model.named_parameters() if id(weight) in self.tables]
        return dist.data_parallel(model, dealt)

    @contextmanager
    def alone(self, wrapped: nn.Module) -> Iterator[None]:
        """Within the block, gradients are not exchanged."""
        with getattr(wrapped, "no_sync", nullcontext)():
            yield

    @contextmanager
    def to_evaluate(self, model: nn.Module) -> Iterator[None]:
        """Within the block, each process may call the model as often as it has batches."""
        yield

    def shape_of(self, weight: Tensor) -> tuple[int, ...]:
        """That of the whole weight"""
        table = self.tables.get(id(weight))
        return tuple(weight.shape) if table is None else (len(table), *weight.shape[1:])

    def whole(self, value: Tensor, weight: Tensor) -> Tensor:
        """All of `value`, which lies as the weight does: itself, or its state in an optimizer. Collective;
        where rows are dealt, the result is whole in the main process alone."""
        table = self.tables.get(id(weight))
        return table.gather(value.detach()) if table is not None and value.dim() else value.detach()

    def own_part(self, value: Tensor, weight: Tensor) -> Tensor:
        """The reverse of `whole`, of a value that every process has."""
        table = self.tables.get(id(weight))
        return table.part_of(value) if table is not None and value.dim() else value

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """That of the model with whole weights. Collective."""
        weights = dict(model.named_parameters())
        return {name: self.whole(x, weights.get(name, x)) for name, x in model.state_dict().items()}

    def clip_gradients(self, model: nn.Module, clip_norm: float) -> Tensor:
        """Clip the gradients to an L2 norm of `clip_norm`; 0 = no clipping. Returns the norm before, a
        scalar."""
        kinds = {}  # torch has the norm of those of one kind
        for weight in model.parameters():
            if weight.grad is not None:
                kind = getattr(weight, "device_mesh", None), id(weight) in self.tables
                kinds.setdefault(kind, []).append(weight)
        if [*kinds] == [(None, False)]:
            return nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)
        norms = []
        for (mesh, dealt), weights in kinds.items():
            norm = nn.utils.get_total_norm([numbers(weight) for weight in weights])
            norm = norm.full_tensor() if mesh else norm
            norms.append(self.exchange.sum(norm**2).sqrt() if dealt else norm)
        norm = torch.stack(norms).norm()
        if clip_norm:
            factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
            for weights in kinds.values():
                for weight in weights:
                    numbers(weight).mul_(factor)
        return norm


def numbers(weight: Tensor) -> Tensor:
    """Those of its gradient"""
    if weight.grad.is_sparse:
        weight.grad = weight.grad.coalesce()
        return weight.grad._values()
    return weight.grad
