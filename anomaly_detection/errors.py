"""The error that a user can mend: stages print its text in one line, without a traceback."""


class UserError(Exception):
    """A wrong value, path or file; the text says what, where, the rule and the fix."""
