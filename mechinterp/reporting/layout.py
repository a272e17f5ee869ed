"""What the figures share: fonts, sizes, colours, axes and the lines of a hover label."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from mechinterp.reporting.cells import escaped

Scale = Literal["diverging", "sequential"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK = "#6b7280"  # readable on white and on near-black, where no page sets the theme
GRID = "rgba(128,134,145,.28)"
TOP, BOTTOM, LEGEND = 44, 46, 28
DIVERGING = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7",
    "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f",
)  # fmt: skip
SEQUENTIAL = ("#f4f7f6", "#d3e9e3", "#a3d3d0", "#6bb5c0", "#3f92ae", "#2a6c98", "#22477a", "#162650")


def base(title: str, height: int, legend: bool = False) -> dict[str, Any]:
    """The layout of every figure: transparent, the title at the left, a legend in a line of its own below it."""
    extra = LEGEND if legend else 0
    made = {
        "template": go.layout.Template(), "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "title": {"text": html.escape(title), "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 14}},
        "dragmode": False, "hovermode": "closest", "font": {"family": FONT, "size": 12.5, "color": INK},
        "height": height + extra, "autosize": True, "margin": {"l": 56, "r": 16, "t": TOP + extra, "b": BOTTOM},
        "showlegend": legend,
    }  # fmt: skip
    if legend:
        made["legend"] = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "itemclick": False}
    return made


def category_axis(labels: Sequence[object], title: str) -> dict[str, Any]:
    """Positions 0, 1, … under the labels: repeated tokens stay apart, and "1" is not read as a number."""
    step = max(1, len(labels) // 40)
    shown = list(range(0, len(labels), step))
    return {
        "tickmode": "array", "tickvals": shown, "ticktext": escaped([str(labels[i]) for i in shown]),
        "title": {"text": html.escape(title), "standoff": 8}, "showgrid": False, "zeroline": False, "ticks": "",
        "fixedrange": True, "automargin": True, "autotickangles": [0, -45, -90],
    }  # fmt: skip


def value_axis(title: str) -> dict[str, Any]:
    """An axis of numbers."""
    return {
        "title": {"text": html.escape(title), "standoff": 8}, "gridcolor": GRID, "zerolinecolor": GRID,
        "zerolinewidth": 1, "fixedrange": True, "automargin": True,
    }  # fmt: skip


def colour_scale(scale: Scale) -> list[list[Any]]:
    """As plotly wants it: red = positive and blue = negative about a pale 0, or pale 0 to dark."""
    colours = DIVERGING if scale == "diverging" else SEQUENTIAL
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def hover(value: str, interval: bool, control: bool, passes: bool) -> str:
    """The label of a cell or a bar: its name, then its numbers."""
    lines = ["<b>%{text}</b>", f"{html.escape(value)} %{{customdata[1]:.3f}}"]
    if interval:
        lines.append("95% interval %{customdata[2]:.3f} to %{customdata[3]:.3f}")
    if control:
        lines.append("control %{customdata[4]:.3f}")
    if passes:
        lines.append("passes its controls: %{customdata[5]}")
    return "<br>".join(lines) + "<extra></extra>"
