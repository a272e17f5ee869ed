"""Docstring argument: `def f(self, size, name, file): ... :param size: … :param name: … :param` -> " file".

The task of Heimersheim & Janiak 2023 (A circuit for Python docstrings in a 4-layer attention-only transformer), with
templates and words of our own, kept only where they are single tokens under the tokenizer of the model at hand.
"""

import random

from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.cases import Case, Filled, from_cases
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.tasks.words import alternating, fill, single_tokens, token

_METHOD = "def {function}(self, {A_def}, {B_def}, {C_def}, {D_def}):\n"
TEMPLATES = (
    _METHOD
    + '    """Check the {what}.\n\n    :param {A_doc}: the {first}\n    :param {B_doc}: its {second}\n    :param',
    _METHOD
    + '    """Return one {what}.\n\n    @param {A_doc}: some {first}\n    @param {B_doc}: any {second}\n    @param',
    _METHOD + '    """Make a new {what}.\n\n    :arg {A_doc}: a {first}\n    :arg {B_doc}: a {second}\n    :arg',
    _METHOD
    + '    """Compare with a {what}.\n    @arg {A_doc} - this {first}\n    @arg {B_doc} - that {second}\n    @arg',
    _METHOD
    + "    # Each {what} in turn.\n    # param {A_doc}: the {first}\n    # param {B_doc}: the {second}\n    # param",
    "class Tool:\n    " + _METHOD
    + '        """Find {what}.\n\n        :param {A_doc}: {first}\n        :param {B_doc}: {second}\n        :param',
    "class Other(Base):\n    " + _METHOD
    + '        """Keep {what}.\n\n        @param {A_doc}: {first}\n        @param {B_doc}: {second}\n        @param',
    "async " + _METHOD
    + '    """Wait for {what}.\n\n    :parameter {A_doc}: {first}\n    :parameter {B_doc}: {second}\n    :parameter',
)  # fmt: skip
FUNCTIONS = ("load", "read", "build", "find", "update", "create", "parse", "test", "run", "open", "check", "write")
ARGUMENTS = (
    "size", "name", "file", "path", "color", "user", "key", "value", "width", "index", "text", "state", "data", "time",
    "group", "label", "model", "node", "port", "shape", "image", "page", "code", "order", "version", "field", "line",
    "table", "result", "message",
)  # fmt: skip
WORDS = (
    "number", "place", "list", "string", "object", "part", "letter", "sum", "thing", "point", "rest", "kind", "case",
    "day", "word", "piece",
)  # fmt: skip


def docstring(model: HookedModel, n: int = 64, seed: int = 0) -> PromptPairs:
    """Pairs over 8 styles of docstring, which has named two of a method's four arguments and is to name the third.

    The corrupted side has four other names in the signature, so that the answer does not occur and the docstring's
    names are no longer followed by anything there; the docstring is identical.

    Args:
        model: whose tokenizer decides which words can be used.
        n: pairs; templates are balanced.
        seed: of the draw.

    Returns:
        Pairs with roles A_def, B_def, B_def+1 (the comma before the answer), C_def, D_def, A_doc, B_doc and END. Wrong
        answers are the method's other three arguments. The donor of a pair has other arguments; its `same_answer`
        prompt the same arguments, in another function that is described in other words.

    Raises:
        UserError: too few names or words are single tokens; n is below 1.
    """
    draw = random.Random(seed)
    functions = single_tokens(model, FUNCTIONS, "functions", 2)
    arguments, words = single_tokens(model, ARGUMENTS, "arguments", 12), single_tokens(model, WORDS, "words", 6)

    def prompt(template: int, signature: list[str], doc: list[str], function: str, words: list[str]) -> Filled:
        slots = dict(zip(("A_def", "B_def", "C_def", "D_def"), signature, strict=True))
        slots |= {"A_doc": doc[0], "B_doc": doc[1], "function": function}
        slots |= dict(zip(("what", "first", "second"), words, strict=True))
        ids, at = fill(model, TEMPLATES[template], slots)
        roles = {name: at[name][0] for name in ("A_def", "B_def", "C_def", "D_def", "A_doc", "B_doc")}
        return Filled(ids, {**roles, "B_def+1": roles["B_def"] + 1, "END": len(ids) - 1})

    cases = []
    for template, _ in alternating(draw, len(TEMPLATES), n):
        names, said = draw.sample(arguments, 12), draw.sample(words, 6)
        ours, others, third = names[:4], names[4:8], names[8:]
        function, elsewhere = draw.sample(functions, 2)
        cases.append(
            Case(
                template,
                clean=prompt(template, ours, ours, function, said[:3]),
                corrupted=prompt(template, others, ours, function, said[:3]),
                donor=prompt(template, third, third, function, said[:3]),
                same_answer=prompt(template, ours, ours, elsewhere, said[3:]),
                answer={token(model, ours[2]): 1.0},
                wrong={token(model, ours[i]): 1.0 for i in (0, 1, 3)},
            )
        )
    return from_cases(model, "docstring", "other-arguments", cases, seed)
