"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Bad input: shown as one clear line, never as a traceback."""
