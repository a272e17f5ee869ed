"""Plain text: documents from files, data sets or what every Python installation carries, cut into token blocks.

A block never crosses a document, so that intervals can take documents as their clusters.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mechinterp import data_sets, docstrings
from mechinterp.data_sets import DataSet
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts

BUILT_IN = "built-in"
DOCSTRINGS = "docstrings"
PASSAGE = 10_000
"""Characters of a passage, about: what a text without documents of its own is cut into."""

# An article of WikiText begins with a line ` = Title = `; its sections with ` = = Section = = `.
_ARTICLE = re.compile(r"^ = (?!=)[^\n]*(?<!=) = ?$", re.MULTILINE)
# Where a text may be cut: after blank lines, after a line, after white space. Each is tried on what the last left long.
_PIECES = (r"(?s).+?(?:\n(?:[ \t]*\n)+|\Z)", r"[^\n]*\n|[^\n]+\Z", r"\S*\s+|\S+\Z")


Source = str | Path | Sequence[str | Path] | DataSet | None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Token blocks of one length.

    Attributes:
        prompts: the blocks.
        document: `[prompt]` number of the document that each block is cut from.
        source: where the text came from.
    """

    prompts: Prompts
    document: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.prompts)

    def split(self, share: float) -> "tuple[Blocks, Blocks]":
        """The first documents, and the rest: at least one on each side. Raises UserError with fewer than two."""
        names = self.document.unique()
        if len(names) < 2:
            raise UserError(f"text to train on and held-out text need two documents; found {len(names)}")
        cut = names[min(len(names) - 1, max(1, round(share * len(names))))]
        return self.take(self.document < cut), self.take(self.document >= cut)

    def take(self, chosen: Tensor) -> "Blocks":
        """Some of the blocks, by a mask or indices."""
        index = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen
        return Blocks(self.prompts.take(index), self.document[index], self.source)


def documents(source: Source = None, split: str = "train", column: str = "text") -> tuple[Iterable[str], str]:
    """Documents, and a name for where they come from. What is returned can be gone through again and again.

    Args:
        source: one of
            a text file: see `parts` for its documents;
            a `.jsonl` file, a document a line, in the field `column`;
            several of these: a list of which each member is a `Path` or the name of a file that exists;
            a list of texts: any other list;
            a data set of the `datasets` package, in memory or streamed;
            the name of a hub data set, streamed;
            None or "built-in": the help topics of the Python language, which every installation carries;
            "docstrings": those of the installed packages, read from their source as they are asked for.
        split: of a hub data set.
        column: of a data set or a `.jsonl` file.

    Raises:
        UserError: no such file or data set, no such column, or no text in it.
    """
    if source is None or source == BUILT_IN:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)], BUILT_IN
    if source == DOCSTRINGS:
        return docstrings.installed(), DOCSTRINGS
    if isinstance(source, str | Path):
        return _named(source, split, column)
    if isinstance(source, Mapping):
        raise UserError(f"a data set of several splits was given ({', '.join(map(str, source))}); give one of them")
    if isinstance(source, DataSet):
        return data_sets.texts(source, column, "the data set"), data_sets.name_of(source)
    if not len(source):
        raise UserError("an empty list was given as text; valid: files or texts")
    if any(isinstance(one, Path) for one in source) or all(os.path.isfile(Path(one)) for one in source):
        found = [text for one in source for text in _from_file(Path(one), column)]
        return found, ", ".join(Path(one).name for one in source)
    if not any(str(text).strip() for text in source):
        raise UserError(f"the {len(source)} texts that were given are empty")
    return [str(text) for text in source], f"{len(source)} texts"


def _named(source: str | Path, split: str, column: str) -> tuple[Iterable[str], str]:
    if os.path.isfile(source):
        return _from_file(Path(source), column), Path(source).name
    if isinstance(source, Path) or source.endswith((".txt", ".jsonl", ".json", ".md")):
        raise UserError(f"no such text file: {source}")
    return data_sets.from_hub(source, split, column), source


