"""Intervals over prompts and a family-wise threshold over the cells of a grid.

1. *Intervals.* Prompts are resampled with numerator and denominator together, so that a ratio of means keeps the
   correlation of its two halves. Prompts that share a template are alike, so templates are resampled first and prompts
   within them second (Davison & Hinkley 1997, section 3.8); with fewer than `MIN_CLUSTERS` templates there is too
   little to resample, prompts are resampled within each template, and the interval is conditional on these templates.
   A unit drawn from m others is drawn m - 1 times and weighted by m / (m - 1): the plain bootstrap's variance is too
   small by (m - 1) / m, which matters for m = 4 prompts a template (Rao & Wu 1988).
   Limits are bias-corrected percentiles (BC; Efron 1981, 1987).
2. *Threshold.* If a cell does nothing, the sign of its effect on a prompt is a coin toss. Flipping the signs of whole
   prompts (whole templates where there are enough) keeps the dependence between cells; the largest |mean| over all
   cells gives a bound that all null cells together pass with probability alpha at most. Cells above it leave and the
   bound is taken again from those that remain, so that a strong cell hides no weaker one (Romano & Wolf 2005).
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64, Int, Num

from mechinterp.errors import UserError

MIN_CLUSTERS = 8
MIN_UNITS = 5
# Cells handled at once: 512 cells x 2000 draws in float64 are 8 MB.
CHUNK = 512


@dataclass(frozen=True)
class Interval:
    """An estimate and the limits of its interval, all of the same shape; nan where undefined (null in JSON)."""

    estimate: Float64[np.ndarray, "*cell"]
    low: Float64[np.ndarray, "*cell"]
    high: Float64[np.ndarray, "*cell"]


def interval_scope(clusters: Int[np.ndarray, " prompt"] | None) -> str:
    """What an interval generalises over, in words that complete "95% interval ...".

    `clusters` [prompt] are template numbers, None where prompts have no templates.
    """
    if clusters is None:
        return "over prompts"
    count = len(np.unique(clusters))
    if count >= MIN_CLUSTERS:
        return "over prompts and templates"
    return f"over prompts, conditional on {'this template' if count == 1 else f'these {count} templates'}"


def resampling_weights(
    n: int, clusters: Int[np.ndarray, " prompt"] | None = None, draws: int = 2000, seed: int = 0
) -> Float64[np.ndarray, "draw {n}"]:
    """Bootstrap weights [draw prompt]: how often, rescaled, each draw holds each prompt; a row has the mean 1 over
    prompts (in expectation, where templates of unequal size are resampled).

    `clusters` [prompt] are template numbers: resampled first if there are at least `MIN_CLUSTERS` of them, strata
    otherwise. A template of one prompt has no spread of its own: with such a stratum all prompts are resampled as one.
    n = 1 gives weights of 1. Rao & Wu 1988; Davison & Hinkley 1997.
    """
    rng = np.random.default_rng(seed)
    names, member = np.unique(np.zeros(n, int) if clusters is None else clusters, return_inverse=True)
    sizes = np.bincount(member).tolist()
    weights = np.ones((draws, n))
    if len(names) < MIN_CLUSTERS:
        if min(sizes) < 2:
            return _draw_rescaled(rng, n, draws)
        for cluster, size in enumerate(sizes):
            weights[:, member == cluster] = _draw_rescaled(rng, size, draws)
        return weights
    copies = rng.multinomial(len(names) - 1, np.full(len(names), 1 / len(names)), size=draws)
    for cluster, size in enumerate(sizes):
        drawn = rng.multinomial(copies[:, cluster] * size, np.full(size, 1 / size))
        weights[:, member == cluster] = drawn * (len(names) / (len(names) - 1))
    return weights


def _draw_rescaled(rng: np.random.Generator, size: int, draws: int) -> Float64[np.ndarray, "{draws} {size}"]:
    """`size` - 1 of `size` units with replacement, weighted up to a sum of `size`: an unbiased variance of the mean."""
    if size == 1:
        return np.ones((draws, 1))
    return rng.multinomial(size - 1, np.full(size, 1 / size), size=draws) * (size / (size - 1))


def bootstrap_ratio(
    numerator: Num[np.ndarray, "*cell prompt"],
    denominator: Num[np.ndarray, " prompt"] | None = None,
    clusters: Int[np.ndarray, " prompt"] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `numerator` over prompts, divided by the mean of `denominator` if there is one, with a BC interval.

    numerator [... prompt], denominator [prompt], clusters [prompt] (template numbers) -> Interval [...].
    All three arrays are nan where the denominator's own interval holds 0: a ratio over nothing has no value. One prompt
    gives an estimate with limits of nan. The resampled prompts depend on (n, clusters, draws, seed) alone, so that the
    intervals of two calls may be compared.

    Raises UserError for no prompts, a value that is not finite, or a level outside (0, 1). Efron 1981, 1987.
    """
    if not 0 < level < 1:
        raise UserError(f"an interval's level must lie between 0 and 1, not {level}")
    cells = _cells(numerator, "effects")
    n = cells.shape[1]
    base = np.ones(n) if denominator is None else _cells(denominator, "a baseline difference")[0]
    weights = resampling_weights(n, clusters, draws, seed)
    base_draws = weights @ base
    # Weights of unequal templates do not sum to n, so even a plain mean is a ratio: over the sum of the weights.
    if denominator is not None and _holds_zero(base_draws / weights.sum(1), base.mean(), level):
        undefined = np.full(numerator.shape[:-1], np.nan)
        return Interval(undefined, undefined.copy(), undefined.copy())
    estimate = cells.mean(1) / base.mean() + 0.0  # + 0.0 turns -0.0 into 0.0
    limits = np.full((2, len(cells)), np.nan)
    for start in range(0, len(cells) if n > 1 else 0, CHUNK):
        part = slice(start, start + CHUNK)
        with np.errstate(divide="ignore", invalid="ignore"):  # a rare draw may have a denominator of exactly 0
            ratios = (cells[part] @ weights.T) / base_draws + 0.0
        limits[:, part] = bias_corrected(ratios, estimate[part], level)
    shape = numerator.shape[:-1]
    return Interval(estimate.reshape(shape), limits[0].reshape(shape), limits[1].reshape(shape))


