"""Tasks: prompt pairs with answers and roles."""

from collections.abc import Callable

from mechinterp.tasks.agreement import agreement
from mechinterp.tasks.capitals import capitals
from mechinterp.tasks.docstring import docstring
from mechinterp.tasks.facts import facts, known
from mechinterp.tasks.file import from_file
from mechinterp.tasks.gendered_pronoun import gendered_pronoun
from mechinterp.tasks.greater_than import greater_than
from mechinterp.tasks.induction import induction
from mechinterp.tasks.ioi import ioi
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.tasks.planted import task_of

# By their names on the command line; each takes a model, n and seed.
TASKS: dict[str, Callable[..., PromptPairs]] = {
    "ioi": ioi,
    "greater-than": greater_than,
    "gendered-pronoun": gendered_pronoun,
    "agreement": agreement,
    "docstring": docstring,
    "induction": induction,
    "capitals": capitals,
}

__all__ = [
    "TASKS",
    "PromptPairs",
    "agreement",
    "capitals",
    "docstring",
    "facts",
    "from_file",
    "gendered_pronoun",
    "greater_than",
    "induction",
    "ioi",
    "known",
    "task_of",
]
