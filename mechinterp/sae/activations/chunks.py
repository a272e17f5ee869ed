"""Where activations come from, as their readers see it: a harvest, a store on disk, or a test's list."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Chunks(Protocol):
    """Rows of activations, some at a time, for one or several sites, resumable bit for bit."""

    def chunk(self) -> dict[str, Tensor]:
        """The next rows: hook name -> `[token d]`, row i of every site from the same token.

        Raises:
            StopIteration: a finite source is at its end.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs for the same chunks to follow: a flat dict of tensors and plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


class FixedChunk:
    """One chunk, once."""

    def __init__(self, rows: dict[str, Tensor]):
        self.rows, self._given = rows, False

    def chunk(self) -> dict[str, Tensor]:
        """All rows. Raises StopIteration the second time."""
        if self._given:
            raise StopIteration
        self._given = True
        return self.rows

    def state_dict(self) -> dict[str, Any]:
        """Whether it was given."""
        return {"given": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self._given = bool(state["given"])


def under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a flat state whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def widths_of(chunk: Mapping[str, Tensor]) -> dict[str, int]:
    """Hook name -> width of a chunk that is well formed.

    Raises:
        ValueError: no site, sites with unequal numbers of rows or of several dtypes, or anything but `[token d]`.
    """
    found = {name: (tuple(rows.shape), rows.dtype) for name, rows in chunk.items()}
    shapes = [shape for shape, _ in found.values()]
    if not shapes or any(len(shape) != 2 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"a chunk must hold [token d] of every site, with equally many tokens; found {found}")
    if len({dtype for _, dtype in found.values()}) > 1:
        raise ValueError(f"the sites of a chunk must share a dtype; found {found}")
    return {name: shape[1] for name, (shape, _) in found.items()}


def n_rows(chunk: Mapping[str, Tensor]) -> int:
    """Tokens of a chunk; 0 of an empty dict."""
    return next((len(rows) for rows in chunk.values()), 0)
