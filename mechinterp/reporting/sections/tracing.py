"""Causal tracing in a report: indirect effects by layer and role of the token, on one scale."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from mechinterp.patching.trace_result import TraceResult
from mechinterp.reporting.figures import heatmap, largest
from mechinterp.reporting.panels import small_multiples
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain

SHORT = {
    "subject_only": "only subj.",
    "subject_first": "first subj.",
    "subject_middle": "mid subj.",
    "subject_last": "last subj.",
    "next": "next",
    "further": "further",
    "last": "last",
}


def trace_figure(result: TraceResult, zmax: float | None = None, title: str | None = None) -> go.Figure:
    """Indirect effects, layers down, roles (or positions) across."""
    data, axis = result.data, result.axis
    places = [str(place) for place in data[axis].values]
    layers = data["layer"].values.tolist()
    control = data["control"].values
    total = result.total_effect["estimate"]
    return heatmap(
        data["indirect"].values,
        x=[SHORT.get(place, place) for place in places],
        y=layers,
        ci_low=data["ci_low"].values,
        ci_high=data["ci_high"].values,
        control=control,
        passes=np.where(np.isfinite(control), data["passes"].values.astype(object), np.array(None)),
        labels=[[f"layer {layer} at {place}" for place in places] for layer in layers],
        facts={
            "total effect": "undefined" if total is None else f"{total:.3f}",
            "n": result.about["n_prompts"],
            "draws": result.about["draws"],
            "window": result.about["window"],
            "control": result.about["control"],
        },
        title=title if title is not None else f"Indirect effect of {result.about['site']}",
        y_title="layer",
        zmax=zmax,
        value=f"indirect effect ({result.about['metric']})",
        colorbar=result.about["metric"],
    )


def trace_section(results: Mapping[str, TraceResult]) -> Section:
    """Several sites on one colour scale, and the largest cells of each."""
    zmax = largest(*(result.data["indirect"].values for result in results.values()))
    panels = {name: trace_figure(result, zmax, title="") for name, result in results.items()}
    rows = []
    for name, result in results.items():
        for row in result.top(4).to_dict("records"):
            cells = (row["layer"], str(row[result.axis]))
            rows.append(
                (name, *cells, *(plain(row[key]) for key in ("indirect", "ci_low", "ci_high", "control", "passes")))
            )
    columns = ("site", "layer", "token", "indirect", "low", "high", "other subject", "passes both")
    return Section(
        "Causal tracing",
        "Noise on the subject's embeddings loses the answer; a cell is what one restored state, or one window of "
        "layers, brings back.\n\n" + "\n\n".join(result.summary() for result in results.values()),
        figures=(small_multiples(panels, columns=min(3, len(panels)), title="Indirect effects"),),
        table=Table(columns, tuple(rows), "Largest cells, with 95% intervals.", max_rows=12),
    )
