"""Direct logit attribution: how much each head, MLP, embedding and bias writes for the answer, with doubt beside it.

1. Direct effects of every component on the logit difference of each prompt (direct_effects.py); they add up to it.
2. Intervals over prompts (templates are clusters), and a sign-flip threshold over all components (family-wise 5%).
3. Control: the same outputs read along *another* prompt's answer less its wrong answer. A head that carries this
   prompt's answer must not write another's; one that writes the same everywhere is not moving anything.
4. On request, each head's effect by the token that it was moved from, and the neurons of largest effect.

Elhage et al. 2021; Wang et al. 2023 for the use on logit differences.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, templates_of
from mechinterp.hooked.model import HookedModel
from mechinterp.lens.direct_effects import Against, DirectEffects, Side, direct_effects
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference, sign_flip_threshold
from mechinterp.tasks.pairs import Answers, PromptPairs

if TYPE_CHECKING:
    import plotly.graph_objects as go

Sources = Literal["roles", "each"]


@dataclass(frozen=True, repr=False)
class DirectLogit(Result):
    """Direct effects by component, in logits.

    `data` holds over `component` (labels `embed`, `bias`, `L9H6`, `m3`): `effect`, `ci_low`, `ci_high` (95%),
    `control` (the effect on another prompt's logit difference), `passes` (beyond the threshold, and the interval of the
    difference to the control excludes 0); `direct` with a further axis `prompt`; over `prompt` alone: `total` (the sum
    of all components), `logit_diff` (the model's own) and `soft_cap`, what a final soft-cap takes or gives. With
    sources: `moved` `[layer head role prompt]` (or `pos` for `role`). With neurons: `neuron_effect` `[rank]`, its
    interval, and `neuron_layer`, `neuron_index`.
    """

    def grid(self, name: str = "effect") -> np.ndarray:
        """`[layer head]` an array of the heads."""
        heads = [label for label in self.data["component"].values if label.startswith("L")]
        return self.data[name].sel(component=heads).values.reshape(self.about["n_layers"], self.about["n_heads"])

    def mlps(self, name: str = "effect") -> np.ndarray:
        """`[layer]` an array of the MLPs."""
        labels = [label for label in self.data["component"].values if label.startswith("m")]
        return self.data[name].sel(component=labels).values

    def ranking(self) -> list[tuple[int, int]]:
        """Heads as (layer, head), the largest positive direct effect first, the most negative last."""
        order = np.argsort(-self.grid(), axis=None, kind="stable")
        return [(int(i) // self.about["n_heads"], int(i) % self.about["n_heads"]) for i in order]

    def top(self, n: int = 10) -> pd.DataFrame:
        """The components of largest |effect|."""
        names = ["effect", "ci_low", "ci_high", "control", "passes"]
        frame = self.data[names].to_dataframe().reset_index()
        return frame.iloc[np.argsort(-np.abs(frame["effect"].to_numpy()), kind="stable")[:n]].reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""

        def one(label: str) -> Any:
            return plain(self.data["effect"].sel(component=label))

        def limits(grid: Any) -> dict[str, Any]:
            return {name: plain(grid(name)) for name in ("ci_low", "ci_high", "control", "passes")}

        made = {
            "heads": plain(self.grid()),
            "mlps": plain(self.mlps()),
            "embed": one("embed"),
            "bias": one("bias"),
            **{name: float(self.data[name].mean()) for name in ("total", "logit_diff", "soft_cap")},
            "heads_intervals": limits(self.grid),
            "mlps_intervals": limits(self.mlps),
            "per_prompt": {name: plain(self.data[name]) for name in ("total", "logit_diff")},
        }
        if "moved" in self.data:
            axis = self.data["moved"].dims[2]
            made |= {"moved": plain(self.data["moved"].mean("prompt")), "moved_from": plain(self.data[axis])}
        if "neuron_effect" in self.data:
            names = ("neuron_layer", "neuron_index", "neuron_effect", "neuron_low", "neuron_high")
            made |= {"neurons": {name: plain(self.data[name]) for name in names}}
        return made | plain(self.about)

    def summary(self) -> str:
        """One line: what adds up, and the largest writer."""
        best, about = self.top(1).iloc[0], self.about
        cap = float(self.data["soft_cap"].mean())
        return (
            f"direct logit attribution, {about['asked']}: {float(self.data['total'].mean()):.2f} in all"
            f"{f' (soft-cap {cap:+.2f})' if abs(cap) > 1e-3 else ''}, largest {best['component']} {best['effect']:.2f} "
            f"[{best['ci_low']:.2f}, {best['ci_high']:.2f}]; {int(self.data['passes'].sum())} components pass both "
            f"controls (n={about['n_prompts']}, 95% {about['scope']})"
        )

    def figure(self) -> "go.Figure":
        """A plotly heatmap of the heads."""
        from mechinterp.reporting.sections.direct_logit import direct_logit_figure  # drawing lies above

        return direct_logit_figure(self)


def direct_logit(
    model: HookedModel,
    pairs: PromptPairs,
    side: Side = "clean",
    *,
    against: Against | None = None,
    sources: Sources | None = None,
    neurons: int = 0,
    seed: int = 0,
) -> DirectLogit:
    """What each component writes for the answer, in logits, under the interventions in force.

    Args:
        model: the hooked model.
        pairs: prompts and answers of single tokens.
        side: which prompts to run.
        against: "wrong": the answer less the wrong answer (the default where there is one); "mean": less the mean logit
            of the vocabulary; "nothing": the logit alone.
        sources: split each head's effect by the role that it was moved from ("roles": what is at no role is `other`),
            or by position ("each", prompts of one length).
        neurons: how many neurons of largest |effect| to name.
        seed: of intervals and controls.

    Raises:
        UserError: answers of several tokens, none to compare with, sources that the prompts do not have.
    """
    against = against or ("wrong" if pairs.answers.has_wrong else "mean")
    places = None if sources is None else _places(pairs, sources)
    found = direct_effects(model, pairs, side, against=against, sources=sources is not None, neurons=neurons > 0)
    labels, direct = _components(model, found)
    other = _other_answers(pairs)
    control = np.full_like(direct, np.nan)
    if other is not None:
        control = _components(model, direct_effects(model, pairs, side, against=against, answers=other))[1]
    clusters = templates_of(pairs)
    arrays, threshold = _statistics(labels, direct, control, clusters, seed)
    per_prompt = {
        "total": ("prompt", found.total.double().numpy()),
        "logit_diff": ("prompt", found.output.double().numpy()),
        "soft_cap": ("prompt", (found.output - found.total).double().numpy()),
    }
    data = xr.Dataset({**arrays, **per_prompt}, coords={"component": labels})
    if places is not None and found.sources is not None:
        data = data.merge(_moved(found.sources, *places))
    if found.neurons is not None:
        data = data.merge(_largest_neurons(found.neurons, neurons, clusters, seed))
    about = provenance(model, pairs) | {
        "side": side,
        "against": against,
        "asked": {"wrong": "answer − wrong answer", "mean": "answer − mean logit", "nothing": "logit of the answer"}[
            against
        ],
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "threshold": plain(threshold),
        "control": "the same outputs on another prompt's logit difference"
        if other is not None
        else "none: no such pair",
        "scope": interval_scope(clusters),
        "seed": seed,
    }
    return DirectLogit(data, about)


def _components(model: HookedModel, found: DirectEffects) -> tuple[list[str], np.ndarray]:
    """Labels, and `[component prompt]`: embedding, biases, heads by layer, MLPs by layer (where the model has any)."""
    heads = [f"L{layer}H{head}" for layer in range(model.n_layers) for head in range(model.n_heads)]
    have = [site.layer for site in model.site_list if site.name == "mlp_out"]
    parts = [found.embed[None], found.bias[None], found.heads.flatten(0, 1), found.mlps[have]]
    return ["embed", "bias", *heads, *[f"m{layer}" for layer in have]], torch.cat(parts).double().numpy()


def _other_answers(pairs: PromptPairs) -> Answers | None:
    """For each prompt the answers of another one that shares no token with its own; None where there is none."""
    answers, n = pairs.answers, len(pairs)

    def tokens(i: int) -> set[int]:
        kept = (answers.answer[i][answers.answer_weight[i] > 0], answers.wrong[i][answers.wrong_weight[i] > 0])
        return set(torch.cat(kept).tolist())

    own, chosen = [tokens(i) for i in range(n)], []
    for i in range(n):
        fits = [j for j in ((i + step) % n for step in range(1, n)) if not own[i] & own[j]]
        if not fits:
            return None
        chosen.append(fits[0])
    return answers.take(torch.tensor(chosen))


def _statistics(
    labels: list[str], direct: np.ndarray, control: np.ndarray, clusters: np.ndarray | None, seed: int
) -> tuple[dict[str, Any], float]:
    """Arrays over `component`, and the threshold that |effect| must exceed."""
    interval = bootstrap_ratio(direct, None, clusters, seed=seed)
    threshold = sign_flip_threshold(direct, clusters, seed=seed)
    passes = np.zeros(len(labels), dtype=bool)
    if np.isfinite(control).all():
        beyond = np.sign(interval.estimate)[:, None] * (direct - control)
        specific = paired_difference(beyond, np.zeros_like(beyond), clusters, seed=seed).low > 0
        passes = specific & (np.abs(interval.estimate) > threshold)
    arrays = {
        "effect": interval.estimate,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "control": control.mean(1),
        "passes": passes,
    }
    by_component = {name: ("component", values) for name, values in arrays.items()}
    return {**by_component, "direct": (("component", "prompt"), direct)}, float(threshold)


def _places(pairs: PromptPairs, sources: Sources) -> tuple[str, list[Any], Tensor]:
    """The axis of the sources, its labels, and `[place prompt pos]` bool masks that part the tokens of each prompt."""
    prompts = pairs.clean
    if sources == "each":
        if prompts.mask is not None:
            raise UserError("sources='each' needs prompts of one length; found several. Valid: sources='roles'")
        eye = torch.eye(prompts.n_pos, dtype=torch.bool)
        return "pos", list(range(prompts.n_pos)), eye[:, None].expand(-1, len(pairs), -1)
    if not pairs.roles:
        raise UserError("sources='roles' needs a task with roles; these pairs have none. Valid: sources='each'")
    masks, left = [], prompts.real.cpu().clone()
    for role in pairs.roles:
        masks.append(prompts.at_role(role).cpu() & left)  # a position with two roles counts for the first
        left &= ~masks[-1]
    return "role", [*pairs.roles, "other"], torch.stack([*masks, left])


def _moved(sources: Tensor, axis: str, labels: list[Any], masks: Tensor) -> xr.Dataset:
    """`moved` `[layer head place prompt]` from `[layer head key prompt]`."""
    moved = torch.einsum("lhkp,rpk->lhrp", sources.double(), masks.double()).numpy()
    layers, heads = range(moved.shape[0]), range(moved.shape[1])
    dims = ("layer", "head", axis, "prompt")
    return xr.Dataset({"moved": (dims, moved)}, coords={"layer": layers, "head": heads, axis: labels})


def _largest_neurons(neurons: Tensor, k: int, clusters: np.ndarray | None, seed: int) -> xr.Dataset:
    """The `k` neurons of largest |mean effect|, with intervals."""
    mean = neurons.mean(-1)
    order = mean.abs().flatten().topk(min(k, mean.numel())).indices
    layer, index = order // mean.shape[1], order % mean.shape[1]
    interval = bootstrap_ratio(neurons[layer, index].double().numpy(), None, clusters, seed=seed)
    arrays = {
        "neuron_layer": layer.numpy(),
        "neuron_index": index.numpy(),
        "neuron_effect": interval.estimate,
        "neuron_low": interval.low,
        "neuron_high": interval.high,
    }
    return xr.Dataset({name: ("rank", values) for name, values in arrays.items()})
