"""Direct effects: what every component writes into the logits itself, past all later layers.

1. Behind the last block the residual stream is a sum: the embedding, each head's z W_O, each MLP's output, and biases.
2. The final norm is linear once its scale is taken from the run, so a direction of the unembedding (the answer's column
   less the wrong answer's) can be pulled back through it to the residual stream: one vector for each prompt. Where a
   post-norm stands behind a component (Gemma-2), the direction is pulled back through that as well, by its own scale.
3. A component's direct effect is the dot product of its output with that vector. No head's output is ever formed in the
   residual stream: the vector is pulled back through W_O, too.
4. The effects and the biases add up to the logit difference before a final soft-cap.

Elhage et al. 2021; with the scales of the run in place of folded weights, so that raw and processed weights give the
same sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks
from mechinterp.hooked import forward, weights
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.tasks.pairs import Answers, PromptPairs

Side = Literal["clean", "corrupted"]
Against = Literal["wrong", "mean", "nothing"]
# Parts that miss the logits by more than this share of their size: something in force writes into the stream itself.
GAP = 1e-3


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Direct effects on the logit (difference) of every prompt, averaged over its targets; on the CPU, in logits.

    Attributes:
        heads: `[layer head prompt]`.
        mlps: `[layer prompt]`, output biases excluded; 0 where a layer has no MLP.
        embed: `[prompt]` token and position embeddings.
        bias: `[prompt]` output biases of attention and MLPs, of the norms, and of the unembedding.
        total: `[prompt]` their sum: the logit difference before a final soft-cap.
        own_total: `[prompt]` the same sum through the final norm's scale of this very run; `total` unless a scale was
            given.
        output: `[prompt]` the model's own logit difference.
        scale: `[prompt target one]` the final norm's divisor in this run.
        sources: `[layer head key prompt]` the part of each head's effect that it moved from each position (padding
            counted); None unless asked for.
        neurons: `[layer neuron prompt]`, which add up to `mlps`; None unless asked for.
    """

    heads: Tensor
    mlps: Tensor
    embed: Tensor
    bias: Tensor
    total: Tensor
    own_total: Tensor
    output: Tensor
    scale: Tensor
    sources: Tensor | None = field(default=None, repr=False)
    neurons: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Directions:
    """What is asked of the unembedding: `vector` `[prompt target d_model]` and `bias` `[prompt target]`, each weighted
    by the share of its target."""

    vector: Tensor
    bias: Tensor

    @classmethod
    def of(cls, model: HookedModel, answers: Answers, against: Against) -> "Directions":
        """The answer's column of the unembedding, less the wrong answer's, less the mean column, or alone."""
        columns, bias = weights.unembedding(model)
        answers = answers.to(columns.device)

        def mean(tokens: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
            shares = shares * answers.weight[..., None]
            return torch.einsum("btcd,btc->btd", columns.T[tokens].float(), shares), (bias[tokens] * shares).sum(-1)

        vector, offset = mean(answers.answer, answers.answer_weight)
        if against == "wrong":
            less = mean(answers.wrong, answers.wrong_weight)
            vector, offset = vector - less[0], offset - less[1]
        elif against == "mean":
            vector = vector - answers.weight[..., None] * columns.float().mean(-1)
            offset = offset - answers.weight * bias.float().mean()
        return cls(vector, offset)

    def take(self, index: Tensor) -> "Directions":
        """Those of the prompts at `index`."""
        return Directions(self.vector[index], self.bias[index])


def direct_effects(
    model: HookedModel,
    pairs: PromptPairs,
    side: Side = "clean",
    *,
    against: Against = "wrong",
    scale: Tensor | None = None,
    answers: Answers | None = None,
    sources: bool = False,
    neurons: bool = False,
) -> DirectEffects:
    """The direct effect of every component on the answer's logit, under the interventions in force.

    Args:
        model: the hooked model.
        pairs: prompts and answers of single tokens.
        side: which prompts to run.
        against: "wrong": the answer less the wrong answer; "mean": less the mean logit; "nothing": the logit alone.
        scale: `[prompt target one]`, the final norm's divisor, to use in place of this run's own.
        answers: to ask for in place of the pairs' own, at the same positions.
        sources: split heads by the position that they read.
        neurons: split MLPs by neuron.

    Raises:
        UserError: answers of several tokens, none to compare with, or interventions in force that write into the
            residual stream itself, so that its parts no longer add up.
    """
    if pairs.continuations is not None:
        raise UserError(f"direct effects need answers of one token, but {pairs.long_answer}")
    answers = answers or pairs.answers
    if against == "wrong" and not answers.has_wrong:
        raise UserError("the answers have no wrong ones to compare with; valid: against='mean' or 'nothing'")
    prompts = pairs.clean if side == "clean" else pairs.corrupted
    asked = Directions.of(model, answers, against)
    sites = _sites(model, sources, neurons)
    parts = []
    for index in chunks(model, len(prompts), prompts.n_pos, read_vocab=True, every_position=True):
        run = _run(model, prompts.take(index), sites, pairs.answers.pos[index])
        own = _effects(model, run, asked.take(index), run.scale)
        output = _asked_of(run.logits, answers.take(index), against)
        _require_sum(model, own.total, output)
        if scale is not None:
            given = _effects(model, run, asked.take(index), scale[index].to(run.scale))
            own = replace(given, own_total=own.total)
        parts.append(replace(own, output=output))
    return _joined(parts)


@dataclass(frozen=True, eq=False)
class _Run:
    """One forward of some prompts: recorded sites by hook name, read at `pos` `[batch target]`; logits there."""

    kept: dict[str, Tensor]
    pos: Tensor
    logits: Tensor

    def has(self, name: str, layer: int | None = None) -> bool:
        """Whether the site was recorded."""
        return Site(name, layer).hook_name in self.kept

    def whole(self, name: str, layer: int | None = None) -> Tensor:
        """A recorded site at all positions."""
        return self.kept[Site(name, layer).hook_name].float()

    def at(self, name: str, layer: int | None = None) -> Tensor:
        """`[batch target …]` of a recorded site, at the positions that are read."""
        return _at(self.whole(name, layer), self.pos)

    @property
    def scale(self) -> Tensor:
        """`[batch target one]` the final norm's divisor; 1 in a model without norms."""
        return self.at("ln_final_scale") if self.has("ln_final_scale") else self.logits.new_ones((*self.pos.shape, 1))


def _at(activation: Tensor, pos: Tensor) -> Tensor:
    return activation[torch.arange(len(pos), device=pos.device)[:, None], pos]


def _sites(model: HookedModel, sources: bool, neurons: bool) -> list[Site]:
    """What a run must keep."""
    names = {"z", "mlp_out", "ln1_post_scale", "ln2_post_scale", "ln_final_scale"}
    names |= ({"v", "pattern"} if sources else set()) | ({"mlp_post"} if neurons else set())
    return [Site("resid_pre", 0), *[site for site in model.site_list if site.name in names]]


def _run(model: HookedModel, prompts: Prompts, sites: Sequence[Site], pos: Tensor) -> _Run:
    kept: dict[str, Tensor] = {}
    logits = forward.run(model, prompts, record=sites, into=kept)
    pos = pos.to(logits.device)
    return _Run(kept, pos, _at(logits, pos).float())


def _effects(model: HookedModel, run: _Run, asked: Directions, scale: Tensor) -> DirectEffects:
    """Of one run, with the final norm's divisor given; `own_total` and `output` are not filled in."""
    norm = weights.final_norm(model)
    back = norm.pull_back(asked.vector, scale)
    bias = asked.bias.sum(-1) + (asked.vector @ norm.bias).sum(-1)
    embed = (run.at("resid_pre", 0) * back).sum((1, 2))
    heads, mlps, sources, neurons = [], [], [], []
    for layer in range(model.n_layers):
        through, constant = _behind_post_norm(model, run, layer, "attn", back)
        matrix, out_bias = weights.head_out(model, layer)
        reads = torch.einsum("hed,btd->bthe", matrix.float(), through)  # each head's z is read along this
        heads.append((run.at("z", layer) * reads).sum((1, 3)).T)
        bias = bias + constant + (through @ out_bias.float()).sum(-1)
        if run.has("pattern", layer):
            sources.append(_by_source(model, run, layer, reads))
        if not run.has("mlp_out", layer):
            mlps.append(torch.zeros_like(embed))
            continue
        through, constant = _behind_post_norm(model, run, layer, "mlp", back)
        matrix, out_bias = weights.mlp_out(model, layer)
        constant = constant + (through @ out_bias.float()).sum(-1)
        mlps.append((run.at("mlp_out", layer) * back).sum((1, 2)) - constant)
        bias = bias + constant
        if run.has("mlp_post", layer):
            neurons.append(torch.einsum("btn,btn->nb", run.at("mlp_post", layer), through @ matrix.float().T))
    by_head, by_mlp = torch.stack(heads), torch.stack(mlps)
    total = embed.double() + bias.double() + by_head.double().sum((0, 1)) + by_mlp.double().sum(0)
    return DirectEffects(
        by_head, by_mlp, embed, bias, total, total, total, run.scale,
        torch.stack(sources) if sources else None, torch.stack(neurons) if neurons else None,
    )  # fmt: skip


def _behind_post_norm(
    model: HookedModel, run: _Run, layer: int, part: Literal["attn", "mlp"], back: Tensor
) -> tuple[Tensor, Tensor]:
    """`back` pulled through the norm behind a component, and what that norm's bias adds `[batch]`."""
    found = weights.post_norm(model, layer, part)
    if found is None:
        return back, back.new_zeros(len(back))
    norm, site = found
    return norm.pull_back(back, run.at(site.name, layer)), (back @ norm.bias).sum(-1)


def _by_source(model: HookedModel, run: _Run, layer: int, reads: Tensor) -> Tensor:
    """`[head key batch]`: attention from the read position to each key, times what the head moves from there."""
    values = run.whole("v", layer)
    values = values.repeat_interleave(model.n_heads // values.shape[2], dim=2)
    pattern = _at(run.whole("pattern", layer).transpose(1, 2), run.pos)
    return torch.einsum("bthk,bkhe,bthe->hkb", pattern, values, reads)


def _asked_of(logits: Tensor, answers: Answers, against: Against) -> Tensor:
    """`[batch]` of logits `[batch target d_vocab]`: what `Directions` asks, of the model's own output."""
    answers = answers.to(logits.device)
    value = (logits.gather(-1, answers.answer) * answers.answer_weight).sum(-1)
    if against == "wrong":
        value = value - (logits.gather(-1, answers.wrong) * answers.wrong_weight).sum(-1)
    elif against == "mean":
        value = value - logits.mean(-1)
    return (value * answers.weight).sum(-1)


def _require_sum(model: HookedModel, total: Tensor, output: Tensor) -> None:
    """The parts must add up to the logits, unless a soft-cap stands between. Raises UserError."""
    if float(getattr(model.bridge.cfg, "output_logits_soft_cap", 0) or 0) > 0:
        return
    gap = float((total - output).abs().max()) / max(1.0, float(output.abs().max()))
    if not gap <= (GAP if model.dtype == torch.float32 else 100 * GAP):
        edited = ", ".join(str(one.writes) for one in model.in_force) or "nothing"
        raise UserError(
            f"the parts of the residual stream miss the logits by {gap:.1e} of their size: direct effects need a "
            f"stream that only components write to; in force: {edited}"
        )


def _joined(parts: Sequence[DirectEffects]) -> DirectEffects:
    """Of all prompts, on the CPU."""
    made = {}
    for name in vars(parts[0]):
        values = [getattr(part, name) for part in parts]
        along = 0 if name == "scale" else -1  # prompts come last in all others
        made[name] = None if values[0] is None else torch.cat([value.cpu() for value in values], along)
    return DirectEffects(**made)