def paired_difference(
    a: Num[np.ndarray, "*cell prompt"],
    b: Num[np.ndarray, "*cell prompt"],
    clusters: Int[np.ndarray, " prompt"] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of a - b over the same prompts, in their unit, with a BC interval.

    a, b [... prompt], clusters [prompt] -> Interval [...]. Raises as `bootstrap_ratio` does.
    """
    return bootstrap_ratio(np.subtract(a, b, dtype=np.float64), None, clusters, level, draws, seed)


def sign_flip_threshold(
    effects: Num[np.ndarray, "*cell prompt"],
    clusters: Int[np.ndarray, " prompt"] | None = None,
    alpha: float = 0.05,
    flips: int = 2000,
    seed: int = 0,
) -> float:
    """Threshold for |mean effect|, in the unit of `effects`, that any null cell exceeds with chance `alpha` at most.

    effects [... prompt]; clusters [prompt] are flipped as wholes if there are at least `MIN_CLUSTERS`. A cell passes
    if its |mean| is strictly above the threshold. Null: a cell's effects are symmetric around 0 on each unit.
    All sign patterns are used if they number `flips` at most, else `flips` random ones, the observed one included.
    The smallest p that u units can give is 2 ** (1 - u) (and 1 / flips): under `MIN_UNITS` units the threshold is nan,
    and with 5 it is one that no cell can pass at alpha = .05 (p = .0625); 6 units can.

    Raises UserError for no prompts, a value that is not finite, or alpha outside (0, 1). Romano & Wolf 2005.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha must lie between 0 and 1, not {alpha}")
    cells = _cells(effects, "effects")
    n = cells.shape[1]
    if clusters is not None and len(np.unique(clusters)) >= MIN_CLUSTERS:
        member = np.unique(clusters, return_inverse=True)[1]
        cells = cells @ np.eye(member.max() + 1)[member]
    if cells.shape[1] < MIN_UNITS:
        return float("nan")
    cells = cells / n
    signs = _sign_patterns(cells.shape[1], flips, seed)
    rank = int(alpha * len(signs))
    observed = np.abs(cells.sum(1))
    threshold = 0.0
    while len(cells):
        largest = np.zeros(len(signs))
        for start in range(0, len(cells), CHUNK):
            np.maximum(largest, np.abs(signs @ cells[start : start + CHUNK].T).max(1), out=largest)
        # At most `rank` of the patterns lie above it. The slack keeps rounding from breaking a tie with the observed.
        threshold = float(np.sort(largest)[-1 - rank]) * (1 + 1e-9)
        stay = observed <= threshold
        if stay.all():
            break
        cells, observed = cells[stay], observed[stay]
    return threshold


def _sign_patterns(units: int, flips: int, seed: int) -> Float64[np.ndarray, "flip {units}"]:
    """Signs [flip unit] of ±1, the observed pattern first; all of them if that takes `flips` at most."""
    if 2**units <= flips:
        # A pattern and its opposite have the same |mean|, so the first sign may stay.
        bits = np.arange(2 ** (units - 1))[:, None] >> np.arange(units) & 1
        return 1.0 - 2.0 * np.roll(bits, 1, axis=1)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, units))
    signs[0] = 1
    return signs


