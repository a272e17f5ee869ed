"""Tasks: prompt pairs with answers and roles."""

from mechinterp.tasks.facts import facts, known
from mechinterp.tasks.file import from_file
from mechinterp.tasks.induction import induction
from mechinterp.tasks.ioi import ioi
from mechinterp.tasks.pairs import PromptPairs

__all__ = ["PromptPairs", "facts", "from_file", "induction", "ioi", "known"]
