"""Knock-outs: what the model loses when heads, MLPs, neurons or edges of attention are taken out.

1. The chosen components are set to zero, to a mean, or to another prompt's activation (replacement.py), all at once;
   edges of attention are cut (edges.py). By default: the mean over the task's own clean prompts, by role, pooled over
   templates. Wang et al. 2023: `over="corrupted", by="template"`.
2. The logit difference, P(answer) and accuracy of every prompt, before and after. They can disagree: taking out name
   movers may hardly move the logit difference and halve P(answer).
3. The change has an interval over prompts (templates are clusters). Control: random components of the same layers,
   knocked out in the same way; where the change stands among them, and the interval of its difference to their mean.
4. On request the loss on plain text, where the components are knocked out at every position: zero stays zero, the mean
   is over all tokens of that text, a donor is another block. The interval takes documents as clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from mechinterp.ablation.components import Components, EdgeLike, Head
from mechinterp.ablation.controls import random_like
from mechinterp.ablation.replacement import Over, Replacement, Value
from mechinterp.ablation.runs import BOTH, Measured, bind, measure, require_change, under
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, templates_of, token_losses
from mechinterp.hooked.interventions import Intervention, Mean, Resample, Zero
from mechinterp.hooked.means import By
from mechinterp.hooked.model import HookedModel
from mechinterp.patching.cells import Where
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.text import Blocks

METRICS = (*BOTH, "accuracy")
# Columns of the table about the random sets, and what the JSON calls them.
_CONTROL = {
    "control": "mean",
    "control_low": "low",
    "control_high": "high",
    "control_as_large": "as_large",
    "beyond": "beyond",
    "beyond_low": "beyond_low",
    "beyond_high": "beyond_high",
}


@dataclass(frozen=True, repr=False)
class KnockOut(Result):
    """What a knock-out did.

    `data` holds for each metric (`logit_diff`; `prob`, P(answer); `accuracy`, whether the answer beats the wrong one)
    `before_…` and `after_…` `[prompt]` and `control_…` `[draw prompt]`, what it is under the knock-out of each random
    set; with text also `before_loss` and `after_loss` `[batch]`, nats a token of each block.
    `about["table"]` holds the means, the change with its interval, and the control, by metric.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """One row a metric: before, after, change with interval, and the control's change: mean, range, and the share
        of random sets that change it as much."""
        return pd.DataFrame([{"metric": name} | row for name, row in self.about["table"].items()]).head(n)

    def to_frame(self) -> pd.DataFrame:
        """The same as `top`."""
        return self.top(len(self.about["table"]))

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        table = self.about["table"]
        own = {name: row for name, row in table.items() if name != "loss"}
        made = {side: {name: row[side] for name, row in own.items()} for side in ("before", "after", "change")} | {
            "ci": {name: [row["ci_low"], row["ci_high"]] for name, row in own.items()},
            "control": {name: {short: row[key] for key, short in _CONTROL.items()} for name, row in own.items()},
            "per_prompt": {
                f"{side}_{name}": plain(self.data[f"{side}_{name}"]) for side in ("before", "after") for name in BOTH
            },
        }
        if "loss" in table:
            made["text"] = {**table["loss"], **self.about["text"]}
        return plain(made | {key: value for key, value in self.about.items() if key not in ("table", "text")})

    def summary(self) -> str:
        """One line: what was knocked out, and both metrics."""
        about, table = self.about, self.about["table"]

        def show(name: str) -> str:
            row = table[name]
            interval = "" if row["ci_low"] is None else f" [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
            return f"{row['before']:.2f} → {row['after']:.2f} ({row['change']:+.2f}{interval})"

        control = table["logit_diff"]["control"]
        against = "no control" if control is None else f"random sets {control:+.2f}"
        return (
            f"knock-out of {about['components']} ({about['value']}): logit difference {show('logit_diff')}, P(answer) "
            f"{show('prob')}, accuracy {table['accuracy']['before']:.0%} → {table['accuracy']['after']:.0%}; {against} "
            f"(n={about['n_prompts']}, 95% {about['scope']})"
        )


