"""Which edges compute "later than"? Circuit search on "The war began in 1732 and was not over until 17" -> 3 … 9.

Hanna et al. 2023 (How does GPT-2 compute greater-than?) find, in GPT-2 small, heads that attend from the end to the
start year, and MLPs behind them that raise later years. The experiment

1. searches, evaluates and doubts (circuit_study.py) on greater-than pairs: the corrupted prompt begins in …01, after
   which every ending is possible;
2. lists the circuit's heads and MLPs by what they write into the logits;
3. compares with expected values, and for GPT-2 with the published heads and MLPs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mechinterp as mi
from experiments.circuit_study import HELD_OUT, Study, StudySettings, published, sections, shares, study
from experiments.expected import Comparison, compare
from experiments.settings import command_line, finished

if TYPE_CHECKING:
    from mechinterp.tasks import PromptPairs


@dataclass(frozen=True)
class Config(StudySettings):
    """Settings of the run; the same settings always have the same run folder."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    model = config.load()
    task = mi.tasks.greater_than(model, config.n_held_out, config.seed + HELD_OUT)
    inputs = {"model": model.weights_hash(), "pairs": task.hash()}
    with mi.reporting.Run.open("greater_than_circuit", config, root=config.root, inputs=inputs) as run:
        print(task.preview(model, 2), flush=True)
        baseline = mi.baseline(model, task, seed=config.seed)
        run.log(str(baseline))
        found = study(model, lambda n, seed: mi.tasks.greater_than(model, n, seed), run, config)
        values = {**found.values(), **published("greater_than", model, found)}
        settings = {"n": config.n, "seed": config.seed, "method": config.method, "bos": bool(task.clean.bos)}
        against = compare("greater_than_circuit", model.info.name, values, settings)
        path = run.finish(report(model, task, baseline, found, values, against, config))
        told = ", ".join(f"{name} {score:+.2f}" for name, score in writers(found))
        run.log(f"\n{found.finding(model)}\n\nwrite into the logits: {told}\n\n{against.verdict}")
    finished(path)
    return path


def writers(found: Study, n: int = 12) -> list[tuple[str, float]]:
    """The circuit's nodes by the score of their edge into the logits."""
    graph, scores = found.circuit.graph, found.scores.of_edges
    last = len(graph.destinations) - 1
    edges = [e for e in found.circuit.kept.nonzero().flatten().tolist() if int(graph.edges[e, 0]) == last]
    named = [(graph.sources[int(graph.edges[e, 1])].name, float(scores[e])) for e in edges]
    return sorted(named, key=lambda one: -abs(one[1]))[:n]


def report(
    model: mi.HookedModel,
    task: "PromptPairs",
    baseline: Any,
    found: Study,
    values: dict[str, float],
    against: Comparison,
    config: Config,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.sweeps import baseline_rows, prompt_preview

    table = mi.reporting.Table(("node", "score of its edge into the logits"), tuple(writers(found)))
    return mi.reporting.Report(
        title="Which edges compute greater-than?",
        question=f"Which edges of {model.info.name} make later years likelier, and how far is that to be believed?",
        answer=found.finding(model),
        header=f"{model.header()} · greater-than, {config.n} pairs searched, {len(task)} held out",
        command=config.command(__file__),
        baseline=baseline_rows(baseline),
        prompts=prompt_preview(model, task, 2),
        sections=(
            *sections(found, task),
            mi.reporting.Section("Who writes into the logits", "Nodes of the circuit.", table=table),
            mi.reporting.Section("Against expected values", shares(values), table=against.table()),
        ),
        caveats=(
            "Where a tokenizer makes every digit a token, what is asked is the decade digit.",
            "The corrupted prompt differs in the start year alone: edges that carry what is the same in both prompts "
            "are invisible.",
            against.verdict,
        ),
    )


if __name__ == "__main__":
    command_line(main, Config, __doc__)
