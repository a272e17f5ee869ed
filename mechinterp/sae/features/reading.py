"""The one pass over text that descriptions of features are made from.

1. *Choice.* Features are given, or chosen: half are those of largest total activation on a pilot (every so many blocks,
   64 at most), half a random draw of all others. Of a draw four times as large, the first that are on at all are kept:
   a uniform draw of the features that are on in this text. How many were never on is counted.
2. *Pass.* The model runs to the deepest site that the autoencoder reads; excluded positions are dropped before
   encoding, so that they are never on; the sparse codes of the chosen features alone go on.
3. *Collectors* (contexts.py) take their top contexts, a random draw, and counts.

Memory, besides the model and one batch (2²⁵ pre-activations at most): for each chosen feature (five for every two that
were asked for, where they are chosen) contexts × window × 12 bytes, documents × 8 bytes, and 24 bytes for every
different token that it is on at. It does not grow with the number of features of the autoencoder.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked import forward
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.sae.autoencoder import Codes, SparseAutoencoder
from mechinterp.sae.features.contexts import Batch, Counts, Draw, Top, Window
from mechinterp.text import Blocks

PILOT = 64  # blocks, at most
OVERSAMPLE = 4  # features drawn for each that is wanted, for some are never on
N_DRAWN = 64  # positions drawn of each feature; their ranks are its quantiles
BATCH_TOKENS, BATCH_CODES = 4096, 2**25


@dataclass(frozen=True, eq=False)
class Choice:
    """Features that a pass looks at.

    Attributes:
        features: `[feature]` numbers; those of largest total first, then the draw in its order.
        n_largest, n_drawn: of both kinds that are wanted in the end; `n_largest` is all of them where they were given.
        rule: in words.
    """

    features: Tensor
    n_largest: int
    n_drawn: int
    rule: str


@dataclass(frozen=True, eq=False)
class Collected:
    """What a pass has found, for all features of its choice.

    Attributes:
        choice: which.
        top, draw, counts: what was collected.
        l0: features on at a kept position, the mean over all of the dictionary.
        n_excluded: positions that were left out, padding not counted.
    """

    choice: Choice
    top: Top
    draw: Draw
    counts: Counts
    l0: float
    n_excluded: int

    def wanted(self) -> Tensor:
        """`[feature]` places in the choice: the largest, and the first of the draw that are on."""
        places = torch.arange(len(self.choice.features))
        drawn = places[self.choice.n_largest :]
        on = self.counts.on.sum(1)[drawn] > 0
        return torch.cat([places[: self.choice.n_largest], drawn[on][: self.choice.n_drawn]])

    def never_on(self) -> tuple[int, int]:
        """Of the random draw: how many are never on, and how many there are."""
        drawn = self.counts.on[self.choice.n_largest :].sum(1)
        return int((drawn == 0).sum()), len(drawn)


def choose(
    model: HookedModel,
    sae: SparseAutoencoder,
    text: Blocks,
    features: Iterable[SupportsIndex] | SupportsIndex,
    seed: int,
) -> Choice:
    """The features given, or so many chosen.

    Raises:
        UserError: numbers beyond the autoencoder or repeated, or none.
    """
    d_sae = sae.config.d_sae
    if isinstance(features, Iterable):
        features = [operator.index(one) for one in features]
        wrong = [one for one in features if not 0 <= one < d_sae]
        if wrong or not features or len(set(features)) < len(features):
            found = wrong[0] if wrong else "none" if not features else "some twice"
            raise UserError(f"features must be different numbers 0 … {d_sae - 1}; found {found}")
        return Choice(torch.tensor(features), len(features), 0, "given")
    features = operator.index(features)
    if features < 1:
        raise UserError(f"at least one feature must be described; found {features}")
    n_drawn = min(features, d_sae) // 2
    n_largest = min(features, d_sae) - n_drawn
    step = -(-len(text) // PILOT)
    pilot = text.take(torch.arange(0, len(text), step))
    total = torch.zeros(d_sae, dtype=torch.float64)
    for codes, _ in encoded(model, sae, pilot):
        values, index, _ = codes.sparse()
        total.index_add_(0, index.cpu(), values.double().cpu())
    order = total.sort(descending=True, stable=True).indices
    largest, others = order[:n_largest], order[n_largest:]
    shuffled = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
    rule = (
        f"{n_largest} of largest total activation on {len(pilot)} blocks, spread over the text, and a random draw of "
        f"{n_drawn} of the others that are on in it"
    )
    return Choice(torch.cat([largest, shuffled[: OVERSAMPLE * n_drawn]]), n_largest, n_drawn, rule)


def collect(
    model: HookedModel, sae: SparseAutoencoder, text: Blocks, choice: Choice, n_contexts: int, window: Window, seed: int
) -> Collected:
    """Go through the text once."""
    n, places = len(choice.features), torch.full((sae.config.d_sae,), -1)
    places[choice.features] = torch.arange(n)
    documents, document = text.document.unique(return_inverse=True)
    top, draw = Top(n, n_contexts, window), Draw(n, N_DRAWN, window, seed)
    counts = Counts(n, len(documents), model.d_vocab)
    on, first, n_excluded = 0, 0, 0
    for codes, kept in encoded(model, sae, text):
        rows = slice(first, first + len(kept))
        prompts = text.prompts.take(torch.arange(rows.start, rows.stop))
        values = _chosen(codes, kept, places, n)
        batch = Batch(values, prompts.tokens.cpu(), kept, prompts.real.cpu(), text.document[rows].cpu(), first)
        for collector in (top, draw):
            collector.add(batch)
        counts.add(batch, document[rows])
        on += int(codes.l0())
        n_excluded += int((batch.real & ~batch.kept).sum())
        first = rows.stop
    n_kept = int(counts.kept.sum())
    if not n_kept:
        raise UserError(f"every position of the {len(text)} blocks is excluded by {sae.metadata.exclusion}")
    return Collected(choice, top, draw, counts, on / n_kept, n_excluded)


def encoded(model: HookedModel, sae: SparseAutoencoder, text: Blocks) -> Iterator[tuple[Codes, Tensor]]:
    """Codes of the kept positions, some blocks at a time, and which these are, `[prompt pos]` bool: the codes' rows.

    Raises:
        UserError: the sites that are read are unknown or of another width.
    """
    sites = sites_of(model, sae)
    size = max(1, min(BATCH_TOKENS, BATCH_CODES // sae.config.d_sae) // text.prompts.n_pos)
    rule, largest_norm = sae.metadata.exclusion, None
    for start in range(0, len(text), size):
        prompts = text.prompts.take(torch.arange(start, min(start + size, len(text))))
        x = read(model, prompts, sites)
        kept = rule.mask(prompts.tokens, prompts.real).to(x.device)
        if rule.outlier is not None and kept.any():
            norms = x.float().norm(dim=-1)
            if largest_norm is None:
                largest_norm = rule.outlier * float(norms[kept].median())  # of the first batch that has any
            kept &= norms <= largest_norm
        with torch.no_grad():  # not around the yield: what a caller does in between is its own
            codes = sae.encode(x[kept].to(sae.W_enc))
        yield codes, kept.cpu()


def sites_of(model: HookedModel, sae: SparseAutoencoder) -> list[Site]:
    """The sites that an autoencoder reads, as they are in this model. Raises UserError where they do not fit."""
    if not sae.metadata.reads:
        raise UserError("this autoencoder does not say which site it reads: give it metadata with `reads`")
    sites = [model.resolve(Site.from_hook(name)) for name in sae.metadata.reads]
    width = sum(model.width(site) * (max(1, model.axis_size(site)) if site.kind.head_axis else 1) for site in sites)
    if width != sae.config.d_in:
        names = ", ".join(map(str, sites))
        raise UserError(f"the autoencoder reads {sae.config.d_in} numbers; {names} of {model.info.name}: {width}")
    return sites


def read(model: HookedModel, prompts: Prompts, sites: Sequence[Site]) -> Tensor:
    """`[batch pos d_in]` activations of sites side by side, heads joined; the model stops behind the deepest."""
    kept: dict[str, Tensor] = {}
    prompts = prompts.to(model.device)
    deepest = max((site.layer if site.layer is not None else model.n_layers) for site in sites)
    with forward.Plan.of(model, model.in_force, sites, kept).installed(Rows.all(prompts)):
        if deepest + 1 < model.n_layers and prompts.mask is None:
            model.bridge(prompts.tokens, use_cache=False, stop_at_layer=deepest + 1)
        else:
            forward.call_bridge(model, prompts)
    return torch.cat([kept[site.hook_name].flatten(2) for site in sites], -1)


def _chosen(codes: Codes, kept: Tensor, places: Tensor, n: int) -> Tensor:
    """`[feature prompt pos]` of the chosen features, 0 where they are off and where a position was not encoded."""
    values, index, rows = (one.cpu() for one in codes.sparse())
    place = places[index]
    mine = place >= 0
    made = torch.zeros(n, kept.numel())
    at = kept.flatten().nonzero().flatten()[rows[mine]]
    made[place[mine], at] = values[mine].float()
    return made.unflatten(1, tuple(kept.shape))
