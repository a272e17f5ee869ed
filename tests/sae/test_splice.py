"""Splices against hooks written by hand: sites, edits, exclusion, transcoders, gradients, suffix runs, bad input."""

import numpy as np
import pytest
import torch

from mechinterp.errors import UserError
from mechinterp.hooked.interventions import Steer
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Levers, Read, record
from mechinterp.patching import sweep
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.splicing import splice as splicing
from mechinterp.sae.splicing.splice import Splice
from tests.families import FAMILIES, full_logits, model, pairs
from tests.sae.tiny import RESID, by_hand, kept_by_hand, tiny_sae

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
SITES = (RESID, Site("resid_pre", 0), Site("z", 1), Site("mlp_out", 2), Site("mlp_post", 0), Site("attn_out", 1))
CLOSE = {"atol": 3e-5, "rtol": 1e-4}


def spliced_by_hand(of, sae, prompts, error=False, edit=lambda features: features, excluded=()):
    """Full logits with one hook, that encodes and decodes densely."""
    kept = kept_by_hand(prompts, excluded)

    def hook(x, hook):
        flat = x.flatten(2)
        features, made = by_hand(sae, flat)
        new = made + (edit(features.clone()) - features) @ sae.W_dec
        new = flat + (new - made) if error else new
        return torch.where(kept[..., None], new, flat).reshape(x.shape).detach()

    return full_logits(of, prompts, [(of.hook_points[sae.metadata.reads[0]].name, hook)])


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_its_error_term_a_splice_changes_nothing(family, padded):
    of = model(family)
    prompts = pairs(of, padded).clean
    plain = of(prompts)
    for architecture in ARCHITECTURES:
        for site in SITES:
            got = of(prompts, [Splice(tiny_sae(of, site, architecture=architecture))])
            assert (got - plain).abs().max() <= 1e-5 * plain.abs().max(), (architecture, site)
    assert not of.in_force


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_without_it_the_site_is_the_reconstruction(family, site):
    of = model(family)
    prompts = pairs(of, True).clean
    for architecture in ARCHITECTURES:
        sae = tiny_sae(of, site, architecture=architecture)
        got = of(prompts, [Splice(sae, error=False)])
        real = prompts.real
        torch.testing.assert_close(got[real], spliced_by_hand(of, sae, prompts)[real], **CLOSE, msg=architecture)
        assert (got - of(prompts))[real].abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("error", [True, False], ids=["error", "no-error"])
def test_edits_of_features(architecture, error):
    of, prompts = model("llama"), pairs(model("llama"), True).clean
    sae = tiny_sae(of, RESID, architecture=architecture)
    live = by_hand(sae, of.run_with_cache(prompts, [RESID])[1][RESID])[0]
    on = live[kept_by_hand(prompts)].sum(0).argsort(descending=True).tolist()
    a, b, c, d = on[:4]

    def edit(features):
        features[..., a] = 0
        features[..., b] = 3
        features[..., c] *= -2
        features[..., d] += 1.5
        return features

    got = of(prompts, [Splice(sae, error=error, ablate=[a], set={b: 3}, scale={c: -2.0}, add={d: 1.5})])
    want = spliced_by_hand(of, sae, prompts, error, edit)
    torch.testing.assert_close(got[prompts.real], want[prompts.real], **CLOSE)
    assert (want - of(prompts))[prompts.real].abs().max() > 0.1


def test_steering_reaches_positions_where_a_feature_is_off():
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID, exclusion=Exclusion(first=False))
    live = by_hand(sae, of.run_with_cache(prompts, [RESID])[1][RESID])[0]
    off = int((live == 0).all(0).all(0).nonzero()[0])
    vector = sae.W_dec[off].detach()
    got = of(prompts, [Splice(sae, add={off: 2.0})])
    torch.testing.assert_close(got, of(prompts, [Steer(RESID, vector, 2.0)]), **CLOSE)


def test_values_by_position_are_those_of_the_rows_that_run():
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID)
    values = torch.rand(prompts.tokens.shape, generator=torch.Generator().manual_seed(0))
    with of.intervene(Splice(sae, set={5: values})):
        full = of(prompts)
        recording = record(of, prompts)
        read = Read(torch.full((len(prompts), 1), prompts.n_pos - 1))
        got = recording.base_logits(read, torch.tensor([2, 0]))
    torch.testing.assert_close(got[:, 0], full[[2, 0], -1], **CLOSE)
    by_hand_ = spliced_by_hand(of, sae, prompts, True, lambda f: f.index_copy(2, torch.tensor([5]), values[..., None]))
    torch.testing.assert_close(full, by_hand_, **CLOSE)


