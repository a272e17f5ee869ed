"""Lines with their intervals: numbers by layer, by position, by strength, by how many heads are knocked out.

As the other figures, each line carries its own numbers (`customdata`, `meta`), from which the page makes the details,
the table and the CSV. A line is told by its marker and by its colour; a control is grey, dashed, and has open markers.
What is undefined is a gap, and a point between two gaps keeps its marker and its interval.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from mechinterp.errors import UserError
from mechinterp.reporting.cells import check_shape, escaped, fact_rows, floats, null
from mechinterp.reporting.layout import BOTTOM, INK, TOP, base, value_axis

# Contrast above 3 on white and on near-black, and apart under the three colour blindnesses (Machado et al. 2009).
COLOURS = ("#1a6fd4", "#b5502d", "#10a36e", "#a5559f", "#9b8900", "#8046f0")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")  # one more than the colours
DASHES = ("dash", "dot", "dashdot", "longdash")
HEIGHT = 320
MANY = 40  # points of which every marker is drawn


def curves(
    x: ArrayLike,
    lines: Mapping[str, ArrayLike],
    *,
    ci_low: Mapping[str, ArrayLike] | None = None,
    ci_high: Mapping[str, ArrayLike] | None = None,
    x_title: str = "x",
    y_title: str = "value",
    title: str = "",
    facts: Mapping[str, object] | None = None,
    dashed: Collection[str] = (),
    log_y: bool = False,
    x_labels: Sequence[object] | None = None,
) -> go.Figure:
    """Lines over one x axis, each with its 95% interval as a band.

    Args:
        x: `[x]`, finite and in the order in which the points are joined: layers, positions, strengths.
        lines: name -> `[x]`; NaN or None is a gap.
        ci_low, ci_high: name -> `[x]`, for the lines that have an interval.
        x_title, y_title: what the axes are; also the names of these columns in the table and the CSV.
        facts: what holds for all points, such as `{"n": 64, "control": "random heads of the same layers"}`.
        dashed: names of the lines that are controls.
        log_y: a logarithmic axis. Points at or below 0 cannot be drawn on it; the axis says how many there are.
        x_labels: `[x]` shown in place of the numbers on the axis, such as tokens (through `visible`).

    Raises:
        UserError: no line, shapes that do not agree, an x that is not finite, an interval or a control of no line.
    """
    at = floats(x)
    if not lines or at.ndim != 1 or not at.size or not np.isfinite(at).all():
        raise UserError(f"curves: needs lines over finite x; found {len(lines)} over x of shape {list(at.shape)}")
    if set(ci_low or ()) != set(ci_high or ()):
        raise UserError("curves: ci_low and ci_high name different lines; an interval has two ends")
    _refuse_strangers(lines, ci_low=ci_low or (), ci_high=ci_high or (), dashed=dashed)
    columns = ["line", x_title, "x_label", y_title, "ci_low", "ci_high"]
    if len(set(columns)) < len(columns):
        raise UserError(f"curves: x_title {x_title!r} and y_title {y_title!r} make two columns alike, of {columns}")
    labels: list[Any] = [None] * len(at) if x_labels is None else [str(label) for label in x_labels]
    check_shape("x_labels", np.array(labels, dtype=object), at.shape)
    places = [int(one) if one.is_integer() else one for one in at.tolist()]
    values = {name: _on(at, f"line {name!r}", array) for name, array in lines.items()}
    meta = {"kind": "curve", "columns": columns, "value": y_title, "title": title, "facts": fact_rows(facts)}
    looks = _looks(lines, dashed)
    figure = go.Figure()
    for name, y in values.items():
        low, high = (_on(at, f"the interval of {name!r}", (side or {}).get(name)) for side in (ci_low, ci_high))
        rows = [
            [null(item) for item in row] for row in zip([name] * len(at), places, labels, y, low, high, strict=True)
        ]
        if len(at) > MANY and np.isfinite(y).all():  # markers tell the lines apart, and need not be at every point
            looks[name]["marker"]["maxdisplayed"] = MANY // 2
        _add_band(figure, places, low, high, looks[name]["line"]["color"], log_y)
        figure.add_scatter(
            x=places, y=[null(one) if one > 0 or not log_y else None for one in y.tolist()], mode="lines+markers",
            name=html.escape(name), connectgaps=False, customdata=rows, meta=meta, text=_headings(rows, x_title),
            hovertemplate=_hover(y_title, bool(np.isfinite(low).any())), **looks[name],
        )  # fmt: skip
    shown = np.concatenate([*values.values(), *(floats(low) for low in (ci_low or {}).values())])
    figure.update_layout(**base(title, HEIGHT + TOP + BOTTOM, legend=len(values) > 1), meta={"max_width": 760})
    figure.update_xaxes(**value_axis(x_title), **_ticks(places, x_labels), zeroline=False, showgrid=False)
    figure.update_yaxes(**value_axis(y_title), **_y_scale(log_y, shown))
    if log_y:
        _say_log(figure, sum(int((y <= 0).sum()) for y in values.values()))
    return figure


def _refuse_strangers(lines: Mapping[str, ArrayLike], **named: Iterable[str]) -> None:
    for what, names in named.items():
        strangers = [name for name in names if name not in lines]
        if strangers:
            raise UserError(f"curves: {what} names {strangers[0]!r}; the lines are {', '.join(lines)}")


def _on(x: NDArray[np.float64], name: str, array: ArrayLike | None) -> NDArray[np.float64]:
    """An array over x; undefined everywhere where there is none."""
    made = np.full(x.shape, np.nan) if array is None else floats(array)
    check_shape(name, made, x.shape)
    return made


# ---- how a line looks ----------------------------------------------------------------------------------------------


def _looks(lines: Iterable[str], dashed: Collection[str]) -> dict[str, dict[str, Any]]:
    """Of each line, its own marker and colour; of a control, its own dash and an open marker."""
    looks: dict[str, dict[str, Any]] = {}
    for name in lines:
        index = sum((other in dashed) == (name in dashed) for other in looks)
        control = name in dashed
        colour = INK if control else COLOURS[index % len(COLOURS)]
        symbol = MARKERS[index % len(MARKERS)] + ("-open" if control else "")
        looks[name] = {
            "line": {"color": colour, "width": 2, "dash": DASHES[index % len(DASHES)] if control else "solid"},
            "marker": {"symbol": symbol, "size": 7, "color": colour},
        }
    return looks


def _add_band(
    figure: go.Figure, x: Sequence[float], low: NDArray[np.float64], high: NDArray[np.float64], colour: str, log_y: bool
) -> None:
    """The interval as one closed shape a stretch without gaps; a lone point's is a line."""
    drawn = np.isfinite(low) & np.isfinite(high) & ((high > 0) | (not log_y))
    if not drawn.any():
        return
    if log_y:  # an interval that reaches 0 ends at the lowest number that the axis shows
        low = np.where(low > 0, low, np.min(np.concatenate([low[low > 0], high[high > 0]])))
    outline_x: list[float | None] = []
    outline_y: list[float | None] = []
    for stretch in np.split(np.arange(len(x)), np.flatnonzero(np.diff(drawn)) + 1):
        if drawn[stretch[0]]:
            outline_x += [x[i] for i in stretch] + [x[i] for i in stretch[::-1]] + [None]
            outline_y += [*high[stretch].tolist(), *low[stretch][::-1].tolist(), None]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_scatter(
        x=outline_x[:-1], y=outline_y[:-1], mode="lines", fill="toself", hoverinfo="skip", showlegend=False,
        fillcolor=f"rgba({red},{green},{blue},.2)", line={"width": 1, "color": f"rgba({red},{green},{blue},.3)"},
        meta={"kind": "band"},
    )  # fmt: skip


