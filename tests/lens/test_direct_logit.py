"""Direct effects equal what brute force finds, and add up to the logit difference."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from mechinterp import load
from mechinterp.errors import UserError
from mechinterp.hooked.interventions import Mean, Steer, Zero
from mechinterp.hooked.sites import Site
from mechinterp.lens.direct_effects import direct_effects
from mechinterp.lens.direct_logit import DirectLogit, direct_logit
from mechinterp.models.planted import circuit
from mechinterp.tasks import induction
from tests.families import FAMILIES, full_logits, model, pairs
from tests.test_identities import saved

PADDED = pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """Each family with its weights folded and centred."""

    @cache
    def of(family):
        return load(saved(family, tmp_path_factory.mktemp(family)), process=True, device="cpu")

    return of


def uncapped(of, logits):
    """The logits before Gemma-2's final soft-cap."""
    cap = float(of.bridge.cfg.output_logits_soft_cap or 0)
    return cap * torch.atanh(logits.double() / cap) if cap > 0 else logits.double()


def logit_diff(task, logits):
    rows, at = torch.arange(len(task)), task.answers.pos[:, 0]
    answer, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]
    return logits[rows, at, answer] - logits[rows, at, wrong]


def parts(found):
    return found.heads.double().sum((0, 1)) + found.mlps.double().sum(0) + found.embed + found.bias


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("process", [False, True], ids=["raw", "processed"])
@PADDED
def test_the_parts_add_up_to_the_logit_difference(family, process, padded, processed):
    of = processed(family) if process else model(family)
    task = pairs(of, padded)
    found = direct_effects(of, task, sources=True, neurons=True)
    logits = full_logits(of, task.clean, [])
    torch.testing.assert_close(parts(found), logit_diff(task, uncapped(of, logits)), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.output.double(), logit_diff(task, logits.double()), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.sources.sum(2), found.heads, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.neurons.sum(1), found.mlps, atol=1e-5, rtol=0)


class Reader:
    """Reads the logit difference off a final residual stream, with every norm's scale held at its value in the run."""

    def __init__(self, of, task):
        self.of, self.task, self.kept = of, task, {}
        names = ["ln_final.hook_scale", f"blocks.{of.n_layers - 1}.hook_resid_post"]
        for layer in range(of.n_layers):
            sites = ("attn.hook_z", "attn.hook_v", "attn.hook_pattern", "hook_mlp_out", "ln1_post.hook_scale")
            names += [f"blocks.{layer}.{site}" for site in sites if f"blocks.{layer}.{site}" in of.hook_points]
        keep = [(name, lambda x, hook, name=name: self.kept.__setitem__(name, x.detach().clone())) for name in names]
        full_logits(of, task.clean, keep)
        self.final = self.kept[names[1]]

    def __call__(self, resid):
        norm = self.of.bridge.ln_final.original_component
        layer_norm = isinstance(norm, torch.nn.LayerNorm)
        centred = resid - resid.mean(-1, keepdim=True) if layer_norm else resid
        gain = 1 + norm.weight if self.of.info.name == "gemma2" else norm.weight
        normed = centred / self.kept["ln_final.hook_scale"] * gain + (norm.bias if layer_norm else 0)
        return logit_diff(self.task, self.of.bridge.unembed.original_component(normed))

    def lost(self, write):
        """`[prompt]` what the logit difference loses when `write` `[prompt pos d_model]` leaves the stream."""
        return self(self.final) - self(self.final - write)

    def behind(self, layer, write):
        """A head's write behind the norm after attention, where there is one."""
        name = f"blocks.{layer}.ln1_post.hook_scale"
        if name not in self.kept:
            return write
        return write / self.kept[name] * (1 + self.of.bridge.blocks[layer].ln1_post.original_component.weight)


