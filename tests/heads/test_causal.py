"""Knock-outs equal TransformerLens's own hooks on the whole run, and find the heads that matter and only those."""

import numpy as np
import pytest
import torch

from mechinterp import UserError
from mechinterp.heads import CausalResult, knock_out_top, patterns, repeated_tokens
from mechinterp.heads.knock_outs import mean_of_others, random_sets
from mechinterp.hooked.interventions import Zero
from mechinterp.hooked.sites import Site
from tests.checks import checks_off
from tests.families import FAMILIES, full_logits, model

PERIOD = 5


def sequences(of, padded):
    draw = torch.Generator().manual_seed(7)
    rows = []
    for i in range(6):
        ids = torch.randperm(of.d_vocab, generator=draw).tolist()
        rows.append([*ids[: i % 3 if padded else 1], *ids[10 : 10 + PERIOD] * 2])
    return rows


def loss_without(of, rows, heads, value):
    """`[prompt pos]` each row run alone, its heads' z set by plain hooks; means over the other rows, from the end."""
    layers = sorted({layer for layer, _ in heads})
    z = {layer: [] for layer in layers}
    for layer in layers:
        for row in rows:
            keep = (f"blocks.{layer}.attn.hook_z", lambda x, hook, layer=layer: z[layer].append(x[0].detach().clone()))
            full_logits(of, of.to_prompts([row]), [keep])
    losses = []
    for i, row in enumerate(rows):

        def mean(layer, i=i, row=row):
            made = torch.zeros(len(row), of.n_heads, of.d_head)
            rest = [one for j, one in enumerate(z[layer]) if j != i]
            for back in range(1, len(row) + 1):
                made[-back] = torch.stack([one[-back] for one in rest if len(one) >= back]).mean(0)
            return made

        def put(x, hook, mean=mean):
            layer = int(hook.name.split(".")[1])
            x = x.clone()
            for head in [h for at, h in heads if at == layer]:
                x[0, :, head] = 0 if value == "zero" else mean(layer)[:, head]
            return x

        hooks = [(f"blocks.{layer}.attn.hook_z", put) for layer in layers]
        logits = full_logits(of, of.to_prompts([row]), hooks)[0].double()
        predicted = logits[-PERIOD:-1].log_softmax(-1)
        losses.append([-float(line[token]) for line, token in zip(predicted, row[-PERIOD + 1 :], strict=True)])
    return np.array(losses)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_losses_are_those_of_plain_hooks(family, padded):
    of, rows = model(family), sequences(model(family), padded)
    heads, value = [(1, 2), (0, 1)], "zero" if padded and family == "gpt2" else "mean"
    result = knock_out_top(of, heads, 2, value=value, prompts=rows, period=PERIOD, draws=2)
    base, top = loss_without(of, rows, [], value), loss_without(of, rows, heads, value)
    assert np.abs(top - base).max() > 0.1, "a comparison of nothing with nothing"
    np.testing.assert_allclose(result.data["base_by_pos"], base, atol=1e-4)
    np.testing.assert_allclose(result.data["top_by_pos"], top, atol=1e-4)
    alone = np.stack([loss_without(of, rows, [head], value).mean(1) - base.mean(1) for head in heads])
    np.testing.assert_allclose(result.data["alone"], alone, atol=1e-4)
    drawn = [loss_without(of, rows, some, value) for some in random_sets(of, heads, 2, 0)]
    np.testing.assert_allclose(result.data["random"], np.stack(drawn).mean(-1), atol=1e-4)
    np.testing.assert_allclose(result.data["random_by_pos"], np.mean(drawn, 0), atol=1e-4)
    beside = [(1, h) for h in (0, 1, 3)], [(0, h) for h in (0, 2, 3)]
    for i, others in enumerate(beside):
        change = [loss_without(of, rows, [head], value).mean() - base.mean() for head in others]
        assert float(result.data["control"][i]) == pytest.approx(max(change), abs=1e-4)
    difference = top.mean() - np.mean(drawn)
    assert result.about["difference"]["estimate"] == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("value", ["mean", "zero"])
@pytest.mark.parametrize("period", [None, 12])
def test_attention_finds_decoys_and_the_causal_check_does_not(planted, value, period):
    scores = patterns(planted, period=period)
    for kind, true, decoy in (("induction", (1, 2), (1, 3)), ("previous_token", (0, 2), (0, 1))):
        assert set(scores.passing(kind)) == {true, decoy}
        result = knock_out_top(planted, scores, 2, kind=kind, value=value)
        assert set(result.heads) == {true, decoy}
        passes = dict(zip(result.heads, result.data["passes"].values.tolist(), strict=True))
        assert passes == {true: True, decoy: False}
        assert float(result.data["base"].mean()) < 0.1 and float(result.data["top"].mean()) > 2
        assert result.about["difference"]["ci_low"] > 2
        assert "alone 1 pass" in result.summary()
    nothing = knock_out_top(planted, scores, 1, kind="duplicate_token", value=value)
    assert nothing.heads == [(1, 0)] and not nothing.data["passes"].any()
    assert nothing.about["difference"]["ci_high"] < 0, "among the random heads is the induction head"
    assert nothing.about["p"] == 1


