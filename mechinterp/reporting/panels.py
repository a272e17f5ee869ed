"""Heatmaps side by side."""

from __future__ import annotations

import copy
import html
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechinterp.errors import UserError
from mechinterp.reporting.layout import BOTTOM, TOP, base


def small_multiples(figures: Mapping[str, go.Figure], *, columns: int = 2, title: str = "") -> go.Figure:
    """Heatmaps side by side under their names, on one colour scale and with one colour bar.

    Raises:
        UserError: there is no figure, one is not a heatmap (bars and curves stand alone), or their scales or columns
            of numbers differ.
    """
    if not figures:
        raise UserError("small_multiples was given no figure")
    columns = min(columns, len(figures))
    first = next(iter(figures.values()))
    n_rows = -(-len(figures) // columns)
    grids: dict[str, list[Any]] = {name: [t for t in f.data if _is_grid(t)] for name, f in figures.items()}
    empty = [name for name, traces in grids.items() if not traces]
    if empty:
        raise UserError(
            f"small_multiples takes heatmaps; {empty[0]!r} holds none: put its figure into the report itself"
        )
    kinds = {trace.meta["kind"] for traces in grids.values() for trace in traces}
    if len(kinds) > 1:
        raise UserError("small_multiples puts heatmaps on one colour scale; these are diverging and sequential ones")
    names = {tuple(trace.meta["columns"]) for traces in grids.values() for trace in traces}
    if len(names) > 1:
        raise UserError(
            "small_multiples puts its numbers into one table; give all heatmaps the same `value` and `more`"
        )
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
                trace.update(
                    zmin=-limit if "effect" in kinds else 0,
                    zmax=limit,
                    showscale=index == 0,
                    meta={**trace.meta, "title": name},
                )
                trace.colorbar.update(len=min(1.0, 320 / total), yanchor="top", y=1)
            joint.add_trace(trace, row=row, col=column)
        joint.update_xaxes(figure.layout.xaxis.to_plotly_json(), row=row, col=column)
        joint.update_yaxes(figure.layout.yaxis.to_plotly_json(), row=row, col=column)
        if column > 1 and figure.layout.yaxis.title.text == first.layout.yaxis.title.text:
            joint.update_yaxes(title_text="", row=row, col=column)  # said once a row
    joint.update_layout(**base(title, height=total))
    sizes = [figure.layout.meta for figure in figures.values()]
    widest, least = (max(size.get(name, 230) for size in sizes) for name in ("max_width", "min_width"))
    joint.update_layout(
        meta={"max_width": max(min(1100, widest * columns), least * columns), "min_width": least * columns}
    )
    return joint


def _is_grid(trace: Any) -> bool:
    return (trace.meta or {}).get("kind") in ("effect", "amount")
