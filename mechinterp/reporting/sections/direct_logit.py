"""Direct logit attribution in a report: heads as a heatmap, the largest components as bars and as a table."""

import numpy as np
import plotly.graph_objects as go

from mechinterp.lens.direct_logit import DirectLogit
from mechinterp.reporting.figures import bars, heatmap
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain


def direct_logit_figure(result: DirectLogit) -> go.Figure:
    """Direct effects of the heads, layers down, heads across."""
    layers, heads = range(result.about["n_layers"]), range(result.about["n_heads"])
    control = result.grid("control")
    return heatmap(
        result.grid(),
        x=list(heads),
        y=list(layers),
        ci_low=result.grid("ci_low"),
        ci_high=result.grid("ci_high"),
        control=control,
        passes=np.where(np.isfinite(control), result.grid("passes").astype(object), np.array(None)),
        labels=[[f"L{layer}H{head}" for head in heads] for layer in layers],
        facts={
            "asked": result.about["asked"],
            "all components": f"{float(result.data['total'].mean()):.3f}",
            "n": result.about["n_prompts"],
            "control": result.about["control"],
        },
        title=f"Direct effect, {result.about['asked']}, n={result.about['n_prompts']}",
        x_title="head",
        y_title="layer",
        colorbar="logits",
    )


def direct_logit_section(result: DirectLogit, n: int = 12) -> Section:
    """The heads as a heatmap, the largest components as bars and as a table."""
    top = result.top(n)
    rows = tuple(tuple(plain(value) for value in row) for row in top.itertuples(index=False))
    largest = bars(
        top["component"].tolist(), top["effect"], ci_low=top["ci_low"], ci_high=top["ci_high"],
        control=top["control"], passes=top["passes"], title="Components of largest |effect|", x_title="logits",
        control_name="on another prompt's answer",
    )  # fmt: skip
    return Section(
        "Direct logit attribution",
        f"What each component writes itself, in logits ({result.about['asked']}). All of them add up to "
        f"{float(result.data['total'].mean()):.3f}; the model's own is {float(result.data['logit_diff'].mean()):.3f}.",
        figures=(direct_logit_figure(result), largest),
        table=Table(tuple(map(str, top.columns)), rows, "Components of largest |effect|, with 95% intervals."),
    )
