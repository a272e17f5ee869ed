"""Tokens that repeat: random ones, the user's own, and the same without the repetition.

1. `repeated_tokens` draws `period` different tokens a prompt and writes them down twice or more, behind a BOS where
   the model has one (Olsson et al. 2022).
2. `as_prompts` takes the user's own sequences as they are. With a period, the last `period` tokens of each must be
   those before them once more; what stands in front of the two copies is a prefix.
3. `fresh` is the control: the same prompts with tokens in the last copy that occur nowhere before.
"""

import operator
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.hooked.prompts import Prompts

PERIOD = 50


def ordinary_tokens(model: HookedModel) -> list[int]:
    """Ids that stand for text: no special or added tokens, no rows of the embedding without a token."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return list(range(model.d_vocab))
    apart = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [i for i in range(min(model.d_vocab, len(tokenizer))) if i not in apart]


def sample_tokens(model: HookedModel, n: int, seed: int) -> Tensor:
    """`[token]` different ordinary tokens in random order; all of them where there are no more. UserError under two."""
    vocabulary = ordinary_tokens(model)
    if n < 2 or len(vocabulary) < 2:
        raise UserError(f"a sample needs at least two tokens; found n_tokens={n}, {len(vocabulary)} in the vocabulary")
    return torch.tensor(random.Random(seed).sample(vocabulary, min(n, len(vocabulary))), device=model.device)


def context(model: HookedModel) -> int | None:
    """Positions that the model has; None where nothing limits them."""
    return int(getattr(model.bridge.cfg, "n_ctx", None) or 0) or None


def default_period(model: HookedModel, copies: int = 2) -> int:
    """50, or as much as `copies` take of the context and as leaves fresh tokens for the control."""
    room = (context(model) or copies * PERIOD + 1) - int(model.info.bos)
    return max(2, min(PERIOD, room // copies, len(ordinary_tokens(model)) // 2))


def repeated_tokens(
    model: HookedModel, n: int = 16, period: int | None = None, copies: int = 2, seed: int = 0
) -> Prompts:
    """Random tokens, repeated: `[BOS] A B C … A B C …`.

    Args:
        model: gives the vocabulary; special tokens are not used.
        n: prompts.
        period: tokens of a copy, all different; 50 by default, less where context or vocabulary are small.
        copies: how often they are written down.
        seed: of the draw.

    Returns:
        Prompts with a BOS where the model has one, and roles COPY1, COPY2, …: the first token of each copy.

    Raises:
        UserError: no prompts, fewer than two copies, or a period that does not fit the model.
    """
    if n < 1 or copies < 2:
        raise UserError(f"repeated tokens need n ≥ 1 and copies ≥ 2; found n={n}, copies={copies}")
    period = default_period(model, copies) if period is None else period
    vocabulary, limit, front = ordinary_tokens(model), context(model), [model.bos_token] if model.info.bos else []
    most = min(len(vocabulary), ((limit or 10**9) - len(front)) // copies)
    if not 2 <= period <= most:
        raise UserError(
            f"a period of {period} was asked for, {copies} times; valid for {model.info.name}: 2 … {most} "
            f"({len(vocabulary)} tokens, {limit or 'any number of'} positions)"
        )
    draw = random.Random(seed)
    prompts = Prompts.from_lists([[*front, *draw.sample(vocabulary, period) * copies] for _ in range(n)])
    roles = {f"COPY{i + 1}": torch.full((n,), len(front) + i * period) for i in range(copies)}
    return replace(prompts, bos=bool(front)).with_roles(roles)


def as_prompts(model: HookedModel, given: Input, period: int | None) -> tuple[Prompts, int | None]:
    """The user's sequences as prompts, checked, and their period (that of `repeated_tokens` is known from the roles).

    Raises:
        UserError: which names the sequence: a token that the model does not have, more positions than it has, fewer
            than two tokens (or two periods), or a last copy that is not the one before it.
    """
    if period is not None and period < 2:
        raise UserError(f"period must be at least 2; found {period}")
    prompts = given if isinstance(given, Prompts) else _wrapped(model, given)
    if period is None and {"COPY1", "COPY2"} <= set(prompts.roles):
        period = int((prompts.roles["COPY2"] - prompts.roles["COPY1"])[0])
    limit = context(model)
    for i, row in enumerate(_rows(prompts), 1):
        bad = row[(row < 0) | (row >= model.d_vocab)]
        if len(bad):
            raise UserError(f"sequence {i}: token id {int(bad[0])} is outside the vocabulary of {model.d_vocab} tokens")
        if limit is not None and len(row) > limit:
            raise UserError(f"sequence {i} has {len(row)} tokens; {model.info.name} has {limit} positions")
        least = 3 if period is None else 2 * period
        if len(row) < least:
            what = "a pattern needs 3" if period is None else f"two copies of {period} need {least}"
            raise UserError(f"sequence {i} has {len(row)} tokens; {what}")
        if period is not None:
            _require_repeat(model, i, row, period)
    return prompts, period


def _wrapped(model: HookedModel, given: Sequence[Any] | Tensor) -> Prompts:
    """Texts as the model tokenizes them; token ids as they are, with the BOS seen where all of them begin with it."""
    if isinstance(given, str) or (not isinstance(given, Tensor) and len(given) > 0 and isinstance(given[0], str)):
        return model.to_prompts(given)
    listed = (given[None] if given.ndim == 1 else given).tolist() if isinstance(given, Tensor) else given
    rows: list[list[int]] = []
    for i, row in enumerate(listed, 1):
        try:
            rows.append([operator.index(token) for token in row])
        except TypeError:
            raise UserError(f"sequence {i} must be a list of token ids; found {row!r:.60}") from None
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return Prompts.from_lists(rows, model.pad_token, bos=bos is not None and all(row[:1] == [bos] for row in rows))


def _rows(prompts: Prompts) -> list[Tensor]:
    """The tokens of each prompt, without padding."""
    return [tokens[real] for tokens, real in zip(prompts.tokens.cpu(), prompts.real.cpu(), strict=True)]


def _require_repeat(model: HookedModel, number: int, row: Tensor, period: int) -> None:
    first, last = row[-2 * period : -period], row[-period:]
    wrong = (first != last).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        found, wanted = model.token_strings([int(last[at]), int(first[at])])
        raise UserError(
            f"sequence {number}: its last {period} tokens do not repeat the {period} before them: token {at + 1} of "
            f"the copy is {found!r}, not {wanted!r}. Check the period, or give none for text that does not repeat"
        )


def fresh(model: HookedModel, prompts: Prompts, period: int, seed: int = 0) -> tuple[Prompts, float]:
    """The prompts with other tokens in the last `period` positions, all different, and the share of them that occur
    nowhere before.

    Where the vocabulary has too few others, the missing places repeat tokens of the copy before, half a period away
    from where they would match.

    Raises:
        UserError: the vocabulary is too small even for that.
    """
    draw, vocabulary, tokens = random.Random(seed), ordinary_tokens(model), prompts.tokens.clone()
    found = 0
    for i, row in enumerate(_rows(prompts)):
        used = set(row.tolist())
        others = [token for token in vocabulary if token not in used]
        chosen = draw.sample(others, min(period, len(others)))
        if len(chosen) < period and period < 4:
            raise UserError(f"no {period} tokens are left for the control: {model.info.name} has {len(vocabulary)}")
        moved = row[-period:].roll(-(period // 2)).tolist()
        tokens[i, -period:] = torch.tensor([*chosen, *moved[len(chosen) :]])
        found += len(chosen)
    return replace(prompts, tokens=tokens), found / (len(prompts) * period)
