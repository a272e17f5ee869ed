"""Pairs of the planted models: what differs between the two prompts, and that nothing else does."""

import pytest
import torch

from mechinterp import UserError, evaluate, load
from mechinterp.hooked.prompts import Prompts
from mechinterp.models.planted import PLANTED
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.tasks.planted import BY_MODEL, backup, doubled_word, other_tokens, task_of
from tests.tasks.word_model import word_model

N = 24


@pytest.fixture(scope="module")
def models():
    return {name: load(name, device="cpu") for name in PLANTED}


def words(model, prompts, i):
    return model.token_strings(prompts.tokens[i])


def differing(pairs, i):
    return (pairs.clean.tokens[i] != pairs.corrupted.tokens[i]).nonzero().flatten().tolist()


def at(prompts, i):
    return {name: int(where[i]) for name, where in prompts.roles.items()}


def asked(model, pairs, i):
    """Answer and wrong answer."""
    return model.token_strings(torch.stack([pairs.answers.answer[i, 0, 0], pairs.answers.wrong[i, 0, 0]]))


@pytest.mark.parametrize("length", [6, 12, 26])
def test_other_tokens(models, length):
    model = models["planted-induction"]
    pairs = other_tokens(model, N, 2, length)
    for i in range(N):
        clean, corrupted, role = words(model, pairs.clean, i), words(model, pairs.corrupted, i), at(pairs.clean, i)
        assert not set(clean) & set(corrupted) and len(set(clean)) == len(set(corrupted)) == length
        assert clean[-1] == clean[role["A1"]] and corrupted[-1] == corrupted[role["C1"]]
        assert asked(model, pairs, i) == [clean[role["B1"]], corrupted[role["D1"]]]
        assert role["B1"] == role["A1"] + 1 and role["D1"] == role["C1"] + 1 and role["END"] == length


@pytest.mark.parametrize("length", [5, 9, 13])
def test_doubled_word(models, length):
    model = models["planted-and"]
    pairs = doubled_word(model, N, 2, length)
    for i in range(N):
        clean, corrupted, role = words(model, pairs.clean, i), words(model, pairs.corrupted, i), at(pairs.clean, i)
        k1, k2, end = role["K1"], role["K2"], role["END"]
        assert (k2, role["GATE"], end) == (k1 + 1, k1 + 2, length - 1) and k1 >= 1 and role["GATE"] < end
        assert clean[k1] == clean[k2] and len(set(clean)) == length - 1
        assert differing(pairs, i) == [k1, k2] and len(set(corrupted)) == length
        assert clean[k1] not in corrupted and "-" not in clean + corrupted
        assert asked(model, pairs, i) == [clean[k1], "-"]
        donor, there = words(model, pairs.donor, i), at(pairs.donor, i)
        assert not set(donor) & set(clean) and len(set(donor)) == length - 1
        assert donor[there["K1"]] == donor[there["K2"]] and there["GATE"] == there["K1"] + 2
        same = words(model, pairs.same_answer, i)
        assert set(same) & set(clean) == {clean[k1]} and same[k1] == same[k2] == clean[k1]
        assert len(set(same)) == length - 1


@pytest.mark.parametrize("length", [4, 9, 12])
def test_backup(models, length):
    model = models["planted-or"]
    pairs = backup(model, N, 2, length)
    for i in range(N):
        clean, corrupted, role = words(model, pairs.clean, i), words(model, pairs.corrupted, i), at(pairs.clean, i)
        a, b, end = role["A1"], role["B1"], role["END"]
        assert b == a + 1 < end == length + 1 and clean[0] == "-" and clean[end] == clean[a]
        assert len(set(clean)) == length + 1 and differing(pairs, i) == [a]
        assert len(set(corrupted)) == length + 2, "the last word is new"
        assert asked(model, pairs, i) == [clean[b], "-"]
        donor, there = words(model, pairs.donor, i), at(pairs.donor, i)
        assert donor[end] == donor[there["A1"]] and set(donor) & set(clean) == {"-"}
        same = words(model, pairs.same_answer, i)
        assert same[end] == same[a] and same[b] == clean[b] and set(same) & set(clean) == {"-", clean[b]}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("length", [6, 11])
def test_the_model_does_it_and_its_controls_hold(models, name, length):
    """The controls' own prompts: a donor has another answer, a `same_answer` prompt the same one."""
    model = models[name]
    pairs = task_of(name)(model, n=N, seed=5, length=length)
    assert evaluate(model, pairs).min() > 3 and evaluate(model, pairs, side="corrupted").max() < -3
    answer = pairs.answers.answer[:, 0, 0]
    if pairs.donor is None:
        other = pairs.other_prompts()
        assert isinstance(other, Prompts) and (model(other)[:, -1].argmax(-1) != answer).all()
    else:
        assert (model(pairs.donor)[:, -1].argmax(-1) != answer).all()
        assert (model(pairs.same_answer)[:, -1].argmax(-1) == answer).all()


def test_every_planted_model_has_a_task_that_says_what_it_was_made_from(models):
    assert set(BY_MODEL) == set(PLANTED)
    for name, model in models.items():
        pairs = task_of(name)(model, n=4, seed=9)
        assert isinstance(pairs, PromptPairs) and len(pairs) == 4
        assert pairs.source["task"] == pairs.name and (pairs.source["n"], pairs.source["seed"]) == (4, 9)


@pytest.mark.parametrize("name", PLANTED)
def test_it_is_seeded(models, name):
    made = [task_of(name)(models[name], n=6, seed=seed) for seed in (4, 4, 5)]
    assert made[0].hash() == made[1].hash() != made[2].hash()
    assert not torch.equal(made[0].clean.tokens, made[2].clean.tokens)


@pytest.mark.parametrize(
    "name, length, says",
    [
        ("planted-induction", 27, "length must be 6 … 26 for planted-induction; found 27"),
        ("planted-and", 4, "length must be 5 … 13 for planted-and; found 4"),
        ("planted-and", 14, "length must be 5 … 13"),
        ("planted-or", 3, "length must be 4 … 12 for planted-or; found 3"),
        ("planted-or", 13, "length must be 4 … 12"),
    ],
)
def test_lengths_that_cannot_be(models, name, length, says):
    with pytest.raises(UserError, match=says):
        task_of(name)(models[name], length=length)


def test_other_models_and_names_are_refused(models):
    with pytest.raises(UserError, match="planted-induction has no token '-'; this task is for planted-and and planted"):
        doubled_word(models["planted-induction"])
    with pytest.raises(UserError, match="words has no token 'b'"):
        backup(word_model(True))
    with pytest.raises(
        UserError, match="'gpt2' is no planted model; valid: planted-induction, planted-and, planted-or"
    ):
        task_of("gpt2")
