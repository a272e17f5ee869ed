"""Sparse autoencoders in a report: how one was trained, what it loses in the model, what its features are about."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechinterp.reporting.curves import curves
from mechinterp.reporting.figures import bars
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain
from mechinterp.sae.evaluation.evaluate import SAEEvaluation
from mechinterp.sae.features.describe import Features

MEANING = {
    "l0": "features on a token",
    "fvu": "share of the variance that is missed",
    "explained_variance": "1 − FVU",
    "ce_clean": "loss of the model as it is, nats",
    "ce_spliced": "loss with the autoencoder in place",
    "ce_zero": "loss with zeros in place",
    "ce_mean": "loss with the mean in place",
    "ce_recovered_zero": "share of the loss recovered, against zeros",
    "ce_recovered_mean": "share of the loss recovered, against the mean",
    "kl": "KL of the model's output, clean to spliced, nats",
    "dead_fraction": "features that are on nowhere in this text",
    "dense_fraction": "features that are on at over 10% of tokens",
    "cosine": "of activation and reconstruction",
    "relative_norm": "norm of the reconstruction over that of the activation",
    "fvu_control": "FVU of as many principal components of this very text",
}


def training_section(log: Path) -> Section:
    """FVU along the training, on what was trained on and on held-out text.

    Args:
        log: `log.jsonl` of a run of one autoencoder.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    tokens = [line["tokens"] for line in lines]
    drawn = {
        name: [line.get(key) for line in lines]
        for name, key in (("batches", "fvu"), ("held-out text", "held_out_fvu"))
        if any(key in line for line in lines)
    }
    # A line joins what is measured: held-out numbers stand at few of the lines.
    figures = tuple(
        curves(at, {name: values}, x_title="tokens", y_title="FVU", title=f"FVU on {name}")
        for name, (at, values) in ((name, _defined(tokens, values)) for name, values in drawn.items())
    )
    last = lines[-1]
    text = (
        f"{last['tokens']:,} tokens in {last['step']:,} steps. At the end FVU {last['fvu']:.3f} on the last batches, "
        f"{last['dead']:.1%} of the features dead by the count of the training."
    )
    return Section("Training", text, figures=figures)


def _defined(x: list[int], values: list[float | None]) -> tuple[list[int], list[float]]:
    both = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
    return [at for at, _ in both], [value for _, value in both]


def evaluation_section(result: SAEEvaluation, heading: str = "On held-out text, alone and in the model") -> Section:
    """Every number with its interval; the losses of all arms; how often features are on."""
    rows = [
        (name, MEANING[name], *(plain(float(result.data[end].sel(row=name))) for end in ("value", "low", "high")))
        for name in MEANING
    ]
    table = Table(("number", "meaning", "value", "low", "high"), tuple(rows), f"95% {result.about['scope']}", 20)
    figures = (density_figure(result),)
    if np.isfinite(result["ce_spliced"]):
        figures = (loss_figure(result), *figures)
    return Section(heading, result.summary(), figures=figures, table=table)


def loss_figure(result: SAEEvaluation) -> go.Figure:
    """Cross-entropy of every arm at the same positions."""
    names = {"ce_clean": "clean", "ce_spliced": "spliced", "ce_mean": "mean", "ce_zero": "zeros"}
    ends = {end: [float(result.data[end].sel(row=name)) for name in names] for end in ("value", "low", "high")}
    return bars(
        list(names.values()), ends["value"], ci_low=ends["low"], ci_high=ends["high"],
        facts={"n": int(result.data["n_tokens"].sum())}, title="Loss with each in place, the same positions",
        x_title="loss (nats)", value="loss (nats)",
    )  # fmt: skip


def density_figure(result: SAEEvaluation) -> go.Figure:
    """How many features are on at which share of the tokens; log scale, those that are never on at the left."""
    density = result.data["density"].values
    log = np.log10(density[density > 0])
    edges = np.arange(-6, 0.01, 0.5)
    counts = [int((density == 0).sum()), *np.histogram(log, edges)[0].tolist()]
    labels = ["never", *(f"10^{low:g}" for low in edges[:-1])]
    return bars(
        labels, [float(count) for count in counts], facts={"features": len(density)},
        title="How often features are on: share of tokens, from", x_title="features", value="features",
    )  # fmt: skip


def features_section(features: Features, dashboard: str = "", n: int = 12) -> Section:
    """The top rows, and a pointer to the dashboard."""
    frame = features.top(n)
    rows = tuple(tuple(plain(value) for value in row) for row in frame.itertuples(index=False))
    pointer = f" All of them, with contexts, are in {dashboard} beside this page." if dashboard else ""
    table: Any = Table(tuple(map(str, frame.columns)), rows, "the features of largest total activation", n)
    return Section("What features are about", features.summary() + pointer, table=table)
