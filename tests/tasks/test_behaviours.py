"""What the tasks made of templates share: seeds, aligned roles, single-token answers, clear errors."""

import re
import sys
from collections import Counter

import pytest
import torch

from mechinterp import UserError, baseline
from mechinterp.tasks import TASKS
from tests.tasks.spaced_model import spaced_model

NEW = ("greater-than", "gendered-pronoun", "agreement", "docstring", "capitals")
# Roles that the corrupted side changes, and no others.
CHANGED = {
    "greater-than": {"YY", "YY+1"},
    "gendered-pronoun": {"NAME"},
    "agreement": {"SUBJECT"},
    "docstring": {"A_def", "B_def", "C_def", "D_def"},
    "capitals": {"country_first"},
}


def templates_of(name):
    return sys.modules[TASKS[name].__module__].TEMPLATES


def text_of(model, prompts, i):
    """The text of prompt i, without padding and BOS."""
    return "".join(model.token_strings(prompts.tokens[i, int(prompts.padding[i]) + int(prompts.bos) :]))


def at(pairs, i):
    return {role: int(where[i]) for role, where in pairs.clean.roles.items()}


def sides(pairs):
    return (pairs.clean, pairs.corrupted, pairs.donor, pairs.same_answer)


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("name", NEW)
def test_sides_are_aligned_and_differ_where_they_should(name, bos):
    model = spaced_model(bos)
    pairs = TASKS[name](model, n=32, seed=3)
    assert len(pairs) == 32 and pairs.name == name and pairs.clean.bos is bos
    for other in sides(pairs)[1:]:
        assert torch.equal(other.padding, pairs.clean.padding)
        assert all(torch.equal(where, other.roles[role]) for role, where in pairs.clean.roles.items())
    unknown = model.tokenizer.unk_token_id
    for i in range(32):
        roles = at(pairs, i)
        assert roles["END"] == pairs.clean.n_pos - 1 == int(pairs.answers.pos[i, 0])
        differs = (pairs.clean.tokens[i] != pairs.corrupted.tokens[i]).nonzero().flatten().tolist()
        allowed = {roles[role] for role in CHANGED[name]}
        assert set(differs) == allowed or (name == "greater-than" and {roles["YY"]} <= set(differs) <= allowed)
        assert not any(bool((prompts.tokens[i] == unknown).any()) for prompts in sides(pairs))
        first = int(pairs.clean.padding[i])
        assert (int(pairs.clean.tokens[i, first]) == model.tokenizer.bos_token_id) is bos
        assert all(first + bos <= where for where in roles.values())


@pytest.mark.parametrize("name", NEW)
def test_every_side_is_its_template(name):
    model = spaced_model()
    pairs = TASKS[name](model, n=24, seed=1)
    for i in range(24):
        shape = re.sub(r"\\\{\w+\\\}", r"[A-Za-z0-9]+", re.escape(templates_of(name)[int(pairs.clean.template[i])]))
        for prompts in sides(pairs):
            text = text_of(model, prompts, i)
            assert re.fullmatch(shape, text), text
        assert text_of(model, pairs.same_answer, i) != text_of(model, pairs.clean, i) != text_of(model, pairs.donor, i)


@pytest.mark.parametrize("name", NEW)
def test_answers_are_single_tokens_and_no_wrong_ones(name):
    model = spaced_model()
    pairs = TASKS[name](model, n=32)
    for i in range(32):
        right, wrong = (
            model.token_strings(ids[i, 0][weight[i, 0] > 0])
            for ids, weight in (
                (pairs.answers.answer, pairs.answers.answer_weight),
                (pairs.answers.wrong, pairs.answers.wrong_weight),
            )
        )
        assert right and wrong and not {*right} & {*wrong}
        assert len({*right}) == len(right) and len({*wrong}) == len(wrong)
        pattern = r"\d" if name == "greater-than" else r" [A-Za-z]+"
        assert all(re.fullmatch(pattern, word) for word in (*right, *wrong)), (right, wrong)


@pytest.mark.parametrize("name", NEW)
def test_a_seed_is_a_task(name):
    model = spaced_model()
    a, b, c = (TASKS[name](model, n=16, seed=seed) for seed in (1, 1, 2))
    for one, same in zip(sides(a), sides(b), strict=True):
        assert torch.equal(one.tokens, same.tokens)
    assert a.hash() == b.hash() != c.hash() and a.seed == 1
    assert dict(a.source) == {"task": name, "n": 16, "seed": 1, "corruption": a.corruption}
    more = TASKS[name](model, n=20, seed=1)
    assert text_of(model, more.clean, 15) == text_of(model, a.clean, 15), "more pairs begin with the same ones"


@pytest.mark.parametrize("name", NEW)
def test_templates_are_balanced(name):
    n = 2 * len(templates_of(name))
    pairs = TASKS[name](spaced_model(), n=n, seed=4)
    assert set(Counter(pairs.clean.template.tolist()).values()) == {2} and n == 16
    if name in ("gendered-pronoun", "agreement"):
        by_answer = Counter(zip(pairs.clean.template.tolist(), pairs.answers.answer[:, 0, 0].tolist(), strict=True))
        assert len(by_answer) == n, "every template with either answer"


@pytest.mark.parametrize("n", [0, -2])
@pytest.mark.parametrize("name", NEW)
def test_no_pairs_are_an_error(name, n):
    with pytest.raises(UserError, match=f"n must be at least 1; found {n}"):
        TASKS[name](spaced_model(), n=n)


@pytest.mark.real_model
@pytest.mark.parametrize("name", NEW)
def test_smollm2_does_it(smollm2, name):
    found = baseline(smollm2, TASKS[name](smollm2, n=16, seed=5))
    assert float(found.clean.low) > 0.5 and float(found.corrupted.high) < 0, str(found)
    assert found.accuracy is not None and found.accuracy >= 0.9
