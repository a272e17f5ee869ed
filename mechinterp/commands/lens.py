"""`mechinterp lens MODEL`: what each layer would already predict."""

from mechinterp import tasks
from mechinterp.cli.analyses import Lens
from mechinterp.commands.inputs import load_model
from mechinterp.commands.output import TOP, frame_text, manifest, save
from mechinterp.files import write_text
from mechinterp.lens import TunedLens, logit_lens
from mechinterp.reporting import Report
from mechinterp.reporting.page import render
from mechinterp.reporting.sections.lens import lens_section
from mechinterp.reporting.sweeps import prompt_preview
from mechinterp.results import write_json


def run(args: Lens, command: str) -> int:
    """The readings of every layer, the finding, and the files asked for."""
    model = load_model(args)
    tuned = None if args.tuned is None else TunedLens.load(args.tuned, model)
    pairs = None if args.pairs is None else tasks.from_file(model, args.pairs, seed=args.seed)
    text = pairs if pairs is not None else args.prompt or ""
    result = logit_lens(model, text, args.answer, positions=args.positions, top=args.top, lens=tuned, seed=args.seed)
    print(result.summary())
    print(frame_text(result.top(TOP)))
    if args.json:
        save(args.json, result.to_json() | {"command": command}, write_json)
    if args.html:
        report = Report(
            title=f"{result.about['lens']} lens · {model.info.name}",
            question=f"At which layer does {model.info.name} know what comes next?",
            answer=result.summary(),
            header=f"{model.header()} · n = {result.n_prompts}",
            command=command,
            prompts=() if pairs is None else prompt_preview(model, pairs, 2),
            sections=(lens_section(result),),
            caveats=(
                "A lens says what can be read from a layer with the model's own output weights, not what the model "
                "uses; early layers may hold the answer in a form that this lens does not read.",
                *(["One text is an illustration, not a statistic."] if result.n_prompts == 1 else []),
            ),
            manifest=manifest(model, result.about),
        )
        save(args.html, render(report.payload()), write_text)
    return 0