def _cells(values: Num[np.ndarray, "*cell prompt"], what: str) -> Float64[np.ndarray, "cells prompt"]:
    """All leading axes as one, in float64. Raises UserError for no prompts or a value that is not finite."""
    n = values.shape[-1]
    if n == 0:
        raise UserError(f"{what} over 0 prompts were asked for; at least 1 is needed for a mean, 2 for an interval")
    cells = np.asarray(values, dtype=np.float64).reshape(-1, n)
    bad = np.argwhere(~np.isfinite(cells))
    if len(bad):
        value = cells[tuple(bad[0])]
        raise UserError(
            f"{what} must be finite, but {len(bad)} of {cells.size} values are not (the first: {value} at prompt "
            f"{bad[0][1]}); look for nan or inf in the model's weights, activations or metric"
        )
    return cells


def _holds_zero(draws: Float64[np.ndarray, " draw"], estimate: float, level: float) -> bool:
    low, high = bias_corrected(draws[None], np.array([estimate], dtype=np.float64), level)
    return bool(low[0] <= 0 <= high[0])


def bias_corrected(
    draws: Float64[np.ndarray, "cells draw"], estimate: Float64[np.ndarray, " cells"], level: float
) -> Float64[np.ndarray, "2 cells"]:
    """BC percentile limits: percentiles shifted by twice the normal score of the share of draws below the estimate."""
    count = draws.shape[1]
    normal = NormalDist()
    below = ((draws < estimate[:, None]).mean(1) + (draws <= estimate[:, None]).mean(1)) / 2  # a tie counts half
    bias = np.array([normal.inv_cdf(share) for share in below.clip(0.5 / count, 1 - 0.5 / count)])
    tail = normal.inv_cdf((1 - level) / 2)
    ordered = np.sort(draws, axis=1)
    low_share, high_share = ([normal.cdf(2 * shift + score) for shift in bias] for score in (tail, -tail))
    low_rank = (np.floor(np.array(low_share) * (count + 1)).astype(int) - 1).clip(0, count - 1)
    high_rank = (np.ceil(np.array(high_share) * (count + 1)).astype(int) - 1).clip(0, count - 1)
    low, high = (np.take_along_axis(ordered, rank[:, None], 1)[:, 0] for rank in (low_rank, high_rank))
    # Rounding in the draws must not push the limits of a constant cell past its estimate.
    return np.stack([np.minimum(low, estimate), np.maximum(high, estimate)])
