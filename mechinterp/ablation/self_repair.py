"""Self-repair: what makes up for heads that are knocked out, term by term.

1. The clean run: the direct effect of every component on the logit difference of each prompt (lens/direct_effects.py),
   through the final norm's scale of that run.
2. The run with the heads knocked out: the direct effects through the *clean* scale, so that they are comparable, and
   their sum through its own scale.
3. The change of the logit difference is the sum of these terms, by prompt:
   `ablated`        −(the clean direct effect of the heads less what they write when knocked out);
   `new support`    the change of the other heads, those that were not negative;
   `negative heads` the change of the heads that wrote against the answer: what they release;
   `mlps`           the change of the MLPs;
   `norm scale`     the ablated run's parts through its own scale less the same through the clean one;
   `constants`      embeddings and output biases: 0, but for biases behind a post-norm;
   `soft-cap`       what a final soft-cap makes of it: 0 where there is none.
4. All terms but the first are the repair. Its share is −(their sum) / (the first), a ratio of means over prompts, with
   an interval; undefined where the direct effect that was lost is not distinguishable from 0.
5. Of several heads: their joint knock-out against the sum of each alone, with an interval (pairwise.py): redundant
   heads are super-additive, because each can stand in for the other.
6. Control: random heads of the same layers, the same terms.

McGrath et al. 2023 (the Hydra effect); Rushing & Nanda 2024 (norm scale, negative heads).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

from mechinterp.ablation.components import Components, Head
from mechinterp.ablation.controls import random_like
from mechinterp.ablation.pairwise import interactions, subset
from mechinterp.ablation.replacement import Over, Replacement, Value
from mechinterp.ablation.runs import BOTH, bind, measure, require_change, under
from mechinterp.evaluation import provenance, templates_of
from mechinterp.hooked.forward import Bound
from mechinterp.hooked.means import By
from mechinterp.hooked.model import HookedModel
from mechinterp.lens.direct_effects import DirectEffects, direct_effects
from mechinterp.patching.cells import Where
from mechinterp.results import Result, plain
from mechinterp.statistics import Interval, bootstrap_ratio, interval_scope
from mechinterp.tasks.pairs import PromptPairs

TERMS = ("ablated", "new support", "negative heads", "mlps", "norm scale", "constants", "soft-cap")


@dataclass(frozen=True, repr=False)
class SelfRepair(Result):
    """The change of the logit difference under a knock-out, by term.

    `data` holds over `component` (the terms of `TERMS`): `effect`, `ci_low`, `ci_high` (95%), `term` with a further
    axis `prompt`, and `control` `[draw component]`, of random heads, where there is a control; over `prompt` alone
    `before` and `after`, the model's own logit difference. Of direct effects through the clean scale: `head_change`
    `[layer head]` and `mlp_change` `[layer]` with `…_low` and `…_high`, and `heads_by_prompt`, `mlps_by_prompt`.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """The terms in order, with the random heads' mean and range."""
        frame = self.data[["effect", "ci_low", "ci_high"]].to_dataframe().reset_index()
        if "control" in self.data:
            control = self.data["control"]
            frame["control"] = control.mean("draw").values
            frame["control_low"], frame["control_high"] = control.min("draw").values, control.max("draw").values
        return frame.head(n)

    def to_frame(self) -> pd.DataFrame:
        """One row a term."""
        return self.top(len(TERMS))

    def repairers(self, n: int = 10) -> pd.DataFrame:
        """The components whose direct effect changes most, the ablated heads left out."""
        parts = []
        for name in ("head_change", "mlp_change"):
            names = [name, f"{name}_low", f"{name}_high"]
            part = self.data[names].to_dataframe().reset_index()
            part = part.rename(columns=dict(zip(names, ("change", "ci_low", "ci_high"), strict=True)))
            parts += part.to_dict("records")
        for row in parts:
            row["component"] = f"L{row['layer']}H{row['head']}" if "head" in row else f"m{row['layer']}"
        others = [row for row in parts if row["component"] not in self.about["heads"]]
        others.sort(key=lambda row: -abs(row["change"]))
        return pd.DataFrame(others[:n], columns=["component", "change", "ci_low", "ci_high"])

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        terms = self.data["component"].values.tolist()
        low, high = (self.data[name].values.tolist() for name in ("ci_low", "ci_high"))
        control = self.data["control"].values.T.tolist() if "control" in self.data else None
        made = {
            "before": float(self.data["before"].mean()),
            "after": float(self.data["after"].mean()),
            "terms": dict(zip(terms, self.data["effect"].values.tolist(), strict=True)),
            "ci": {name: list(ends) for name, *ends in zip(terms, low, high, strict=True)},
            "control": None if control is None else dict(zip(terms, control, strict=True)),
            "head_change": self.data["head_change"],
            "mlp_change": self.data["mlp_change"],
            "per_prompt": {name: self.data[name] for name in ("before", "after", "term")},
        }
        return plain(made | dict(self.about))

    def summary(self) -> str:
        """One line: what was lost, what the model lost in the end, and the share that was made up for."""
        about, effect = self.about, self.data["effect"]
        share = about["repaired"]
        made_up = (
            "the share that is made up for is undefined: nothing certain was lost"
            if share["estimate"] is None
            else f"{share['estimate']:.0%}{_ends(share, '.0%')} of it is made up for"
        )
        more = about["super_additivity"]
        joint = ""
        if more is not None:
            one = more["logit_diff"]
            joint = f"; together {one['joint']:+.2f}, sum of each alone {one['alone']:+.2f}: {one['estimate']:+.2f}"
            joint += _ends(one, "+.2f")
        return (
            f"knock-out of {'+'.join(about['heads'])} ({about['value']}): direct effect {float(effect[0]):+.2f}, logit "
            f"difference {float((self.data['after'] - self.data['before']).mean()):+.2f}: {made_up}{joint} "
            f"(n={about['n_prompts']}, 95% {about['scope']})"
        )


