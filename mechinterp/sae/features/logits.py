"""What features write for the logits: decoder rows through the final norm and the unembedding.

1. A row is brought to the residual stream: as it is where the autoencoder writes the stream or something that is added
   to it, through W_O (and the norm after attention, where there is one) for `z`. Elsewhere it has no direct effect.
2. The final norm is linear once its scale is known (hooked/weights.py); the scale is the median over a sample of text.
3. The unembedding makes logits of it; their mean over the vocabulary is taken off, for it changes no probability.

The direct effect alone: what later layers make of the feature is not in it (nostalgebraist 2020; Elhage et al. 2021).
The control is a random direction of the same length, which has a most promoted token, too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.hooked import weights
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.sae.autoencoder import SparseAutoencoder

ADDED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
N_RANDOM = 64  # directions of the control
AT_ONCE = 64  # features whose logits are held at a time
SAMPLE = 4  # blocks whose norms' scales are measured


@dataclass(frozen=True, eq=False)
class LogitEffects:
    """Tokens that features promote and suppress most.

    Attributes:
        promoted, suppressed: `[feature rank]` token ids.
        up, down: `[feature rank]` their logits, less the mean over the vocabulary.
        random: `[feature]` the largest logit of a random direction of the same length, the mean over some.
    """

    promoted: Tensor
    suppressed: Tensor
    up: Tensor
    down: Tensor
    random: Tensor


def refusal(sae: SparseAutoencoder) -> str:
    """Why features of this autoencoder have no direct logit effects; empty where they have."""
    writes = sae.metadata.writes or sae.metadata.reads
    if len(writes) != 1:
        return f"it writes {len(writes)} sites"
    name = Site.from_hook(writes[0]).name
    return "" if name in (*ADDED, "z") else f"{name} is not added to the residual stream"


def logit_effects(
    model: HookedModel, sae: SparseAutoencoder, features: Tensor, strength: Tensor, sample: Prompts, k: int, seed: int
) -> LogitEffects:
    """Logits of features at given activations.

    Args:
        model: whose norm and unembedding are used.
        sae: one with an empty `refusal`.
        features: `[feature]` numbers.
        strength: `[feature]` activations that the rows are multiplied by.
        sample: text in which the norms' scales are measured; few blocks of it are run.
        k: tokens of each side.
        seed: of the random directions.
    """
    through, alike = _Path.of(model, sae, sample), torch.Generator().manual_seed(seed)
    rows = sae.W_dec.detach()[features.to(sae.W_dec.device)].to(model.device).float()
    directions = torch.randn(N_RANDOM, rows.shape[1], generator=alike).to(rows)
    reach = through.logits(directions / directions.norm(dim=1, keepdim=True)).amax(1).mean()
    made = [_extremes(through, part, k) for part in (rows * strength.to(rows)[:, None]).split(AT_ONCE)]
    promoted, suppressed, up, down = (torch.cat(parts) for parts in zip(*made, strict=True))
    return LogitEffects(promoted, suppressed, up, down, reach.cpu() * rows.norm(dim=1).cpu() * strength.cpu())


def _extremes(through: "_Path", rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = through.logits(rows).cpu()
    up, down = logits.topk(k), logits.topk(k, largest=False)
    return up.indices, down.indices, up.values, down.values


@dataclass(frozen=True, eq=False)
class _Path:
    """From what an autoencoder writes to the logits, with the scales of the norms between."""

    to_stream: Tensor | None
    post: tuple[weights.Norm, float] | None
    final: weights.Norm
    scale: float
    unembedding: Tensor

    @classmethod
    def of(cls, model: HookedModel, sae: SparseAutoencoder, sample: Prompts) -> "_Path":
        site = Site.from_hook((sae.metadata.writes or sae.metadata.reads)[0])
        behind = weights.post_norm(model, site.layer or 0) if site.name == "z" else None
        wanted = [Site("ln_final_scale"), *([behind[1]] if behind else [])]
        scales = _median_scales(model, [one for one in wanted if one in model.site_list], sae, sample)
        matrix, _ = weights.unembedding(model)
        words = model.d_vocab if model.tokenizer is None else min(model.d_vocab, len(model.tokenizer))
        return cls(
            weights.head_out(model, site.layer or 0)[0].flatten(0, 1).float() if site.name == "z" else None,
            (behind[0], scales[behind[1]]) if behind else None,
            weights.final_norm(model),
            scales.get(Site("ln_final_scale"), 1.0),  # a model without a norm has no such site
            matrix[:, :words].float(),
        )

    def logits(self, rows: Tensor) -> Tensor:
        """`[feature d_vocab]` of `[feature d_out]`, centred."""
        if self.to_stream is not None:
            rows = rows @ self.to_stream
        if self.post is not None:
            rows = self.post[0].linear(rows, torch.tensor(self.post[1], device=rows.device))
        made = self.final.linear(rows, torch.tensor(self.scale, device=rows.device)) @ self.unembedding
        return made - made.mean(1, keepdim=True)


def _median_scales(model: HookedModel, sites: list[Site], sae: SparseAutoencoder, sample: Prompts) -> dict[Site, float]:
    """Median divisors of norms over the kept positions of a few blocks of a sample (over all, if none is kept)."""
    if not sites:
        return {}
    step = max(1, len(sample) // SAMPLE)
    few = sample.take(torch.arange(0, len(sample), step)[:SAMPLE])
    _, cache = model.run_with_cache(few, sites)
    kept = sae.metadata.exclusion.mask(few.tokens, few.real)
    kept = (kept if kept.any() else few.real).cpu()
    return {site: float(cache[site].cpu().flatten(2)[..., 0][kept].median()) for site in sites}
