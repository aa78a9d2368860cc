"""Optimizer, parameter groups, learning-rate schedule and weight averaging."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from reclm.config import TrainConfig
from reclm.errors import choose

USUAL_WARMUP = 100  # optimizer steps


def adamw(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101). beta2 is 0.98, an average over the last 50 steps or so: with 0.999, the
    second moment would still remember the first steps at the end of a short run."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


OPTIMIZERS = {"adamw": adamw}


def build_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer, with one weight decay each for matrices, embeddings and vectors. Vectors (norm gains and
    biases) are never decayed. Embeddings have their own, 0 by default, as rows of rare items would fade
    between their few updates. Frozen weights are left out. Raises UserError for an unknown --optimizer."""
    matrices, embeddings, gains = [], [], []
    for module in model.modules():
        rows = embeddings if isinstance(module, nn.Embedding) else matrices
        for weight in module.parameters(recurse=False):
            if weight.requires_grad:
                (gains if weight.dim() < 2 else rows).append(weight)
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": embeddings, "weight_decay": cfg.embedding_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return choose("optimizer", cfg.optimizer, OPTIMIZERS)(groups, cfg.lr)


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
    average(list(averaged.parameters()), list(model.parameters()), step)
