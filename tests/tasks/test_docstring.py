"""Docstring: the third argument follows the first two in the signature, and only there."""

import re

import pytest

from mechinterp import UserError
from mechinterp.tasks import docstring
from mechinterp.tasks.docstring import ARGUMENTS
from tests.tasks.spaced_model import spaced_model

SIGNATURE = r"def (\w+)\(self, (\w+), (\w+), (\w+), (\w+)\):\n"
MENTION = r"(?:param|arg|parameter) (\w+)"


def read(text):
    """The function, its arguments, and those that its docstring names."""
    function, *arguments = re.search(SIGNATURE, text).groups()
    return function, arguments, re.findall(MENTION, text.split("):\n", 1)[1])


def test_arguments():
    model = spaced_model()
    pairs = docstring(model, n=48, seed=2)
    assert pairs.roles == ("A_def", "B_def", "C_def", "D_def", "A_doc", "B_doc", "B_def+1", "END")
    for i in range(48):
        clean, corrupted, donor, same = (
            read("".join(model.token_strings(prompts.tokens[i, int(prompts.padding[i]) :])))
            for prompts in (pairs.clean, pairs.corrupted, pairs.donor, pairs.same_answer)
        )
        function, arguments, named = clean
        assert set(arguments) <= set(ARGUMENTS) and len(set(arguments)) == 4 and named == arguments[:2]
        assert corrupted[0] == function and corrupted[2] == named and not set(corrupted[1]) & set(arguments)
        assert donor[2] == donor[1][:2] and not set(donor[1]) & {*arguments, *corrupted[1]}
        assert same[1:] == clean[1:] and same[0] != function
        answers = pairs.answers
        assert model.token_strings(answers.answer[i, 0, :1]) == [f" {arguments[2]}"]
        wrong = model.token_strings(answers.wrong[i, 0][answers.wrong_weight[i, 0] > 0])
        assert wrong == [f" {arguments[j]}" for j in (0, 1, 3)]
        at = {role: model.token_strings(pairs.clean.tokens[i, where[i], None])[0] for role, where in roles(pairs)}
        a, b, c, d = (f" {argument}" for argument in arguments)
        assert at.pop("END").strip() in ("param", "arg", "parameter")
        assert at == {"A_def": a, "B_def": b, "B_def+1": ",", "C_def": c, "D_def": d, "A_doc": a, "B_doc": b}
        in_order = [int(pairs.clean.roles[role][i]) for role in ("A_def", "B_def", "C_def", "D_def", "A_doc", "B_doc")]
        assert in_order == sorted(in_order)


def roles(pairs):
    return pairs.clean.roles.items()


def test_too_few_arguments():
    with pytest.raises(
        UserError, match=f"has 11 of our {len(ARGUMENTS)} arguments as single tokens; the task needs 12"
    ):
        docstring(spaced_model(without=ARGUMENTS[11:]))
