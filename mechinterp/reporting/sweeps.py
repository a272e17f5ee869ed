"""Sweeps in a report: heatmaps (layers down, heads, roles or positions across), tables and prompts."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from mechinterp.evaluation import Baseline
from mechinterp.hooked.model import HookedModel
from mechinterp.patching.result import SweepResult
from mechinterp.reporting.figures import heatmap, largest
from mechinterp.reporting.panels import small_multiples
from mechinterp.reporting.report import Prompt, Section, Table
from mechinterp.results import Result, plain
from mechinterp.tasks.pairs import PromptPairs, labelled

ACROSS = ("head", "kv_head", "role", "pos")
TITLES = {"head": "head", "kv_head": "key/value head", "role": "token role", "pos": "position"}


def sweep_figure(result: SweepResult, zmax: float | None = None, title: str | None = None) -> go.Figure:
    """The effects of a sweep as heatmaps on one colour scale, which ends at `zmax` (the largest effect by default)."""
    zmax = zmax if zmax is not None else largest(result.data["effect"].values)
    title = title if title is not None else _title(result)
    axes = [dim for dim in ACROSS if dim in result.dims]
    if len(axes) < 2:
        return _panel(result, {}, axes[0] if axes else None, zmax, title)
    inner, outer = axes  # heads × (roles or positions)
    places = result.data[outer].values.tolist()
    if len(places) == 1:
        return _panel(result, {outer: places[0]}, inner, zmax, title)
    panels = {str(place): _panel(result, {outer: place}, inner, zmax, "") for place in places}
    return small_multiples(panels, columns=min(3, len(panels)), title=title)


def _title(result: SweepResult) -> str:
    return ", ".join(_title_parts(result))


def _title_parts(result: SweepResult) -> list[str]:
    about = result.about
    verb = "denoising" if about["direction"] == "denoise" else "noising"
    return [about["site"], verb, about["corruption"], f"n={about['n_prompts']}"]


def _panel(result: SweepResult, at: dict[str, object], across: str | None, zmax: float, title: str) -> go.Figure:
    """One layer × `across` heatmap; a single column where there is no second axis."""
    data = result.data.sel(at) if at else result.data
    layers = data["layer"].values.tolist()
    columns = data[across].values.tolist() if across else [str(result.about["positions"])]

    def grid(name: str) -> np.ndarray:
        return data[name].values.reshape(len(layers), len(columns))

    labels = [
        [result.label({"layer": layer, **at, **({across: column} if across else {})}) for column in columns]
        for layer in layers
    ]
    shown = result.about.get("pos_labels") if across == "pos" else columns
    baseline = result.about["baseline"]
    control = grid("control")
    return heatmap(
        grid("effect"),
        x=shown or columns,
        y=layers,
        ci_low=grid("ci_low"),
        ci_high=grid("ci_high"),
        control=control,
        passes=np.where(np.isfinite(control), grid("passes").astype(object), np.array(None)),
        labels=labels,
        facts={
            "metric": result.about["metric"],
            "clean": f"{baseline['clean']:.3f}",
            "corrupted": f"{baseline['corrupted']:.3f}",
            "n": result.about["n_prompts"],
            "threshold": threshold_text(result),
            "control patches from": result.about["control"],
        },
        title=title,
        x_title=TITLES[across] if across else "",
        y_title="layer",
        zmax=zmax,
    )


def threshold_text(result: Result) -> str:
    """The sign-flip threshold in words."""
    value = result.about["threshold"]
    return "undefined" if value is None else f"{value:.3f}"


def baseline_rows(before: Baseline) -> tuple[tuple[str, str], ...]:
    """What the model does on the task, as pairs of name and value."""
    rows = [
        (f"{side} {before.metric}", f"{float(one.estimate):.2f} [{float(one.low):.2f}, {float(one.high):.2f}]")
        for side, one in (("clean", before.clean), ("corrupted", before.corrupted))
    ]
    if before.accuracy is not None:
        rows.append(("accuracy", f"{before.accuracy:.0%}"))
    if before.prob is not None:
        rows.append(("P(answer)", f"{before.prob:.2f}"))
    return (*rows, ("n", str(before.n)))


def sweep_section(heading: str, text: str, sweeps: Sequence[SweepResult]) -> Section:
    """One section of a report: the heatmaps of several sweeps on one colour scale, and a table of their largest cells.

    Every sweep must be one panel: no more than one role or position where its cells have heads.
    """
    zmax = largest(*(sweep.data["effect"].values for sweep in sweeps))
    parts = [_title_parts(sweep) for sweep in sweeps]
    common = [part for part in parts[0] if all(part in other for other in parts)]
    titles = [", ".join(part for part in mine if part not in common) or _title(sweeps[0]) for mine in parts]
    panels = {title: sweep_figure(sweep, zmax, title="") for title, sweep in zip(titles, sweeps, strict=True)}
    figure = small_multiples(panels, columns=2 if "head" in sweeps[0].dims else 3, title=", ".join(common) or heading)
    return Section(heading, text, figures=(figure,), table=sweep_table(sweeps))


def sweep_table(sweeps: Sequence[SweepResult], n: int = 12) -> Table:
    """The largest cells of some sweeps with interval and controls."""
    rows = []
    for sweep in sweeps:
        for row in sweep.top(max(1, n // len(sweeps))).to_dict("records"):
            way = f"{sweep.about['direction']}, {sweep.about['corruption']}"
            numbers = [plain(row[name]) for name in ("effect", "ci_low", "ci_high", "control")]
            rows.append((row["cell"], way, *numbers, "yes" if row["passes"] else "no"))
    columns = ("cell", "sweep", "effect", "low", "high", "donor", "passes both")
    return Table(columns, tuple(rows), "Largest cells, with 95% intervals.", max_rows=n)


def prompt_preview(model: HookedModel, pairs: PromptPairs, n: int) -> tuple[Prompt, ...]:
    """The first pairs by token, clean and corrupted, with their roles."""
    shown = []
    for i in range(min(n, len(pairs))):
        answer, wrong = (model.token_strings(ids[i, 0, :1])[0] for ids in (pairs.answers.answer, pairs.answers.wrong))
        asked = f"{answer.strip()}, not {wrong.strip()}" if pairs.answers.has_wrong else answer.strip()
        for label, prompts in (("clean", pairs.clean), (f"corrupted ({pairs.corruption})", pairs.corrupted)):
            tokens = labelled(model, prompts, i)
            roles = tuple("/".join(roles) or None for _, roles in tokens)
            shown.append(Prompt(tuple(text for text, _ in tokens), roles, label=label, answer=asked))
    return tuple(shown)
