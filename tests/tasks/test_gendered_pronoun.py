"""Gendered pronoun: the pronoun is that of the name, and the name is all that changes."""

import pytest

from mechinterp import UserError
from mechinterp.tasks import gendered_pronoun
from mechinterp.tasks.gendered_pronoun import FEMALE, MALE, THINGS
from tests.tasks.spaced_model import spaced_model


def test_names_and_pronouns():
    model = spaced_model()
    pairs = gendered_pronoun(model, n=64, seed=2)
    assert pairs.roles == ("NAME", "END") and not set(FEMALE) & set(MALE)
    women = 0
    for i in range(64):
        where = int(pairs.clean.roles["NAME"][i])
        sides = [
            [word.strip() for word in model.token_strings(prompts.tokens[i])]
            for prompts in (pairs.clean, pairs.corrupted, pairs.donor, pairs.same_answer)
        ]
        clean, corrupted, donor, same = (side[where] for side in sides)
        ours, others = (FEMALE, MALE) if clean in FEMALE else (MALE, FEMALE)
        assert clean in ours and same in ours and corrupted in others and donor in others
        assert len({clean, corrupted, donor, same}) == 4
        things = [next(word for word in side if word in THINGS) for side in sides]
        assert things[0] == things[1] != things[2] == things[3]
        asked = model.token_strings([int(pairs.answers.answer[i, 0, 0]), int(pairs.answers.wrong[i, 0, 0])])
        assert asked == ([" she", " he"] if ours is FEMALE else [" he", " she"])
        women += ours is FEMALE
    assert women == 32


def test_words_that_the_tokenizer_lacks():
    model = spaced_model(without=("Mary", "car"))
    pairs = gendered_pronoun(model, n=96)
    text = "".join(model.token_strings(pairs.clean.tokens.flatten()))
    assert " Mary" not in text and " car " not in text and "<unk>" not in text
    with pytest.raises(UserError, match=f"has 1 of our {len(FEMALE)} women's names as single tokens; the task needs 2"):
        gendered_pronoun(spaced_model(without=FEMALE[1:]))
    with pytest.raises(UserError, match="has 1 of our 2 pronouns"):
        gendered_pronoun(spaced_model(without=("she",)))
