"""Prompt pairs on disk: JSON lines, read and checked without a model (and without importing torch).

One object a line: `clean`, `corrupted`, `answer`, `wrong`, and optionally `roles` and `targets`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechinterp.errors import UserError

FIELDS = ("clean", "corrupted", "answer", "wrong", "roles", "targets")


@dataclass(frozen=True)
class Question:
    """What is asked at one position (None: the last): texts of the answer and the wrong answer, with weights."""

    pos: int | None
    answer: Mapping[str, float]
    wrong: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """One pair as written: texts, roles and positions counted in tokens of the text alone."""

    number: int
    clean: str
    corrupted: str
    questions: Sequence[Question]
    roles: Mapping[str, int] = field(default_factory=dict)


def read_pairs_file(path: str | Path) -> list[Line]:
    """Read and check a JSON-lines file of pairs.

    Raises:
        UserError: no such file, an empty one, a line that is no JSON object, or a field that is missing, unknown or of
            another type; the line's number is named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such pairs file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read pairs from {path}: {error}") from error
    lines = [_line(path, number, raw) for number, raw in enumerate(text.split("\n"), 1) if raw.strip()]
    if not lines:
        raise UserError(f"{path} holds no pairs; one JSON object a line with {', '.join(FIELDS[:4])} is expected")
    return lines


def _line(path: str | Path, number: int, raw: str) -> Line:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(raw)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with {', '.join(FIELDS[:4])}; found {type(entry).__name__}")
    unknown = set(entry) - set(FIELDS)
    if unknown:
        raise UserError(f"{where} has unknown fields {sorted(unknown)}; valid: {', '.join(FIELDS)}")
    for name in ("clean", "corrupted"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise UserError(f"{where} needs {name!r}, a text; found {entry.get(name)!r}")
    targets = entry.get("targets")
    if targets is not None:
        if "answer" in entry or "wrong" in entry:
            raise UserError(f"{where} has both 'targets' and 'answer'/'wrong'; give one of them")
        if not isinstance(targets, list) or not targets or not all(isinstance(t, dict) for t in targets):
            raise UserError(f"{where}: 'targets' must be a list of objects with pos, answer, wrong; found {targets!r}")
        strange = {key for target in targets for key in target} - {"pos", "answer", "wrong"}
        if strange:
            raise UserError(f"{where}: 'targets' have unknown fields {sorted(strange)}; valid: pos, answer, wrong")
        questions = [_question(where, target, _index(where, "pos", target.get("pos"))) for target in targets]
    else:
        questions = [_question(where, entry, None)]
    roles = entry.get("roles") or {}
    if not isinstance(roles, dict):
        raise UserError(f"{where}: 'roles' must be an object of name: token index; found {roles!r}")
    indexed = {str(name): _index(where, f"role {name}", at) for name, at in roles.items()}
    return Line(number, entry["clean"], entry["corrupted"], questions, indexed)


def _index(where: str, what: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: {what} must be a token index; found {value!r}")
    return value


def _question(where: str, entry: Mapping[str, Any], pos: int | None) -> Question:
    if "answer" not in entry:
        raise UserError(f"{where} needs 'answer', a text or a list of texts")
    return Question(pos, _weighted(where, "answer", entry["answer"]), _weighted(where, "wrong", entry.get("wrong", [])))


def _weighted(where: str, name: str, value: Any) -> dict[str, float]:
    """A text, a list of texts, a list of [text, weight], or an object text: weight."""
    items = value.items() if isinstance(value, dict) else [value] if isinstance(value, str) else value
    weighted: dict[str, float] = {}
    for item in items if isinstance(items, list) or isinstance(value, dict) else [items]:
        whole: Any = item if isinstance(item, list | tuple) and len(item) == 2 else (None, 0)
        text, weight = (item, 1.0) if isinstance(item, str) else whole
        number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        good = isinstance(text, str) and text and number and weight > 0
        if not good:
            raise UserError(
                f"{where}: {name!r} must be a text, a list of texts, or of [text, weight > 0]; found {value!r}"
            )
        weighted[text] = float(weight)
    if name == "answer" and not weighted:
        raise UserError(f"{where}: 'answer' is empty")
    return weighted
