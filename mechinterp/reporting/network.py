"""A circuit as a figure: nodes in rows from the input at the bottom to the output at the top, edges as curves.

1. A row is a layer's heads, with what they share below them; MLPs have a lane of their own at the right, so that the
   many edges among them are arcs beside the rest. Columns are those of the heads' numbers, as in a heatmap.
2. An edge's width is its |score| on a square-root scale, in a few classes; red helps, blue and dashed hurts, in the
   colours of the diverging scale; grey has no score, or 0. Edges between the same two nodes lie side by side.
3. An edge carries its numbers at its middle (`customdata`), as all figures do. The page makes its whole curve answer to
   the pointer, and lights up the edges of a chosen node (graph.js).
"""

from __future__ import annotations

import html
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from mechinterp.errors import UserError
from mechinterp.reporting.cells import escaped, fact_rows, null
from mechinterp.reporting.layout import DIVERGING, INK, TOP, base

Kind = Literal["embed", "head", "attention", "mlp", "neuron", "input", "logits"]

Point = tuple[float, float]
LANE_KINDS = ("mlp", "neuron")
WIDTH, LANE = 760, 164  # pixels: of the figure; of the lane at the right, arcs included
POINTS = 24  # of a curve
FEW = 60  # edges, of which each can say which input it enters
CLASSES = 5  # of width
THIN, THICK = 0.9, 6.5  # pixels
# pixels above the lowest row of a layer
ABOVE: dict[Kind, int] = {"input": 0, "head": 26, "attention": 56, "mlp": 58, "neuron": 58, "embed": 0, "logits": 0}
STEP = (44, 110)  # pixels between two layers: least, most


@dataclass(frozen=True)
class Node:
    """What is drawn as a dot.

    Attributes:
        name: such as `a9.h6`.
        label: in the dot, such as "h6".
        kind: of `graph.Source`, "input" for what several heads share, "logits".
        layer: −1 for the input, the number of layers for the output.
        column: a head's number; where it does not apply, 0.
        view: its name in an attention view ("L9H6"), if it may have one.
    """

    name: str
    label: str
    kind: Kind
    layer: int
    column: float = 0
    view: str | None = None


@dataclass(frozen=True)
class Edge:
    """What is drawn as a curve: its name, the nodes that it joins, and its numbers (None: not known)."""

    name: str
    source: str
    target: str
    score: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    inclusion: float | None = None


def network(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    feeds: Sequence[tuple[str, str]] = (),
    *,
    title: str = "",
    facts: Mapping[str, object] | None = None,
) -> go.Figure:
    """The figure.

    Args:
        nodes: in the order in which the keyboard goes through a row.
        edges: the strongest one is drawn last, over the others.
        feeds: pairs of nodes that are joined by a thin line, without a number.
        title: shown above it.
        facts: what holds for all edges.

    Raises:
        UserError: nothing to draw, or an edge of a node that is not given.
    """
    known = {node.name: i for i, node in enumerate(nodes)}
    strangers = [end for one in [*((e.source, e.target) for e in edges), *feeds] for end in one if end not in known]
    if strangers or not edges:
        raise UserError(f"network: {f'no node {strangers[0]!r}' if strangers else 'no edge'} to draw")
    places, height = _places(nodes)
    order = sorted(edges, key=lambda edge: abs(edge.score or 0.0))
    figure = go.Figure()
    for source, target in feeds:
        ends = [places[source], places[target]]
        figure.add_scatter(
            x=[x for x, _ in ends], y=[y for _, y in ends], mode="lines", hoverinfo="skip", showlegend=False,
            line={"color": INK, "width": 1, "dash": "dot"}, meta={"kind": "feed"},
        )  # fmt: skip
    curves = _curves(order, nodes, places)
    _add_edges(figure, order, curves)
    _add_numbers(figure, order, curves, known, title, facts)
    _add_nodes(figure, nodes, places)
    figure.update_layout(**base(title, height, legend=any(edge.score is not None for edge in edges)))
    figure.update_layout(margin={"l": 8, "r": 8, "b": 12}, meta={"max_width": WIDTH, "min_width": 560})
    figure.update_xaxes(visible=False, fixedrange=True, range=[0, WIDTH])
    figure.update_yaxes(visible=False, fixedrange=True, range=[0, height - TOP - 12])
    if len(edges) <= FEW:
        _say_inputs(figure, order, curves)
    _say_layers(figure, nodes, places)
    return figure


# ---- where things are ----------------------------------------------------------------------------------------------


