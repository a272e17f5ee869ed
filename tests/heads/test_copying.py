"""Copying through the thin factors equals the whole matrix over the vocabulary, on every family, folded or not."""

import numpy as np
import pytest
import torch

from mechinterp import UserError
from mechinterp.heads import CopyingResult, copying
from mechinterp.heads.matrices import divisor, embed
from tests.families import FAMILIES, full_logits, model
from tests.heads import plain
from tests.heads.plain import read, to_logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embedding", ["mlp0", "raw"])
def test_scores_are_those_of_the_whole_matrix(family, embedding):
    of = model(family)
    result = copying(of, embedding=embedding, n_tokens=40, top_k=4, draws=2, seed=1)
    sample = result.data["token"].values
    everything = torch.arange(of.d_vocab)
    for layer in range(of.n_layers):
        stream = read(of, layer, plain.embedded(of, everything, "raw" if layer == 0 else embedding))
        for head in range(of.n_heads):
            written = to_logits(of, stream @ plain.ov(of, layer, head, folded=False)).numpy()  # [d_vocab d_vocab]
            values = np.linalg.eigvals(written)
            at = {"layer": layer, "head": head}
            got = result.data.sel(at)
            assert float(got["eigenvalue"]) == pytest.approx(values.sum().real / np.abs(values).sum(), abs=1e-4)
            for i, token in enumerate(sample):
                better = (written[token] > written[token, token]).sum()
                worse = (written[token] < written[token, token]).sum()
                assert bool(got["top_hits"][i]) == (better < 4), (at, token)
                assert bool(got["bottom_hits"][i]) == (worse < 4), (at, token)
            assert float(got["top_share"]) == pytest.approx(float(got["top_hits"].mean()))
            assert float(got["bottom_share"]) == pytest.approx(float(got["bottom_hits"].mean()))


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_score_the_same(family, variant):
    raw, processed = (copying(variant(family, one), n_tokens=40, top_k=4, draws=2) for one in (False, True))
    names = ("eigenvalue", "top_share", "bottom_share", "top_share_null")
    for name in names:
        np.testing.assert_allclose(raw.data[name], processed.data[name], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_what_the_blocks_see(family):
    of, tokens = model(family), torch.arange(20)
    table = of.bridge.embed.original_component.weight.detach()[:20]
    table = table * 24**0.5 if family == "gemma2" else table
    torch.testing.assert_close(embed(of, tokens, "raw"), table)
    torch.testing.assert_close(embed(of, tokens, "mlp0").double(), plain.embedded(of, tokens, "mlp0"))
    kept = {}
    names = [f"blocks.{layer}.{end}" for layer in range(of.n_layers) for end in ("ln1.hook_in", "ln1.hook_scale")]
    keep = [(name, lambda x, hook, name=name: kept.__setitem__(name, x.detach().clone())) for name in names]
    full_logits(of, of.to_prompts(tokens[None]), keep)
    for layer in range(of.n_layers):
        stream, scale = kept[f"blocks.{layer}.ln1.hook_in"], kept[f"blocks.{layer}.ln1.hook_scale"]
        torch.testing.assert_close(divisor(of, layer, stream), scale, atol=1e-5, rtol=1e-5)


def test_the_planted_induction_head_copies_and_no_other_writes_where_it_is_read(planted):
    result = copying(planted)
    assert float(result.data["eigenvalue"].sel(layer=1, head=2)) == pytest.approx(1)
    assert result.data["copies"].values.nonzero() == (np.array([1]), np.array([2]))
    assert not result.data["suppresses"].any()
    rest = result.data["eigenvalue"].values.copy()
    rest[1, 2] = np.nan
    assert np.isnan(rest).all(), "nothing of what they write is read"
    assert result.about["embedding"] == "raw", "the planted model has no MLP"
    assert result.top(1)["cell"][0] == "L1H2" and "1 heads copy, 0 suppress" in result.summary()


def test_a_head_turned_round_suppresses(planted):
    out = planted.bridge.blocks[1].attn.o.original_component.weight
    with torch.no_grad():
        out.neg_()
    try:
        result = copying(planted)
    finally:
        with torch.no_grad():
            out.neg_()
    assert float(result.data["eigenvalue"].sel(layer=1, head=2)) == pytest.approx(-1)
    assert result.data["suppresses"].values.nonzero() == (np.array([1]), np.array([2]))
    assert not result.data["copies"].any() and result.top(1, "anti")["cell"][0] == "L1H2"


def test_random_heads_do_not_copy():
    """The null of the eigenvalues: with random weights the score lies among those of random matrices."""
    inside, heads = 0, 0
    for family in FAMILIES:
        result = copying(model(family), draws=40, n_tokens=61, seed=2)
        inside += int((result.data["eigenvalue_p"] > 0.05).sum())
        heads += result.data["eigenvalue"].size
        assert int(result.data["copies"].sum() + result.data["suppresses"].sum()) <= 2
    assert 0.85 <= inside / heads <= 1


def test_a_head_that_raises_the_same_tokens_whatever_it_reads_does_not_copy():
    """Ten tokens are always on top: the share is 10 of 61, and another token's logit is on top as often."""
    from importlib import import_module

    hits = import_module("mechinterp.heads.copying")._hits
    stream, tokens = torch.ones(61, 1), torch.randperm(61)
    out = torch.linspace(0, 1, 61)[None, None]
    top, bottom, other_top, other_bottom = hits(stream, torch.ones(1, 1, 1), out, torch.eye(61), tokens, 10)
    for share in (top, bottom, other_top, other_bottom):
        assert share.sum() == 10


def test_ties_do_not_count(planted):
    result = copying(planted)
    assert float(result.data["top_share"].drop_sel(layer=1).max()) == 0, "a head that writes nothing ties everywhere"


def test_some_layers_and_what_is_refused(tmp_path):
    of = model("llama")
    some, every = copying(of, [2, -3], draws=3, n_tokens=30), copying(of, draws=3, n_tokens=30)
    assert some.data["layer"].values.tolist() == [0, 2]
    np.testing.assert_allclose(some.data["eigenvalue"], every.data["eigenvalue"].sel(layer=[0, 2]), atol=1e-6)
    made = some.to_json()
    assert np.array(made["eigenvalue"]).shape == (2, 4) and made["layers"] == [0, 2] and "W_OV" in made["control"]
    some.save(tmp_path / "copying.safetensors")
    assert CopyingResult.load(tmp_path / "copying.safetensors").to_json() == made
    for asked, says in (
        ({"layers": [3]}, "llama has 0 … 2"),
        ({"layers": []}, "llama has 0 … 2"),
        ({"n_tokens": 1}, "at least two tokens"),
        ({"top_k": 61}, "1 ≤ top_k < 61"),
        ({"draws": 0}, "draws ≥ 1"),
    ):
        with pytest.raises(UserError, match=says):
            copying(of, **asked)
