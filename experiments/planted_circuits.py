"""Does each search method find a circuit that is known? Every method on every planted model, in both directions.

The planted models' weights are written by hand, so that their true edges are known by type. A single patch cannot show
all of them: noising shows serial and AND edges, denoising serial and OR edges (mechinterp/models/planted/circuit.py).

1. Search with every method in both directions, beside the truth (planted_search.py). A ranking by ‖a_u − s_u‖ alone is
   the control.
2. Integrated gradients are complete: the scores of the embedding's edges beside the whole change of the metric.
3. Say where a method fails, and why; write one run folder and one offline report.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mechinterp as mi
from experiments.planted_search import CONTROL, TOP_N, Row, SearchSettings, searches
from experiments.settings import command_line, finished

if TYPE_CHECKING:
    from mechinterp.tasks import PromptPairs

FLAT = "the slope is that of the run that is patched, where a ReLU of the gate behind is shut or saturated, so flat"
# Why a method misses what the direction can show, and why it claims what is not for this direction to show. Where the
# numbers show neither, nothing of it is printed.
MISSES = {
    "eap": FLAT,
    "atp-star": f"{FLAT}. The query-key fix looks through attention, not through MLPs",
    "hisp": FLAT,
    "clean-corrupted": "the gate is flat at both ends, and this method looks nowhere else",
    "ifr": "it tells what flows in the clean run, distractors included; neither the corrupted run nor the metric has a "
    "part in it",
    "learned-mask": "it keeps what works with all else cut, inputs of an OR gate among it, and does not rank what it "
    "keeps",
    CONTROL: "how far two runs differ at a source does not tell which of its readers matter, and distractors write, "
    "too",
}
UNSEEN = {
    "eap-ig": "gradients are taken between the two runs, where the other input of the gate has moved along; a patch "
    "moves one alone",
    "eap-ig-activations": "a layer moves as a whole on the line between its two outputs, and with it both inputs of a "
    "gate; a patch moves one alone",
    "clean-corrupted": "half of the gradient is that of the other run, in which these edges do have a slope",
    "acdc": "edges are cut one after another, and once one input of a gate is cut, the other decides: one input of "
    "each gate is kept",
}


@dataclass(frozen=True)
class Config(SearchSettings):
    """Settings of the run; the same settings always have the same run folder."""

    json: str | None = field(default=None, metadata={"in_id": False})
    """Also write the rows of the table to this file."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    from mechinterp.tasks.planted import task_of

    config.chosen()  # an unknown method is said before anything runs
    models = config.models()
    pairs = {name: task_of(name)(model, config.n, config.seed) for name, model in models.items()}
    inputs = {name: f"{model.weights_hash()} {pairs[name].hash()}" for name, model in models.items()}
    with mi.reporting.Run.open("planted_circuits", config, root=config.root, inputs=inputs) as run:
        found = {}
        for name, model in models.items():
            make = partial(searches, model, pairs[name], config, lambda row: print(as_text([row]), flush=True))
            found[name] = run.part(f"{name}.json", make, _read, _write)
        rows = [Row.read(row) for one in found.values() for row in one["rows"]]
        residuals = [row for one in found.values() for row in one["residuals"]]
        answer = finding(rows, residuals)
        page = report(models, pairs, rows, residuals, answer, config)
        path = run.finish(page)
        run.log("\n".join([as_text(rows), "", *map(residual_text, residuals), "", *explanations(rows), "", answer]))
    if config.json:
        _write([asdict(row) for row in rows], Path(config.json))
    finished(path)
    return path


def finding(rows: list[Row], residuals: list[dict[str, Any]]) -> str:
    """The answer in a few sentences."""
    methods = list(dict.fromkeys(row.method for row in rows if row.method != CONTROL))
    of = {name: [row for row in rows if row.method == name and not row.refused] for name in methods}
    right = [name for name in methods if of[name] and all(row.is_exact for row in of[name])]
    missing = {name: min(row.recall or 0.0 for row in of[name]) for name in methods if of[name]}
    missing = {name: recall for name, recall in missing.items() if recall < 1}
    beyond = [name for name in methods if name not in missing and name not in right and of[name]]
    where = ", ".join(dict.fromkeys(row.model for row in rows))
    made = [f"In both directions, precision = recall = 1 on {where} with {', '.join(right) or 'no method'}."]
    if "exact" in of and union_is_circuit(of["exact"]):
        made.append("What exact search claims in the two directions together is the whole circuit.")
    if beyond:
        made.append(f"Nothing is missed, but more claimed than the direction can show, by {', '.join(beyond)}.")
    if missing:
        told = ", ".join(f"{name} (recall down to {recall:.2f})" for name, recall in missing.items())
        made.append(f"Parts of what can be shown are missed by {told}.")
    serial = [row.auroc for row in of.get("eap-ig", []) if row.model == "planted-induction" and row.auroc is not None]
    if serial:
        here = [one for one in residuals if one["model"] == "planted-induction"]
        least = min(one["steps"] for one in here)
        worst = max(abs(one["share"]) for one in here if one["steps"] == least)
        made.append(
            f"On the serial model eap-ig ({least} steps) has AUROC ≥ {min(serial):.2f} and a completeness residual of "
            f"{worst:.1%} at most."
        )
    return " ".join(made)


