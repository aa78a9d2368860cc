"""Training by DeepSpeed: ZeRO (arXiv 1910.02054) deals the state of the optimizer, the gradients and with
--zero_stage=3 the weights among the processes. Checkpoints are those of any other run: DeepSpeed's own cannot
be resumed with another number of processes."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from reclm.config import Config
from reclm.errors import UserError, first_line
from reclm.run import optim
from reclm.run.engine import Engine
from reclm.run.layout import Layout
from reclm.run.optim_state import check_optimizer

INSTALL = "pip install -r requirements-deepspeed.txt"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class DeepSpeedEngine(Engine):
    """--engine=deepspeed, with AdamW."""

    def __init__(self, model: nn.Module, averaged: nn.Module, cfg: Config, layout: Layout):
        self.deepspeed = import_deepspeed(next(model.parameters()).device)
        if not torch.distributed.is_initialized():
            raise UserError("--engine=deepspeed is for launches by torchrun or deepspeed: use one of them")
        self.model, self.layout, self.cfg = model, layout, cfg
        self.partitioned = cfg.processes.zero_stage == 3
        self.is_plain = not self.partitioned
        self.twin = deepcopy(model) if self.partitioned else None  # to evaluate: any number of calls
        self.found = False
        self.loading: dict | None = None  # moments, which DeepSpeed has no place for before the first step
        optimizer = optim.build_optimizer(model, cfg.train)
        self.groups = optimizer.state_dict()["param_groups"]
        self.order = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.wrapped, self.optimizer, *_ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings(cfg), dist_init_required=False
        )

    def gradients(self, batch: dict[str, Tensor], weight: float, last: bool) -> float:
        if self.loading:
            self.make_moments(batch)
            torch.manual_seed(torch.initial_seed())  # dropout as if this had not been
        self.wrapped.set_gradient_accumulation_boundary(last)
        loss = self.wrapped(batch)
        self.wrapped.backward(loss * weight)
        if not last:
            self.wrapped.step()  # which counts micro-batches
        return loss.item()

    def clip(self) -> Tensor:
        """DeepSpeed clips in its step."""
        return torch.zeros(())

    def step(self, again: Callable, num_targets: int) -> None:
        self.wrapped.step()
        self.find_moments()
        norm = self.wrapped.get_global_grad_norm()
        if norm is not None and not torch.as_tensor(norm).isfinite():
            raise UserError("the gradient overflowed: try a smaller --lr; earlier checkpoints are intact")

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        if not self.partitioned:
            return model.state_dict()
        with self.deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    @contextmanager
    def to_evaluate(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.partitioned:
            self.twin.load_state_dict(self.state_dict(model))
        yield self.twin or model

    def optimizer_state(self) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state as moment_of

        steps = [state["step"] for state in self.inner.state.values() if "step" in state]
        groups = [
            group | {"lr": float(now["lr"])}
            for group, now in zip(self.groups, self.optimizer.param_groups, strict=True)
        ]
        state = self.loading or {}
        if steps and not state:
            state = {
                index: {"step": torch.tensor(float(steps[0]))}
                | {name: moment_of(weight, name).detach().clone() for name in MOMENTS}
                for index, weight in enumerate(self.order)
            }
        return {"state": state, "param_groups": groups}

    def load_optimizer(self, saved: dict, path: Path) -> None:
        plain = optim.build_optimizer(self.twin or self.model, self.cfg.train)
        self.loading = check_optimizer(saved, plain, path)["state"]

    def find_moments(self) -> None:
        """Let DeepSpeed look for the moments of all groups of weights: 0.19.8 does so when the first group
        has taken a step, and finds none of the others."""
        if not self.found and not self.partitioned:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self.found = True

    @property
    def inner(self) -> torch.optim.Optimizer:
        """torch's, inside that of DeepSpeed"""
        return self.optimizer.optimizer

    def make_moments(self, batch: dict[str, Tensor]) -> None:
        """Let DeepSpeed take a step at a rate of 0, after which it has moments, and replace these."""
        from deepspeed.utils import safe_set_full_optimizer_state as set_moment

        saved, self.loading = self.loading, None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.wrapped.set_gradient_accumulation_boundary(True)
        self.wrapped.backward(self.wrapped(batch))
        self.wrapped.step()
        self.find_moments()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for index, values in saved.items():
            for name in MOMENTS:
                set_moment(self.order[index], values[name].to(self.wrapped.device), name)
        step = next(iter(saved.values()))["step"]
        for state in self.inner.state.values():
            state["step"].fill_(float(step))
        self.optimizer.zero_grad()


def import_deepspeed(device: torch.device):
    """The module. Raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about DeepSpeed, in each step
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"--engine=deepspeed needs deepspeed ({first_line(error)}): {INSTALL}") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at start, for minutes
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
    return deepspeed


def settings(cfg: Config) -> dict:
    """DeepSpeed's: those of --deepspeed_config and ours. Raises UserError where they contradict."""
    train = cfg.train
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # for its reports alone: batches are made here
        "gradient_accumulation_steps": 1,  # set_gradient_accumulation_boundary says which is the last
        "gradient_clipping": train.clip_norm,
        "zero_optimization": {"stage": cfg.processes.zero_stage},
        "zero_allow_untested_optimizer": True,
    }
    if cfg.processes.deepspeed_config is None:
        return ours
    given, path = read(Path(cfg.processes.deepspeed_config)), cfg.processes.deepspeed_config
    flags = {  # what of it a flag says
        "gradient_clipping": "clip_norm",
        "train_batch_size": "batch_size",
        "train_micro_batch_size_per_gpu": "batch_size",
        "gradient_accumulation_steps": "grad_accum_steps",
        "optimizer": "optimizer",
        "scheduler": "lr_min",
        "fp16": "dtype",
        "bf16": "dtype",
    }
    known = {"gradient_clipping": train.clip_norm, "train_batch_size": train.batch_size}
    known["gradient_accumulation_steps"] = train.grad_accum_steps
    for name, flag in flags.items():
        if name in given and given[name] not in ("auto", known.get(name, "auto")):
            value = cfg.flat()[flag]
            raise UserError(f"{path}: {name} contradicts --{flag}={value}: leave it out of the file")
    stage, theirs = cfg.processes.zero_stage, given.get("zero_optimization", {})
    if theirs.get("stage", stage) != stage:
        raise UserError(f"{path}: stage {theirs['stage']} contradicts --zero_stage={stage}: change one")
    ours["zero_optimization"] |= theirs
    return {name: value for name, value in given.items() if name not in flags} | ours


def read(path: Path) -> dict:
    """Raises UserError unless the file holds a JSON object."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed_config={path} cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
        raise UserError(f"--deepspeed_config={path} is no JSON object of DeepSpeed's settings")
    return given
