"""Evaluations against loops in float64 with hooks by hand; intervals, dead features, crosscoders, files, bad input."""

import copy
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from mechinterp.errors import UserError
from mechinterp.hooked.interventions import Steer
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.evaluation import intervals, sums
from mechinterp.sae.evaluation.evaluate import HEAD, SAEEvaluation, evaluate
from mechinterp.sae.splicing.splice import Splice
from mechinterp.text import Blocks
from tests.families import full_logits, model
from tests.sae.tiny import RESID, by_hand, kept_by_hand, tiny_sae

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")


def text(n=12, length=10, n_documents=None, padded=False):
    tokens = torch.randint(0, 61, (n, length), generator=torch.Generator().manual_seed(5))
    mask = None
    if padded:
        mask = torch.arange(length)[None] >= torch.arange(n)[:, None] % 3
    return Blocks(Prompts(tokens, mask), torch.arange(n) % (n_documents or n), "random tokens")


def plain(of, sae, blocks):
    """The numbers, from full runs with one hook, in float64."""
    prompts = blocks.prompts
    reads, writes = (Site.from_hook(names[0]) for names in (sae.metadata.reads, sae.metadata.writes))
    cache = of.run_with_cache(prompts, [reads, writes])[1]
    kept = kept_by_hand(prompts, sae.metadata.exclusion.tokens)
    if not sae.metadata.exclusion.first:
        kept = prompts.real
    x, y = (cache[site].flatten(2).double() for site in (reads, writes))
    exact = tiny_double(sae)
    features, made = by_hand(exact, x)
    a, b, f = y[kept], made[kept], features[kept]
    sse, mean = (a - b).square().sum(), a.mean(0)
    found = {
        "l0": (f != 0).sum(1).double().mean(),
        "l1": f.sum(1).mean(),
        "fvu": sse / (a - mean).square().sum(),
        "explained_variance": 1 - sse / (a - mean).square().sum(),
        "mse": sse / len(a),
        "cosine": cosine_similarity(a, b).mean(),
        "relative_norm": (b.norm(dim=1) / a.norm(dim=1)).mean(),
        "dead_fraction": (f == 0).all(0).double().mean(),
        "dense_fraction": ((f != 0).double().mean(0) > 0.1).double().mean(),
        "n_tokens": len(a),
        "density": (f != 0).double().mean(0),
    }
    rank = round(float(found["l0"]))
    components = torch.linalg.svd(a - mean, full_matrices=False).Vh[:rank]
    rest = (a - mean) - (a - mean) @ components.T @ components
    found["fvu_control"] = rest.square().sum() / (a - mean).square().sum()
    name = of.hook_points[writes.hook_name].name

    def put(value):
        def hook(z, hook):
            flat = z.flatten(2)
            return torch.where(kept[..., None], value.to(flat).expand_as(flat), flat).reshape(z.shape).detach()

        return full_logits(of, prompts, [(name, hook)])

    arms = {"clean": full_logits(of, prompts, []), "spliced": put(made), "zero": put(torch.zeros(1)), "mean": put(mean)}
    losses = {arm: [] for arm in arms}
    kl = []
    for i in range(len(prompts)):
        for t in range(1, prompts.n_pos):
            if not (prompts.real[i, t - 1] and prompts.real[i, t]):
                continue
            for arm, logits in arms.items():
                losses[arm].append(float(cross_entropy(logits[i, t - 1].double(), prompts.tokens[i, t])))
            p, q = (arms[arm][i, t - 1].double().log_softmax(-1) for arm in ("clean", "spliced"))
            kl.append(float((p.exp() * (p - q)).sum()))
    ce = {arm: np.mean(values) for arm, values in losses.items()}
    found |= {f"ce_{arm}": value for arm, value in ce.items()} | {"kl": np.mean(kl)}
    for arm in ("zero", "mean"):
        found[f"ce_recovered_{arm}"] = (ce[arm] - ce["spliced"]) / (ce[arm] - ce["clean"])
    return found


