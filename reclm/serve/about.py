"""What a checkpoint or an export says about its model."""

from dataclasses import dataclass
from typing import Any


@dataclass
class About:
    """What a checkpoint or an export says about its model."""

    config: dict[str, Any]  # all settings
    dataset: str
    protocol: str
    trained: str  # epoch and its validation metric, as a person reads it
