"""The figures of the experiment `superposition`: directions in the plane, the phase diagram, dimensionalities."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import mechinterp as mi
from experiments.superposition_models import Phases, Trained, per_feature
from experiments.superposition_shapes import SHAPES, Sets
from mechinterp.reporting.curves import COLOURS, MARKERS
from mechinterp.reporting.layout import BOTTOM, INK, LEGEND, TOP, base, value_axis
from mechinterp.sae.toys import toy_models as toy

PANEL = 176  # pixels


def short(value: float) -> str:
    """A density as the page writes it."""
    return f"{value:.2g}"


def directions(trained: Trained) -> go.Figure:
    """The features' vectors in the plane, a panel a density, of the restart with the lowest loss."""
    titles = [f"1 − S = {short(one)}" for one in trained.density.tolist()]
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.012)
    for column, W in enumerate(trained.best(), 1):
        for feature, (x, y) in enumerate(W.T.tolist()):
            colour = COLOURS[feature % len(COLOURS)]
            numbers = [f"{titles[column - 1]}, feature {feature}", x, None, y, None, None]
            figure.add_scatter(
                x=[0, x], y=[0, y], mode="lines+markers", row=1, col=column, showlegend=False,
                line={"color": colour, "width": 2.4}, marker={"color": colour, "size": [0, 8], "symbol": "circle"},
                text=[f"feature {feature}"] * 2, customdata=[numbers, numbers],
                hovertemplate="<b>%{text}</b><br>(%{x:.2f}, %{y:.2f})<extra></extra>",
                meta={"kind": "curve", "columns": ["feature", "x", "x_label", "y", "ci_low", "ci_high"], "value": "y",
                      "title": "", "facts": [["length", f"{(x * x + y * y) ** 0.5:.3f}"]]},
            )  # fmt: skip
    name = "Directions of five features in two dimensions, from dense to sparse"
    figure.update_layout(**base(name, PANEL + TOP + 12), meta={"max_width": PANEL * len(titles), "min_width": 660})
    figure.update_layout(margin={"l": 4, "r": 4, "b": 8})
    box = {"range": [-1.45, 1.45], "fixedrange": True, "showticklabels": False, "showgrid": False, "zeroline": True,
           "zerolinewidth": 0.4, "ticks": ""}  # fmt: skip
    figure.update_xaxes(**box)
    figure.update_yaxes(**box)
    for index in range(len(titles)):  # one unit is as long up as across
        name = "" if index == 0 else str(index + 1)
        figure.update_layout({f"yaxis{name}": {"scaleanchor": f"x{name}", "scaleratio": 1}})
    return figure


def phase_maps(phases: Phases) -> go.Figure:
    """What became of the second feature: found, and by theory."""
    columns = [short(one) for one in phases.density.tolist()]
    rows = [f"{one:.2g}" for one in phases.importance.tolist()]
    named = "phase (0 not represented, 1 superposition, 2 dedicated)"
    panels = {
        title: mi.reporting.heatmap(
            values.double().numpy(), columns, rows, value=named, colorbar="phase", scale="sequential", zmax=2.0,
            x_title="density 1 − S", y_title="importance of feature 2", first_at_top=False,
            labels=[[f"{toy.PHASES[int(one)]} · importance {row} · density {column}"
                     for one, column in zip(line, columns, strict=True)]
                    for line, row in zip(values.tolist(), rows, strict=True)],
        )
        for title, values in (("trained", phases.found), ("theory", phases.theory))
    }  # fmt: skip
    figure = mi.reporting.small_multiples(panels, title="What becomes of the second feature")
    figure.update_traces(
        selector={"showscale": True},
        colorbar={"tickvals": [0, 1, 2], "ticktext": ["none", "shared", "own"], "title": {"text": ""}},
    )
    return figure


def boundary(phases: Phases) -> go.Figure:
    """The density at which superposition ends, trained and by theory."""
    ends = phases.boundary()
    low, high = (np.array([np.nan if end[i] is None else end[i] for end in ends], dtype=float) for i in (0, 1))
    importance = phases.importance.double().numpy()
    figure = mi.reporting.curves(
        np.log10(importance),
        {"trained": np.sqrt(low * high), "theory": toy.critical_density(phases.importance).double().numpy()},
        ci_low={"trained": low}, ci_high={"trained": high}, dashed=("theory",),
        x_labels=[f"{one:.2g}" for one in importance], x_title="log10 importance of feature 2",
        y_title="critical density", title="The density above which superposition ends",
        facts={"band": "the last density with superposition and the next one"},
    )  # fmt: skip
    return figure.update_xaxes(title_text="importance of feature 2 (log scale)")  # the ticks are not logarithms


