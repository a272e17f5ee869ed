"""Types are checked in tests and not outside: some tests must see what a user sees."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


@contextmanager
def checks_off() -> Iterator[None]:
    """No shape and type checks inside."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
