"""Attribution to features against hooks and autograd by hand; its sums; where it is exact; bad input."""

import json

import numpy as np
import pytest
import torch

from mechinterp.errors import UserError
from mechinterp.hooked.interventions import Patch
from mechinterp.hooked.sites import Site
from mechinterp.metrics import LogitDiff
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.splicing.attribution import attribute
from mechinterp.sae.splicing.effects import ERROR, FeatureEffects, rank_correlation
from mechinterp.sae.splicing.spliced_run import SplicedRun
from tests.checks import checks_off
from tests.families import full_logits, model, pairs
from tests.sae.tiny import RESID, by_hand, kept_by_hand, tiny_sae

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
EVERYWHERE = Exclusion(first=False)
LAST = Site("resid_post", 2)


def sides(task, direction):
    return (task.clean, task.corrupted) if direction == "noise" else (task.corrupted, task.clean)


def value_of(task, logits):
    metric = LogitDiff()
    return metric(metric.read(task).gather(logits), task.answers)


def gradients_by_hand(of, task, base, saes):
    """At every written site, the autoencoders put in by hooks with errors that have no gradient."""
    kept, taps, hooks, held = kept_by_hand(base)[..., None], [], [], {}
    for number, sae in enumerate(saes):
        reads, writes = (Site.from_hook(names[0]).hook_name for names in (sae.metadata.reads, sae.metadata.writes))

        def read(x, hook, number=number):
            held[number] = x

        def write(y, hook, number=number, sae=sae):
            made = by_hand(sae, held[number].flatten(2))[1]
            kept_here = kept if sae.metadata.exclusion.first else base.real[..., None]
            new = torch.where(kept_here, made + (y.flatten(2) - made).detach(), y.flatten(2))
            tap = torch.zeros_like(new, requires_grad=True)
            taps.append(tap)
            return (new + tap).reshape(y.shape)

        hooks += [(of.hook_points[reads].name, read), (of.hook_points[writes].name, write)]
    value = value_of(task, full_logits(of, base, hooks))
    return torch.autograd.grad(value.sum(), taps)


def changes_by_hand(of, task, saes, direction="noise", positions=None):
    """`[feature prompt]` of every autoencoder, dense, and what the error has `[prompt]`."""
    base, source = sides(task, direction)
    made = []
    for sae, g in zip(saes, gradients_by_hand(of, task, base, saes), strict=True):
        reads, writes = (Site.from_hook(names[0]) for names in (sae.metadata.reads, sae.metadata.writes))
        chosen = base.select(positions) & base.real
        kept = chosen & (kept_by_hand(base) if sae.metadata.exclusion.first else base.real)
        caches = [of.run_with_cache(prompts, [reads, writes])[1] for prompts in (source, base)]
        features = [by_hand(sae, cache[reads].flatten(2))[0] * kept[..., None] for cache in caches]
        delta = features[0] - features[1]
        by_feature = (delta * (g @ sae.W_dec.T)).sum(1).T
        whole = ((caches[0][writes] - caches[1][writes]).flatten(2) * g).sum(-1)
        made.append((by_feature.detach(), (whole * chosen).sum(-1).detach()))
    return made


def dense(result, number, d_sae):
    """`[feature prompt]`, and the error `[prompt]`."""
    at = result.data.isel(row=np.flatnonzero(result.data["sae"].values == number))
    table = np.zeros((d_sae, result.data.sizes["prompt"]))
    on = at["feature"].values != ERROR
    table[at["feature"].values[on]] = at["change"].values[on]
    return torch.as_tensor(table), torch.as_tensor(at["change"].values[~on][0])