def dimensions(trained: Trained) -> go.Figure:
    """Dimensions per feature over sparsity, beside linear models."""
    found, linear = per_feature(trained)
    figure = mi.reporting.curves(
        np.log10(1 / trained.density.double().numpy()),
        {"with ReLU": found.estimate, "without ReLU (control)": linear},
        ci_low={"with ReLU": found.low}, ci_high={"with ReLU": found.high}, dashed=("without ReLU (control)",),
        x_labels=[f"{1 / one:.1f}" for one in trained.density.tolist()], x_title="log10 1/(1 − S)",
        y_title="dimensions per feature", title="Dimensions per feature, m / ‖W‖²",
        facts={"interval": f"95% over {trained.W.shape[1]} restarts"},
    )  # fmt: skip
    return figure.update_xaxes(title_text="1/(1 − S): dense at the left, sparse at the right (log scale)")


def dimensionalities(trained: Trained, sets: Sets, seed: int) -> go.Figure:
    """D of every represented feature over sparsity, with the published fractions as lines; exact shapes in colour."""
    figure = go.Figure()
    across = np.log10(1 / trained.density.double().numpy())
    gap = float(np.diff(across).min()) if len(across) > 1 else 0.1
    for name, fraction in toy.STICKY_FRACTIONS.items():
        figure.add_hline(fraction, line={"color": INK, "width": 1, "dash": "dot"}, layer="below")
        figure.add_annotation(
            x=1, xref="paper", y=fraction, text=f"{name} {fraction:.3g}", showarrow=False, xanchor="left", xshift=6,
            yshift={"pentagon": 4, "square antiprism": -4}.get(name, 0), font={"size": 11},
        )  # fmt: skip
    exact = {name: sets.shape(name) for name in SHAPES}
    groups = {"in no exact shape": sets.kept & ~np.any(list(exact.values()), axis=0)} | exact
    jitter = np.random.default_rng(seed)
    for index, (name, which) in enumerate((name, which) for name, which in groups.items() if which.any()):
        colour = COLOURS[(index - 1) % len(COLOURS)] if index else INK
        rows = [
            [f"start {r}, feature {f}, {name}", float(across[p]), f"{1 / float(trained.density[p]):.1f}",
             float(sets.D[p, r, f]), None, None]
            for p, r, f in np.argwhere(which).tolist()
        ]  # fmt: skip
        figure.add_scatter(
            x=[row[1] + gap * jitter.uniform(-0.3, 0.3) for row in rows], y=[row[3] for row in rows], mode="markers",
            marker={"color": colour, "size": 5, "symbol": MARKERS[index]}, line={"color": colour}, opacity=0.6,
            customdata=rows, text=[f"{row[0]} · 1/(1 − S) = {row[2]}" for row in rows], name=name,
            hovertemplate="<b>%{text}</b><br>D %{y:.3f}<extra></extra>",
            meta={"kind": "curve", "columns": ["feature", "log10 1/(1 − S)", "x_label", "D", "ci_low", "ci_high"],
                  "value": "D", "title": "", "facts": []},
        )  # fmt: skip
    figure.update_layout(**base("Dimensionality of every represented feature", 440 + TOP + BOTTOM))
    figure.update_layout(
        margin={"r": 140, "b": BOTTOM + LEGEND}, meta={"max_width": 860}, showlegend=True,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.14, "yanchor": "top"},
    )  # fmt: skip
    shown = range(0, len(across), 2)
    figure.update_xaxes(
        **value_axis("1/(1 − S): dense at the left, sparse at the right"), showgrid=False, zeroline=False,
        tickvals=[float(across[i]) for i in shown], ticktext=[f"{1 / float(trained.density[i]):.1f}" for i in shown],
    )  # fmt: skip
    figure.update_yaxes(**value_axis("D"), showgrid=False, range=[0, 1.05])
    return figure
