"""Training a tuned lens, and measuring it on held-out text.

1. Text comes in blocks (text.py). Position 0 is left out: it is an attention sink, whose residual stream is like no
   other's.
2. *Start.* Translators begin at the least-squares map from their layer's residual stream to the last one, fitted in
   closed form to the covariances of one pass over the text. (From the identity, where Belrose et al. begin, the same
   minutes of training end far behind even this start: see `scripts/bench`.)
3. *Steps.* One forward pass gives the residual streams of all layers at once. At randomly drawn positions each
   translator descends KL(final ‖ lens), by Adam in coordinates that are standardised on both sides. Gradients run
   through the final norm, the unembedding and the soft-cap, and end in the translators.
4. *Columns.* The unembedding is most of the work, so a step takes a part of the vocabulary: the tokens that are
   likeliest in its positions, and a random draw of the rest, which stands for all of it with a weight of
   (tokens in the rest) / (tokens drawn). With as many columns as tokens the KL is exact.
5. *Evaluation* is exact, on documents that the lens was not trained on, beside the logit lens and a control: the mean
   output distribution of the training text, which reads nothing. A lens that only learnt which tokens are frequent
   beats the logit lens at early layers, too, but it does not beat this.

Even so, what a translator finds at a layer is what can be decoded there linearly, not what the model does with it: at
row 0 it is a model of bigrams.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance
from mechinterp.hooked.model import HookedModel
from mechinterp.lens.measure import Final
from mechinterp.lens.streams import Streams, slices, unembedded
from mechinterp.lens.tuned_lens import TunedLens, TunedLensConfig
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference
from mechinterp.text import Blocks

WARM_UP = 5  # steps over which Adam's own averages settle
UNIFORM = 1e-3  # share of the uniform distribution in the control, so that no token is impossible


def train_tuned_lens(
    model: HookedModel, text: Blocks, config: TunedLensConfig | None = None, *, progress: bool = True
) -> TunedLens:
    """Train a translator for every layer to match the model's own output.

    Args:
        model: without interventions in force.
        text: training blocks: the first side of `text.blocks(...).split(0.9)`, so that documents are left to evaluate.
        config: settings; the defaults if None.
        progress: show a progress bar.

    Returns:
        The lens, on the model's device. The same seed gives the same lens.

    Raises:
        UserError: interventions in force, or padded blocks.
    """
    config = config or TunedLensConfig()
    if model.in_force:
        raise UserError("a tuned lens is of a model as it is: leave the interventions first")
    if text.prompts.mask is not None:
        raise UserError("a tuned lens is trained on blocks of one length; found padded prompts")
    draw = torch.Generator().manual_seed(config.seed)
    n_start = min(config.start_blocks, len(text))
    with tqdm(total=n_start + config.steps, desc="tuned lens", disable=not progress, unit="step") as bar:
        moments = [_Moments(model) for _ in range(model.n_layers)]
        for index in torch.randperm(len(text), generator=draw)[:n_start].split(_blocks_at_once(text)):
            resid = [one[:, 1:].flatten(0, 1).float() for one in Streams.record(model, text.prompts.take(index)).resid]
            for layer, moment in enumerate(moments):
                moment.add(resid[layer], resid[-1])
            bar.update(len(index))
        translators = [_Translator(moment, config.ridge) for moment in moments]
        losses, mean_output = _descend(model, text, config, translators, draw, bar)
    folded = [translator.folded() for translator in translators]
    origin = {
        "model": model.info.name,
        "weights_hash": model.weights_hash(),
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "text": text.source,
        "documents": text.document.unique().tolist(),
        "block_length": text.prompts.n_pos,
        "losses": losses,
    }
    weight, bias = (torch.stack(part) for part in zip(*folded, strict=True))
    return TunedLens(weight, bias, mean_output, config, origin)


def _blocks_at_once(text: Blocks) -> int:
    return max(1, 1024 // text.prompts.n_pos)


def _descend(
    model: HookedModel,
    text: Blocks,
    config: TunedLensConfig,
    translators: Sequence["_Translator"],
    draw: torch.Generator,
    bar: tqdm,
) -> tuple[list[float], Tensor]:
    """Steps 3 and 4. Returns the mean KL over layers at every step, in nats, and the mean output `[d_vocab]`."""
    optimizer = torch.optim.Adam([p for one in translators for p in one.parameters], betas=(0.9, 0.99))
    losses, mean_output = [], torch.zeros(model.d_vocab, device=model.device)
    for step, index in zip(range(config.steps), _block_order(len(text), config.blocks_per_step, draw), strict=False):
        fall = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * fall * min(1.0, (step + 1) / WARM_UP)
        resid = [one[:, 1:].flatten(0, 1) for one in Streams.record(model, text.prompts.take(index)).resid]
        chosen = torch.randperm(len(resid[-1]), generator=draw)[: config.positions].to(model.device)
        final = unembedded(model, resid[-1][chosen]).softmax(-1)
        mean_output += final.mean(0) / config.steps
        columns = _Columns.of(final, config.columns, draw)
        kl = [columns.descend(model, one(resid[layer][chosen])) for layer, one in enumerate(translators)]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(torch.stack(kl).mean()))
        bar.set_postfix_str(f"KL {losses[-1]:.2f}", refresh=False)
        bar.update()
    return losses, mean_output


def _block_order(n: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Every block once in random order, `size` at a time, again and again."""
    while True:
        yield from torch.randperm(n, generator=draw).split(size)