def _places(nodes: Sequence[Node]) -> tuple[dict[str, Point], int]:
    """x and y of every node in pixels, and the height of the figure."""
    spans = [(math.floor(node.column), math.ceil(node.column)) for node in nodes if node.kind in ("head", "input")]
    columns = sorted({column for span in spans for column in span})
    has_lane = any(node.kind in LANE_KINDS for node in nodes)
    left, right = 78.0, float(WIDTH - (LANE if has_lane else 40))
    step = min((right - left) / max(len(columns), 1), 92)
    first = left + (right - left - step * len(columns)) / 2
    layers: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        layers[node.layer].append(node)
    rise = float(np.clip(620 / len(layers), *STEP))
    places: dict[str, Point] = {}
    y = 30.0
    for layer in sorted(layers):
        lowest = min(ABOVE[node.kind] for node in layers[layer])
        for node in layers[layer]:
            at = y + ABOVE[node.kind] - lowest
            if node.kind in LANE_KINDS:
                places[node.name] = (right + 34, at)
            elif node.kind in ("head", "input"):
                among = float(np.interp(node.column, columns, range(len(columns))))
                places[node.name] = (first + step * (among + 0.5), at)
            else:
                places[node.name] = ((left + right) / 2, at)
        y = max(places[node.name][1] for node in layers[layer]) + rise
    return places, int(y - rise + 34 + TOP + 12)


def _curves(edges: Sequence[Edge], nodes: Sequence[Node], places: Mapping[str, Point]) -> list[NDArray[np.float64]]:
    """`[POINTS 2]` of each edge: a Bézier curve that leaves a head upwards and enters one from below, and leaves and
    enters the lane of the MLPs sideways, so that it passes between the rows."""
    lane = {node.name for node in nodes if node.kind in LANE_KINDS}
    apart = 20.0 if len(edges) <= FEW else 8.0
    count: Counter[tuple[str, str]] = Counter()
    t = np.linspace(0, 1, POINTS)[:, None]
    shares = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
    made = []
    for edge in edges:
        ends = edge.source, edge.target
        start, end = (np.array(places[name]) for name in ends)
        rise, run = end[1] - start[1], end[0] - start[0]
        number = min(count[ends], 6)  # of those between the same nodes: to the right, to the left, further right, …
        count[ends] += 1
        beside = (number + 1) // 2 * apart
        up = np.array([0.0, max(rise * 0.5, 14.0)])
        leave, enter = up, -up
        if ends[0] in lane and ends[1] in lane:
            bend = np.array([(14 + 76 * (1 - np.exp(-rise / 420)) + beside) * 4 / 3, 0.0])
            leave, enter = up / 2 + bend, bend - up / 2
        else:
            # straight up would hide behind what lies between
            side = 1 if number % 2 == 0 else -1
            bend = np.array([side * (np.clip(rise / 8, 0, 46) * np.exp(-abs(run) / 120) + beside) * 4 / 3, 0.0])
            if ends[0] in lane:
                start, leave = start + np.array([0.0, 6.0]), np.array([run * 0.6, beside])
            if ends[1] in lane:
                end, enter = end - np.array([0.0, 6.0]), np.array([-run * 0.6, -beside])
            leave, enter = leave + bend, enter + bend
        corners = [start, start + leave, end + enter, end]
        made.append(np.sum([share * corner for share, corner in zip(shares, corners, strict=True)], axis=0))
    return made


# ---- what is drawn -------------------------------------------------------------------------------------------------


def _add_edges(figure: go.Figure, edges: Sequence[Edge], curves: Sequence[NDArray[np.float64]]) -> None:
    """A trace for each sign and class of width, the widest last; and what the legend shows."""
    largest = max((abs(edge.score) for edge in edges if edge.score is not None), default=0.0) or 1.0
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, edge in enumerate(edges):
        sign = int(np.sign(edge.score or 0.0))
        rank = 2 if edge.score is None else max(1, int(np.ceil(np.sqrt(abs(edge.score) / largest) * CLASSES)))
        members[rank, sign].append(i)
    for (rank, sign), chosen in sorted(members.items()):
        x, y = [], []
        for i in chosen:
            x += [*(round(float(one), 1) for one in curves[i][:, 0]), None]
            y += [*(round(float(one), 1) for one in curves[i][:, 1]), None]
        figure.add_scatter(
            x=x, y=y, mode="lines", hoverinfo="skip", showlegend=False,
            line=_line(rank, sign), opacity=0.45 + 0.5 * rank / CLASSES,
            meta={"kind": "edge", "sign": sign, "edges": chosen, "points": POINTS + 1},
        )  # fmt: skip
    for sign, name in ((1, "helps (positive score)"), (-1, "hurts (negative score)")):
        if any(of == sign for _, of in members):
            figure.add_scatter(
                x=[None], y=[None], mode="lines", name=name, line=_line(4, sign), meta={"kind": "key", "sign": sign}
            )


def _line(rank: int, sign: int) -> dict[str, Any]:
    colour = {1: DIVERGING[-2], -1: DIVERGING[1], 0: INK}[sign]
    width = THIN + (THICK - THIN) * ((rank - 1) / (CLASSES - 1)) ** 1.3
    return {"color": colour, "width": round(width, 2), "dash": "6px,3px" if sign < 0 else "solid", "simplify": False}


