"""Words as tokens: what is kept, where slots are found, and what a tokenizer cannot carry."""

import random

import pytest

from mechinterp import UserError
from mechinterp.tasks.cases import Case, Filled, from_cases
from mechinterp.tasks.words import alternating, fill, is_single, single_groups, single_tokens, token
from tests.tasks.spaced_model import spaced_model
from tests.tasks.word_model import word_model


def test_single_tokens():
    model = spaced_model(without=("key",))
    assert not is_single(model, "key") and is_single(model, "keys") and not is_single(model, "door keys")
    assert single_tokens(model, ("keys", "key", "doors"), "things", 2) == ["keys", "doors"]
    assert single_groups(model, [("key", "keys"), ("door", "doors")], "things", 1) == [("door", "doors")]
    with pytest.raises(UserError, match="spaced has 1 of our 2 things as single tokens; the task needs 2"):
        single_tokens(model, ("key", "doors"), "things", 2)
    assert model.token_strings([token(model, "doors")]) == [" doors"]


def test_fill_finds_every_slot():
    model = spaced_model(longest=5)
    ids, at = fill(model, "The {a} near the {b}\n: {c}", {"a": "keys", "b": "children", "c": "door"})
    texts = model.token_strings(ids)
    assert texts == ["The", " keys", " near", " the", " child", "ren", "\n", ":", " door"]
    assert at == {"a": (1, 1), "b": (4, 5), "c": (8, 8)}
    same, nothing = fill(model, "The keys", {})
    assert model.token_strings(same) == ["The", " keys"] and nothing == {}


def test_a_word_within_a_token_is_an_error():
    with pytest.raises(UserError, match=r"no token border around 'store' in 'left the store, and'"):
        fill(word_model(), "left the {place}, and", {"place": "store"})  # words are split at spaces


@pytest.mark.parametrize("templates", [1, 3, 4])
def test_alternating(templates):
    drawn = list(alternating(random.Random(2), templates, 4 * templates))
    assert drawn == list(alternating(random.Random(2), templates, 4 * templates))
    for start in (0, templates, 2 * templates, 3 * templates):
        assert sorted(t for t, _ in drawn[start : start + templates]) == list(range(templates))
    for start in (0, 2 * templates):
        assert len(set(drawn[start : start + 2 * templates])) == 2 * templates, "each with either flag"
    assert [flag for _, flag in drawn[: 2 * templates]].count(True) == templates


def test_roles_must_align():
    model = spaced_model()
    a, b = (Filled(model.encode("The keys near the door", bos=False), {"NOUN": where}) for where in (1, 2))
    for wrong in ("corrupted", "donor", "same_answer"):
        sides = {**dict.fromkeys(("clean", "corrupted", "donor", "same_answer"), a), wrong: b}
        with pytest.raises(UserError, match="pair 1: a role is not at the same token of every prompt"):
            from_cases(model, "t", "c", [Case(0, **sides, answer={1: 1.0}, wrong={2: 1.0})], 0)
