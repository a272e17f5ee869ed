"""Knock-outs in a report: before and after, a scan as heatmaps, knock-outs one after another as curves."""

import plotly.graph_objects as go

from mechinterp.ablation.cumulative import Cumulative
from mechinterp.ablation.knock_out import KnockOut
from mechinterp.ablation.scan import ScanResult
from mechinterp.ablation.self_repair import SelfRepair
from mechinterp.reporting.curves import curves
from mechinterp.reporting.figures import bars, heatmap
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain

METRICS = {"logit_diff": "logit difference", "prob": "P(answer)", "accuracy": "accuracy", "loss": "loss on text (nats)"}
COLUMNS = ("before", "after", "change", "ci_low", "ci_high", "control", "control_low", "control_high")


def knock_out_table(results: dict[str, KnockOut]) -> Table:
    """One row a knock-out and metric; the control is the change under random sets, with its range."""
    rows = []
    for name, result in results.items():
        for metric, row in result.about["table"].items():
            rows.append((name, METRICS[metric], *(plain(row.get(column)) for column in COLUMNS)))
    columns = ("knocked out", "metric", "before", "after", "change", "low", "high", "random", "least", "most")
    return Table(columns, tuple(rows), "Change with its 95% interval; random sets of the same layers.", max_rows=24)


def knock_out_section(results: dict[str, KnockOut]) -> Section:
    """What one or several knock-outs did."""
    first = next(iter(results.values())).about
    how = (
        f"{first['value']} over the {first['over']} prompts, by {first['by']}"
        if first["value"] == "mean"
        else first["value"]
    )
    return Section(
        "Knock-outs",
        f"Value: {how}; positions: {first['positions']}. Both metrics are shown because they can disagree: without "
        f"its name movers a model may keep the order of two names and lose its confidence in both. Control: "
        f"{first['control_sets']}.",
        table=knock_out_table(results),
    )


def scan_figure(result: ScanResult, metric: str | None = None) -> go.Figure:
    """The change that each head's knock-out makes, layers down, heads across (MLPs: one column)."""
    metric = metric or result.metrics[0]
    data = result.data
    layers = data["layer"].values.tolist()
    heads = data["head"].values.tolist() if "head" in data.coords else ["MLP"]

    def grid(name: str):
        return data[name].values.reshape(len(layers), len(heads))

    labels = [
        [result.label({"layer": layer, **({"head": head} if head != "MLP" else {})}) for head in heads]
        for layer in layers
    ]
    return heatmap(
        grid(metric),
        x=heads,
        y=layers,
        ci_low=grid(f"{metric}_low"),
        ci_high=grid(f"{metric}_high"),
        passes=grid(f"{metric}_passes"),
        labels=labels,
        facts={
            "before": f"{float(data[f'before_{metric}'].mean()):.3f}",
            "n": result.about["n_prompts"],
            "value": result.about["value"],
            "control": result.about["control"],
        },
        title=f"Change of {METRICS[metric]}, each knocked out alone",
        x_title="head",
        y_title="layer",
        value="change",
    )


def cumulative_section(result: Cumulative) -> Section:
    """Both metrics along a ranking, beside random orders."""
    figures = []
    for metric in ("logit_diff", "prob"):
        name, data = METRICS[metric], result.data
        lines = {name: data[metric].values}
        ends = [{name: data[f"{metric}_{end}"].values} for end in ("low", "high")]
        if f"control_{metric}" in data:
            lines["random heads of the same layers"] = data[f"control_{metric}"].mean(("draw", "prompt")).values
        figures.append(
            curves(
                data["rank"].values,
                lines,
                ci_low=ends[0],
                ci_high=ends[1],
                dashed=list(lines)[1:],
                x_title="heads knocked out",
                y_title=name,
                title=f"{name}, one head after another",
                x_labels=["none", *result.about["ranking"]],
                facts={"n": result.about["n_prompts"]},
            )
        )
    return Section("One after another", result.summary(), figures=tuple(figures))


def self_repair_section(results: dict[str, SelfRepair]) -> Section:
    """The terms of each knock-out as bars, the control beside them, and who makes up for what."""
    figures, rows = [], []
    for name, result in results.items():
        top = result.top()
        figures.append(
            bars(
                top["component"].tolist(),
                top["effect"],
                ci_low=top["ci_low"],
                ci_high=top["ci_high"],
                control=top.get("control"),
                x_title="change of the logit difference",
                title=f"Without {name}",
                control_name="random heads of the same layers",
                facts={"heads": " ".join(result.about["heads"]), "n": result.about["n_prompts"]},
            )
        )
        for row in result.repairers(5).itertuples(index=False):
            rows.append((name, *(plain(value) for value in row)))
    return Section(
        "Self-repair",
        "The change of the logit difference, taken apart: what the knocked-out heads wrote, and what the rest makes of "
        "it. The terms add up to the change, prompt by prompt.\n\n"
        + "\n\n".join(r.summary() for r in results.values()),
        figures=tuple(figures),
        table=Table(
            ("without", "component", "change", "low", "high"),
            tuple(rows),
            "Components whose direct effect changes most.",
            max_rows=20,
        ),
    )
