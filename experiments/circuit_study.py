"""What the circuit experiments share: search, evaluation on held-out pairs, a second seed, protocols, fidelity.

1. Search on `n` pairs of one seed; evaluate on `n_held_out` pairs of another.
2. Search again on pairs of a third seed: how much of the circuit is the same?
3. Patch a stratified sample of edges exactly: how good are the scores?
4. Measure the same circuit under every protocol.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import mechinterp as mi
from experiments.expected import REFERENCE
from experiments.settings import Settings

if TYPE_CHECKING:
    from mechinterp.circuits import Circuit, Evaluation, Scores
    from mechinterp.circuits.protocol import ProtocolSweep
    from mechinterp.tasks import PromptPairs

HELD_OUT, AGAIN = 1, 2  # added to the seed of the search
EXACT = 16  # pairs that exact edges are patched on: each costs a run of its own


@dataclass(frozen=True)
class StudySettings(Settings):
    """Settings of a circuit study; the same settings always have the same run folder."""

    n: int = 32
    """Pairs to search on."""
    n_held_out: int = 32
    """Pairs to evaluate on."""
    method: str = "eap-ig"
    """How edges are scored; see `mechinterp.circuits.METHODS`."""
    size: float = 0.02
    """Share of the edges that is looked at closely."""
    sample: int = 80
    """Edges that are patched exactly."""


@dataclass(frozen=True)
class Study:
    """All results of one task.

    Attributes:
        size: share of the edges of `circuit`.
        scores, circuit, evaluation, protocols: as mechinterp.circuits makes them.
        seeds: `jaccard` of the circuit with that of a search on other pairs, and how often, resampling the prompts of
            that search, an edge `of the circuit` and one `of all edges` is selected.
        fidelity: see `Scores.fidelity`, as plain values.
    """

    size: float
    scores: "Scores"
    circuit: "Circuit"
    evaluation: "Evaluation"
    protocols: "ProtocolSweep"
    seeds: dict[str, float]
    fidelity: dict[str, Any]

    def at_size(self) -> dict[str, float]:
        """Faithfulness of the circuit, by absolute score, with its interval."""
        here = self.evaluation.data.sel(selection="absolute", size=self.size)
        return {name: float(here[name]) for name in ("faithfulness", "ci_low", "ci_high")}

    def values(self) -> dict[str, float]:
        """What is compared with expected values."""
        about = self.evaluation.about
        made = {f"faithfulness at {self.size:.0%}": self.at_size()["faithfulness"]}
        made |= {name: about[name]["value"] for name in ("cmd", "cpr") if about[name]["value"] is not None}
        made |= {f"{row['control']} at {self.size:.0%}": row["faithfulness"] for row in about["controls"]}
        made["Jaccard of two seeds"] = self.seeds["jaccard"]
        if self.fidelity["rank_correlation"] is not None:
            made["rank correlation with exact effects"] = self.fidelity["rank_correlation"]
        return made

    def finding(self, model: mi.HookedModel) -> str:
        """The answer in a few sentences, with intervals and controls."""
        here, about, n_edges = self.at_size(), self.evaluation.about, self.circuit.graph.n_edges
        controls = ", ".join(f"{row['control']} {row['faithfulness']:.2f}" for row in about["controls"])
        close = [row["control"] for row in about["controls"] if not row["differs"]]
        return (
            f"{len(self.circuit)} of {n_edges} edges of {model.info.name} ({len(self.circuit) / n_edges:.1%}) have a "
            f"faithfulness of {here['faithfulness']:.2f} [{here['ci_low']:.2f}, {here['ci_high']:.2f}] on held-out "
            f"pairs (controls of the same size: {controls}"
            f"{'; not told apart from ' + ', '.join(close) if close else ''}). CMD {about['cmd']['value']:.3f}, CPR "
            f"{about['cpr']['value']:.2f}. A search on other pairs shares {self.seeds['jaccard']:.0%} of the edges; "
            f"{self.protocols.summary()}."
        )


def study(
    model: mi.HookedModel,
    make: Callable[[int, int], "PromptPairs"],
    run: "mi.reporting.Run",
    config: StudySettings,
    prefix: str = "",
) -> Study:
    """Every result, from the run folder where it is done. `make` draws pairs from (n, seed)."""
    from mechinterp.circuits import Evaluation, files
    from mechinterp.circuits.protocol import ProtocolSweep

    if mi.circuits.METHODS[config.method].level == "node":
        raise mi.UserError(
            f"--method {config.method} scores nodes; a circuit study needs scores of edges, such as eap-ig"
        )
    graph = mi.circuits.Graph(model)
    search, held_out = make(config.n, config.seed), make(config.n_held_out, config.seed + HELD_OUT)

    def part(name: str, kind: Any, made: Callable[[], Any]) -> Any:
        return run.part(f"{prefix}{name}", made, kind.load, lambda result, path: result.save(path))

    def of_file(name: str, made: Callable[[], Any]) -> Any:
        load, save = (lambda path: files.load(path, model)), (lambda result, path: files.save(path, result))
        return run.part(f"{prefix}{name}", made, load, save)

    def of_json(name: str, made: Callable[[], Any]) -> Any:
        load = lambda path: json.loads(path.read_text(encoding="utf-8"))  # noqa: E731
        return run.part(f"{prefix}{name}", made, load, lambda value, path: mi.results.write_json(path, value))

    def search_again() -> dict[str, float]:
        pairs = make(config.n, config.seed + AGAIN)
        return compare_searches(circuit, mi.circuits.find(graph, pairs, config.method, controls=False), config.size)

    scores = of_file("scores.json", lambda: mi.circuits.find(graph, search, config.method, seed=config.seed))
    circuit = of_file("circuit.json", lambda: scores.select(config.size))
    few = search.take(torch.arange(min(config.n, EXACT)))
    sizes = sorted({*mi.circuits.GRID, config.size})
    return Study(
        config.size,
        scores,
        circuit,
        part("evaluation", Evaluation, lambda: mi.circuits.evaluate(
            scores, held_out, sizes=sizes, control_sizes=(config.size,), seed=config.seed)),
        part("protocols", ProtocolSweep, lambda: mi.circuits.protocol_sweep(circuit, held_out, seed=config.seed)),
        of_json("seeds.json", search_again),
        of_json("fidelity.json", lambda: scores.fidelity(config.sample, few, config.seed).to_json()),
    )  # fmt: skip


def compare_searches(circuit: "Circuit", other: "Scores", size: float) -> dict[str, float]:
    """How another search sees the edges of a circuit."""
    theirs = other.select(size)
    included = theirs.kept.float() if theirs.inclusion is None else theirs.inclusion
    return {
        "jaccard": float(mi.circuits.overlap({"first": circuit, "second": theirs}).iloc[0, 1]),
        "of the circuit": float(included[circuit.kept].mean()),
        "of all edges": float(included.mean()),
    }


def published(task: str, model: mi.HookedModel, found: Study) -> dict[str, float]:
    """Share of each published class of heads or MLPs that writes along an edge of the circuit; nothing for a model of
    which no classes are published."""
    path = REFERENCE / f"{task}_nodes_{model.info.name}.json"
    if not path.is_file():
        return {}
    writing = found.circuit.writers
    classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
    return {
        f"published {name} in the circuit": sum(one in writing for one in members) / len(members)
        for name, members in classes.items()
    }


def shares(values: Mapping[str, float]) -> str:
    """What `published` found, in words; empty without published classes."""
    told = [f"{name}: {value:.0%}" for name, value in values.items() if name.startswith("published ")]
    return "; ".join(told)


def sections(found: Study, pairs: "PromptPairs") -> "list[mi.reporting.Section]":
    """What the report says of a study."""
    from mechinterp.reporting.sections.circuit_evaluation import evaluation_sections, protocol_section
    from mechinterp.reporting.sections.circuits import circuit_section, strongest

    return [
        *evaluation_sections(found.evaluation),
        circuit_section(strongest(found.scores), pairs, found.scores.interval_of_edges),
        protocol_section(found.protocols),
        mi.reporting.Section("Another sample of prompts", seeds_text(found)),
        fidelity_section(found.fidelity),
    ]


def seeds_text(found: Study) -> str:
    """How much of the circuit a second search finds."""
    seeds = found.seeds
    return (
        f"A search on other pairs shares {seeds['jaccard']:.0%} of the edges (Jaccard index). Resampling its prompts, "
        f"an edge of the first circuit is selected with probability {seeds['of the circuit']:.2f} on average, any edge "
        f"with {seeds['of all edges']:.3f}."
    )


def fidelity_section(found: Mapping[str, Any]) -> "mi.reporting.Section":
    """Scores beside exact effects."""
    missed, correlation = found["missed_mass"], found["rank_correlation"]
    told = "undefined" if correlation is None else f"{correlation:.2f}"
    mass = "undefined"
    if missed["value"] is not None:
        mass = f"{missed['value']:.0%} [{missed['low']:.0%}, {missed['high']:.0%}]"
    rows = tuple(tuple(row.values()) for row in found["strata"])
    columns = tuple(found["strata"][0])
    return mi.reporting.Section(
        "Scores and exact effects",
        f"{found['n']} edges, drawn from four strata of |score|, were patched exactly, on at most {EXACT} "
        f"of the pairs: rank correlation {told}. Edges "
        f"outside the top 2% hold {mass} of all exact effects: what a circuit of this size leaves out.",
        table=mi.reporting.Table(columns, rows, "In the metric's unit."),
    )
