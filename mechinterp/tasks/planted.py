"""Prompt pairs for the planted models: on every pair each true edge shows its type (mechinterp/models/planted).

Attention finds something only if query, key and value are all there, which is an AND of its own. So a task decides what
differs between the two prompts of a pair: everything (`other_tokens`), both facts (`doubled_word`), or one word that
two heads depend on alike (`backup`).
"""

import random
from collections.abc import Callable
from dataclasses import replace

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.induction import induction
from mechinterp.tasks.pairs import PromptPairs, Target, assemble

NONE = "-"  # the word for "nothing was found"


def other_tokens(model: HookedModel, n: int = 32, seed: int = 0, length: int = 12) -> PromptPairs:
    """Induction, `… A B … A` -> `B`, where the corrupted prompt has other words throughout, and its own answer.

    For `planted-induction`. Queries, keys and values all differ, so that every edge of the circuit is seen, where the
    pairs of `tasks.induction` show only what the keys carry.

    Args:
        model: gives the vocabulary; special tokens are not used.
        n: pairs.
        seed: of the draw.
        length: distinct tokens before the repeated one, from 6 to half of the vocabulary.

    Returns:
        Pairs with roles A1, B1, C1, D1, END. Clean repeats A and is answered by B; the corrupted prompt, the donor of
        `tasks.induction`, repeats its own word at C1, and what follows that at D1 is the wrong answer.

    Raises:
        UserError: `length` is out of range.
    """
    special = set(getattr(model.tokenizer, "all_special_ids", None) or [])
    _require(length, 6, (model.d_vocab - len(special)) // 2, model)
    pairs = induction(model, n, seed, length)
    assert pairs.donor is not None
    wrong = pairs.donor.tokens.gather(1, pairs.donor.roles["D1"][:, None])[:, :, None]
    return replace(
        pairs,
        name="other-tokens",
        corruption="other-tokens",
        corrupted=pairs.donor,
        answers=replace(pairs.answers, wrong=wrong),
        donor=None,  # it has become the corrupted side; sweeps draw their control from the other pairs
        source={**pairs.source, "task": "other-tokens"},
    )


def doubled_word(model: HookedModel, n: int = 32, seed: int = 0, length: int = 9) -> PromptPairs:
    """`c d k k f g h` -> `k`: the word that is said twice in a row; two different words stand there when corrupted.

    For `planted-and`: of the two facts that its gate joins, both hold in the clean prompt and none in the corrupted
    one. The wrong answer is `-`, for none.

    Args:
        model: a model whose vocabulary is single letters and `-`.
        n: pairs.
        seed: of the draw.
        length: tokens of a prompt, at least 5.

    Returns:
        Pairs with roles K1 and K2 (the doubled word), GATE (the position behind, which sees both) and END. A donor
        has words of its own, doubled elsewhere; a `same_answer` prompt has the same word doubled, among other words.

    Raises:
        UserError: `length` is out of range, or a word is not in the vocabulary.
    """
    words, none = _words(model)
    _require(length, 5, len(words) // 2, model)
    draw = random.Random(seed)
    clean, corrupted, donor, same, roles, donor_roles, targets = [], [], [], [], [], [], []
    for _ in range(n):
        chosen = draw.sample(words, 2 * length)
        row, others, fresh = chosen[: length - 1], chosen[length - 1 : -2], chosen[-2:]
        at, other_at = draw.randrange(1, length - 3), draw.randrange(1, length - 3)
        clean.append([*row[: at + 1], *row[at:]])
        corrupted.append([*row[:at], *fresh, *row[at + 1 :]])
        donor.append([*others[: other_at + 1], *others[other_at:]])
        same.append([*others[:at], row[at], row[at], *others[at + 1 :]])
        roles.append(_doubled_at(at, length))
        donor_roles.append(_doubled_at(other_at, length))
        targets.append([Target(length - 1, {row[at]: 1.0}, {none: 1.0})])
    return assemble(
        model, "doubled-word", "two-words", clean, corrupted, roles, targets, donor=(donor, donor_roles),
        same_answer=same, seed=seed, source={"task": "doubled-word", "n": n, "seed": seed, "length": length},
    )  # fmt: skip


def backup(model: HookedModel, n: int = 32, seed: int = 0, length: int = 9) -> PromptPairs:
    """`- … A B … A` -> `B`; in the corrupted prompt a word that occurs nowhere else takes the place of the first A.

    For `planted-or`: what differs reaches both of its induction heads, through their keys, and either suffices. The
    wrong answer is `-`, for a last word that is new.

    Args:
        model: a model whose vocabulary is single letters and `-`.
        n: pairs.
        seed: of the draw.
        length: distinct words between the first `-` and the repeated word, at least 4.

    Returns:
        Pairs with roles A1, B1 (its successor) and END. A donor has words of its own, its A and B elsewhere; a
        `same_answer` prompt has the same B at the same place, among other words.

    Raises:
        UserError: `length` is out of range, or a word is not in the vocabulary.
    """
    words, none = _words(model)
    _require(length, 4, (len(words) - 1) // 2, model)
    draw = random.Random(seed)
    clean, corrupted, donor, same, roles, donor_roles, targets = [], [], [], [], [], [], []
    for _ in range(n):
        chosen = draw.sample(words, 2 * length + 1)
        row, others, fresh = chosen[:length], chosen[length:-1], chosen[-1]
        a, other_a = draw.randrange(length - 1), draw.randrange(length - 1)
        clean.append([none, *row, row[a]])
        corrupted.append([none, *row[:a], fresh, *row[a + 1 :], row[a]])
        donor.append([none, *others, others[other_a]])
        same.append([none, *others[: a + 1], row[a + 1], *others[a + 2 :], others[a]])
        roles.append({"A1": a + 1, "B1": a + 2, "END": length + 1})
        donor_roles.append({"A1": other_a + 1, "B1": other_a + 2, "END": length + 1})
        targets.append([Target(length + 1, {row[a + 1]: 1.0}, {none: 1.0})])
    return assemble(
        model, "backup", "first-word", clean, corrupted, roles, targets, donor=(donor, donor_roles),
        same_answer=same, seed=seed, source={"task": "backup", "n": n, "seed": seed, "length": length},
    )  # fmt: skip


BY_MODEL: dict[str, Callable[..., PromptPairs]] = {
    "planted-induction": other_tokens,
    "planted-and": doubled_word,
    "planted-or": backup,
}


def task_of(name: str) -> Callable[..., PromptPairs]:
    """The task maker of a planted model, `(model, n, seed, length) -> PromptPairs`.

    Raises:
        UserError: no planted model has this name.
    """
    if name not in BY_MODEL:
        raise UserError(f"{name!r} is no planted model; valid: {', '.join(BY_MODEL)}")
    return BY_MODEL[name]


def _doubled_at(at: int, length: int) -> dict[str, int]:
    return {"K1": at, "K2": at + 1, "GATE": at + 2, "END": length - 1}


def _words(model: HookedModel) -> tuple[list[int], int]:
    """Ids of the letters and of `-`."""
    texts = [*"abcdefghijklmnopqrstuvwxyz", NONE]
    ids = [model.encode(text, bos=False) for text in texts]
    for text, found in zip(texts, ids, strict=True):
        if len(found) != 1 or model.token_strings(found)[0].strip() != text:
            raise UserError(f"{model.info.name} has no token {text!r}; this task is for planted-and and planted-or")
    *words, none = [found[0] for found in ids]
    return words, none


def _require(length: int, least: int, most: int, model: HookedModel) -> None:
    if not least <= length <= most:
        raise UserError(f"length must be {least} … {most} for {model.info.name}; found {length}")
