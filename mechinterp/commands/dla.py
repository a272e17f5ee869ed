"""`mechinterp dla MODEL`: what each component writes for the answer."""

from mechinterp.cli.analyses import Dla
from mechinterp.commands.inputs import load_model, load_pairs
from mechinterp.commands.output import TOP, frame_text, manifest, save
from mechinterp.evaluation import baseline
from mechinterp.files import write_text
from mechinterp.lens.direct_logit import DirectLogit, direct_logit
from mechinterp.reporting import Report
from mechinterp.reporting.page import render
from mechinterp.reporting.sections.direct_logit import direct_logit_section
from mechinterp.reporting.sweeps import baseline_rows, prompt_preview, threshold_text
from mechinterp.results import write_json


def run(args: Dla, command: str) -> int:
    """The attribution, its finding, and the files asked for."""
    model = load_model(args)
    pairs = load_pairs(model, args)
    result = direct_logit(
        model, pairs, args.side, against=args.against, sources=args.sources, neurons=args.neurons, seed=args.seed
    )
    print(result.summary())
    print(frame_text(result.top(TOP)))
    print(_sum(result))
    if args.json:
        save(args.json, result.to_json() | {"command": command}, write_json)
    if args.html:
        before = baseline(model, pairs, None if pairs.answers.has_wrong else "logprob", args.seed)
        report = Report(
            title=f"direct logit attribution · {model.info.name}",
            question=f"Which components of {model.info.name} write the answer of {pairs.name} into the logits?",
            answer=result.summary(),
            header=f"{model.header()} · n = {len(pairs)}",
            command=command,
            baseline=baseline_rows(before),
            prompts=prompt_preview(model, pairs, 2),
            sections=(direct_logit_section(result),),
            caveats=(
                "A direct effect is what a component writes itself, past all later layers: heads that act through "
                "others have none, and effects of components that later ones undo are counted in full.",
                f"passes: |effect| > {threshold_text(result)} (sign flips, family-wise 5% over all components), and "
                f"the 95% interval of its difference to the control ({result.about['control']}) excludes 0.",
            ),
            manifest=manifest(model, result.about),
        )
        save(args.html, render(report.payload()), write_text)
    return 0


def _sum(result: DirectLogit) -> str:
    """The parts and their sum, which is the logit difference."""
    effect, data = result.data["effect"], result.data
    heads, mlps = float(result.grid().sum()), float(result.mlps().sum())
    ends = [float(effect.sel(component=name)) for name in ("embed", "bias")]
    total, cap, own = (float(data[name].mean()) for name in ("total", "soft_cap", "logit_diff"))
    capped = f", soft-cap {cap:+.3f}" if abs(cap) > 1e-6 else ""
    return (
        f"sum: heads {heads:+.3f}, MLPs {mlps:+.3f}, embedding {ends[0]:+.3f}, biases {ends[1]:+.3f} = {total:.3f}"
        f"{capped}; the model's own: {own:.3f}"
    )
