"""The settings of adaptation, a section of reclm/config.py."""

from dataclasses import dataclass
from typing import Literal

from reclm.errors import UserError
from reclm.settings import ADAPTED, positive, setting


@dataclass
class AdaptConfig:
    """Adaptation of a trained model (docs/adapt.md)"""

    adapter: Literal["none", "lora", "dora"] = setting("none", "model")
    """freeze the weights of --init_from and train low-rank updates of them: lora (arXiv 2106.09685), or dora,
    which also trains the length of each row (arXiv 2402.09353)"""
    adapter_rank: int = setting(8, "model", ADAPTED)
    """r, rank of the updates"""
    adapter_targets: str | None = setting(None, "model", ADAPTED)
    """what is updated, separated by commas: layers of the blocks such as wq,wv, and table for the item table
    [default: all layers of the blocks whose names start with w]"""
    train_only: Literal["all", "blocks", "table"] = setting("all", "trajectory", {"adapter": ("none",)})
    """of the weights of --init_from train only those of the blocks, or only the item table; weights that it
    lacks are always trained"""

    def __post_init__(self):
        positive(self, "adapter_rank")


def check_adaptation(flat: dict) -> None:
    """Raises UserError where there is nothing to adapt, or no adapter can do it; `flat` has all settings."""
    for name, off in (("adapter", "none"), ("train_only", "all"), ("init_match", "id")):
        if flat[name] != off and not flat["init_from"]:
            raise UserError(f"--{name}={flat[name]} needs --init_from=BASE.pth, the model to start from")
    if flat["adapter"] != "none" and flat["user_embedding"] == "explicit":
        raise UserError("--user_embedding=explicit has a vector per user, which no adapter holds: drop one")
