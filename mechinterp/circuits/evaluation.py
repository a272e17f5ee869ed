"""How faithful circuits of every size are, on pairs that they were not searched on, beside controls.

1. f(C) = (m(C) − m(∅)) / (m(M) − m(∅)) with m the mean metric over prompts, ∅ every edge ablated, M the whole model.
2. The curve is taken over MIB's grid of sizes, int(k·E) edges, dead edges pruned afterwards (Mueller et al. 2025, "MIB:
   a mechanistic interpretability benchmark"). CMD = ∫ |1 − f| dk of the top edges by *absolute* score, CPR = ∫ f dk
   of those by *signed* score, both by the trapezoid rule; never both from one selection. CPR grows when edges that hurt
   are left out, so it can exceed 1: read CMD first.
   They are given for grids that reach from MIB's smallest size to 1. Noise in f adds to |1 − f|, so CMD is biased
   upwards, if at all.
3. Intervals are over prompts, which were not searched on: pairs that were are dropped, and their number is said.
4. Beside the metric: accuracy, and KL(model ‖ circuit) over the whole vocabulary.
5. Controls of the same size: the rankings that `find` made (rankings.py), rewirings of the found circuit, and the found
   circuit on other heads (rewiring.py); the norm ranking is run grown from the logits, too, so that it cannot score 0
   for being disconnected. The difference to each is paired over prompts; of rewirings it is that to the mean of five,
   and conditional on these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from tqdm.auto import tqdm

from mechinterp.circuits.ablations import Ablation, Direction, as_direction
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.rewiring import permute_heads, rewire
from mechinterp.circuits.runner import Run, Runner, held_out_of
from mechinterp.circuits.scores import Scores
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, templates_of
from mechinterp.metrics import Metric
from mechinterp.results import Result, plain
from mechinterp.statistics import (
    bias_corrected,
    bootstrap_ratio,
    interval_scope,
    paired_difference,
    resampling_weights,
)
from mechinterp.tasks.pairs import PromptPairs

if TYPE_CHECKING:
    import plotly.graph_objects as go

GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SELECTIONS = ("absolute", "signed")
REWIRINGS = 5


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """Faithfulness by selection and size.

    `data` holds, over `selection` ("absolute", "signed") and `size` (share of the edges): `faithfulness`, `ci_low`,
    `ci_high` (95%), `edges` (after pruning), `accuracy` and `kl` with their `_low` and `_high`, and `metric` with a
    further axis `prompt`; over `prompt` alone `full` and `empty`. `about` holds `cmd` and `cpr` with their intervals,
    `controls` and how all was run.
    """

    def top(self, n: int = 12) -> pd.DataFrame:
        """One row a size of the absolute selection, with its interval."""
        names = ["edges", "faithfulness", "ci_low", "ci_high", "accuracy", "kl"]
        frame = pd.DataFrame({"size": self.data["size"].values})
        for name in names:
            frame[name] = self.data[name].sel(selection="absolute").values
        return frame.head(n)

    def controls(self) -> pd.DataFrame:
        """One row a control: its faithfulness, and by how much the found circuit's differs, paired over prompts."""
        return pd.DataFrame(self.about["controls"])

    def summary(self) -> str:
        """One line: CMD and CPR, or the faithfulness of the smallest size where the grid has no areas."""
        cmd, cpr = self.about["cmd"], self.about["cpr"]
        ends = [
            f"{name} {one['value']:.3f} [{one['ci_low']:.3f}, {one['ci_high']:.3f}]"
            for name, one in (("CMD", cmd), ("CPR", cpr))
            if one["value"] is not None
        ]
        return (
            f"{self.about['method']} on {self.about['task']}, {self.about['ablation']} {self.about['direction']}: "
            f"{', '.join(ends) or self._smallest()} "
            f"(n={self.about['n_prompts']} held-out pairs, 95% {self.about['scope']})"
        )

    def _smallest(self) -> str:
        one = self.data.isel(size=0).sel(selection="absolute")
        value, low, high = (float(one[name]) for name in ("faithfulness", "ci_low", "ci_high"))
        if not np.isfinite(value):
            return "undefined: the two runs do not differ"
        return f"faithfulness at {float(one['size']):.1%} of the edges {value:.2f} [{low:.2f}, {high:.2f}]"

    def figure(self) -> "go.Figure":
        """Faithfulness over the share of edges that are kept."""
        from mechinterp.reporting.sections.circuit_evaluation import faithfulness_figure  # drawing lies above

        return faithfulness_figure(self)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        curves = {}
        for name in self.data["selection"].values.tolist():
            one = self.data.sel(selection=name)
            arrays = {str(key): plain(one[key]) for key in one.data_vars if "prompt" not in one[key].dims}
            curves[name] = {"k": one["size"].values.tolist(), "value": arrays.pop("faithfulness"), **arrays}
        about = dict(self.about)
        cmd, cpr, controls = about.pop("cmd"), about.pop("cpr"), about.pop("controls")
        return {
            "cmd": cmd["value"],
            "cmd_ci": [cmd["ci_low"], cmd["ci_high"]],
            "cpr": cpr["value"],
            "cpr_ci": [cpr["ci_low"], cpr["ci_high"]],
            "faithfulness": curves,
            "baseline": about.pop("baseline"),
            "controls": {f"{row['control']}@{row['size']:g}": row for row in controls},
            **about,
        }