def compare(of, task, saes, direction="noise", positions=None):
    got = attribute(of, task, saes, positions=positions, direction=direction, force=True, exact=0)
    for number, (by_feature, whole) in enumerate(changes_by_hand(of, task, saes, direction, positions)):
        ours, error = dense(got, number, saes[number].config.d_sae)
        scale = float(by_feature.abs().max())
        torch.testing.assert_close(ours, by_feature.double(), atol=2e-4 * scale, rtol=1e-3)
        # Features and error together are the first-order effect of the site.
        torch.testing.assert_close(ours.sum(0) + error, whole.double(), atol=1e-3 * scale, rtol=1e-3)
        assert scale > 1e-2
    return got


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_one_autoencoder_against_the_plain_reference(architecture, direction):
    of = model("llama")
    task = pairs(of, True)
    got = compare(of, task, [tiny_sae(of, RESID, architecture=architecture)], direction)
    change, ends = got.data["change"].values, got.data[["base", "source"]]
    whole = float((ends["source"] - ends["base"]).mean())
    effects = got.data["effect"].values
    assert np.isnan(effects).all() or np.allclose(effects, change.mean(1) / whole)
    np.testing.assert_allclose(got.data["mean_change"], change.mean(1))


@pytest.mark.parametrize(
    "site", [Site("z", 1), Site("mlp_out", 0), Site("resid_mid", 1), Site("mlp_post", 2), LAST], ids=str
)
def test_other_sites(site):
    of = model("gpt2")
    if site.name == "resid_mid":  # TransformerLens's own hook there is only what the second norm reads
        result = attribute(of, pairs(of, False), tiny_sae(of, site), force=True, exact=0)
        assert len(result.features) and np.isfinite(result.data["change"].values).all()
    else:
        compare(of, pairs(of, False), [tiny_sae(of, site)])


