"""Singular directions are those of the whole matrix, and their tokens those that lie furthest along them."""

import numpy as np
import pytest
import torch

from mechinterp import UserError
from mechinterp.heads import FactorsResult, factors, repeated_tokens
from mechinterp.heads.scores import score_forms
from mechinterp.hooked.sites import Site
from tests.checks import checks_off
from tests.families import FAMILIES, model
from tests.heads import plain


def frozen(of, layer, head, seed=0):
    """Mean root mean squares of a head's queries and keys behind position 0."""
    kept = {}
    names = [Site(name, layer).hook_name for name in ("q", "k")]
    keep = [(name, lambda x, hook, name=name: kept.__setitem__(name, x.detach().double())) for name in names]
    of.bridge.run_with_hooks(repeated_tokens(of, n=4, seed=seed).tokens, fwd_hooks=keep, use_cache=False)
    sizes = [kept[name][:, 1:, head * kept[name].shape[2] // of.n_heads] for name in names]
    return [size.square().mean(-1).sqrt().mean() for size in sizes]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_factors_are_the_svd_of_the_whole_matrix(family, circuit):
    of, layer, head = model(family), 1, 3
    offset = None if circuit == "ov" else 2
    result = factors(of, layer, head, circuit, offset, k=4, n_tokens=5)
    if circuit == "ov":
        matrix = plain.ov(of, layer, head)
    else:
        form = score_forms(of, [layer], offset)[layer]
        matrix = plain.qk(of, layer, head, form.matrix)
        if form.normed:
            scales = frozen(of, layer, head)
            np.testing.assert_allclose(result.about["frozen_scales"], scales, rtol=1e-4)
            matrix = matrix / (scales[0] * scales[1])
    u, singular, v = np.linalg.svd(matrix.numpy())
    np.testing.assert_allclose(result.data["singular_value"], singular[:4], rtol=1e-3)
    np.testing.assert_allclose(result.data["share"], singular[:4] ** 2 / (singular**2).sum(), rtol=2e-3)
    norm = of.bridge.blocks[layer].ln1.original_component
    gain = plain.gain(of, of.bridge.blocks[layer].ln1)
    everything = plain.embedded(of, torch.arange(of.d_vocab), "mlp0").float()
    seen = (
        ((norm(everything) - norm(torch.zeros_like(everything))) / gain).double().numpy()
    )  # the gain is in the matrix
    for i in range(4):
        left = seen @ u[:, i]
        right = seen @ v[i] if circuit == "qk" else plain.to_logits(of, torch.tensor(v[i])).numpy()
        sign = np.sign(left[np.abs(left).argmax()])
        for side, along in (("left", sign * left), ("right", sign * right)):
            one = result.data.isel(feature=i)
            order = np.argsort(-along)
            np.testing.assert_allclose(one[f"{side}_high_value"], along[order[:5]], atol=2e-3)
            np.testing.assert_allclose(one[f"{side}_low_value"], along[order[::-1][:5]], atol=2e-3)
            np.testing.assert_allclose(along[one[f"{side}_high"].values], along[order[:5]], atol=2e-3)
            np.testing.assert_allclose(along[one[f"{side}_low"].values], along[order[::-1][:5]], atol=2e-3)
            want = np.abs(along - along.mean()).max() / along.std(ddof=1)
            assert float(one[f"{side}_z"]) == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_have_the_same_factors(family, variant):
    for circuit in ("ov", "qk"):
        raw, processed = (factors(variant(family, one), 2, 1, circuit, k=3) for one in (False, True))
        np.testing.assert_allclose(raw.data["singular_value"], processed.data["singular_value"], rtol=2e-3)
        np.testing.assert_allclose(raw.data["left_high_value"], processed.data["left_high_value"], rtol=2e-2, atol=5e-3)


def test_heads_of_a_group_share_what_their_keys_read():
    """Grouped-query attention: heads 0 and 1 have one key matrix, whose span the right directions of both have."""
    of = model("llama")
    spans = []
    for head in (0, 1, 2):
        form = score_forms(of, [1], 3)[1]
        spans.append(torch.linalg.svd(plain.qk(of, 1, head, form.matrix))[2][:6])
    assert torch.linalg.svdvals(spans[0] @ spans[1].T).min() > 0.999
    assert torch.linalg.svdvals(spans[0] @ spans[2].T).min() < 0.9


def test_planted_directions_read_and_write_letters(planted):
    result = factors(planted, 1, 2, "ov", k=3, embedding="raw")
    for i in range(3):
        assert result.texts(i, "left_high")[0] == result.texts(i, "right_high")[0]
        assert float(result.data["left_z"][i]) > result.about["left_control"]
    silent = factors(planted, 0, 2, "ov", k=3)
    assert float(silent.data["right_z"].max()) == 0, "the previous-token head writes nothing that the logits read"


def test_random_directions_lie_within_the_control():
    """Weights that are random: few directions have a token further out than 95% of random directions."""
    beyond, directions = 0, 0
    for family in FAMILIES:
        for head in range(4):
            result = factors(model(family), 2, head, "ov", k=6)
            for side in ("left", "right"):
                beyond += int((result.data[f"{side}_z"] > result.about[f"{side}_control"]).sum())
                directions += 6
    assert beyond / directions < 0.12


def test_what_is_kept_and_what_is_refused(tmp_path):
    of = model("qwen3")
    result = factors(of, -1, 2, "qk", k=2, n_tokens=4)
    made = result.to_json()
    assert made["head"] == "L2H2" and len(made["left_high_text"]) == 2 and len(made["left_high_text"][0]) == 4
    assert made["offset"] == "mean over 15 offsets, 1 … 15" and len(made["frozen_scales"]) == 2 and "texts" not in made
    assert (
        "matches queries" in result.summary() and "singular_value" in repr(result) and "<table" in result._repr_html_()
    )
    result.save(tmp_path / "factors.safetensors")
    assert FactorsResult.load(tmp_path / "factors.safetensors").to_json() == made
    for asked, says in (
        ({"head": 4}, "head 0 … 3"),
        ({"layer": 7}, "qwen3 has 0 … 2"),
        ({"circuit": "vo"}, "unknown circuit 'vo'; valid: ov, qk"),
        ({"offset": 2}, "OV does not depend on an offset"),
        ({"k": 0}, "k ≥ 1"),
        ({"embedding": "wte"}, "unknown embedding 'wte'; valid: mlp0, raw"),
    ):
        with checks_off(), pytest.raises(UserError, match=says):
            factors(of, **({"layer": 1, "head": 0} | asked))