def _ends(interval: dict[str, Any], form: str) -> str:
    return "" if interval["low"] is None else f" [{interval['low']:{form}}, {interval['high']:{form}}]"


def self_repair(
    model: HookedModel,
    pairs: PromptPairs,
    heads: Sequence[Head],
    value: Value = "mean",
    positions: Where = "all",
    over: Over = "clean",
    by: By = "role",
    *,
    negative: Sequence[Head] | None = None,
    draws: int = 5,
    seed: int = 0,
    force: bool = False,
) -> SelfRepair:
    """Knock heads out and take the change of the logit difference apart.

    Args:
        model: the hooked model; interventions in force stay in force, in the clean run, too.
        pairs: clean and corrupted prompts.
        heads: (layer, head) of each that is knocked out.
        value, positions, over, by: how and where (see `knock_out`).
        negative: heads that write against the answer; by default those whose mean direct effect in the clean run is
            negative.
        draws: sets of random heads of the control; each costs two runs.
        seed: of donors, intervals and the control.
        force: go on although the model does not do the task.

    Raises:
        UserError: as `knock_out`; interventions in force that write into the residual stream itself.
    """
    components = Components.of(model, pairs, heads=heads)
    how = Replacement.of(pairs, value, over, by, positions, seed)
    given = None if negative is None else set(Components.of(model, pairs, heads=negative).heads if negative else ())
    # The cheap runs first: a model that does not do the task stops before the expensive ones.
    together = _super_additivity(model, pairs, components, how, seed, force)
    clean, clusters = direct_effects(model, pairs), templates_of(pairs)
    against = _negative(clean) if given is None else given
    control = random_like(model, pairs, components, draws, seed)
    sets = [components, *control.sets]
    bound = bind(model, [how.interventions(one, noop_ok=True) for one in sets], how.over)
    found = [_decomposed(model, pairs, *each, clean, against) for each in zip(sets, bound, strict=True)]
    (own, changed), drawn = found[0], [terms.mean(-1) for terms, _ in found[1:]]
    interval = bootstrap_ratio(own, None, clusters, seed=seed)
    lost, terms = -own[0], {"effect": interval.estimate, "ci_low": interval.low, "ci_high": interval.high}
    arrays: dict[str, Any] = {name: ("component", values) for name, values in terms.items()}
    arrays |= {"term": (("component", "prompt"), own)} | _changes(clean, changed, clusters, seed)
    arrays |= {"before": ("prompt", _double(clean.output)), "after": ("prompt", _double(changed.output))}
    if drawn:
        arrays["control"] = (("draw", "component"), np.stack(drawn))
    about = provenance(model, pairs) | how.about() | {
        "heads": components.labels,
        "negative": [f"L{layer}H{head}" for layer, head in sorted(against - set(components.heads))],
        "negative_chosen": "given" if given is not None else "mean direct effect below 0 in the clean run",
        "repaired": _plain(bootstrap_ratio(own[1:].sum(0), lost, clusters, seed=seed)),
        "super_additivity": together,
        "control_sets": control.note, "scope": interval_scope(clusters), "seed": seed,
    }  # fmt: skip
    return SelfRepair(xr.Dataset(arrays, coords={"component": list(TERMS)}), about)


