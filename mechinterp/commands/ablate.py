"""`mechinterp ablate MODEL`: both metrics before and after a knock-out."""

from mechinterp.ablation import knock_out
from mechinterp.cli.analyses import Ablate
from mechinterp.cli.flags import parse_edges, parse_heads, parse_layers
from mechinterp.commands.inputs import load_model, load_pairs
from mechinterp.commands.output import frame_text, manifest, save
from mechinterp.evaluation import baseline
from mechinterp.files import write_text
from mechinterp.reporting import Report
from mechinterp.reporting.page import render
from mechinterp.reporting.sections.ablation import knock_out_section
from mechinterp.reporting.sweeps import baseline_rows, prompt_preview
from mechinterp.results import write_json
from mechinterp.text import blocks

TEXT_BLOCKS, TEXT_LENGTH = 16, 128  # for the loss on plain text


def run(args: Ablate, command: str) -> int:
    """The knock-out, what it did, and the files asked for."""
    model = load_model(args)
    pairs = load_pairs(model, args)
    text = None if args.text is None else blocks(model, args.text, TEXT_LENGTH, TEXT_BLOCKS, per_document=1)
    heads, neurons = ([(layer, at or 0) for layer, at in parse_heads(one) or []] for one in (args.heads, args.neurons))
    without_roles = "position" if args.value == "resample" else "all"
    result = knock_out(
        model, pairs, heads, parse_layers(args.mlps, "--mlps") or [], neurons, parse_edges(args.edges) or [],
        args.value, args.positions, args.over, args.by or ("role" if pairs.roles else without_roles),
        text=text, draws=args.draws, seed=args.seed, force=args.force,
    )  # fmt: skip
    print(result.summary())
    print(frame_text(result.top()))
    print(f"control: {result.about['control_sets']}")
    if args.json:
        save(args.json, result.to_json() | {"command": command}, write_json)
    if args.html:
        report = Report(
            title=f"knock-out · {model.info.name}",
            question=f"What does {model.info.name} lose on {pairs.name} without {result.about['components']}?",
            answer=result.summary(),
            header=f"{model.header()} · n = {len(pairs)}",
            command=command,
            baseline=baseline_rows(baseline(model, pairs, seed=args.seed)),
            prompts=prompt_preview(model, pairs, 2),
            sections=(knock_out_section({result.about["components"]: result}),),
            caveats=(
                "A knock-out shows what the rest of the model cannot make up for: backup heads hide what a component "
                "does when it is there.",
                f"Intervals are 95%, {result.about['scope']}.",
            ),
            manifest=manifest(model, result.about),
        )
        save(args.html, render(report.payload()), write_text)
    return 0
