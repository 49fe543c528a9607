"""The one error that the command line shows to its user without a traceback."""


class UserError(Exception):
    """Something the user can put right: its message is one line that says what and how."""
