"""The terms add up to the change on every family, and each term is what brute force gives."""

import json
from dataclasses import replace
from functools import cache
from importlib import import_module

import numpy as np
import pytest
import torch

from mechinterp import UserError, load
from mechinterp.ablation import SelfRepair, pairwise, self_repair
from mechinterp.statistics import bootstrap_ratio
from mechinterp.tasks import induction
from tests.ablation.reference import at_role, both, head, knocked, mean_at, seen, templated
from tests.families import FAMILIES, full_logits, model

PADDED = pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
HEADS = [(0, 2), (1, 1), (1, 3)]


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """Each family with its weights folded and centred."""
    from tests.test_identities import saved

    @cache
    def of(family):
        return load(saved(family, tmp_path_factory.mktemp(family)), process=True, device="cpu")

    return of


def quiet(of, task, *args, **kwargs):
    return self_repair(of, task, *args, **{"positions": "END", "draws": 0, "force": True, **kwargs})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("process", [False, True], ids=["raw", "processed"])
@PADDED
def test_the_terms_add_up_to_the_change(family, process, padded, processed):
    of = processed(family) if process else model(family)
    task = templated(of, padded)
    result = quiet(of, task, HEADS)
    sites = [head(0, 2), head(1, 1, 3)]
    clean, _ = both(task, full_logits(of, task.clean, []))
    after, _ = both(task, knocked(of, task.clean, sites, at_role(task.clean, "END")))
    want = (after - clean).numpy()
    assert abs(want).max() > 1e-1
    np.testing.assert_allclose(result.data["before"], clean, atol=1e-4)
    np.testing.assert_allclose(result.data["term"].sum("component"), want, atol=1e-4)
    cap = result.data["term"].sel(component="soft-cap")
    assert (abs(cap).max() > 1e-3) if family == "gemma2" else (cap == 0).all()
    assert abs(result.data["term"].sel(component="constants")).max() < 1e-5


class Behind:
    """A run's parts through the final norm with a scale that is given, of GPT-2 (LayerNorm) or Llama (RMSNorm)."""

    def __init__(self, of, task, hooks):
        self.of, self.task, self.kept = of, task, {}
        names = ["ln_final.hook_scale", f"blocks.{of.n_layers - 1}.hook_resid_post"]
        names += [f"blocks.{at}.{site}" for at in range(of.n_layers) for site in ("attn.hook_z", "hook_mlp_out")]
        keep = [(name, lambda x, hook, name=name: self.kept.__setitem__(name, x.detach().clone())) for name in names]
        full_logits(of, task.clean, [*hooks, *keep])
        self.scale, self.final = (self.kept[name][:, -1].double() for name in names[:2])

    def read(self, write, scale):
        """`[prompt]` what `write` `[prompt d_model]` adds to the logit difference."""
        norm, columns = self.of.bridge.ln_final.original_component, self.of.bridge.unembed.original_component.weight
        write = write.double()
        write = write - write.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else write
        answers = self.task.answers
        direction = columns[answers.answer[:, 0, 0]] - columns[answers.wrong[:, 0, 0]]
        return (write / scale * norm.weight.double() * direction.double()).sum(-1)

    def head(self, layer, one, scale):
        return self.read(
            self.kept[f"blocks.{layer}.attn.hook_z"][:, -1, one] @ self.of.bridge.blocks[layer].attn.W_O[one], scale
        )

    def mlp(self, layer, scale):
        return self.read(self.kept[f"blocks.{layer}.hook_mlp_out"][:, -1], scale)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@PADDED
