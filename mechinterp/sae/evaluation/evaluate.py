"""How good a sparse autoencoder is, on text that it was not trained on: alone, and inside the model.

1. *Mean.* The model runs up to the site once, for the mean of what is to be reconstructed over all kept tokens (those
   that are not excluded), and its principal components.
2. *Reconstruction.* At every kept token: L0, squared error, variance about that mean, cosine, norms; how often each
   feature fires. For a transcoder all are of the site that it predicts; a crosscoder has them by site, too.
3. *Inside the model.* At the kept tokens the site becomes the reconstruction, zero, or the mean, and what comes after
   is run again from there (hooked/suffix.py). Cross-entropy of every token of a block but the first, and
   KL(clean ‖ spliced) of the same predictions: the same ones in every arm, also where the position itself is excluded.
   Loss recovered is (CE_ablated − CE_spliced) / (CE_ablated − CE_clean), undefined where ablation costs nothing.
4. *Control.* The first principal components of this very text, as many as a token has features on: what as many
   numbers a token do without a dictionary. They are fitted to what they are measured on, which favours them.
5. *Intervals* resample documents, numerator and denominator together; the mean and the components are held fixed. How
   many features never fire has a jackknife over documents instead, for a document drawn twice hides another's features
   (Heltshe & Forrester 1983, on species in plots); its limits are rather too wide than too narrow (Efron & Stein 1981).

The mean is that of all the text, the best constant there is: mean ablation is as strong as can be, and so recovered
loss as low. Names of SAEBench's core metrics (Karvonen et al. 2025) stand beside ours where they are the same thing.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance
from mechinterp.hooked import suffix
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.results import Result, plain
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.evaluation.intervals import Numbers, by_site, control, densities, histogram, losses, outliers
from mechinterp.sae.evaluation.sums import Places, Tally, Target, reconstruct, run_arms
from mechinterp.statistics import interval_scope
from mechinterp.text import Blocks

# SAEBench's name -> ours, where it is the same thing. Not among them: its explained_variance is a mean over tokens of
# ratios, its mse is divided by the number of tokens twice, its KL counts the last position, too.
SAEBENCH = {
    "l0": "l0",
    "l1": "l1",
    "ce_loss_without_sae": "ce_clean",
    "freq_over_10_percent": "dense_fraction",
}
# The same where what is read is what is reconstructed,
SAEBENCH_SAME_SITE = {
    "cossim": "cosine",
    "l2_ratio": "relative_norm",
    "l2_norm_in": "norm",
    "l2_norm_out": "norm_reconstructed",
}
# and where no position is excluded, for SAEBench replaces all of them.
SAEBENCH_EVERYWHERE = {
    "ce_loss_with_sae": "ce_spliced",
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "ce_recovered_zero",
}
HEAD = (
    "l0", "fvu", "explained_variance", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_recovered_zero",
    "ce_recovered_mean", "kl", "dead_fraction",
)  # fmt: skip
MORE = (
    "dense_fraction", "cosine", "relative_norm", "mse", "l1", "norm", "norm_reconstructed", "kl_zero", "kl_mean",
    "fvu_control",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class SAEEvaluation(Result):
    """An autoencoder on held-out text.

    `data` holds over `row` (names of numbers, `HEAD` and `MORE`): `value`, `low`, `high` (95%); over `feature`:
    `density`, the share of kept tokens that it fires on; over `prompt` (a block of text): `n_tokens` (kept),
    `n_predicted`, and sums over these, `sum_…`, of what the numbers are ratios of.

    Units: `mse` is ‖y − ŷ‖² of a token, summed over the width; losses and KL are nats a predicted token;
    `relative_norm` the mean of ‖ŷ‖ / ‖y‖.
    """

    def to_frame(self) -> pd.DataFrame:
        """One row a number, with its interval."""
        return self.data[["value", "low", "high"]].to_dataframe().reset_index().rename(columns={"row": "name"})

    def top(self, n: int = 10) -> pd.DataFrame:
        """The first `n` numbers."""
        return self.to_frame().head(n)

    def __getitem__(self, name: str) -> float:
        """A number by its name. Raises UserError if there is none."""
        if name not in self.data["row"].values:
            raise UserError(
                f"no number {name!r} in an evaluation; valid: {', '.join(map(str, self.data['row'].values))}"
            )
        return float(self.data["value"].sel(row=name))

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        value = {name: plain(self[name]) for name in (*HEAD, *MORE)}
        limits = self.data[["low", "high"]]
        return {
            **{name: value[name] for name in HEAD},
            "n_tokens": int(self.data["n_tokens"].sum()),
            "ci": {name: plain([float(limits[end].sel(row=name)) for end in ("low", "high")]) for name in value},
            **{name: value[name] for name in MORE},
            "saebench": plain({theirs: self[ours] for theirs, ours in self.about["saebench"].items()} | self._alive()),
            **{name: plain(self.about[name]) for name in ("outliers", "sites", "control", "density_histogram")},
            "about": plain({name: value for name, value in self.about.items() if name not in ("sites", "outliers")}),
        }

    def _alive(self) -> dict[str, float]:
        """SAEBench's numbers of densities that are not among ours."""
        density = self.data["density"].values
        return {"frac_alive": float((density > 0).mean()), "freq_over_1_percent": float((density > 0.01).mean())}

    def summary(self) -> str:
        """One line: L0, FVU, loss recovered, dead features, with intervals."""

        def show(name: str, places: int = 3) -> str:
            at = self.data.sel(row=name)
            if not np.isfinite(float(at["value"])):
                return "undefined"
            limits = [float(at[end]) for end in ("low", "high")]
            interval = f" [{limits[0]:.{places}f}, {limits[1]:.{places}f}]" if np.isfinite(limits).all() else ""
            return f"{float(at['value']):.{places}f}{interval}"

        inside = ""
        if np.isfinite(self["ce_spliced"]):
            inside = (
                f", CE recovered {show('ce_recovered_zero')} of zero and {show('ce_recovered_mean')} of mean ablation"
            )
        control = (
            f" (as many principal components {self['fvu_control']:.3f})" if np.isfinite(self["fvu_control"]) else ""
        )
        return (
            f"{self.about['architecture']} at {self.about['writes']}: L0 {show('l0', 1)}, FVU {show('fvu')}{control}"
            f"{inside}, {self['dead_fraction']:.1%} of {self.data.sizes['feature']} features on nowhere "
            f"(n={int(self.data['n_tokens'].sum()):,} tokens of {self.about['n_documents']} documents, "
            f"95% {self.about['scope']})"
        )