def union_is_circuit(rows: list[Row]) -> bool:
    """Whether the claims of both directions together are each model's circuit."""
    from mechinterp.models.planted import circuit

    claimed: dict[str, set[str]] = {}
    for row in rows:
        claimed.setdefault(row.model, set()).update(row.claimed)
    return all(found == set(circuit(name).edges) for name, found in claimed.items())


def explanations(rows: list[Row]) -> list[str]:
    """One paragraph for each method that fails somewhere: where, how badly, and why."""
    made = []
    for name in dict.fromkeys(row.method for row in rows):
        ours = [row for row in rows if row.method == name]
        said = [*missed_text(name, ours), *unseen_text(name, ours)]
        said += [f"refuses {row.model} ({row.direction}): {row.refused}" for row in ours if row.refused]
        if said:
            made.append(f"{name} {'. It '.join(said)}.")
    return made


def missed_text(name: str, rows: list[Row]) -> list[str]:
    """What was missed, with its exact effect and the score that it had."""
    short = [row for row in rows if row.missed]
    if not short:
        return []
    where = places((row, f"{len(row.missed)} of {row.n_true}") for row in short)
    effect, score = (max(getattr(row, key) or 0 for row in short) for key in ("missed_effect", "missed_score"))
    scores = "" if name in TOP_N else f" have scores of {score:.2g}, and"
    return [
        f"misses {short[0].level}s ({where}). They{scores} move the logit difference by up to {effect:.2g} when "
        f"patched alone: {MISSES.get(name, 'not explained')}"
    ]


def unseen_text(name: str, rows: list[Row]) -> list[str]:
    """What was claimed and is not for this direction to show. With top-n, each miss makes such a claim."""
    wrong = [row for row in rows if name not in TOP_N and (row.unseen or row.outside)]
    if not wrong:
        return []
    where = places((row, str(len(row.unseen) + len(row.outside))) for row in wrong)
    n_outside = sum(len(row.outside) for row in wrong)
    circuit = "all of the circuit" if not n_outside else f"{n_outside} of them outside the circuit"
    return [
        f"claims {wrong[0].level}s that this direction cannot show, {circuit} ({where}): "
        f"{UNSEEN.get(name, 'not explained')}"
    ]


def places(counts: Iterable[tuple[Row, str]]) -> str:
    """Counts by model and direction."""
    return ", ".join(f"{row.model} {row.direction} {count}" for row, count in counts)


COLUMNS = ("method", "direction", "level", "claim", "precision", "recall", "AUROC", "all AUROC", "missed", "unseen",
           "outside", "seconds")  # fmt: skip


def cells(row: Row) -> tuple[Any, ...]:
    """A line of the table."""
    counts = (None,) * 3 if row.refused else tuple(map(len, (row.missed, row.unseen, row.outside)))
    return (row.method, row.direction, row.level, row.claim, row.precision, row.recall, row.auroc, row.auroc_circuit,
            *counts, row.seconds)  # fmt: skip


def as_text(rows: list[Row]) -> str:
    """The table for the log."""
    lines = []
    for row in rows:
        numbers = " ".join("    –" if x is None else f"{x:5.2f}" for x in cells(row)[4:8])
        counts = "refused" if row.refused else "{} missed, {} unseen, {} outside".format(*cells(row)[8:11])
        seconds = "" if row.seconds is None else f"{row.seconds:.1f} s"
        named = f"{row.model:18} {row.method:19} {row.direction:8} {row.level} {row.claim:10}"
        lines.append(f"{named} {numbers}  {counts}  {seconds}")
    return "\n".join(lines)


def residual_text(one: Mapping[str, Any]) -> str:
    """A line for the log."""
    return (
        f"{one['model']:18} {one['direction']:8} eap-ig, {one['steps']} {one['rule']} steps: Σ embed's edges "
        f"{one['sum']:.3f}, change {one['change']:.3f}, residual {one['residual']:+.3f} ({one['share']:+.1%})"
    )


