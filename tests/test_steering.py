"""Steering: a vector is a difference of means, a sweep is the model steered, strength 0 is the model itself."""

import json

import numpy as np
import pytest
import torch

from mechinterp import Apply, Patch, Prompts, Site, Steer, UserError, Zero, evaluate, load, steering
from mechinterp.metrics import LogitDiff
from mechinterp.steering import SteeringResult, SteeringVector, strengths
from mechinterp.text import Blocks
from tests.families import FAMILIES, full_logits, model, pairs

CASES = [(family, padded) for family in FAMILIES for padded in (False, True)]
each_family = pytest.mark.parametrize(
    "family, padded", CASES, ids=[f"{f}-{'padded' if p else 'even'}" for f, p in CASES]
)


def captured(of, prompts, site):
    kept = {}
    full_logits(of, prompts, [(site.hook_name, lambda x, hook: kept.__setitem__("it", x.clone()))])
    return kept["it"]


def unrelated(of, n=3, padded=False):
    ids = torch.randint(0, of.d_vocab, (n, 7), generator=torch.Generator().manual_seed(9)).tolist()
    prompts = Prompts.from_lists([row[i if padded else 0 :] for i, row in enumerate(ids)])
    return Blocks(prompts, torch.arange(n), "random tokens")


# The vector


@each_family
def test_a_vector_is_a_difference_of_means(family, padded):
    of = model(family)
    task = pairs(of, padded)
    for site in (Site("resid_post", 1), Site("z", 2), Site("mlp_post", 1)):
        a, b = captured(of, task.clean, site), captured(of, task.corrupted, site)
        last = steering.vector(of, task.clean, task.corrupted, site)
        torch.testing.assert_close(last.direction, a[:, -1].mean(0) - b[:, -1].mean(0), atol=1e-5, rtol=1e-4)
        every = steering.vector(of, task.clean, task.corrupted, site, "all")
        means = []
        for x, prompts in ((a, task.clean), (b, task.corrupted)):
            each = [x[i, int(prompts.padding[i]) + 1 :].mean(0) for i in range(len(task))]  # without the first token
            means.append(torch.stack(each).mean(0))
        torch.testing.assert_close(every.direction, means[0] - means[1], atol=1e-5, rtol=1e-4)
        role = steering.vector(of, task.clean, task.corrupted, (site.name, site.layer), "A")
        at = task.clean.roles["A"]
        want = (a - b)[torch.arange(len(task)), at].mean(0)
        torch.testing.assert_close(role.direction, want, atol=1e-5, rtol=1e-4)
        back = steering.vector(of, task.corrupted, task.clean, site)
        torch.testing.assert_close(back.direction, -last.direction)
        assert last.norm == pytest.approx(float(last.direction.norm())) and last.norm > 0


@each_family
def test_the_difference_of_two_runs_is_a_patch(family, padded):
    """Steering by the whole difference, at one site and all positions, gives the other run's activation."""
    of = model(family)
    task = pairs(of, padded)
    for name, layer in (("resid_post", 0), ("resid_pre", 1), ("mlp_out", 1), ("z", 1)):
        site = Site(name, layer)
        difference = captured(of, task.clean, site) - captured(of, task.corrupted, site)
        steered = of(task.corrupted, [Steer(site, difference)])
        patched = of(task.corrupted, [Patch(site, task.clean)])
        real = task.clean.real
        torch.testing.assert_close(steered[real], patched[real], atol=1e-4, rtol=1e-4)
        assert (patched - of(task.corrupted))[:, -1].abs().max() > 1e-2


@each_family
def test_the_vector_of_one_pair_at_the_last_token_is_a_patch_there(family, padded):
    of = model(family)
    task = pairs(of, padded)
    for i in range(2):
        one = task.take(torch.tensor([i]))
        made = steering.vector(of, one.clean, one.corrupted, ("resid_post", 1))
        steered = of(one.corrupted, [made.at(1.0, positions=-1)])
        patched = of(one.corrupted, [Patch(Site("resid_post", 1), one.clean, positions=-1)])
        torch.testing.assert_close(steered[:, -1], patched[:, -1], atol=1e-4, rtol=1e-4)
        assert (patched - of(one.corrupted))[:, -1].abs().max() > 1e-3


