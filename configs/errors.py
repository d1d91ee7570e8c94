"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """An error that the user can fix; main.py prints it as one line, without a traceback."""
