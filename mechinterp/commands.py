"""What the subcommands do: load, run, print. The grammar and the checks of files and flags are in cli.py."""

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mechinterp
from mechinterp import cli, identities, tasks
from mechinterp.errors import UserError
from mechinterp.evaluation import Baseline, baseline
from mechinterp.files import write_text
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import KINDS
from mechinterp.models import load, local_names
from mechinterp.models.catalog import CATALOG, fetch
from mechinterp.patching import SweepResult, sweep
from mechinterp.reporting import Report, Section, Table, rebuild
from mechinterp.reporting.page import render
from mechinterp.reporting.sweeps import baseline_rows, prompt_preview, threshold_text
from mechinterp.results import plain, write_json
from mechinterp.tasks.pairs import PromptPairs

N_DEFAULT = 32
TOP = 12  # rows of the printed table


def check(args: cli.Check) -> int:
    """`mechinterp check MODEL`: 0 if no identity fails, else 1."""
    model = _load(args)
    measured = identities.check(model, args.n, args.seed)
    words = {True: "pass", False: "FAIL", None: "skip"}
    rows = [(one.name, words[one.ok], _scientific(one.value), _scientific(one.tolerance), one.note) for one in measured]
    print(table(("identity", "", "measured", "tolerance", "note"), rows))
    failed, skipped = (sum(one.ok is word for one in measured) for word in (False, None))
    print(f"{len(measured) - failed - skipped} hold, {failed} fail, {skipped} skipped")
    if args.json:
        found = {"model": args.model, "header": model.header(), "ok": not failed}
        _save(args.json, found | {"identities": [vars(one) for one in measured]}, write_json)
    return 1 if failed else 0


def sites(args: cli.Sites) -> int:
    """`mechinterp sites MODEL`."""
    model = _load(args)
    listed = [_describe(model, name) for name in dict.fromkeys(site.name for site in model.site_list)]
    rows = [
        (one["site"], one["shape"], one["layers"], "yes" if one["writable"] else "no", one["meaning"]) for one in listed
    ]
    print(table(("site", "shape", "layers", "writable", "meaning"), rows))
    if args.json:
        _save(args.json, {"model": args.model, "header": model.header(), "sites": listed}, write_json)
    return 0


def models(args: cli.Models) -> int:
    """`mechinterp models`."""
    if args.refetch is not None:
        if args.refetch not in CATALOG:
            raise UserError(f"{args.refetch!r} is not an embedded model; valid: {', '.join(CATALOG)}")
        print(f"{args.refetch} is in {fetch(CATALOG[args.refetch], refetch=True)}")
    listed = local_names()
    rows = [(one.name, one.kind, "here" if one.cached else "fetched once", one.description) for one in listed]
    print(table(("name", "kind", "weights", "description"), rows))
    print("A model folder, a GGUF file and a name of the Hugging Face hub work as well.")
    if args.json:
        _save(args.json, {"models": [one._asdict() for one in listed]}, write_json)
    return 0


def report(args: cli.Report) -> int:
    """`mechinterp report RUN`."""
    print(rebuild(args.run_folder))
    return 0


def patch(args: cli.Patch, command: str) -> int:
    """`mechinterp patch MODEL`: the sweep, its finding, and the files asked for."""
    model = _load(args)
    pairs = _pairs(model, args)
    roles = f", roles {' '.join(pairs.roles)}" if pairs.roles else ""
    print(f"task: {pairs.name}, {pairs.corruption}, n={len(pairs)}, seed {pairs.seed}{roles}")
    print(pairs.preview(model, 1))
    before = baseline(model, pairs, args.metric, args.seed)
    print(f"baseline: {before}", flush=True)
    result = sweep(
        model, pairs, args.site, args.positions, args.direction, args.metric,
        layers=cli.parse_layers(args.layers), seed=args.seed, force=args.force,
    )  # fmt: skip
    print(result.summary())
    columns, rows = _top(result)
    print(table(columns, [[_shown(cell) for cell in row] for row in rows]))
    print(_controls(result))
    if args.json:
        _save(args.json, result.to_json() | {"command": command}, write_json)
    if args.html:
        made = _sweep_report(model, pairs, before, result, command)
        _save(args.html, render(made.payload()), write_text)
    return 0


