import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mechinterp.errors import UserError
from mechinterp.patching import sweep
from mechinterp.statistics import (
    bootstrap_ratio,
    interval_scope,
    paired_difference,
    resampling_weights,
    sign_flip_threshold,
)
from scripts.coverage import coverage
from tests.families import model, pairs

ROOT = Path(__file__).parent.parent
TEMPLATES = np.repeat(np.arange(12), 5)


def clustered(rng: np.random.Generator, clusters: int, size: int, spread: float) -> np.ndarray:
    """Noise [prompt] of which a part is shared within a cluster."""
    return np.repeat(rng.normal(0, spread, clusters), size) + rng.exponential(1, clusters * size) - 1


# --- resampling


def test_weights_resample_clusters_then_prompts():
    weights = resampling_weights(60, TEMPLATES, draws=4000, seed=0)
    assert weights.shape == (4000, 60)
    by_cluster = weights.reshape(4000, 12, 5).sum(2)
    np.testing.assert_allclose(by_cluster.sum(1), 60)
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.12)
    assert (by_cluster == 0).any(), "whole clusters are left out of some draws"
    # Rescaling makes the variance of the mean of 12 cluster effects s^2 / 12, exactly.
    effects = np.random.default_rng(1).normal(size=12)
    assert (by_cluster @ effects / 60).var() == pytest.approx(effects.var(ddof=1) / 12, rel=0.1)


def test_few_clusters_are_strata():
    templates = np.repeat([7, 3, 5], [10, 4, 6])
    weights = resampling_weights(20, templates, draws=200, seed=0)
    for name, size in ((7, 10), (3, 4), (5, 6)):
        np.testing.assert_allclose(weights[:, templates == name].sum(1), size)
    assert weights.std(0).min() > 0


def test_a_stratum_of_one_prompt_does_not_freeze_the_interval():
    weights = resampling_weights(4, np.arange(4), draws=200, seed=0)
    assert weights.std(0).min() > 0


@pytest.mark.parametrize("templates", [None, np.repeat([0, 1], 16), np.repeat([0, 1], [20, 12])])
def test_variance_of_the_mean_is_unbiased(templates):
    values = np.random.default_rng(0).normal(size=32)
    means = resampling_weights(32, templates, draws=20000, seed=0) @ values / 32
    strata = [values] if templates is None else [values[templates == name] for name in (0, 1)]
    expected = sum(part.var(ddof=1) * len(part) for part in strata) / 32**2
    assert means.var() == pytest.approx(expected, rel=0.05)


def test_scope_is_said():
    assert interval_scope(None) == "over prompts"
    assert interval_scope(np.arange(64) % 8) == "over prompts and templates"
    assert interval_scope(np.arange(64) % 7) == "over prompts, conditional on these 7 templates"
    assert interval_scope(np.zeros(64, int)) == "over prompts, conditional on this template"


# --- intervals


def reference_bootstrap(numerator, denominator, weights, level):
    """The bias-corrected percentile interval of one cell, with loops and the textbook's formulas."""
    from statistics import NormalDist

    draws = []
    for row in weights:
        top = sum(w * x for w, x in zip(row, numerator, strict=True))
        bottom = sum(w * x for w, x in zip(row, denominator, strict=True))
        draws.append(top / bottom)
    estimate = sum(numerator) / sum(denominator)
    bias = NormalDist().inv_cdf(sum(draw < estimate for draw in draws) / len(draws))
    draws.sort()
    limits = []
    for tail, rounding in (((1 - level) / 2, np.floor), ((1 + level) / 2, np.ceil)):
        share = NormalDist().cdf(2 * bias + NormalDist().inv_cdf(tail))
        limits.append(draws[int(rounding(share * (len(draws) + 1))) - 1])
    return estimate, *limits


@pytest.mark.parametrize("templates", [None, TEMPLATES, TEMPLATES % 4])
def test_equals_a_plain_loop(templates):
    rng = np.random.default_rng(0)
    denominator = rng.gamma(3, size=60)
    numerator = 0.3 * denominator + rng.normal(size=(2, 3, 60))
    interval = bootstrap_ratio(numerator, denominator, templates, level=0.9, draws=500, seed=4)
    weights = resampling_weights(60, templates, draws=500, seed=4)
    for cell in np.ndindex(2, 3):
        expected = reference_bootstrap(numerator[cell], denominator, weights, level=0.9)
        found = [values[cell] for values in (interval.estimate, interval.low, interval.high)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("clusters", "size", "spread"), [(8, 8, 0.5), (12, 5, 1.0), (15, 4, 0.0), (0, 32, 0.0)])
