"""The causal check beside attention scores: knock the top heads out, and see what the repetition is then worth.

1. Prompts are repeated random tokens, drawn anew, so that heads are not tested on what they were chosen by.
2. The loss on the last copy (knock_outs.py): as the model is; with the `k` top heads knocked out together; and with `k`
   random heads of the same layers, never the top ones, in many draws.
3. The interval is of the difference between top heads and the mean of the draws, over prompts; p is the rank of the top
   heads among the draws.
4. Heads that only attend alike do nothing: each top head is also knocked out alone. It passes if the loss grows, and by
   more than for any head of its layer that is not among the top.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd
import xarray as xr

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance
from mechinterp.heads.knock_outs import Head, Value, losses_without, others_of, random_sets
from mechinterp.heads.patterns import PatternResult
from mechinterp.heads.tokens import as_prompts, default_period, repeated_tokens
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference

# The seed of the prompts lies this far from that of the scores.
ANOTHER = 1_000_003
# Nats: a smaller increase of the loss is rounding.
NOTHING = 1e-4


@dataclass(frozen=True, repr=False)
class CausalResult(Result):
    """Loss on the last copy, in nats a token, with heads knocked out.

    `data` holds over `prompt`: `base`, `top`; over `draw prompt`: `random`; over `prompt pos` (places in the copy, from
    1): `base_by_pos`, `top_by_pos` and `random_by_pos` (the mean over draws). Over `rank`, one for each of the top
    heads: `layer`, `head`, `increase` of the loss with that head alone knocked out, `ci_low`, `ci_high` (95%),
    `control` (the largest mean increase of a head of its layer that is not among the top), `passes`; `alone` with a
    further axis `prompt`.
    """

    @property
    def heads(self) -> list[Head]:
        """(layer, head) of those knocked out, best first."""
        return list(zip(self.data["layer"].values.tolist(), self.data["head"].values.tolist(), strict=True))

    def top(self, n: int = 10) -> pd.DataFrame:
        """The heads that were knocked out, each alone."""
        frame = self.data[["layer", "head", "increase", "ci_low", "ci_high", "control", "passes"]].to_dataframe()
        frame.insert(0, "cell", [f"L{layer}H{head}" for layer, head in self.heads])
        return frame.head(n).reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values: heads, losses, their difference, by position, and each head alone; undefined is None."""
        data = self.data
        drawn = data["random"].mean("prompt")
        return {
            "heads": [list(head) for head in self.heads],
            "loss": {
                "none": float(data["base"].mean()),
                "top": float(data["top"].mean()),
                "random": float(drawn.mean()),
            },
            "random_draws": plain(drawn),
            "per_prompt": {name: plain(data[name]) for name in ("base", "top")},
            "per_position": {name: plain(data[f"{name}_by_pos"].mean("prompt")) for name in ("base", "top", "random")},
            "alone": {name: plain(data[name]) for name in ("increase", "ci_low", "ci_high", "control", "passes")},
            **plain(self.about),
        }

    def summary(self) -> str:
        """One line: what the loss becomes, and what random heads do."""
        about, data = self.about, self.data
        names = ", ".join(f"L{layer}H{head}" for layer, head in self.heads)
        low, high = (about["difference"][name] for name in ("ci_low", "ci_high"))
        interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
        return (
            f"loss on the last copy {float(data['base'].mean()):.2f} nats, without {names} "
            f"{float(data['top'].mean()):.2f}, without as many random heads of their layers "
            f"{float(data['random'].mean()):.2f}: difference {about['difference']['estimate']:.2f}{interval}, "
            f"p {about['p']:.3f} of {data.sizes['draw']} draws; alone {int(data['passes'].sum())} pass "
            f"(n={about['n_prompts']}, 95% {about['scope']})"
        )


