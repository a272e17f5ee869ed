"""A knock-out is what brute-force hooks give, on every family, and finds the planted circuit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp import UserError, Zero, load
from mechinterp.ablation import KnockOut, knock_out, runs
from mechinterp.hooked import suffix
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.models.planted import circuit
from mechinterp.statistics import bootstrap_ratio
from mechinterp.tasks import induction
from mechinterp.tasks.pairs import Answers, Target
from mechinterp.text import Blocks
from tests.ablation.reference import at_role, equals, everywhere, head, knocked, templated
from tests.families import FAMILIES, full_logits, model
from tests.test_identities import saved

PADDED = pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
CHANGES = {"heads": [(0, 3), (2, 0), (2, 1)], "mlps": [1], "neurons": [(0, 5), (0, 7)]}
SITES = [head(0, 3), head(2, 0, 1), Site("mlp_out", 1), Site("mlp_post", 0, neuron=(5, 7))]


@pytest.mark.parametrize("family", FAMILIES)
@PADDED
def test_zero_and_mean_by_role_are_brute_force(family, padded):
    of = model(family)
    task = templated(of, padded)
    result = knock_out(of, task, **CHANGES, value="zero", draws=0, force=True)
    equals(of, task, result, knocked(of, task.clean, SITES, everywhere(task.clean), "zero"))
    result = knock_out(of, task, **CHANGES, positions="END,B", draws=0, force=True)
    equals(of, task, result, knocked(of, task.clean, SITES, at_role(task.clean, "END", "B")))


@pytest.mark.parametrize(
    "by, padded", [("role", True), ("template", True), ("template", False), ("position", False), ("all", True)]
)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_mean_is_brute_force(family, by, padded):
    of = model(family)
    task = templated(of, padded)
    for over, positions in (("clean", "all"), ("corrupted", "END")):
        where = everywhere(task.clean) if positions == "all" else at_role(task.clean, "END")
        result = knock_out(of, task, **CHANGES, over=over, by=by, positions=positions, draws=0, force=True)
        equals(of, task, result, knocked(of, task.clean, SITES, where, "mean", getattr(task, over), by))


@pytest.mark.parametrize("by", ["role", "template"])
def test_other_prompts_and_resampling_are_brute_force(by):
    of = model("llama")
    task = templated(of, True)
    others = task.corrupted.take(torch.tensor([3, 1, 2, 0, 5, 4]))
    for value in ("mean", "resample"):
        result = knock_out(
            of, task, **CHANGES, value=value, over=others, by=by, positions="END", draws=0, seed=4, force=True
        )
        want = knocked(of, task.clean, SITES, at_role(task.clean, "END"), value, others, by, seed=4)
        equals(of, task, result, want)
        assert result.about["over"] == "other prompts" and result.about["by"] == by


@pytest.mark.parametrize("process", [False, True], ids=["raw", "processed"])
def test_of_a_folder_and_of_a_model_that_something_is_already_done_to(process, tmp_path):
    of = load(saved("llama", tmp_path), process=process, device="cpu")
    task = templated(of, True)
    equals(
        of,
        task,
        knock_out(of, task, heads=[(1, 2)], draws=0, force=True),
        knocked(of, task.clean, [head(1, 2)], everywhere(task.clean)),
    )
    with of.intervene(Zero(Site("z", 1, head=2))):
        result = knock_out(of, task, heads=[(2, 0)], value="zero", draws=0, force=True)
    first, two = (
        knocked(of, task.clean, sites, everywhere(task.clean), "zero")
        for sites in ([head(1, 2)], [head(1, 2), head(2, 0)])
    )
    equals(of, task, result, two, before=first)
    assert result.about["in_force"] == ["Zero at L1H2"]


# A known circuit


@pytest.fixture(scope="module")
def planted():
    of = load("planted-induction", device="cpu")
    return of, induction(of, n=24)


def test_the_planted_heads_are_needed_and_no_others(planted):
    of, task = planted
    for layer in range(2):
        for one in range(4):
            result = knock_out(of, task, heads=[(layer, one)], value="zero", draws=3)
            row = result.about["table"]["logit_diff"]
            if (layer, one) in circuit("planted-induction").heads:
                assert row["after"] < 0.05 * row["before"] and row["ci_high"] < -1, row
                assert row["control_as_large"] == 0 and row["beyond_high"] < -1
                assert result.about["table"]["accuracy"]["after"] < 0.7 and result.about["table"]["prob"]["after"] < 0.2
            else:
                assert abs(row["change"]) < 1e-4
                assert row["control_as_large"] == 1, "the planted head is among the three random ones"


# What comes back


def test_json_table_and_file(tmp_path):
    of = model("llama")
    task = templated(of, True)
    result = knock_out(of, task, heads=[(1, 2), (-1, 0)], positions="END", draws=4, force=True)
    made = json.loads(json.dumps(result.to_json(), allow_nan=False))
    data = result.data
    for side in ("before", "after"):
        want = {name: float(data[f"{side}_{name}"].mean()) for name in ("logit_diff", "prob", "accuracy")}
        assert made[side] == pytest.approx(want)
        assert want["accuracy"] == float((data[f"{side}_logit_diff"] > 0).mean())
    for name, (low, high) in made["ci"].items():
        change = made["after"][name] - made["before"][name]
        assert low <= change <= high and made["change"][name] == pytest.approx(change)
    assert (
        made["components"] == "L1H2+L2H0"
        and made["value"] == "mean"
        and made["by"] == "role"
        and made["over"] == "clean"
    )
    assert made["control"]["prob"]["low"] <= made["control"]["prob"]["mean"] <= made["control"]["prob"]["high"]
    result.save(tmp_path / "out.safetensors")
    again = KnockOut.load(tmp_path / "out.safetensors")
    assert again.data.identical(data) and again.to_json() == result.to_json() and repr(again) == repr(result)
    assert list(result.top()["metric"]) == ["logit_diff", "prob", "accuracy"]
    assert "L1H2+L2H0 (mean): logit difference" in result.summary() and "n=6" in result.summary()


def test_the_interval_is_over_prompts_and_takes_templates_as_clusters():
    of = model("llama")
    task = templated(of, False, n=27)
    template = torch.arange(27) % 9
    task = replace(task, clean=task.clean.with_roles(task.clean.roles, template))
    result = knock_out(of, task, heads=[(1, 2)], draws=0, seed=3, force=True)
    change = (result.data["after_prob"] - result.data["before_prob"]).values
    want = bootstrap_ratio(change, None, template.numpy(), seed=3)
    row = result.about["table"]["prob"]
    assert (row["change"], row["ci_low"], row["ci_high"]) == (want.estimate, want.low, want.high)
    assert result.about["scope"] == "over prompts and templates"


def test_the_metrics_may_disagree():
    """Answer and wrong answer are one token: their difference is 0 before and after, and P(answer) goes."""
    of = load("planted-induction", device="cpu")
    task = induction(of, n=24)
    same = replace(task, answers=Answers.build([[Target(t.pos, t.answer, dict(t.answer))] for t in targets(task)]))
    result = knock_out(of, same, heads=[(1, 2)], value="zero", draws=0, force=True)
    assert abs(result.about["table"]["logit_diff"]["change"]) < 1e-6 and result.about["table"]["prob"]["change"] < -0.5


def targets(task):
    return [Target(int(task.answers.pos[i, 0]), {int(task.answers.answer[i, 0, 0]): 1.0}, {}) for i in range(len(task))]


# Plain text


@pytest.mark.parametrize("value", ["zero", "mean", "resample"])
def test_the_loss_on_plain_text(value):
    of = model("gpt2")
    task = templated(of, False)
    prompts = Prompts(torch.randint(0, of.d_vocab, (5, 9), generator=torch.Generator().manual_seed(2)))
    text = Blocks(prompts, torch.tensor([0, 0, 1, 2, 2]), "random tokens")
    result = knock_out(
        of, task, heads=[(1, 2)], mlps=[0], value=value, positions="END", text=text, draws=0, seed=1, force=True
    )
    changes = [head(1, 2), Site("mlp_out", 0)]
    by = "position" if value == "resample" else "all"
    for side, logits in (
        ("before", full_logits(of, prompts, [])),
        ("after", knocked(of, prompts, changes, everywhere(prompts), value, prompts, by, seed=1)),
    ):
        losses = torch.stack(
            [
                torch.stack([-logits[i, j].log_softmax(-1)[prompts.tokens[i, j + 1]] for j in range(8)]).mean()
                for i in range(5)
            ]
        )
        np.testing.assert_allclose(result.data[f"{side}_loss"].values, losses.numpy(), atol=1e-4)
    row = result.about["table"]["loss"]
    assert (
        row["change"] == pytest.approx(row["after"] - row["before"])
        and row["ci_low"] <= row["change"] <= row["ci_high"]
    )
    assert result.to_json()["text"]["source"] == "random tokens"
    with pytest.raises(UserError, match="plain text has no roles"):
        knock_out(of, task, edges=[((1, 2), "END", "A")], text=text, draws=0, force=True)


# Mutations: each must make the comparison fail.


def test_mutation_rows_of_another_knock_out(monkeypatch):
    of = model("llama")
    task = templated(of, True)
    want = knocked(of, task.clean, [head(1, 2)], everywhere(task.clean))
    edits = runs._edits
    monkeypatch.setattr(runs, "_edits", lambda sets, cases: edits(sets, cases.flip(0)))
    with pytest.raises(AssertionError):
        equals(of, task, knock_out(of, task, heads=[(1, 2)], draws=2, force=True), want)


def test_mutation_a_start_that_is_too_late(monkeypatch):
    of = model("llama")
    task = templated(of, True)
    want = knocked(of, task.clean, [head(1, 2)], everywhere(task.clean))
    starts = runs._starts
    monkeypatch.setattr(runs, "_starts", lambda prompts, sets: starts(prompts, sets) + 2)
    with pytest.raises(AssertionError):
        equals(of, task, knock_out(of, task, heads=[(1, 2)], draws=0, force=True), want)


def test_mutation_a_mean_that_counts_padding(monkeypatch):
    of = model("llama")
    task = templated(of, True)
    want = knocked(of, task.clean, [head(1, 2)], everywhere(task.clean))
    monkeypatch.setattr(Prompts, "real", property(lambda self: torch.ones_like(self.tokens, dtype=torch.bool)))
    with pytest.raises(AssertionError):
        equals(of, task, knock_out(of, task, heads=[(1, 2)], draws=0, force=True), want)


def test_means_of_several_heads_take_one_run(monkeypatch):
    of = model("llama")
    task = templated(of, True)
    of.levers  # noqa: B018 (tried once)
    count = []
    record = suffix.record
    monkeypatch.setattr(suffix, "record", lambda *args, **kwargs: count.append(1) or record(*args, **kwargs))
    knock_out(of, task, heads=[(0, 1), (1, 2), (2, 0)], mlps=[1], draws=10, force=True)
    assert len(count) == 2, "the means' run and the recorded run"
