"""Matching equals loops over pairs of tokens, on every family, and finds the planted heads."""

import numpy as np
import pytest
import torch

from mechinterp import UserError
from mechinterp.heads import MatchingResult, matching
from mechinterp.heads.scores import score_forms
from tests.checks import checks_off
from tests.families import FAMILIES, model
from tests.heads import plain


def expected(of, layer, head, tokens, embedding, form, via=None):
    """z and rank share of each token, one score at a time."""
    kind = "raw" if layer == 0 else embedding
    stream = plain.embedded(of, tokens, kind)
    norm = of.bridge.blocks[layer].ln1.original_component
    seen = norm(stream.float()).double()
    query = seen @ plain.weight(of, layer, head, "q") + plain.bias(of, layer, head, "q")
    if via is None:
        key = seen @ plain.weight(of, layer, head, "k") + plain.bias(of, layer, head, "k")
    else:
        low = plain.embedded(of, tokens, "raw" if via[0] == 0 else embedding)
        written = plain.read(of, via[0], low) @ plain.ov(of, *via, folded=False)
        gain = plain.gain(of, of.bridge.blocks[layer].ln1)
        key = plain.centred(of, written) * gain @ plain.weight(of, layer, head, "k")
    if form.normed:
        query = query / query.square().mean(-1, keepdim=True).sqrt()
        key = key if via else key / key.square().mean(-1, keepdim=True).sqrt()
    scores = np.array([[float(q @ form.matrix.double() @ k) for k in key] for q in query])
    z = [(row[i] - row.mean()) / row.std() for i, row in enumerate(scores)]
    below = [np.mean([row[i] > other for j, other in enumerate(row) if j != i]) for i, row in enumerate(scores)]
    return np.array(z), np.array(below)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("via", [None, (0, 1)], ids=["itself", "via a head"])
def test_z_scores_are_those_of_single_pairs(family, via):
    of = model(family)
    result = matching(of, offset=[1, 2], via=via, n_tokens=12, draws=2, seed=3)
    tokens = result.data["token"].values
    for layer in result.data["layer"].values.tolist():
        form = score_forms(of, [layer], [1, 2])[layer]
        for head in range(of.n_heads):
            z, below = expected(of, layer, head, torch.tensor(tokens), "mlp0", form, via)
            got = result.data.sel(layer=layer, head=head)
            np.testing.assert_allclose(got["z_by_token"], z, atol=2e-3)
            assert float(got["z"]) == pytest.approx(z.mean(), abs=2e-3)
            assert float(got["rank_share"]) == pytest.approx(below.mean(), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_match_the_same(family, variant):
    raw, processed = (matching(variant(family, one), n_tokens=20, draws=2) for one in (False, True))
    np.testing.assert_allclose(raw.data["z_by_token"], processed.data["z_by_token"], atol=5e-3)


def test_the_planted_heads_match(planted):
    """The duplicate-token head finds the token itself; the induction heads what the previous-token head writes of it,
    and nothing in what its decoy writes."""
    found = matching(planted, embedding="raw")
    assert set(zip(*found.data["passes"].values.nonzero(), strict=True)) == {(1, 0)}
    assert float(found.data["rank_share"].sel(layer=1, head=0)) == 1
    via = matching(planted, via=(0, 2))
    assert via.data["layer"].values.tolist() == [1]
    assert via.data["passes"].values[0].tolist() == [False, False, True, True]
    assert not matching(planted, via=(0, 1)).data["passes"].any()
    assert "what L0H2 writes of it" in via.summary() and "L1H" in repr(via)


def test_random_heads_match_no_more_than_their_null():
    passes, heads = 0, 0
    for family in FAMILIES:
        result = matching(model(family), n_tokens=61, draws=60)
        passes += int(result.data["passes"].sum())
        heads += result.data["passes"].size
        # What passes lies above all turns of its keys and all other pairings of its tokens.
        assert (result.data["z"].values[result.data["passes"].values] > 0).all()
    assert passes / heads <= 0.1


def test_what_is_kept_and_what_is_refused(tmp_path):
    of = model("phi")
    result = matching(of, [1], 4, "raw", n_tokens=20, draws=5)
    made = result.to_json()
    assert made["offset"] == "at offset 4" and np.array(made["z"]).shape == (1, 4) and made["embedding"] == "raw"
    result.save(tmp_path / "matching.safetensors")
    assert MatchingResult.load(tmp_path / "matching.safetensors").to_json() == made
    for asked, says in (
        ({"via": (5, 0)}, "phi has layers 0 … 2 and heads 0 … 3"),
        ({"via": (2, 0)}, "valid: layers behind 2"),
        ({"via": (1, 0), "layers": [1, 2]}, "valid: layers behind 1"),
        ({"offset": -2}, "0 or more"),
        ({"layers": [4]}, "phi has 0 … 2"),
        ({"draws": 0}, "draws"),
    ):
        with checks_off(), pytest.raises(UserError, match=says):
            matching(of, **asked)