@pytest.mark.parametrize("family", FAMILIES)
@PADDED
def test_an_effect_is_what_taking_the_output_away_takes_from_the_logits(family, padded):
    of = model(family)
    task = pairs(of, padded)
    found = direct_effects(of, task, sources=True)
    read = Reader(of, task)
    for layer in range(of.n_layers):
        attention, mlp = of.bridge.blocks[layer].attn, of.bridge.blocks[layer].mlp
        values = read.kept[f"blocks.{layer}.attn.hook_v"]
        for head in range(of.n_heads):
            write = read.kept[f"blocks.{layer}.attn.hook_z"][:, :, head] @ attention.W_O[head]
            lost = read.lost(read.behind(layer, write))
            torch.testing.assert_close(found.heads[layer, head], lost, atol=1e-4, rtol=1e-4)
            key, group = 2, head // (of.n_heads // values.shape[2])
            seen = read.kept[f"blocks.{layer}.attn.hook_pattern"][:, head, :, key, None]
            write = seen * (values[:, key, group] @ attention.W_O[head])[:, None]
            lost = read.lost(read.behind(layer, write))
            torch.testing.assert_close(found.sources[layer, head, key], lost, atol=1e-4, rtol=1e-4)
        bias = getattr(mlp, "b_out", None)
        write = read.kept[f"blocks.{layer}.hook_mlp_out"] - (0 if bias is None else bias)
        torch.testing.assert_close(found.mlps[layer], read.lost(write), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("against", ["mean", "nothing"])
def test_other_questions_add_up_too(against):
    of = model("llama")
    task = pairs(of, True)
    found = direct_effects(of, task, "corrupted", against=against)
    rows, at, answer = torch.arange(len(task)), task.answers.pos[:, 0], task.answers.answer[:, 0, 0]
    logits = full_logits(of, task.corrupted, [])[rows, at]
    want = logits[rows, answer] - (logits.mean(-1) if against == "mean" else 0)
    torch.testing.assert_close(parts(found), want.double(), atol=1e-4, rtol=0)


def test_interventions_in_force_count():
    of = model("gpt2")
    task = pairs(of, False)
    with of.intervene(Zero(Site("z", 1, head=2)), Mean(Site("mlp_out", 2), task.clean)):
        found = direct_effects(of, task)
        logits = of(task.clean)
    assert float(found.heads[1, 2].abs().max()) == 0
    torch.testing.assert_close(parts(found), logit_diff(task, logits.double()), atol=1e-4, rtol=0)


def test_a_stream_that_something_else_writes_to_is_refused():
    of = model("gpt2")
    with (
        of.intervene(Steer(Site("resid_post", 1), torch.linspace(-3, 3, of.d_model))),
        pytest.raises(UserError, match=r"miss the logits by .* in force: resid_post layer 1"),
    ):
        direct_effects(of, pairs(of, False))


def test_the_planted_induction_head_writes_the_answer_and_moves_it_from_its_place():
    of = load("planted-induction", device="cpu")
    task = induction(of, n=24)
    found = direct_logit(of, task, sources="roles")
    layer, head = circuit("planted-induction").heads[-1]
    assert [row["component"] for row in found.top(20).to_dict("records") if row["passes"]] == [f"L{layer}H{head}"]
    assert found.grid()[layer, head] == pytest.approx(float(found.data["logit_diff"].mean()), abs=1e-5)
    moved = found.data["moved"].mean("prompt").sel(layer=layer, head=head)
    assert float(moved.sel(role="B1")) > 5 and float(abs(moved.drop_sel(role="B1")).max()) < 0.5
    assert found.ranking()[0] == (layer, head)


def test_answers_swapped_at_random_leave_nothing():
    """The null: with answer and wrong answer swapped by coins, hardly any component's interval leaves 0 out."""
    of = model("llama")
    draw = torch.Generator().manual_seed(0)
    outside, cells = 0, 0
    for seed in range(12):
        task = pairs(of, False, n=24)
        swap = torch.rand(24, generator=draw) < 0.5
        a, w = task.answers.answer.clone(), task.answers.wrong.clone()
        a[swap], w[swap] = task.answers.wrong[swap], task.answers.answer[swap]
        found = direct_logit(of, replace(task, answers=replace(task.answers, answer=a, wrong=w)), seed=seed)
        component = found.data.drop_sel(component=["bias"])
        outside += int(((component["ci_low"] > 0) | (component["ci_high"] < 0)).sum())
        cells += component.sizes["component"]
        assert not found.data["passes"].any() or found.data["passes"].sum() <= 1
    assert 0.01 <= outside / cells <= 0.12


@pytest.mark.parametrize("padded", [False, True])
def test_the_result_is_consistent_saves_and_speaks(tmp_path, padded):
    of = model("gemma2")
    task = pairs(of, padded)
    found = direct_logit(of, task, sources="roles", neurons=5)
    made = found.to_json()
    heads, mlps = np.array(made["heads"]), np.array(made["mlps"])
    assert heads.shape == (of.n_layers, of.n_heads) and mlps.shape == (of.n_layers,)
    assert heads.sum() + mlps.sum() + made["embed"] + made["bias"] == pytest.approx(made["total"], abs=1e-4)
    assert made["total"] + made["soft_cap"] == pytest.approx(made["logit_diff"], abs=1e-4) and made["soft_cap"] != 0
    moved = found.data["moved"]
    np.testing.assert_allclose(moved.sum("role").mean("prompt"), heads, atol=1e-4)
    assert list(moved["role"].values) == ["A", "B", "END", "other"]
    direct = direct_effects(of, task, neurons=True).neurons.mean(-1)
    assert float(found.data["neuron_effect"][0]) == pytest.approx(float(direct.flatten()[direct.abs().argmax()]))
    assert "soft-cap" in found.summary() and "L" in repr(found)
    found.save(tmp_path / "dla.safetensors")
    assert DirectLogit.load(tmp_path / "dla.safetensors").to_json() == made


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": "each"}, "one length"),
        ({"against": "wrong"}, "no wrong ones"),
    ],
)
def test_refusals(change, says):
    of = model("gpt2")
    task = pairs(of, True)
    if "against" in change:
        zeros = torch.zeros_like(task.answers.wrong_weight)
        task = replace(task, answers=replace(task.answers, wrong_weight=zeros))
    with pytest.raises(UserError, match=says):
        direct_logit(of, task, **change)


def test_two_prompts_of_the_same_answer_have_no_control():
    of = model("gpt2")
    task = pairs(of, False).take(torch.tensor([0, 0, 0]))
    found = direct_logit(of, task)
    assert np.isnan(found.data["control"]).all() and not found.data["passes"].any()
    assert found.about["control"].startswith("none") and found.to_json()["heads_intervals"]["control"][0][0] is None
