"""Head detection in a report: a heatmap and the best heads of each kind of pattern, beside their nulls."""

import plotly.graph_objects as go

from mechinterp.heads.causal import CausalResult
from mechinterp.heads.copying import CopyingResult
from mechinterp.heads.patterns import PatternResult
from mechinterp.reporting.curves import curves
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


def causal_section(result: CausalResult) -> Section:
    """The loss by position with the top heads out, beside random heads, and each of the top heads alone."""
    data, names = result.data, {"base": "whole model", "top": "without the top heads", "random": "without random heads"}
    lines = {text: data[f"{name}_by_pos"].mean("prompt").values for name, text in names.items()}
    by_position = curves(
        data["pos"].values, lines, dashed=[names["random"]], x_title="position in the last copy",
        y_title="loss (nats)", title="Loss on the last copy",
        facts={"heads": " ".join(f"L{a}H{b}" for a, b in result.heads), "control": result.about["control"]},
    )  # fmt: skip
    top = result.top(12)
    alone = bars(
        top["cell"].tolist(), top["increase"], ci_low=top["ci_low"], ci_high=top["ci_high"], control=top["control"],
        passes=top["passes"], title="Each head knocked out alone", x_title="increase of the loss (nats)",
        control_name="largest other head of its layer",
    )  # fmt: skip
    return Section("Are they needed?", result.summary(), figures=(by_position, alone))


def copying_section(result: CopyingResult, n: int = 12) -> Section:
    """Eigenvalue scores of every head, and those of largest score as a table."""
    layers, heads = result.data["layer"].values.tolist(), result.data["head"].values.tolist()
    figure = heatmap(
        result.data["eigenvalue"].values,
        x=heads,
        y=layers,
        control=result.data["eigenvalue_null"].values,
        passes=result.data["copies"].values | result.data["suppresses"].values,
        labels=[[f"L{layer}H{head}" for head in heads] for layer in layers],
        facts={"embedding": result.about["embedding"], "control": result.about["control"]},
        title="Sum of the OV eigenvalues over the sum of their sizes",
        x_title="head",
        y_title="layer",
        value="score",
        zmax=1.0,
    )
    top = result.top(n)
    rows = tuple(tuple(plain(value) for value in row) for row in top.itertuples(index=False))
    table = Table(tuple(map(str, top.columns)), rows, "Heads of largest eigenvalue score.", max_rows=n)
    return Section("What they copy", result.summary(), figures=(figure,), table=table)