def test_a_vector_of_heads_is_nothing_elsewhere():
    of = model("llama")
    task = pairs(of, True)
    whole = steering.vector(of, task.clean, task.corrupted, Site("z", 1))
    for heads in (2, (0, 3)):
        some = steering.vector(of, task.clean, task.corrupted, Site("z", -2, head=heads))
        kept = [heads] if isinstance(heads, int) else list(heads)
        rest = [head for head in range(4) if head not in kept]
        assert torch.equal(some.direction[kept], whole.direction[kept]) and not some.direction[rest].any()
        assert not some.random(1).direction[rest].any() and some.random(1).norm == pytest.approx(some.norm, rel=1e-5)
        assert some.site == Site("z", 1, head=heads)


def test_a_vector_under_interventions_in_force():
    of = model("gpt2")
    task = pairs(of, True)
    with of.intervene(Zero(Site("mlp_out", 1))):
        made = steering.vector(of, task.clean, task.corrupted, ("mlp_out", 0))
        with pytest.raises(UserError, match="same mean at mlp_out layer 1: there is nothing to steer with"):
            steering.vector(of, task.clean, task.corrupted, ("mlp_out", 1))
    assert made.about["in_force"] == ["Zero at mlp_out layer 1"]


def test_halves_agree_where_there_is_a_direction():
    """By chance the directions of two halves are unrelated; a real difference is found by both."""
    of = model("llama")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, of.d_vocab, (80, 6), generator=draw)
    random = steering.vector(of, tokens[:40], tokens[40:], ("resid_pre", 0)).about["halves_cosine"]
    ends = tokens.clone()
    ends[:40, -1], ends[40:, -1] = 3, 5
    real = steering.vector(of, ends[:40], ends[40:], ("resid_pre", 0)).about["halves_cosine"]
    assert abs(random) < 0.5 and real == pytest.approx(1, abs=1e-4)  # all of them end in the same two tokens
    assert steering.vector(of, tokens[:1], tokens[40:], ("resid_post", 1)).about["halves_cosine"] is None


def test_a_vector_on_disk(tmp_path):
    of = model("llama")
    task = pairs(of, True)
    for site in (Site("resid_post", 1), Site("z", 2, head=(0, 3))):
        made = steering.vector(of, task.clean, task.corrupted, site)
        made.save(tmp_path / "it.safetensors")
        again = SteeringVector.load(tmp_path / "it.safetensors")
        assert torch.equal(again.direction, made.direction) and again.site == made.site
        assert again.about == made.about and again.about["n_positive"] == 4
    assert "from 4 and 4 prompts" in repr(again)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read a steering vector from"):
        SteeringVector.load(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="cannot read a steering vector from"):
        SteeringVector.load(tmp_path / "none.safetensors")
    of.run_with_cache(task.clean, "embed")[1].save(tmp_path / "cache.safetensors")
    with pytest.raises(UserError, match=r"no vector that `SteeringVector\.save` wrote"):
        SteeringVector.load(tmp_path / "cache.safetensors")


# The sweep


def small(of, task, site=("resid_post", 1), **settings):
    made = steering.vector(of, task.clean, task.corrupted, site)
    settings = {"strengths": (-1.5, 0.5, 3), "draws": 2, "unrelated": unrelated(of), "progress": False} | settings
    return made, steering.sweep(of, made, task, **settings)


