"""Scores equal plain loops over recorded patterns on every family, and find the planted heads and no others."""

from importlib import import_module

import numpy as np
import pytest
import torch

from mechinterp import UserError
from mechinterp.heads import PatternResult, patterns, repeated_tokens
from mechinterp.hooked.interventions import Zero
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from tests.families import FAMILIES, full_logits, model

module = import_module("mechinterp.heads.patterns")  # the package's attribute of that name is the function
PERIOD = 5


def sequences(of, padded):
    """Copies of `PERIOD` tokens behind prefixes of none to three tokens."""
    draw = torch.Generator().manual_seed(2)
    rows = []
    for i in range(6):
        ids = torch.randperm(of.d_vocab, generator=draw).tolist()
        rows.append([*ids[: i % 4 if padded else 2], *ids[10 : 10 + PERIOD] * 2])
    return rows


def recorded(of, rows):
    """[layer][row] patterns [head query key] of every row run alone, by TransformerLens's own hooks."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(of.n_layers)]
    made = {name: [] for name in names}
    keep = [(name, lambda x, hook, name=name: made[name].append(x[0].detach().double().numpy())) for name in names]
    for row in rows:
        full_logits(of, Prompts(torch.tensor([row])), keep)
    return [made[name] for name in names]


def wanted(kind, size):
    """(query, key) pairs of a sequence of `size` tokens."""
    second = range(size - PERIOD, size)
    pairs = {
        "induction": [(q, q - PERIOD + 1) for q in second],
        "duplicate_token": [(q, q - PERIOD) for q in second],
        "previous_token": [(q, q - 1) for q in range(size)],
        "self": [(q, q) for q in range(size)],
        "first_token": [(q, 0) for q in range(1, size)],
    }[kind]
    return pairs if kind == "first_token" else [(q, k) for q, k in pairs if k >= 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_scores_are_means_of_attention(family, padded):
    of = model(family)
    rows = sequences(of, padded)
    result = patterns(of, rows, period=PERIOD)
    maps = recorded(of, rows)
    for kind in ("induction", "duplicate_token", "previous_token", "self", "first_token"):
        want = np.zeros((of.n_layers, of.n_heads, len(rows)))
        beside = np.zeros_like(want)
        for layer in range(of.n_layers):
            for i, row in enumerate(rows):
                pairs, attention = wanted(kind, len(row)), maps[layer][i]
                want[layer, :, i] = np.mean([attention[:, q, k] for q, k in pairs], 0)
                # Beside the key, as far as there is one that the query sees and that is not position 0.
                moved = [
                    [
                        attention[:, q, k + by] if 1 <= k + by <= q else np.full(of.n_heads, 1 / (q + 1))
                        for q, k in pairs
                    ]
                    for by in (-1, 1)
                ]
                uniform = np.full(of.n_heads, np.mean([1 / (q + 1) for q, _ in pairs]))
                beside[layer, :, i] = np.max([np.mean(moved[0], 0), np.mean(moved[1], 0), uniform], 0)
        got = result.data["scores"].sel(kind=kind).values
        assert want.max() > 0.1, "a comparison of nothing with nothing"
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(result.grid(kind), want.mean(-1), atol=1e-5)
        if kind in ("previous_token", "self", "first_token"):
            np.testing.assert_allclose(result.grid(kind, "null"), beside.mean(-1), atol=1e-5)


def test_the_null_of_content_is_attention_at_the_same_offsets_in_fresh_tokens(monkeypatch):
    of = model("llama")
    made = {}
    fresh = module.fresh

    def keep(*args):
        made["control"] = fresh(*args)
        return made["control"]

    monkeypatch.setattr(module, "fresh", keep)
    result = patterns(of, sequences(of, True), period=PERIOD, kinds=["induction", "duplicate_token"])
    control, share = made["control"]
    assert share == 1.0 and len(control) == 4 == result.about["n_fresh"]
    rows = [tokens[real].tolist() for tokens, real in zip(control.tokens, control.real, strict=True)]
    maps = recorded(of, rows)
    for kind in ("induction", "duplicate_token"):
        for layer in range(of.n_layers):
            each = [np.mean([m[:, q, k] for q, k in wanted(kind, len(m[0]))], 0) for m in maps[layer]]
            np.testing.assert_allclose(result.grid(kind, "null")[layer], np.mean(each, 0), atol=1e-5)


PLANTED = {
    "induction": {(1, 2), (1, 3)},
    "duplicate_token": {(1, 0)},
    "previous_token": {(0, 1), (0, 2)},
    "first_token": set(),
}


@pytest.mark.parametrize(
    "asked",
    [{}, {"n": 4, "period": 9, "seed": 5}, {"n": 6, "period": 31}, {"n": 5, "copies": 4, "period": 12}],
    ids=["default", "few", "long", "four copies"],
)
def test_each_detector_finds_the_planted_heads_and_only_those(planted, asked):
    copies = asked.pop("copies", None)
    if copies:
        result = patterns(planted, repeated_tokens(planted, copies=copies, **asked))
    else:
        result = patterns(planted, **asked)
    for kind, heads in PLANTED.items():
        assert set(result.passing(kind)) == heads, kind
    # The two current-token heads; the others of layer 1 rest on their own position where they find nothing.
    assert {(0, 0), (1, 1)} <= set(result.passing("self")) <= {(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)}
    assert set(result.ranking("induction")[:2]) == PLANTED["induction"]
    assert result.ranking("previous_token")[0] == (0, 2) and result.ranking("duplicate_token")[0] == (1, 0)
    assert result.grid("induction")[1, 2] > (0.6 if copies is None else 0.25)


def test_planted_heads_find_nothing_in_tokens_that_do_not_repeat(planted, monkeypatch):
    """Scores and null from the same fresh tokens: no content detector passes."""
    control = module.fresh(planted, repeated_tokens(planted, n=12, period=20), 20, seed=9)[0]
    monkeypatch.setattr("mechinterp.heads.tokens._require_repeat", lambda *_: None)
    result = patterns(planted, control, period=20)
    assert result.passing("induction") == [] and result.passing("duplicate_token") == []
    assert set(result.passing("previous_token")) == PLANTED["previous_token"]


def test_uniform_attention_is_no_pattern(planted):
    """L0H3 attends to all alike: every score is that of uniform attention, and none passes."""
    result = patterns(planted)
    for kind in result.kinds:
        assert result.grid(kind)[0, 3] == pytest.approx(float(result.data["uniform"].sel(kind=kind)), abs=1e-6)
        assert not result.grid(kind, "passes")[0, 3]


def test_kinds_of_the_users_own(planted):
    def second_last(prompts):
        """Keys, two back."""
        pos = torch.arange(prompts.n_pos)[None, :]
        key = pos - 2
        return torch.where(key > prompts.padding[:, None], key, -1)

    def same_token(prompts):
        """Weights: spread over earlier equal tokens."""
        same = (prompts.tokens[:, :, None] == prompts.tokens[:, None, :]).float().tril(-1)
        return same / same.sum(-1, keepdim=True).clamp(min=1)

    result = patterns(planted, n=6, period=12, kinds=["duplicate_token", {"mine": second_last, "same": same_token}])
    assert result.kinds == ["duplicate_token", "mine", "same"]
    assert result.passing("mine") == [] and result.passing("same") == [(1, 0)]
    # The same, but for the query whose key is position 0.
    score, mine = result.data["scores"].sel(kind="duplicate_token"), result.data["scores"].sel(kind="same")
    rows = repeated_tokens(planted, n=6, period=12).tokens
    first = torch.stack([torch.tensor(recorded(planted, [row.tolist()])[1][0][:, 12, 0]) for row in rows], -1)
    np.testing.assert_allclose(mine[1] * 12 - first.numpy(), score[1] * 11, atol=1e-5)
    alone = patterns(planted, n=4, period=12, kinds={"mine": second_last})
    assert alone.kinds == ["mine"] and "n_fresh" not in alone.about


def test_text_that_does_not_repeat_has_positional_kinds_only(planted):
    rows = [list(range(12)), list(range(20, 40))]
    result = patterns(planted, rows)
    assert result.kinds == ["previous_token", "first_token", "self"] and result.about["period"] is None
    assert patterns(planted, "a b c d e f g").about["n_prompts"] == 1
    with pytest.raises(UserError, match="'induction' needs the period"):
        patterns(planted, rows, kinds="induction")


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ("induction-heads", "unknown pattern 'induction-heads'; valid: induction"),
        ([], "each once"),
        (["self", "self"], "each once"),
        ({"flat": lambda p: p.padding}, r"'flat': a kind gives \[prompt query\]"),
        ({"future": lambda p: torch.full_like(p.tokens, 5)}, "sequence 1: query 0 cannot attend to key 5"),
        ({"nothing": lambda p: torch.full_like(p.tokens, -1)}, "'nothing' has no query in sequence 1"),
        ({"nan": lambda p: torch.full((4, 6, 6), torch.nan)}, "query 0 cannot attend"),
    ],
)
def test_kinds_that_cannot_be(planted, kinds, says):
    with pytest.raises(UserError, match=says):
        patterns(planted, n=4, period=3, kinds=kinds)


def test_interventions_in_force_count_and_nothing_is_left_behind():
    of = model("gpt2")
    rows = sequences(of, False)
    before = patterns(of, rows, period=PERIOD)
    with of.intervene(Zero(Site("z", 0)), Zero(Site("mlp_out", of.n_layers - 1))):  # one behind the last pattern
        edited = patterns(of, rows, period=PERIOD)
    np.testing.assert_array_equal(before.data["scores"][:, 0], edited.data["scores"][:, 0])
    assert float(abs(before.data["scores"][:, 1] - edited.data["scores"][:, 1]).max()) > 0.01
    assert edited.about["in_force"] and not before.about["in_force"]
    again = patterns(of, rows, period=PERIOD)
    np.testing.assert_array_equal(before.data["scores"], again.data["scores"])
    assert not [hook for point in of.hook_points.values() for hook in point.fwd_hooks if not hook.is_permanent]


def test_chunks_do_not_matter_and_the_run_stops_behind_the_last_pattern(monkeypatch):
    of = model("gemma2")
    rows = sequences(of, True)
    whole = patterns(of, rows, period=PERIOD)
    monkeypatch.setattr(module, "chunks", lambda of, n, *_, **__: torch.arange(n).split(2))
    np.testing.assert_allclose(patterns(of, rows, period=PERIOD).data["scores"], whole.data["scores"], atol=1e-6)
    reached = []
    handle = of.bridge.ln_final.register_forward_pre_hook(lambda *_: reached.append(1))
    patterns(of, rows, period=PERIOD)
    assert not reached
    of(rows)
    handle.remove()
    assert reached


def test_the_result_saves_and_speaks(planted, tmp_path):
    result = patterns(planted, n=6, period=10)
    made = result.to_json()
    assert np.array(made["induction"]).shape == (2, 4) and made["n_sequences"] == 6
    assert made["induction"][1][2] == pytest.approx(result.grid("induction")[1, 2])
    assert {"induction", "previous_token", "duplicate_token"} <= set(made)
    low, high = (made["intervals"]["induction"][name][1][2] for name in ("ci_low", "ci_high"))
    assert low <= made["induction"][1][2] <= high
    assert made["nulls"]["induction"]["null"][1][2] < 0.2 and made["passes"]["induction"][1][2] is True
    assert "sink" in made["position_0"] and "fresh" in made["control"] and made["period"] == 10
    top = result.top("induction", 2)
    assert sorted(top["head"]) == ["L1H2", "L1H3"] and top["passes"].all()
    assert len(result.top(3)) == 3 and "first_token" not in set(result.top()["kind"])
    with pytest.raises(UserError, match="unknown kind 'x'"):
        result.top("x")
    assert "induction L1H" in repr(result) and "2 pass" in result.summary() and "<table" in result._repr_html_()
    result.save(tmp_path / "patterns.safetensors")
    assert PatternResult.load(tmp_path / "patterns.safetensors").to_json() == made


def test_one_prompt_has_no_interval_and_passes_nothing(planted):
    result = patterns(planted, n=1, period=10)
    assert np.isnan(result.data["ci_low"]).all() and not result.data["passes"].any()
    assert result.to_json()["intervals"]["induction"]["ci_low"][1][2] is None and "nan" not in result.summary()


def test_a_bos_is_no_query_and_no_key(with_bos):
    result = patterns(with_bos, n=3, period=6)
    rows = repeated_tokens(with_bos, n=3, period=6).tokens.tolist()
    maps = recorded(with_bos, rows)
    for layer in range(with_bos.n_layers):
        each = [np.mean([m[:, q, q - 1] for q in range(2, 13)], 0) for m in maps[layer]]
        np.testing.assert_allclose(result.grid("previous_token")[layer], np.mean(each, 0), atol=1e-5)
        each = [np.mean([m[:, q, q - 6] for q in range(7, 13)], 0) for m in maps[layer]]
        np.testing.assert_allclose(result.grid("duplicate_token")[layer], np.mean(each, 0), atol=1e-5)
    assert "the BOS" in result.about["position_0"]
