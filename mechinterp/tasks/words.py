"""Words of the tasks as tokens: which ones a tokenizer can carry, and where they stand in a filled template."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel


def single_tokens(model: HookedModel, words: Sequence[str], what: str, at_least: int) -> list[str]:
    """The words that are one token after a space.

    Raises:
        UserError: fewer than `at_least`; `what` names the words.
    """
    return [word for (word,) in single_groups(model, [(word,) for word in words], what, at_least)]


def single_groups(
    model: HookedModel, groups: Sequence[tuple[str, ...]], what: str, at_least: int
) -> list[tuple[str, ...]]:
    """The groups of words, such as singular and plural, all of which are one token after a space.

    Raises:
        UserError: fewer than `at_least`; `what` names the groups.
    """
    kept = [group for group in groups if all(is_single(model, word) for word in group)]
    if len(kept) < at_least:
        raise UserError(
            f"the tokenizer of {model.info.name} has {len(kept)} of our {len(groups)} {what} as single tokens; the "
            f"task needs {at_least}. Give your own pairs as JSON lines instead"
        )
    return kept


def is_single(model: HookedModel, word: str) -> bool:
    """Whether the word is one token after a space."""
    ids = model.encode(f" {word}", bos=False)
    # Its text is compared because a tokenizer of words makes one `<unk>` of any name.
    return len(ids) == 1 and model.token_strings(ids)[0].strip() == word


def token(model: HookedModel, word: str) -> int:
    """The token id of a word after a space, which must be a single one."""
    (only,) = model.encode(f" {word}", bos=False)
    return only


def alternating(draw: random.Random, templates: int, n: int) -> Iterator[tuple[int, bool]]:
    """`n` times (template, flag): every template once, the flags in turn; then every template with its other flag.

    The order is drawn as it is asked for, so that more pairs begin with the same ones.

    Raises:
        UserError: n is below 1.
    """
    if n < 1:
        raise UserError(f"n must be at least 1; found {n}")
    order = list(range(templates))
    for i in range(n):
        late, at = divmod(i % (2 * templates), templates)
        if late == at == 0:
            draw.shuffle(order)
        yield order[at], (at + late) % 2 == 0


def fill(model: HookedModel, template: str, words: Mapping[str, str]) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Token ids of a filled template, and the first and last token of the word in each slot.

    Args:
        template: text with slots `{name}`, each once.
        words: of the slots.

    Raises:
        UserError: a word begins or ends within a token.
    """
    text, ends = "", dict[str, tuple[str, str]]()
    for literal, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        text += literal
        if name:
            # The space in front of a word is a part of its token.
            ends[name] = (text.removesuffix(" "), text + words[name])
            text = ends[name][1]
    ids = model.encode(text, bos=False)
    spans = {}
    for name, (before, through) in ends.items():
        front, back = (model.encode(part, bos=False) for part in (before, through))
        if ids[: len(front)] != front or ids[: len(back)] != back or len(front) == len(back):
            raise UserError(
                f"the tokenizer of {model.info.name} has no token border around {words[name]!r} in {text!r}: "
                f"{' | '.join(model.token_strings(ids))}. Give your own pairs as JSON lines instead"
            )
        spans[name] = (len(front), len(back) - 1)
    return ids, spans