def evaluate(
    scores: Scores,
    pairs: PromptPairs,
    *,
    sizes: Sequence[float] = GRID,
    control_sizes: Sequence[float] = (0.02,),
    ablation: Ablation | str | None = None,
    direction: Direction | None = None,
    metric: Metric | str | None = None,
    seed: int = 0,
    progress: bool = True,
    max_bytes: int | None = None,
) -> Evaluation:
    """Faithfulness over the grid of sizes, CMD, CPR and controls.

    Args:
        scores: from `find`.
        pairs: held out: those that the scores came from are dropped.
        sizes: shares of the edges.
        control_sizes: sizes at which controls are evaluated.
        ablation, direction, metric: as in the search by default.
        seed: of intervals and rewirings.
        progress: show a progress bar.
        max_bytes: memory of a call.

    Raises:
        UserError: no pair is held out; an ablation whose values the scores do not carry; see `Engine`.
    """
    sizes = _ascending(sizes)
    held_out, dropped = held_out_of(scores.about, pairs)
    asked = Ablation.described(scores.about, ablation or scores.ablation)
    direction = as_direction(direction or scores.about.get("direction", "noise"))
    metric = scores.about.get("metric") if metric is None else metric
    runner = Runner.of(scores.graph, held_out, asked, direction, metric, max_bytes)
    chosen = {
        (by, k): scores.select(k, by=by, inclusion=False)  # type: ignore[arg-type]
        for by in SELECTIONS
        for k in sizes
    }
    rivals = _rivals(scores, control_sizes, seed)
    with tqdm(total=len(chosen) + len(rivals), desc="evaluate", unit="circuit", disable=not progress) as bar:
        runs = {key: runner.run(circuit, bar) for key, circuit in chosen.items()}
        others = {key: runner.run(circuit, bar) for key, circuit in rivals.items()}
    data = _curves(runner, chosen, runs, sizes, seed)
    engine = runner.engine
    about = provenance(scores.graph.model, held_out) | {
        "method": scores.about.get("method"),
        **engine.ablation.about(),
        "direction": engine.direction,
        "metric": engine.metric.name,
        "seed": seed,
        "dropped": dropped,
        "searched_on": {name: scores.about.get(name) for name in ("task", "corruption", "n_prompts", "seed")},
        "scope": interval_scope(templates_of(held_out)),
        "baseline": {"full": float(runner.full.mean()), "empty": float(runner.empty.mean())},
        "cmd": _area(runner, data, "absolute", seed),
        "cpr": _area(runner, data, "signed", seed),
        "controls": _compared(runner, scores, runs, rivals, others, control_sizes, seed),
    }
    return Evaluation(data, about)


def _ascending(sizes: Sequence[float]) -> list[float]:
    """The sizes. Raises UserError unless they ascend within 0 … 1."""
    made = [float(size) for size in sizes]
    if not made or sorted(set(made)) != made or made[0] <= 0 or made[-1] > 1:
        raise UserError(f"sizes must be ascending shares of the edges, above 0 and up to 1; found {list(sizes)}")
    return made


def _rivals(scores: Scores, sizes: Sequence[float], seed: int) -> dict[tuple[str, float, int], Circuit]:
    """Control circuits by name, size and draw."""
    made = {}
    for k in sizes:
        for name in scores.rankings:
            made[name, k, 0] = scores.select(float(k), ranking=name)
        if "norm" in scores.rankings and scores.level == "edge":
            made["norm-connected", k, 0] = scores.select(float(k), ranking="norm", connect="greedy")
        found = scores.select(float(k), inclusion=False)
        for draw in range(REWIRINGS):
            for name, make in (("rewired", rewire), ("permuted-heads", permute_heads)):
                made[name, k, draw] = make(found, seed * REWIRINGS + draw)
    return made


