"""Knock-outs one after another along a ranking: how fast the behaviour goes.

1. At rank r the first r heads are knocked out together; at rank 0 none is. Both metrics, with an interval over prompts
   (templates are clusters).
2. Control: random orders, in which each head of the ranking is another head of its layer (of another one where a layer
   has no more). A ranking that finds the behaviour must lose it faster than they do: the difference to their mean has
   an interval at every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mechinterp.ablation.components import Components, Head
from mechinterp.ablation.controls import random_like
from mechinterp.ablation.replacement import Over, Replacement, Value
from mechinterp.ablation.runs import BOTH, bind, measure, require_change
from mechinterp.evaluation import provenance, templates_of
from mechinterp.hooked.means import By
from mechinterp.hooked.model import HookedModel
from mechinterp.patching.cells import Where
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference
from mechinterp.tasks.pairs import PromptPairs


@dataclass(frozen=True, repr=False)
class Cumulative(Result):
    """Both metrics after every knock-out of a ranking.

    `data` holds over `rank` (0 … k), for each metric (`logit_diff`, `prob`): its mean under its own name, `…_low`,
    `…_high` (95%), `beyond_…`, `beyond_…_low`, `beyond_…_high`, the difference to the mean of the random orders;
    `after_…` `[rank prompt]`, and `control_…` `[draw rank prompt]` where there is a control.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """The first ranks, with the head that each one adds and the mean of the random orders."""
        frame = self.to_frame()
        for name in BOTH:
            if f"control_{name}" in self.data:
                frame[f"control_{name}"] = self.data[f"control_{name}"].mean(("draw", "prompt")).values
        frame.insert(1, "adds", ["", *self.about["ranking"]])
        return frame.head(n)

    def to_frame(self) -> pd.DataFrame:
        """One row a rank."""
        names = [name for name, array in self.data.data_vars.items() if array.dims == ("rank",)]
        return self.data[names].to_dataframe().reset_index()

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        made: dict[str, Any] = {"rank": self.data["rank"].values.tolist()}
        for name in BOTH:
            beyond = {key: plain(self.data[f"beyond_{name}{end}"]) for key, end in _ENDS.items()}
            made[name] = {key: plain(self.data[f"{name}{end}"]) for key, end in _ENDS.items()} | {"beyond": beyond}
            if f"control_{name}" in self.data:
                made[name]["control"] = plain(self.data[f"control_{name}"].mean("prompt"))
            made[name]["per_prompt"] = plain(self.data[f"after_{name}"])
        return made | plain(self.about)

    def summary(self) -> str:
        """One line: from none to all of the ranking."""
        about, k = self.about, len(self.about["ranking"])
        ends = []
        for name, shown in (("logit_diff", "logit difference"), ("prob", "P(answer)")):
            first, last = (self.data.isel(rank=at) for at in (0, -1))
            interval = f" [{float(last[f'{name}_low']):.2f}, {float(last[f'{name}_high']):.2f}]"
            control = self.data.get(f"control_{name}")
            beside = "" if control is None else f", random orders {float(control.isel(rank=-1).mean()):.2f}"
            ends.append(f"{shown} {float(first[name]):.2f} → {float(last[name]):.2f}{interval}{beside}")
        shown = "; ".join(ends)
        return f"{k} heads knocked out ({about['value']}): {shown} (n={about['n_prompts']}, 95% {about['scope']})"


_ENDS = {"mean": "", "ci_low": "_low", "ci_high": "_high"}


def cumulative(
    model: HookedModel,
    pairs: PromptPairs,
    ranking: Sequence[Head],
    value: Value = "mean",
    positions: Where = "all",
    over: Over = "clean",
    by: By = "role",
    *,
    draws: int = 10,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Cumulative:
    """Knock out the heads of a ranking one after another, and measure what is left after each.

    Args:
        model: the hooked model; interventions in force stay in force.
        pairs: clean and corrupted prompts.
        ranking: (layer, head) of each, the first one first.
        value, positions, over, by: how and where (see `knock_out`).
        draws: random orders of the control.
        seed: of donors, intervals and the control.
        force: go on although the model does not do the task.
        progress: show a progress bar.

    Raises:
        UserError: as `knock_out`.
    """
    components = Components.of(model, pairs, heads=ranking)
    how = Replacement.of(pairs, value, over, by, positions, seed)
    control = random_like(model, pairs, components, draws, seed, ordered=True)
    orders, ranks = [components, *control.sets], range(len(components.heads) + 1)
    sets = [
        how.interventions(Components(order.heads[:rank]), noop_ok=order is not components)
        for order in orders
        for rank in ranks
    ]
    bound = bind(model, sets, how.over)
    found = measure(model, pairs, bound, force=force, label="knock-outs" if progress else None)
    require_change(bound[ranks[-1]])
    clusters, arrays = templates_of(pairs), {}
    for name in BOTH:
        after = found[name][1].reshape(len(orders), len(ranks), -1).numpy()
        arrays |= _by_rank(name, after[0], after[1:], clusters, seed)
    about = provenance(model, pairs) | how.about() | {
        "ranking": components.labels, "control_sets": control.note, "scope": interval_scope(clusters), "seed": seed
    }  # fmt: skip
    return Cumulative(xr.Dataset(arrays, coords={"rank": list(ranks)}), about)


def _by_rank(
    name: str, after: np.ndarray, control: np.ndarray, clusters: np.ndarray | None, seed: int
) -> dict[str, Any]:
    """The arrays of a metric: `after` `[rank prompt]`, `control` `[draw rank prompt]`."""
    level = bootstrap_ratio(after, None, clusters, seed=seed)
    grids = {name: level.estimate, f"{name}_low": level.low, f"{name}_high": level.high}
    undefined = np.full(len(after), np.nan)
    grids |= {f"beyond_{name}{end}": undefined for end in _ENDS.values()}
    more: dict[str, Any] = {f"after_{name}": (("rank", "prompt"), after)}
    if len(control):
        beyond = paired_difference(after, control.mean(0), clusters, seed=seed)
        grids |= {
            f"beyond_{name}": beyond.estimate,
            f"beyond_{name}_low": beyond.low,
            f"beyond_{name}_high": beyond.high,
        }
        more[f"control_{name}"] = (("draw", "rank", "prompt"), control)
    return {key: ("rank", values) for key, values in grids.items()} | more