def _decomposed(
    model: HookedModel,
    pairs: PromptPairs,
    components: Components,
    bound: Sequence[Bound],
    clean: DirectEffects,
    negative: set[Head],
) -> tuple[np.ndarray, DirectEffects]:
    """`[term prompt]` with these heads knocked out, and the direct effects then, through the clean scale."""
    with under(model, bound):
        frozen = direct_effects(model, pairs, scale=clean.scale)
    change = _double(frozen.heads) - _double(clean.heads)
    ablated, against = (np.zeros(change.shape[:2], dtype=bool) for _ in range(2))
    for mask, chosen in ((ablated, components.heads), (against, negative - set(components.heads))):
        for head in chosen:
            mask[head] = True
    ends = [_double(one.embed) + _double(one.bias) for one in (frozen, clean)]
    caps = [_double(one.output) - _double(one.own_total) for one in (frozen, clean)]
    capped = float(getattr(model.bridge.cfg, "output_logits_soft_cap", 0) or 0) > 0
    terms = (
        change[ablated].sum(0),
        change[~ablated & ~against].sum(0),
        change[against].sum(0),
        (_double(frozen.mlps) - _double(clean.mlps)).sum(0),
        _double(frozen.own_total) - _double(frozen.total),
        ends[0] - ends[1],
        caps[0] - caps[1] if capped else np.zeros(len(pairs)),
    )
    return np.stack(terms), frozen


def _negative(clean: DirectEffects) -> set[Head]:
    """Heads whose mean direct effect is below 0."""
    return {(int(layer), int(head)) for layer, head in (clean.heads.double().mean(-1) < 0).nonzero().tolist()}


def _changes(clean: DirectEffects, changed: DirectEffects, clusters: np.ndarray | None, seed: int) -> dict[str, Any]:
    """Changes of the direct effects of every head and MLP, with intervals."""
    made: dict[str, Any] = {}
    for name, dims in (("head", ("layer", "head")), ("mlp", ("layer",))):
        change = _double(getattr(changed, f"{name}s")) - _double(getattr(clean, f"{name}s"))
        interval = bootstrap_ratio(change, None, clusters, seed=seed)
        ends = {"": interval.estimate, "_low": interval.low, "_high": interval.high}
        made |= {f"{name}_change{end}": (dims, values) for end, values in ends.items()}
        made[f"{name}s_by_prompt"] = ((*dims, "prompt"), change)
    return made


def _super_additivity(
    model: HookedModel, pairs: PromptPairs, components: Components, how: Replacement, seed: int, force: bool
) -> dict[str, Any] | None:
    """Of several heads: what they change together, the sum of each alone, and the difference with its interval."""
    n = len(components.heads)
    members = [*((i,) for i in range(n)), *([tuple(range(n))] if n > 1 else [])]
    sets = [how.interventions(subset(components, of), noop_ok=of != members[-1]) for of in members]
    bound = bind(model, sets, how.over)
    found = measure(model, pairs, bound, force=force)
    require_change(bound[-1])
    if n == 1:
        return None
    made = {}
    for name in BOTH:
        before, after = found[name]
        change = (after - before).numpy()
        more = bootstrap_ratio(interactions(change, members)[0], None, templates_of(pairs), seed=seed)
        ends = {"joint": float(change[-1].mean()), "alone": float(change[:-1].sum(0).mean())}
        made[name] = ends | _plain(more)
    return made


def _plain(interval: Interval) -> dict[str, Any]:
    return plain({"estimate": interval.estimate, "low": interval.low, "high": interval.high})


def _double(values: Tensor) -> np.ndarray:
    return values.double().numpy()
