"""Joint knock-outs: do heads back each other up?

1. Each head is knocked out alone, each two together, and all of them together.
2. The interaction of a set is what it changes together less the sum of what its heads change alone, by prompt, with an
   interval over prompts (templates are clusters). Heads that do the same job cost more together than alone: of a metric
   that falls, the interaction is negative (super-additive damage). 0 is additive.
3. Controls: a sign-flip threshold over all interactions of a metric; and random heads of the same layers, whose
   interactions say how additive any heads of those layers are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mechinterp.ablation.components import Components, Head
from mechinterp.ablation.controls import random_like
from mechinterp.ablation.replacement import Over, Replacement, Value
from mechinterp.ablation.runs import BOTH, bind, measure, require_change
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, templates_of
from mechinterp.hooked.means import By
from mechinterp.hooked.model import HookedModel
from mechinterp.patching.cells import Where
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, sign_flip_threshold
from mechinterp.tasks.pairs import PromptPairs


@dataclass(frozen=True, repr=False)
class Pairwise(Result):
    """What heads change alone and together.

    `data` holds over `component` (labels `L9H6`, `L9H6+L10H0`, …), for each metric (`logit_diff`, `prob`): the mean
    change under its own name, `…_low`, `…_high` (95%); `interaction_…` with `…_low`, `…_high` and `…_passes`, nan for
    single heads; `control_interaction_…` `[draw component]`, of random heads; `after_…` `[component prompt]`;
    `before_…` over `prompt` alone.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """The sets of largest |interaction| of the logit difference, then single heads."""
        frame = self.to_frame()
        for name in BOTH:
            if f"control_interaction_{name}" in self.data:
                frame[f"control_interaction_{name}"] = self.data[f"control_interaction_{name}"].mean("draw").values
        order = np.argsort(-np.nan_to_num(np.abs(frame["interaction_logit_diff"].to_numpy()), nan=-1.0), kind="stable")
        return frame.iloc[order[:n]].reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row a set."""
        names = [name for name, array in self.data.data_vars.items() if array.dims == ("component",)]
        return self.data[names].to_dataframe().reset_index()

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        made: dict[str, Any] = {"sets": self.data["component"].values.tolist()}
        for name in BOTH:
            made[name] = {
                "before": float(self.data[f"before_{name}"].mean()),
                "change": {key: plain(self.data[f"{name}{end}"]) for key, end in _ENDS.items()},
                "interaction": {
                    **{key: plain(self.data[f"interaction_{name}{end}"]) for key, end in _ENDS.items()},
                    "passes": plain(self.data[f"interaction_{name}_passes"]),
                    "control": plain(self.data.get(f"control_interaction_{name}")),
                },
                "per_prompt": plain(self.data[f"after_{name}"] - self.data[f"before_{name}"]),
            }
        return made | plain(self.about)

    def summary(self) -> str:
        """One line: all heads together against the sum of each alone."""
        about, whole = self.about, self.data.isel(component=-1)
        n = len(about["heads"])
        joint, more = float(whole["logit_diff"]), float(whole["interaction_logit_diff"])
        interval = (
            f"[{float(whole['interaction_logit_diff_low']):+.2f}, {float(whole['interaction_logit_diff_high']):+.2f}]"
        )
        control = self.data.get("control_interaction_logit_diff")
        beside = "" if control is None else f", random heads {float(control.isel(component=-1).mean()):+.2f}"
        return (
            f"{n} heads together change the logit difference by {joint:+.2f}, the sum of each alone is "
            f"{joint - more:+.2f}: interaction {more:+.2f} {interval}{beside} (n={about['n_prompts']}, "
            f"95% {about['scope']})"
        )


_ENDS = {"mean": "", "ci_low": "_low", "ci_high": "_high"}


def pairwise(
    model: HookedModel,
    pairs: PromptPairs,
    heads: Sequence[Head],
    value: Value = "mean",
    positions: Where = "all",
    over: Over = "clean",
    by: By = "role",
    *,
    draws: int = 10,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Pairwise:
    """Knock out each head, each two, and all of them, and compare the sum with the whole.

    Args:
        model: the hooked model; interventions in force stay in force.
        pairs: clean and corrupted prompts.
        heads: (layer, head) of each; two at least.
        value, positions, over, by: how and where (see `knock_out`).
        draws: sets of random heads of the control.
        seed: of donors, intervals and the controls.
        force: go on although the model does not do the task.
        progress: show a progress bar.

    Raises:
        UserError: as `knock_out`; fewer than two heads.
    """
    components = Components.of(model, pairs, heads=heads)
    if len(components.heads) < 2:
        raise UserError(f"a joint knock-out needs two heads; found {components}")
    how = Replacement.of(pairs, value, over, by, positions, seed)
    control = random_like(model, pairs, components, draws, seed)
    members = subsets(len(components.heads))
    drawn = [components, *control.sets]
    sets = [how.interventions(subset(one, of), noop_ok=one is not components) for one in drawn for of in members]
    bound = bind(model, sets, how.over)
    found = measure(model, pairs, bound, force=force, label="knock-outs" if progress else None)
    require_change(bound[len(members) - 1])
    clusters, thresholds, arrays = templates_of(pairs), {}, {}
    for name in BOTH:
        before, after = found[name]
        change = (after - before).reshape(len(drawn), len(members), -1).numpy()
        made, thresholds[name] = _of_metric(name, change, members, clusters, seed)
        arrays |= made | {f"before_{name}": ("prompt", before.numpy())}
        arrays[f"after_{name}"] = (("component", "prompt"), after[: len(members)].numpy())
    about = provenance(model, pairs) | how.about() | {
        "heads": components.labels, "control_sets": control.note, "threshold": plain(thresholds),
        "scope": interval_scope(clusters), "seed": seed,
    }  # fmt: skip
    labels = [str(subset(components, of)) for of in members]
    return Pairwise(xr.Dataset(arrays, coords={"component": labels}), about)


def subsets(n: int) -> list[tuple[int, ...]]:
    """Each of n alone, each two, and (of more than two) all."""
    alone = [(i,) for i in range(n)]
    return [*alone, *combinations(range(n), 2), *([tuple(range(n))] if n > 2 else [])]


def subset(components: Components, of: Sequence[int]) -> Components:
    """The heads at these indices."""
    return Components(tuple(components.heads[i] for i in of))


def interactions(change: np.ndarray, members: Sequence[tuple[int, ...]]) -> np.ndarray:
    """`[… joint prompt]` change of each joint set less the sum over its heads; change `[… set prompt]`, heads first."""
    joint = [(i, of) for i, of in enumerate(members) if len(of) > 1]
    return np.stack([change[..., i, :] - change[..., list(of), :].sum(-2) for i, of in joint], axis=-2)


def _of_metric(
    name: str, change: np.ndarray, members: Sequence[tuple[int, ...]], clusters: np.ndarray | None, seed: int
) -> tuple[dict[str, Any], float]:
    """Arrays of a metric and the threshold of its interactions, from `change` `[draw set prompt]`, the heads' first."""
    n_single = sum(len(of) == 1 for of in members)

    def behind(values: np.ndarray) -> np.ndarray:
        """Along the sets, nothing at single heads."""
        return np.concatenate([np.full((*values.shape[:-1], n_single), np.nan), values], axis=-1)

    total = bootstrap_ratio(change[0], None, clusters, seed=seed)
    found = interactions(change, members)
    more = bootstrap_ratio(found[0], None, clusters, seed=seed)
    threshold = sign_flip_threshold(found[0], clusters, seed=seed)
    grids = {name: total.estimate, f"{name}_low": total.low, f"{name}_high": total.high}
    ends = {"": more.estimate, "_low": more.low, "_high": more.high}
    grids |= {f"interaction_{name}{end}": behind(values) for end, values in ends.items()}
    passes = np.abs(more.estimate) > threshold
    grids[f"interaction_{name}_passes"] = np.concatenate([np.zeros(n_single, dtype=bool), passes])
    arrays: dict[str, Any] = {key: ("component", values) for key, values in grids.items()}
    if len(found) > 1:
        arrays[f"control_interaction_{name}"] = (("draw", "component"), behind(found[1:].mean(-1)))
    return arrays, float(threshold)