def report(
    models: dict[str, mi.HookedModel],
    pairs: "dict[str, PromptPairs]",
    rows: list[Row],
    residuals: list[dict[str, Any]],
    answer: str,
    config: Config,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.sweeps import prompt_preview

    names = ", ".join(f"{name} ({len(pairs[name])} pairs of {pairs[name].name})" for name in models)
    sections = [
        overview(rows),
        mi.reporting.Section("Where a method fails, and why", "\n\n".join(explanations(rows))),
        *(model_section(name, model, rows) for name, model in models.items()),
        *([completeness_section(residuals)] if residuals else []),
    ]
    return mi.reporting.Report(
        title="Do circuit search methods find a circuit that is known?",
        question="Which edges of a circuit that was written by hand does each method find, and where does it fail?",
        answer=answer,
        header=f"{names} · metric logit difference, ablation resample",
        command=config.command(__file__),
        prompts=tuple(one for name, model in models.items() for one in prompt_preview(model, pairs[name], 1)),
        sections=tuple(sections),
        caveats=(
            "Units are edges, or nodes where those are scored. Missed: can be shown, and is not claimed. Unseen: "
            "claimed, of the circuit, but of the type that this direction cannot show. Outside: claimed, not of it.",
            f"top-n ({', '.join(TOP_N)}): told how many edges are true, because scores of false ones are not near 0 "
            "there; learned-mask is trained to keep this share. All others claim what lies above "
            f"{config.threshold:g} logits (hisp: of a score that is normalised within a layer) and are told nothing.",
            "Methods that score nodes are compared at nodes. A patched node moves all of its edges at once: it can be "
            "shown where one of its edges can, or where it holds several inputs of a gate.",
            "ifr and the control look at neither the direction nor, ifr, the corrupted run: only the truth differs.",
            "The truth is by construction and holds on every pair, so there are no intervals over prompts.",
            "Seconds are wall time of one search, on whatever this machine did besides. The models are tiny: they say "
            "nothing about how methods scale.",
        ),
    )  # fmt: skip


def overview(rows: list[Row]) -> "mi.reporting.Section":
    """Precision, recall and AUROC by method, model and direction."""
    methods = list(dict.fromkeys(row.method for row in rows))
    by_cell = {(row.method, f"{row.model.removeprefix('planted-')}, {row.direction}"): row for row in rows}
    columns = list(dict.fromkeys(column for _, column in by_cell))
    grid = [[by_cell[method, column] for column in columns] for method in methods]
    figure = mi.reporting.heatmap(
        np.array([[row.auroc for row in line] for line in grid], dtype=float), columns, methods,
        value="AUROC", scale="sequential", zmax=1.0, facts={"cells": "precision/recall"},
        text=[[f"{number(row.precision)}/{number(row.recall)}" for row in line] for line in grid],
    )  # fmt: skip
    text = (
        "In the cells: precision/recall, colour: AUROC, all of them beside the truth that the direction can show: "
        "serial and AND edges when noising, serial and OR edges when denoising."
    )
    return mi.reporting.Section("Every method on every model", text, figures=(figure,))


def number(value: float | None) -> str:
    """Two digits, or a dash where it is undefined."""
    return "–" if value is None else f"{value:.2f}"


def model_section(name: str, model: mi.HookedModel, rows: list[Row]) -> "mi.reporting.Section":
    """The full table of a model."""
    from mechinterp.models.planted import PLANTED, circuit

    ours, planted = [row for row in rows if row.model == name], circuit(name)
    kinds = (("Serial", planted.serial), ("AND", planted.and_edges), ("OR", planted.or_edges))
    true = ". ".join(f"{kind}: {', '.join(edges)}" for kind, edges in kinds if edges)
    return mi.reporting.Section(
        name,
        f"A {PLANTED[name].description}. {len(planted.edges)} of {mi.circuits.Graph(model).n_edges} edges are true. "
        f"{true}.",
        table=mi.reporting.Table(
            COLUMNS, tuple(map(cells, ours)),
            "Beside what the direction can show; all AUROC: beside the whole circuit.", max_rows=40,
        ),
    )  # fmt: skip


def completeness_section(residuals: list[dict[str, Any]]) -> "mi.reporting.Section":
    """The residual of integrated gradients."""
    columns = ("model", "direction", "steps", "rule", "Σ scores", "change", "residual", "share")
    return mi.reporting.Section(
        "Are integrated gradients complete?",
        "The scores of the embedding's edges add up to the whole change of the metric, but for the error of the rule. "
        "Where a gate opens on a short stretch of the line, few steps fall into it and the residual is large.",
        table=mi.reporting.Table(
            columns, tuple(tuple(one.values()) for one in residuals),
            "Logits, means over pairs; the residual, and its share of the change.", max_rows=24,
        ),
    )  # fmt: skip


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(value: Any, path: Path) -> None:
    mi.results.write_json(path, value)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
