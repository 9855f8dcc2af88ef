"""Errors that a user can fix: stages print their text without a traceback."""


class UserError(Exception):
    """A wrong value, path or file; the message says what, where, the rule and the fix."""


class TrainingError(UserError):
    """Training cannot start or continue; the message says what to change."""


class DataError(UserError):
    """Files that cannot be used; the message has a line for each."""


def one_line(error: Exception) -> str:
    """The text of another library's error, shortened to fit one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