def test_coverage_of_a_skewed_ratio(clusters, size, spread):
    rng = np.random.default_rng(2)
    templates = np.repeat(np.arange(clusters), size) if clusters else None
    hits = 0
    for trial in range(300):
        denominator = 4 + clustered(rng, clusters or size, size if clusters else 1, spread)
        numerator = 0.6 * denominator + clustered(rng, clusters or size, size if clusters else 1, spread)
        interval = bootstrap_ratio(numerator, denominator, templates, draws=500, seed=trial)
        hits += bool(interval.low <= 0.6 <= interval.high)
    assert 0.90 <= hits / 300 <= 0.98


def test_coverage_conditional_on_four_templates():
    rng = np.random.default_rng(3)
    effects = rng.normal(size=4)
    hits = 0
    for trial in range(300):
        values = np.repeat(effects, 4) + rng.normal(size=16)
        interval = bootstrap_ratio(values, None, np.repeat(np.arange(4), 4), draws=500, seed=trial)
        hits += bool(interval.low <= effects.mean() <= interval.high)
    assert 0.90 <= hits / 300 <= 0.98


def test_ratio_over_nothing_is_undefined():
    rng = np.random.default_rng(0)
    numerator = rng.normal(size=(3, 60))
    for denominator in (rng.normal(0.05, 1, 60), np.zeros(60)):
        interval = bootstrap_ratio(numerator, denominator, TEMPLATES)
        assert all(np.isnan(values).all() for values in (interval.estimate, interval.low, interval.high))
    assert np.isfinite(bootstrap_ratio(numerator, rng.normal(2, 1, 60), TEMPLATES).high).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_effects_are_exactly_zero(sign):
    denominator = sign * np.random.default_rng(0).uniform(1, 2, 60)
    interval = bootstrap_ratio(np.zeros((2, 60)), denominator, TEMPLATES)
    for values in (interval.estimate, interval.low, interval.high):
        assert (values == 0).all() and not np.signbit(values).any()


def test_a_constant_cell_has_an_interval_of_its_value():
    interval = bootstrap_ratio(np.full((1, 60), 0.1), None, np.repeat(np.arange(9), [4] * 6 + [12] * 3))
    np.testing.assert_allclose([interval.low[0], interval.high[0]], 0.1)
    assert interval.low <= interval.estimate <= interval.high


def test_one_prompt_has_an_estimate_and_no_limits():
    interval = bootstrap_ratio(np.array([[1.0], [3.0]]), np.array([2.0]))
    np.testing.assert_array_equal(interval.estimate, [0.5, 1.5])
    assert np.isnan(interval.low).all() and np.isnan(interval.high).all()


def test_shapes_precision_and_seeds():
    numerator = np.random.default_rng(0).normal(size=(700, 2, 24)).astype(np.float32)
    first = bootstrap_ratio(numerator, draws=200, seed=1)
    assert first.estimate.shape == first.low.shape == first.high.shape == (700, 2)
    assert first.low.dtype == np.float64
    np.testing.assert_array_equal(first.low, bootstrap_ratio(numerator, draws=200, seed=1).low)
    assert (first.low != bootstrap_ratio(numerator, draws=200, seed=2).low).any()
    # Cells do not depend on which others are beside them, chunk borders included.
    np.testing.assert_allclose(first.low[300:302], bootstrap_ratio(numerator[300:302], draws=200, seed=1).low)
    assert bootstrap_ratio(numerator[0, 0], draws=200).low.shape == ()


def test_paired_difference_is_tighter_than_its_parts():
    rng = np.random.default_rng(0)
    b = rng.normal(0, 5, size=60)
    a = b + 1 + rng.normal(0, 0.1, size=60)
    interval = paired_difference(a, b, TEMPLATES)
    assert 0.9 < interval.low < interval.estimate < interval.high < 1.1
    assert interval.estimate == pytest.approx((a - b).mean())


def test_bad_values_are_refused_by_name():
    bad = np.ones((2, 4))
    bad[1, 2] = np.nan
    with pytest.raises(UserError, match=r"1 of 8 values are not.*nan at prompt 2"):
        bootstrap_ratio(bad)
    with pytest.raises(UserError, match="baseline"):
        bootstrap_ratio(np.ones(3), np.array([1, np.inf, 1]))
    with pytest.raises(UserError, match="finite"):
        sign_flip_threshold(bad)
    with pytest.raises(UserError, match="0 prompts"):
        bootstrap_ratio(np.ones((2, 0)))
    with pytest.raises(UserError, match="between 0 and 1"):
        bootstrap_ratio(np.ones(3), level=95)
    with pytest.raises(UserError, match="between 0 and 1"):
        sign_flip_threshold(np.ones(8), alpha=5)


# --- the threshold


@pytest.mark.parametrize(("n", "templates"), [(8, None), (32, None), (40, np.repeat(np.arange(10), 4))])
def test_family_wise_error(n, templates):
    rng = np.random.default_rng(0)
    false = 0
    for trial in range(300):
        effects = rng.normal(size=(40, n)) * rng.uniform(0.2, 2, size=(40, 1)) + rng.normal(size=n)
        if templates is not None:
            effects += rng.normal(size=(40, 10))[:, templates]
        false += bool((np.abs(effects.mean(1)) > sign_flip_threshold(effects, templates, flips=300, seed=trial)).any())
    assert false / 300 <= 0.08


