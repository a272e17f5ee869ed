"""Where a lens reads, and which answer it follows there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.tasks.pairs import Answers, PromptPairs, Target

Answer = str | int
Where = str | int | Sequence[str] | Sequence[int]
VALID = "last, all, roles, role names, indices"


@dataclass(frozen=True, eq=False)
class Reading:
    """Positions that are read, and what is asked there.

    Attributes:
        axis: of the spots: `pos`, `role`, or None where they are the targets of one question.
        labels: of the spots along it.
        asked: position, weight (0 where a prompt has no such position) and answers, `[prompt spot …]`.
        has_answer: whether `asked` names answers at all.
        others: the answers of other prompts at the same positions, the control of texts; None if there are none.
        control: what the control is.
    """

    axis: Literal["pos", "role"] | None
    labels: Sequence[int | str]
    asked: Answers
    has_answer: bool
    others: Answers | None
    control: str

    @property
    def present(self) -> Tensor:
        """`[prompt spot]` bool: which prompts have each position; one spot for the targets of one question."""
        has = self.asked.weight > 0
        return has if self.axis else has[:, :1]

    @property
    def rows(self) -> tuple[Answers | None, Answers | None]:
        """What is asked and what the control asks, with fields `[row k]`, a row for each prompt and spot."""

        def flat(answers: Answers) -> Answers:
            return Answers(**{name: value.flatten(0, 1) for name, value in vars(answers).items()})

        asked = flat(self.asked) if self.has_answer else None
        return asked, None if self.others is None else flat(self.others)

    def take(self, index: Tensor, spots: slice) -> "Reading":
        """Some prompts at some spots."""

        def part(answers: Answers) -> Answers:
            return Answers(**{name: value[index][:, spots] for name, value in vars(answers).items()})

        others = None if self.others is None else part(self.others)
        return replace(self, labels=self.labels[spots], asked=part(self.asked), others=others)

    def to(self, device: torch.device) -> "Reading":
        """The same on another device."""
        others = None if self.others is None else self.others.to(device)
        return replace(self, asked=self.asked.to(device), others=others)


def answer_tokens(model: HookedModel, answer: Answer | Sequence[Answer], n: int) -> list[int]:
    """The token id of every prompt's answer, `n` of them.

    Raises:
        UserError: an answer that is several tokens, none, or not in the vocabulary; another number than `n`.
    """
    given = [answer] * n if isinstance(answer, str | int) else list(answer)
    if len(given) != n:
        raise UserError(f"{len(given)} answers were given for {n} prompts; valid: one, or one for each")
    return [_token(model, one) for one in given]


def _token(model: HookedModel, answer: Answer) -> int:
    if isinstance(answer, int):
        if not 0 <= answer < model.d_vocab:
            raise UserError(f"answer {answer} is outside the vocabulary of {model.d_vocab} tokens")
        return answer
    ids = model.encode(answer, bos=False)
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if not ids or (unknown in ids and model.token_strings([unknown])[0].strip() != answer.strip()):
        raise UserError(f"the answer {answer!r} is not in the vocabulary of this tokenizer")
    if len(ids) > 1:
        split = " | ".join(map(repr, model.token_strings(ids)))
        hint = "" if answer.startswith(" ") else f" (a word within a text begins with a space: {' ' + answer!r})"
        raise UserError(f"an answer must be one token; {answer!r} is {len(ids)}: {split}{hint}")
    return ids[0]


def of_pairs(pairs: PromptPairs, positions: Where) -> Reading:
    """The answers of pairs at the positions that the task asks at ("last"), or at any others.

    Raises:
        UserError: answers of several tokens; several targets a prompt where positions are chosen.
    """
    if pairs.continuations is not None:
        raise UserError(f"a lens needs answers of one token, but {pairs.long_answer}")
    control = "the same reading of the corrupted prompts; for KL, the corrupted prompt's output"
    if positions == "last":
        return Reading(None, (), pairs.answers, True, None, control)
    if pairs.answers.pos.shape[1] > 1:
        raise UserError(f"these pairs ask at several positions each; valid for them: 'last'; found {positions!r}")
    axis, labels, pos, present = _spots(pairs.clean, positions)
    wide = {name: value.expand(-1, pos.shape[1], *value.shape[2:]) for name, value in vars(pairs.answers).items()}
    return Reading(axis, labels, Answers(**wide | {"pos": pos, "weight": present.float()}), True, None, control)


def of_prompts(prompts: Prompts, tokens: Sequence[int] | None, positions: Where) -> Reading:
    """One answer a prompt, or none, at the chosen positions."""
    axis, labels, pos, present = _spots(prompts, positions)

    def asking(ids: Sequence[int] | None) -> Answers:
        targets = [[Target(0, {} if ids is None else {ids[i]: 1.0}, {})] * pos.shape[1] for i in range(len(prompts))]
        return replace(Answers.build(targets), pos=pos, weight=present.float())

    others = None if tokens is None or len(set(tokens)) < 2 else asking(_others(tokens))
    why = "one prompt" if len(prompts) == 1 else "no answer" if tokens is None else "one answer for all prompts"
    control = f"none, {why}" if others is None else "another prompt's answer"
    return Reading(axis, labels, asking(tokens), tokens is not None, others, control)


def _others(tokens: Sequence[int]) -> list[int]:
    """For each prompt the answer of the next one that has another."""
    ahead = [[*tokens[i + 1 :], *tokens[:i]] for i in range(len(tokens))]
    return [next(one for one in rest if one != own) for own, rest in zip(tokens, ahead, strict=True)]


def _spots(
    prompts: Prompts, positions: Where
) -> tuple[Literal["pos", "role"] | None, Sequence[int | str], Tensor, Tensor]:
    """Axis, labels, `[prompt spot]` positions (padding counted), and which prompts have them.

    Raises:
        UserError: unknown positions or roles, an index outside a prompt.
    """
    n, n_pos = len(prompts), prompts.n_pos
    if isinstance(positions, str) and positions in ("last", "all", "each"):
        if positions == "last":
            return None, (), torch.full((n, 1), n_pos - 1), torch.ones(n, 1, dtype=torch.bool)
        return "pos", range(n_pos), torch.arange(n_pos).expand(n, -1), prompts.real.cpu()
    named = _named(prompts, positions)
    if all(isinstance(one, int) for one in named):
        masks = [prompts.select(one).cpu() for one in named]
        return "pos", named, torch.stack([mask.int().argmax(-1) for mask in masks], 1), torch.ones(n, len(named)) > 0
    unknown = [one for one in named if one not in prompts.roles]
    if unknown:
        roles = ", ".join(prompts.roles) or "none"
        raise UserError(f"unknown positions {unknown[0]!r}; valid: {VALID}; roles of these prompts: {roles}")
    at = torch.stack([prompts.roles[str(role)].cpu() for role in named], 1)
    return "role", named, at.clamp(min=0), at >= 0


def _named(prompts: Prompts, positions: Where) -> list[int | str]:
    if positions == "roles":
        if not prompts.roles:
            raise UserError("positions 'roles' needs prompts with roles; these have none. Valid: last, all, indices")
        return list(prompts.roles)
    if isinstance(positions, str):
        return [int(p) if p.strip().lstrip("-").isdigit() else p.strip() for p in positions.split(",")]
    named: list[int | str] = [positions] if isinstance(positions, int) else list(positions)
    if not named:
        raise UserError(f"no positions given; valid: {VALID}")
    return named
