"""Scores predicted from the weights equal the attention scores of a run, on every family."""

from inspect import unwrap
from types import SimpleNamespace

import pytest
import torch

from mechinterp import UserError
from mechinterp.heads.scores import ScoreForm, _normed, score_forms
from mechinterp.hooked import weights
from mechinterp.hooked.sites import Site
from tests.families import FAMILIES, full_logits, model

N_POS = 12


def run(of, tokens):
    """Residual streams, norm scales, and scores (patterns where a model keeps its scores to itself), by hook name."""
    kept = {}
    ends = ("hook_resid_pre", "ln1.hook_scale", "attn.hook_attn_scores", "attn.hook_pattern")
    names = [f"blocks.{layer}.{end}" for layer in range(of.n_layers) for end in ends]
    wanted = [Site.from_hook(name).hook_name for name in names if Site.from_hook(name) in of.site_list]
    keep = [(name, lambda x, hook, name=name: kept.__setitem__(name, x.detach().clone())) for name in wanted]
    full_logits(of, of.to_prompts(tokens), keep)
    return kept


def queries_and_keys(of, layer, resid, scale):
    """`[batch head pos d_head]` out of the residual stream, by the weights alone."""
    made = []
    for name in ("q", "k"):
        weight, bias = weights.head_in(of, layer, name)
        made.append(torch.einsum("bpd,hde->bhpe", resid / scale, weight) + bias[:, None])
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
def test_a_score_is_the_form_of_query_and_key_at_their_offset(family, processed, variant):
    of = variant(family, processed)
    tokens = torch.randint(0, of.d_vocab, (3, N_POS), generator=torch.Generator().manual_seed(4))
    kept = run(of, tokens)
    cap = 8.0 if family == "gemma2" else None
    windows = [4 if family == "gemma2" and layer % 2 == 0 else N_POS for layer in range(of.n_layers)]
    forms = [score_forms(of, [i for i, w in enumerate(windows) if offset < w], offset) for offset in range(N_POS)]
    for layer in range(of.n_layers):
        resid, scale = (kept[f"blocks.{layer}.{end}"] for end in ("hook_resid_pre", "ln1.hook_scale"))
        query, key = queries_and_keys(of, layer, resid, scale)
        got = torch.full((3, of.n_heads, N_POS, N_POS), -torch.inf)
        for offset in range(windows[layer]):
            form = forms[offset][layer]
            assert form.normed is (family == "qwen3") and form.offsets == (offset,)
            scores = (query / form.scale(query)) @ form.matrix @ (key / form.scale(key)).transpose(2, 3)
            at = torch.arange(offset, N_POS)
            got[:, :, at, at - offset] = scores[:, :, at, at - offset]
        got = got if cap is None else cap * torch.tanh(got / cap).masked_fill(got == -torch.inf, -torch.inf)
        if family == "opt":  # computed inside the wrapped module: its scores show in its pattern alone
            torch.testing.assert_close(got.softmax(-1), kept[f"blocks.{layer}.attn.hook_pattern"], atol=1e-5, rtol=1e-4)
            continue
        want = kept[f"blocks.{layer}.attn.hook_attn_scores"]
        seen = got > -torch.inf
        assert (want[~seen] < -1e4).all() and want[seen].abs().max() > 1
        torch.testing.assert_close(got[seen], want[seen], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3", "gpt2"])
def test_the_mean_over_offsets_is_the_mean_of_forms(family):
    of = model(family)
    offsets = [1, 3, 4]
    each = [score_forms(of, [1], offset)[1].matrix for offset in offsets]
    form = score_forms(of, [1], offsets)[1]
    torch.testing.assert_close(form.matrix, sum(each) / 3)
    assert form.offsets == (1, 3, 4)
    turns = family != "gpt2"
    assert ((each[0] - each[1]).abs().max() > 1e-2) == turns, "rotary embedding turns, learned positions do not"
    default = score_forms(of, [1])[1]
    assert default.offsets == tuple(range(1, 16))


def test_a_window_hides_offsets():
    of = model("gemma2")
    forms = score_forms(of, [0, 1], [1, 2, 6])
    assert forms[0].offsets == (1, 2) and forms[1].offsets == (1, 2, 6)
    with pytest.raises(UserError, match="layer 2 sees no key 5 positions before a query"):
        score_forms(of, [1, 2], 5)


def test_all_pairs_are_asked_for_also_where_the_context_is_short(planted):
    """118 directions a head and 64 positions: the pairs are spread over blocks. Learned positions: no turn, scale 1."""
    form = score_forms(planted, [0], [0, 40])[0]
    torch.testing.assert_close(form.matrix, torch.eye(planted.d_head) / planted.d_head**0.5, atol=1e-6, rtol=0)


def test_interventions_in_force_do_not_reach_the_form():
    from mechinterp.hooked.interventions import Zero

    of = model("llama")
    before = score_forms(of, [2], 3)[2].matrix
    with of.intervene(Zero(Site("k", 2))) as edited:
        during = score_forms(edited, [2], 3)[2].matrix
        of([[1, 2, 3]])
    assert torch.equal(before, during)


@pytest.mark.parametrize(
    ("offset", "says"),
    [(-1, "0 or more"), ([], "0 or more"), (32, "an offset of 32 needs 33 positions; llama has 32")],
)
def test_offsets_that_cannot_be(offset, says):
    with pytest.raises(UserError, match=says):
        score_forms(model("llama"), [0], offset)


def test_norms_over_all_heads_are_refused():
    """As OLMo-2 has them: gains for all heads at once."""
    norm = SimpleNamespace(original_component=SimpleNamespace(weight=torch.ones(24)))
    of = SimpleNamespace(
        shapes={"blocks.1.attn.q_norm.hook_scale": (1, 2, 1)},
        bridge=SimpleNamespace(blocks=[None, SimpleNamespace(attn=SimpleNamespace(q_norm=norm))]),
        d_head=6,
        info=SimpleNamespace(name="olmo2"),
    )
    with pytest.raises(UserError, match="olmo2 norms its queries with 24 gains"):
        unwrap(_normed)(of, 1)


def test_hidden_rotary_attention_is_refused(monkeypatch):
    of = model("opt")
    monkeypatch.setattr(of.bridge.cfg, "positional_embedding_type", "rotary")
    with pytest.raises(UserError, match="its scores at an offset are not seen"):
        score_forms(of, [0], 1)


def test_scale_is_the_root_mean_square():
    x = torch.tensor([[3.0, 4.0]])
    assert float(ScoreForm(torch.eye(2), True, (1,)).scale(x)) == pytest.approx((25 / 2) ** 0.5)
    assert float(ScoreForm(torch.eye(2), False, (1,)).scale(x)) == 1