def test_gradients_pass_through_the_features_of_later_autoencoders():
    of = model("llama")
    task = pairs(of, True)
    saes = [tiny_sae(of, Site("resid_post", 0)), tiny_sae(of, Site("mlp_out", 1), seed=3), tiny_sae(of, LAST, seed=5)]
    compare(of, task, saes)
    alone = attribute(of, task, saes[0], force=True, exact=0)
    together = attribute(of, task, saes, force=True, exact=0)
    first = dense(together, 0, 64)[0]
    assert (dense(alone, 0, 64)[0] - first).abs().max() > 0.1 * first.abs().max()
    # The last one has none after it.
    last = attribute(of, task, saes[2], force=True, exact=0)
    torch.testing.assert_close(dense(last, 0, 64)[0], dense(together, 2, 64)[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("skip", [False, True], ids=["no-skip", "skip"])
def test_a_transcoder(skip):
    of = model("llama")
    compare(of, pairs(of, True), [tiny_sae(of, Site("resid_pre", 1), Site("mlp_out", 1), skip=skip)])


def test_chosen_positions():
    of = model("llama")
    task = pairs(of, True)
    sae = tiny_sae(of, RESID)
    compare(of, task, [sae], positions="END")
    compare(of, task, [sae], positions=[2, 5])


def test_parts_of_the_prompts_are_the_whole(monkeypatch):
    of = model("llama")
    task = pairs(of, True)
    sae = tiny_sae(of, RESID, architecture="jumprelu")
    whole = attribute(of, task, sae, force=True)
    monkeypatch.setattr(SplicedRun, "_rows_per_call", property(lambda run: 3))
    parts = attribute(of, task, sae, force=True)
    for name in ("change", "base", "source", "exact_change", "feature"):
        np.testing.assert_allclose(parts.data[name], whole.data[name], atol=1e-4, rtol=1e-3)


def test_only_features_that_are_on_have_rows():
    of = model("llama")
    task = pairs(of, False)
    sae = tiny_sae(of, RESID)
    on = set()
    for prompts in (task.clean, task.corrupted):
        features = by_hand(sae, of.run_with_cache(prompts, [RESID])[1][RESID])[0][kept_by_hand(prompts)]
        on |= set((features != 0).any(0).nonzero().flatten().tolist())
    got = attribute(of, task, sae, force=True, exact=0)
    assert set(got.features["feature"]) == on and len(on) < sae.config.d_sae
    assert list(got.errors["name"]) == ["resid_post layer 1 error"]


# Where the approximation is exact, and how good it is elsewhere


def test_on_a_linear_path_it_is_exact():
    """After the last block only the final norm is not linear: with its divisor held it is."""
    of = model("llama")
    task = pairs(of, False)
    scale = of.run_with_cache(task.clean, ["ln_final_scale"])[1]["ln_final_scale"]
    sae = tiny_sae(of, LAST, exclusion=EVERYWHERE)
    with of.intervene(Patch(Site("ln_final_scale"), scale, noop_ok=True)):
        got = attribute(of, task, sae, force=True, exact=20)
    checked = got.features[got.features["exact_change"].notna()]
    assert len(checked) == 20 and got.about["agreement"] > 0.99
    np.testing.assert_allclose(checked["mean_change"], checked["exact_change"], atol=1e-3, rtol=1e-3)
    whole = got.data["source"] - got.data["base"]
    np.testing.assert_allclose(got.data["change"].sum("row"), whole, atol=1e-3, rtol=1e-3)


def test_integrated_gradients_add_up_to_the_whole_effect():
    of = model("llama")
    task = pairs(of, False)
    sae = tiny_sae(of, RESID, exclusion=EVERYWHERE)
    whole, gaps = None, []
    for steps in (1, 48):
        got = attribute(of, task, sae, steps=steps, force=True, exact=0)
        whole = (got.data["source"] - got.data["base"]).values
        gaps.append(np.abs(got.data["change"].sum("row").values - whole).max())
    assert gaps[1] < 0.03 * np.abs(whole).max() < gaps[0]


def test_integrated_gradients_of_each_of_several_add_up():
    """Errors of the others have no gradient: with them in the way the sum would be another one."""
    of = model("llama")
    task = pairs(of, False)
    saes = [
        tiny_sae(of, Site("resid_post", 0), exclusion=EVERYWHERE),
        tiny_sae(of, RESID, exclusion=EVERYWHERE, seed=3),
    ]
    got = attribute(of, task, saes, steps=48, force=True, exact=0)
    whole = (got.data["source"] - got.data["base"]).values
    for number in range(2):
        change = got.data["change"].values[got.data["sae"].values == number].sum(0)
        assert np.abs(change - whole).max() < 0.03 * np.abs(whole).max(), number


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_the_behaviour_is_required_of_the_clean_run(direction):
    of = model("llama")
    task = pairs(of, False, n=16)
    value = value_of(task, of(task.clean)) - value_of(task, of(task.corrupted))
    does, fails = (task.take((value * sign > 0).nonzero().flatten()) for sign in (1, -1))
    attribute(of, does, tiny_sae(of, RESID), direction=direction, exact=0)
    with pytest.raises(UserError):
        attribute(of, fails, tiny_sae(of, RESID), direction=direction, exact=0)


def test_the_exact_effect_by_hand():
    of = model("llama")
    task = pairs(of, True)
    sae = tiny_sae(of, RESID)
    got = attribute(of, task, sae, force=True, exact=3)
    checked = got.features[got.features["exact_change"].notna()]
    assert len(checked) == 3
    kept = kept_by_hand(task.clean)
    live, source = (
        by_hand(sae, of.run_with_cache(prompts, [RESID])[1][RESID])[0] for prompts in (task.clean, task.corrupted)
    )
    base = value_of(task, full_logits(of, task.clean, []))
    for _, row in checked.iterrows():
        j = int(row["feature"])
        move = ((source - live)[..., j] * kept)[..., None] * sae.W_dec[j]
        hook = (of.hook_points[RESID.hook_name].name, lambda x, hook, move=move: (x + move).detach())
        after = value_of(task, full_logits(of, task.clean, [hook]))
        assert float((after - base).mean()) == pytest.approx(row["exact_change"], rel=2e-3, abs=2e-4)


def test_it_orders_features_as_the_exact_effects_do():
    of = model("llama")
    task = pairs(of, False, n=8)
    agreement = [
        attribute(of, task, tiny_sae(of, RESID, architecture="standard"), steps=steps, force=True, exact=40).about[
            "agreement"
        ]
        for steps in (1, 8)
    ]
    assert min(agreement) > 0.5, agreement


def test_rank_correlation():
    assert rank_correlation(np.array([1.0, 5.0, 2.0, 9.0]), np.array([0.0, 20.0, 3.0, 21.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0))) and np.isnan(rank_correlation(np.ones(2), np.ones(2)))


# What comes of it


def test_results(tmp_path):
    of = model("llama")
    task = pairs(of, False, n=12)
    got = attribute(of, task, [tiny_sae(of, RESID), tiny_sae(of, LAST)], force=True)
    made = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert set(made["rows"]) >= {"name", "sae", "feature", "effect", "ci_low", "ci_high", "passes", "exact"}
    assert made["saes"] == ["resid_post layer 1", "resid_post layer 2"] and len(got.errors) == 2
    got.save(tmp_path / "effects.safetensors")
    again = FeatureEffects.load(tmp_path / "effects.safetensors")
    assert again.to_json() == got.to_json() and again.summary() == got.summary()
    assert "\n" not in got.summary() and "n=12" in got.summary()
    assert got.top(5)["mean_change"].abs().is_monotonic_decreasing
    same = attribute(of, task, [tiny_sae(of, RESID), tiny_sae(of, LAST)], force=True)
    assert same.to_json() == got.to_json()


def test_normalised_effects():
    """Pairs sorted so that the metric falls on every one: the ratio is defined."""
    of = model("llama")
    task = pairs(of, False, n=16)
    fall = value_of(task, of(task.clean)) - value_of(task, of(task.corrupted))
    task = task.take((fall > 0).nonzero().flatten())
    got = attribute(of, task, tiny_sae(of, RESID), force=True)
    whole = float((got.data["source"] - got.data["base"]).mean())
    assert whole < 0 and np.isfinite(got.data["effect"]).all()
    np.testing.assert_allclose(got.data["effect"], got.data["mean_change"] / whole, rtol=1e-9)
    np.testing.assert_allclose(got.data["exact"], got.data["exact_change"] / whole, rtol=1e-9)
    passes = np.abs(got.data["effect"].values) > got.about["threshold"]
    np.testing.assert_array_equal(got.data["passes"], passes)
    assert ((got.data["ci_low"] <= got.data["effect"]) & (got.data["effect"] <= got.data["ci_high"])).all()
    assert "(exactly " in got.summary()


def test_two_runs_that_do_not_differ():
    of = model("llama")
    task = pairs(of, False)
    object.__setattr__(task, "corrupted", task.clean)
    got = attribute(of, task, tiny_sae(of, RESID), force=True)
    assert np.abs(got.data["change"].values).max() == 0 and got.data["effect"].isnull().all()
    assert "undefined, the two runs do not differ" in got.summary()
    json.dumps(got.to_json(), allow_nan=False)


def test_bad_input():
    of = model("llama")
    task = pairs(of, False)
    sae = tiny_sae(of, RESID)
    with checks_off(), pytest.raises(UserError, match="unknown direction 'up'"):
        attribute(of, task, sae, direction="up")
    with pytest.raises(UserError, match="with a gradient; found rank"):
        attribute(of, task, sae, "rank")
    with pytest.raises(UserError, match="kl has no gradient at the clean run"):
        attribute(of, task, sae, "kl")
    with pytest.raises(UserError, match="at different sites are needed"):
        attribute(of, task, [sae, sae])
    with pytest.raises(UserError, match="at different sites are needed, at least one; found: none"):
        attribute(of, task, [])
    with pytest.raises(UserError, match="steps must be at least 1 and exact at least 0; found 0, 10"):
        attribute(of, task, sae, steps=0)
    with pytest.raises(UserError, match="crosscoder of 2 sites"):
        attribute(of, task, tiny_sae(of, Site("resid_post", 0), n_sites=2))
    swapped = pairs(of, False)
    clean, corrupted = (value_of(swapped, of(side)).mean() for side in (swapped.clean, swapped.corrupted))
    if clean > corrupted:
        object.__setattr__(swapped, "clean", task.corrupted)
        object.__setattr__(swapped, "corrupted", task.clean)
    with pytest.raises(UserError, match="the model does not do this task"):
        attribute(of, swapped, sae)
    assert np.isfinite(attribute(of, task, sae, "kl", direction="denoise", force=True).data["change"].values).all()
