"""UserError, the exception that becomes a one-line message."""

from typing import Any


class UserError(Exception):
    """Bad input, shown as one line that names it and the remedy, without a traceback (run/dist.py)."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, at most 100 characters, or its type without a message."""
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


def choose(flag: str, name: str, known: dict[str, Any]) -> Any:
    """known[name]. Raises UserError, listing the known names, for any other value of --flag."""
    if name not in known:
        raise UserError(f"--{flag}={name} must be one of {', '.join(known)}")
    return known[name]
