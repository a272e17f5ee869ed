"""What a command prints and writes: tables of text, files that were asked for."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

import mechinterp
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.reporting import Table
from mechinterp.results import plain

TOP = 12  # rows of a printed table


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns, numbers to the right. The last column of text is not padded."""
    cells = [tuple(columns), *[tuple(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    lines = []
    for row in cells:
        shown = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(shown).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    if text == "–":
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def frame_table(frame: pd.DataFrame, caption: str = "") -> Table:
    """The rows of a result's `top`, for a report; `frame_text` is the same for the terminal."""
    rows = [tuple(plain(value) for value in row) for row in frame.itertuples(index=False)]
    return Table(tuple(map(str, frame.columns)), tuple(rows), caption=caption, max_rows=TOP)


def frame_text(frame: pd.DataFrame) -> str:
    """A table as text."""
    made = frame_table(frame)
    return table(made.columns, [[shown(cell) for cell in row] for row in made.rows])


def manifest(model: HookedModel, about: Mapping[str, Any]) -> dict[str, Any]:
    """What made the numbers of a report that has no run folder."""
    packages = ("torch", "transformers", "transformer-lens")
    return {
        "mechinterp": mechinterp.__version__,
        **{name: metadata.version(name) for name in packages},
        "weights_sha256": model.weights_hash(),
        **{name: about[name] for name in ("seed", "pairs") if name in about},
    }


def shown(value: Any) -> str:
    """A cell as text: undefined as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def scientific(value: float | None) -> str:
    """A small number as text."""
    return "–" if value is None else f"{value:.1e}"


def save(path: Path, value: Any, write: Callable[[Path, Any], None]) -> None:
    """Write a file that was asked for, and say where it is."""
    try:
        write(path, value)
    except OSError as error:
        raise UserError(f"cannot write {path.absolute()}: {error.strerror or error}") from error
    print(f"wrote {path.absolute()}")