@each_family
def test_a_sweep_is_the_model_steered(family, padded):
    """Of the vector and of the random directions, at every strength, by raw hooks; and so is the KL."""
    of = model(family)
    task, text = pairs(of, padded), unrelated(of, padded=padded)
    site = Site("resid_post", 1)
    made, result = small(of, task, unrelated=text, seed=4)
    rows = torch.arange(len(task))
    seeds = np.random.SeedSequence(4).generate_state(2).tolist()
    directions = [made.direction, *[made.random(one).direction for one in seeds]]
    assert list(result.data["strength"].values) == [-1.5, 0.0, 0.5, 3.0]
    was = full_logits(of, text.prompts, []).log_softmax(-1)
    for number, direction in enumerate(directions):
        for factor in result.data["strength"].values:
            hook = (site.hook_name, lambda x, hook, add=float(factor) * direction: x + add)
            logits = full_logits(of, task.clean, [hook])[:, -1]
            want = logits[rows, task.answers.answer[:, 0, 0]] - logits[rows, task.answers.wrong[:, 0, 0]]
            at = result.data["steered"] if number == 0 else result.data["random"][number - 1]
            np.testing.assert_allclose(at.sel(strength=factor), want, atol=1e-4)
            if number == 0:
                now = full_logits(of, text.prompts, [hook]).log_softmax(-1)
                kl = (was.exp() * (was - now)).sum(-1)
                kl = [kl[i][text.prompts.real[i]].mean() for i in range(len(text))]
                np.testing.assert_allclose(result.data["kl"].sel(strength=factor), np.mean(kl), atol=1e-5)
    assert abs(result.data["change"].sel(strength=3.0)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_positions_and_metrics_are_those_of_single_runs(family):
    of = model(family)
    task = pairs(of, True)
    for site, positions, metric in [
        (Site("mlp_out", 0), -1, "prob"),
        (Site("z", 1, head=1), "A", "logprob"),
        (Site("k_input", 1), ["A", "END"], "kl"),
        (Site("v", 2), None, LogitDiff()),
    ]:
        made, result = small(of, task, site, positions=positions, metric=metric)
        for factor in (-1.5, 3.0):
            with of.intervene(made.at(factor, positions)):
                want = evaluate(of, task, "logit-diff" if metric == "kl" else metric)
                steered = full_logits(of, task.clean, [])[:, -1].log_softmax(-1) if metric == "kl" else None
            if metric == "kl":
                with of.intervene(made.at(factor, positions)):
                    steered = of(task.clean)[:, -1].log_softmax(-1)
                was = of(task.clean)[:, -1].log_softmax(-1)
                want = (was.exp() * (was - steered)).sum(-1)
            np.testing.assert_allclose(result.data["steered"].sel(strength=factor), want, atol=1e-4)


def test_strength_0_changes_nothing_exactly():
    for family in FAMILIES:
        of = model(family)
        task = pairs(of, True)
        made, result = small(of, task)
        with of.intervene(made.at(0.0)):
            assert torch.equal(of(task.clean), full_logits(of, task.clean, []))
        zero = result.data.sel(strength=0.0)
        for name in (
            "change",
            "change_low",
            "change_high",
            "control",
            "control_low",
            "control_high",
            "kl",
            "kl_control",
        ):
            assert float(zero[name]) == 0, name
        assert (result.data["random"].sel(strength=0.0) == zero["steered"]).all()
        assert not bool(zero["passes"])
        np.testing.assert_allclose(zero["steered"], evaluate(of, task), atol=1e-5)


def test_interventions_in_force_are_in_every_run():
    of = model("llama")
    task = pairs(of, True)
    made, _ = small(of, task)
    for other in (Zero(Site("mlp_out", 2)), Apply(Site("resid_post", 2), lambda x, site: 0.5 * x)):
        with of.intervene(other):
            result = steering.sweep(of, made, task, strengths=[2], draws=1, unrelated=unrelated(of), progress=False)
            with of.intervene(made.at(2.0)):
                want = evaluate(of, task)
        np.testing.assert_allclose(result.data["steered"].sel(strength=2.0), want, atol=1e-4)
        assert len(result.about["in_force"]) == 1


def test_plain_prompts_with_a_function():
    of = model("qwen3")
    task = pairs(of, True)
    made, named = small(of, task, metric="prob")
    rows, answer = torch.arange(4), task.answers.answer[:, 0, 0]
    seen = []

    def function(logits):
        seen.append(tuple(logits.shape))
        return logits[rows, -1].softmax(-1)[rows, answer]

    plain = steering.sweep(
        of, made, task.clean, function, (-1.5, 0.5, 3), draws=2, unrelated=unrelated(of), progress=False
    )
    np.testing.assert_allclose(plain.data["steered"], named.data["steered"], atol=1e-5)
    np.testing.assert_allclose(plain.data["random"], named.data["random"], atol=1e-5)
    assert set(seen) == {(4, task.clean.n_pos, of.d_vocab)}, "it sees every prompt and position"


def test_the_vector_that_the_answer_reads_passes_and_a_random_one_does_not():
    """Steering the last layer along an answer's own direction raises its logit; a random vector is one of many."""
    of = model("llama")
    task = pairs(of, True, n=12)
    target = torch.tensor([int(task.answers.answer[0, 0, 0])])
    answers = torch.full_like(task.answers.answer, int(target))
    task = type(task)(**{**vars(task), "answers": type(task.answers)(**{**vars(task.answers), "answer": answers})})
    unembedding = of.bridge.unembed.original_component.weight[target[0]].detach().clone()
    good = SteeringVector(Site("resid_post", 2), unembedding)
    bad = good.random(123)
    passed = {}
    for name, made in (("good", good), ("bad", bad)):
        scale = 5 / made.norm
        result = steering.sweep(
            of, made, task, "logprob", [-scale, scale], draws=19, unrelated=unrelated(of), progress=False
        )
        passed[name] = result.data["passes"].values.tolist()
    assert passed["good"][2] is True and passed["good"][1] is False and not any(passed["bad"])


def test_what_passes():
    """Beyond every random direction, with an interval on one side of 0."""
    rng = np.random.default_rng(0)
    factors, n = [0.0, 1.0, 2.0], 20
    noise = 0.1 * rng.normal(size=n)
    base = rng.normal(size=n)
    vector = np.stack([base, base + 0.5 + noise, base + noise])  # a real change, and none
    random = np.stack([np.stack([base, base + a, base + b]) for a, b in ((0.2, 0.0), (-0.4, 0.0))])
    values = np.concatenate([vector[None], random])
    kl = np.zeros((3, 3, 8))
    kl[:, 1:] = [[[0.2], [0.4]], [[0.1], [0.1]], [[0.3], [0.3]]]
    arrays = {k: v for k, (_, v) in strengths._statistics(values, kl, factors, None, np.arange(8), 0).items()}
    assert arrays["passes"].tolist() == [False, True, False]
    np.testing.assert_allclose(arrays["change"], [0, 0.5 + noise.mean(), noise.mean()])
    np.testing.assert_allclose(arrays["mean"] - arrays["change"], base.mean())
    np.testing.assert_allclose(arrays["control"], [0, -0.1, 0], atol=1e-12)
    np.testing.assert_allclose(arrays["control_low"], [0, -0.4, 0], atol=1e-12)
    np.testing.assert_allclose(arrays["control_high"], [0, 0.2, 0], atol=1e-12)
    np.testing.assert_allclose(arrays["kl"], [0, 0.2, 0.4])
    np.testing.assert_allclose(arrays["kl_control"], [0, 0.2, 0.2])
    stronger = np.concatenate([values, np.stack([base, base - 0.9, base])[None]])
    arrays = strengths._statistics(stronger, kl, factors, None, np.arange(8), 0)
    assert not arrays["passes"][1].any(), "one random direction moves it further"


def test_the_result(tmp_path):
    of = model("llama")
    made, result = small(of, pairs(of, True, n=9))
    assert isinstance(result, SteeringResult)
    data = result.data
    assert data["steered"].dims == ("strength", "prompt") and data["random"].shape == (2, 4, 9)
    assert (data["ci_low"] <= data["mean"]).all() and (data["mean"] <= data["ci_high"]).all()
    text = result.summary()
    assert "resid_post layer 1: strength" in text and "n=9" in text and "2 random directions" in text
    assert result.best in (-1.5, 0.5, 3.0)
    assert len(result.top()) == 4 and "passes" in result.top().columns
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["strengths"] == [-1.5, 0.0, 0.5, 3.0] and len(plain["steered"]) == 4 and plain["norm"] == made.norm
    assert plain["vector"]["n_positive"] == 9 and plain["metric"] == "logit-diff" and len(plain["control"]) == 4
    assert plain["control_directions"] == "2 random directions of the same norm, all beaten by luck in 1 of 3 cases"
    result.save(tmp_path / "it.safetensors")
    assert SteeringResult.load(tmp_path / "it.safetensors").data.identical(data)
    _, again = small(of, pairs(of, True, n=9))
    assert again.data.identical(data)


# Words


def test_probes_and_unrelated_text_of_a_model_with_words():
    of = load("planted-induction", device="cpu")
    task = steering.probes(of, ["a b c a", "d e d"], ["b", "e"], ["c"])
    assert task.clean.tokens[0].tolist() == of.encode("a b c a") and task.clean.mask is not None
    logits = of(task.clean)[:, -1]
    b, e, c = (of.encode(word)[0] for word in "bec")
    torch.testing.assert_close(evaluate(of, task), (logits[:, b] + logits[:, e]) / 2 - logits[:, c], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"words of one token on both sides; 'b c' is 'b' \| 'c'"):
        steering.probes(of, ["a"], ["b c"], ["d"])
    for empty in (([], ["b"], ["c"]), (["a"], [], ["c"]), (["a"], ["b"], [])):
        with pytest.raises(UserError, match="probes need texts, and words of one token on both sides"):
            steering.probes(of, *empty)


@pytest.mark.parametrize("site, positions, says", [
    (("resid", 1), "last", "unknown site 'resid'"),
    (("resid_post", 9), "last", "layers 0 … 2"),
    (("pattern", 1), "last", "nothing can be steered at pattern layer 1"),
    (("ln1_scale", 1), "last", "nothing can be steered at ln1_scale"),
    (Site("embed"), "last", "nothing can be steered at embed"),
    (Site("mlp_post", 1, neuron=3), "last", "nothing can be steered at mlp_post layer 1 neuron 3"),
    (Site("resid_post", 1, basis=torch.eye(24)[:2]), "last", "nothing can be steered at resid_post layer 1 in a basis"),
    (("resid_post", 1), "S9", "unknown role 'S9'"),
])  # fmt: skip
def test_vectors_that_cannot_be(site, positions, says):
    of = model("llama")
    task = pairs(of, True)
    with pytest.raises(UserError, match=says) as raised:
        steering.vector(of, task.clean, task.corrupted, site, positions)
    assert "\n" not in str(raised.value)


def test_a_role_that_a_prompt_lacks():
    of = model("llama")
    task = pairs(of, True)
    lacking = task.clean.with_roles({"A": torch.tensor([4, -1, 4, 4])})
    with pytest.raises(UserError, match="prompt 1 has no token at positions 'A'"):
        steering.vector(of, lacking, task.corrupted, ("resid_post", 1), "A")


@pytest.mark.parametrize("settings, says", [
    ({"strengths": ()}, r"strengths must be finite, and one of them not 0; found \[\]"),
    ({"strengths": (0,)}, "one of them not 0"),
    ({"strengths": (1, float("inf"))}, "strengths must be finite"),
    ({"draws": 0}, "draws must be at least 1"),
    ({"metric": "perplexity"}, "unknown metric"),
    ({"positions": "S9"}, "unknown role"),
])  # fmt: skip
def test_sweeps_that_cannot_be(settings, says):
    of = model("llama")
    with pytest.raises(UserError, match=says) as raised:
        small(of, pairs(of, True), **settings)
    assert "\n" not in str(raised.value)


def test_plain_prompts_need_a_function():
    of = model("llama")
    task = pairs(of, True)
    made = steering.vector(of, task.clean, task.corrupted, ("resid_post", 1))
    with pytest.raises(UserError, match="logit-diff needs prompts with answers; found plain prompts"):
        steering.sweep(of, made, task.clean, unrelated=unrelated(of))
