"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Bad input: shown as one clear line, never as a traceback."""


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough to stand inside one line."""
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
