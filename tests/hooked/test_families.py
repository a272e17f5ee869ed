"""The tiny models are hard enough to be a test, and every lever of the suffix run holds on them."""

import pytest
import torch

from mechinterp.hooked import forward, suffix
from mechinterp.hooked.interventions import Noise
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.suffix import Levers
from tests.families import FAMILIES, VOCABULARY, model


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_make_errors_visible(family):
    tokens = torch.randint(0, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(1))
    logits, cache = model(family).run_with_cache(tokens, ["pattern"])
    assert logits.std() >= 3
    largest = torch.stack([cache[name].amax(-1)[:, :, 3:].mean() for name in cache])
    assert largest.mean() >= 0.4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_lever_holds(family):
    assert suffix.probe(model(family)) == Levers(replay=True, prefix=True, columns=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [[[1, 2, 3, 4, 5, 6]] * 2, [[1, 2, 3, 4, 5, 6], [7, 8, 9]]], ids=["even", "padded"])
def test_every_writable_site_moves_the_logits(family, prompts):
    of = model(family)
    base = of(prompts)[:, -1]
    for site in of.site_list:
        if site.layer not in (None, 1) or (family == "opt" and site.name == "pattern"):
            continue
        moved = of(prompts, [Noise(site, 0.5)])[:, -1]
        assert (moved - base).abs().max() > 1e-2, site


def test_padding_changes_nothing_at_real_tokens():
    for family in FAMILIES:
        of = model(family)
        alone = of([[7, 8, 9]])
        padded = of([[1, 2, 3, 4, 5, 6], [7, 8, 9]])[1, -3:]
        assert torch.allclose(alone[0], padded, atol=1e-4), family


def test_the_shared_models_have_no_hooks_left():
    for family in FAMILIES:
        left = [h for point in model(family).hook_points.values() for h in point.fwd_hooks if not h.is_permanent]
        assert not left, family


def test_missing_soft_cap_costs_the_lever_not_the_answer(monkeypatch):
    monkeypatch.setattr(suffix, "_soft_cap", lambda of, logits: logits)
    assert suffix.probe(model("gemma2")) == Levers(False, False, False)


def test_without_replay_the_full_model_runs(monkeypatch):
    of = model("llama")
    prompts = Prompts.from_lists([[1, 2, 3, 4], [5, 6, 7, 8]])
    recording = suffix.record(of, prompts, levers=Levers(False, False, False))
    read = suffix.Read(torch.tensor([[3], [2]]), torch.tensor([[[4, 5]], [[6, 7]]]))
    expected = read.gather(forward.call_bridge(of, prompts))
    assert torch.equal(recording.base_logits(read), expected)
