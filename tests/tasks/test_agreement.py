"""Agreement: the verb is that of the subject, whatever the attractor."""

import pytest

from mechinterp import UserError
from mechinterp.tasks import agreement
from mechinterp.tasks.agreement import ATTRACTORS, SUBJECTS
from tests.tasks.spaced_model import spaced_model


def number(noun, nouns):
    """0 for a singular, 1 for a plural, and which noun it is."""
    return next((which, form.index(noun)) for which, form in enumerate(nouns) if noun in form)


def test_nouns_and_verbs():
    model = spaced_model()
    pairs = agreement(model, n=64, seed=2)
    assert pairs.roles == ("SUBJECT", "ATTRACTOR", "END")
    plurals, at_the_end = 0, set()
    for i in range(64):
        subjects, attractors = (
            [
                number(model.token_strings(prompts.tokens[i, prompts.roles[role][i], None])[0].strip(), nouns)
                for prompts in (pairs.clean, pairs.corrupted, pairs.donor, pairs.same_answer)
            ]
            for role, nouns in (("SUBJECT", SUBJECTS), ("ATTRACTOR", ATTRACTORS))
        )
        plural = subjects[0][1]
        assert [form for _, form in subjects] == [plural, 1 - plural, 1 - plural, plural]
        assert [form for _, form in attractors] == [1 - plural, 1 - plural, plural, 1 - plural]
        assert subjects[0][0] == subjects[1][0] and len({which for which, _ in subjects}) == 3
        assert attractors[0] == attractors[1] and len({which for which, _ in attractors}) == 3
        asked = model.token_strings([int(pairs.answers.answer[i, 0, 0]), int(pairs.answers.wrong[i, 0, 0])])
        assert asked == ([" are", " is"] if plural else [" is", " are"])
        plurals += plural
        at_the_end.add(bool(pairs.clean.roles["ATTRACTOR"][i] == pairs.clean.roles["END"][i]))
    assert plurals == 32 and at_the_end == {True, False}


def test_nouns_need_both_forms():
    model = spaced_model(without=("keys", "door"))
    pairs = agreement(model, n=96)
    text = "".join(model.token_strings(pairs.clean.tokens.flatten()))
    assert not any(f" {word}" in text for word in ("key", "keys", "door", "doors")) and "<unk>" not in text
    too_few = tuple(plural for _, plural in ATTRACTORS[2:])
    with pytest.raises(
        UserError, match=rf"has 2 of our {len(ATTRACTORS)} attractors \(singular and plural\) as single"
    ):
        agreement(spaced_model(without=too_few))
    with pytest.raises(UserError, match="has 1 of our 2 verbs"):
        agreement(spaced_model(without=("are",)))
