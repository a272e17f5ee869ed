"""What happens when the heads that write the answer are knocked out? Direct effects, knock-outs and self-repair.

In GPT-2 small, taking the name movers out of indirect-object prompts hardly hurts: backup heads take over, negative
heads let go, the final norm rescales (Wang et al. 2023; McGrath et al. 2023; Rushing & Nanda 2024). The experiment

1. ranks all heads by their direct effect on the logit difference;
2. sorts those that pass both controls: movers (write the answer, look at IO), suppressors (write for the answer, look
   at the subject), negative heads (write against it), others;
3. knocks every head out alone, each class together, and the ranking one head after another: logit difference and
   P(answer), beside random heads of the same layers;
4. takes the change apart into what was lost and what makes up for it;
5. compares with expected values, and writes one run folder and one offline report.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mechinterp as mi
from experiments.expected import Comparison, compare
from experiments.ioi_patching import name_heads
from experiments.settings import Settings, command_line, finished

if TYPE_CHECKING:
    from mechinterp.ablation import Cumulative, KnockOut, ScanResult, SelfRepair
    from mechinterp.lens import DirectLogit
    from mechinterp.tasks import PromptPairs

Heads = list[tuple[int, int]]
CLASSES = {
    "movers": ("name mover",),
    "suppressors": ("subject suppressor",),
    "negative heads": ("negative name mover", "negative writer, looks elsewhere", "negative writer, looks at END"),
}


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the run; the same settings always have the same run folder."""

    n: int = 64
    """Prompt pairs."""
    k: int = 8
    """Heads of the ranking that are knocked out one after another."""
    over: Literal["clean", "abc"] = "clean"
    """Means are taken over the clean prompts, or over prompts of three unrelated names (Wang et al.)."""
    by: Literal["role", "template"] = "role"
    """Means by role, pooled over templates; or within a template (Wang et al.)."""
    draws: int = 10
    """Random sets of heads of the control."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    model = config.load()
    task = mi.tasks.ioi(model, config.n, config.seed)
    inputs = {"model": model.weights_hash(), "pairs": task.hash()}
    with mi.reporting.Run.open("ioi_knockout", config, root=config.root, inputs=inputs) as run:
        print(task.preview(model, 2), flush=True)
        baseline = mi.baseline(model, task, seed=config.seed)
        run.log(str(baseline))
        found = analyse(model, task, run, config)
        against = compare("ioi_knockout", model.info.name, found.values(), found_under(config, task))
        answer = found.finding(model)
        for name, figure in found.figures().items():
            run.figure(name, figure)
        path = run.finish(report(model, task, baseline, found, against, answer, config))
        run.log(f"\n{answer}\n\n{found.table()}\n\n{against.verdict}")
    finished(path)
    return path


@dataclass(frozen=True)
class Found:
    """All results: by class of heads where there are several."""

    direct: "DirectLogit"
    named: list[dict[str, Any]]
    classes: dict[str, Heads]
    scan: "ScanResult"
    knock_outs: "dict[str, KnockOut]"
    cumulative: "Cumulative"
    repairs: "dict[str, SelfRepair]"

    def values(self) -> dict[str, float]:
        """What is compared with expected values."""
        made = {}
        for name, result in self.knock_outs.items():
            for metric in ("logit_diff", "prob"):
                row = result.about["table"][metric]
                made |= {f"without {name}: {metric}": row["after"], f"whole model: {metric}": row["before"]}
        for name, result in self.repairs.items():
            share = result.about["repaired"]["estimate"]
            if share is not None:
                made[f"without {name}: share made up for"] = share
        return made

    def finding(self, model: mi.HookedModel) -> str:
        """The answer in a few sentences, with intervals."""
        if "movers" not in self.knock_outs:
            names = ", ".join(self.knock_outs) or "none"
            return f"In {model.info.name} no name mover passes both controls (classes found: {names})."
        table, share = self.knock_outs["movers"].about["table"], self.repairs["movers"].about["repaired"]
        repaired = "is undefined"
        if share["estimate"] is not None:
            repaired = f"is {share['estimate']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"
        movers = ", ".join(self.repairs["movers"].about["heads"])
        gap, prob = _change(table["logit_diff"]), _change(table["prob"])
        return (
            f"Without its name movers ({movers}) {model.info.name}'s logit difference goes from {gap}, and P(answer) "
            f"from {prob}; the share of their direct effect that the rest makes up for {repaired}."
        )

    def table(self) -> str:
        """One line a knock-out."""
        return "\n".join(f"{name}: {result.summary()}" for name, result in self.knock_outs.items())

    def figures(self) -> dict[str, Any]:
        """Figures by name."""
        from mechinterp.reporting.sections.ablation import scan_figure

        return {"direct_effects": self.direct.figure(), "scan": scan_figure(self.scan)}


def _change(row: dict[str, float]) -> str:
    """Before and after with the interval of the change, and what random heads of the same layers change."""
    ends = f"{row['change']:+.2f} [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
    return f"{row['before']:.2f} to {row['after']:.2f} ({ends}; random heads of the same layers {row['control']:+.2f})"


def analyse(model: mi.HookedModel, task: "PromptPairs", run: "mi.reporting.Run", config: Config) -> Found:
    """Every result, from the run folder where it is done."""
    from mechinterp.ablation import Cumulative, KnockOut, ScanResult, SelfRepair
    from mechinterp.lens import DirectLogit

    over = "clean" if config.over == "clean" else mi.tasks.ioi(model, config.n, config.seed, "new-names").corrupted
    how: dict[str, Any] = {"positions": "END", "over": over, "by": config.by, "seed": config.seed}

    def part(name: str, kind: Any, make: Any) -> Any:
        return run.part(name, make, kind.load, lambda result, path: result.save(path))

    direct = part("direct", DirectLogit, lambda: mi.lens.direct_logit(model, task, sources="roles", seed=config.seed))
    passing = [row["component"] for row in direct.top(12).to_dict("records") if row["passes"]]
    heads = [(int(a), int(b)) for a, b in (name[1:].split("H") for name in passing if name.startswith("L"))]
    named = name_heads(model, task, heads)
    classes = sort_heads(heads, named)
    scan = part("scan", ScanResult, lambda: mi.ablation.scan(model, task, **how))
    knock_outs, repairs = {}, {}
    for name, chosen in classes.items():
        slug = name.replace(" ", "_")
        knock_outs[name] = part(
            f"knock_out-{slug}", KnockOut,
            lambda chosen=chosen: mi.ablation.knock_out(model, task, chosen, draws=config.draws, **how),
        )  # fmt: skip
        repairs[name] = part(
            f"self_repair-{slug}", SelfRepair,
            lambda chosen=chosen: mi.ablation.self_repair(model, task, chosen, draws=3, **how),
        )  # fmt: skip
    ranking = direct.ranking()[: config.k]
    along = part(
        "cumulative", Cumulative,
        lambda: mi.ablation.cumulative(model, task, ranking, draws=min(5, config.draws), **how),
    )  # fmt: skip
    return Found(direct, named, classes, scan, knock_outs, along, repairs)


def sort_heads(heads: Heads, named: list[dict[str, Any]]) -> dict[str, Heads]:
    """Classes that have heads, by the names that follow from where a head looks and what it writes."""
    made = {}
    for name, names in CLASSES.items():
        chosen = [head for head, one in zip(heads, named, strict=True) if one["name"] in names]
        if chosen:
            made[name] = chosen
    return made


def found_under(config: Config, task: "PromptPairs") -> dict[str, Any]:
    """The settings that expected values belong to."""
    return {"n": config.n, "seed": config.seed, "over": config.over, "by": config.by, "bos": bool(task.clean.bos)}


def report(
    model: mi.HookedModel,
    task: "PromptPairs",
    baseline: Any,
    found: Found,
    against: Comparison,
    answer: str,
    config: Config,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.attention import attention_view
    from mechinterp.reporting.sections.ablation import (
        cumulative_section,
        knock_out_section,
        scan_figure,
        self_repair_section,
    )
    from mechinterp.reporting.sections.direct_logit import direct_logit_section
    from mechinterp.reporting.sweeps import baseline_rows, prompt_preview

    heads = {one["head"]: one["name"] for one in found.named}
    rows = tuple((one["head"], one["name"], one["to_io"], one["to_s"]) for one in found.named)
    who = mi.reporting.Section(
        "The heads that write the answer",
        "Heads whose direct effect passes both controls, named by where they look and what they write.",
        table=mi.reporting.Table(("head", "name", "writes IO", "writes S"), rows, "Direct effect on the two names."),
        attention=attention_view(model, task.clean, heads) if heads else None,
    )
    alone = [scan_figure(found.scan, metric) for metric in found.scan.metrics]
    sections = [
        who,
        *([knock_out_section(found.knock_outs)] if found.knock_outs else []),
        *([self_repair_section(found.repairs)] if found.repairs else []),
        cumulative_section(found.cumulative),
        mi.reporting.Section("Every head alone", found.scan.summary(), figures=tuple(alone)),
        direct_logit_section(found.direct),
        mi.reporting.Section("Against expected values", table=against.table()),
    ]
    return mi.reporting.Report(
        title="What happens when the writers of the answer are knocked out?",
        question="What does the model lose without the heads that write the answer, and what makes up for them?",
        answer=answer,
        header=f"{model.header()} · IOI, {len(task)} pairs",
        command=config.command(__file__),
        baseline=baseline_rows(baseline),
        prompts=prompt_preview(model, task, 2),
        sections=tuple(sections),
        caveats=(
            f"Knock-outs at END, mean over the {config.over} prompts by {config.by}.",
            "A small change does not mean that a head does little: what it did may be made up for. A class is a label "
            "from attention and direct effect, not a proof of its part.",
            "Random heads of the same layers may hold other heads of the circuit: the control asks whether these heads "
            "matter more than their neighbours.",
            against.verdict,
        ),
    )


if __name__ == "__main__":
    command_line(main, Config, __doc__)
