"""What the features of an autoencoder are on for, and what they write: the data behind a feature dashboard.

For every feature: the contexts of largest activation (one a document), contexts drawn at random from each quarter of
its activations (an unbiased look: the top alone makes any feature look clean), density with an interval over
documents, a histogram, direct logit effects, its nearest neighbours in the decoder.

Three things for a sceptic, each beside its null:

- *Token features.* The share of the activation that falls on the feature's one most frequent token, and the share of
  that token's occurrences that it is on at, beside the share that a random feature of the same density would have.
- *Document features.* In how many documents it is on, of how many.
- *Logits.* The largest logit of a random direction of the same length.

Bricken et al. 2023, "Towards Monosemanticity"; the quantiles after Bills et al. 2023.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance
from mechinterp.hooked.model import HookedModel
from mechinterp.results import Result, plain
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.feature_contexts import LOWEST, PER_OCTAVE, Contexts, Counts, Window
from mechinterp.sae.feature_logits import logit_effects, refusal
from mechinterp.sae.feature_pass import Collected, choose, collect, sites_of
from mechinterp.statistics import bootstrap_ratio
from mechinterp.text import Blocks

N_FEATURES = 100
BANDS = 4
N_TOKENS = 5  # of each feature's most frequent tokens
N_LOGITS, N_NEIGHBOURS = 10, 6
CLUSTERS = 1000  # documents, or groups of them, that are resampled
NULL_DRAWS, NULL_LARGEST = 4, 4096


@dataclass(frozen=True, repr=False)
class Features(Result):
    """Features described. `data` holds

    - over `feature` (labels: numbers in the autoencoder): `density` (share of kept tokens, with `density_low`,
      `density_high`, 95% over documents), `n_on`, `n_documents`, `mean` (where it is on), `largest`, `encoder_cosine`,
      `decoder_norm`, `random_token_share`, `random_logit`, `drawn` (by chance rather than for its total);
    - `on_for`, `on_for_share`, `on_for_rate` `[feature token]`: tokens by share of the activation, and the share of
      their occurrences that it is on at;
    - `context_…` `[feature context]` and `example_…` `[feature example]`: `peak`, `document`, `block`, `position`, and
      `token`, `activation` over `offset` as well (token −1: beyond the block; NaN at a token: excluded); −1 at a
      `document` is an empty place. `example_band` is the quarter of the activations, 0 the lowest, 3 the largest;
    - `histogram` `[feature bin]`, tokens by activation; a bin is [edge, edge · 2^¼), its edge is its label;
    - `promoted`, `promoted_logit`, `suppressed`, `suppressed_logit` `[feature rank]`: at the feature's mean activation,
      less the mean over the vocabulary; where there is a direct effect (else `about["no_logits"]` says why not);
    - `near`, `near_cosine` `[feature neighbour]`: features whose decoder rows are nearest, by cosine.

    `about["vocabulary"]` is the text of every token id.
    """

    def word(self, token: int) -> str:
        """The text of a token."""
        return self.about["vocabulary"].get(str(int(token)), "")

    def words(self, name: str, feature: int, n: int = 3) -> list[str]:
        """The first tokens of an array over `feature` and one more axis, as text."""
        return [self.word(one) for one in self.data[name].sel(feature=feature).values[:n].tolist() if one >= 0]

    def to_frame(self) -> pd.DataFrame:
        """One row a feature."""
        frame = self.data[[str(name) for name, one in self.data.data_vars.items() if one.dims == ("feature",)]]
        made = frame.to_dataframe().reset_index()
        made["tokens"] = [" ".join(map(repr, self.words("on_for", one))) for one in made["feature"].tolist()]
        if "promoted" in self.data:
            made["promotes"] = [" ".join(map(repr, self.words("promoted", one))) for one in made["feature"].tolist()]
        return made

    def top(self, n: int = 10) -> pd.DataFrame:
        """The first features, in short."""
        names = ["feature", "density", "density_low", "density_high", "mean", "largest", "tokens", "promotes"]
        frame = self.to_frame()
        return frame[[name for name in names if name in frame]].head(n)

    def contexts(self, feature: int, kind: str = "context") -> list[dict[str, Any]]:
        """Contexts ("context") or random examples ("example") of a feature, as plain values."""
        one = self.data.sel(feature=feature)
        found = []
        for i in range(one.sizes[kind]):
            if int(one[f"{kind}_document"][i]) < 0:
                continue
            tokens = one[f"{kind}_token"].values[i]
            real = tokens >= 0
            row = {
                name: one[f"{kind}_{name}"].values[i].item() for name in ("peak", "document", "block", "position")
            } | {
                "tokens": [self.word(token) for token in tokens[real].tolist()],
                "activations": plain(one[f"{kind}_activation"].values[i][real]),
                "at": int((one["offset"].values[real] < 0).sum()),
            }
            found.append(row | ({"band": int(one["example_band"][i])} if kind == "example" else {}))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, one mapping a feature; undefined is None."""
        about = {name: value for name, value in self.about.items() if name != "vocabulary"}
        return {"features": [self.one(int(number)) for number in self.data["feature"].values], **plain(about)}

    def one(self, feature: int) -> dict[str, Any]:
        """All of one feature as plain values. Raises UserError where it is not described."""
        if feature not in self.data["feature"].values:
            raise UserError(f"feature {feature} is not among the {self.data.sizes['feature']} that are described")
        row = self.data.sel(feature=feature)
        made: dict[str, Any] = {"feature": feature}
        made |= {str(name): plain(value) for name, value in row.data_vars.items() if not value.dims}
        made["tokens"] = [
            {"token": self.word(token), "share": share, "rate": rate}
            for token, share, rate in zip(
                *(plain(row[name]) for name in ("on_for", "on_for_share", "on_for_rate")), strict=True
            )
            if token >= 0
        ]
        counts, edges = plain(row["histogram"]), plain(row["bin"])
        made["histogram"] = [[edge, count] for edge, count in zip(edges, counts, strict=True) if count]
        for name in ("promoted", "suppressed") if "promoted" in row else ():
            pairs = zip(plain(row[name]), plain(row[f"{name}_logit"]), strict=True)
            made[name] = [{"token": self.word(token), "logit": logit} for token, logit in pairs]
        pairs = zip(plain(row["near"]), plain(row["near_cosine"]), strict=True)
        made["neighbours"] = [{"feature": number, "cosine": cosine} for number, cosine in pairs]
        return made | {"contexts": self.contexts(feature), "examples": self.contexts(feature, "example")}

    def write_html(self, path: str | Path, command: str = "") -> Path:
        """Write the dashboard, one file that opens offline; `command` is shown as what makes it again."""
        from mechinterp.reporting.features import write_features  # drawing lies above

        return write_features(self, path, command)

    def summary(self) -> str:
        """One line: what was looked at."""
        about = self.about
        return (
            f"{self.data.sizes['feature']} of {about['d_sae']} features of a {about['architecture']} autoencoder at "
            f"{', '.join(about['reads'])} of {about['model']}: L0 {about['l0']:.1f} over {about['n_tokens']} tokens of "
            f"{about['n_documents']} documents ({about['text']}); median density "
            f"{float(self.data['density'].median()):.2g}"
        )