class _Moments:
    """Means and covariances of a layer's residual stream x with the last one y, in float64.

    Sums are taken around the first batch's means: residual streams have means far above their spread.
    """

    def __init__(self, model: HookedModel):
        d, device = model.d_model, model.device
        self.n = 0
        self.at = torch.zeros(2, d, device=device)
        self.sums = torch.zeros(2, d, dtype=torch.float64, device=device)
        self.xx = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.xy = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.yy = torch.zeros(d, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows `[row d_model]`."""
        if self.n == 0:
            self.at = torch.stack([x.mean(0), y.mean(0)])
        x, y = x - self.at[0], y - self.at[1]
        self.n += len(x)
        self.sums += torch.stack([x.sum(0), y.sum(0)]).double()
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ y).double()
        self.yy += y.square().sum(0).double()

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of x and y, their covariances xx and xy, and the variances of y."""
        x, y = self.sums / self.n
        xx, xy = self.xx / self.n - torch.outer(x, x), self.xy / self.n - torch.outer(x, y)
        return self.at[0] + x, self.at[1] + y, xx, xy, self.yy / self.n - y.square()


class _Translator:
    """A layer's affine map: the least-squares start and what the steps add, in standardised coordinates."""

    def __init__(self, moments: _Moments, ridge: float):
        mean_x, mean_y, xx, xy, var_y = moments.centred()
        spread = xx.diagonal().clamp(min=0).sqrt() + 1e-6
        solved = torch.linalg.solve(xx + ridge * torch.diag(spread.square()), xy)
        self.start = solved.float()
        self.mean_x, self.mean_y = mean_x.float(), mean_y.float()
        self.spread_x = spread.float()
        self.spread_y = (var_y.clamp(min=0).sqrt() + 1e-6).float()
        self.weight = torch.zeros_like(self.start, requires_grad=True)
        self.bias = torch.zeros_like(self.mean_y, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.weight, self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        """`[row d_model]` translated."""
        x = x.float() - self.mean_x
        step = (x / self.spread_x) @ self.weight / len(self.bias) ** 0.5 + self.bias
        return self.mean_y + x @ self.start + step * self.spread_y

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """A and b of h + A h + b."""
        whole = self.start + self.weight * (self.spread_y / self.spread_x[:, None]) / len(self.bias) ** 0.5
        bias = self.mean_y + self.bias * self.spread_y - self.mean_x @ whole
        return (whole - torch.eye(len(bias), device=bias.device)).T.contiguous(), bias


@dataclass(frozen=True, eq=False)
class _Columns:
    """A part of the vocabulary that stands for all of it.

    Attributes:
        tokens: `[column]`, None for the whole vocabulary.
        log_weight: `[column]` log of how many tokens each stands for.
        final: `[row column]` the model's own probabilities, times that weight.
        entropy: `[row]` of the model's whole distribution, in nats.
    """

    tokens: Tensor | None
    log_weight: Tensor
    final: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, final: Tensor, n: int, draw: torch.Generator) -> "_Columns":
        """Half of `n` columns the likeliest on average over the rows of `final` `[row d_vocab]`, half drawn."""
        entropy = -torch.special.xlogy(final, final).sum(-1)
        d_vocab = final.shape[-1]
        if n >= d_vocab:
            return cls(None, final.new_zeros(d_vocab), final, entropy)
        order = final.mean(0).argsort(descending=True)
        best, rest = order[: n // 2], order[n // 2 :]
        drawn = rest[torch.randperm(len(rest), generator=draw)[: n - n // 2].to(rest.device)]
        tokens = torch.cat([best, drawn])
        log_weight = final.new_zeros(n)
        log_weight[n // 2 :] = math.log(len(rest) / len(drawn))
        return cls(tokens, log_weight, final[:, tokens] * log_weight.exp(), entropy)

    def descend(self, model: HookedModel, translated: Tensor) -> Tensor:
        """Add the gradient of the mean KL over rows `[row d_model]`, and return that KL.

        The gradient by the logits is known, softmax − final: nothing between them need be kept.
        """
        logits = unembedded(model, translated, self.tokens)
        with torch.no_grad():
            weighted = logits + self.log_weight
            log_total = weighted.logsumexp(-1)
            kl = log_total - (self.final * logits).sum(-1) - self.entropy
            gradient = (weighted - log_total[:, None]).exp_().sub_(self.final).div_(len(logits))
        logits.backward(gradient)
        return kl.mean()


@dataclass(frozen=True, repr=False)
class TunedLensResult(Result):
    """A tuned lens on held-out text beside the logit lens and a lens that reads nothing.

    `data` holds over `layer` (0 … n_layers − 1; the last row is exact in either lens) the mean KL from the model's own
    output, in nats: `tuned` and `logit` with `_low` and `_high` (95%), `control`, that of the mean output of the
    training text; `gain` = logit − tuned and `over_control` = control − tuned, with limits; `passes`: both limits
    exclude 0. Over `layer` and `prompt` (a block of text): `tuned_kl`, `logit_kl`; over `prompt`: `control_kl`.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """At most `n` layers, evenly spaced with both ends."""
        names = ["tuned", "tuned_low", "tuned_high", "logit", "control", "gain_low", "gain_high", "passes"]
        layers = self.data["layer"].values
        chosen = np.unique(np.linspace(0, len(layers) - 1, max(1, min(n, len(layers)))).round().astype(int))
        return self.to_frame()[["layer", *names]].iloc[chosen].reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values by layer, and where they come from. Undefined is None."""
        cells = [name for name, array in self.data.data_vars.items() if "prompt" not in array.dims]
        made = {str(name): plain(self.data[name]) for name in cells}
        return {"layers": self.data["layer"].values.tolist(), **made, "about": plain(self.about)}

    def summary(self) -> str:
        """Mean KL over layers of both lenses and the control, and the layers that pass."""
        means = {name: float(self.data[name].mean()) for name in ("tuned", "logit", "control")}
        passed, n = int(self.data["passes"].sum()), self.data.sizes["layer"]
        return (
            f"tuned lens of {self.about['model']}: mean KL over layers {means['tuned']:.2f} nats, logit lens "
            f"{means['logit']:.2f}, reading nothing {means['control']:.2f}; {passed} of {n} layers beat both "
            f"(n={self.data.sizes['prompt']} blocks, 95% {self.about['scope']})"
        )


def evaluate_tuned_lens(
    model: HookedModel, lens: TunedLens, text: Blocks, *, positions: int = 8, seed: int = 0
) -> TunedLensResult:
    """KL of the tuned and the logit lens from the model's own output, on text that the lens has not seen.

    Args:
        model: the hooked model, as the lens was trained on it.
        lens: of this model.
        text: held-out blocks: the second side of `text.blocks(...).split(0.9)`.
        positions: drawn in every block, position 0 left out.
        seed: of the draw and the intervals.

    Raises:
        UserError: a lens of another model, blocks of documents that it was trained on, or too short for `positions`.
    """
    lens.require(model)
    seen = set(text.document.tolist()) & set(lens.origin["documents"])
    if text.source == lens.origin["text"] and seen:
        raise UserError(f"{len(seen)} documents of {text.source} were trained on: evaluate on the other side of .split")
    n, n_pos = text.prompts.tokens.shape
    if not 1 <= positions < n_pos or text.prompts.mask is not None:
        raise UserError(f"positions must be 1 … {n_pos - 1} in unpadded blocks of {n_pos} tokens; found {positions}")
    draw = torch.Generator().manual_seed(seed)
    spots = torch.stack([torch.randperm(n_pos - 1, generator=draw)[:positions] + 1 for _ in range(n)])
    constant = (lens.mean_output * (1 - UNIFORM) + UNIFORM / model.d_vocab).log()
    kl = torch.zeros(2, model.n_layers, n, positions)
    control = torch.zeros(n, positions)
    for index in chunks(model, n, n_pos, read_vocab=True, every_position=True):
        plain_streams = Streams.record(model, text.prompts, index)
        lenses = [plain_streams.translated(lens), plain_streams]
        for part in slices(model, len(index), positions):
            at = spots[index, part]
            final = Final.of(plain_streams.logits([model.n_layers], at)[0].flatten(0, 1))
            reading_nothing = final.kl(constant.expand_as(final.prob), torch.zeros_like(final.entropy))
            control[index, part] = reading_nothing.unflatten(0, at.shape).cpu()
            for which, streams in enumerate(lenses):
                for layer in range(model.n_layers):
                    logits = streams.logits([layer], at)[0].flatten(0, 1)
                    kl[which, layer, index, part] = final.kl(logits, logits.logsumexp(-1)).unflatten(0, at.shape).cpu()
    return _evaluated(model, lens, text, kl.mean(-1).double().numpy(), control.mean(-1).double().numpy(), seed)


def _evaluated(
    model: HookedModel, lens: TunedLens, text: Blocks, kl: np.ndarray, control: np.ndarray, seed: int
) -> TunedLensResult:
    """Intervals over documents of `kl` `[lens layer prompt]` and `control` `[prompt]`."""
    documents = text.document.numpy()
    arrays: dict[str, Any] = {}
    for name, values in (("tuned", kl[0]), ("logit", kl[1])):
        found = bootstrap_ratio(values, clusters=documents, seed=seed)
        arrays |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
    for name, values in (("gain", kl[1]), ("over_control", np.broadcast_to(control, kl[0].shape))):
        gap = paired_difference(values, kl[0], documents, seed=seed)
        arrays |= {name: gap.estimate, f"{name}_low": gap.low, f"{name}_high": gap.high}
    arrays["control"] = np.full(len(kl[0]), control.mean())
    arrays["passes"] = (arrays["gain_low"] > 0) & (arrays["over_control_low"] > 0)
    by_block = {"tuned_kl": (("layer", "prompt"), kl[0]), "logit_kl": (("layer", "prompt"), kl[1])}
    data = xr.Dataset(
        {**{name: ("layer", value) for name, value in arrays.items()}, **by_block, "control_kl": ("prompt", control)},
        coords={"layer": list(range(model.n_layers))},
    )
    scope = interval_scope(documents).replace("prompts", "blocks").replace("templates", "documents")
    about = provenance(model) | {
        "text": text.source,
        "documents": len(np.unique(documents)),
        "control": "the mean output distribution of the training text, which reads nothing",
        "tuned_lens": {name: value for name, value in lens.origin.items() if name != "documents"},
        "scope": scope.replace("this template", "this document"),
        "seed": seed,
    }
    return TunedLensResult(data, about)