def evaluate(
    model: HookedModel, sae: SparseAutoencoder, text: Blocks, *, seed: int = 0, batch: int | None = None
) -> SAEEvaluation:
    """Measure an autoencoder on text, alone and spliced into the model.

    Args:
        model: that it was trained on; interventions in force stay in force in every arm.
        sae: autoencoder, transcoder or crosscoder (which is not run inside the model: its CE and KL are undefined).
        text: blocks that it was not trained on.
        seed: of the intervals.
        batch: blocks that are run at once; by default from the free memory.

    Raises:
        UserError: an autoencoder of another model or width; a text in which every token is excluded, or of one token a
            block.
    """
    sae = _single(sae)
    places = Places.of(model, sae)
    n, n_pos = text.prompts.tokens.shape
    if n_pos < 2:
        raise UserError(f"blocks of {n_pos} token have nothing to predict; at least 2 are needed")
    if batch is not None and batch < 1:
        raise UserError(f"batch must be at least 1 block; found {batch}")
    index = list(chunks(model, n, n_pos, True, True) if batch is None else torch.arange(n).split(batch))
    prompts = text.prompts.to(model.device)
    with torch.no_grad():
        target = Target.of(model, prompts, places, index)
        tally = Tally(n, sae.config.d_sae)
        for part in index:
            recording = suffix.record(model, prompts, places.sites, part, places.levers(model))
            rows = Rows(prompts, recording.index)
            reconstruct(sae, places, target, recording, rows, tally)
            if places.spliceable:
                run_arms(places, target, recording, rows, tally)
    return _evaluated(model, sae, text, places, target, tally, seed)