def test_excluded_positions_stay_bit_for_bit():
    of, prompts = model("llama"), pairs(model("llama"), True).clean
    token = int(prompts.tokens[0, -2])
    plain = of.run_with_cache(prompts, [RESID])[1][RESID]
    sae = tiny_sae(of, RESID, exclusion=Exclusion(tokens=(token,)))
    new = of.run_with_cache(prompts, [RESID], [Splice(sae, error=False)])[1][RESID]
    kept = kept_by_hand(prompts, (token,))
    assert torch.equal(new[~kept], plain[~kept]) and not kept[0, -2]
    assert bool((new[kept] != plain[kept]).any(-1).all())
    everywhere = Splice(sae, error=False, exclusion=Exclusion(first=False))
    new = of.run_with_cache(prompts, [RESID], [everywhere])[1][RESID]
    assert bool((new != plain).any(-1)[prompts.real].all())
    chosen = of.run_with_cache(prompts, [RESID], [Splice(sae, error=False, positions=3)])[1][RESID]
    moved = (chosen != plain).any(-1)
    assert torch.equal(moved, prompts.select(3) & kept)


@pytest.mark.parametrize("skip", [False, True], ids=["no-skip", "skip"])
@pytest.mark.parametrize("reads", [Site("mlp_in", 1), Site("resid_mid", 1), Site("resid_pre", 0)], ids=str)
def test_a_transcoder_reads_one_site_and_writes_another(reads, skip):
    of, prompts = model("llama"), pairs(model("llama"), True).clean
    writes, real = Site("mlp_out", 1), pairs(model("llama"), True).clean.real
    sae = tiny_sae(of, reads, writes, skip=skip)
    read = of.run_with_cache(prompts, [reads])[1][reads]
    features, made = by_hand(sae, read)
    kept = kept_by_hand(prompts)[..., None]
    plain = of(prompts)
    name = of.hook_points[writes.hook_name].name

    def by_hooks(new):
        return full_logits(of, prompts, [(name, lambda x, hook: torch.where(kept, new(x), x).detach())])

    torch.testing.assert_close(of(prompts, [Splice(sae)])[real], plain[real], **CLOSE)
    got = of(prompts, [Splice(sae, error=False)])
    torch.testing.assert_close(got[real], by_hooks(lambda x: made)[real], **CLOSE)
    j = int(features[kept_by_hand(prompts)].sum(0).argmax())
    got = of(prompts, [Splice(sae, ablate=j)])
    want = by_hooks(lambda x: x - features[..., j, None] * sae.W_dec[j])
    torch.testing.assert_close(got[real], want[real], **CLOSE)
    assert (want - plain)[real].abs().max() > 1e-2


def test_the_error_of_a_transcoder_is_taken_at_the_live_written_site():
    """What another intervention did to the written site stays."""
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, Site("mlp_in", 1), Site("mlp_out", 1))
    push = Steer(Site("mlp_out", 1), torch.ones(of.d_model), 0.7)
    torch.testing.assert_close(of(prompts, [push, Splice(sae)]), of(prompts, [push]), **CLOSE)
    assert (of(prompts, [push]) - of(prompts)).abs().max() > 1e-2


# Gradients


def gradient(of, prompts, splice, tap_layer, metric=lambda logits: logits[:, -1].square().mean()):
    """Of the metric, at a vector added to every position of the residual stream."""
    vector = torch.zeros(of.d_model, requires_grad=True)
    metric(of(prompts, [Steer(Site("resid_pre", tap_layer), vector, noop_ok=True), *splice])).backward()
    return vector.grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_flow_through_the_features_only(architecture):
    """With the error term the value is the model's own, and the gradient that of the reconstruction."""
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID, architecture=architecture, exclusion=Exclusion(first=False))
    got = gradient(of, prompts, [Splice(sae)], 1)
    assert all(weight.grad is None for weight in sae.parameters())
    vector = torch.zeros(of.d_model, requires_grad=True)

    def start(x, hook):
        return x + vector

    def hook(x, hook):
        made = by_hand(sae, x)[1]
        return made + (x - made).detach()

    hooks = [(of.hook_points[Site("resid_pre", 1).hook_name].name, start), (of.hook_points[RESID.hook_name].name, hook)]
    full_logits(of, prompts, hooks)[:, -1].square().mean().backward()
    torch.testing.assert_close(got, vector.grad, atol=1e-4, rtol=1e-3)
    assert (got - gradient(of, prompts, [], 1)).abs().max() > 1e-2


