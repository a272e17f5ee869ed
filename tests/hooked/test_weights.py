"""Norms as linear maps and weights in one layout reproduce what the model computes, on every family."""

import pytest
import torch

from mechinterp import load
from mechinterp.hooked import weights
from mechinterp.hooked.sites import Site
from tests.families import FAMILIES, model
from tests.test_identities import saved

TOKENS = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=["raw", "processed"])
def made(request, tmp_path_factory):
    if request.param == "raw":
        return model
    kept = {}

    def of(family):
        if family not in kept:
            kept[family] = load(saved(family, tmp_path_factory.mktemp(family)), process=True, device="cpu")
        return kept[family]

    return of


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_is_linear_once_its_scale_is_known(family, made):
    of = made(family)
    cache = of.run_with_cache(TOKENS)[1]
    x, scale = cache["resid_post", -1], cache[Site("ln_final_scale")]
    norm = weights.final_norm(of)
    want = of.bridge.ln_final.original_component(x)
    close(norm.linear(x, scale) + norm.bias, want)
    assert norm.centred == isinstance(of.bridge.ln_final.original_component, torch.nn.LayerNorm) and norm.scaled
    parts = torch.randn(4, *x.shape)
    direction = torch.randn(of.d_model)
    close((norm.linear(parts, scale) * direction).sum(-1), (parts * norm.pull_back(direction, scale)).sum(-1))
    for layer in range(of.n_layers):
        x, scale = cache["resid_pre", layer], cache["ln1_scale", layer]
        inner = weights.input_norm(of, layer)
        close(inner.linear(x, scale) + inner.bias, of.bridge.blocks[layer].ln1.original_component(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_make_queries_keys_and_values(family, made):
    of = made(family)
    cache = of.run_with_cache(TOKENS)[1]
    for layer in range(of.n_layers):
        x, scale = cache["resid_pre", layer], cache["ln1_scale", layer]
        for name in ("q", "k", "v"):
            want = cache[name, layer]
            want = want.repeat_interleave(of.n_heads // want.shape[2], dim=2)
            folded, bias = weights.head_in(of, layer, name)
            close(torch.einsum("bpd,hde->bphe", x / scale, folded) + bias, want)
            plain, bias = weights.head_in(of, layer, name, fold=False)
            normed = of.bridge.blocks[layer].ln1.original_component(x)
            close(torch.einsum("bpd,hde->bphe", normed, plain) + bias, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_add_up_behind_their_norms(family, made):
    of = made(family)
    cache = of.run_with_cache(TOKENS)[1]
    for layer in range(of.n_layers):
        for part, inputs, out in (("attn", "z", "attn_out"), ("mlp", "mlp_post", "mlp_out")):
            if part == "attn":
                matrix, bias = weights.head_out(of, layer)
                made_here = torch.einsum("bphe,hed->bpd", cache[inputs, layer], matrix) + bias
            else:
                matrix, bias = weights.mlp_out(of, layer)
                made_here = cache[inputs, layer] @ matrix + bias
            found = weights.post_norm(of, layer, part)
            assert (found is not None) == (family == "gemma2")
            if found is not None:
                norm, site = found
                made_here = norm.linear(made_here, cache[site]) + norm.bias
            close(made_here, cache[out, layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unembedding_makes_the_logits(family, made):
    of = made(family)
    logits, cache = of.run_with_cache(TOKENS)
    columns, bias = weights.unembedding(of)
    got = of.bridge.ln_final.original_component(cache["resid_post", -1]) @ columns + bias
    cap = float(of.bridge.cfg.output_logits_soft_cap or 0)
    close(cap * torch.tanh(got / cap) if cap > 0 else got, logits)


def test_a_model_without_norms_has_the_identity():
    of = load("planted-induction", device="cpu")
    norm = weights.final_norm(of)
    assert not norm.scaled and not norm.centred and not norm.bias.any()
    assert torch.allclose(norm.gain, torch.ones(of.d_model), atol=1e-5)


@pytest.mark.parametrize("d_model", [5, 6, 7])
def test_odd_widths(d_model):
    layer = torch.nn.LayerNorm(d_model)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    norm = weights.norm_of(layer, d_model, torch.device("cpu"))
    torch.testing.assert_close(norm.gain, layer.weight.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.bias, layer.bias.detach())
    assert norm.centred