def _single(sae: SparseAutoencoder) -> SparseAutoencoder:
    """In float32, in which narrower weights are exact and the numbers do not depend on how it was saved."""
    return sae if sae.W_dec.dtype == torch.float32 else copy.deepcopy(sae).float()


def _evaluated(
    model: HookedModel,
    sae: SparseAutoencoder,
    text: Blocks,
    places: Places,
    target: Target,
    tally: Tally,
    seed: int,
) -> SAEEvaluation:
    """All numbers from the sums."""
    documents = text.document.numpy()
    numbers = Numbers(documents, seed)
    kept = tally.numpy("n_tokens")
    for name in ("l0", "l1", "cosine", "relative_norm", "norm", "norm_reconstructed"):
        numbers.ratio(name, tally.numpy(name), kept)
    error, variance = (tally.numpy(name).sum(0) for name in ("error", "variance"))
    numbers.ratio("mse", error, kept)
    numbers.ratio("fvu", error, variance)
    numbers.ratio("explained_variance", error, variance, lambda fvu: 1 - fvu)
    rank = control(tally, numbers, variance)
    losses(tally, numbers)
    density = densities(tally, numbers, kept)
    arrays: dict[str, Any] = {"density": ("feature", density)}
    names = (*HEAD, *MORE)
    for place, column in enumerate(("value", "low", "high")):
        arrays[column] = ("row", np.array([numbers.rows[name][place] for name in names]))
    for name, values in tally.sums.items():
        if values.ndim == 1:
            arrays[name if name.startswith("n_") else f"sum_{name}"] = ("prompt", values.numpy())
    arrays |= {"sum_error": ("prompt", error), "sum_variance": ("prompt", variance)}
    about = _about(model, sae, text, places, seed) | {
        "outliers": outliers(sae, tally, target, kept),
        "sites": by_site(places, tally, documents, seed) if not places.spliceable else [],
        "control": {"what": "principal components of this text, as many as L0 rounded", "rank": rank},
        "density_histogram": histogram(density),
        "saebench": _saebench(places, bool((kept == text.prompts.n_pos).all())),
    }
    return SAEEvaluation(xr.Dataset(arrays, coords={"row": list(names)}), about)


def _saebench(places: Places, everywhere: bool) -> dict[str, str]:
    """SAEBench's name -> ours, of the numbers that are the same thing here."""
    made = dict(SAEBENCH)
    if places.spliceable and places.reads == places.writes:
        made |= SAEBENCH_SAME_SITE
    return made | (SAEBENCH_EVERYWHERE if everywhere and places.spliceable else {})


def _about(model: HookedModel, sae: SparseAutoencoder, text: Blocks, places: Places, seed: int) -> dict[str, Any]:
    """Where the numbers come from."""
    documents = text.document.numpy()
    return provenance(model) | {
        "architecture": sae.config.architecture,
        "d_sae": sae.config.d_sae,
        "k": sae.config.k,
        "reads": ", ".join(map(str, places.reads)),
        "writes": ", ".join(map(str, places.writes)),
        "sae": sae.metadata.to_json(),
        "text": text.source,
        "block_length": text.prompts.n_pos,
        "n_blocks": len(text),
        "n_documents": len(np.unique(documents)),
        "scope": interval_scope(documents).replace("prompts", "blocks").replace("template", "document"),
        "positions": "kept tokens: reconstruction and what is replaced; losses: every token of a block but the first",
        "mean": "of all kept tokens of this text",
        "seed": seed,
    }
