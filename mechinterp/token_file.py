"""Token sequences on disk: a JSON list of token-id lists, read and checked without a model (and without torch)."""

import json
from pathlib import Path

from mechinterp.errors import UserError


def read_token_file(path: str | Path) -> list[list[int]]:
    """The sequences of a file, used as they are: nothing is put in front.

    Raises:
        UserError: no such file, no JSON, or anything but a list of non-empty lists of whole numbers ≥ 0.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such token file: {path}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read tokens from {path}: {error}") from error
    expected = "a JSON list of lists of token ids, such as [[5, 7, 5, 7], [1, 2, 1, 2]]"
    if not isinstance(found, list) or not found:
        raise UserError(f"{path} must hold {expected}; found {_shown(found)}")
    for number, row in enumerate(found, 1):
        if not isinstance(row, list) or not row:
            raise UserError(f"{path}: sequence {number} must be a list of token ids; found {_shown(row)}")
        wrong = [one for one in row if type(one) is not int or one < 0]  # a bool is no token
        if wrong:
            raise UserError(f"{path}: sequence {number} holds {_shown(wrong[0])}, which is no token id")
    return found


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