def test_a_strong_cell_passes_and_hides_no_weaker_one():
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 0.05, size=(6, 10, 32))
    effects[2, 3] += 5  # without the step down its flipped means alone reach 2
    effects[4, 7] += 0.3
    threshold = sign_flip_threshold(effects)
    passed = np.abs(effects.mean(-1)) > threshold
    assert passed[2, 3] and passed[4, 7] and passed.sum() == 2
    one_step = np.abs(rng.choice([-1, 1], size=(500, 32)) @ effects[2, 3] / 32)
    assert np.quantile(one_step, 0.95) > 0.3 > threshold


def test_zero_cells_change_nothing():
    effects = np.random.default_rng(0).normal(size=(5, 16))
    padded = np.concatenate([effects, np.zeros((3, 16))])
    assert sign_flip_threshold(padded) == sign_flip_threshold(effects)
    assert sign_flip_threshold(np.zeros((3, 16))) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_all_flips_of_few_units(seed):
    effects = np.random.default_rng(seed).normal(size=(3, 6))
    means = np.abs(effects.mean(1))
    signs = np.array(list(itertools.product([-1, 1], repeat=6)))
    passed = np.zeros(3, bool)
    while True:
        # Patterns come in pairs: 2 of 64 above it are 3%, 4 would be over 5%, so it is the third largest.
        expected = np.sort(np.abs(signs @ effects[~passed].T / 6).max(1))[-3]
        if not (newly := ~passed & (means > expected)).any():
            break
        passed |= newly
    assert passed.any() == (seed == 0), "seed 0 has a cell of one sign, and so a second step"
    assert sign_flip_threshold(effects) == pytest.approx(expected)


def test_the_smallest_p_is_honoured():
    # The smallest p of u units is 2 ** (1 - u): 1/16 at 5, 1/32 at 6, whatever the size of the effect.
    constant = np.full((2, 8), 0.1)
    assert np.isnan(sign_flip_threshold(constant[:, :4]))
    assert not (constant[:, :5].mean(1) > sign_flip_threshold(constant[:, :5])).any()
    assert (constant[:, :6].mean(1) > sign_flip_threshold(constant[:, :6])).all()


def test_clusters_flip_as_wholes():
    # One template carries the effect. Prompt by prompt that looks consistent; template by template it does not.
    effects = np.zeros((1, 80))
    effects[0, :10] = 1
    templates = np.repeat(np.arange(8), 10)
    assert effects.mean() > sign_flip_threshold(effects)
    assert effects.mean() <= sign_flip_threshold(effects, templates)
    assert sign_flip_threshold(effects, templates, seed=1) == sign_flip_threshold(effects, templates + 3, seed=1)


# --- the simulation that the documentation quotes


def test_coverage_at_64_prompts_is_nominal():
    """4,000 repetitions, fixed seed; 500 draws in place of 2,000 move the limits by a hundredth of their width."""
    assert 0.93 <= coverage(64, clustered=False, repetitions=4000, draws=500) <= 0.97


def test_the_quoted_coverage_is_what_the_script_measured():
    stored = json.loads((ROOT / "scripts" / "coverage.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert stored["repetitions"] == 4000 and len(stored["rows"]) == 6
    for row in stored["rows"]:
        assert f"| {row['n']} | {row['templates'] or 'none'} | {row['coverage']:.3f} |" in readme


def test_answers_swapped_by_coins_give_intervals_that_hold_zero():
    """The null of every effect: with answer and wrong answer swapped at random per prompt, the mean raw effect is 0."""
    of = model("llama")
    task = pairs(of, False, n=48)
    plain = sweep(of, task, "z", "END", seed=0, force=True, progress=False)
    change = (plain.data["patched"] - plain.data["base"]).values.reshape(-1, 48)
    coins = np.random.default_rng(5).random((400, 48)) < 0.5
    first = torch.tensor(coins[0])
    answers = task.answers
    a, w = answers.answer.clone(), answers.wrong.clone()
    a[first], w[first] = answers.wrong[first], answers.answer[first]
    swapped = sweep(
        of, replace(task, answers=replace(answers, answer=a, wrong=w)), "z", "END", force=True, progress=False
    )
    signs = np.where(coins, -1.0, 1.0)
    got = (swapped.data["patched"] - swapped.data["base"]).values.reshape(-1, 48)
    np.testing.assert_allclose(got, change * signs[0], atol=1e-4)  # so a swap is a change of sign, and 400 are cheap
    held = [bootstrap_ratio(change * sign, draws=500, seed=i) for i, sign in enumerate(signs)]
    share = np.mean([(interval.low <= 0) & (interval.high >= 0) for interval in held])
    assert 0.93 <= share <= 0.97
