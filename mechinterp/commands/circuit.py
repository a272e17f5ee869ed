"""`mechinterp circuit find | evaluate | show`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mechinterp import circuit_file, circuits
from mechinterp.circuits import files
from mechinterp.circuits.acdc import ACDC
from mechinterp.circuits.evaluation import Evaluation
from mechinterp.circuits.methods import EAPIG, EAPIGActivations, Method
from mechinterp.cli.circuits import CircuitEvaluate, CircuitFind, CircuitShow
from mechinterp.commands.inputs import load_model, load_named, load_pairs
from mechinterp.commands.output import frame_text, manifest, save, shown, table
from mechinterp.evaluation import baseline
from mechinterp.files import write_text
from mechinterp.hooked.model import HookedModel
from mechinterp.reporting import Report
from mechinterp.reporting.page import render
from mechinterp.reporting.sections.circuit_evaluation import evaluation_sections
from mechinterp.reporting.sections.circuits import circuit_section, strongest
from mechinterp.reporting.sweeps import baseline_rows, prompt_preview
from mechinterp.results import write_json
from mechinterp.tasks.pairs import PromptPairs


def find(args: CircuitFind, command: str) -> int:
    """Scores of every edge, and the file asked for."""
    model = load_model(args)
    pairs = load_pairs(model, args)
    positions: Any = False if args.positions == "none" else args.positions
    graph = circuits.Graph(model, args.qkv, args.mlp, positions)
    print(graph)
    scores = circuits.find(
        graph, pairs, _method(args), ablation=args.ablation, direction=args.direction, metric=args.metric,
        controls=not args.no_controls, seed=args.seed, force=args.force,
    )  # fmt: skip
    scores = replace(scores, about={**scores.about, "command": command})
    print(scores.summary())
    print(frame_text(scores.top()))
    print(f"control rankings from the same pairs: {', '.join(scores.rankings) or 'none'}")
    save(args.out, scores, files.save)
    print("evaluate it on pairs that it has not seen: mechinterp circuit evaluate, with another --seed")
    return 0


def _method(args: CircuitFind) -> Method:
    """The method with its settings; those not given are its own."""
    method = circuits.METHODS[args.method]()
    if isinstance(method, EAPIG | EAPIGActivations):
        return replace(method, steps=args.steps or method.steps, rule=args.rule or method.rule)
    if isinstance(method, ACDC) and args.threshold is not None:
        return replace(method, threshold=args.threshold)
    return method


def evaluate(args: CircuitEvaluate, command: str) -> int:
    """Curves, areas and controls, and the files asked for."""
    header = circuit_file.read_header(args.file)
    bos = args.prepend_bos if args.prepend_bos is not None else header["about"].get("bos")
    model = load_named(args.model or header["model"]["name"], args, bos)
    found = files.load(args.file, model, any_weights=args.any_weights)
    pairs = load_pairs(model, args)
    searched, asked = (
        f"{one.get('task')}, {one.get('corruption')}"
        for one in (found.about, {"task": pairs.name, "corruption": pairs.corruption})
    )
    if searched != asked:
        print(f"note: searched on {searched}; evaluated on {asked}")
    if isinstance(found, circuits.Circuit):
        values = circuits.faithfulness(found, pairs, seed=args.seed)
        print(found.summary())
        print("\n".join(f"{name:>12}  {shown(value)}" for name, value in values.items()))
        if args.json:
            save(args.json, {**values, "n_prompts": len(pairs), "command": command}, write_json)
        if args.html:
            report = _report(model, pairs, found, None, found.summary(), command, args.seed)
            save(args.html, render(report.payload()), write_text)
        return 0
    result = circuits.evaluate(found, pairs, control_sizes=args.sizes, seed=args.seed)
    print(result.summary())
    print(frame_text(result.top()))
    print(frame_text(result.controls()))
    if args.json:
        save(args.json, result.to_json() | {"command": command}, write_json)
    if args.html:
        report = _report(model, pairs, found, result, result.summary(), command, args.seed)
        save(args.html, render(report.payload()), write_text)
    return 0


def _report(
    model: HookedModel,
    pairs: PromptPairs,
    found: circuits.Circuit | circuits.Scores,
    result: Evaluation | None,
    answer: str,
    command: str,
    seed: int,
) -> Report:
    """One page: the finding, the curves beside controls, the graph, where its heads look."""
    sections = [] if result is None else evaluation_sections(result)
    circuit = strongest(found) if isinstance(found, circuits.Scores) else found
    interval = found.interval_of_edges if isinstance(found, circuits.Scores) else None
    graph = [circuit_section(circuit, pairs, interval)] if len(circuit) else []
    return Report(
        title=f"circuit · {model.info.name}",
        question=f"Which edges of {model.info.name} compute {pairs.name}, and how far is that to be believed?",
        answer=answer,
        header=f"{model.header()} · n = {len(pairs)}",
        command=command,
        baseline=baseline_rows(baseline(model, pairs, seed=seed)),
        prompts=prompt_preview(model, pairs, 2),
        sections=(*sections, *graph),
        caveats=(
            "Faithful edges need not be the whole of what computes the behaviour: backups and redundant paths are "
            "invisible to ablations of the clean run.",
            "CPR grows when edges that hurt the behaviour are left out, and can exceed 1: read CMD first.",
        ),
        manifest=manifest(model, circuit.about),
    )


def show(args: CircuitShow, command: str) -> int:
    """What a file says, without its model."""
    found = circuit_file.read(args.file)
    header = circuit_file.read_header(args.file)
    for name in ("kind", "task", "method", "settings", "ablation", "direction", "metric", "seed", "n_prompts", "graph"):
        if header.get(name) is not None:
            print(f"{name:>12}  {_one_line(header[name])}")
    model = {**header["model"], "weights_sha256": header["model"]["weights_sha256"][:12]}
    print(f"{'model':>12}  {_one_line(model)}")
    print(f"{'listed':>12}  {header['n_listed']} units; control rankings: {', '.join(header['rankings']) or 'none'}")
    rows = list(circuit_file.rows(found))
    rows.sort(key=lambda row: -abs(row.get("score", 0.0)))
    if rows:
        columns = list(rows[0])
        print(table(columns, [[shown(row[name]) for name in columns] for row in rows[: args.top]]))
    return 0


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_one_line(item)}" for name, item in value.items())
    return str(value)