def test_a_splice_in_force_makes_no_graph():
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID)
    assert next(sae.parameters()).requires_grad
    assert not of(prompts, [Splice(sae, error=False)]).requires_grad


# Suffix runs


def full_runs(monkeypatch, of):
    monkeypatch.setitem(of.__dict__, "levers", Levers(False, False, False))


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sweep_with_a_splice_in_force_equals_the_naive_one(family, padded, monkeypatch):
    of = model(family)
    task = pairs(of, padded)
    transcoder = tiny_sae(of, Site("resid_pre", 1), Site("mlp_out", 2))
    saes = [Splice(tiny_sae(of, RESID), error=False), Splice(tiny_sae(of, Site("z", 0)), scale={3: 4.0}, noop_ok=True)]
    for in_force in ([*saes, Splice(transcoder, error=False)], [saes[0]]):
        for site in ("resid_pre", "mlp_out"):
            found = []
            for naive in (False, True):
                with monkeypatch.context() as patched, of.intervene(*in_force):
                    if naive:
                        full_runs(patched, of)
                    made = sweep(of, task, site, "A,END", force=True, progress=False, max_tokens=None if naive else 24)
                    found.append(torch.as_tensor(made.data["patched"].values))
            torch.testing.assert_close(*found, atol=3e-4, rtol=1e-3, msg=f"{in_force} {site}")
    assert not of.in_force


def test_one_cell_of_a_sweep_by_hand():
    of = model("llama")
    task = pairs(of, False)
    sae = tiny_sae(of, RESID)
    with of.intervene(Splice(sae, error=False)):
        made = sweep(of, task, "mlp_out", "A", layers=[0], metric="prob", force=True, progress=False)
    kept = kept_by_hand(task.clean)[..., None]
    name = {site: of.hook_points[site.hook_name].name for site in (RESID, Site("mlp_out", 0))}
    source = of.run_with_cache(task.clean, ["mlp_out"])[1]["mlp_out", 0]
    at = task.corrupted.select("A")[..., None]
    hooks = [
        (name[Site("mlp_out", 0)], lambda x, hook: torch.where(at, source, x)),
        (name[RESID], lambda x, hook: torch.where(kept, by_hand(sae, x)[1], x).detach()),
    ]
    logits = full_logits(of, task.corrupted, hooks)
    want = [
        float(logits[i, int(task.answers.pos[i, 0])].softmax(-1)[int(task.answers.answer[i, 0, 0])])
        for i in range(len(task))
    ]
    torch.testing.assert_close(
        torch.as_tensor(made.data["patched"].values).flatten().float(), torch.tensor(want), **CLOSE
    )


def test_parts_of_a_batch_are_the_whole(monkeypatch):
    of, prompts = model("llama"), pairs(model("llama"), True).clean
    for architecture in ARCHITECTURES:
        splice = Splice(tiny_sae(of, RESID, architecture=architecture), error=False, add={1: 1.0, 7: torch.rand(4, 8)})
        whole = of(prompts, [splice])
        with monkeypatch.context() as patched:
            patched.setattr(splicing, "PAIRS", 64 * 5)
            torch.testing.assert_close(of(prompts, [splice]), whole, **CLOSE)


def test_text_is_generated_with_a_splice():
    of = model("llama")
    splice = Splice(tiny_sae(of, RESID), error=False)
    made = of.generate([[3, 4, 5, 6]], 3, interventions=[splice]).tokens[0]
    ids = [3, 4, 5, 6]
    for token in made:
        assert int(of([ids], [splice])[0, -1].argmax()) == token
        ids.append(token)


