import pytest
import torch
import transformers as hf

from mechinterp import load
from mechinterp.errors import UserError
from mechinterp.hooked import suffix
from mechinterp.hooked.interventions import Zero
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Levers
from mechinterp.identities import check, random_prompts, relative
from mechinterp.models.planted import LETTERS, word_tokenizer
from tests.families import FAMILIES, model, module

PARITY = "logits = Hugging Face"
SUFFIX = "suffix run = full run"
SUM = "components add up to the residual"


def by_name(measured):
    return {one.name: one for one in measured}


def saved(family, folder):
    """A model folder of a family with weights that matter, and a small tokenizer."""
    module(family).save_pretrained(folder)
    word_tokenizer(LETTERS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family):
    measured = by_name(check(model(family)))
    assert measured.pop(PARITY).ok is None, "a module in memory has no second copy"
    assert len(measured) == 5
    for one in measured.values():
        assert one.ok is True, one
        assert one.value <= 1e-5, one
    assert "replay, prefix, columns" in measured[SUFFIX].note
    kind = "parallel" if family in ("neox", "phi") else "sequential"
    assert kind in measured[SUM].note


def test_a_planted_model_passes_and_says_what_it_skips():
    measured = check(load("planted-induction"))
    assert [one.ok for one in measured] == [None, True, True, True, True, True]
    assert "native" in measured[0].note and measured[0].value is None
    assert "attention-only" in by_name(measured)[SUM].note


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("process", [False, True], ids=["raw", "processed"])
def test_parity_of_a_folder(family, process, tmp_path):
    one = by_name(check(load(saved(family, tmp_path), process=process, device="cpu")))[PARITY]
    assert one.ok is True and one.value < 1e-5
    assert ("log-probabilities" if process else "logits") in one.note


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_its_own_tolerance(dtype, tmp_path):
    measured = check(load(saved("llama", tmp_path), dtype=dtype, device="cpu"))
    assert all(one.ok for one in measured), measured
    assert measured[0].tolerance > 1e-3


def test_one_prompt_is_enough():
    assert all(one.ok in (True, None) for one in check(model("llama"), n=1, seed=5))


def test_the_tokens_depend_on_the_seed_alone():
    of = model("gpt2")
    first, again, other = (random_prompts(of, 2, seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_model_is_left_as_it_was():
    of = model("llama")
    levers, prompts = of.levers, [[1, 2, 3, 4]]
    before = of(prompts)
    check(of)
    assert of.levers == levers and torch.equal(of(prompts), before)
    assert not [h for point in of.hook_points.values() for h in point.fwd_hooks if not h.is_permanent]


def test_bad_input():
    of = model("llama")
    with pytest.raises(UserError, match="n must be at least 1"):
        check(of, n=0)
    with of.intervene(Zero(Site("z", 0))) as knocked_out:
        with pytest.raises(UserError, match="leave the interventions"):
            check(knocked_out)
        of([[1, 2, 3]])


def test_nan_is_never_a_pass():
    assert not relative(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])) <= 1


# Broken models: each must make an identity fail.


def fresh(tmp_path, family="llama"):
    return load(saved(family, tmp_path), device="cpu")


def failing(of):
    return {one.name for one in check(of) if one.ok is False}


def test_a_hook_left_on_the_residual_stream(tmp_path):
    of = fresh(tmp_path)
    point = of.hook_points[Site("resid_post", 1).hook_name]
    point.add_hook(lambda activation, hook: activation * 1.01, is_permanent=True)
    assert {PARITY, SUM} <= failing(of)


def test_changed_weights(tmp_path):
    of = fresh(tmp_path)
    with torch.no_grad():
        next(of.bridge.original_model.parameters()).mul_(1.01)
    assert failing(of) == {PARITY}


def test_nan_weights(tmp_path):
    of = fresh(tmp_path)
    with torch.no_grad():
        of.bridge.original_model.lm_head.weight[0] = torch.nan
    assert PARITY in failing(of) and "own activation patched in = nothing" in failing(of)


def test_an_attention_that_ignores_the_mask(tmp_path, monkeypatch):
    of = fresh(tmp_path)
    call = of.bridge.forward
    monkeypatch.setattr(of.bridge, "forward", lambda tokens, attention_mask=None, **rest: call(tokens, **rest))
    assert "padded in a batch = alone" in failing(of)


def test_a_prefix_that_loses_a_position(tmp_path, monkeypatch):
    of = fresh(tmp_path)
    monkeypatch.setitem(of.__dict__, "levers", Levers(True, True, True))  # believes in what is broken next
    short = suffix.Recording._prefix

    def off_by_one(self, layer, rows):
        whole = short(self, layer, rows)
        late = [0, *range(rows.start - 1)]
        return suffix._Prefix(whole.keys[:, :, late], whole.values[:, :, late])

    monkeypatch.setattr(suffix.Recording, "_prefix", off_by_one)
    assert failing(of) == {SUFFIX}


def test_a_lever_that_does_not_hold_is_said_and_costs_no_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(suffix, "_narrow", lambda value, name, rows, n: None)
    one = by_name(check(fresh(tmp_path)))[SUFFIX]
    assert one.ok is True and "none hold" in one.note


def test_an_error_in_a_measurement_is_a_failure_with_a_note(tmp_path, monkeypatch):
    of = fresh(tmp_path)
    monkeypatch.setattr(hf.LlamaForCausalLM, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
    one = by_name(check(of))[PARITY]
    assert one.ok is False and one.value is None and "gone" in one.note
