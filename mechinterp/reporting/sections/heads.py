"""Head detection in a report: a heatmap and the best heads of each kind of pattern, beside their nulls."""

import plotly.graph_objects as go

from mechinterp.heads.patterns import PatternResult
from mechinterp.reporting.figures import bars, heatmap
from mechinterp.reporting.panels import small_multiples
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain

TITLES = {
    "induction": "induction",
    "previous_token": "previous token",
    "duplicate_token": "duplicate token",
    "first_token": "first token",
    "self": "itself",
}


def pattern_figure(result: PatternResult, kind: str) -> go.Figure:
    """Attention of every head to the keys of one kind."""
    layers, heads = result.data["layer"].values.tolist(), result.data["head"].values.tolist()
    return heatmap(
        result.grid(kind),
        x=heads,
        y=layers,
        ci_low=result.grid(kind, "ci_low"),
        ci_high=result.grid(kind, "ci_high"),
        control=result.grid(kind, "null"),
        passes=result.grid(kind, "passes"),
        labels=[[f"L{layer}H{head}" for head in heads] for layer in layers],
        facts={"n": result.data.sizes["prompt"], "control": result.about["control"]},
        title=TITLES.get(kind, kind),
        x_title="head",
        y_title="layer",
        value="attention",
        scale="sequential",
        zmax=1.0,
    )


def pattern_section(result: PatternResult, kinds: tuple[str, ...] | None = None, n: int = 4) -> Section:
    """Heatmaps of some kinds on one scale, the best heads of the first as bars, and a table of the best of each."""
    chosen = kinds or tuple(kind for kind in result.kinds if kind != "first_token")
    panels = {TITLES.get(kind, kind): pattern_figure(result, kind) for kind in chosen}
    best = result.top(chosen[0], 10)
    largest = bars(
        best["head"].tolist(), best["score"], ci_low=best["ci_low"], ci_high=best["ci_high"], control=best["null"],
        passes=best["passes"], title=f"Highest {TITLES.get(chosen[0], chosen[0])} scores", x_title="attention",
        control_name="null",
    )  # fmt: skip
    rows = [
        tuple(plain(value) for value in row) for kind in chosen for row in result.top(kind, n).itertuples(index=False)
    ]
    return Section(
        "Attention patterns",
        f"A score is the mean attention weight on the keys of a pattern. Null: {result.about['control']}. A dot marks "
        f"heads whose interval lies above their null's by more than {result.about['margin']}.",
        figures=(small_multiples(panels, columns=min(2, len(panels)), title="Attention by pattern"), largest),
        table=Table(tuple(result.top(chosen[0], 1).columns), tuple(rows), "Best heads of each kind.", max_rows=16),
    )
