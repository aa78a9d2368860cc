"""What the sections of reclm/config.py are written with: `setting` and checks of single values."""

import math
from dataclasses import field
from typing import Any

from reclm.errors import UserError

# Each field names the parts of a checkpoint that fix its value:
#   model, data  fixed for evaluation and --resume: it defines the model, or the data
#   trajectory   fixed for --resume: the weights depend on it
#   leak         fixed for --init_from: with another value the checkpoint may have seen this run's test data
#   free         never fixed
PARTS = ("model", "data", "trajectory", "leak", "free")


class AnyBut(list):
    """A list that contains every value but those in it."""

    def __contains__(self, value: Any) -> bool:
        return not super().__contains__(value)


MATCHING = {"task": ("matching",)}
CTR = {"task": ("ctr",)}
IMPRESSIONS = CTR | {"ctr_split": ("time", "random", "own")}
ADAPTED = {"adapter": ("lora", "dora")}
LLAMA = {"model_name": ("llama",)}
FULL_GRADIENT = {"optimizer": AnyBut(["sophia", "lomo", "adalomo"])}
PQ = {"item_table": ("pq",)}
READS_TIMES = {"model_name": ("hstu",), "time_tokens": ("tokens", "embedding")}


def setting(default: Any, fixed: str, *needs: dict[str, tuple]) -> Any:
    """A dataclass field with its default and the PARTS that fix it. A value other than the default has an
    effect only if, in each dict of `needs`, at least one of the settings has one of the values listed."""
    return field(default=default, metadata={"fixed": fixed.split(), "needs": needs})


def positive(cfg, *names: str) -> None:
    for name in names:
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name}={getattr(cfg, name)} must be a finite number greater than 0")


def not_negative(cfg, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name}={getattr(cfg, name)} must be a finite number, 0 or greater")


def probability(cfg, *names: str, closed: bool = False) -> None:
    for name in names:
        if not (0 <= (value := getattr(cfg, name)) < 1 or (closed and value == 1)):
            most = "at most" if closed else "less than"
            raise UserError(f"--{name}={value} must be at least 0 and {most} 1")


def finite(cfg, name: str) -> None:
    value = getattr(cfg, name)
    if value is not None and not math.isfinite(value):
        raise UserError(f"--{name}={value} must be a finite number")