def tiny_double(sae):
    return copy.deepcopy(sae).double().requires_grad_(False)


def compare(of, sae, blocks, **settings):
    got, want = evaluate(of, sae, blocks, **settings), plain(of, sae, blocks)
    made = got.to_json()
    for name, value in want.items():
        if name == "density":
            np.testing.assert_allclose(got.data["density"].values, value.numpy(), atol=1e-12)
        elif made[name] is None:  # a ratio whose denominator may be 0
            assert name.startswith("ce_recovered")
        else:
            assert made[name] == pytest.approx(float(value), rel=2e-4, abs=2e-5), name
    return got


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_against_the_plain_reference(architecture, padded):
    of = model("llama")
    compare(of, tiny_sae(of, RESID, architecture=architecture), text(padded=padded), batch=5)


@pytest.mark.parametrize("site", [Site("embed"), Site("z", 1), Site("mlp_out", 2), Site("resid_pre", 0)], ids=str)
def test_at_other_sites(site):
    of = model("gpt2")
    sae = tiny_sae_at(of, site)
    compare(of, sae, text())


def tiny_sae_at(of, site):
    if site.layer is not None:
        return tiny_sae(of, site)
    sae = tiny_sae(of, RESID)
    object.__setattr__(sae.metadata, "reads", (site.hook_name,))
    object.__setattr__(sae.metadata, "writes", (site.hook_name,))
    return sae


def test_special_tokens_are_excluded_wherever_they_stand():
    of = model("llama")
    blocks = text()
    rule = Exclusion(tokens=(int(blocks.prompts.tokens[0, 4]), int(blocks.prompts.tokens[3, 7])))
    compare(of, tiny_sae(of, RESID, exclusion=rule), blocks)


@pytest.mark.parametrize("skip", [False, True], ids=["no-skip", "skip"])
def test_a_transcoder_is_measured_at_its_target(skip):
    of = model("llama")
    sae = tiny_sae(of, Site("mlp_in", 1), Site("mlp_out", 1), skip=skip)
    got = compare(of, sae, text(), batch=4)
    assert "cossim" not in got.to_json()["saebench"] and "ce_loss_score" not in got.to_json()["saebench"]


def test_the_spliced_arm_is_the_splice():
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID)
    spliced = of(blocks.prompts, [Splice(sae, error=False)])[:, :-1].flatten(0, 1)
    want = float(cross_entropy(spliced, blocks.prompts.tokens[:, 1:].flatten()))
    assert evaluate(of, sae, blocks)["ce_spliced"] == pytest.approx(want, rel=1e-5)


def test_interventions_in_force_hold_in_every_arm():
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID)
    with of.intervene(Steer(Site("resid_pre", 2), torch.ones(of.d_model))):
        got = evaluate(of, sae, blocks)
        for arm, more in (("clean", []), ("spliced", [Splice(sae, error=False)])):
            logits = of(blocks.prompts, more)[:, :-1].flatten(0, 1)
            want = float(cross_entropy(logits, blocks.prompts.tokens[:, 1:].flatten()))
            assert got[f"ce_{arm}"] == pytest.approx(want, rel=1e-5), arm
    assert got.about["in_force"] == ["Steer at resid_pre layer 2"]
    assert evaluate(of, sae, blocks)["ce_clean"] != pytest.approx(got["ce_clean"], rel=1e-3)


