"""Induction on random tokens: `A B … C D … A` -> `B` (Olsson et al. 2022)."""

import random

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.pairs import PromptPairs, Target, assemble


def induction(model: HookedModel, n: int = 32, seed: int = 0, length: int = 12) -> PromptPairs:
    """Pairs of random tokens whose last one occurred before.

    Clean: `… A B … C D … A`, answer B, wrong answer D. Corrupted: A and C change places in the first part, so that the
    answer becomes D; only what follows "the token after an earlier A" can tell. Position 0 is neither A nor C.

    Args:
        model: gives the vocabulary; special tokens are not used.
        n: pairs.
        seed: of the draw.
        length: distinct tokens before the repeated one, at least 6.

    Returns:
        Pairs with a BOS where the model has one, and roles A1, B1 (its successor), C1, D1 and END.

    Raises:
        UserError: the vocabulary is too small for `length`, or `length` is below 6.
    """
    special = set(getattr(model.tokenizer, "all_special_ids", None) or [])
    vocabulary = [i for i in range(model.d_vocab) if i not in special]
    if not 6 <= length <= len(vocabulary):
        raise UserError(f"length must be 6 … {len(vocabulary)} for {model.info.name}; found {length}")
    draw = random.Random(seed)
    clean, corrupted, donor, roles, targets = [], [], [], [], []
    for _ in range(n):
        tokens = draw.sample(vocabulary, length)
        a = draw.randrange(1, length - 3)
        c = draw.randrange(a + 2, length - 1)
        used = set(tokens)
        others = [i for i in vocabulary if i not in used] if len(vocabulary) >= 2 * length else vocabulary
        other = draw.sample(others, length)
        swapped = list(tokens)
        swapped[a], swapped[c] = tokens[c], tokens[a]
        clean.append([*tokens, tokens[a]])
        corrupted.append([*swapped, tokens[a]])
        donor.append([*other, other[c]])
        roles.append({"A1": a, "B1": a + 1, "C1": c, "D1": c + 1, "END": length})
        targets.append([Target(length, {tokens[a + 1]: 1.0}, {tokens[c + 1]: 1.0})])
    source = {"task": "induction", "n": n, "seed": seed, "length": length}
    return assemble(
        model, "induction", "swapped-predecessors", clean, corrupted, roles, targets,
        donor=(donor, roles), seed=seed, source=source,
    )  # fmt: skip
