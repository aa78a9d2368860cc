"""The one exception that a user is meant to see."""

from typing import Any


class UserError(Exception):
    """Bad input: shown as one clear line, never as a traceback."""


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough to stand inside one line."""
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


def choose(flag: str, name: str, known: dict[str, Any]) -> Any:
    """known[name]. Raises UserError, which lists what is known."""
    if name not in known:
        raise UserError(f"--{flag}={name} must be one of {', '.join(known)}")
    return known[name]
