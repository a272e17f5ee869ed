"""Steering in a report: metric and side effect by strength, beside random directions, and what the model says."""

from collections.abc import Mapping

import numpy as np

from mechinterp.reporting.curves import curves
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain
from mechinterp.steering import SteeringResult


def steering_section(result: SteeringResult, said: Mapping[float, str] | None = None) -> Section:
    """Curves over strengths; `said` maps a strength to a continuation."""
    data, metric = result.data, result.about["metric"]
    strengths = data["strength"].values
    random = "random directions, mean"
    base = float(data["mean"].sel(strength=0.0))
    ends = {"control_low": "smallest of the random", "control_high": "largest of the random"}
    lines = {"vector": data["mean"].values, random: base + data["control"].values}
    lines |= {name: base + data[key].values for key, name in ends.items()}
    facts = {"n": result.about["n_prompts"], "random directions": result.about["draws"]}
    effect = curves(
        strengths, lines, ci_low={"vector": data["ci_low"].values}, ci_high={"vector": data["ci_high"].values},
        dashed=[name for name in lines if name != "vector"], x_title="strength", y_title=metric,
        title=f"{metric} by strength", facts=facts,
    )  # fmt: skip
    figures = [effect]
    if np.isfinite(data["kl"].values).any():
        side = {"vector": data["kl"].values, "random directions": data["kl_control"].values}
        figures.append(
            curves(
                strengths,
                side,
                ci_low={"vector": data["kl_low"].values},
                ci_high={"vector": data["kl_high"].values},
                dashed=["random directions"],
                x_title="strength",
                y_title="KL to the unsteered model (nats)",
                title="Side effect on unrelated text",
                facts=facts,
            )
        )
    table = None
    if said:
        rows = tuple((plain(strength), text) for strength, text in said.items())
        table = Table(("strength", "continuation"), rows, "What the model says (greedy).", max_rows=len(rows))
    return Section("Steering", result.summary(), figures=tuple(figures), table=table)
