"""The error that a user can mend: what was asked, what was found, what would be valid."""


class UserError(ValueError):
    """Bad input. The CLI prints its text as one clear message and exits with 2, without a traceback."""


def one_line(error: BaseException) -> str:
    """An error's first line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
