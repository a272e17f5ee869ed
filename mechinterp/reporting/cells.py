"""The numbers behind a figure, as JSON can hold them: one row of named columns a cell, undefined as None."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechinterp.errors import UserError

#: How the blanks of a token are shown, here and in the page's prompts.
BLANKS = {" ": "·", "\n": "↵", "\t": "⇥"}


def column_names(value: str = "effect", more: Iterable[str] = ()) -> list[str]:
    """The columns of every cell's row of numbers, in order. Raises UserError where a name stands twice."""
    names = ["label", value, "ci_low", "ci_high", "control", "passes", *more]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"figure: two columns of numbers are named {repeated[0]!r}; give each a name of its own")
    return names


def number_cells(
    values: NDArray[np.float64],
    labels: list[Any],
    ci_low: ArrayLike | None,
    ci_high: ArrayLike | None,
    control: ArrayLike | None,
    passes: ArrayLike | None,
    more: Mapping[str, Any] | None = None,
) -> list[Any]:
    """`values.shape` nested lists of rows `column_names(…, more)`; undefined is None."""
    names = np.array(labels, dtype=object)
    check_shape("labels", names, values.shape)
    columns: list[NDArray[Any]] = [names, values]
    for name, array in (("ci_low", ci_low), ("ci_high", ci_high), ("control", control)):
        column = floats(array) if array is not None else np.full(values.shape, np.nan)
        check_shape(name, column, values.shape)
        columns.append(column)
    words = np.full(values.shape, None, dtype=object)
    if passes is not None:
        tested = np.array(passes, dtype=object)
        check_shape("passes", tested, values.shape)
        words = np.vectorize(lambda value: None if value is None else "yes" if value else "no", otypes=[object])(tested)
    columns.append(words)
    for name, array in (more or {}).items():
        column = np.array(array, dtype=object)
        check_shape(name, column, values.shape)
        columns.append(column)
    flat = [[null(item) for item in row] for row in zip(*(column.ravel() for column in columns), strict=True)]
    if values.ndim == 1:
        return flat
    width = values.shape[1]
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def escaped(value: Any) -> Any:
    """Text, or nested lists of it, as plotly shows it literally: it reads a few HTML tags, and tokens may look so."""
    return [escaped(item) for item in value] if isinstance(value, list) else html.escape(str(value), quote=False)


def visible(token: str) -> str:
    """A token with its blanks and its control characters made visible: " Paris" is "·Paris"."""
    shown = [BLANKS.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in token]
    return "".join(shown) or "∅"


def shortened(text: str, width: int) -> str:
    """At most `width` characters, the last one an ellipsis where more were cut."""
    return text if len(text) <= width else text[: width - 1] + "…"


def fact_rows(facts: Mapping[str, object] | None) -> list[list[str]]:
    """Facts as JSON keeps their order."""
    return [[name, str(value)] for name, value in (facts or {}).items()]


def floats(values: ArrayLike) -> NDArray[np.float64]:
    """As float64; None becomes NaN."""
    return np.array(values, dtype=np.float64)


def null(item: Any) -> Any:
    """The item as Python's own, with NaN and infinities as None."""
    if isinstance(item, np.generic):
        item = item.item()
    return item if not isinstance(item, float) or np.isfinite(item) else None


def nullable(values: NDArray[np.float64]) -> list[list[float | None]]:
    """A `[y x]` array as lists, undefined as None."""
    return [[null(value) for value in row] for row in values.tolist()]


def check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise a UserError where an array does not match the labels."""
    if array.shape != shape:
        raise UserError(f"figure: {name} has the shape {list(array.shape)}, the labels ask for {list(shape)}")