def describe(
    model: HookedModel,
    sae: SparseAutoencoder,
    text: Blocks,
    features: Sequence[int] | int | None = None,
    *,
    n_contexts: int = 12,
    n_examples: int = 3,
    window: int = 32,
    seed: int = 0,
) -> Features:
    """Describe features from one pass over a text (feature_pass.py has the steps, the rule of choice and the memory).

    Args:
        model: the hooked model; interventions in force act.
        sae: an autoencoder whose metadata names the sites that it reads.
        text: blocks; what it was not trained on is fairer.
        features: their numbers, or how many to choose; `N_FEATURES` by default.
        n_contexts: of the largest activation, each from a document of its own.
        n_examples: of each quarter of the activations, at random.
        window: tokens of a context, three quarters of them before the peak.
        seed: of the draws and the intervals.

    Raises:
        UserError: numbers out of range, sites that the model does not have, text that is excluded as a whole.
    """
    for name, value in (("n_contexts", n_contexts), ("n_examples", n_examples), ("window", window)):
        if value < 1:
            raise UserError(f"{name} must be at least 1; found {value}")
    sites_of(model, sae)
    choice = choose(model, sae, text, N_FEATURES if features is None else features, seed)
    found = collect(model, sae, text, choice, n_contexts, Window.of(window), seed)
    places = found.wanted()
    numbers = choice.features[places]
    arrays = _sums(found.counts, places, seed) | _tokens(found.counts, places, seed)
    arrays["drawn"] = ("feature", (places >= choice.n_largest).numpy())
    arrays |= _placed(found.top, "context", places, None) | _examples(found, places, n_examples)
    arrays |= _geometry(sae, numbers)
    no_logits = refusal(sae)
    if not no_logits:
        arrays |= _logits(model, sae, numbers, torch.from_numpy(arrays["mean"][1]), text, seed)
    coords = {
        "feature": numbers.numpy(),
        "offset": found.top.window.offsets.numpy(),
        "bin": 2.0 ** (np.arange(LOWEST, LOWEST + found.counts.histogram.shape[1]) / PER_OCTAVE),
    }
    data = xr.Dataset(arrays, coords=coords)
    return Features(data, _about(model, sae, text, found, seed, no_logits) | {"vocabulary": _vocabulary(model, data)})


