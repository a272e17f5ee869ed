"""Cumulative, pairwise and joint knock-outs are the knock-outs of their sets, and their sums are what they say."""

import json
from itertools import combinations

import numpy as np
import pytest

from mechinterp import UserError, load
from mechinterp.ablation import Cumulative, Pairwise, cumulative, pairwise
from mechinterp.ablation.components import Components
from mechinterp.ablation.controls import random_like
from mechinterp.models.planted import circuit
from mechinterp.tasks import induction
from tests.ablation.reference import at_role, both, head, knocked, templated
from tests.families import FAMILIES, model

HEADS = [(2, 1), (0, 3), (2, 0)]


def by_hand(of, task, heads):
    """`[prompt]` both metrics with some heads set to their means by role, at END and B."""
    layers = dict.fromkeys(layer for layer, _ in heads)
    sites = [head(at, *(one for layer, one in heads if layer == at)) for at in layers]
    return [values.numpy() for values in both(task, knocked(of, task.clean, sites, at_role(task.clean, "END", "B")))]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_is_the_knock_out_of_the_heads_so_far(family):
    of = model(family)
    task = templated(of, True)
    result = cumulative(of, task, HEADS, positions="END,B", draws=2, seed=1, force=True, progress=False)
    for rank in range(4):
        for name, want in zip(("logit_diff", "prob"), by_hand(of, task, HEADS[:rank]), strict=True):
            np.testing.assert_allclose(result.data[f"after_{name}"][rank], want, atol=1e-4)
            assert float(result.data[name][rank]) == pytest.approx(want.mean(), abs=1e-4)
    assert abs(result.data["logit_diff"].diff("rank")).max() > 1e-2
    orders = random_like(of, task, Components.of(of, task, heads=HEADS), 2, seed=1, ordered=True).sets
    for draw, order in enumerate(orders):
        assert [layer for layer, _ in order.heads] == [2, 0, 2] and not set(order.heads) & set(HEADS)
        want = by_hand(of, task, order.heads[:2])[1]
        np.testing.assert_allclose(result.data["control_prob"][draw, 2], want, atol=1e-5)
    beyond = (result.data["after_prob"] - result.data["control_prob"].mean("draw")).mean("prompt")
    np.testing.assert_allclose(result.data["beyond_prob"], beyond, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interaction_is_the_whole_less_the_sum(family):
    of = model(family)
    task = templated(of, True)
    result = pairwise(of, task, HEADS, positions="END,B", draws=3, seed=1, force=True, progress=False)
    sets = [*([one] for one in HEADS), *map(list, combinations(HEADS, 2)), HEADS]
    assert list(result.data["component"].values) == ["+".join(f"L{layer}H{one}" for layer, one in of_) for of_ in sets]
    before = by_hand(of, task, [])
    for at, name in enumerate(("logit_diff", "prob")):
        changes = [by_hand(of, task, heads)[at] - before[at] for heads in sets]
        np.testing.assert_allclose(result.data[name], [change.mean() for change in changes], atol=1e-4)
        for i, heads in enumerate(sets):
            got = float(result.data[f"interaction_{name}"][i])
            if len(heads) == 1:
                assert np.isnan(got)
                continue
            alone = sum(changes[HEADS.index(one)] for one in heads)
            assert got == pytest.approx((changes[i] - alone).mean(), abs=1e-4)
            low, high = (float(result.data[f"interaction_{name}_{end}"][i]) for end in ("low", "high"))
            assert low <= got <= high
            assert bool(result.data[f"interaction_{name}_passes"][i]) == (abs(got) > result.about["threshold"][name])
    drawn = random_like(of, task, Components.of(of, task, heads=HEADS), 3, seed=1).sets[2].heads
    together = by_hand(of, task, drawn)[0] - sum(by_hand(of, task, [one])[0] - before[0] for one in drawn) - before[0]
    assert float(result.data["control_interaction_logit_diff"][2, -1]) == pytest.approx(together.mean(), abs=1e-4)


@pytest.fixture(scope="module")
def planted():
    of = load("planted-induction", device="cpu")
    return of, induction(of, n=24)


def test_two_heads_in_series_cost_together_what_each_costs_alone(planted):
    """Each of the planted heads alone takes the whole behaviour: together they take it once, not twice."""
    of, task = planted
    heads = circuit("planted-induction").heads
    result = pairwise(of, task, heads, value="zero", draws=3, progress=False)
    whole, one = (float(result.data["logit_diff"].sel(component=name)) for name in ("L0H2+L1H2", "L1H2"))
    more = result.data.sel(component="L0H2+L1H2")
    assert whole == pytest.approx(one, rel=0.05)
    assert float(more["interaction_logit_diff"]) > 0.9 * -one and bool(more["interaction_logit_diff_passes"])
    assert float(abs(result.data["control_interaction_logit_diff"][:, -1]).max()) < 0.1


def test_the_planted_ranking_loses_the_behaviour_at_once_and_random_orders_do_not(planted):
    of, task = planted
    result = cumulative(of, task, [(1, 2), (0, 2), (0, 0)], value="zero", draws=4, progress=False)
    level = result.data["logit_diff"].values
    assert (
        level[0] > 5 and (abs(level[1:]) < 0.3).all() and (result.data["beyond_logit_diff_high"].values[1:] < -4).all()
    )
    assert (result.data["control_logit_diff"].mean("prompt") > 0.95 * level[0]).all()


def test_json_tables_and_files(tmp_path):
    of = model("llama")
    task = templated(of, True)
    for kind, made in (
        (Cumulative, cumulative(of, task, HEADS, positions="END", draws=2, force=True, progress=False)),
        (Pairwise, pairwise(of, task, HEADS, positions="END", draws=2, force=True, progress=False)),
        (Cumulative, cumulative(of, task, HEADS, positions="END", draws=0, force=True, progress=False)),
        (Pairwise, pairwise(of, task, HEADS[:2], positions="END", draws=0, force=True, progress=False)),
    ):
        json.dumps(made.to_json(), allow_nan=False)
        made.save(tmp_path / "out")
        again = kind.load(tmp_path / "out")
        assert again.data.identical(made.data) and again.to_json() == made.to_json() and repr(again) == repr(made)
        assert "n=6" in made.summary() and len(made.top(2)) == 2
    ranks = cumulative(of, task, HEADS, positions="END", draws=2, force=True, progress=False)
    assert list(ranks.top()["adds"]) == ["", "L2H1", "L0H3", "L2H0"]
    assert ranks.to_json()["logit_diff"]["mean"] == pytest.approx(ranks.data["logit_diff"].values.tolist())
    sets = pairwise(of, task, HEADS, positions="END", draws=2, force=True, progress=False)
    assert abs(sets.top(4)["interaction_logit_diff"]).is_monotonic_decreasing
    assert sets.to_json()["prob"]["interaction"]["mean"][:3] == [None] * 3
    assert "3 heads together change the logit difference by" in sets.summary()


def test_bad_input():
    of = model("llama")
    task = templated(of, True)
    for run in (cumulative, pairwise):
        with pytest.raises(UserError, match="nothing to knock out"):
            run(of, task, [], force=True, progress=False)
        with pytest.raises(UserError, match="L1H2 is named 2 times"):
            run(of, task, [(1, 2), (1, 2)], force=True, progress=False)
    with pytest.raises(UserError, match="a joint knock-out needs two heads; found L1H2"):
        pairwise(of, task, [(1, 2)], force=True, progress=False)
