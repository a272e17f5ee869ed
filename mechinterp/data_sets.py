"""Texts out of data sets of Hugging Face's `datasets`: from the hub or at hand, in memory or streamed.

Nothing here imports that package before a name is looked up on the hub.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mechinterp.errors import UserError, one_line


@runtime_checkable
class DataSet(Protocol):
    """A data set of Hugging Face's `datasets`, in memory or streamed: rows are mappings."""

    column_names: Any

    def __iter__(self) -> Iterator[Any]: ...


def from_hub(name: str, split: str, column: str) -> Iterable[str]:
    """A column of a data set on the hub, streamed. Raises UserError if it cannot be had or has no such column."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(name, split=split, streaming=True)
        next(iter(rows))
    except (DatasetNotFoundError, OSError, ValueError, RuntimeError, StopIteration) as error:
        raise UserError(
            f"text {name!r} is no file here and cannot be had from the hub ({one_line(error)}); valid: a text file, "
            "a .jsonl file, a data set's name, 'built-in' or 'docstrings'"
        ) from None
    return texts(rows, column, f"data set {name!r}")


def name_of(data: DataSet) -> str:
    """What a data set calls itself, or its type."""
    name = getattr(getattr(data, "info", None), "dataset_name", None)
    return str(name) if name else type(data).__name__


def texts(data: DataSet, column: str, name: str) -> Iterable[str]:
    """The texts of a data set, by number where it has a length. Raises UserError without that column of texts."""
    names = data.column_names
    if names is None:  # a stream whose columns show in its rows
        names = list(next(iter(data), {}))
    if column not in names:
        raise UserError(f"{name} has no column {column!r}; it has: {', '.join(names) or 'no rows'}")
    found = TextRows(data, column, name) if hasattr(data, "__len__") else TextStream(data, column, name)
    if next(iter(found), None) is None:
        raise UserError(f"{name} holds no text: it has no rows")
    return found


@dataclass(frozen=True, eq=False)
class TextStream:
    """The texts of a streamed data set, which is read anew at each iteration."""

    data: Any
    column: str
    name: str

    def __iter__(self) -> Iterator[str]:
        return self.starting_at(0)

    def starting_at(self, number: int) -> Iterator[str]:
        """The texts from document `number` on; those before it are skipped."""
        rows = self.data.skip(number) if number else self.data
        for at, row in enumerate(rows, number):
            yield _text_of(row, self.column, self.name, at)


@dataclass(frozen=True, eq=False)
class TextRows(Sequence[str]):
    """The texts of a data set in memory (or mapped from disk), by number; each is read when it is asked for."""

    data: Any
    column: str
    name: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[at] for at in range(len(self))[number]]
        at = range(len(self))[number]  # raises IndexError beyond the end, which ends an iteration
        return _text_of(self.data[at], self.column, self.name, at)


def _text_of(row: Any, column: str, name: str, number: int) -> str:
    if not isinstance(row[column], str):
        raise UserError(f"{name}, row {number}: {column!r} must be a text; found {str(row[column])[:60]!r}")
    return row[column]