def knock_out_top(
    model: HookedModel,
    heads: PatternResult | Sequence[Head],
    k: int = 5,
    *,
    kind: str = "induction",
    value: Value = "mean",
    prompts: Input | None = None,
    period: int | None = None,
    n: int = 16,
    draws: int = 20,
    seed: int = 0,
) -> CausalResult:
    """Knock out the top heads of a pattern together and each alone, against random heads of the same layers.

    Args:
        model: the hooked model; interventions in force stay in force.
        heads: attention scores, whose best `k` of `kind` are taken; or (layer, head) in order.
        k: how many.
        kind: of pattern, where `heads` are scores.
        value: "mean": over the other prompts at the same position (counted from the end); or "zero".
        prompts: sequences whose last `period` tokens repeat those before; new random ones by default.
        period: of the sequences; that of the scores by default.
        n: random prompts.
        draws: random sets of heads; all sets, if there are no more.
        seed: of tokens (another draw than that of `patterns`), sets and intervals.

    Raises:
        UserError: unknown heads or kind, too few other heads in a layer, sequences that do not repeat, or one prompt
            alone, which has no mean.
    """
    if value not in get_args(Value):
        raise UserError(f"unknown value {value!r}; valid: {', '.join(get_args(Value))}")
    top = _top(model, heads, k, kind)
    sets = random_sets(model, top, draws, seed)
    if prompts is None:
        known = heads.about["period"] if isinstance(heads, PatternResult) else None
        prompts = repeated_tokens(model, n, period or known or default_period(model), seed=seed + ANOTHER)
    prompts, period = as_prompts(model, prompts, period)
    if period is None:
        raise UserError("given sequences need their period: the loss is that of the last `period` tokens")
    beside = [(layer, head) for layer in sorted({layer for layer, _ in top}) for head in others_of(model, top, layer)]
    losses = losses_without(model, prompts, period, [[], top, *sets, *([head] for head in [*top, *beside])], value)
    base, whole, drawn, alone = np.split(losses, np.cumsum([1, 1, len(sets)]))
    clusters = None if prompts.template is None else prompts.template.cpu().numpy()
    data = _together(base[0], whole[0], drawn).merge(_alone(alone - base, top, beside, clusters, seed))
    difference = paired_difference(whole[0].mean(-1), drawn.mean((0, -1)), clusters, seed=seed)
    about = provenance(model) | {
        "k": len(top),
        "kind": kind if isinstance(heads, PatternResult) else "given heads",
        "value": "mean over the other prompts at the same position" if value == "mean" else "zero",
        "n_prompts": len(prompts),
        "period": period,
        "bos": bool(prompts.bos),
        "difference": {
            "estimate": plain(difference.estimate),
            "ci_low": plain(difference.low),
            "ci_high": plain(difference.high),
        },
        "p": float((1 + (drawn.mean((1, 2)) >= whole.mean()).sum()) / (1 + len(drawn))),
        "control": f"{len(sets)} sets of as many random heads of the same layers; alone: each other head of the layer",
        "scope": interval_scope(clusters),
        "seed": seed,
    }
    return CausalResult(data, about)


def _top(model: HookedModel, heads: PatternResult | Sequence[Head], k: int, kind: str) -> list[Head]:
    if k < 1:
        raise UserError(f"k must be at least 1; found {k}")
    ranked = heads.ranking(kind) if isinstance(heads, PatternResult) else [(int(a), int(b)) for a, b in heads]
    top = ranked[:k]
    wrong = [head for head in top if not (0 <= head[0] < model.n_layers and 0 <= head[1] < model.n_heads)]
    if not top or wrong or len(set(top)) < len(top):
        raise UserError(
            f"heads are (layer, head), each once, of layers 0 … {model.n_layers - 1} and heads 0 … "
            f"{model.n_heads - 1}; found {top or 'none'}"
        )
    return top


def _together(base: np.ndarray, top: np.ndarray, drawn: np.ndarray) -> xr.Dataset:
    """Of losses `[prompt pos]`, and `[draw prompt pos]`."""
    by_pos = {"base_by_pos": base, "top_by_pos": top, "random_by_pos": drawn.mean(0)}
    arrays: dict[str, Any] = {name: (("prompt", "pos"), values) for name, values in by_pos.items()}
    arrays |= {"base": ("prompt", base.mean(-1)), "top": ("prompt", top.mean(-1))}
    arrays["random"] = (("draw", "prompt"), drawn.mean(-1))
    return xr.Dataset(arrays, coords={"pos": range(1, base.shape[-1] + 1)})


def _alone(
    change: np.ndarray, top: Sequence[Head], beside: Sequence[Head], clusters: np.ndarray | None, seed: int
) -> xr.Dataset:
    """Of the changes `[head prompt pos]` of the loss with each of the top heads out alone, then with those beside."""
    own, others = np.split(change.mean(-1), [len(top)])
    layer = np.array([at for at, _ in top])
    # Of each layer, the other head that costs most.
    means = np.array([np.where([at == one for at, _ in beside], others.mean(1), -np.inf) for one in layer])
    control = others[means.argmax(1)]
    interval = bootstrap_ratio(own, None, clusters, seed=seed)
    beyond = paired_difference(own, control, clusters, seed=seed)
    arrays = {
        "layer": layer,
        "head": np.array([head for _, head in top]),
        "increase": interval.estimate,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "control": control.mean(1),
        "passes": (interval.low > NOTHING) & (beyond.low > NOTHING),
    }
    by_rank: dict[str, Any] = {name: ("rank", values) for name, values in arrays.items()}
    return xr.Dataset({**by_rank, "alone": (("rank", "prompt"), own)})