def test_each_term_is_what_the_parts_of_two_runs_say(family, padded):
    of = model(family)
    task = templated(of, padded)
    result = quiet(of, task, HEADS)
    prompts = task.clean
    hooks = []
    for layer in (0, 1):
        acts = seen(of, prompts, f"blocks.{layer}.attn.hook_z")
        means = torch.stack([mean_at(acts, prompts, prompts, "role", i, prompts.n_pos - 1) for i in range(len(task))])

        def put(x, hook, layer=layer, means=means):
            x = x.clone()
            for at, one in HEADS:
                if at == layer:
                    x[:, -1, one] = means[:, one]
            return x

        hooks.append((f"blocks.{layer}.attn.hook_z", put))
    clean, after = Behind(of, task, []), Behind(of, task, hooks)
    every = [(layer, one) for layer in range(3) for one in range(4)]
    change = {one: after.head(*one, clean.scale) - clean.head(*one, clean.scale) for one in every}
    negative = [one for one in every if clean.head(*one, clean.scale).mean() < 0 and one not in HEADS]
    rest = [one for one in every if one not in HEADS and one not in negative]
    assert negative and rest
    want = {
        "ablated": sum(change[one] for one in HEADS),
        "new support": sum(change[one] for one in rest),
        "negative heads": sum(change[one] for one in negative),
        "mlps": sum(after.mlp(at, clean.scale) - clean.mlp(at, clean.scale) for at in range(3)),
        "norm scale": after.read(after.final, after.scale) - after.read(after.final, clean.scale),
    }
    for name, values in want.items():
        np.testing.assert_allclose(result.data["term"].sel(component=name), values, atol=1e-4, err_msg=name)
        assert name == "new support" or abs(values).max() > 1e-2, f"{name}: a comparison of nothing with nothing"
    assert result.about["negative"] == [f"L{layer}H{one}" for layer, one in negative]
    for (layer, one), values in change.items():
        np.testing.assert_allclose(result.data["heads_by_prompt"].sel(layer=layer, head=one), values, atol=1e-4)


def test_the_soft_cap_is_what_the_cap_makes_of_it():
    of = model("gemma2")
    task = templated(of, True)
    result = quiet(of, task, HEADS)
    runs = [
        full_logits(of, task.clean, []),
        knocked(of, task.clean, [head(0, 2), head(1, 1, 3)], at_role(task.clean, "END")),
    ]
    cap = float(of.bridge.cfg.output_logits_soft_cap)
    gaps = [both(task, logits)[0] - both(task, cap * torch.atanh(logits.double() / cap))[0] for logits in runs]
    np.testing.assert_allclose(result.data["term"].sel(component="soft-cap"), gaps[1] - gaps[0], atol=2e-4)


def test_layers_before_the_knock_out_do_not_change_and_other_runs_are_as_they_were():
    of = model("llama")
    task = templated(of, True)
    before = of(task.clean)
    result = quiet(of, task, [(2, 1)])
    assert abs(result.data["heads_by_prompt"].sel(layer=[0, 1])).max() == 0
    assert abs(result.data["mlps_by_prompt"].sel(layer=[0, 1])).max() == 0
    assert abs(result.data["mlps_by_prompt"].sel(layer=2)).max() > 0
    assert torch.equal(of(task.clean), before) and not of.in_force


def test_negative_heads_may_be_given():
    of = model("gpt2")
    task = templated(of, True)
    default, none = quiet(of, task, HEADS), quiet(of, task, HEADS, negative=[])
    both_terms = default.data["term"].sel(component=["new support", "negative heads"]).sum("component")
    assert (none.data["term"].sel(component="negative heads") == 0).all() and none.about["negative"] == []
    np.testing.assert_allclose(none.data["term"].sel(component="new support"), both_terms, atol=1e-9)
    one = quiet(of, task, HEADS, negative=[(2, 3), (0, 2)])
    assert one.about["negative"] == ["L2H3"] and one.about["negative_chosen"] == "given", "an ablated head is ablated"
    np.testing.assert_allclose(
        one.data["term"].sel(component="negative heads"), one.data["heads_by_prompt"].sel(layer=2, head=3)
    )


def test_the_share_is_a_ratio_of_means_and_undefined_over_nothing():
    of = model("gpt2")
    task = templated(of, True)
    for found in (quiet(of, task, [one], value="zero") for one in [(0, 0), (1, 1), (2, 0), (2, 2)]):
        term = found.data["term"].values
        want = bootstrap_ratio(term[1:].sum(0), -term[0], task.clean.template.numpy())
        share = found.about["repaired"]
        if np.isfinite(want.estimate):
            assert share["estimate"] == float(want.estimate) and share["low"] <= share["estimate"] <= share["high"]
            assert f"{share['estimate']:.0%}" in found.summary()
        else:
            assert share["estimate"] is None and "undefined" in found.summary()


