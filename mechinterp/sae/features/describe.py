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

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

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
from mechinterp.sae.features import arrays as feature_arrays
from mechinterp.sae.features.arrays import Arrays
from mechinterp.sae.features.contexts import LOWEST, PER_OCTAVE, Window
from mechinterp.sae.features.logits import logit_effects, refusal
from mechinterp.sae.features.reading import Collected, choose, collect, sites_of
from mechinterp.sae.splicing.splice import require_model
from mechinterp.text import Blocks

N_FEATURES = 100
N_LOGITS = 10  # tokens promoted, and as many suppressed


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
        return [self.word(one) for one in self._row(feature)[name][:n].tolist() if one >= 0]

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
        return frame.loc[:, [name for name in names if name in frame]].head(n)

    def contexts(self, feature: int, kind: str = "context") -> list[dict[str, Any]]:
        """Contexts ("context") or random examples ("example") of a feature, as plain values: peak, document, block,
        position, tokens, activations (None where excluded), the peak's place `at` among them, and an example's band."""
        row, offsets, found = self._row(feature), self.data["offset"].values, []
        names = ["peak", "document", "block", "position", *(["band"] if kind == "example" else [])]
        for i in np.flatnonzero(row[f"{kind}_document"] >= 0):
            real = row[f"{kind}_token"][i] >= 0
            one = {name: plain(row[f"{kind}_{name}"][i]) for name in names}
            one["tokens"] = [self.word(token) for token in row[f"{kind}_token"][i][real].tolist()]
            one["activations"] = plain(row[f"{kind}_activation"][i][real])
            found.append(one | {"at": int((offsets[real] < 0).sum())})
        return found

    def _row(self, feature: int) -> dict[str, np.ndarray]:
        """Every array at one feature. Raises UserError where it is not described."""
        places = np.flatnonzero(self.data["feature"].values == feature)
        if not len(places):
            raise UserError(f"feature {feature} is not among the {self.data.sizes['feature']} that are described")
        return {str(name): np.asarray(one.values[places[0]]) for name, one in self.data.data_vars.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values, one mapping a feature; undefined is None."""
        about = {name: value for name, value in self.about.items() if name != "vocabulary"}
        return {"features": [self.one(int(number)) for number in self.data["feature"].values], **plain(about)}

    def one(self, feature: int) -> dict[str, Any]:
        """All of one feature as plain values. Raises UserError where it is not described."""
        row = self._row(feature)
        value = {name: plain(array) for name, array in row.items() if array.ndim < 2}
        made = {"feature": feature} | {name: value[name] for name, array in row.items() if not array.ndim}
        tokens = zip(value["on_for"], value["on_for_share"], value["on_for_rate"], strict=True)
        made["tokens"] = [{"token": self.word(t), "share": share, "rate": rate} for t, share, rate in tokens if t >= 0]
        bins = zip(plain(self.data["bin"]), value["histogram"], strict=True)
        made["histogram"] = [[edge, count] for edge, count in bins if count]
        for name in ("promoted", "suppressed") if "promoted" in row else ():
            pairs = zip(value[name], value[f"{name}_logit"], strict=True)
            made[name] = [{"token": self.word(token), "logit": logit} for token, logit in pairs]
        pairs = zip(value["near"], value["near_cosine"], strict=True)
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
    features: Iterable[SupportsIndex] | SupportsIndex | None = None,
    *,
    n_contexts: int = 12,
    n_examples: int = 3,
    window: int = 32,
    seed: int = 0,
) -> Features:
    """Describe features from one pass over a text (reading.py has the steps, the rule of choice and the memory).

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
        UserError: numbers out of range, an autoencoder of another model, unknown sites, text that is
            excluded as a whole.
    """
    for name, value in (("n_contexts", n_contexts), ("n_examples", n_examples), ("window", window)):
        if value < 1:
            raise UserError(f"{name} must be at least 1; found {value}")
    require_model(sae, model)
    sites_of(model, sae)
    choice = choose(model, sae, text, N_FEATURES if features is None else features, seed)
    found = collect(model, sae, text, choice, n_contexts, Window.of(window), seed)
    places = found.wanted()
    numbers = choice.features[places]
    arrays = feature_arrays.sums(found.counts, places, seed) | feature_arrays.tokens(found.counts, places, seed)
    arrays["drawn"] = ("feature", (places >= choice.n_largest).numpy())
    arrays |= feature_arrays.placed(found.top, "context", places, None) | feature_arrays.examples(
        found, places, n_examples
    )
    arrays |= feature_arrays.geometry(sae, numbers)
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
) -> dict[str, Any]:
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