def _curves(
    runner: Runner,
    chosen: dict[tuple[str, float], Circuit],
    runs: dict[tuple[str, float], Run],
    sizes: Sequence[float],
    seed: int,
) -> xr.Dataset:
    def grid(of: Any) -> np.ndarray:
        return np.array([[of(by, k) for k in sizes] for by in SELECTIONS])

    metric = grid(lambda by, k: runs[by, k].metric)
    estimate, low, high = runner.ratio(metric, seed)
    over = ("selection", "size")
    arrays = {
        "faithfulness": (over, estimate),
        "ci_low": (over, low),
        "ci_high": (over, high),
        "edges": (over, grid(lambda by, k: len(chosen[by, k]))),
        **_means("kl", grid(lambda by, k: runs[by, k].kl), runner, seed),
        **_means("accuracy", grid(lambda by, k: runs[by, k].accuracy), runner, seed),
        "metric": ((*over, "prompt"), metric),
        "full": ("prompt", runner.full),
        "empty": ("prompt", runner.empty),
    }
    return xr.Dataset(arrays, coords={"selection": list(SELECTIONS), "size": [float(k) for k in sizes]})


def _means(name: str, values: np.ndarray, runner: Runner, seed: int) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """Mean over prompts and its interval, from `[selection size prompt]`; nan where undefined."""
    over = ("selection", "size")
    if values.dtype == object:  # no wrong answers
        return {name + end: (over, np.full(values.shape[:2], np.nan)) for end in ("", "_low", "_high")}
    found = bootstrap_ratio(values, None, runner.clusters, seed=seed)
    return {name: (over, found.estimate), f"{name}_low": (over, found.low), f"{name}_high": (over, found.high)}


def _area(runner: Runner, data: xr.Dataset, selection: str, seed: int, draws: int = 2000) -> dict[str, float | None]:
    """CMD of the absolute selection or CPR of the signed one, with its interval over prompts."""
    sizes, metric = data["size"].values, data["metric"].sel(selection=selection).values
    whole = runner.full - runner.empty
    whole_grid = sizes[0] <= GRID[0] and sizes[-1] == 1
    if not whole_grid or not np.isfinite(data["faithfulness"].values).all():
        return {"value": None, "ci_low": None, "ci_high": None}

    def area(weights: np.ndarray) -> np.ndarray:
        curve = ((metric - runner.empty) @ weights.T / (whole @ weights.T)).T
        return np.asarray(np.trapezoid(np.abs(1 - curve) if selection == "absolute" else curve, sizes, axis=-1))

    n = len(whole)
    value = area(np.ones((1, n)))
    if n == 1:
        return {"value": float(value[0]), "ci_low": None, "ci_high": None}
    low, high = bias_corrected(area(resampling_weights(n, runner.clusters, draws, seed))[None], value, 0.95)
    return {"value": float(value[0]), "ci_low": float(low[0]), "ci_high": float(high[0])}


def _compared(
    runner: Runner,
    scores: Scores,
    runs: dict[tuple[str, float], Run],
    rivals: dict[tuple[str, float, int], Circuit],
    others: dict[tuple[str, float, int], Run],
    sizes: Sequence[float],
    seed: int,
) -> list[dict[str, Any]]:
    """One row a control and size: faithfulness, and the paired difference of the found circuit to it."""
    rows = []
    whole = (runner.full - runner.empty).mean()
    for k in sizes:
        found = (
            runs["absolute", k].metric
            if ("absolute", k) in runs
            else runner.run(scores.select(float(k), inclusion=False)).metric
        )
        for name in dict.fromkeys(name for name, _, _ in others):
            keys = [key for key in others if key[:2] == (name, k)]
            metric = np.mean([others[key].metric for key in keys], 0)
            estimate, low, high = runner.ratio(metric[None], seed)
            gap = paired_difference(found, metric, runner.clusters, seed=seed)
            with np.errstate(divide="ignore", invalid="ignore"):
                sides = [float(side / whole) for side in (gap.estimate, gap.low, gap.high)]
            if not np.isfinite(estimate[0]):  # a ratio over nothing
                sides = [float("nan")] * 3
            rows.append(
                plain(
                    {
                        "control": name,
                        "size": float(k),
                        "edges": round(float(np.mean([len(rivals[key]) for key in keys]))),
                        "faithfulness": float(estimate[0]),
                        "ci_low": float(low[0]),
                        "ci_high": float(high[0]),
                        "difference": sides[0],
                        "difference_low": min(sides[1:]),
                        "difference_high": max(sides[1:]),
                        "differs": bool(min(sides[1:]) > 0 or max(sides[1:]) < 0),
                    }
                )
            )
    return rows
