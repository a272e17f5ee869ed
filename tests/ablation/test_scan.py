"""Every cell of a scan is that head's (or MLP's) knock-out, on every family, and the fast path is the plain one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp import UserError, load
from mechinterp.ablation import ScanResult, scan
from mechinterp.hooked.interventions import Apply
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Levers
from mechinterp.models.planted import circuit
from mechinterp.statistics import bootstrap_ratio, sign_flip_threshold
from mechinterp.tasks import induction
from tests.ablation.reference import at_role, both, everywhere, head, knocked, templated
from tests.checks import checks_off
from tests.families import FAMILIES, full_logits, model, pairs

PADDED = pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])


def quiet(of, task, *args, **kwargs):
    return scan(of, task, *args, **{"force": True, "progress": False, **kwargs})


def is_brute_force(of, task, result, where, value, heads):
    """Raise AssertionError unless the cells of some heads (or all MLPs) are what hooks give."""
    largest = 0.0
    sites = (
        [head(*one) for one in heads]
        if result.about["site"] == "z"
        else [Site("mlp_out", at) for at in range(of.n_layers)]
    )
    for site in sites:
        at = {"layer": site.layer} | ({} if site.heads is None else {"head": site.heads[0]})
        want = both(task, knocked(of, task.clean, [site], where, value))
        for name, values, atol in zip(("logit_diff", "prob"), want, (1e-4, 1e-5), strict=True):
            got = result.data[f"after_{name}"].sel(at).values
            np.testing.assert_allclose(got, values, atol=atol, rtol=1e-4)
            change = float(result.data[name].sel(at))
            assert change == pytest.approx(float((got - result.data[f"before_{name}"]).mean()), abs=1e-9)
        largest = max(largest, abs(float(result.data["logit_diff"].sel(at))))
    assert largest > 1e-2, "a comparison of nothing with nothing"


@pytest.mark.parametrize("family", FAMILIES)
@PADDED
def test_heads_and_mlps_are_brute_force(family, padded):
    of = model(family)
    task = templated(of, padded)
    heads = [(0, 1), (0, 3), (1, 0), (2, 2)]
    is_brute_force(of, task, quiet(of, task, positions="END"), at_role(task.clean, "END"), "mean", heads)
    is_brute_force(of, task, quiet(of, task, value="zero"), everywhere(task.clean), "zero", heads)
    is_brute_force(of, task, quiet(of, task, "mlp_out", "END"), at_role(task.clean, "END"), "mean", [])
    before = both(task, full_logits(of, task.clean, []))
    for name, values in zip(("logit_diff", "prob"), before, strict=True):
        np.testing.assert_allclose(quiet(of, task, "mlp_out").data[f"before_{name}"], values, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_the_fast_path_is_the_plain_one(family):
    """Without levers each call is a full run; a call of one row, and columns alone, give the same numbers."""
    of = model(family)
    task = templated(of, True)
    fast = quiet(of, task, positions="B").data
    rows, columns = (
        quiet(of, task, positions="B", max_tokens=1).data,
        quiet(of, task, positions="B", metrics=["logit_diff"]),
    )
    levers, of.__dict__["levers"] = of.levers, Levers(False, False, False)
    try:
        slow = quiet(of, task, positions="B").data
    finally:
        of.__dict__["levers"] = levers
    for name in ("after_logit_diff", "after_prob"):
        np.testing.assert_allclose(fast[name], slow[name], atol=1e-4)
        np.testing.assert_allclose(fast[name], rows[name], atol=1e-4)
    np.testing.assert_allclose(columns.data["after_logit_diff"], fast["after_logit_diff"], atol=1e-4)
    assert columns.metrics == ["logit_diff"] and "prob" not in columns.data


def test_a_plain_function_in_force_sees_every_prompt():
    """Its value depends on the whole batch, so that no cell may run a part of it."""
    of = model("llama")
    task = templated(of, True)
    mix = lambda x, site: 0.5 * x + x.mean(0, keepdim=True)  # noqa: E731
    with of.intervene(Apply(Site("mlp_out", 1), mix)):
        result = quiet(of, task, value="zero", positions="END")

    def put(x, hook):
        x = x.clone()
        for i, j in at_role(task.clean, "END"):
            x[i, j, 3] = 0
        return x

    hooks = [(Site("z", 2).hook_name, put), (Site("mlp_out", 1).hook_name, lambda x, hook: mix(x, None))]
    want = both(task, full_logits(of, task.clean, hooks))
    np.testing.assert_allclose(result.data["after_logit_diff"].sel(layer=2, head=3), want[0], atol=1e-4)
    assert result.about["in_force"] == ["Apply at mlp_out layer 1"]


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_exactly_the_planted_heads_are_found(value):
    of = load("planted-induction", device="cpu")
    task = induction(of, n=24)
    positions = "all" if value == "zero" else "END,B1"
    result = scan(of, task, positions=positions, value=value, progress=False)
    found = {
        (int(layer), int(one)) for layer, one in zip(*result.data["logit_diff_passes"].values.nonzero(), strict=True)
    }
    assert found == set(circuit("planted-induction").heads)
    assert set(result.ranking()[:2]) == found and set(result.top(2)["cell"]) == {"L0H2", "L1H2"}
    assert (result.data["prob_high"].values[result.data["prob_passes"].values] < 0).all()


def test_intervals_and_threshold_are_over_prompts():
    of = model("gpt2")
    task = templated(of, True, n=9)
    result = quiet(of, task, positions="END", seed=5)
    change = (result.data["after_prob"] - result.data["before_prob"]).values
    want = bootstrap_ratio(change, None, task.clean.template.numpy(), seed=5)
    np.testing.assert_array_equal(result.data["prob_low"], want.low)
    threshold = sign_flip_threshold(change, task.clean.template.numpy(), seed=5)
    assert result.about["threshold"]["prob"] == threshold
    np.testing.assert_array_equal(result.data["prob_passes"], np.abs(change.mean(-1)) > threshold)


def test_json_table_file_and_chosen_layers(tmp_path):
    of = model("llama")
    task = templated(of, True)
    result = quiet(of, task, positions="END", layers=[2, 0])
    made = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert made["dims"] == ["layer", "head"] and made["coords"] == {"layer": [2, 0], "head": [0, 1, 2, 3]}
    every = quiet(of, task, positions="END").data
    np.testing.assert_allclose(made["prob"]["change"], every["prob"].sel(layer=[2, 0]), atol=1e-6)
    assert made["before"]["prob"] == pytest.approx(float(result.data["before_prob"].mean()))
    result.save(tmp_path / "scan")
    again = ScanResult.load(tmp_path / "scan")
    assert again.data.identical(result.data) and repr(again) == repr(result) and again.to_json() == result.to_json()
    top = result.top(3)
    assert list(top["cell"]) == [f"L{row['layer']}H{row['head']}" for row in top.to_dict("records")]
    assert abs(top["logit_diff"]).is_monotonic_decreasing
    assert quiet(of, task, "mlp_out").top(1)["cell"].iloc[0].startswith("m")
    one = quiet(of, task.take(torch.tensor([0])), positions="END", value="zero")
    json.dumps(one.to_json(), allow_nan=False)
    assert "[" not in one.summary() and not one.data["prob_passes"].any()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"site": "q"}, "unknown site 'q' to scan; valid: 'z'"),
        ({"metrics": ["kl"]}, "unknown metrics"),
        ({"metrics": []}, "unknown metrics"),
        ({"layers": [3]}, "layers 0 … 2"),
        ({"layers": []}, "no layers were given"),
        ({"positions": "IO"}, "unknown positions 'IO'"),
        ({"value": "median"}, "unknown value 'median'"),
    ],
    ids=str,
)
def test_what_cannot_be_scanned(change, says):
    of = model("gpt2")
    with checks_off(), pytest.raises(UserError, match=says):
        quiet(of, pairs(of, False), **change)
    attention_only = load("planted-induction", device="cpu")
    with pytest.raises(UserError, match="has no site mlp_out"):
        scan(attention_only, induction(attention_only, n=4), "mlp_out", progress=False)
    task = pairs(of, False)
    better = both(task, full_logits(of, task.clean, []))[0].mean() > 0
    turned = replace(task.answers, answer=task.answers.wrong, wrong=task.answers.answer) if better else task.answers
    with pytest.raises(UserError, match="the model does not do this task"):
        scan(of, replace(task, answers=turned), progress=False)