def test_a_perfect_dictionary():
    """Signed unit vectors reconstruct everything: FVU 0, all loss recovered, KL 0."""
    of = model("llama")
    sae = tiny_sae(of, RESID, architecture="standard", d_sae=2 * of.d_model)
    both = torch.cat([torch.eye(of.d_model), -torch.eye(of.d_model)])
    with torch.no_grad():
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
        sae.b_enc.zero_()
    got = evaluate(of, sae, text(24)).to_json()
    assert got["fvu"] < 1e-9 and got["explained_variance"] == pytest.approx(1) and got["cosine"] == pytest.approx(1)
    assert got["kl"] == pytest.approx(0, abs=1e-5) and got["l0"] == pytest.approx(of.d_model)
    for name in ("ce_recovered_zero", "ce_recovered_mean"):
        assert got[name] is None or got[name] == pytest.approx(1, abs=1e-4)
    assert got["fvu_control"] < 1e-6, "as many components as dimensions"


def of_losses(clean, spliced, zero, mean):
    """Numbers from losses by block, two predictions a block."""
    tally, n = sums.Tally(len(clean), 8), np.full(len(clean), 2.0)
    tally.sums["n_predicted"] = torch.as_tensor(n)
    for arm, values in {"clean": clean, "spliced": spliced, "zero": zero, "mean": mean}.items():
        tally.sums[f"ce_{arm}"] = 2 * torch.as_tensor(values)
        tally.sums[f"kl_{arm}"] = torch.zeros(len(clean), dtype=torch.float64)
    numbers = intervals.Numbers(np.arange(len(clean)), 0)
    intervals.losses(tally, numbers)
    return numbers.rows


def test_recovered_loss():
    """Clean 3, spliced 3.5, zero 8, mean 5: 90% of what zero ablation costs, 75% of what mean ablation does."""
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 40))
    noise -= noise.mean(1, keepdims=True)
    rows = of_losses(*(np.array([[3.0], [3.5], [8.0], [5.0]]) + noise))
    for name, want in {"ce_recovered_zero": 0.9, "ce_recovered_mean": 0.75, "ce_spliced": 3.5}.items():
        value, low, high = rows[name]
        assert value == pytest.approx(want) and low < want < high and high - low < 0.1, name


def test_nothing_is_recovered_where_ablation_costs_nothing():
    rows = of_losses(*(np.full(40, value) for value in (6.5, 6.4, 4.1, 7.5)))
    assert np.isnan(rows["ce_recovered_zero"]).all() and rows["ce_recovered_mean"][0] == pytest.approx(1.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_autoencoder_of_another_precision(dtype):
    """Is measured in float32: the numbers are those of the same weights as float32."""
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID).to(dtype)
    want = evaluate(of, copy.deepcopy(sae).float(), blocks)
    assert evaluate(of, sae, blocks).data.identical(want.data) and sae.W_dec.dtype == dtype


def test_a_block_of_which_nothing_is_kept():
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID, exclusion=Exclusion(tokens=tuple(blocks.prompts.tokens[2].tolist())))
    one, four = (evaluate(of, sae, blocks, batch=batch) for batch in (1, 4))
    assert one.data["n_tokens"][2] == 0
    np.testing.assert_allclose(one.data["value"], four.data["value"], rtol=1e-4)


def test_the_mean_alone_explains_nothing():
    """A dictionary that says the mean: FVU 1, and the same loss as mean ablation."""
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID, architecture="standard")
    kept = kept_by_hand(blocks.prompts)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(of.run_with_cache(blocks.prompts, [RESID])[1][RESID][kept].mean(0))
    got = evaluate(of, sae, blocks).to_json()
    assert got["fvu"] == pytest.approx(1, abs=1e-5) and got["l0"] == 0 and got["dead_fraction"] == 1
    assert got["ce_spliced"] == pytest.approx(got["ce_mean"], rel=1e-5)
    assert got["fvu_control"] == pytest.approx(1) and got["control"]["rank"] == 0