def _hover(edge: Edge) -> str:
    lines = [f"<b>{html.escape(edge.name, quote=False)}</b>"]
    if edge.score is not None:
        lines.append(f"score {edge.score:.3g}")
    if edge.ci_low is not None and edge.ci_high is not None:
        lines.append(f"95% interval {edge.ci_low:.3g} to {edge.ci_high:.3g}")
    if edge.inclusion is not None:
        lines.append(f"inclusion probability {edge.inclusion:.2f}")
    return "<br>".join(lines)


def _add_numbers(
    figure: go.Figure,
    edges: Sequence[Edge],
    curves: Sequence[NDArray[np.float64]],
    known: Mapping[str, int],
    title: str,
    facts: Mapping[str, object] | None,
) -> None:
    """A clear point at the middle of each edge, which has its numbers: for a click, the table and the CSV."""
    columns = ["edge", "score", "ci_low", "ci_high"]
    columns += ["inclusion"] if any(edge.inclusion is not None for edge in edges) else []
    rows = [(edge.name, edge.score, edge.ci_low, edge.ci_high, edge.inclusion) for edge in edges]
    cells = [[null(value) for value in row[: len(columns)]] for row in rows]
    middle = [curve[POINTS // 2] for curve in curves]
    figure.add_scatter(
        x=[round(float(x), 1) for x, _ in middle], y=[round(float(y), 1) for _, y in middle], mode="markers",
        marker={"size": 9, "opacity": 0}, text=[_hover(edge) for edge in edges], showlegend=False, customdata=cells,
        hovertemplate="%{text}<extra></extra>",
        meta={"kind": "network", "columns": columns, "value": "score", "title": title, "facts": fact_rows(facts),
              "ends": [[known[edge.source], known[edge.target]] for edge in edges]},
    )  # fmt: skip


def _add_nodes(figure: go.Figure, nodes: Sequence[Node], places: Mapping[str, Point]) -> None:
    """Dots over the edges: circles for heads, squares for MLPs, diamonds for what is shared."""
    symbols = {"mlp": "square", "neuron": "square", "input": "diamond"}
    crowded = max(Counter(node.column for node in nodes if node.kind == "head").keys(), default=0) > 16
    sizes = {"input": 9, "head": 17 if crowded else 25, "mlp": 25, "attention": 25}
    figure.add_scatter(
        x=[places[node.name][0] for node in nodes], y=[places[node.name][1] for node in nodes], mode="markers+text",
        text=escaped([node.label if node.kind != "input" else "" for node in nodes]),
        hovertext=escaped([node.name for node in nodes]), hovertemplate="<b>%{hovertext}</b><extra></extra>",
        textfont={"size": 9 if crowded else 10.5, "color": "#16191f"}, showlegend=False, cliponaxis=False,
        marker={"symbol": [symbols.get(node.kind, "circle") for node in nodes], "opacity": 1,
                "size": [sizes.get(node.kind, 40) for node in nodes], "color": "#ffffff",
                "line": {"color": INK, "width": 1.4}},
        meta={"kind": "node", "names": [node.name for node in nodes], "views": [node.view for node in nodes]},
    )  # fmt: skip


def _say_inputs(figure: go.Figure, edges: Sequence[Edge], curves: Sequence[NDArray[np.float64]]) -> None:
    """q, k or v on each edge that enters one of them, where there are few edges; higher up on one that lies beside."""
    count: Counter[tuple[str, str]] = Counter()
    said: list[tuple[str, float, float, int]] = []
    for i, (edge, curve) in enumerate(zip(edges, curves, strict=True)):
        at = POINTS * (14 + min(count[edge.source, edge.target], 3)) // 20
        count[edge.source, edge.target] += 1
        name = edge.name.partition("<")[2].partition(">")[0]
        said += [(name, round(float(curve[at, 0]), 1), round(float(curve[at, 1]), 1), i)] if name else []
    if said:
        names, x, y, chosen = zip(*said, strict=True)
        figure.add_scatter(
            x=x, y=y, mode="text", text=names, textfont={"size": 12, "color": INK}, hoverinfo="skip", showlegend=False,
            meta={"kind": "said", "edges": chosen},
        )  # fmt: skip


def _say_layers(figure: go.Figure, nodes: Sequence[Node], places: Mapping[str, Point]) -> None:
    """The number of each layer at the left, and a band behind its nodes."""
    rows: dict[int, list[float]] = defaultdict(list)
    for node in nodes:
        if node.kind not in ("embed", "logits"):
            rows[node.layer].append(places[node.name][1])
    for layer, ys in rows.items():
        low, high = min(ys) - 17, max(ys) + 17
        figure.add_shape(
            type="rect", x0=0, x1=WIDTH, y0=low, y1=high, layer="below", line={"width": 0},
            fillcolor="rgba(128,134,145,.09)",
        )  # fmt: skip
        figure.add_annotation(
            x=8, y=(low + high) / 2, text=f"layer {layer}", showarrow=False, xanchor="left", font={"size": 11}
        )
