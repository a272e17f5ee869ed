"""Descriptions of features: the search against a dense brute force, the draws, the counts, and what is written."""

import json

import numpy as np
import pytest
import torch

from mechinterp import Prompts, Site, UserError
from mechinterp.hooked import weights
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.features import reading
from mechinterp.sae.features.contexts import LOWEST, PER_OCTAVE, Batch, Draw, Window
from mechinterp.sae.features.describe import Features, describe
from mechinterp.text import Blocks
from tests.families import FAMILIES, model
from tests.sae.tiny import by_hand, tiny_sae

RESID = Site("resid_post", 1)


def text(n=40, length=12, documents=9, seed=0, vocabulary=61):
    """Blocks of random tokens; common ones are commoner."""
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.rand(n, length, generator=draw) ** 2 * vocabulary).long()
    return Blocks(Prompts(rows), torch.arange(n) * documents // n, "random tokens")


def dense(of, sae, site, blocks):
    """`[block pos feature]`, 0 where a position is excluded, and `[block pos]` which are kept."""
    _, cache = of.run_with_cache(blocks.prompts, [site])
    features, _ = by_hand(sae, cache[site].flatten(2))
    kept = sae.metadata.exclusion.mask(blocks.prompts.tokens, blocks.prompts.real)
    return features.detach() * kept[..., None], kept


def small_batches(monkeypatch):
    """Text in many batches, so that what is kept has to be merged."""
    monkeypatch.setattr("mechinterp.sae.features.reading.BATCH_TOKENS", 36)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_top_contexts_are_those_of_a_dense_search(family, architecture, monkeypatch):
    small_batches(monkeypatch)
    of, blocks = model(family), text()
    sae = tiny_sae(of, RESID, architecture=architecture, d_sae=40, exclusion=Exclusion(tokens=(3, 11)))
    found = describe(of, sae, blocks, range(40), n_contexts=5, window=8)
    acts, kept = dense(of, sae, RESID, blocks)
    for feature in range(40):
        best = []
        for document in range(9):
            inside = torch.where(blocks.document[:, None] == document, acts[..., feature], 0)
            if inside.max() > 0:
                block, pos = divmod(int(inside.argmax()), acts.shape[1])
                best.append((float(inside.max()), document, block, pos))
        rows = found.contexts(feature)
        best = sorted(best, reverse=True)[:5]
        assert [(row["document"], row["block"], row["position"]) for row in rows] == [one[1:] for one in best]
        assert [row["peak"] for row in rows] == pytest.approx([one[0] for one in best], rel=1e-4)
        for row in rows:
            low, high = max(0, row["position"] - 6), min(12, row["position"] + 2)
            assert row["tokens"] == [str(int(one)) for one in blocks.prompts.tokens[row["block"], low:high]]
            shown = acts[row["block"], low:high, feature].masked_fill(~kept[row["block"], low:high], torch.nan)
            values = np.array(row["activations"], dtype=float)
            np.testing.assert_allclose(values, shown.numpy(), rtol=1e-3, atol=1e-4)
            assert row["at"] == row["position"] - low


def test_sums_are_those_of_a_dense_run(monkeypatch):
    small_batches(monkeypatch)
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID, d_sae=40)
    data = describe(of, sae, blocks, range(40)).data
    acts, kept = dense(of, sae, RESID, blocks)
    flat, on = acts[kept], acts > 0
    assert data["density"].values == pytest.approx((flat > 0).double().mean(0).numpy())
    assert data["n_on"].values.tolist() == on.sum((0, 1)).tolist()
    by_document = torch.stack([on[blocks.document == i].flatten(0, 1).any(0) for i in range(9)])
    assert data["n_documents"].values.tolist() == by_document.sum(0).tolist()
    there = data["n_on"].values > 0
    mean = (flat.sum(0) / (flat > 0).sum(0)).numpy()
    assert data["mean"].values[there] == pytest.approx(mean[there], rel=1e-4)
    assert data["largest"].values[there] == pytest.approx(flat.amax(0).numpy()[there], rel=1e-4)
    assert np.isnan(data["mean"].values[~there]).all() and np.isnan(data["largest"].values[~there]).all()
    feature = int(data["n_on"].values.argmax())
    values = flat[:, feature][flat[:, feature] > 0]
    edges = 2.0 ** (np.arange(LOWEST, LOWEST + data.sizes["bin"] + 1) / PER_OCTAVE)
    assert data["histogram"][feature].values.tolist() == np.histogram(values.numpy(), edges)[0].tolist()
    low, high = data["density_low"].values, data["density_high"].values
    assert (low <= data["density"]).all() and (high >= data["density"]).all() and (high > low)[there].any()


