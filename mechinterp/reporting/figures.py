"""Arrays to plotly figures.

A figure carries its own numbers: each trace that shows values has, in `customdata`, one row of numbers a cell, and in
`meta` the names of those columns and the facts of the whole figure (n, baseline). The report's details panel, table
and CSV are made from these, so a picture and its numbers cannot disagree.

Colours: effects are diverging and centred on 0 (red = positive, blue = negative), amounts such as probabilities are
sequential from 0 (pale to dark): both safe for the common colour blindnesses. Nothing is said by colour alone: what
passes its controls has a dot, or a bar without hatching; what is undefined is a grey cell with a cross. Backgrounds are
transparent; the report's page sets the text colour by theme.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from mechinterp.errors import UserError
from mechinterp.reporting.cells import (
    check_shape,
    column_names,
    escaped,
    fact_rows,
    floats,
    nullable,
    number_cells,
    shortened,
    visible,
)
from mechinterp.reporting.layout import (
    BOTTOM,
    GRID,
    INK,
    TOP,
    Scale,
    base,
    category_axis,
    colour_scale,
    hover,
    value_axis,
)

BAR = "#4a7fc1"
ROW_HEIGHT, TEXT_ROW_HEIGHT, TEXT_WIDTH = 22, 25, 9  # pixels, pixels, characters


def largest(*arrays: ArrayLike) -> float:
    """The largest absolute defined value: `zmax` of figures that share one scale. 1.0 where all is 0 or undefined."""
    values = np.concatenate([np.abs(floats(array)).ravel() for array in arrays]) if arrays else np.array([])
    values = values[np.isfinite(values)]
    return float(values.max()) if values.size and values.max() > 0 else 1.0


def heatmap(
    values: ArrayLike,
    x: Sequence[object],
    y: Sequence[object],
    *,
    ci_low: ArrayLike | None = None,
    ci_high: ArrayLike | None = None,
    control: ArrayLike | None = None,
    passes: ArrayLike | None = None,
    labels: Sequence[Sequence[str]] | None = None,
    facts: Mapping[str, object] | None = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    zmax: float | None = None,
    value: str = "effect",
    colorbar: str | None = None,
    scale: Scale = "diverging",
    text: Sequence[Sequence[str]] | None = None,
    more: Mapping[str, Any] | None = None,
    first_at_top: bool = True,
) -> go.Figure:
    """A grid of numbers, such as layers × heads, or layers × tokens with a token in each cell.

    Args:
        values: `[y x]`; NaN or None is an undefined cell, drawn grey with a cross.
        x, y: the labels of columns and rows (tokens: through `visible`, so that their spaces are seen).
        ci_low, ci_high: `[y x]`, the 95% interval.
        control: `[y x]`, the effect under the control (a donor prompt); NaN where it was not measured.
        passes: `[y x]` of bool, or None where not tested; true cells get a dot.
        labels: `[y x]` of names such as "L9H6"; by default "<y> · <x>".
        facts: what holds for all cells, such as `{"n": 64, "baseline": "clean 3.5, corrupted 0.1"}`.
        zmax: end of the colour scale; pass `largest(...)` to share it.
        value: what the numbers are, the name of their column: "effect", "probability", "entropy (nats)".
        colorbar: title of the colour bar, where it is not `value`.
        scale: "diverging", symmetric about 0; or "sequential", from 0, for what is never negative.
        text: `[y x]` of tokens drawn in the cells, blanks made visible, long ones shortened.
        more: further columns of the cells' numbers by name, `[y x]` each: shown in the details, the table and the CSV.
        first_at_top: whether the first row is the top one; a logit lens has its last layer there.

    Raises:
        UserError: the shapes do not agree, two columns share a name, or a sequential scale with negative values.
    """
    z = floats(values)
    check_shape("values", z, (len(y), len(x)))
    names = [list(row) for row in labels] if labels is not None else [[f"{row} · {col}" for col in x] for row in y]
    limit = zmax if zmax is not None else largest(z)
    if scale == "sequential" and (z < -1e-6 * limit).any():  # float noise below 0 is 0
        raise UserError(f"figure: a sequential scale starts at 0, and the smallest {value} is {np.nanmin(z):.3g}")
    extra = ({"text": text} if text is not None else {}) | dict(more or {})
    cells = number_cells(z, names, ci_low, ci_high, control, passes, extra)
    meta = _meta("effect" if scale == "diverging" else "amount", value, title, facts, extra)
    shown = escaped(names) if text is None else _with_text(names, text)
    figure = go.Figure()
    figure.add_heatmap(
        z=nullable(z), x=list(range(len(x))), y=list(range(len(y))), customdata=cells, meta=meta,
        **_text(shown, text, np.isfinite(z)),
        zmin=-limit if scale == "diverging" else 0, zmax=limit, colorscale=colour_scale(scale), xgap=1, ygap=1,
        hoverongaps=False, hovertemplate=hover(value, ci_low is not None, control is not None, passes is not None),
        colorbar={"title": {"text": html.escape(colorbar or value), "side": "top"}, "thickness": 12, "outlinewidth": 0},
    )  # fmt: skip
    _mark_undefined(figure, z, cells, shown)
    _mark_passing(figure, cells, 0.0 if text is None else 0.4)
    row_height = ROW_HEIGHT if text is None else TEXT_ROW_HEIGHT
    figure.update_layout(**base(title, height=max(len(y) * row_height, 132) + TOP + BOTTOM))
    widths = {"max_width": max(420, 150 + 50 * len(x))}
    figure.update_layout(
        meta=widths if text is None else {"max_width": 190 + 80 * len(x), "min_width": 190 + 62 * len(x)}
    )
    figure.update_xaxes(**category_axis(x, x_title), side="bottom", range=[-0.5, len(x) - 0.5])
    ends = [len(y) - 0.5, -0.5]
    figure.update_yaxes(**category_axis(y, y_title), range=ends if first_at_top else ends[::-1])
    return figure


def bars(
    labels: Sequence[str],
    values: ArrayLike,
    *,
    ci_low: ArrayLike | None = None,
    ci_high: ArrayLike | None = None,
    control: ArrayLike | None = None,
    passes: ArrayLike | None = None,
    facts: Mapping[str, object] | None = None,
    title: str = "",
    x_title: str = "effect",
    value: str = "effect",
    control_name: str = "donor control",
) -> go.Figure:
    """The top cells, one horizontal bar each, the first at the top, with its interval and its control.

    Every array has the shape `[cell]`. A bar that passes its controls is solid, one that fails is hatched; the
    control's effect is an open diamond on the same line. `value` is what the numbers are, the name of their column.

    Raises:
        UserError: the shapes do not agree.
    """
    effects = floats(values)
    check_shape("values", effects, (len(labels),))
    cells = number_cells(effects, list(labels), ci_low, ci_high, control, passes)
    tested = passes is not None
    meta = _meta("bars", value, title, facts) | {"control": control_name}
    figure = go.Figure()
    groups = [(True, "passes its controls", ""), (False, "does not pass", "/")] if tested else [(None, value, "")]
    for wanted, name, hatch in groups:
        # NaN is not equal to itself, so an undefined bar belongs to the last group and draws nothing.
        rows = [i for i, cell in enumerate(cells) if wanted is None or (cell[5] == "yes") == wanted]
        if not rows:
            continue
        chosen = [cells[i] for i in rows]
        figure.add_bar(
            orientation="h", x=[cell[1] for cell in chosen], y=rows, width=0.62, name=html.escape(name),
            customdata=chosen, text=escaped([cell[0] for cell in chosen]), textposition="none", meta=meta,
            marker={"color": BAR if not hatch else "rgba(74,127,193,.35)", "line": {"color": BAR, "width": 1},
                    "pattern": {"shape": hatch, "fgcolor": BAR, "bgcolor": "rgba(0,0,0,0)", "size": 6}},
            error_x=_error_bars(chosen) if ci_low is not None and ci_high is not None else None,
            hovertemplate=hover(value, ci_low is not None, control is not None, tested),
        )  # fmt: skip
    if control is not None:
        figure.add_scatter(
            x=[cell[4] for cell in cells], y=list(range(len(cells))), mode="markers", name=html.escape(control_name),
            marker={"symbol": "diamond-open", "size": 10, "color": INK, "line": {"width": 2}},
            meta={"kind": "control"}, hoverinfo="skip",
        )  # fmt: skip
    figure.update_layout(**base(title, len(labels) * 30 + TOP + BOTTOM, legend=tested or control is not None))
    figure.update_layout(barmode="overlay", meta={"max_width": 760})
    figure.update_xaxes(**value_axis(x_title), zeroline=True)
    figure.update_yaxes(**category_axis(labels, ""), range=[len(labels) - 0.5, -0.5])
    return figure


# ---- parts of a figure ---------------------------------------------------------------------------------------------


def _meta(
    kind: str, value: str, title: str, facts: Mapping[str, object] | None, more: Iterable[str] = ()
) -> dict[str, Any]:
    """What the page must know of a trace to show its numbers."""
    columns = column_names(value, more)
    return {"kind": kind, "columns": columns, "value": value, "title": title, "facts": fact_rows(facts)}


def _with_text(names: list[Any], text: Sequence[Sequence[str]]) -> list[list[str]]:
    """What a hover label is headed with: the cell's name and the whole token in it."""
    return [
        [escaped(f"{name}: {visible(token)}") for name, token in zip(*rows, strict=True)]
        for rows in zip(names, text, strict=True)
    ]


