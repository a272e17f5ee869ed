"""From sums by block to numbers with intervals over documents (evaluate.py)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mechinterp.results import plain
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.evaluation.sums import ARMS, OUTLIER, Places, Tally, Target
from mechinterp.statistics import MIN_CLUSTERS, bias_corrected, bootstrap_ratio, resampling_weights

DENSE = 0.1  # share of the tokens above which a feature is called dense
EDGES = np.arange(-6.0, 0.01, 0.25)  # of the histogram of densities, log10


class Numbers:
    """Ratios of sums with intervals over documents."""

    def __init__(self, documents: np.ndarray, seed: int):
        self.documents, self.seed = documents, seed
        self.rows: dict[str, tuple[float, float, float]] = {}

    def ratio(self, name: str, above: np.ndarray, below: np.ndarray, keep: Callable[[float], float] = float) -> None:
        """Σ above / Σ below over blocks; undefined where the denominator's interval holds 0."""
        found = bootstrap_ratio(above, below, self.documents, seed=self.seed)
        values = [keep(float(one)) for one in (found.estimate, found.low, found.high)]
        self.rows[name] = (values[0], min(values[1:]), max(values[1:]))

    def undefined(self, *names: str) -> None:
        """Numbers that there are none of here."""
        self.rows |= dict.fromkeys(names, (np.nan, np.nan, np.nan))


def control(tally: Tally, numbers: Numbers, variance: np.ndarray) -> int | None:
    """FVU of as many principal components as a token has features on; their number."""
    if "energy" not in tally.sums:
        numbers.undefined("fvu_control")
        return None
    energy = tally.numpy("energy")  # [d_out prompt], the first components first
    rank = min(len(energy), max(0, round(numbers.rows["l0"][0])))
    numbers.ratio("fvu_control", energy[rank:].sum(0), variance)
    return rank


def losses(tally: Tally, numbers: Numbers) -> None:
    """CE, KL and loss recovered; undefined for a crosscoder."""
    if "ce_clean" not in tally.sums:
        ces = [f"ce_{arm}" for arm in ("clean", *ARMS)]
        numbers.undefined(*ces, "ce_recovered_zero", "ce_recovered_mean", "kl", "kl_zero", "kl_mean")
        return
    n = tally.numpy("n_predicted")
    for arm in ("clean", *ARMS):
        numbers.ratio(f"ce_{arm}", tally.numpy(f"ce_{arm}"), n)
    for arm in ARMS:
        numbers.ratio("kl" if arm == "spliced" else f"kl_{arm}", tally.numpy(f"kl_{arm}"), n)
    clean, spliced, *ablated = (tally.numpy(f"ce_{arm}") for arm in ("clean", *ARMS))
    for name, of in zip(ARMS[1:], ablated, strict=True):
        if of.sum() > clean.sum():
            numbers.ratio(f"ce_recovered_{name}", of - spliced, of - clean)
        else:  # nothing is lost that could be recovered
            numbers.undefined(f"ce_recovered_{name}")


def densities(tally: Tally, numbers: Numbers, kept: np.ndarray) -> np.ndarray:
    """`[feature]` shares of kept tokens, and the fractions of features that are dead and dense."""
    block, feature, count = tally.firings
    density = np.bincount(feature, count, tally.d_sae) / kept.sum()
    units = np.unique(numbers.documents, return_inverse=True)[1]
    if units.max() + 1 < MIN_CLUSTERS:  # too few documents to leave out or draw: blocks, within these documents
        units = np.arange(len(units))
    dead = float((density == 0).mean())
    numbers.rows["dead_fraction"] = (dead, *_jackknife(dead, units[block], feature, tally.d_sae, int(units.max()) + 1))
    dense = float((density > DENSE).mean())
    numbers.rows["dense_fraction"] = (dense, *_dense_limits(numbers, block, feature, count, kept, tally.d_sae))
    return density


def _jackknife(dead: float, unit: np.ndarray, feature: np.ndarray, d_sae: int, n: int) -> tuple[float, float]:
    """Limits of the share of features that never fire: without a unit, those that fire nowhere else are dead too."""
    if n < 2:
        return np.nan, np.nan
    pairs = np.unique(unit * d_sae + feature)
    alone = np.bincount(pairs % d_sae, minlength=d_sae) == 1
    only_here = np.bincount(pairs[alone[pairs % d_sae]] // d_sae, minlength=n) / d_sae
    spread = 1.96 * np.sqrt((n - 1) / n * np.square(only_here - only_here.mean()).sum())
    return max(0.0, dead - spread), min(1.0, dead + spread)


def _dense_limits(
    numbers: Numbers, block: np.ndarray, feature: np.ndarray, count: np.ndarray, kept: np.ndarray, d_sae: int
) -> tuple[float, float]:
    """Limits of the share of features on more than `DENSE` of the tokens, from resampled documents."""
    if len(kept) < 2:
        return np.nan, np.nan
    # A feature that is dense in no block is dense in no draw of blocks.
    candidates = np.unique(feature[count > DENSE * kept[block]])
    counts = np.zeros((len(kept), len(candidates)))
    here = np.isin(feature, candidates)
    counts[block[here], np.searchsorted(candidates, feature[here])] = count[here]
    weights = resampling_weights(len(kept), numbers.documents, seed=numbers.seed)
    n_dense = np.zeros(len(weights))
    for part in np.array_split(np.arange(len(candidates)), max(1, len(candidates) // 512)):
        n_dense += (weights @ counts[:, part] > DENSE * (weights @ kept)[:, None]).sum(1)
    estimate = (counts.sum(0) > DENSE * kept.sum()).sum() / d_sae
    low, high = bias_corrected(n_dense[None] / d_sae, np.array([estimate]), 0.95)
    return float(low[0]), float(high[0])


def histogram(density: np.ndarray) -> dict[str, Any]:
    """Features by log10 of their density; those below the first edge are counted in the first bin."""
    on = np.log10(density[density > 0])
    counts = np.histogram(on.clip(EDGES[0], EDGES[-1]), EDGES)[0]
    return {"log10_edges": EDGES.tolist(), "features": counts.tolist(), "dead": int((density == 0).sum())}


def outliers(sae: SparseAutoencoder, tally: Tally, target: Target, kept: np.ndarray) -> dict[str, Any]:
    """Tokens of far more than the median norm, which the numbers include, and FVU without them."""
    inside, variance = (tally.numpy(name).sum() for name in ("error_inside", "variance_inside"))
    return {
        "multiple": sae.metadata.exclusion.outlier or OUTLIER,
        "median_norm": target.median,
        "n": int(tally.numpy("outliers").sum()),
        "share": float(tally.numpy("outliers").sum() / kept.sum()),
        "fvu_without": float(inside / variance) if variance > 0 else None,
    }


def by_site(places: Places, tally: Tally, documents: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """A crosscoder's reconstruction, site by site."""
    made, kept = [], tally.numpy("n_tokens")
    for number, site in enumerate(places.writes):
        numbers = Numbers(documents, seed)
        error, variance = (tally.numpy(name)[number] for name in ("error", "variance"))
        numbers.ratio("mse", error, kept)
        numbers.ratio("fvu", error, variance)
        numbers.ratio("explained_variance", error, variance, lambda fvu: 1 - fvu)
        for name in ("cosine", "relative_norm"):
            numbers.ratio(name, tally.numpy(f"{name}_by_site")[number], kept)
        values = {name: row[0] for name, row in numbers.rows.items()}
        made.append({"site": site.hook_name, **values, "ci": {name: row[1:] for name, row in numbers.rows.items()}})
    return plain(made)
