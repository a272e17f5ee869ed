"""`mechinterp steer MODEL`: a strength sweep with a random control, and what the steered model says."""

from collections.abc import Sequence
from pathlib import Path

from mechinterp import steering
from mechinterp.cli.analyses import Steer
from mechinterp.cli.flags import parse_strengths
from mechinterp.commands.inputs import load_model
from mechinterp.commands.output import frame_text, manifest, save
from mechinterp.errors import UserError
from mechinterp.files import write_text
from mechinterp.reporting import Report
from mechinterp.reporting.page import render
from mechinterp.reporting.sections.steering import steering_section
from mechinterp.results import write_json

COLUMNS = ["strength", "mean", "ci_low", "ci_high", "control_low", "control_high", "passes", "kl", "kl_control"]


def run(args: Steer, command: str) -> int:
    """The sweep, the generations, and the files asked for."""
    model = load_model(args)
    positive, negative, prompts = (_texts(one) for one in (args.positive, args.negative, args.prompt))
    vector = steering.vector(model, positive, negative, ("resid_post", args.layer), args.positions)
    print(vector)
    task = steering.probes(model, prompts, args.answer, args.wrong)
    result = steering.sweep(
        model, vector, task, strengths=parse_strengths(args.strengths), draws=args.draws, seed=args.seed
    )
    print(result.summary())
    print(frame_text(result.top().filter(COLUMNS)))
    said: dict[float, list[str]] = {}
    if args.max_new_tokens:
        for strength in result.data["strength"].values.tolist():
            edits = [vector.at(strength)]
            said[strength] = model.generate(prompts, args.max_new_tokens, interventions=edits).texts
            print(f"{strength:>6g}  {prompts[0]}|{said[strength][0]!r}")
    if args.json:
        made = result.to_json() | {"generations": {f"{strength:g}": texts for strength, texts in said.items()}}
        save(args.json, made | {"prompts": prompts, "command": command}, write_json)
    if args.html:
        report = Report(
            title=f"steering · {model.info.name}",
            question=f"What does the direction do to {model.info.name}, and at what cost?",
            answer=result.summary(),
            header=f"{model.header()} · n = {len(prompts)}",
            command=command,
            sections=(steering_section(result, {strength: texts[0] for strength, texts in said.items()}),),
            caveats=(
                "A direction that moves the metric by no more than random ones of the same norm has shown nothing.",
                "Strong steering breaks the model: the KL on unrelated text says how far.",
            ),
            manifest=manifest(model, result.about),
        )
        save(args.html, render(report.payload()), write_text)
    return 0


def _texts(given: Sequence[str]) -> list[str]:
    """The texts, or the lines of the one file that is named."""
    if len(given) > 1 or not Path(given[0]).is_file():
        return list(given)
    lines = [line for line in Path(given[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{given[0]} holds no text; one text a line is expected")
    return lines