def parts(text: str) -> list[str]:
    """The documents of a plain text, by the first rule that fits.

    1. A text that begins with WikiText's ` = Title = `: its articles.
    2. A text with two blank lines in a row: what lies between them.
    3. Any other, such as a novel: passages of about `PASSAGE` characters, cut at blank lines (a paragraph that is
       longer than a passage: at the ends of lines, then at white space).
    """
    starts = [found.start() for found in _ARTICLE.finditer(text)]
    if starts and not text[: starts[0]].strip():
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    apart = [part for part in text.split("\n\n\n") if part.strip()]
    return apart if len(apart) > 1 else list(_passages("".join(apart), PASSAGE))


def _passages(text: str, size: int) -> Iterator[str]:
    """Consecutive passages that together are `text`: `size` characters or a little more, the last one less."""
    held, n_held = [], 0
    for piece in _cut(text, size, 0):
        held.append(piece)
        n_held += len(piece)
        if n_held >= size:
            yield "".join(held)
            held, n_held = [], 0
    if n_held:
        yield "".join(held)


def _cut(text: str, size: int, rule: int) -> Iterator[str]:
    """Pieces of `text`, none longer than `size` unless no white space is in it."""
    for found in re.finditer(_PIECES[rule], text):
        longer = len(found[0]) > size and rule + 1 < len(_PIECES)
        yield from _cut(found[0], size, rule + 1) if longer else [found[0]]


def _from_file(path: Path, column: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"no such text file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read text from {path}: {error}; valid: UTF-8 text or JSON lines") from error
    if "\0" in text:
        raise UserError(f"cannot read text from {path}: it is binary; valid: UTF-8 text or JSON lines")
    found = _from_lines(path, text, column) if path.suffix == ".jsonl" else parts(text)
    if not any(part.strip() for part in found):
        raise UserError(f"{path} holds no text")
    return found


def _from_lines(path: Path, text: str, column: str) -> list[str]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line)
        if column not in row:
            fields = f"; found the fields {', '.join(row)}" if row else ""
            raise UserError(f"{path}, line {number}: expected a JSON object with a text in {column!r}{fields}")
        found.append(row[column])
        if not isinstance(found[-1], str):
            raise UserError(f"{path}, line {number}: {column!r} must be a text; found {found[-1]!r}")
    return found


def _parsed(line: str) -> dict[str, object]:
    """A JSON object; an empty one where the line holds none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def blocks(
    model: HookedModel, source: Source = None, length: int = 128, n: int | None = 64, per_document: int | None = None
) -> Blocks:
    """Token blocks of `length` tokens out of documents, each begun with a BOS where the model has one.

    Args:
        model: whose tokenizer cuts the text.
        source: see `documents`.
        length: tokens of a block, a BOS counted; what is left at the end of a document is dropped.
        n: blocks at most; all by default None.
        per_document: blocks of one document at most.

    Raises:
        UserError: no document has `length` tokens, or `length` is beyond the model's context.
    """
    require_length(model, length)
    return cut(model, *documents(source), length, n, per_document)


def cut(
    model: HookedModel,
    texts: Iterable[str],
    name: str,
    length: int,
    n: int | None = None,
    per_document: int | None = None,
) -> Blocks:
    """What `blocks` does, of documents that are at hand; `name` says where they come from."""
    front = require_length(model, length)
    body, longest = length - len(front), 0
    rows: list[list[int]] = []
    of: list[int] = []
    for number, text in enumerate(texts):
        ids = model.encode(text, bos=False)
        longest = max(longest, len(ids))
        cuts = range(0, len(ids) - body + 1, body)
        for start in islice(cuts, per_document):
            rows.append([*front, *ids[start : start + body]])
            of.append(number)
            if n is not None and len(rows) == n:
                return _made(rows, of, name, bool(front))
    if not rows:
        raise UserError(f"no document of {name} has {body} tokens; the longest has {longest}. Ask for shorter blocks")
    return _made(rows, of, name, bool(front))


def require_length(model: HookedModel, length: int) -> list[int]:
    """The tokens that begin each block, a BOS or none. Raises UserError if blocks of `length` do not fit the model."""
    front = [model.bos_token] if model.info.bos else []
    context = int(getattr(model.bridge.cfg, "n_ctx", None) or length)
    if not 2 <= length <= context:
        raise UserError(f"blocks of {length} tokens were asked for; valid: 2 … {context}, the context of the model")
    return front


def _made(rows: list[list[int]], of: list[int], name: str, bos: bool) -> Blocks:
    return Blocks(Prompts(torch.tensor(rows), bos=bos), torch.tensor(of), name)
