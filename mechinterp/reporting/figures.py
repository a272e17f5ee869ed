"""Arrays to plotly figures.

A figure carries its own numbers: each trace that shows values has, in `customdata`, one row of numbers a cell, and in
`meta` the names of those columns and the facts of the whole figure (n, baseline). The report's details panel, table
and CSV are made from these, so a picture and its numbers cannot disagree.

Colours: effects are diverging and centred on 0 (red = positive, blue = negative: safe for the common colour
blindnesses). Nothing is said by colour alone: what passes its controls has a dot, or a bar without hatching; what is
undefined is a grey cell with a cross. Backgrounds are transparent; the report's page sets the text colour by theme.
"""

from __future__ import annotations

import copy
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots

from mechinterp.errors import UserError
from mechinterp.reporting.cells import COLUMNS, check_shape, escaped, fact_rows, floats, nullable, number_cells

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK = "#6b7280"  # readable on white and on near-black, where no page sets the theme
DIVERGING = [
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7",
    "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f",
]  # fmt: skip
BAR = "#4a7fc1"
ROW_HEIGHT, TOP, BOTTOM = 22, 44, 56


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
    colorbar: str = "effect",
) -> go.Figure:
    """A grid of effects, the first row at the top.

    Args:
        values: `[y x]`; NaN or None is an undefined cell, drawn grey with a cross.
        x, y: the labels of columns and rows.
        ci_low, ci_high: `[y x]`, the 95% interval.
        control: `[y x]`, the effect under the control (a donor prompt); NaN where it was not measured.
        passes: `[y x]` of bool, or None where not tested; true cells get a dot.
        labels: `[y x]` of names such as "L9H6"; by default "<y> · <x>".
        facts: what holds for all cells, such as `{"n": 64, "baseline": "clean 3.5, corrupted 0.1"}`.
        zmax: end of the colour scale, which is symmetric about 0; pass `largest(...)` to share it.

    Raises:
        UserError: the shapes do not agree.
    """
    z = floats(values)
    check_shape("values", z, (len(y), len(x)))
    names = [list(row) for row in labels] if labels is not None else [[f"{row} · {col}" for col in x] for row in y]
    cells = number_cells(z, names, ci_low, ci_high, control, passes)
    meta = {"kind": "effect", "columns": list(COLUMNS), "title": title, "facts": fact_rows(facts)}
    rows, columns = list(range(len(y))), list(range(len(x)))
    limit = zmax if zmax is not None else largest(z)
    figure = go.Figure()
    figure.add_heatmap(
        z=nullable(z), x=columns, y=rows, customdata=cells, text=escaped(names), meta=meta,
        zmin=-limit, zmax=limit, colorscale=_colorscale(), xgap=1, ygap=1, hoverongaps=False,
        hovertemplate=_hover(ci_low is not None, control is not None, passes is not None),
        colorbar={"title": {"text": html.escape(colorbar), "side": "top"}, "thickness": 12, "outlinewidth": 0},
    )  # fmt: skip
    _mark_undefined(figure, z, cells, names, meta)
    _mark_passing(figure, cells)
    figure.update_layout(**_layout(title, height=max(len(y) * ROW_HEIGHT, 132) + TOP + BOTTOM))
    figure.update_layout(meta={"max_width": max(420, 150 + 56 * len(x))})
    figure.update_xaxes(**_category_axis(x, x_title), side="bottom", range=[-0.5, len(x) - 0.5])
    figure.update_yaxes(**_category_axis(y, y_title), range=[len(y) - 0.5, -0.5])
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
    control_name: str = "donor control",
) -> go.Figure:
    """The top cells, one horizontal bar each, the first at the top, with its interval and its control.

    Every array has the shape `[cell]`. A bar that passes both controls is solid, one that fails is hatched; the
    control's effect is an open diamond on the same line.

    Raises:
        UserError: the shapes do not agree.
    """
    effects = floats(values)
    check_shape("values", effects, (len(labels),))
    cells = number_cells(effects, list(labels), ci_low, ci_high, control, passes)
    tested = passes is not None
    figure = go.Figure()
    groups = [(True, "passes both controls", ""), (False, "does not pass", "/")] if tested else [(None, "effect", "")]
    for wanted, name, hatch in groups:
        # NaN is not equal to itself, so an undefined bar belongs to the last group and draws nothing.
        rows = [i for i, cell in enumerate(cells) if wanted is None or (cell[5] == "yes") == wanted]
        if not rows:
            continue
        chosen = [cells[i] for i in rows]
        figure.add_bar(
            orientation="h", x=[cell[1] for cell in chosen], y=rows, width=0.62, name=name, customdata=chosen,
            text=escaped([cell[0] for cell in chosen]), textposition="none",
            meta={"kind": "bars", "columns": list(COLUMNS), "title": title, "facts": fact_rows(facts)},
            marker={"color": BAR if not hatch else "rgba(74,127,193,.35)", "line": {"color": BAR, "width": 1},
                    "pattern": {"shape": hatch, "fgcolor": BAR, "bgcolor": "rgba(0,0,0,0)", "size": 6}},
            error_x=_error_bars(chosen) if ci_low is not None and ci_high is not None else None,
            hovertemplate=_hover(ci_low is not None, control is not None, tested),
        )  # fmt: skip
    if control is not None:
        figure.add_scatter(
            x=[cell[4] for cell in cells], y=list(range(len(cells))), mode="markers", name=html.escape(control_name),
            marker={"symbol": "diamond-open", "size": 10, "color": INK, "line": {"width": 2}},
            meta={"kind": "control"}, hoverinfo="skip",
        )  # fmt: skip
    figure.update_layout(**_layout(title, height=len(labels) * 30 + TOP + BOTTOM + 28))
    figure.update_layout(barmode="overlay", showlegend=tested or control is not None, meta={"max_width": 760})
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "itemclick": False})
    figure.update_xaxes(title={"text": html.escape(x_title)}, zeroline=True, zerolinewidth=1, fixedrange=True)
    figure.update_yaxes(**_category_axis(labels, ""), range=[len(labels) - 0.5, -0.5])
    return figure


