"""The arrays of a description of features, made from what a pass over text has collected (describe.py names them)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.features.contexts import PER_OCTAVE, Contexts, Counts
from mechinterp.sae.features.reading import Collected
from mechinterp.statistics import bootstrap_ratio

BANDS = 4
N_TOKENS = 5  # of each feature's most frequent tokens
N_NEIGHBOURS = 6
CLUSTERS = 1000  # documents, or groups of them, that are resampled
NULL_DRAWS, NULL_LARGEST = 4, 4096

# Name -> dimensions, values: as xarray takes them.
Arrays = dict[str, tuple[Any, np.ndarray]]


def sums(counts: Counts, places: Tensor, seed: int) -> Arrays:
    """Density with its interval, means, maxima, the histogram."""
    on, kept = counts.on[places], counts.kept
    n_on = on.sum(1)
    group = torch.arange(len(kept)) * min(CLUSTERS, len(kept)) // len(kept)
    grouped = torch.zeros(len(places), int(group.max()) + 1, dtype=torch.long).index_add_(1, group, on)
    size = torch.zeros(grouped.shape[1], dtype=torch.long).index_add_(0, group, kept)
    interval = bootstrap_ratio(grouped.numpy(), size.numpy(), seed=seed)
    return {
        "density": ("feature", (n_on / kept.sum()).double().numpy()),
        "density_low": ("feature", interval.low),
        "density_high": ("feature", interval.high),
        "n_on": ("feature", n_on.numpy()),
        "n_documents": ("feature", (on > 0).sum(1).numpy()),
        "mean": ("feature", (counts.total[places] / n_on).numpy()),
        "largest": ("feature", torch.where(n_on > 0, counts.largest[places], torch.nan).numpy()),
        "histogram": (("feature", "bin"), counts.histogram[places].numpy()),
    }


def tokens(counts: Counts, places: Tensor, seed: int) -> Arrays:
    """Tokens by their share of the activation, and the largest share of a random feature."""
    token = np.full((len(places), N_TOKENS), -1)
    share, rate = np.full(token.shape, np.nan), np.full(token.shape, np.nan)
    null, rng = np.full(len(places), np.nan), np.random.default_rng(seed)
    cumulative = counts.occurrences.double().cumsum(0).numpy()
    for row, place in enumerate(places.tolist()):
        ids, mass, n_on = (one.numpy() for one in counts.by_token(place))
        n = min(N_TOKENS, len(ids))
        if n:
            token[row, :n], share[row, :n] = ids[:n], mass[:n] / mass.sum()
            rate[row, :n] = n_on[:n] / counts.occurrences[ids[:n]].numpy()
            null[row] = _largest_share(int(n_on.sum()), counts.histogram[place].numpy(), cumulative, rng)
    return {
        "on_for": (("feature", "token"), token),
        "on_for_share": (("feature", "token"), share),
        "on_for_rate": (("feature", "token"), rate),
        "random_token_share": ("feature", null),
    }


def _largest_share(n: int, histogram: np.ndarray, cumulative: np.ndarray, rng: np.random.Generator) -> float:
    """The most frequent token's share of the activation of a feature with such activations at random positions.

    The mean over some draws. A feature that is on very often is drawn as if it were on `NULL_LARGEST` times: the share
    is then the token's frequency already.
    """
    n, shares = min(n, NULL_LARGEST), []
    for _ in range(NULL_DRAWS):
        tokens = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
        bins = rng.choice(len(histogram), size=n, p=histogram / histogram.sum())
        values = 2.0 ** (bins / PER_OCTAVE)
        shares.append(np.bincount(np.unique(tokens, return_inverse=True)[1], values).max() / values.sum())
    return float(np.mean(shares))


def placed(found: Contexts, kind: str, places: Tensor, order: Tensor | None) -> Arrays:
    """Contexts of the features at `places`, in an order `[feature n]` (−1: none) or as they are."""
    made: Arrays = {}
    for name in ("peak", "document", "block", "position", "token", "activation"):
        field, score = found.fields[name][places], found.fields["score"][places]
        empty = score == -torch.inf
        if order is not None:
            rows = torch.arange(len(field))[:, None]
            field, empty = field[rows, order], (order < 0) | empty[rows, order]
        blank = torch.nan if field.is_floating_point() else -1
        field = field.masked_fill(empty[..., None] if field.ndim == 3 else empty, blank)
        made[f"{kind}_{name}"] = (("feature", kind, "offset")[: field.ndim], field.numpy())
    return made


def examples(found: Collected, places: Tensor, n: int) -> Arrays:
    """n random contexts of each quarter of the activations, the largest quarter first, by falling activation in it."""
    score, peak = (found.draw.fields[name][places] for name in ("score", "peak"))
    order = torch.full((len(places), BANDS * n), -1)
    for row in range(len(places)):
        there = (score[row] > -torch.inf).nonzero().flatten()
        ranked = there[peak[row, there].sort(stable=True).indices]
        for band in range(BANDS):
            inside = ranked[len(ranked) * band // BANDS : len(ranked) * (band + 1) // BANDS]
            chosen = inside[score[row, inside].sort(descending=True, stable=True).indices[:n]]
            chosen = chosen[peak[row, chosen].sort(descending=True, stable=True).indices]
            start = (BANDS - 1 - band) * n
            order[row, start : start + len(chosen)] = chosen
    band = np.arange(BANDS)[::-1].repeat(n)
    made = placed(found.draw, "example", places, order)
    return made | {"example_band": (("feature", "example"), np.tile(band, (len(places), 1)))}


@torch.no_grad()
def geometry(sae: SparseAutoencoder, numbers: Tensor) -> Arrays:
    """Nearest decoder directions, encoder–decoder cosine, norms."""
    rows = sae.W_dec.float()
    norms = rows.norm(dim=1).cpu()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    mine = unit[numbers.to(unit.device)]
    cosine = mine @ unit.T
    cosine[torch.arange(len(numbers)), numbers.to(unit.device)] = -torch.inf
    best = cosine.topk(min(N_NEIGHBOURS, len(rows) - 1), dim=1)
    same = not sae.transcodes and (not sae.metadata.writes or sae.metadata.writes == sae.metadata.reads)
    encoder = torch.full((len(numbers),), torch.nan)
    if same:
        encoder = torch.nn.functional.cosine_similarity(sae.W_enc.float()[numbers.to(unit.device)], mine).cpu()
    return {
        "encoder_cosine": ("feature", encoder.numpy()),
        "decoder_norm": ("feature", norms[numbers].numpy()),
        "near": (("feature", "neighbour"), best.indices.cpu().numpy()),
        "near_cosine": (("feature", "neighbour"), best.values.cpu().numpy()),
    }
