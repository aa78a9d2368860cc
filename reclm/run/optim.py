"""Optimizers (compared in docs/optimizers.md), parameter groups, learning-rate schedule, weight averaging."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from reclm.config import TrainConfig
from reclm.errors import choose
from reclm.run.in_backward import InBackward
from reclm.run.muon import Muon
from reclm.run.rowwise import RowwiseAdagrad
from reclm.run.sophia import SophiaG
from reclm.run.together import Together

USUAL_WARMUP = 100  # optimizer steps


def adamw(groups: list[dict], cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101). beta2 is 0.98, an average over the last 50 steps or so: with 0.999, the
    second moment would still remember the first steps at the end of a short run."""
    meshes = {getattr(weight, "device_mesh", None) for group in groups for weight in group["params"]}
    fused = len(meshes) == 1  # its kernel takes weights of one layout alone
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=fused, foreach=False)


def adamw8bit(groups: list[dict], cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits (arXiv 2110.02861), by torchao. Raises UserError without torchao."""
    from reclm.run.eight_bit import AdamW8bit  # an extra package

    return AdamW8bit(groups, lr=cfg.lr, betas=(0.9, 0.98))


def adafactor(groups: list[dict], cfg: TrainConfig) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235) without first moment: the second moments of a matrix (n, m) are estimated
    from n of its rows and m of its columns. The rate of a weight is min(lr, 1 / sqrt(step)) times its RMS."""
    return torch.optim.Adafactor(groups, lr=cfg.lr)


def muon(groups: list[dict], cfg: TrainConfig) -> Muon:
    return Muon(groups, lr=cfg.lr)


def sophia(groups: list[dict], cfg: TrainConfig) -> SophiaG:
    return SophiaG(groups, lr=cfg.lr)


def lomo(groups: list[dict], cfg: TrainConfig) -> InBackward:
    """LOMO (arXiv 2306.09782): SGD without a gradient of the whole model."""
    return InBackward(torch.optim.SGD(groups, lr=cfg.lr), cfg.clip_norm)


def adalomo(groups: list[dict], cfg: TrainConfig) -> InBackward:
    """AdaLOMO (arXiv 2310.10195): Adafactor without a gradient of the whole model. It clips the update of
    each weight (algorithm 1, line 10), so the norm of the gradient needs no clipping."""
    return InBackward(adafactor(groups, cfg), 0.0)


def rowwise_adagrad(groups: list[dict], cfg: TrainConfig) -> RowwiseAdagrad:
    return RowwiseAdagrad(groups, lr=cfg.table_lr)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "adafactor": adafactor,
    "muon": muon,
    "sophia": sophia,
    "lomo": lomo,
    "adalomo": adalomo,
}
FOR_MATRICES = {"muon"}  # the other weights get AdamW


def build_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer | Together:
    """The optimizer, with one weight decay each for matrices, embeddings and vectors. Vectors (norm gains and
    biases) are never decayed. Embeddings have their own, 0 by default, as rows of rare items would fade
    between their few updates. Frozen weights are left out. Raises UserError for an unknown --optimizer."""
    matrices, embeddings, gains = [], [], []
    tables = set()
    for module in model.modules():
        rows = embeddings if isinstance(module, nn.Embedding) else matrices
        for weight in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                tables.add(id(weight))
            if weight.requires_grad:
                (gains if weight.dim() < 2 else rows).append(weight)
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": embeddings, "weight_decay": cfg.embedding_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    build, parts = choose("optimizer", cfg.optimizer, OPTIMIZERS), []
    if cfg.table_optimizer != "same":
        of_tables, groups = split(groups, lambda weight: id(weight) in tables)
        parts.append((rowwise_adagrad, of_tables))
    if cfg.optimizer in FOR_MATRICES:
        of_matrices, groups = split(groups, lambda weight: weight.dim() == 2 and id(weight) not in tables)
        parts.append((build, of_matrices))
        build = adamw
    parts.append((build, groups))
    optimizers = [build(groups, cfg) for build, groups in parts if groups]  # all may be frozen but tables
    optimizer = optimizers[0] if len(optimizers) == 1 else Together(optimizers)
    for group in optimizer.param_groups:
        group["lr_factor"] = float(group["lr"]) / cfg.lr
    return optimizer


def split(groups: list[dict], belongs: Callable[[Tensor], bool]) -> tuple[list[dict], list[dict]]:
    """The groups of the weights that `belong`, and those of the others; without empty ones."""
    parts = []
    for wanted in (True, False):
        part = [g | {"params": [w for w in g["params"] if belongs(w) == wanted]} for g in groups]
        parts.append([group for group in part if group["params"]])
    return tuple(parts)


def set_rates(optimizer: torch.optim.Optimizer | Together, step: int, total_steps: int, cfg: TrainConfig):
    """Write the learning rate of optimizer step `step` into each group."""
    for group in optimizer.param_groups:
        rate = learning_rate(step, total_steps, cfg) * group["lr_factor"]
        if isinstance(group["lr"], Tensor):  # of torchao, whose compiled step reads it from memory
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def take_step(optimizer: torch.optim.Optimizer | Together, again: Callable, num_targets: int) -> None:
    """Update the weights by the gradients of the mean over `num_targets`. Some optimizers call `again()` to
    compute them once more, or `again(relabel=f)`, with a function f(model, batch) that returns other batches
    to compute them of."""
    if isinstance(optimizer, InBackward):
        optimizer.step(again)
    elif isinstance(optimizer, SophiaG):
        optimizer.step(again, num_targets)
    else:
        optimizer.step()


def choose_warmup(cfg: TrainConfig, total_steps: int) -> tuple[int, str]:
    """(steps of the warm-up, a line to print where it is shorter than usual). A run of fewer than 1,000 steps
    warms up for a tenth of them: after 100 steps, its cosine would have fallen, or the run have ended."""
    if cfg.warmup_steps is not None:
        return cfg.warmup_steps, ""
    steps = total_steps // 10
    if steps >= USUAL_WARMUP:
        return USUAL_WARMUP, ""
    return steps, (
        f"\nNOTE: the learning rate warms up over {steps} of this run's {total_steps} steps, not over "
        f"{USUAL_WARMUP} (--warmup_steps)"
    )


def learning_rate(step: int, total_steps: int, cfg: TrainConfig) -> float:
    """The rate at optimizer step 0 .. total_steps - 1: linear warm-up times a cosine down to lr_min * lr."""
    warmup = min(1.0, (step + 1) / max(1, choose_warmup(cfg, total_steps)[0]))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return cfg.lr * warmup * (cfg.lr_min + (1 - cfg.lr_min) * cosine)


def update_average(averaged: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """averaged <- d averaged + (1 - d) model, in place, after optimizer step `step`, counted from 0.
    d = min(decay, (1 + step) / (10 + step)): smaller at first, to forget the initial weights soon."""
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average(*([local(weight) for weight in one.parameters()] for one in (averaged, model)), step)


def local(weight: Tensor) -> Tensor:
    """What this process has of a weight"""
    return weight.to_local() if hasattr(weight, "to_local") else weight
