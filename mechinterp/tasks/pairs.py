"""Prompt pairs: the unit of every patching experiment.

A pair is a clean prompt, which has the behaviour, a corrupted one of the same length, which has not, and what the model
is asked: the answer and the wrong answer at one or more target positions. Roles name positions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts


@dataclass(frozen=True, eq=False)
class Answers:
    """What is asked of every prompt.

    Attributes:
        pos: `[prompt target]` position whose next-token logits are read, padding counted.
        weight: `[prompt target]` share of each target in a prompt's metric; rows sum to 1, 0 pads.
        answer, wrong: `[prompt target k]` token ids.
        answer_weight, wrong_weight: `[prompt target k]` shares of the tokens; sum to 1, 0 pads. A prompt without a
            wrong answer has a row of zeros.
    """

    pos: Tensor
    weight: Tensor
    answer: Tensor
    answer_weight: Tensor
    wrong: Tensor
    wrong_weight: Tensor

    @property
    def has_wrong(self) -> bool:
        """Whether every prompt names a wrong answer."""
        return bool((self.wrong_weight.sum(-1)[self.weight > 0] > 0).all())

    def take(self, index: Tensor) -> "Answers":
        """Answers of the prompts at `index`."""
        return Answers(**{name: value[index.to(value.device)] for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> "Answers":
        """The same on another device."""
        return Answers(**{name: value.to(device) for name, value in vars(self).items()})

    @classmethod
    def build(cls, targets: Sequence[Sequence["Target"]]) -> "Answers":
        """From the targets of every prompt, padded to the same number of targets and tokens."""
        n_targets = max(len(row) for row in targets)
        k = max(max(len(t.answer), len(t.wrong)) for row in targets for t in row)
        shape = (len(targets), n_targets, max(k, 1))
        made = cls(
            torch.zeros(shape[:2], dtype=torch.long),
            torch.zeros(shape[:2]),
            *[torch.zeros(shape, dtype=d) for d in (torch.long, torch.float, torch.long, torch.float)],
        )
        for i, row in enumerate(targets):
            made.pos[i] = row[0].pos  # padding targets read a real position, with weight 0
            for j, target in enumerate(row):
                made.pos[i, j], made.weight[i, j] = target.pos, 1 / len(row)
                pairs = (
                    (target.answer, made.answer, made.answer_weight),
                    (target.wrong, made.wrong, made.wrong_weight),
                )
                for tokens, ids, weights in pairs:
                    total = sum(tokens.values())
                    for c, (token, weight) in enumerate(tokens.items()):
                        ids[i, j, c], weights[i, j, c] = token, weight / total
        return made


@dataclass(frozen=True)
class Target:
    """One question: at `pos` (padding counted), `answer` and `wrong` as token id -> weight."""

    pos: int
    answer: Mapping[int, float]
    wrong: Mapping[int, float]


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Clean and corrupted prompts with their answers. Both sides of a pair have the same length, padding and roles.

    Attributes:
        name: of the task, such as "ioi".
        corruption: how the corrupted side was made.
        clean, corrupted: the prompts, with roles and templates.
        answers: what is asked.
        donor: another clean prompt for each pair, of the same length, with other names and (where the task has one)
            another order: the control of a denoising sweep patches from it. None if there is none.
        same_answer: another clean prompt for each pair with the same answer, in other words: the control of a noising
            sweep, for which a donor of another answer would be a corruption like any other.
        seed: that the pairs were drawn with.
        continuations: where answers have several tokens, their token ids by prompt (see `teacher_forced`).
        long_answer: the first such answer and its split, for messages.
        appended: `[prompt]` tokens of the answer that teacher forcing appended; None if it did not.
        source: what the pairs were made from: settings, or a file and its hash.
    """

    name: str
    corruption: str
    clean: Prompts
    corrupted: Prompts
    answers: Answers
    donor: Prompts | None = None
    same_answer: Prompts | None = None
    seed: int = 0
    continuations: Sequence[Sequence[int]] | None = None
    long_answer: str | None = None
    appended: Tensor | None = None
    source: Mapping[str, str | int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the roles."""
        return tuple(self.clean.roles)

    def hash(self) -> str:
        """sha256 of the tokens of both sides and of what is asked."""
        digest = hashlib.sha256()
        for tensor in (self.clean.tokens, self.clean.real, self.corrupted.tokens, *vars(self.answers).values()):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def take(self, index: Tensor) -> "PromptPairs":
        """Some of the pairs, at the same width."""
        keep = None if self.continuations is None else [self.continuations[int(i)] for i in index]
        return replace(
            self,
            clean=self.clean.take(index),
            corrupted=self.corrupted.take(index),
            answers=self.answers.take(index),
            donor=None if self.donor is None else self.donor.take(index),
            same_answer=None if self.same_answer is None else self.same_answer.take(index),
            continuations=keep,
            appended=None if self.appended is None else self.appended[index],
        )

    def other_prompts(self) -> Prompts | None:
        """For each pair the clean prompt of another one, of the same length and with another answer: what the control
        of a sweep patches from where the task has no donors. None if some pair has no such partner."""
        answer, wrong, padding = self.answers.answer[:, 0, 0], self.answers.wrong[:, 0, 0], self.clean.padding
        chosen = []
        for i in range(len(self)):
            fits = (padding == padding[i]) & (answer != answer[i])
            better = fits & (answer != wrong[i])
            candidates = (better if better.any() else fits).nonzero().flatten().tolist()
            if not candidates:
                return None
            chosen.append(candidates[i % len(candidates)])
        return self.clean.take(torch.tensor(chosen))

    def preview(self, model: HookedModel, n: int = 4) -> str:
        """The first prompts by token, each followed by its roles in brackets."""
        lines = []
        for i in range(min(n, len(self))):
            for side, prompts in (("clean", self.clean), ("corrupted", self.corrupted)):
                shown = "|".join(
                    f"{text}[{'/'.join(roles)}]" if roles else text for text, roles in labelled(model, prompts, i)
                )
                lines.append(f"{side:>9}  {shown}")
            answer = model.token_strings(self.answers.answer[i, 0][self.answers.answer_weight[i, 0] > 0])
            wrong = model.token_strings(self.answers.wrong[i, 0][self.answers.wrong_weight[i, 0] > 0])
            lines.append(f"{'answer':>9} {' | '.join(map(repr, answer))}  wrong {' | '.join(map(repr, wrong)) or '–'}")
        return "\n".join(lines)

    def teacher_forced(self) -> "PromptPairs":
        """The pairs with each answer's continuation appended, asking for every one of its tokens.

        Roles keep their positions. Pairs whose answers are single tokens come back as they are.
        """
        if self.continuations is None:
            return self
        sides = []
        for prompts in (self.clean, self.corrupted):
            real = prompts.real
            ids = [prompts.tokens[i][real[i]].tolist() + list(more[:-1]) for i, more in enumerate(self.continuations)]
            longer = Prompts.from_lists(ids, bos=prompts.bos)
            added = torch.tensor([len(more) - 1 for more in self.continuations])
            # Padding is on the left: tokens move by the change in width, less what the prompt gained on the right.
            shift = longer.n_pos - prompts.n_pos - added
            roles = {name: torch.where(at < 0, at, at + shift) for name, at in prompts.roles.items()}
            sides.append(longer.with_roles(roles, prompts.template))
        width = sides[0].n_pos
        targets = [
            [Target(width - len(more) + j, {token: 1.0}, {}) for j, token in enumerate(more)]
            for more in self.continuations
        ]
        return replace(
            self,
            clean=sides[0],
            corrupted=sides[1],
            answers=Answers.build(targets),
            donor=None,
            same_answer=None,
            continuations=None,
            long_answer=None,
            appended=torch.tensor([len(more) - 1 for more in self.continuations]),
        )


def labelled(model: HookedModel, prompts: Prompts, i: int) -> list[tuple[str, list[str]]]:
    """Tokens of prompt `i` as text, each with the roles at it."""
    start = int(prompts.padding[i])
    texts = model.token_strings(prompts.tokens[i, start:])
    return [
        (text, [name for name, at in prompts.roles.items() if int(at[i]) == start + j]) for j, text in enumerate(texts)
    ]


def assemble(
    model: HookedModel,
    name: str,
    corruption: str,
    clean: Sequence[Sequence[int]],
    corrupted: Sequence[Sequence[int]],
    roles: Sequence[Mapping[str, int]],
    targets: Sequence[Sequence[Target]],
    *,
    donor: tuple[Sequence[Sequence[int]], Sequence[Mapping[str, int]]] | None = None,
    same_answer: Sequence[Sequence[int]] | None = None,
    templates: Sequence[int] | None = None,
    bos: bool | None = None,
    **extra: object,
) -> PromptPairs:
    """Prompt pairs from token lists without BOS; role and target positions count from the first of these tokens.

    `donor` holds token lists and their roles, `same_answer` token lists with the roles of the pairs. `bos` None follows
    the model: the BOS is put in front and every position moves by one. `extra` are further fields of PromptPairs.

    Raises:
        UserError: the sides of a pair, or its donors, differ in length; the sides are shown by token.
    """
    for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)):
        others = [*([donor[0][i]] if donor else []), *([same_answer[i]] if same_answer else [])]
        if any(len(other) != len(a) for other in others):
            raise UserError(f"pair {i + 1}: a control prompt differs from it in length; choose words of equal length")
        if len(a) != len(b):
            shown = [" | ".join(model.token_strings(side)) for side in (a, b)]
            raise UserError(
                f"pair {i + 1}: the clean side has {len(a)} tokens, the corrupted {len(b)}; a pair must have one "
                f"length.\n  clean      {shown[0]}\n  corrupted  {shown[1]}"
            )
    bos = model.info.bos if bos is None else bos
    front = [model.bos_token] if bos else []
    width = max(len(row) for row in clean) + len(front)
    shift = [width - len(row) for row in clean]
    template = None if templates is None else torch.tensor(list(templates))

    def side(rows: Sequence[Sequence[int]], roles: Sequence[Mapping[str, int]]) -> Prompts:
        made = Prompts.from_lists([front + list(row) for row in rows], model.pad_token, bos=bool(front))
        names = dict.fromkeys(role for row in roles for role in row)
        at = {
            name: [row[name] + s if name in row else -1 for row, s in zip(roles, shift, strict=True)] for name in names
        }
        return made.with_roles({name: torch.tensor(where) for name, where in at.items()}, template)

    moved = [[replace(t, pos=t.pos + s) for t in row] for row, s in zip(targets, shift, strict=True)]
    return PromptPairs(
        name,
        corruption,
        side(clean, roles),
        side(corrupted, roles),
        Answers.build(moved),
        donor=None if donor is None else side(*donor),
        same_answer=None if same_answer is None else side(same_answer, roles),
        **extra,  # type: ignore[arg-type]
    )
