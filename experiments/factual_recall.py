"""Where does a model recall a fact? The logit lens and causal tracing, on facts that this model knows.

"The capital of the country France is the city of" -> " Paris" (Meng et al. 2022). The experiment

1. draws facts of ten relations and keeps those whose answer is the model's first prediction; it says how many;
2. reads every layer with the logit lens: when does the answer appear, beside the same reading of another subject?
3. noises the subject's embeddings and restores single states of the residual stream, and windows of MLP and attention
   outputs: which bring the answer back, beside the states of another subject?
4. compares with expected values, and writes one run folder and one offline report.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mechinterp as mi
from experiments.expected import Comparison, compare
from experiments.settings import Settings, command_line, finished

if TYPE_CHECKING:
    from mechinterp.lens import LensResult
    from mechinterp.patching import TraceResult
    from mechinterp.tasks import PromptPairs

SITES = {"resid_post": "residual stream", "mlp_out": "MLP", "attn_out": "attention"}


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the run; the same settings always have the same run folder."""

    n: int = 16
    """Facts, out of those that the model knows; fewer where it knows fewer."""
    every: int = 2
    """Layers from one traced layer to the next."""
    draws: int = 2
    """Draws of the noise."""
    noise: float = 3.0
    """Standard deviations of the subjects' embeddings."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    from mechinterp.lens import LensResult
    from mechinterp.patching import TraceResult

    model = config.load()
    facts = known_facts(model, config)
    inputs = {"model": model.weights_hash(), "pairs": facts.hash()}
    with mi.reporting.Run.open("factual_recall", config, root=config.root, inputs=inputs) as run:
        source = facts.source
        run.log(
            f"{source['known']} of {source['facts']} facts are known; {len(facts)} are used\n{facts.preview(model, 2)}"
        )
        baseline = mi.baseline(model, facts, seed=config.seed)
        run.log(str(baseline))

        def part(name: str, kind: Any, make: Any) -> Any:
            return run.part(name, make, kind.load, lambda result, path: result.save(path))

        lens: LensResult = part("lens", LensResult, lambda: mi.lens.logit_lens(model, facts, seed=config.seed))
        run.log(lens.summary())
        traces: dict[str, TraceResult] = {}
        for site, name in SITES.items():
            traces[name] = part(
                f"trace-{site}", TraceResult,
                lambda site=site: mi.patching.trace(
                    model, facts, site=site, noise=config.noise, draws=config.draws, seed=config.seed,
                    layers=range(0, model.n_layers, config.every),
                ),
            )  # fmt: skip
            run.log(traces[name].summary())
        against = compare("factual_recall", model.info.name, values(lens, traces), settings(config, facts))
        answer = finding(model, facts, lens, traces)
        path = run.finish(report(model, facts, baseline, lens, traces, against, answer, config))
        run.log(f"\n{answer}\n\n{against.verdict}")
    finished(path)
    return path


def known_facts(model: mi.HookedModel, config: Config) -> "PromptPairs":
    """`n` facts that the model knows, or all of them."""
    known = mi.tasks.facts(model, seed=config.seed)
    return known if len(known) <= config.n else mi.tasks.facts(model, n=config.n, seed=config.seed)


def values(lens: "LensResult", traces: "Mapping[str, TraceResult]") -> dict[str, float]:
    """What is compared with expected values."""
    made = {"P(answer) at the output": float(lens.data["prob_mean"].values[-1])}
    for name, result in traces.items():
        data = result.data["indirect"]
        made[f"{name}: total effect"] = float(result.total_effect["estimate"] or np.nan)
        for role in ("subject_last", "last"):
            column = data.sel(role=role)
            made[f"{name}: largest at {role}"] = float(column.max())
            made[f"{name}: layer of the largest at {role}"] = float(column["layer"][int(column.values.argmax())])
    return made


def settings(config: Config, facts: "PromptPairs") -> dict[str, Any]:
    """The settings that expected values belong to."""
    names = ("n", "every", "draws", "noise", "seed")
    return {name: getattr(config, name) for name in names} | {"bos": bool(facts.clean.bos)}


def finding(
    model: mi.HookedModel, facts: "PromptPairs", lens: "LensResult", traces: "Mapping[str, TraceResult]"
) -> str:
    """The answer in a few sentences, with intervals."""
    settled = np.asarray(lens.data["settled"].values, dtype=float)
    first = traces[next(iter(traces))].total_effect
    parts = []
    for name, result in traces.items():
        column = result.data.sel(role="subject_last")
        best = column.isel(layer=int(column["indirect"].values.argmax()))
        low, high = float(best["ci_low"]), float(best["ci_high"])
        parts.append(f"{name} layer {int(best['layer'])} {float(best['indirect']):.2f} [{low:.2f}, {high:.2f}]")
    total = f"{first['estimate']:.2f} [{first['ci_low']:.2f}, {first['ci_high']:.2f}]"
    return (
        f"{model.info.name} knows {facts.source['known']} of {facts.source['facts']} facts. The answer is first in the "
        f"logit lens from layer {np.nanmedian(settled):.0f} of {model.n_layers} on (median). Noise on the subject "
        f"takes {total} of P(answer); restored at the subject's last token, most comes back at {', '.join(parts)} "
        f"(n={len(facts)}, 95% {lens.about['scope']})."
    )


def report(
    model: mi.HookedModel,
    facts: "PromptPairs",
    baseline: Any,
    lens: "LensResult",
    traces: "Mapping[str, TraceResult]",
    against: Comparison,
    answer: str,
    config: Config,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.sections.lens import lens_section
    from mechinterp.reporting.sections.tracing import trace_section
    from mechinterp.reporting.sweeps import baseline_rows, prompt_preview

    return mi.reporting.Report(
        title="Where is a fact recalled?",
        question="At which tokens and layers does the model keep what it knows about a subject?",
        answer=answer,
        header=f"{model.header()} · {len(facts)} known facts",
        command=config.command(__file__),
        baseline=baseline_rows(baseline),
        prompts=prompt_preview(model, facts, 3),
        sections=(
            trace_section(traces),
            lens_section(lens),
            mi.reporting.Section("Against expected values", table=against.table()),
        ),
        caveats=(
            f"Only facts that the model knows are traced: {facts.source['known']} of {facts.source['facts']}.",
            f"Noise of {config.noise:g} standard deviations is off the model's usual inputs; other corruptions may "
            "name other layers.",
            "Restoring a window of layers is not restoring one: windows smear what they find over their width.",
            "A state that brings the answer back holds enough to recall it; it need not be where the fact is stored.",
            against.verdict,
        ),
    )


if __name__ == "__main__":
    command_line(main, Config, __doc__)