def _text(names: list[Any], text: Sequence[Sequence[str]] | None, defined: NDArray[np.bool_]) -> dict[str, Any]:
    """The names of the cells, drawn only on hover, and the tokens drawn in them."""
    if text is None:
        return {"text": names}
    drawn = [
        [escaped(shortened(visible(token), TEXT_WIDTH)) if here else "" for token, here in zip(*rows, strict=True)]
        for rows in zip(text, defined, strict=True)
    ]
    return {"text": drawn, "hovertext": names, "texttemplate": "%{text}", "textfont": {"size": 11}}


def _mark_undefined(figure: go.Figure, z: NDArray[np.float64], cells: list[Any], names: list[Any]) -> None:
    undefined = np.argwhere(~np.isfinite(z))
    if not len(undefined):
        return
    figure.add_heatmap(
        z=[[None if np.isfinite(value) else 0 for value in row] for row in z],
        x=list(range(z.shape[1])), y=list(range(z.shape[0])), customdata=cells, text=names,
        colorscale=[[0, GRID], [1, GRID]], showscale=False, xgap=1, ygap=1, hoverongaps=False,
        meta={"kind": "undefined"}, hovertemplate="<b>%{text}</b><br>undefined<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=undefined[:, 1].tolist(), y=undefined[:, 0].tolist(), mode="markers", hoverinfo="skip", showlegend=False,
        marker={"symbol": "x-thin", "size": 6, "line": {"width": 1, "color": INK}}, meta={"kind": "mark"},
    )  # fmt: skip


def _mark_passing(figure: go.Figure, cells: list[Any], aside: float) -> None:
    passing = [(row, column) for row, line in enumerate(cells) for column, cell in enumerate(line) if cell[5] == "yes"]
    if passing:
        figure.add_scatter(
            x=[column - aside for _, column in passing], y=[row for row, _ in passing], mode="markers",
            hoverinfo="skip", showlegend=False, meta={"kind": "mark"},
            # white with a dark rim: seen on every colour of the scale, in both themes
            marker={"symbol": "circle", "size": 6, "color": "#ffffff", "line": {"width": 1.4, "color": "#111827"}},
        )  # fmt: skip


def _error_bars(cells: list[Any]) -> dict[str, Any]:
    def gap(cell: list[Any], high: int, low: int) -> float | None:
        return None if cell[high] is None or cell[low] is None else max(cell[high] - cell[low], 0.0)

    return {
        "type": "data", "symmetric": False, "array": [gap(cell, 3, 1) for cell in cells],
        "arrayminus": [gap(cell, 1, 2) for cell in cells], "color": INK, "thickness": 1.6, "width": 4,
    }  # fmt: skip
