"""Plain text: documents from files, hub data sets or what every Python installation carries, cut into token blocks.

A block never crosses a document, so that intervals can take documents as their clusters.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts

BUILT_IN = "built-in"
Source = str | Path | Sequence[str] | None


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
    """Documents, and a name for where they come from.

    Args:
        source: a text file (blank lines part documents where it has them), a `.jsonl` file with a field `column`, a
            list of texts, the name of a hub data set (streamed), or None: the help topics of the Python language,
            which every installation carries.
        split, column: of a data set.

    Raises:
        UserError: no such file or data set, or no text in it.
    """
    if source is None or source == BUILT_IN:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)], BUILT_IN
    if isinstance(source, Sequence) and not isinstance(source, str):
        return list(source), f"{len(source)} texts"
    path = Path(source)
    if path.is_file():
        return _from_file(path, column), path.name
    if path.suffix in (".txt", ".jsonl", ".json", ".md") or isinstance(source, Path):
        raise UserError(f"no such text file: {path}")
    return _from_hub(str(source), split, column), str(source)


def _from_file(path: Path, column: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read text from {path}: {error}") from error
    if path.suffix == ".jsonl":
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                found.append(json.loads(line)[column])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}: expected a JSON object with a text in {column!r}") from None
            if not isinstance(found[-1], str):
                raise UserError(f"{path}, line {number}: {column!r} must be a text; found {found[-1]!r}")
    else:
        found = [part for part in text.split("\n\n\n") if part.strip()]
    if not any(part.strip() for part in found):
        raise UserError(f"{path} holds no text")
    return found


def _from_hub(name: str, split: str, column: str) -> Iterable[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(name, split=split, streaming=True)
        first = next(iter(rows))
    except (DatasetNotFoundError, OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"text {name!r} is no file here and cannot be had from the hub ({reason}); valid: a text file, a .jsonl "
            f"file, a data set's name, or {BUILT_IN!r}"
        ) from None
    if column not in first:
        raise UserError(f"data set {name!r} has no column {column!r}; it has: {', '.join(first)}")
    return (row[column] for row in rows)


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
    front = [model.bos_token] if model.info.bos else []
    context = int(getattr(model.bridge.cfg, "n_ctx", None) or length)
    if not 2 <= length <= context:
        raise UserError(f"blocks of {length} tokens were asked for; valid: 2 … {context}, the context of the model")
    texts, name = documents(source)
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


def _made(rows: list[list[int]], of: list[int], name: str, bos: bool) -> Blocks:
    return Blocks(Prompts(torch.tensor(rows), bos=bos), torch.tensor(of), name)
