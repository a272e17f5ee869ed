"""Which edges compute the indirect object, and how far is that to be believed? Circuit search end to end.

1. Search, evaluation on held-out pairs with controls, a second seed, exact effects and the protocol sweep
   (circuit_study.py), with the subject swapped; search and evaluation with three new names beside it.
2. The path-patching story (Wang et al. 2023), told by the model: which heads write into the logits; which write into
   these writers' queries; which write into those heads' values and keys. Each stage's heads are a class.
3. Do search and story agree? Which heads of each class write along edges of the circuit; completeness, minimality and
   sufficiency of the classes.
4. Compare with expected values: measured before on SmolLM2, published for GPT-2.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mechinterp as mi
from experiments.circuit_study import HELD_OUT, Study, StudySettings, published, sections, shares, study
from experiments.expected import Comparison, compare
from experiments.settings import command_line, finished

if TYPE_CHECKING:
    from mechinterp.circuits import Evaluation
    from mechinterp.circuits.path_patching import PathPatches
    from mechinterp.circuits.properties import Properties
    from mechinterp.tasks import PromptPairs

Classes = dict[str, list[str]]
WRITERS, ASKERS, TELLERS = "write into the logits", "write into their queries", "write into those values and keys"


@dataclass(frozen=True)
class Config(StudySettings):
    """Settings of the run; the same settings always have the same run folder."""

    n_paths: int = 16
    """Pairs of path patching."""
    per_class: int = 8
    """Heads of each class, at most."""
    draws: int = 4
    """Random sets of nodes for completeness and minimality."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    model = config.load()
    task = mi.tasks.ioi(model, config.n_held_out, config.seed + HELD_OUT)
    inputs = {"model": model.weights_hash(), "pairs": task.hash()}
    with mi.reporting.Run.open("ioi_circuit", config, root=config.root, inputs=inputs) as run:
        print(task.preview(model, 2), flush=True)
        baseline = mi.baseline(model, task, seed=config.seed)
        run.log(str(baseline))
        swapped = study(model, lambda n, seed: mi.tasks.ioi(model, n, seed), run, config)
        beside = new_names(model, run, config)
        stages = paths(model, run, config)
        classes = classes_of(stages, config)
        kinds = run.part(
            "properties", lambda: mi.circuits.properties(
                swapped.circuit, task, classes, draws=config.draws, greedy_steps=2, seed=config.seed),
            _properties().load, lambda result, path: result.save(path),
        )  # fmt: skip
        found = swapped.values() | values_beside(beside, config.size) | agreement(swapped, classes)
        found |= published("ioi", model, swapped)
        settings = {"n": config.n, "seed": config.seed, "method": config.method, "bos": bool(task.clean.bos)}
        against = compare("ioi_circuit", model.info.name, found, settings)
        answer = swapped.finding(model)
        path = run.finish(
            report(model, task, baseline, swapped, beside, stages, classes, kinds, found, against, config)
        )
        told = (answer, story(classes, swapped), f"new names: {beside.summary()}", kinds.summary(), against.verdict)
        run.log("\n" + "\n\n".join(told))
    finished(path)
    return path


def _properties() -> "type[Properties]":
    from mechinterp.circuits.properties import Properties

    return Properties


def new_names(model: mi.HookedModel, run: "mi.reporting.Run", config: Config) -> "Evaluation":
    """The same search and evaluation with three new names as the corruption."""
    from mechinterp.circuits import Evaluation

    def make() -> Evaluation:
        search = mi.tasks.ioi(model, config.n, config.seed, "new-names")
        held_out = mi.tasks.ioi(model, config.n_held_out, config.seed + HELD_OUT, "new-names")
        scores = mi.circuits.find(mi.circuits.Graph(model), search, config.method, seed=config.seed)
        sizes = sorted({*mi.circuits.GRID, config.size})
        return mi.circuits.evaluate(scores, held_out, sizes=sizes, control_sizes=(config.size,), seed=config.seed)

    return run.part("new-names", make, Evaluation.load, lambda result, path: result.save(path))


def values_beside(beside: "Evaluation", size: float) -> dict[str, float]:
    """What is compared with expected values, of the search with new names."""
    at = float(beside.data["faithfulness"].sel(selection="absolute", size=size))
    areas = {f"new names: {name}": beside.about[name]["value"] for name in ("cmd", "cpr")}
    return {f"new names: faithfulness at {size:.0%}": at, **{k: v for k, v in areas.items() if v is not None}}


