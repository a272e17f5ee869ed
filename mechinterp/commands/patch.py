"""`mechinterp patch MODEL`: the sweep, its finding, and the files asked for."""

import pandas as pd

from mechinterp.cli.analyses import Patch
from mechinterp.cli.flags import parse_layers
from mechinterp.commands.inputs import load_model, load_pairs
from mechinterp.commands.output import TOP, frame_table, frame_text, manifest, save
from mechinterp.evaluation import Baseline, baseline
from mechinterp.files import write_text
from mechinterp.hooked.model import HookedModel
from mechinterp.patching import SweepResult, sweep
from mechinterp.reporting import Report, Section
from mechinterp.reporting.page import render
from mechinterp.reporting.sweeps import baseline_rows, prompt_preview, threshold_text
from mechinterp.results import write_json
from mechinterp.tasks.pairs import PromptPairs


def run(args: Patch, command: str) -> int:
    """`mechinterp patch MODEL`: the sweep, its finding, and the files asked for."""
    model = load_model(args)
    pairs = load_pairs(model, args)
    before = baseline(model, pairs, args.metric, args.seed)
    print(f"baseline: {before}", flush=True)
    result = sweep(
        model, pairs, args.site, args.positions, args.direction, args.metric,
        layers=parse_layers(args.layers), seed=args.seed, force=args.force,
    )  # fmt: skip
    print(result.summary())
    print(frame_text(_top(result)))
    print(_controls(result))
    if args.json:
        save(args.json, result.to_json() | {"command": command}, write_json)
    if args.html:
        made = _sweep_report(model, pairs, before, result, command)
        save(args.html, render(made.payload()), write_text)
    return 0


def _top(result: SweepResult) -> pd.DataFrame:
    """The largest cells by name, with every number that the result keeps of a cell."""
    return result.top(TOP).drop(columns=result.dims)


def _controls(result: SweepResult) -> str:
    about = result.about
    return (
        f"passes: |effect| > {threshold_text(result)} (sign flips, family-wise 5% over all "
        f"{result.data['effect'].size} cells), and the 95% interval of its difference to a donor's patch "
        f"(control: {about['control']}) excludes 0"
    )


def _sweep_report(
    model: HookedModel, pairs: PromptPairs, before: Baseline, result: SweepResult, command: str
) -> Report:
    """One page: the question, the finding, the baseline, the prompts, the figure and the top cells."""
    about = result.about
    verb = "restore" if about["direction"] == "denoise" else "destroy"
    figures = Section(
        heading=f"{about['site']}, {about['direction']}, positions {about['positions']}",
        text=_controls(result),
        figures=(result.figure(),),
        table=frame_table(_top(result), "The cells of largest |effect|."),
    )
    return Report(
        title=f"patch {about['site']} · {about['model']}",
        question=f"Which cells of {about['site']} in {about['model']} {verb} the {about['metric']} of {about['task']}?",
        answer=result.summary(),
        header=f"{about['header']} · n = {about['n_prompts']}",
        command=command,
        baseline=baseline_rows(before),
        prompts=prompt_preview(model, pairs, 2),
        sections=(figures,),
        caveats=_caveats(result),
        manifest=manifest(model, about),
    )


def _caveats(result: SweepResult) -> tuple[str, ...]:
    about = result.about
    return (
        f"Intervals are 95%, {about['scope']}; they say nothing of prompts of another kind.",
        "An effect is a ratio of means over prompts: 0 is the run that is patched, 1 the run that the activation comes "
        "from. Effects of several cells do not add up, and may lie outside 0 … 1.",
        f"Patched in the {'corrupted' if about['direction'] == 'denoise' else 'clean'} run "
        f"({about['direction']}; corruption: {about['corruption']}). The other direction, or another corruption, may "
        "name other cells.",
        "The donor control is run for the largest cells only; the others have none.",
    )