def _load(args: cli.OnModel) -> HookedModel:
    """The model, its header printed: what was run, on what, with or without BOS."""
    model = load(
        args.model, device=args.device, dtype=args.dtype, bos=args.prepend_bos, process=args.process,
        revision=args.revision,
    )  # fmt: skip
    print(model.header(), flush=True)
    return model


def _pairs(model: HookedModel, args: cli.Patch) -> PromptPairs:
    if args.pairs is not None:
        pairs = tasks.from_file(model, args.pairs, seed=args.seed)
        return pairs if args.n is None else pairs.take(torch.arange(args.n))
    n = args.n or N_DEFAULT
    if args.task == "ioi":
        return tasks.ioi(model, n=n, seed=args.seed, corruption=args.corruption or "swapped-subject")
    return tasks.induction(model, n=n, seed=args.seed)


def _describe(model: HookedModel, name: str) -> dict[str, Any]:
    """One row of `sites`."""
    present = [site for site in model.site_list if site.name == name]
    first = present[0]
    sizes = {first.kind.head_axis: model.axis_size(first)} if first.kind.head_axis else {}
    if first.kind.axes[-1] not in ("key", "one"):
        sizes[first.kind.axes[-1]] = model.width(first)
    return {
        "site": name,
        "axes": list(first.kind.axes),
        "sizes": sizes,
        "shape": "[" + " ".join(f"{a}={sizes[a]}" if a in sizes else a for a in first.kind.axes) + "]",
        "layers": _layers([site.layer for site in present if site.layer is not None], model.n_layers),
        "writable": all(model.writable(site) for site in present),
        "hook": first.kind.hook,
        "meaning": KINDS[name].meaning,
    }


def _layers(layers: Sequence[int], n_layers: int) -> str:
    if not layers:
        return "–"
    return "all" if len(layers) == n_layers else " ".join(map(str, layers))


# Printing


def _top(result: SweepResult) -> tuple[list[str], list[list[Any]]]:
    """The largest cells by name, with every number that the result keeps of a cell."""
    frame = result.top(TOP).drop(columns=result.dims)
    rows = [[plain(value) for value in row] for row in frame.itertuples(index=False)]
    return [str(name) for name in frame.columns], rows


def _controls(result: SweepResult) -> str:
    about = result.about
    return (
        f"passes: |effect| > {threshold_text(result)} (sign flips, family-wise 5% over all "
        f"{result.data['effect'].size} cells), and the 95% interval of its difference to a donor's patch "
        f"(control: {about['control']}) excludes 0"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns, numbers to the right. The last column of text is not padded."""
    cells = [tuple(columns), *[tuple(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    lines = []
    for row in cells:
        shown = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(shown).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    if text == "–":
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


# Files


def _save(path: Path, value: Any, write: Callable[[Path, Any], None]) -> None:
    """Write a file that was asked for, and say where it is."""
    try:
        write(path, value)
    except OSError as error:
        raise UserError(f"cannot write {path.absolute()}: {error.strerror or error}") from error
    print(f"wrote {path.absolute()}")


def _sweep_report(
    model: HookedModel, pairs: PromptPairs, before: Baseline, result: SweepResult, command: str
) -> Report:
    """One page: the question, the finding, the baseline, the prompts, the figure and the top cells."""
    about = result.about
    verb = "restore" if about["direction"] == "denoise" else "destroy"
    columns, rows = _top(result)
    packages = ("torch", "transformers", "transformer-lens")
    figures = Section(
        heading=f"{about['site']}, {about['direction']}, positions {about['positions']}",
        text=_controls(result),
        figures=(result.figure(),),
        table=Table(tuple(columns), tuple(map(tuple, rows)), caption="The cells of largest |effect|.", max_rows=TOP),
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
        manifest={
            "mechinterp": mechinterp.__version__,
            **{name: metadata.version(name) for name in packages},
            "seed": about["seed"],
            "weights_sha256": model.weights_hash(),
            "pairs": dict(pairs.source),
        },
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
