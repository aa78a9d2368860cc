"""The layout of the weights and the engine that the settings ask for, which most runs need not import."""

from torch import nn

from reclm.config import Config
from reclm.run.engine import Engine
from reclm.run.layout import Layout


def lay_out(cfg: Config) -> Layout:
    """That of --parallel, before the data are read, since it says who reads what. Raises UserError where the
    processes or heads cannot be divided so."""
    if cfg.processes.parallel == "ddp":
        return Layout(cfg)
    from reclm.run.parallel import Spread

    return Spread(cfg)


def build_engine(model: nn.Module, averaged: nn.Module, cfg: Config, layout: Layout) -> Engine:
    """That of --engine; `averaged` is the model to evaluate. Raises UserError without its package."""
    if cfg.processes.engine == "torch":
        return Engine(model, averaged, cfg, layout)
    from reclm.run.by_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, averaged, cfg, layout)