Arrays = dict[str, tuple[Any, np.ndarray]]


def _sums(counts: Counts, places: Tensor, seed: int) -> Arrays:
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


def _tokens(counts: Counts, places: Tensor, seed: int) -> Arrays:
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


def _placed(found: Contexts, kind: str, places: Tensor, order: Tensor | None) -> Arrays:
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


def _examples(found: Collected, places: Tensor, n: int) -> Arrays:
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
    made = _placed(found.draw, "example", places, order)
    return made | {"example_band": (("feature", "example"), np.tile(band, (len(places), 1)))}


@torch.no_grad()
def _geometry(sae: SparseAutoencoder, numbers: Tensor) -> Arrays:
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


@torch.no_grad()
def _logits(
    model: HookedModel, sae: SparseAutoencoder, numbers: Tensor, strength: Tensor, text: Blocks, seed: int
) -> Arrays:
    """Direct logit effects at each feature's mean activation; per unit of activation for one that is never on."""
    at = torch.where(strength.isfinite(), strength, 1.0)
    words = model.d_vocab if model.tokenizer is None else len(model.tokenizer)
    made = logit_effects(model, sae, numbers, at, text.prompts, min(N_LOGITS, words), seed)
    fields = {"promoted": made.promoted, "promoted_logit": made.up, "suppressed": made.suppressed}
    fields |= {"suppressed_logit": made.down}
    by_rank: Arrays = {name: (("feature", "rank"), field.numpy()) for name, field in fields.items()}
    return by_rank | {"random_logit": ("feature", made.random.numpy())}


def _vocabulary(model: HookedModel, data: xr.Dataset) -> dict[str, str]:
    """The text of every token id that occurs in a result."""
    names = ("on_for", "context_token", "example_token", "promoted", "suppressed")
    ids = np.unique(np.concatenate([data[name].values.ravel() for name in names if name in data]))
    known = ids[ids >= 0].tolist()
    return dict(zip(map(str, known), model.token_strings(known), strict=True))


def _about(
    model: HookedModel, sae: SparseAutoencoder, text: Blocks, found: Collected, seed: int, no_logits: str
) -> Mapping[str, Any]:
    never, drawn = found.never_on()
    config, metadata = sae.config, sae.metadata
    return provenance(model) | {
        "architecture": config.architecture,
        "d_sae": config.d_sae,
        "d_in": config.d_in,
        "k": config.k,
        "reads": list(metadata.reads),
        "writes": list(metadata.writes or metadata.reads),
        "trained_for": metadata.model,
        "trained_on": metadata.text,
        "l0": found.l0,
        "n_tokens": int(found.counts.kept.sum()),
        "n_excluded": found.n_excluded,
        "exclusion": metadata.exclusion.to_json(),
        "n_blocks": len(text),
        "block_length": text.prompts.n_pos,
        "n_documents": len(found.counts.kept),
        "text": text.source,
        "choice": found.choice.rule,
        "never_on": never,
        "n_drawn_at_random": drawn,
        "no_logits": no_logits,
        "soft_cap": float(getattr(model.bridge.cfg, "output_logits_soft_cap", 0) or 0),
        "seed": seed,
    }