def paths(model: mi.HookedModel, run: "mi.reporting.Run", config: Config) -> "dict[str, PathPatches]":
    """Path patching, stage after stage: into the logits, the writers' queries, those heads' values and keys."""
    from mechinterp.circuits.path_patching import PathPatches

    graph = mi.circuits.Graph(model)
    pairs = mi.tasks.ioi(model, config.n_paths, config.seed)
    stages: dict[str, PathPatches] = {}

    def stage(name: str, receivers: list[str]) -> None:
        slug = f"paths-{len(stages)}"
        stages[name] = run.part(
            slug, lambda: mi.circuits.path_patch(graph, pairs, receivers, seed=config.seed),
            PathPatches.load, lambda result, path: result.save(path),
        )  # fmt: skip

    stage(WRITERS, ["logits"])
    stage(ASKERS, [f"{head}<q>" for head in leading(stages[WRITERS], config.per_class)])
    groups = {group_of(model, head) for head in classes_of(stages, config).get(ASKERS, [])}
    if groups:
        stage(TELLERS, [f"{group}<{name}>" for group in sorted(groups) for name in "kv"])
    return stages


def leading(patches: "PathPatches", n: int) -> list[str]:
    """The passing senders of largest |effect|, at most n; the largest one where none passes."""
    frame = patches.top(patches.data.sizes["source"])
    passing = frame[frame["passes"]]["source"].tolist()
    return (passing or frame["source"].tolist()[:1])[:n]


def group_of(model: mi.HookedModel, head: str) -> str:
    """The name of the key/value input of a head: its own, or its group's."""
    layer, index = head[1:].split(".h")
    size = model.n_heads // model.n_kv_heads
    return head if size == 1 else f"a{layer}.kv{int(index) // size}"


def classes_of(stages: "dict[str, PathPatches]", config: Config) -> Classes:
    """Each head in the first stage that it leads."""
    made: Classes = {}
    for name, patches in stages.items():
        taken = {head for members in made.values() for head in members}
        fresh = [head for head in leading(patches, len(taken) + config.per_class) if head not in taken]
        fresh = fresh[: config.per_class]
        if fresh:
            made[name] = fresh
    return made


def agreement(found: Study, classes: Classes) -> dict[str, float]:
    """Share of each class that writes along an edge of the circuit."""
    writing = found.circuit.writers
    return {
        f"in the circuit of those that {name}": sum(head in writing for head in members) / len(members)
        for name, members in classes.items()
    }


def story(classes: Classes, found: Study) -> str:
    """The classes in one sentence each."""
    writing = found.circuit.writers
    share = len(found.circuit.heads) / (found.circuit.graph.model.n_layers * found.circuit.graph.model.n_heads)
    lines = [
        f"{name}: {', '.join(members)} ({sum(one in writing for one in members)} of {len(members)} in the circuit)"
        for name, members in classes.items()
    ]
    return "\n".join([*lines, f"by chance: the circuit holds {share:.0%} of all heads"])


def report(
    model: mi.HookedModel,
    task: "PromptPairs",
    baseline: Any,
    found: Study,
    beside: "Evaluation",
    stages: "dict[str, PathPatches]",
    classes: Classes,
    kinds: "Properties",
    values: dict[str, float],
    against: Comparison,
    config: Config,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.sections.circuit_evaluation import (
        control_section,
        faithfulness_figure,
        properties_section,
    )
    from mechinterp.reporting.sweeps import baseline_rows, prompt_preview

    writing = found.circuit.writers
    rows = []
    for name, members in classes.items():
        effects = stages[name].data.sel(source=members)
        for i, head in enumerate(members):
            numbers = [float(effects[key][i]) for key in ("effect", "ci_low", "ci_high")]
            rows.append((name, head, *numbers, head in writing))
    heads = mi.reporting.Section(
        "The path-patching story",
        "Heads by what they write into, stage after stage: the effect of the corrupted run's output of one head on the "
        "metric through the receivers alone, other heads held (0: nothing, 1: as the corrupted run).\n\n"
        + story(classes, found).replace("\n", "\n\n"),
        table=mi.reporting.Table(
            ("class", "head", "effect", "low", "high", "in the circuit"), tuple(rows), "95% intervals.", max_rows=20
        ),
    )
    other = mi.reporting.Section(
        "With three new names",
        "The same search and evaluation, corrupted by three unrelated names instead of a swapped subject.\n\n"
        + beside.summary(),
        figures=(faithfulness_figure(beside),),
        table=control_section(beside).table,
    )
    return mi.reporting.Report(
        title="Which edges compute the indirect object?",
        question=f"Which edges of {model.info.name} compute the indirect object, and how far is that to be believed?",
        answer=found.finding(model),
        header=f"{model.header()} · IOI, {config.n} pairs searched, {len(task)} held out",
        command=config.command(__file__),
        baseline=baseline_rows(baseline),
        prompts=prompt_preview(model, task, 2),
        sections=(
            *sections(found, task),
            heads,
            properties_section(kinds),
            other,
            mi.reporting.Section("Against expected values", shares(values), table=against.table()),
        ),
        caveats=(
            "The search and all measures ablate by the corrupted prompt of the pair, so they see what differs between "
            "the two prompts, and nothing that is the same in both.",
            "Classes are made by this model's own path patching; the names of Wang et al. are not implied.",
            against.verdict,
        ),
    )


if __name__ == "__main__":
    command_line(main, Config, __doc__)
