"""What cannot be knocked out is said in one line."""

import re
from dataclasses import replace

import pytest
import torch

from mechinterp import UserError, Zero
from mechinterp.ablation import knock_out
from mechinterp.hooked.sites import Site
from mechinterp.tasks.pairs import Answers, Target
from tests.ablation.reference import both, templated
from tests.checks import checks_off
from tests.families import full_logits, model, pairs


def lacking(of):
    task = templated(of, True)
    roles = {**task.clean.roles, "A": task.clean.roles["A"].where(torch.arange(6) != 2, -1)}
    return replace(task, clean=task.clean.with_roles(roles, task.clean.template))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"heads": []}, "nothing to knock out: the lists are empty. Valid: heads=[(layer, head), …]"),
        ({"heads": [(1, 2), (-2, 2)]}, "L1H2 is named 2 times"),
        ({"heads": [(3, 0)]}, "this model has layers 0 … 2"),
        ({"heads": [(0, 4)]}, "head is 0 … 3 at this site"),
        ({"heads": [(1,)]}, "a head is (layer, head), such as (3, 1); found (1,)"),
        ({"heads": (), "neurons": [(0, 99)]}, "neuron is 0 … 95 at this site"),
        ({"heads": (), "mlps": [7]}, "this model has layers 0 … 2"),
        ({"positions": "IO"}, "unknown positions 'IO'"),
        ({"positions": "each"}, "sets its positions all at once; valid: all, last, roles"),
        ({"positions": "A"}, "1 of 6 prompts have no role 'A' (the first: prompt 2); every prompt has: B, END"),
        ({"positions": "roles"}, "1 of 6 prompts have no role 'A'"),
        ({"edges": [((1, 2), "END", "A")]}, "1 of 6 prompts have no role 'A'"),
        ({"edges": [((1, 2), "END", "IO")]}, "unknown role 'IO'; roles of these pairs: A, B, END"),
        ({"edges": [((1, 2), "B", "END")]}, "edge L1H2 B→END: END comes after B in 6 of 6 prompts"),
        ({"edges": [((1, 2), "END")]}, "an edge is (head or None, query, key)"),
        ({"value": "noise"}, "unknown value 'noise'; valid: 'zero', 'mean', 'resample'"),
        ({"over": "both"}, "unknown over='both'; valid: 'clean', 'corrupted', or Prompts"),
        ({"by": "head"}, "unknown by='head' for value='mean'; valid: 'role', 'template', 'position', 'all'"),
        ({"by": "all", "value": "resample"}, "unknown by='all' for value='resample'"),
        ({"by": "position"}, "Mean(by='position') needs prompts of one length"),
        ({"force": False}, "the model does not do this task: its mean logit difference is -"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_knocked_out(change, says):
    of = model("gpt2")
    task = lacking(of)
    if "force" in change:  # answer and wrong answer change places where the model prefers the answer
        better = both(task, full_logits(of, task.clean, []))[0].mean() > 0
        turned = replace(task.answers, answer=task.answers.wrong, wrong=task.answers.answer)
        task = replace(task, answers=turned) if better else task
    asked = {"heads": [(1, 2)], "positions": "END", "draws": 0, "force": True} | change
    with checks_off(), pytest.raises(UserError, match=re.escape(says)) as error:
        knock_out(of, task, **asked)
    assert "\n" not in str(error.value)


def test_by_position_is_refused_where_roles_do_not_align():
    of = model("gpt2")
    task = pairs(of, False, n=6)
    roles = {**task.clean.roles, "B": torch.tensor([4, 4, 3, 4, 4, 4])}
    task = replace(task, clean=task.clean.with_roles(roles), corrupted=task.corrupted.with_roles(roles))
    for value in ("mean", "resample"):
        with pytest.raises(UserError, match="by='position' needs roles at the same positions; B is at 3 and at 4"):
            knock_out(of, task, heads=[(1, 2)], value=value, by="position", force=True)
    knock_out(of, task, heads=[(1, 2)], value="zero", by="position", draws=0, force=True)  # has no mean to take


def test_answers_that_are_not_single_tokens_or_have_no_wrong_one():
    of = model("gpt2")
    task = pairs(of, False)
    none = replace(task, answers=Answers.build([[Target(7, {3: 1.0}, {})] for _ in range(4)]))
    with pytest.raises(UserError, match="needs a wrong answer"):
        knock_out(of, none, heads=[(1, 2)], force=True)
    long = replace(task, continuations=[[1, 2]] * 4, long_answer="'ab' is 2 tokens")
    with pytest.raises(UserError, match="needs answers of one token, but 'ab'"):
        knock_out(of, long, heads=[(1, 2)], force=True)


def test_a_knock_out_that_changes_nothing_is_said():
    of = model("llama")
    task = pairs(of, False)
    with (
        of.intervene(Zero(Site("z", 1, head=2))),
        pytest.raises(UserError, match="Zero at L1H2 changed no element"),
    ):
        knock_out(of, task, heads=[(1, 2)], value="zero", draws=0, force=True)