def test_tokens_that_a_feature_is_on_at():
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID, d_sae=40)
    found = describe(of, sae, blocks, range(40))
    acts, kept = dense(of, sae, RESID, blocks)
    tokens = blocks.prompts.tokens
    feature = int(found.data["n_on"].values.argmax())
    mass = torch.zeros(61).index_add_(0, tokens.flatten(), acts[..., feature].flatten())
    order = mass.sort(descending=True)
    row = found.one(feature)
    assert [one["token"] for one in row["tokens"]] == [str(int(one)) for one in order.indices[:5]]
    assert [one["share"] for one in row["tokens"]] == pytest.approx((order.values[:5] / mass.sum()).tolist(), rel=1e-4)
    first = int(order.indices[0])
    rate = float(((acts[..., feature] > 0) & (tokens == first)).sum() / ((tokens == first) & kept).sum())
    assert row["tokens"][0]["rate"] == pytest.approx(rate)


def test_a_token_feature_stands_out_from_a_random_one():
    """A feature that copies one token's indicator has the share 1; its null is far below."""
    of, blocks = model("llama"), text(n=80)
    site = Site("resid_pre", 0)
    sae = tiny_sae(of, site, architecture="standard", d_sae=12)
    embedding = of.bridge.embed.W_E.detach()
    token = int(embedding.norm(dim=1).argmax())  # none reads more along its own embedding than it does itself
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc[0] = embedding[token]
        reads = embedding @ embedding[token]
        sae.b_enc[0] = -(reads[torch.arange(61) != token].max() + reads[token]) / 2
    data = describe(of, sae, blocks, range(12)).data
    assert int(data["on_for"][0, 0]) == token
    assert float(data["on_for_share"][0, 0]) == 1 and float(data["on_for_rate"][0, 0]) == 1
    assert float(data["random_token_share"][0]) < 0.5


def test_excluded_positions_are_never_on():
    of, blocks = model("gpt2"), text()
    sae = tiny_sae(of, RESID, architecture="standard", d_sae=40, exclusion=Exclusion(tokens=(0, 1, 2, 3)))
    found = describe(of, sae, blocks, range(40), window=12)
    for feature in range(40):
        for row in [*found.contexts(feature), *found.contexts(feature, "example")]:
            assert row["position"] > 0 and int(row["tokens"][row["at"]]) > 3
            for token, value in zip(row["tokens"], row["activations"], strict=True):
                assert value is None or int(token) > 3
        assert not {"0", "1", "2", "3"} & {one["token"] for one in found.one(feature)["tokens"]}
    kept = sae.metadata.exclusion.mask(blocks.prompts.tokens, blocks.prompts.real)
    assert found.about["n_tokens"] == int(kept.sum()) and found.about["n_excluded"] == int((~kept).sum())


def test_outliers_are_left_out():
    of, blocks = model("llama"), text()
    plain = describe(of, tiny_sae(of, RESID), blocks, [0])
    cut = describe(of, tiny_sae(of, RESID, exclusion=Exclusion(outlier=1.05)), blocks, [0])
    assert cut.about["n_excluded"] > plain.about["n_excluded"]


def test_outliers_are_judged_by_the_first_batch_that_keeps_a_position(monkeypatch):
    of, blocks = model("llama"), text()
    first = tuple(blocks.prompts.tokens[0].tolist())
    monkeypatch.setattr(reading, "BATCH_TOKENS", blocks.prompts.n_pos)  # one block a batch
    found = describe(of, tiny_sae(of, RESID, exclusion=Exclusion(tokens=first, outlier=3.0)), blocks, [0])
    plain = describe(of, tiny_sae(of, RESID, exclusion=Exclusion(tokens=first)), blocks, [0])
    assert 0.9 * plain.about["n_tokens"] < found.about["n_tokens"]


def test_examples_are_a_uniform_draw_of_the_positions_that_are_on():
    """Ten positions are on; each must be drawn equally often, whatever its activation and its batch."""
    seen = np.zeros(10)
    for seed in range(400):
        draw = Draw(1, 3, Window.of(4), seed)
        for first in (0, 1):
            values = torch.arange(1.0, 6.0).reshape(1, 1, 5) + 5 * first
            real = torch.ones(1, 5, dtype=torch.bool)
            draw.add(
                Batch(values, torch.zeros(1, 5, dtype=torch.long), real, real, torch.zeros(1, dtype=torch.long), first)
            )
        assert len(set(draw.fields["peak"][0].tolist())) == 3
        for peak in draw.fields["peak"][0].tolist():
            seen[round(peak) - 1] += 1
    assert seen.sum() == 1200 and ((seen - 120) ** 2 / 120).sum() < 27.9  # χ² of 9 degrees at p = .001


