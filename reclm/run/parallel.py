"""Layouts in which no process has all weights, by torch:

fsdp     a part of each weight in each process, gathered where it is used (FSDP2)
tp       a part of each layer in each process (tensor parallelism, arXiv 1909.08053, by DTensor)
fsdp+tp  groups of `tp_size` processes with parts of layers, of which each has a part in each group"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from reclm.config import Config
from reclm.errors import UserError
from reclm.run import dist
from reclm.run.exchange import Exchange
from reclm.run.layout import Layout

# Which layers of a block are split by their outputs and which by their inputs. A head lies in one process.
PLANS = {
    "llama": lambda: {
        **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
        "attention.wo": RowwiseParallel(),
        **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
        "feed_forward.w2": RowwiseParallel(),
    },
    # The norm after the attention is over all heads, so their outputs are gathered before it.
    "hstu": lambda: {
        **{name: ColwiseParallel() for name in ("wq", "wk", "wv")},
        "wu": ColwiseParallel(output_layouts=Replicate()),
        "output_norm": PrepareModuleInput(
            input_layouts=Shard(-1), desired_input_layouts=Replicate(), use_local_output=True
        ),
        "wo": RowwiseParallel(input_layouts=Replicate()),
    },
}


class Spread(Layout):
    """--parallel=fsdp, tp or fsdp+tp."""

    is_plain = False

    def __init__(self, cfg: Config):
        world, self.kind = dist.num_processes(), cfg.processes.parallel
        if world == 1:
            raise UserError(f"--parallel={self.kind} is for several processes: launch them with torchrun")
        self.tp = tp_size(cfg, world)
        dist.read_alike(self.tp)
        device = dist.pick_device(cfg.run.device).type
        self.mesh = init_device_mesh(device, (world // self.tp, self.tp), mesh_dim_names=("dp", "tp"))
        self.exchange = Exchange(self.mesh["dp"].get_group()) if cfg.processes.deal_items else None
        self.tables = {}

    def place(self, model: nn.Module) -> None:
        super().place(model)
        if self.tp > 1:
            for layer in model.layers:
                parallelize_module(layer, self.mesh["tp"], PLANS[model.cfg.model_name]())
                if model.cfg.model_name == "hstu":  # acts within the heads, of which each process has some
                    self.sum_gradients(layer.relative_bias)
        if "fsdp" in self.kind:
            if model.head is not None:  # it reads histories by a method of the blocks that FSDP does not see
                raise UserError(
                    f"--parallel={self.kind} does not go with --task={model.cfg.task}: leave one out"
                )
            dealt = {weight for weight in model.parameters() if id(weight) in self.tables}
            for layer in model.layers:
                fully_shard(layer, mesh=self.mesh["dp"])
            fully_shard(model, mesh=self.mesh["dp"], ignored_params=dealt)

    def sum_gradients(self, module: nn.Module) -> None:
        """Let the gradients of a module's weights be the sums of those of all processes with a part."""
        group = self.mesh["tp"].get_group()
        for weight in module.parameters():
            weight.register_hook(lambda grad: all_reduce(grad, "sum", group).wait())

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    @contextmanager
    def alone(self, wrapped: nn.Module) -> Iterator[None]:
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(False)
        yield
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(True)

    @contextmanager
    def to_evaluate(self, model: nn.Module) -> Iterator[None]:
        """With FSDP, all processes keep whole weights within the block."""
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in parts:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in parts:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)

    def whole(self, value: Tensor, weight: Tensor) -> Tensor:
        value = super().whole(value, weight)
        return value.full_tensor() if isinstance(value, DTensor) else value

    def own_part(self, value: Tensor, weight: Tensor) -> Tensor:
        if isinstance(weight, DTensor) and value.shape == weight.shape:
            return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
        return super().own_part(value, weight)


def tp_size(cfg: Config, world: int) -> int:
    """The number of processes that share a layer. Raises UserError unless it divides them and the heads."""
    kind = cfg.processes.parallel
    if kind == "fsdp":
        return 1
    size = cfg.processes.tp_size or (world if kind == "tp" else 2)
    if world % size or (kind == "tp" and size != world):
        raise UserError(f"--parallel={kind} --tp_size={size} does not fit {world} processes: change either")
    for name, heads in (("n_heads", cfg.model.n_heads), ("n_kv_heads", cfg.model.kv_heads)):
        if heads % size:
            raise UserError(f"--tp_size={size} does not divide --{name}={heads}: choose others")
    return size
