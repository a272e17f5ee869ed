"""Every head (or MLP) knocked out alone: the change of the logit difference and of P(answer), exact.

1. One run of the clean prompts is recorded; of each knock-out only the suffix that it changes is run (runs.py).
2. Each change has an interval over prompts (templates are clusters).
3. Control: a sign-flip threshold over all cells of a metric, which all cells that do nothing exceed together with a
   chance of 5% at most (statistics.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from mechinterp.ablation.components import Components
from mechinterp.ablation.replacement import Over, Replacement, Value
from mechinterp.ablation.runs import BOTH, MetricName, bind, measure
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, templates_of
from mechinterp.hooked.means import By
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import Site
from mechinterp.patching.cells import Where
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, sign_flip_threshold
from mechinterp.tasks.pairs import PromptPairs


@dataclass(frozen=True, repr=False)
class ScanResult(Result):
    """The change that knocking out each cell makes.

    `data` holds for each metric (`logit_diff`, `prob`) over `layer` (and `head`): the mean change under its own name,
    `…_low` and `…_high` (95%), `…_passes` (|mean change| above the threshold), `after_…` with a further axis `prompt`;
    `before_…` over `prompt` alone.
    """

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, the first one is what `top` goes by."""
        return list(self.about["metrics"])

    def label(self, cell: dict[Any, Any]) -> str:
        """`L9H6` or `m3`."""
        return f"L{cell['layer']}H{cell['head']}" if "head" in cell else f"m{cell['layer']}"

    def ranking(self, metric: str | None = None) -> list[tuple[int, int]]:
        """Heads as (layer, head), the one first whose knock-out costs most."""
        order = self.to_frame().sort_values(metric or self.metrics[0], kind="stable")
        return [(int(layer), int(head)) for layer, head in zip(order["layer"], order["head"], strict=True)]

    def top(self, n: int = 10) -> pd.DataFrame:
        """The cells of largest |change|, of the first metric."""
        frame = self.to_frame()
        frame.insert(0, "cell", [self.label(row) for row in frame.to_dict("records")])
        order = np.argsort(-np.abs(frame[self.metrics[0]].to_numpy()), kind="stable")[:n]
        return frame.iloc[order].reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        made: dict[str, Any] = {
            "dims": [str(dim) for dim in self.data[self.metrics[0]].dims],
            "before": {name: float(self.data[f"before_{name}"].mean()) for name in self.metrics},
        }
        for name in self.metrics:
            made[name] = {
                "change": plain(self.data[name]),
                "ci_low": plain(self.data[f"{name}_low"]),
                "ci_high": plain(self.data[f"{name}_high"]),
                "passes": plain(self.data[f"{name}_passes"]),
                "per_prompt": plain(self.data[f"after_{name}"] - self.data[f"before_{name}"]),
            }
        made["coords"] = {dim: self.data[dim].values.tolist() for dim in made["dims"]}
        return made | plain(self.about)

    def summary(self) -> str:
        """One line: the largest cell, and how many are beyond the threshold."""
        about, name, best = self.about, self.metrics[0], self.top(1).iloc[0]
        passed = ", ".join(f"{int(self.data[f'{m}_passes'].sum())} in {m}" for m in self.metrics)
        interval = f" [{best[f'{name}_low']:+.2f}, {best[f'{name}_high']:+.2f}]" if about["n_prompts"] > 1 else ""
        return (
            f"{about['value']}-ablation of each {about['site']}: largest change of {name} {best['cell']} "
            f"{best[name]:+.2f}{interval}; beyond the threshold: {passed}, of {self.data[name].size} "
            f"(n={about['n_prompts']}, 95% {about['scope']})"
        )


def scan(
    model: HookedModel,
    pairs: PromptPairs,
    site: Literal["z", "mlp_out"] = "z",
    positions: Where = "all",
    value: Value = "mean",
    over: Over = "clean",
    by: By = "role",
    *,
    metrics: Sequence[MetricName] = BOTH,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
    max_tokens: int | None = None,
) -> ScanResult:
    """Knock out every head (or MLP) alone and measure what the model loses on the clean prompts.

    Args:
        model: the hooked model; interventions in force stay in force.
        pairs: clean and corrupted prompts.
        site: "z" for heads, "mlp_out" for MLPs.
        positions, value, over, by: how and where (see `knock_out`).
        metrics: "logit_diff" alone unembeds two columns a prompt in place of the whole vocabulary.
        layers: which to scan; all by default.
        seed: of donors, intervals and threshold.
        force: go on although the model does not do the task.
        progress: show a progress bar.
        max_tokens: rows × positions of a call; by default from the free memory.

    Raises:
        UserError: as `knock_out`; an unknown site or metric, or a model without MLPs.
    """
    if site not in ("z", "mlp_out"):
        raise UserError(f"unknown site {site!r} to scan; valid: 'z' (heads), 'mlp_out' (MLPs)")
    cells = _cells(model, pairs, site, layers)
    how = Replacement.of(pairs, value, over, by, positions, seed)
    bound = bind(model, [how.interventions(cell, noop_ok=True) for cell in cells], how.over)
    label = f"{value}-ablation of {site}" if progress else None
    found = measure(model, pairs, bound, metrics, force=force, label=label, max_tokens=max_tokens)
    coords: dict[str, list[int]] = {"layer": list(dict.fromkeys(s.layer or 0 for cell in cells for s in cell.sites))}
    if site == "z":
        coords["head"] = list(range(model.n_heads))
    shape, clusters, thresholds, arrays = [len(along) for along in coords.values()], templates_of(pairs), {}, {}
    for name in found.names:
        before, after = (one.numpy() for one in found[name])
        change = bootstrap_ratio(after - before, None, clusters, seed=seed)
        thresholds[name] = sign_flip_threshold(after - before, clusters, seed=seed)
        grids = {name: change.estimate, f"{name}_low": change.low, f"{name}_high": change.high}
        grids[f"{name}_passes"] = np.abs(change.estimate) > thresholds[name]
        arrays |= {key: (list(coords), values.reshape(shape)) for key, values in grids.items()}
        arrays[f"after_{name}"] = ([*coords, "prompt"], after.reshape(*shape, -1))
        arrays[f"before_{name}"] = ("prompt", before)
    about = provenance(model, pairs) | how.about() | {
        "site": site, "metrics": list(found.names), "threshold": plain(thresholds),
        "control": "sign flips of whole prompts over all cells, family-wise 5%",
        "scope": interval_scope(clusters), "seed": seed,
    }  # fmt: skip
    return ScanResult(xr.Dataset(arrays, coords=coords), about)


def _cells(model: HookedModel, pairs: PromptPairs, site: str, layers: Sequence[int] | None) -> list[Components]:
    """One set for each head, or MLP."""
    present = [s.layer or 0 for s in model.site_list if s.name == site]
    wanted = (
        present if layers is None else [model.resolve(Site(site, layer), write=True).layer or 0 for layer in layers]
    )
    if not wanted:
        raise UserError(f"{model.info.name} has no site {site} to scan, or no layers were given")
    if site == "mlp_out":
        return [Components.of(model, pairs, mlps=[layer]) for layer in wanted]
    return [Components.of(model, pairs, heads=[(layer, head)]) for layer in wanted for head in range(model.n_heads)]
