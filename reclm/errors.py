"""UserError, the exception that becomes a one-line message."""

from typing import Any

LONGEST = 600  # characters of a message; a remedy often stands at its end


class UserError(Exception):
    """Bad input, shown as one line that names it and the remedy, without a traceback (run/dist.py)."""


class LocalError(UserError):
    """A UserError of one process alone, which prints it even if it is not the main one."""


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, as \\x1b; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The text as one printable line of at most LONGEST characters: names and values may be of any length."""
    line = printable(" ".join(text.splitlines())).replace("\t", "\\t")
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[5 - LONGEST // 2 :]}"


def first_line(error: Exception) -> str:
    """The first line of an exception's message, at most 100 characters, or its type without a message."""
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


def choose(flag: str, name: str, known: dict[str, Any]) -> Any:
    """known[name]. Raises UserError, listing the known names, for any other value of --flag."""
    if name not in known:
        raise UserError(f"--{flag}={name} must be one of {', '.join(known)}")
    return known[name]
