"""The numbers behind a figure, as JSON can hold them: one row of `COLUMNS` a cell, undefined as None."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechinterp.errors import UserError

#: The columns of every cell's row of numbers, in order.
COLUMNS = ("label", "effect", "ci_low", "ci_high", "control", "passes")


def number_cells(
    values: NDArray[np.float64],
    labels: list[Any],
    ci_low: ArrayLike | None,
    ci_high: ArrayLike | None,
    control: ArrayLike | None,
    passes: ArrayLike | None,
) -> list[Any]:
    """`values.shape` nested lists of rows `COLUMNS`; undefined is None."""
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
    flat = [[null(item) for item in row] for row in zip(*(column.ravel() for column in columns), strict=True)]
    if values.ndim == 1:
        return flat
    width = values.shape[1]
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def escaped(value: Any) -> Any:
    """Text, or nested lists of it, as plotly shows it literally: it reads a few HTML tags, and tokens may look so."""
    return [escaped(item) for item in value] if isinstance(value, list) else html.escape(str(value), quote=False)


def fact_rows(facts: Mapping[str, object] | None) -> list[list[str]]:
    """Facts as JSON keeps their order."""
    return [[name, str(value)] for name, value in (facts or {}).items()]


def floats(values: ArrayLike) -> NDArray[np.float64]:
    """As float64; None becomes NaN."""
    return np.array(values, dtype=np.float64)


def null(item: Any) -> Any:
    """The item, with NaN and infinities as None."""
    if isinstance(item, (float, np.floating)):
        return float(item) if np.isfinite(item) else None
    return item


def nullable(values: NDArray[np.float64]) -> list[list[float | None]]:
    """A `[y x]` array as lists, undefined as None."""
    return [[null(value) for value in row] for row in values.tolist()]


def check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise a UserError where an array does not match the labels."""
    if array.shape != shape:
        raise UserError(f"figure: {name} has the shape {list(array.shape)}, the labels ask for {list(shape)}")
