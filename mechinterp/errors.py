"""The error that a user can mend: what was asked, what was found, what would be valid."""


class UserError(ValueError):
    """Bad input. The CLI prints its text as one clear message and exits with 2, without a traceback."""
