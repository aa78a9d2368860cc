"""What takes the steps of a training run: torch, or DeepSpeed (reclm/run/by_deepspeed.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from reclm.config import Config
from reclm.contradictions import IN_BACKWARD
from reclm.run import optim
from reclm.run.in_backward import InBackward
from reclm.run.layout import Layout
from reclm.run.optim_state import check_optimizer, parts_of


class Engine:
    """Training by torch. Checkpoints hold whole weights and the whole state of the optimizer, numbered as
    `optim.build_optimizer` does, whatever the layout."""

    def __init__(self, model: nn.Module, averaged: nn.Module, cfg: Config, layout: Layout):
        """`averaged` is the model to evaluate, which may be `model`. The optimizer is built last, because
        laying out replaces weights."""
        self.model, self.layout, self.clip_norm = model, layout, cfg.train.clip_norm
        self.is_plain = layout.is_plain  # can whole weights be loaded into the model?
        for one in {id(model): model, id(averaged): averaged}.values():
            layout.place(one)
        self.optimizer = optim.build_optimizer(model, cfg.train)
        # DDP would hold all gradients, which the optimizers IN_BACKWARD avoid.
        self.wrapped = model if cfg.train.optimizer in IN_BACKWARD else layout.wrap(model)

    def gradients(self, batch: dict[str, Tensor], weight: float, last: bool) -> float:
        """Add the gradients of weight * loss to those of the mean over the shares of the data. `last` is the
        last micro-batch of a step: only then are gradients exchanged. Returns the loss."""
        with self.layout.alone(self.wrapped) if not last else nullcontext():
            loss = self.wrapped(batch)
            (loss * weight).backward()
        return loss.item()

    def clip(self) -> Tensor:
        """Clip the gradients. Returns their L2 norm before, a scalar."""
        if isinstance(self.optimizer, InBackward):
            return self.optimizer.norm()  # clipped in its second pass
        return self.layout.clip_gradients(self.model, self.clip_norm)

    def step(self, again: Callable, num_targets: int) -> None:
        optim.take_step(self.optimizer, again, num_targets)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole weights, in the main process, of the model to train or to evaluate. Collective."""
        return self.layout.state_dict(model)

    @contextmanager
    def to_evaluate(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block, a model to evaluate that each process may call as often as it has batches."""
        with self.layout.to_evaluate(model):
            yield model

    def optimizer_state(self) -> dict:
        """Its whole state_dict, in the main process. Collective."""
        saved, weights = self.optimizer.state_dict(), self.weights()
        for index, values in saved["state"].items():
            saved["state"][index] = {
                name: self.layout.whole(value, weights[index]) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
        return saved

    def load_optimizer(self, saved: dict, path: Path) -> None:
        """Load what `optimizer_state` returned. Raises UserError where it does not fit."""
        saved, weights = check_optimizer(saved, self.optimizer, path, self.layout.shape_of), self.weights()
        saved["state"] = {
            index: {name: self.layout.own_part(value, weights[index]) for name, value in values.items()}
            for index, values in saved["state"].items()
        }
        self.optimizer.load_state_dict(saved)

    def weights(self) -> list[Tensor]:
        """In the order in which the state of the optimizer numbers them"""
        return [
            weight
            for part in parts_of(self.optimizer)
            for group in part.param_groups
            for weight in group["params"]
        ]