def test_examples_are_in_their_quarter():
    of, blocks = model("llama"), text(n=20)
    sae = tiny_sae(of, RESID, architecture="standard", d_sae=10)
    found = describe(of, sae, blocks, range(10), n_examples=2)
    acts, _ = dense(of, sae, RESID, blocks)
    checked = 0
    for feature in range(10):
        values = acts[..., feature][acts[..., feature] > 0]
        if not 8 <= len(values) <= 64:  # with more, quarters are estimated from the draw
            continue
        checked += 1
        rows = found.contexts(feature, "example")
        assert [row["band"] for row in rows] == [3, 3, 2, 2, 1, 1, 0, 0]
        for row in rows:
            below = float((values < row["peak"] * (1 - 1e-5)).double().mean())
            assert row["band"] / 4 - 1 / len(values) <= below <= (row["band"] + 1) / 4
    assert checked


def test_batches_do_not_matter(monkeypatch):
    of, blocks = model("qwen3"), text()
    sae = tiny_sae(of, RESID)
    whole = describe(of, sae, blocks, 8)
    small_batches(monkeypatch)
    parts = describe(of, sae, blocks, 8)
    for name in whole.data.data_vars:
        a, b = whole.data[name].values, parts.data[name].values
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=str(name))


def test_the_choice():
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID, d_sae=60)
    with torch.no_grad():
        sae.b_enc[40:] = -1e4  # dead
    found = describe(of, sae, blocks, 20)
    total = dense(of, sae, RESID, blocks)[0].sum((0, 1))
    numbers = found.data["feature"].values
    assert set(numbers[:10]) == set(total.topk(10).indices.tolist())  # all 40 blocks are the pilot
    drawn = numbers[10:]
    assert found.data["drawn"].values.tolist() == [False] * 10 + [True] * 10
    assert len(set(numbers)) == 20 and (drawn < 40).all() and (found.data["n_on"] > 0).all()
    assert found.about["never_on"] > 0 and found.about["n_drawn_at_random"] == 40
    assert describe(of, sae, blocks, 20, seed=1).data["feature"].values[10:].tolist() != drawn.tolist()
    given = describe(of, sae, blocks, [50, 3])
    assert given.data["feature"].values.tolist() == [50, 3] and given.contexts(50) == []
    assert int(given.data["n_on"][0]) == 0 and given.one(50)["mean"] is None
    json.dumps(given.to_json(), allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["resid_post", "mlp_out", "attn_out", "z"])
def test_logit_effects_are_those_of_adding_the_row(family, name):
    """Adding a decoder row behind the last block moves the logits as the effects say, the norm's scale held."""
    of, blocks = model(family), text(n=4)
    last = of.n_layers - 1
    site = Site(name, last)
    if site not in of.site_list:
        pytest.skip(f"{family} has no {name}")
    sae = tiny_sae(of, site, architecture="standard", d_sae=8)
    data = describe(of, sae, blocks, [2]).data
    row = sae.W_dec.detach()[2] * float(data["mean"][0])
    scales = [Site("ln_final_scale")]
    if name == "z":
        row = row @ weights.head_out(of, last)[0].flatten(0, 1)
        behind = weights.post_norm(of, last)
        scales += [behind[1]] if behind else []
    _, cache = of.run_with_cache(blocks.prompts, scales)
    kept = sae.metadata.exclusion.mask(blocks.prompts.tokens, blocks.prompts.real)
    scale = lambda one: cache[one].flatten(2)[..., 0][kept].median()  # noqa: E731
    if name == "z" and len(scales) > 1:
        row = behind[0].linear(row, scale(scales[1]))
    by_hand = weights.final_norm(of).linear(row, scale(scales[0])) @ weights.unembedding(of)[0]
    by_hand = by_hand - by_hand.mean()
    assert data["promoted"][0].values.tolist() == by_hand.topk(10).indices.tolist()
    assert data["promoted_logit"][0].values == pytest.approx(by_hand.topk(10).values.numpy(), rel=1e-3)
    assert data["suppressed_logit"][0].values == pytest.approx((-by_hand).topk(10).values.neg().numpy(), rel=1e-3)


