"""The evaluation of circuits in a report: faithfulness over sizes, controls, protocols, completeness and its kin."""

import plotly.graph_objects as go

from mechinterp.circuits.evaluation import Evaluation
from mechinterp.circuits.properties import Properties
from mechinterp.circuits.protocol import ProtocolSweep
from mechinterp.reporting.curves import curves
from mechinterp.reporting.figures import bars
from mechinterp.reporting.report import Section, Table
from mechinterp.results import plain

CURVES = {"absolute": "by absolute score (CMD)", "signed": "by signed score (CPR)"}


def faithfulness_figure(result: Evaluation) -> go.Figure:
    """Faithfulness over the share of edges that are kept, of both selections."""
    data = result.data
    lines = {CURVES[name]: data["faithfulness"].sel(selection=name).values for name in CURVES}
    low, high = (
        {CURVES[name]: data[end].sel(selection=name).values for name in CURVES} for end in ("ci_low", "ci_high")
    )
    sizes = [f"{size:.1%}" for size in data["size"].values.tolist()]
    return curves(
        list(range(len(sizes))), lines, ci_low=low, ci_high=high, x_labels=sizes, x_title="edges kept",
        y_title="faithfulness", title="Faithfulness on held-out pairs",
        facts={"n": result.about["n_prompts"], "0": "every edge ablated", "1": "the whole model"},
    )  # fmt: skip


def evaluation_sections(result: Evaluation) -> list[Section]:
    """The curves with their numbers, and the controls."""
    data = result.data
    rows = [
        (f"{size:.1%}", *(plain(data[name].sel(selection="absolute", size=size).item()) for name in
         ("edges", "faithfulness", "ci_low", "ci_high", "accuracy", "kl")))
        for size in data["size"].values.tolist()
    ]  # fmt: skip
    sizes = Table(
        ("edges kept", "after pruning", "faithfulness", "low", "high", "accuracy", "KL (nats)"), tuple(rows),
        "By absolute score, 95% intervals over held-out pairs.", max_rows=12,
    )  # fmt: skip
    curve = Section("How faithful", result.summary(), figures=(faithfulness_figure(result),), table=sizes)
    return [curve, *([control_section(result)] if len(result.controls()) else [])]


def control_section(result: Evaluation) -> Section:
    """Each control beside the found circuit of its size."""
    names = ("control", "size", "edges", "faithfulness", "ci_low", "ci_high", "difference", "difference_low",
             "difference_high", "differs")  # fmt: skip
    rows = tuple(tuple(row[name] for name in names) for row in result.about["controls"])
    columns = (
        "control",
        "size",
        "edges",
        "faithfulness",
        "low",
        "high",
        "found − control",
        "low",
        "high",
        "excludes 0",
    )
    text = (
        "Circuits of the same size, before dead edges are pruned, that know less, on the trained model and the true "
        "labels: a ranking by how far the two runs differ at a source (norm; norm-connected is grown from the logits), "
        "rankings by the same method on re-drawn weights and on labels swapped in "
        "half of the prompts, the found circuit rewired with every node's degree kept, and the found circuit on other "
        "heads of the same layers. Differences are paired over prompts; those to rewirings and other heads are to the "
        "mean of five, and conditional on these. A control of 0 edges joins nothing to the logits: its 0 is for "
        "free."
    )
    return Section("Beside controls", text, table=Table(columns, rows, max_rows=24))


def protocol_section(result: ProtocolSweep) -> Section:
    """The same edges under every protocol."""
    frame = result.top(len(result.data["protocol"]))
    names = [" · ".join(map(str, row[:4])) for row in frame.itertuples(index=False)]
    figure = bars(
        names, frame["faithfulness"].to_numpy(), ci_low=frame["ci_low"].to_numpy(), ci_high=frame["ci_high"].to_numpy(),
        x_title="faithfulness", title="One circuit, many protocols",
        facts={"n": result.about["n_prompts"], "edges": result.about["edges"]},
    )  # fmt: skip
    text = (
        f"{result.summary()}.\n\nWhat is kept (edges, or whole nodes), what cut edges carry, whether the circuit is "
        "left in the clean run (noise) or restored into the corrupted one (denoise), and at which positions. What is "
        "restored is the clean run's own activation, so the circuit's last edges alone can bring the answer back."
    )
    return Section("The range of answers", text, figures=(figure,))


def properties_section(result: Properties) -> Section:
    """Completeness, minimality and sufficiency of each class."""
    rows = tuple(tuple(plain(cell) for cell in row) for row in result.top(100).itertuples(index=False))
    table = Table(
        ("property", "of", "estimate", "low", "high", "random nodes"), rows,
        "In units of faithfulness, 95% intervals over held-out pairs.", max_rows=40,
    )  # fmt: skip
    text = (
        f"{result.summary()}.\n\nCompleteness: how far circuit and model are apart when both lose the same nodes "
        "(0 is complete). Minimality: the most that a class ever matters. Sufficiency: the circuit with this class "
        "alone."
    )
    return Section("Complete, minimal, sufficient?", text, table=table)
