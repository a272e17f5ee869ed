"""The logit lens in a report: the answer by layer, and what each layer would say at each token."""

import plotly.graph_objects as go

from mechinterp.lens import LensResult, TunedLensResult
from mechinterp.reporting.cells import visible
from mechinterp.reporting.curves import curves
from mechinterp.reporting.figures import heatmap
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain

NAMES = {
    "prob": "P(answer)",
    "logit_diff": "logit difference",
    "kl": "KL to the output (nats)",
    "log_rank": "ln(1 + rank)",
}


def lens_section(result: LensResult) -> Section:
    """Curves over layers, and for one text read at every position the grid of tokens."""
    grid = result.axis == "pos" and result.n_prompts == 1
    names = [name for name in ("prob", "logit_diff", "kl") if f"{name}_mean" in result.data]
    figures = [lens_grid(result)] if grid else []
    figures += [lens_curve(result, name) for name in names]
    top = result.top(12)
    rows = tuple(tuple(plain(value) for value in row) for row in top.itertuples(index=False))
    control = result.about["control"]
    return Section(
        f"{result.about['lens'].capitalize()} lens",
        f"Layer 0 is the embeddings, layer {result.n_layers} the model's own output. Control: {control}.",
        figures=tuple(figures),
        table=Table(tuple(map(str, top.columns)), rows, "Layers from first to last.", max_rows=12),
    )


def lens_curve(result: LensResult, name: str) -> go.Figure:
    """One quantity by layer, at the last position that was read, with its interval and its control."""
    data = result.data if result.axis is None else result.data.isel({result.axis: -1})
    label = NAMES[name]
    lines = {label: data[f"{name}_mean"].values}
    low, high, dashed = {}, {}, []
    if result.n_prompts > 1:
        low, high = {label: data[f"{name}_low"].values}, {label: data[f"{name}_high"].values}
    if f"{name}_control" in data:
        lines["control"] = data[f"{name}_control"].values
        dashed = ["control"]
    return curves(
        data["layer"].values, lines, ci_low=low, ci_high=high, dashed=dashed, x_title="layer", y_title=label,
        title=f"{label} by layer", facts={"n": result.n_prompts, "control": result.about["control"]},
    )  # fmt: skip


def lens_grid(result: LensResult) -> go.Figure:
    """Layers up, tokens across: what each layer would say there, and how surely."""
    data = result.data.isel(prompt=0).transpose("layer", "pos", "rank")
    layers, strings = data["layer"].values.tolist(), result.about["strings"]
    more = {"kl": data["kl"].values, "entropy": data["entropy"].values}
    if "prob" in data:
        more |= {"answer": data["prob"].values, "rank": data["answer_rank"].values}
    shown = [visible(token) for token in result.about["tokens"] or result.spot_labels]
    return heatmap(
        data["top_prob"].isel(rank=0).values,
        x=shown,
        y=layers,
        text=[[strings.get(str(int(token)), "") for token in row] for row in data["top_token"].isel(rank=0).values],
        more=more,
        labels=[[f"layer {layer} at {token} ({i})" for i, token in enumerate(shown)] for layer in layers],
        scale="sequential",
        zmax=1.0,
        value="probability",
        title="The first token of each layer, and its probability",
        x_title="token",
        y_title="layer",
        first_at_top=False,
    )


def tuned_lens_section(result: TunedLensResult) -> Section:
    """KL by layer on held-out text: the tuned lens, the logit lens, and a lens that reads nothing."""
    data, names = result.data, {"tuned": "tuned lens", "logit": "logit lens"}
    low, high = ({text: data[f"{name}_{end}"].values for name, text in names.items()} for end in ("low", "high"))
    lines = {text: data[name].values for name, text in names.items()} | {"reads nothing": data["control"].values}
    figure = curves(
        data["layer"].values, lines, ci_low=low, ci_high=high, dashed=["reads nothing"], x_title="layer",
        y_title="KL to the output (nats)", title="KL to the output on held-out text",
        facts={"blocks": data.sizes["prompt"], "text": result.about["text"], "control": result.about["control"]},
    )  # fmt: skip
    return Section("Tuned lens on held-out text", result.summary(), figures=(figure,))
