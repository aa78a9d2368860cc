"""UserError, the exception that becomes a one-line message."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LONGEST = 600  # characters of a message; a remedy often stands at its end


class UserError(Exception):
    """Bad input, shown as one line that names it and the remedy, without a traceback (run/dist.py)."""


class LocalError(UserError):
    """A UserError of one process alone, which prints it even if it is not the main one."""


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, as \\x1b; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; bad input, or an OSError such as a full disk, ends it with one line and exit code 2."""
    open_streams()
    try:
        try:
            main()
        finally:  # also after --help, which exits
            sys.stdout.flush()
    except (UserError, OSError) as error:
        print_error(error)
        raise SystemExit(2) from None


def open_streams() -> None:
    """Where the standard output or error is closed, drop what is written to it; where it cannot show a
    character, as in the C locale, escape it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the end)
        if isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def print_error(error: Exception) -> None:
    """ "error: ..." on the standard error. What waits for a standard output that cannot be written is
    dropped, or Python would try once more at its end."""
    if isinstance(error, OSError) and error.filename is None:
        error = f"cannot write ({error.strerror or error}): is the standard output closed, or the disk full?"
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # ValueError: it is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with suppress(OSError):
        print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)


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