def knock_out(
    model: HookedModel,
    pairs: PromptPairs,
    heads: Sequence[Head] = (),
    mlps: Sequence[int] = (),
    neurons: Sequence[tuple[int, int]] = (),
    edges: Sequence[EdgeLike] = (),
    value: Value = "mean",
    positions: Where = "all",
    over: Over = "clean",
    by: By = "role",
    *,
    text: Blocks | None = None,
    draws: int = 20,
    seed: int = 0,
    force: bool = False,
) -> KnockOut:
    """Take components out, all at once, and measure what the model loses on the clean prompts.

    Args:
        model: the hooked model; interventions in force stay in force, in the run before, too.
        pairs: clean and corrupted prompts.
        heads: (layer, head) of each.
        mlps: layers.
        neurons: (layer, index) of each, of the MLPs' hidden layers.
        edges: (head or None for all heads, query, key): roles or indices. They have no value: they are cut.
        value: "zero"; "mean" over the prompts `over`; "resample": the activation of another one of them.
        positions: where heads, MLPs and neurons are knocked out: "all", "last", "roles", role names, or indices.
        over: "clean", "corrupted" or other prompts.
        by: "role": each role its own mean, the other positions pooled; "template": within a template, by position;
            "position": by position (prompts whose roles align); "all": one mean. A donor is a prompt of the same length
            with the roles at the same positions (of the same template; any).
        text: blocks of plain text whose loss is measured, too.
        draws: random sets of the control.
        seed: of donors, intervals and the control.
        force: go on although the model does not do the task.

    Raises:
        UserError: empty lists; components or positions that the model or a prompt does not have; a value that these
            prompts do not allow; a model that does not do the task; a knock-out that changes nothing.
    """
    components = Components.of(model, pairs, heads, mlps, neurons, edges)
    how = Replacement.of(pairs, value, over, by, positions, seed)
    control = random_like(model, pairs, components, draws, seed)
    sets = [how.interventions(components), *(how.interventions(one, noop_ok=True) for one in control.sets)]
    bound = bind(model, sets, how.over)
    found = measure(model, pairs, bound, force=force)
    require_change(bound[0])
    arrays, clusters = _arrays(found), templates_of(pairs)
    table = {name: _row(arrays, name, clusters, seed) for name in METRICS}
    about = provenance(model, pairs) | {"components": str(components)} | how.about()
    if not components.sites:
        about["value"] = "cut"
    data = {name: (("prompt",) if values.ndim == 1 else ("draw", "prompt"), values) for name, values in arrays.items()}
    if text is not None:
        losses = _text_losses(model, components, value, text, seed)
        table["loss"] = _text_row(losses, text, seed)
        about["text"] = {"source": text.source, "blocks": len(text), "length": text.prompts.n_pos}
        data |= {name: (("batch",), values) for name, values in losses.items()}
    about |= {"table": plain(table), "control_sets": control.note, "scope": interval_scope(clusters), "seed": seed}
    return KnockOut(xr.Dataset(data), about)


def _arrays(found: Measured) -> dict[str, np.ndarray]:
    """`before_…`, `after_…`, `control_…` of every metric; the first set is the knock-out, the others are random."""
    made = {}
    for name in BOTH:
        before, after = found[name]
        made |= {
            f"before_{name}": before.numpy(),
            f"after_{name}": after[0].numpy(),
            f"control_{name}": after[1:].numpy(),
        }
    return made | {
        f"{side}_accuracy": (made[f"{side}_logit_diff"] > 0).astype(np.float64)
        for side in ("before", "after", "control")
    }


def _row(arrays: dict[str, np.ndarray], name: str, clusters: np.ndarray | None, seed: int) -> dict[str, Any]:
    """Means, change with interval, and control of a metric."""
    before, after, control = (arrays[f"{side}_{name}"] for side in ("before", "after", "control"))
    change = paired_difference(after, before, clusters, seed=seed)
    row = {
        "before": before.mean(),
        "after": after.mean(),
        "change": change.estimate,
        "ci_low": change.low,
        "ci_high": change.high,
    }
    if not len(control):
        return row | dict.fromkeys(_CONTROL)
    changes = (control - before).mean(1)
    beyond = paired_difference(after, control.mean(0), clusters, seed=seed)
    return row | {
        "control": changes.mean(),
        "control_low": changes.min(),
        "control_high": changes.max(),
        "control_as_large": (np.abs(changes) >= abs(change.estimate)).mean(),
        "beyond": beyond.estimate,
        "beyond_low": beyond.low,
        "beyond_high": beyond.high,
    }


def _text_losses(
    model: HookedModel, components: Components, value: Value, text: Blocks, seed: int
) -> dict[str, np.ndarray]:
    """Loss of every block before and after, in nats a token."""
    if components.edges:
        raise UserError(f"plain text has no roles, so that {components.edges[0]} cannot be cut there; leave out text=")

    def at(site: Any) -> Intervention:
        if value == "zero":
            return Zero(site)
        return Mean(site, text.prompts) if value == "mean" else Resample(site, text.prompts, seed=seed)

    before = token_losses(model, text.prompts)
    bound = bind(model, [[at(site) for site in components.sites]], text.prompts)[0]
    with under(model, bound):
        after = token_losses(model, text.prompts)
    require_change(bound)
    return {
        name: torch.nanmean(one, -1).double().numpy() for name, one in (("before_loss", before), ("after_loss", after))
    }


def _text_row(losses: dict[str, np.ndarray], text: Blocks, seed: int) -> dict[str, Any]:
    before, after = losses["before_loss"], losses["after_loss"]
    change = bootstrap_ratio(after - before, None, text.document.cpu().numpy(), seed=seed)
    ends = {"before": before.mean(), "after": after.mean()}
    return ends | {"change": change.estimate, "ci_low": change.low, "ci_high": change.high}
