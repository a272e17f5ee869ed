"""Training a tuned lens.

1. Text comes in blocks (text.py). Position 0 is left out: it is an attention sink, whose residual stream is like no
   other's.
2. *Start.* Translators begin at the least-squares map from their layer's residual stream to the last one, fitted in
   closed form to the covariances of one pass over the text. Belrose et al. begin at the identity; 200 of the steps
   below from there end behind least squares without any step (SmolLM2-135M, KL at layers 0, 10, 20: 6.5, 2.5, 1.9 nats
   against 2.9, 2.1, 1.3).
3. *Steps.* One forward pass gives the residual streams of all layers at once. At randomly drawn positions each
   translator descends KL(final ‖ lens), by Adam in coordinates that are standardised on both sides. Gradients run
   through the final norm, the unembedding and the soft-cap, and end in the translators.
4. *Columns.* The unembedding is most of the work, so a step takes a part of the vocabulary: the tokens that are
   likeliest in its positions, and a random draw of the rest, which stands for all of it with a weight of
   (tokens in the rest) / (tokens drawn). With as many columns as tokens the KL is exact.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.lens.streams import Streams, unembedded
from mechinterp.lens.tuned_lens import TunedLens, TunedLensConfig
from mechinterp.text import Blocks

WARM_UP = 5  # steps over which Adam's own averages settle


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
