"""Sites: names to and from TransformerLens's, and refusals that name the fault."""

import re

import numpy as np
import pytest
import torch

from mechinterp import Site, UserError, Zero
from mechinterp.hooked.sites import KINDS
from tests.checks import checks_off
from tests.families import FAMILIES, model

TOKENS = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize("name", KINDS)
def test_names_go_there_and_back(name):
    site = Site(name, layer=9) if KINDS[name].layered else Site(name)
    assert Site.from_hook(site.hook_name) == site


def test_the_names_are_transformerlens_own():
    assert Site("z", 9).hook_name == "blocks.9.attn.hook_z"
    assert Site("resid_post", 0).hook_name == "blocks.0.hook_resid_post"
    assert Site("pattern", 10).hook_name == "blocks.10.attn.hook_pattern"
    assert Site("mlp_post", 3).hook_name == "blocks.3.mlp.hook_post"
    assert Site("embed").hook_name == "hook_embed"
    for alias, site in {
        "blocks.4.hook_in": Site("resid_pre", 4),
        "blocks.4.hook_out": Site("resid_post", 4),
        "blocks.4.attn.o.hook_in": Site("z", 4),
    }.items():
        assert Site.from_hook(alias) == site


@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_site_is_a_point_that_fires_with_that_shape(family):
    """TransformerLens's own cache, and not our table of shapes, says what is there."""
    of = model(family)
    tokens = torch.tensor(TOKENS)
    _, theirs = of.bridge.run_with_cache(tokens)
    sizes = {"batch": 2, "pos": 4, "query": 4, "key": 4, "one": 1, "d_model": of.d_model, "d_head": of.d_head}
    sizes |= {"head": of.n_heads, "kv_head": of.n_kv_heads}
    logits, cache = of.run_with_cache(tokens)
    assert torch.equal(logits, of.bridge(tokens))
    for site in of.site_list:
        if site.kind.virtual:
            continue
        activation = cache[site]
        assert len(activation.shape) == len(site.kind.axes), site
        for size, axis in zip(activation.shape, site.kind.axes, strict=True):
            assert size == sizes.get(axis, size), (site, axis)
        if site.name != "embed":  # the bridge lists it under the name of the module
            assert torch.equal(activation.flatten(), theirs[site.hook_name].flatten()), site


def test_layers_from_the_end():
    of = model("llama")
    assert of.resolve(Site("z", -1, head=2)) == Site("z", 2, head=2)
    assert of.resolve(Site("z", -3)) == Site("z", 0)
    _, cache = of.run_with_cache(TOKENS, [("resid_post", -1)])
    assert list(cache) == ["blocks.2.hook_resid_post"]
    assert torch.equal(cache["resid_post", -1], cache["resid_post", 2])


@pytest.mark.parametrize("integer", [np.int64(1), torch.tensor(1)], ids=["numpy", "torch"])
def test_integers_of_tables_will_do(integer):
    with checks_off():
        site = Site("z", layer=integer, head=integer)
    assert site == Site("z", layer=1, head=1) and str(site) == "L1H1"
    assert model("llama").resolve(site) == site


@pytest.mark.parametrize(
    "made, says",
    [
        (lambda: Site("resid_pst", 0), "unknown site 'resid_pst'; did you mean 'resid_post'"),
        (lambda: Site("paterns", 0), "did you mean 'pattern'"),
        (lambda: Site("xyzzy", 0), "valid: embed,"),
        (lambda: Site("embed", 0), "'embed' is not in a layer, but layer=0"),
        (lambda: Site("resid_post", 0, head=1), "no heads, but head=1"),
        (lambda: Site("z", 0, basis=torch.ones(6)), "shape [n d]; found shape (6,)"),
        (lambda: Site("z", 0, basis=torch.tensor([[torch.nan, 1.0]])), "must be finite"),
        (lambda: Site.from_hook("blocks.0.attn.hook_zz"), "did you mean 'blocks.{}.attn.hook_z'"),
        (lambda: Site("z").hook_name, "needs a layer"),
    ],
)
def test_a_site_that_cannot_be(made, says):
    with pytest.raises(UserError, match=re.escape(says)):
        made()


@pytest.mark.parametrize(
    "family, site, says",
    [
        ("neox", Site("resid_mid", 0), "neox has no site resid_mid layer 0; it has: "),
        ("phi", Site("resid_mid", 1), "phi has no site resid_mid layer 1"),
        ("phi", Site("ln2_scale", 1), "phi has no site ln2_scale"),
        ("llama", Site("pos_embed"), "llama has no site pos_embed"),
        ("gpt2", Site("rot_q", 0), "gpt2 has no site rot_q"),
        ("opt", Site("attn_scores", 0), "opt has no site attn_scores"),
        ("llama", Site("k", 0, head=2), "kv_head is 0 … 1 at this site"),
        ("llama", Site("v_input", 0, head=3), "kv_head is 0 … 1 at this site"),
        ("llama", Site("q", 0, head=4), "head is 0 … 3 at this site"),
        ("llama", Site("z", 0, head=(0, 4)), "head is 0 … 3 at this site"),
        ("llama", Site("z", 0, head=-1), "head is 0 … 3 at this site"),
        ("llama", Site("z", 3), "layers 0 … 2, or −3 … −1"),
        ("llama", Site("z", -4), "layers 0 … 2, or −3 … −1"),
        ("llama", Site("z"), "'z' needs a layer, 0 … 2"),
        ("llama", Site("mlp_post", 0, neuron=40), "neuron is 0 … 39 at this site"),
        ("llama", Site("resid_pre", 0, neuron=(3, -1)), "neuron is 0 … 23 at this site"),
        ("llama", Site("z", 0, basis=torch.ones(1, 24)), "basis has width 24, the site 6"),
    ],
)
def test_a_site_that_the_model_lacks(family, site, says):
    of = model(family)
    with pytest.raises(UserError, match=re.escape(says)):
        of.resolve(site)
    with pytest.raises(UserError, match=re.escape(says)):
        of(TOKENS, [Zero(site)])
    assert not of.in_force


def test_what_cannot_be_written_is_refused():
    """OPT computes its attention inside the wrapped module: an edit of the pattern would be lost in silence."""
    of = model("opt")
    _, cache = of.run_with_cache(TOKENS, ["pattern"])
    assert torch.allclose(cache["pattern", 0].sum(-1), torch.ones(2, 4, 4), atol=1e-5)
    with pytest.raises(UserError, match="can be read but not changed in opt"):
        of(TOKENS, [Zero(Site("pattern", 0))])


def test_names_in_print():
    assert str(Site("z", 9, head=6)) == "L9H6"
    assert str(Site("resid_post", 3)) == "resid_post layer 3"
    assert str(Site("k", 3, head=1)) == "k layer 3 head 1"
    assert str(Site("mlp_post", 3, neuron=7)) == "mlp_post layer 3 neuron 7"
    assert str(Site("resid_post", 3, basis=torch.eye(2))) == "resid_post layer 3 in a basis of 2"