def test_a_last_head_without_a_norm_behind_it_leaves_nothing_to_repair():
    of = load("planted-induction", device="cpu")
    result = self_repair(of, induction(of, n=16), [(1, 2)], value="zero", positions="END", draws=2)
    change = result.data["after"] - result.data["before"]
    np.testing.assert_allclose(result.data["term"].sel(component="ablated"), change, atol=1e-4)
    assert abs(result.about["repaired"]["estimate"]) < 1e-3
    assert abs(result.data["control"]).max() < 1e-3


def test_the_control_is_the_same_for_random_heads():
    of = model("llama")
    task = templated(of, True)
    result = quiet(of, task, [(1, 2)], draws=3)
    terms = [quiet(of, task, [(1, one)]).data["effect"].values for one in (0, 1, 3)]
    got, want = (sorted(map(tuple, np.round(one, 4))) for one in (result.data["control"].values, np.stack(terms)))
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert result.about["control_sets"].startswith("3 random sets")


def test_super_additivity_is_the_interaction_of_all_heads():
    of = model("llama")
    task = templated(of, True)
    result = quiet(of, task, HEADS, seed=4)
    whole = pairwise(of, task, HEADS, positions="END", draws=0, seed=4, force=True, progress=False).data.isel(
        component=-1
    )
    for name in ("logit_diff", "prob"):
        found = result.about["super_additivity"][name]
        assert found["joint"] - found["alone"] == pytest.approx(found["estimate"], abs=1e-9)
        for key, end in (("estimate", ""), ("low", "_low"), ("high", "_high")):
            assert found[key] == pytest.approx(float(whole[f"interaction_{name}{end}"]), abs=1e-5)
    assert quiet(of, task, [(1, 2)]).about["super_additivity"] is None


def test_json_tables_and_file(tmp_path):
    of = model("llama")
    task = templated(of, True)
    result = quiet(of, task, HEADS, draws=2)
    made = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert sum(made["terms"].values()) == pytest.approx(made["after"] - made["before"], abs=1e-4)
    assert all(low <= made["terms"][name] <= high for name, (low, high) in made["ci"].items())
    assert {len(values) for values in made["control"].values()} == {2}
    result.save(tmp_path / "out")
    again = SelfRepair.load(tmp_path / "out")
    assert again.data.identical(result.data) and again.to_json() == result.to_json() and repr(again) == repr(result)
    assert list(result.top()["component"])[:2] == ["ablated", "new support"]
    names = result.repairers(50)
    assert len(names) == 12 - 3 + 3 and not {"L0H2", "L1H1", "L1H3"} & set(names["component"])
    assert names["change"].abs().is_monotonic_decreasing


def test_bad_input():
    of = model("gpt2")
    task = templated(of, True)
    with pytest.raises(UserError, match="nothing to knock out"):
        quiet(of, task, [])
    with pytest.raises(UserError, match="head is 0 … 3"):
        quiet(of, task, [(1, 2)], negative=[(0, 9)])
    better = both(task, full_logits(of, task.clean, []))[0].mean() > 0
    turned = replace(task.answers, answer=task.answers.wrong, wrong=task.answers.answer) if better else task.answers
    with pytest.raises(UserError, match="the model does not do this task"):
        quiet(of, replace(task, answers=turned), [(1, 2)], force=False)


def test_mutation_the_ablated_runs_own_scale(monkeypatch):
    """With each run's own scale the terms are no longer comparable, though they would still add up."""
    module = import_module("mechinterp.ablation.self_repair")  # the package has the function under this name
    found = module.direct_effects
    monkeypatch.setattr(module, "direct_effects", lambda of, pairs, scale=None: found(of, pairs))
    with pytest.raises(AssertionError):
        test_each_term_is_what_the_parts_of_two_runs_say("llama", True)


def test_mutation_the_clean_scale_everywhere(monkeypatch):
    """Without the norm's rescaling the terms miss the change."""
    module = import_module("mechinterp.ablation.self_repair")
    of, found = model("llama"), module.direct_effects

    def frozen(of, pairs, scale=None):
        made = found(of, pairs, scale=scale)
        return replace(made, own_total=made.total)

    monkeypatch.setattr(module, "direct_effects", frozen)
    task = templated(of, True)
    result = quiet(of, task, HEADS)
    gap = result.data["term"].sum("component") - (result.data["after"] - result.data["before"])
    assert abs(gap).max() > 1e-2
