"""Prompt pairs from a JSON-lines file (see mechinterp/pairs_file.py for its form)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.pairs_file import Line, Question, read_pairs_file
from mechinterp.tasks.pairs import PromptPairs, Target, assemble


def from_file(model: HookedModel, path: str | Path, seed: int = 0) -> PromptPairs:
    """Read pairs from JSON lines and tokenize them for `model`.

    Answers of several tokens are kept whole, for the metric seq-logprob; others refuse them.

    Raises:
        UserError: what `read_pairs_file` raises; sides of unequal length; positions outside a prompt.
    """
    lines = read_pairs_file(path)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return from_lines(model, lines, name=Path(path).stem, source={"file": Path(path).name, "sha256": digest}, seed=seed)


def from_lines(
    model: HookedModel, lines: Sequence[Line], name: str, source: Mapping[str, str | int], seed: int = 0
) -> PromptPairs:
    """Prompt pairs from lines that were read already."""
    clean = [model.encode(line.clean, bos=False) for line in lines]
    corrupted = [model.encode(line.corrupted, bos=False) for line in lines]
    targets, whole, long = [], [], None
    for line, tokens in zip(lines, clean, strict=True):
        answers = {text: model.encode(text, bos=False) for q in line.questions for text in (*q.answer, *q.wrong)}
        for text, ids in answers.items():
            unknown = getattr(model.tokenizer, "unk_token_id", None)
            if not ids or (unknown in ids and model.token_strings([unknown])[0].strip() != text.strip()):
                raise UserError(f"line {line.number}: {text!r} is not in the vocabulary of this tokenizer")
        for question in line.questions:
            both = {tuple(answers[t]) for t in question.answer} & {tuple(answers[t]) for t in question.wrong}
            if both:
                raise UserError(f"line {line.number}: an answer is also a wrong answer: {sorted(question.wrong)}")
        longer = [text for text, ids in answers.items() if len(ids) != 1]
        if longer:
            if len(line.questions) > 1 or len(line.questions[0].answer) > 1:
                raise UserError(f"line {line.number}: of several answers or targets each must be one token: {longer!r}")
            split = " | ".join(repr(t) for t in model.token_strings(answers[longer[0]]))
            long = long or f"{longer[0]!r} of line {line.number} is {len(answers[longer[0]])} tokens: {split}"
        whole.append(answers[next(iter(line.questions[0].answer))])
        targets.append([_target(line, q, answers, len(tokens)) for q in line.questions])
    for line, tokens in zip(lines, clean, strict=True):
        last = [q.pos is None or _at(line, "pos", q.pos, len(tokens)) == len(tokens) - 1 for q in line.questions]
        if long and last != [True]:
            raise UserError(f"line {line.number} asks before the end, which answers of several tokens ({long}) cannot")
    roles = [
        {role: _at(line, role, at, len(t)) for role, at in line.roles.items()}
        for line, t in zip(lines, clean, strict=True)
    ]
    return assemble(
        model, name, "given", clean, corrupted, roles, targets,
        continuations=whole if long else None, long_answer=long, source=source, seed=seed,
    )  # fmt: skip


def _target(line: Line, question: Question, ids: Mapping[str, Sequence[int]], length: int) -> Target:
    pos = length - 1 if question.pos is None else _at(line, "pos", question.pos, length)
    # Of an answer of several tokens the first stands here; only seq-logprob runs such pairs, on `continuations`.
    answer, wrong = ({ids[t][0]: w for t, w in side.items()} for side in (question.answer, question.wrong))
    return Target(pos, answer, wrong)


def _at(line: Line, what: str, index: int, length: int) -> int:
    if not -length <= index < length:
        raise UserError(f"line {line.number}: {what} is at token {index}, but the prompt has {length} tokens")
    return index % length