def test_a_model_in_half_precision():
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID)
    activation = of.run_with_cache(prompts, [RESID])[1][RESID].bfloat16()
    splice = Splice(sae)
    rows = splicing.Rows.all(prompts)
    same = splice.at_write(splice.new_value(activation, None, rows), activation, rows)
    assert same.dtype == torch.bfloat16 and torch.equal(same, activation)
    splice = Splice(sae, error=False)
    made = splice.at_write(splice.new_value(activation, None, rows), activation, rows)
    want = torch.where(kept_by_hand(prompts)[..., None], by_hand(sae, activation.float())[1].bfloat16(), activation)
    torch.testing.assert_close(made, want.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_autoencoder_of_another_precision_than_the_model(dtype):
    """With its error a splice changes nothing, not even by rounding."""
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID).to(dtype)
    assert torch.equal(of(prompts, [Splice(sae)]), of(prompts))
    assert of(prompts, [Splice(sae, error=False)]).dtype == torch.float32


def test_features_are_numbers_of_any_library():
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID)
    want = of(prompts, [Splice(sae, ablate=[3], noop_ok=True)])
    for three in (np.int64(3), np.array([3]), torch.tensor([3])):
        assert torch.equal(of(prompts, [Splice(sae, ablate=three, noop_ok=True)]), want)
    with pytest.raises(TypeError):
        Splice(sae, ablate=np.array([2.7]))


def test_published_names_of_a_model():
    of, prompts = model("gpt2"), pairs(model("gpt2"), False).clean
    sae = tiny_sae(of, RESID)
    object.__setattr__(sae.metadata, "model", "gpt2-small")
    assert of(prompts, [Splice(sae)]).isfinite().all()


# Bad input


def test_bad_input():
    of = model("llama")
    prompts = pairs(of, False).clean
    sae = tiny_sae(of, RESID)
    fresh = lambda **more: Splice(sae, **more)  # noqa: E731
    with pytest.raises(UserError, match="crosscoder of 2 sites cannot be spliced"):
        Splice(tiny_sae(of, Site("resid_post", 0), n_sites=2))
    with pytest.raises(UserError, match="feature 64 was to be edited; features are 0 … 63"):
        fresh(ablate=64)
    with pytest.raises(UserError, match="feature 3 is edited twice"):
        fresh(ablate=[3], add={3: 1.0})
    with pytest.raises(UserError, match="edit of feature 3 is not finite"):
        fresh(set={3: float("nan")})
    with pytest.raises(UserError, match="spliced at all of a site"):
        fresh(site=Site("z", 1, head=2))
    with pytest.raises(UserError, match="nothing can be spliced at pattern"):
        fresh(site=Site("pattern", 1))
    with pytest.raises(UserError, match="has layers 0 … 2"):
        of(prompts, [fresh(site=Site("resid_post", 7))])
    with pytest.raises(UserError, match="reads 24 dimensions, but mlp_post layer 1 of llama has 40"):
        of(prompts, [fresh(site=Site("mlp_post", 1))])
    with pytest.raises(UserError, match="was trained on llama; the model here is gpt2"):
        model("gpt2")(prompts, [fresh()])
    assert model("gpt2")(prompts, [fresh(site=RESID)]).isfinite().all()
    transcoder = tiny_sae(of, Site("mlp_in", 1), Site("mlp_out", 1))
    with pytest.raises(UserError, match="without writes="):
        Splice(transcoder, site=Site("mlp_in", 1))
    with pytest.raises(UserError, match=r"the run needs \(4, 8\)"):
        of(prompts, [fresh(set={3: torch.zeros(2, 2)})])
    unknown = tiny_sae(of, RESID)
    object.__setattr__(unknown.metadata, "reads", ())
    object.__setattr__(unknown.metadata, "writes", ())
    with pytest.raises(UserError, match="one site of an autoencoder was asked for; it has: none"):
        Splice(unknown)


def test_an_edit_that_changes_nothing_raises():
    of, prompts = model("llama"), pairs(model("llama"), False).clean
    sae = tiny_sae(of, RESID)
    live = by_hand(sae, of.run_with_cache(prompts, [RESID])[1][RESID])[0]
    off = int((live == 0).all(0).all(0).nonzero()[0])
    with pytest.raises(UserError, match="Splice at resid_post layer 1 changed no element"):
        of(prompts, [Splice(sae, ablate=off)])
    of(prompts, [Splice(sae, ablate=off, noop_ok=True)])
