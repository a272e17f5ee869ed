"""Capitals: the answer is the country's capital, the wrong one that of the country on the corrupted side."""

import pytest

from mechinterp import UserError
from mechinterp.tasks import capitals
from mechinterp.tasks.capitals import CAPITALS
from mechinterp.tasks.facts import RELATIONS
from tests.tasks.spaced_model import spaced_model


def test_the_data():
    """Facts of tasks/facts.py are here too, and no capital is that of two countries."""
    facts = RELATIONS["capital"][1]
    assert {country: CAPITALS.get(country, capital) for country, capital in facts.items()} == dict(facts)
    assert sum(country in CAPITALS for country in facts) >= 5 and len(CAPITALS) >= 30
    assert len(set(CAPITALS.values())) == len(CAPITALS)


@pytest.mark.parametrize("longest", [20, 6], ids=["one token", "several tokens"])
def test_countries_and_answers(longest):
    model = spaced_model(longest=longest)
    pairs = capitals(model, n=64, seed=2)
    assert pairs.roles == ("country_first", "country_last", "END")
    lengths = set()
    for i in range(64):
        first, last = (int(pairs.clean.roles[role][i]) for role in ("country_first", "country_last"))
        clean, corrupted, donor, same = (
            "".join(model.token_strings(prompts.tokens[i, first : last + 1])).strip()
            for prompts in (pairs.clean, pairs.corrupted, pairs.donor, pairs.same_answer)
        )
        assert len({clean, corrupted, donor}) == 3 and same == clean
        asked = model.token_strings([int(pairs.answers.answer[i, 0, 0]), int(pairs.answers.wrong[i, 0, 0])])
        assert asked == [f" {CAPITALS[clean]}", f" {CAPITALS[corrupted]}"]
        assert donor in CAPITALS
        before, after = pairs.clean.tokens[i, :first], pairs.clean.tokens[i, last + 1 :]
        assert before.equal(pairs.corrupted.tokens[i, :first]) and after.equal(pairs.corrupted.tokens[i, last + 1 :])
        lengths.add(last - first + 1)
    assert lengths == ({1} if longest == 20 else {1, 2})


def test_countries_that_the_tokenizer_lacks():
    model = spaced_model(without=("Paris", "Germany"))
    text = "".join(model.token_strings(capitals(model, n=96).clean.tokens.flatten()))
    assert " France" not in text and " Germany" not in text and "<unk>" not in text
    cities = tuple(CAPITALS.values())[2:]
    with pytest.raises(UserError, match=r"no three countries of one length .* countries found: \{1: 2\}\)"):
        capitals(spaced_model(without=cities))