def test_chunks_of_any_size_give_the_same(monkeypatch):
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID, architecture="jumprelu")
    whole = evaluate(of, sae, blocks)
    monkeypatch.setattr(sums, "PAIRS", 64 * 7)
    parts = evaluate(of, sae, blocks, batch=5)
    for name in ("value", "low", "high"):
        np.testing.assert_allclose(parts.data[name], whole.data[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(parts.data["density"], whole.data["density"])


def test_the_json():
    of = model("llama")
    sae = tiny_sae(of, RESID)
    got = evaluate(of, sae, text())
    made = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert list(made)[: len(HEAD) + 2] == [*HEAD, "n_tokens", "ci"]
    assert set(made["ci"]) >= set(HEAD) and all(len(limits) == 2 for limits in made["ci"].values())
    for name, (low, high) in made["ci"].items():
        if made[name] is not None and low is not None:
            assert low <= made[name] + 1e-12 and made[name] <= high + 1e-12, name
    more = {"dense_fraction", "cosine", "relative_norm", "mse", "outliers", "about", "saebench", "density_histogram"}
    assert more <= set(made)
    assert made["saebench"]["cossim"] == made["cosine"] and "ce_loss_score" not in made["saebench"]
    histogram = made["density_histogram"]
    assert sum(histogram["features"]) + histogram["dead"] == sae.config.d_sae
    everywhere = evaluate(of, tiny_sae(of, RESID, exclusion=Exclusion(first=False)), text()).to_json()
    assert everywhere["saebench"]["ce_loss_with_ablation"] == everywhere["ce_zero"]


def test_save_load_and_summary(tmp_path):
    of = model("llama")
    got = evaluate(of, tiny_sae(of, RESID), text())
    got.save(tmp_path / "evaluation.safetensors")
    again = SAEEvaluation.load(tmp_path / "evaluation.safetensors")
    assert again.to_json() == got.to_json() and again.summary() == got.summary()
    assert "FVU" in got.summary() and "n=108 tokens of 12 documents" in got.summary() and "\n" not in got.summary()
    assert list(got.top(3)["name"]) == ["l0", "fvu", "explained_variance"]
    with pytest.raises(UserError, match="no number 'fvus'"):
        got["fvus"]


def test_a_crosscoder_has_its_sites():
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, Site("resid_post", 0), n_sites=2, architecture="standard")
    got = evaluate(of, sae, blocks).to_json()
    cache = of.run_with_cache(blocks.prompts, ["resid_post"])[1]
    kept = kept_by_hand(blocks.prompts)
    sites = [cache["resid_post", layer][kept].double() for layer in (0, 1)]
    features, made = by_hand(tiny_double(sae), torch.cat(sites, -1))
    assert got["l0"] == pytest.approx(float((features != 0).sum(1).double().mean()), rel=1e-5)
    errors, spreads = [], []
    for number, (y, ours) in enumerate(zip(sites, got["sites"], strict=True)):
        part = made[:, number * of.d_model : (number + 1) * of.d_model]
        errors.append((y - part).square().sum())
        spreads.append((y - y.mean(0)).square().sum())
        assert ours["site"] == f"blocks.{number}.hook_resid_post" or "hook_out" in ours["site"]
        assert ours["fvu"] == pytest.approx(float(errors[-1] / spreads[-1]), rel=1e-4)
        assert ours["cosine"] == pytest.approx(float(cosine_similarity(y, part).mean()), rel=1e-4)
    assert got["fvu"] == pytest.approx(float(sum(errors) / sum(spreads)), rel=1e-4)
    for name in ("ce_clean", "ce_spliced", "ce_recovered_zero", "kl", "fvu_control"):
        assert got[name] is None and got["ci"][name] == [None, None]


# Intervals


def test_the_interval_of_fvu_covers_that_of_more_text():
    of = model("llama")
    sae = tiny_sae(of, RESID)
    truth = evaluate(of, sae, text(240))["fvu"]
    tokens, hits = text(240).prompts.tokens, 0
    for part in tokens.split(20):
        got = evaluate(of, sae, Blocks(Prompts(part), torch.arange(20), "part")).data.sel(row="fvu")
        hits += bool(got["low"] <= truth <= got["high"])
    assert hits >= 9, f"{hits} of 12 intervals hold the truth"


def test_documents_are_the_clusters():
    of = model("llama")
    sae = tiny_sae(of, RESID)
    tokens = text(8).prompts.tokens.repeat_interleave(4, 0)  # every document says the same four times
    apart = evaluate(of, sae, Blocks(Prompts(tokens), torch.arange(32), "x")).data.sel(row="l0")
    joined = evaluate(of, sae, Blocks(Prompts(tokens), torch.arange(8).repeat_interleave(4), "x")).data.sel(row="l0")
    assert float(joined["high"] - joined["low"]) > 1.5 * float(apart["high"] - apart["low"])


def test_the_jackknife_of_dead_features():
    """Against leaving out each document in turn, and against the spread over texts."""
    unit = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    feature = np.array([0, 1, 2, 0, 3, 0, 4, 5])
    dead = 4 / 10
    without = np.array([1 - len(np.unique(feature[unit != i])) / 10 for i in range(4)])
    spread = 1.96 * np.sqrt(3 / 4 * np.square(without - without.mean()).sum())
    low, high = intervals._jackknife(dead, unit, feature, 10, 4)
    assert (low, high) == pytest.approx((dead - spread, dead + spread))
    draw = np.random.default_rng(0)
    probability = draw.uniform(0, 0.15, 300)
    found, widths = [], []
    for _ in range(200):
        on = draw.random((30, 300)) < probability
        unit, feature = on.nonzero()
        dead = (~on.any(0)).mean()
        low, high = intervals._jackknife(dead, unit, feature, 300, 30)
        found.append(dead)
        widths.append((high - low) / 2 / 1.96)
    # On average the jackknife's variance is at least the true one (Efron & Stein 1981).
    assert np.std(found) < np.mean(widths) < 1.6 * np.std(found)


def test_one_block_has_no_intervals():
    of = model("llama")
    got = evaluate(of, tiny_sae(of, RESID), text(1)).to_json()
    assert got["fvu"] is not None and got["ci"]["fvu"] == [None, None] and got["ci"]["dead_fraction"] == [None, None]


def test_outliers_are_counted_and_told_apart():
    of, blocks = model("llama"), text()
    sae = tiny_sae(of, RESID, exclusion=Exclusion(outlier=1.2))
    x = of.run_with_cache(blocks.prompts, [RESID])[1][RESID][kept_by_hand(blocks.prompts)].double()
    far = x.norm(dim=1) > 1.2 * x.norm(dim=1).median()
    made = by_hand(tiny_double(sae), x)[1]
    want = (x - made)[~far].square().sum() / (x - x.mean(0))[~far].square().sum()
    got = evaluate(of, sae, blocks).to_json()["outliers"]
    assert got["n"] == int(far.sum()) > 0 and got["fvu_without"] == pytest.approx(float(want), rel=1e-4)


# Bad input


def test_bad_input():
    of = model("llama")
    sae = tiny_sae(of, RESID)
    with pytest.raises(UserError, match="was trained on llama; the model here is gpt2"):
        evaluate(model("gpt2"), sae, text())
    with pytest.raises(UserError, match="batch must be at least 1 block; found 0"):
        evaluate(of, sae, text(), batch=0)
    with pytest.raises(UserError, match="all 120 tokens of the text are excluded"):
        evaluate(of, tiny_sae(of, RESID, exclusion=Exclusion(tokens=tuple(range(61)))), text())
    with pytest.raises(UserError, match="blocks of 1 token have nothing to predict"):
        evaluate(of, sae, text(length=1))
    two = tiny_sae(of, Site("resid_post", 0), n_sites=2)
    object.__setattr__(two.metadata, "reads", two.metadata.reads[:1])
    with pytest.raises(UserError, match="the crosscoder has 2 sites of 48 dimensions together"):
        evaluate(of, two, text())