def _headings(rows: list[list[Any]], x_title: str) -> list[str]:
    return [
        escaped(f"{name} · {x_title} {place}" + (f" ({label})" if label is not None else ""))
        for name, place, label, *_ in rows
    ]


def _hover(y_title: str, interval: bool) -> str:
    lines = ["<b>%{text}</b>", f"{html.escape(y_title)} %{{customdata[3]:.4~g}}"]
    if interval:
        lines.append("95% interval %{customdata[4]:.4~g} to %{customdata[5]:.4~g}")
    return "<br>".join(lines) + "<extra></extra>"


# ---- axes ----------------------------------------------------------------------------------------------------------


def _ticks(x: Sequence[float], labels: Sequence[object] | None) -> dict[str, Any]:
    if labels is not None:
        shown = range(0, len(x), max(1, len(x) // 40))
        names = escaped([str(labels[i]) for i in shown])
        return {"tickmode": "array", "tickvals": [x[i] for i in shown], "ticktext": names}
    if all(isinstance(one, int) for one in x) and max(x) - min(x) <= 12:
        return {"dtick": 1}  # no tick at layer 0.5
    return {}


def _y_scale(log_y: bool, shown: NDArray[np.float64]) -> dict[str, Any]:
    if not log_y:  # no room below 0 for what cannot lie there
        return {} if (shown < 0).any() else {"rangemode": "nonnegative"}
    positive = shown[shown > 0]
    decades = np.log10(positive.max() / positive.min()) if positive.size else 0
    return {"type": "log", "exponentformat": "power"} | ({"dtick": 1} if decades > 2 else {})


def _say_log(figure: go.Figure, hidden: int) -> None:
    note = "log scale" + (f"; {hidden} at or below 0 not drawn" if hidden else "")
    figure.add_annotation(
        text=note, xref="paper", yref="paper", x=0, y=0, xanchor="left", yanchor="bottom", showarrow=False, xshift=4,
        font={"size": 11},
    )  # fmt: skip