def test_a_written_token_beats_a_random_direction():
    of, blocks = model("llama"), text(n=4)
    sae = tiny_sae(of, RESID, architecture="standard", d_sae=8)
    with torch.no_grad():
        sae.W_dec[2] = weights.final_norm(of).fold(weights.unembedding(of)[0])[:, 17]
    data = describe(of, sae, blocks, [2]).data
    assert int(data["promoted"][0, 0]) == 17 and float(data["promoted_logit"][0, 0]) > float(data["random_logit"][0])


def test_sites_without_a_direct_effect_have_no_logits():
    of, blocks = model("llama"), text(n=4)
    found = describe(of, tiny_sae(of, Site("mlp_post", 1)), blocks, [0, 1])
    assert "promoted" not in found.data and "mlp_post" in found.about["no_logits"]
    assert found.one(0).get("promoted") is None
    wide = describe(of, tiny_sae(of, Site("resid_post", 0), n_sites=2), blocks, [0])
    assert wide.about["no_logits"] == "it writes 2 sites" and wide.about["n_tokens"] == 44


def test_transcoders_write_elsewhere():
    of, blocks = model("llama"), text(n=4)
    found = describe(of, tiny_sae(of, Site("resid_mid", 1), Site("mlp_out", 1), skip=True), blocks, 6)
    assert "promoted" in found.data and np.isnan(found.data["encoder_cosine"].values).all()


def test_neighbours_are_the_nearest_rows():
    of, blocks = model("llama"), text(n=4)
    sae = tiny_sae(of, RESID, d_sae=40)
    with torch.no_grad():
        sae.W_dec[7] = 3 * sae.W_dec[4]
    data = describe(of, sae, blocks, [4, 9]).data
    assert int(data["near"][0, 0]) == 7 and float(data["near_cosine"][0, 0]) == pytest.approx(1, abs=1e-5)
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = (unit @ unit[9]).masked_fill(torch.arange(40) == 9, -1)
    assert data["near"][1].values.tolist() == cosine.topk(6).indices.tolist()
    own = torch.nn.functional.cosine_similarity(sae.W_enc[4], sae.W_dec[4], dim=0).detach()
    assert float(data["encoder_cosine"][0]) == pytest.approx(float(own), abs=1e-5)


def test_saved_and_shown(tmp_path):
    of, blocks = model("llama"), text()
    found = describe(of, tiny_sae(of, RESID), blocks, 10)
    found.save(tmp_path / "features.safetensors")
    again = Features.load(tmp_path / "features.safetensors")
    assert again.data.identical(found.data) or again.to_json() == found.to_json()
    assert repr(again) == repr(found) and "<table" in found._repr_html_()
    assert len(found.top(3)) == 3 and {"feature", "density", "tokens", "promotes"} <= set(found.top(3).columns)
    assert "10 of 64 features" in found.summary()
    with pytest.raises(UserError, match="feature 99 is not among the 10"):
        found.one(99)
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"features": [64]}, "0 … 63; found 64"),
        ({"features": [-1]}, "found -1"),
        ({"features": [1, 1]}, "some twice"),
        ({"features": []}, "found none"),
        ({"features": 0}, "at least one feature"),
        ({"window": 0}, "window must be at least 1"),
        ({"n_contexts": 0}, "n_contexts must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(arguments, says):
    of = model("llama")
    with pytest.raises(UserError, match=says):
        describe(of, tiny_sae(of, RESID), text(n=4), **arguments)


def test_an_autoencoder_of_another_model_or_of_nothing():
    of, blocks = model("llama"), text(n=4)
    sae = tiny_sae(of, RESID)
    with pytest.raises(UserError, match="every position of the 4 blocks is excluded"):
        describe(of, tiny_sae(of, RESID, exclusion=Exclusion(tokens=tuple(range(61)))), blocks, [0])
    with pytest.raises(UserError, match="trained on llama; the model here is gpt2"):
        describe(model("gpt2"), sae, blocks, [0])
    with pytest.raises(UserError, match="0 … 63; found 64"):
        describe(of, sae, blocks, np.array([3, 64]))
    sae.metadata = type(sae.metadata)()
    with pytest.raises(UserError, match="does not say which site"):
        describe(of, sae, blocks, [0])
    sae.metadata = type(sae.metadata)(reads=(Site("mlp_post", 1).hook_name,))
    with pytest.raises(UserError, match="reads 24 numbers"):
        describe(of, sae, blocks, [0])