def test_random_sets_have_the_layers_of_the_top_and_none_of_its_heads():
    of = model("gpt2")
    top = [(0, 1), (2, 3), (2, 0)]
    sets = random_sets(of, top, 3, 1)
    assert len({frozenset(some) for some in sets}) == 3 and all(len(set(some)) == 3 for some in sets)
    for some in sets:
        assert sorted(layer for layer, _ in some) == [0, 2, 2] and not set(some) & set(top)
    every = random_sets(of, top, 50, 1)  # 3 heads of layer 0, one pair of layer 2
    assert sorted(map(sorted, every)) == [[(0, h), (2, 1), (2, 2)] for h in (0, 2, 3)]
    assert random_sets(of, top, 2, 1) == random_sets(of, top, 2, 1) != random_sets(of, top, 2, 4)


def test_random_heads_as_the_top_are_no_better_than_other_random_heads():
    """The null: over many choices of the 'top', p is spread out, and its mean near one half."""
    of = model("llama")
    found = []
    for seed in range(12):
        head = (1 + seed % 2, int(np.random.default_rng(seed).integers(4)))
        found.append(knock_out_top(of, [head], 1, n=4, period=6, seed=seed, draws=3).about["p"])
    assert 0.45 <= np.mean(found) <= 0.8  # (1 + rank) / 4 has the mean 0.625


def test_means_leave_the_own_prompt_out():
    z = torch.arange(12.0).reshape(3, 4, 1, 1)
    real = torch.tensor([[False, True, True, True], [False, True, True, True], [False, False, True, True]])
    mean = mean_of_others(z, real)[..., 0, 0]
    assert mean[0, 3] == (7 + 11) / 2 and mean[1, 3] == (3 + 11) / 2 and mean[0, 1] == 5
    real[0, 0] = True
    with pytest.raises(UserError, match="no prompt but sequence 1 has a token 4 places from the end"):
        mean_of_others(z, real)


def test_prompts_are_drawn_anew(planted, monkeypatch):
    scores = patterns(planted, n=4, period=9, seed=3)
    used = []
    draw = repeated_tokens

    def keep(*args, **kwargs):
        used.append(draw(*args, **kwargs))
        return used[-1]

    monkeypatch.setattr("mechinterp.heads.causal.repeated_tokens", keep)
    result = knock_out_top(planted, scores, 1, n=5, seed=3)
    assert used[0].tokens.shape == (5, 18) and result.about["period"] == 9
    first = repeated_tokens(planted, n=4, period=9, seed=3).tokens
    assert not any(torch.equal(row, other) for row in used[0].tokens for other in first)


def test_interventions_in_force_count():
    of = model("gpt2")
    rows = sequences(of, False)
    with of.intervene(Zero(Site("z", 1, head=2))):
        result = knock_out_top(of, [(1, 2)], 1, prompts=rows, period=PERIOD, draws=1)
    assert float(abs(result.data["alone"]).max()) < 1e-5, "it is out already"
    assert result.about["in_force"] and float(abs(result.data["random"] - result.data["base"]).max()) > 1e-3
    assert not [hook for point in of.hook_points.values() for hook in point.fwd_hooks if not hook.is_permanent]


def test_the_result_saves_and_speaks(planted, tmp_path):
    result = knock_out_top(planted, [(1, 2), (0, 2)], 5, n=4, period=8, draws=4)
    made = result.to_json()
    assert made["heads"] == [[1, 2], [0, 2]] and made["loss"]["top"] > made["loss"]["none"]
    assert len(made["per_position"]["top"]) == 7 == len(result.data["pos"]) and len(made["random_draws"]) == 4
    assert made["kind"] == "given heads" and made["k"] == 2 and 0 < made["p"] <= 1
    assert result.top()["cell"].tolist() == ["L1H2", "L0H2"] and "without L1H2, L0H2" in repr(result)
    result.save(tmp_path / "causal.safetensors")
    assert CausalResult.load(tmp_path / "causal.safetensors").to_json() == made
    single = knock_out_top(planted, [(1, 2)], 1, n=1, value="zero", period=8)
    assert single.about["difference"]["ci_low"] is None and "nan" not in single.summary()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"heads": [(5, 0)]}, r"layers 0 … 1 and heads 0 … 3; found \[\(5, 0\)\]"),
        ({"heads": [(1, 0), (1, 0)]}, "each once"),
        ({"heads": []}, "found none"),
        ({"heads": [(1, 0), (1, 1), (1, 2)]}, "layer 1 has 3 of the top heads and only 1 others"),
        ({"k": 0}, "k must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"value": "noise"}, "unknown value 'noise'; valid: mean, zero"),
        ({"n": 1}, "no prompt but sequence 1 has a token 12 places from the end"),
        ({"prompts": [[1, 2, 3, 4]], "period": None}, "given sequences need their period"),
        ({"prompts": [[1, 2, 3, 4]], "period": 2}, "sequence 1: its last 2 tokens do not repeat"),
    ],
)
def test_refusals(planted, asked, says):
    with checks_off(), pytest.raises(UserError, match=says):
        knock_out_top(planted, **({"heads": [(1, 2)], "period": 6} | asked))


def test_an_unknown_kind_is_refused(planted):
    with pytest.raises(UserError, match="unknown kind 'copying'; this result has: induction"):
        knock_out_top(planted, patterns(planted, n=2, period=6), kind="copying")