def small_multiples(figures: Mapping[str, go.Figure], *, columns: int = 2, title: str = "") -> go.Figure:
    """Heatmaps side by side under their names, on one colour scale and with one colour bar.

    Raises:
        UserError: there is no figure, or one holds no heatmap of effects.
    """
    if not figures:
        raise UserError("small_multiples was given no figure")
    columns = min(columns, len(figures))
    first = next(iter(figures.values()))
    n_rows = -(-len(figures) // columns)
    grids: dict[str, list[Any]] = {name: [t for t in f.data if _is_grid(t)] for name, f in figures.items()}
    empty = [name for name, traces in grids.items() if not traces]
    if empty:
        raise UserError(f"small_multiples takes heatmaps of effects; {empty[0]!r} holds none")
    limit = max(trace.zmax for traces in grids.values() for trace in traces)
    sizes = [figure.layout.height for figure in figures.values()]
    heights = [max(sizes[start : start + columns]) for start in range(0, len(sizes), columns)]
    inner = [height - TOP - BOTTOM for height in heights]
    total = sum(heights)
    joint = make_subplots(
        rows=n_rows, cols=columns, subplot_titles=[html.escape(name) for name in figures],
        row_heights=[value / sum(inner) for value in inner],
        vertical_spacing=(TOP + BOTTOM) / total if n_rows > 1 else 0, horizontal_spacing=0.22 / columns,
    )  # fmt: skip
    for index, (name, figure) in enumerate(figures.items()):
        row, column = index // columns + 1, index % columns + 1
        traces: Any = copy.deepcopy(figure.data)
        for trace in traces:
            if _is_grid(trace):
                trace.update(zmin=-limit, zmax=limit, showscale=index == 0, meta={**trace.meta, "title": name})
                trace.colorbar.update(len=min(1.0, 320 / total), yanchor="top", y=1)
            joint.add_trace(trace, row=row, col=column)
        joint.update_xaxes(figure.layout.xaxis.to_plotly_json(), row=row, col=column)
        joint.update_yaxes(figure.layout.yaxis.to_plotly_json(), row=row, col=column)
        if column > 1 and figure.layout.yaxis.title.text == first.layout.yaxis.title.text:
            joint.update_yaxes(title_text="", row=row, col=column)  # said once a row
    joint.update_layout(**_layout(title, height=total))
    widths = [figure.layout.meta["max_width"] for figure in figures.values()]
    joint.update_layout(meta={"max_width": min(1100, max(widths) * columns), "min_width": 230 * columns})
    return joint


# ---- parts of a figure ---------------------------------------------------------------------------------------------


def _mark_undefined(
    figure: go.Figure, z: NDArray[np.float64], cells: list[Any], names: list[Any], meta: dict[str, Any]
) -> None:
    undefined = np.argwhere(~np.isfinite(z))
    if not len(undefined):
        return
    grey = "rgba(128,134,145,.28)"
    figure.add_heatmap(
        z=[[None if np.isfinite(value) else 0 for value in row] for row in z],
        x=list(range(z.shape[1])), y=list(range(z.shape[0])), customdata=cells, text=escaped(names),
        colorscale=[[0, grey], [1, grey]], showscale=False, xgap=1, ygap=1, hoverongaps=False,
        meta={"kind": "undefined"}, hovertemplate="<b>%{text}</b><br>undefined<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=undefined[:, 1].tolist(), y=undefined[:, 0].tolist(), mode="markers", hoverinfo="skip", showlegend=False,
        marker={"symbol": "x-thin", "size": 6, "line": {"width": 1, "color": INK}}, meta={"kind": "mark"},
    )  # fmt: skip


def _mark_passing(figure: go.Figure, cells: list[Any]) -> None:
    passing = [(row, column) for row, line in enumerate(cells) for column, cell in enumerate(line) if cell[5] == "yes"]
    if passing:
        figure.add_scatter(
            x=[column for _, column in passing], y=[row for row, _ in passing], mode="markers", hoverinfo="skip",
            # white with a dark rim: seen on every colour of the scale, in both themes
            marker={"symbol": "circle", "size": 6, "color": "#ffffff", "line": {"width": 1.4, "color": "#111827"}},
            showlegend=False, meta={"kind": "mark"},
        )  # fmt: skip


def _is_grid(trace: Any) -> bool:
    return (trace.meta or {}).get("kind") == "effect"


def _error_bars(cells: list[Any]) -> dict[str, Any]:
    def gap(cell: list[Any], high: int, low: int) -> float | None:
        return None if cell[high] is None or cell[low] is None else max(cell[high] - cell[low], 0.0)

    return {
        "type": "data", "symmetric": False, "array": [gap(cell, 3, 1) for cell in cells],
        "arrayminus": [gap(cell, 1, 2) for cell in cells], "color": INK, "thickness": 1.6, "width": 4,
    }  # fmt: skip


def _hover(interval: bool, control: bool, passes: bool) -> str:
    lines = ["<b>%{text}</b>", "effect %{customdata[1]:.3f}"]
    if interval:
        lines.append("95% interval %{customdata[2]:.3f} to %{customdata[3]:.3f}")
    if control:
        lines.append("control %{customdata[4]:.3f}")
    if passes:
        lines.append("passes both controls: %{customdata[5]}")
    return "<br>".join(lines) + "<extra></extra>"


def _layout(title: str, height: int) -> dict[str, Any]:
    return {
        "template": go.layout.Template(), "title": {"text": html.escape(title), "x": 0, "xref": "paper"},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "dragmode": False, "hovermode": "closest",
        "font": {"family": FONT, "size": 12.5, "color": INK}, "height": height, "autosize": True,
        "margin": {"l": 56, "r": 16, "t": TOP, "b": BOTTOM},
    }  # fmt: skip


def _category_axis(labels: Sequence[object], title: str) -> dict[str, Any]:
    """Positions 0, 1, … under the labels: repeated tokens stay apart, and "1" is not read as a number."""
    step = max(1, len(labels) // 40)
    shown = list(range(0, len(labels), step))
    return {
        "tickmode": "array", "tickvals": shown, "ticktext": escaped([str(labels[i]) for i in shown]),
        "title": {"text": html.escape(title), "standoff": 8}, "showgrid": False, "zeroline": False, "ticks": "",
        "fixedrange": True, "automargin": True,
    }  # fmt: skip


def _colorscale() -> list[list[Any]]:
    return [[i / (len(DIVERGING) - 1), colour] for i, colour in enumerate(DIVERGING)]
