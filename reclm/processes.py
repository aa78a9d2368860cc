"""The settings of runs of several processes, a section of reclm/config.py."""

from dataclasses import dataclass
from typing import Literal

from reclm.settings import not_negative, setting


@dataclass
class ProcessConfig:
    """Processes (not stored in checkpoints; docs/scale.md)"""

    parallel: Literal["ddp", "fsdp", "tp", "fsdp+tp"] = setting("ddp", "free")
    """what several processes have of each weight: ddp = a copy, and fsdp = a part, each with sequences of its
    own; tp = a part of each layer of the blocks, all with the same sequences; fsdp+tp = both"""
    tp_size: int = setting(0, "free")
    """with tp, the number of processes that share a layer [default: all, with fsdp+tp 2]"""
    deal_items: bool = setting(False, "free")
    """deal the rows of the item table among the processes: for more items than one of them can hold"""
    engine: Literal["torch", "deepspeed"] = setting("torch", "free")
    """what takes the steps: torch or DeepSpeed, an extra package"""
    zero_stage: Literal[1, 2, 3] = setting(2, "free")
    """engine=deepspeed: what is dealt among the processes; 1 = the state of the optimizer, 2 = gradients as
    well, 3 = weights as well"""
    deepspeed_config: str | None = setting(None, "free")
    """engine=deepspeed: JSON file with further settings of DeepSpeed"""

    def __post_init__(self):
        not_negative(self, "tp_size")
