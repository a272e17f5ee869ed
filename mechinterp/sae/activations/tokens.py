"""Packed blocks of tokens out of documents: endless, sharded, and resumable to the token.

1. Documents are numbered in the order of their source. Number 0 and every `held_out_every`-th after it are held out:
   training never sees them, `held_out_blocks` cuts blocks from nothing else.
2. The other documents, in order or shuffled, are dealt out to the ranks: rank r of w takes each w-th, from the r-th on.
3. They are tokenized some at a time (fast tokenizers are several times as fast so), each is ended by a separator, and
   the stream of their tokens is cut into blocks. A block begins with a BOS where the model has one.
4. What a cut leaves over is kept for the next block, from one epoch to the next too. The number of documents read
   and this rest are all that a resumed stream needs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.data_sets import TextStream
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.text import Blocks, Source, cut, documents, require_length

HELD_OUT_EVERY = 20
# A tokenizer's batch ends with the document that reaches one of these.
_DOCUMENTS, _CHARACTERS = 64, 500_000


@runtime_checkable
class TokenSource(Protocol):
    """Where a harvest gets its tokens from."""

    def take(self, n: int) -> Tensor:
        """The next `[block pos]`, n of them; fewer or none at the end of a finite source."""
        ...

    def fresh(self, shard: tuple[int, int] | None = None) -> "TokenSource":
        """The same source from its beginning, of that shard or its own."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """A flat dict of tensors and plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


class TokenBlocks:
    """An endless stream of blocks of tokens from the documents that are not held out.

    Attributes:
        source: name of where the text comes from.
        epoch: how often the documents have been gone through; that of the last document that was read.
    """

    def __init__(
        self,
        model: HookedModel,
        source: Source,
        context: int,
        shard: tuple[int, int] = (0, 1),
        held_out_every: int | None = HELD_OUT_EVERY,
        seed: int | None = None,
        split: str = "train",
        column: str = "text",
    ) -> None:
        """Nothing is tokenized yet.

        Args:
            model: whose tokenizer cuts the text.
            source, split, column: see `mechinterp.text.documents`.
            context: tokens of a block, a BOS counted.
            shard: (rank, world): which share of the documents.
            held_out_every: document 0 and every so many after it are held out; None holds none out.
            seed: of the order of documents, another in each epoch; None keeps that of the source.

        Raises:
            UserError: text that cannot be had, a context beyond the model's, a shard that is none, a model without
                tokenizer, a seed for a source of unknown length.
        """
        _check(model, shard, held_out_every)
        self._front = require_length(model, context)
        self._texts, self.source = documents(source, split, column)
        if seed is not None and not isinstance(self._texts, Sequence):
            raise UserError(
                f"{self.source} is a stream: its documents cannot be shuffled; give seed=None, or shuffle it"
            )
        self.model, self.context, self.shard = model, context, shard
        self.held_out_every, self.seed = held_out_every, seed
        self._again = (source, split, column)
        self._separator = separator(model)
        self.epoch = 0
        self._cursor = 0  # how far into this epoch's documents: see _documents
        self._read = 0  # tokens of this epoch so far
        self._rest = torch.zeros(0, dtype=torch.int64)  # tokens that are in no block yet
        self._open: Iterator[tuple[int, str]] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks `[pos]`, without end."""
        return self

    def __next__(self) -> Int[Tensor, " pos"]:
        return self.take(1)[0]

    def take(self, n: int) -> Int[Tensor, "block pos"]:
        """The next n blocks.

        Raises:
            UserError: all documents together have fewer tokens than one block.
        """
        front = torch.tensor(self._front, dtype=torch.int64)
        body = self.context - len(self._front)
        while len(self._rest) < n * (body + 1):  # one more a block, for a separator that is left out
            self._rest = torch.cat([self._rest, *self._tokenized()])
        blocks, at = [], 0
        for _ in range(n):
            at += self._front == [int(self._rest[at])]  # the block's own BOS stands for the separator
            blocks.append(torch.cat([front, self._rest[at : at + body]]))
            at += body
        self._rest = self._rest[at:].clone()
        return torch.stack(blocks) if blocks else torch.zeros(0, self.context, dtype=torch.int64)

    def fresh(self, shard: tuple[int, int] | None = None) -> "TokenBlocks":
        """The same documents from the beginning, of that shard or its own; this stream stays where it is."""
        source, split, column = self._again
        every, seed = self.held_out_every, self.seed
        return TokenBlocks(self.model, source, self.context, shard or self.shard, every, seed, split, column)

    def _tokenized(self) -> list[Tensor]:
        """The tokens of the next documents, a separator after each; at the end of an epoch those of the next one."""
        texts, cursor, stream = self._next_texts()
        if not texts:
            self._next_epoch()
            return []
        rows = self.model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[misc]
        made = [torch.tensor([*row, *self._separator], dtype=torch.int64) for row in rows if len(row)]
        self._cursor, self._read, self._open = cursor, self._read + sum(map(len, made)), stream
        return made

    def _next_texts(self) -> tuple[list[str], int, Iterator[tuple[int, str]]]:
        """What the tokenizer gets at once (nothing at the end of an epoch), the cursor behind it, and the stream."""
        texts, n_characters, cursor = [], 0, self._cursor
        stream = self._open or self._documents()
        self._open = None  # a stream that fails is opened anew by the next call, where this one began
        for cursor, text in stream:  # noqa: B007 (the last one is returned)
            texts.append(text)
            n_characters += len(text)
            if len(texts) == _DOCUMENTS or n_characters >= _CHARACTERS:
                break
        return texts, cursor, stream

    def _next_epoch(self) -> None:
        if self._read < self.context - len(self._front):
            every, (rank, world) = self.held_out_every, self.shard
            held = "" if every is None else f"; of its documents number 0 and every {every}th after it are held out"
            part = "" if world == 1 else f", share {rank} of {world}"
            raise UserError(
                f"the text to train on ({self.source}{part}) has {self._read} tokens, too few for one block of "
                f"{self.context}{held}"
            )
        self.epoch, self._cursor, self._read, self._open = self.epoch + 1, 0, 0, None

    def _documents(self) -> Iterator[tuple[int, str]]:
        """This epoch's documents from the cursor on, each with the cursor behind it.

        The cursor counts this rank's documents where the number of documents is known, and else all of the stream's.
        """
        texts, (rank, world) = self._texts, self.shard
        if isinstance(texts, Sequence):
            mine = self._order(len(texts))[rank::world]
            for at in range(self._cursor, len(mine)):
                yield at + 1, texts[int(mine[at])]
            return
        for number, text in enumerate(_starting_at(texts, self._cursor), self._cursor):
            if not self._holds_out(number) and self._nth_trained(number) % world == rank:
                yield number + 1, text

    def _order(self, n_documents: int) -> Tensor:
        """Numbers of the documents to train on, in the order of this epoch."""
        order = torch.arange(n_documents)
        if self.seed is not None:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(n_documents, generator=draw)
        return order if self.held_out_every is None else order[order % self.held_out_every != 0]

    def _holds_out(self, number: int) -> bool:
        return self.held_out_every is not None and number % self.held_out_every == 0

    def _nth_trained(self, number: int) -> int:
        """How many documents before this one are trained on."""
        return number if self.held_out_every is None else number - number // self.held_out_every - 1

    def state_dict(self) -> dict[str, Any]:
        """What the following blocks depend on, and what they are of."""
        place = {"epoch": self.epoch, "cursor": self._cursor, "read": self._read, "rest": self._rest.clone()}
        return self._settings() | place

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken. Raises UserError if it is of other text or other settings."""
        for name, mine in self._settings().items():
            if state.get(name) != mine:
                raise UserError(
                    f"the stream of tokens to continue has {name} {state.get(name)!r}; this one has {mine!r}"
                )
        self.epoch, self._cursor, self._read = int(state["epoch"]), int(state["cursor"]), int(state["read"])
        self._rest, self._open = state["rest"].clone().cpu(), None

    def _settings(self) -> dict[str, Any]:
        rank, world = self.shard
        known = len(self._texts) if isinstance(self._texts, Sequence) else None
        made = {"source": self.source, "documents": known, "context": self.context, "rank": rank, "world": world}
        made |= {"held_out_every": self.held_out_every, "seed": self.seed, "bos": bool(self._front)}
        return made | {"tokenizer": self._tokenizer}

    @cached_property
    def _tokenizer(self) -> str | None:
        return self.model.tokenizer_hash()


class FixedBlocks:
    """Blocks that are there already, once through."""

    def __init__(self, tokens: Int[Tensor, "block pos"]) -> None:
        self.tokens, self._next = tokens, 0

    def take(self, n: int) -> Int[Tensor, "some pos"]:
        """The next n blocks, fewer or none at the end."""
        made = self.tokens[self._next : self._next + n]
        self._next += len(made)
        return made

    def fresh(self, shard: tuple[int, int] | None = None) -> "FixedBlocks":
        """The same blocks from the beginning; every world-th of them, from the rank-th on, of a shard."""
        rank, world = shard or (0, 1)
        return FixedBlocks(self.tokens[rank::world])

    def state_dict(self) -> dict[str, Any]:
        """How many were taken."""
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self._next = int(state["next"])


def _check(model: HookedModel, shard: tuple[int, int], held_out_every: int | None) -> None:
    rank, world = shard
    if not 0 <= rank < world:
        raise UserError(f"a shard must be (rank, world) with 0 ≤ rank < world; found {shard}")
    if held_out_every is not None and held_out_every < 2:
        raise UserError(f"held_out_every must be at least 2, or None to hold nothing out; found {held_out_every}")
    if model.tokenizer is None:
        raise UserError(f"{model.info.name} has no tokenizer: text cannot be made into tokens")


def separator(model: HookedModel) -> list[int]:
    """The token that ends a document: a BOS where the model is given one, else the tokenizer's EOS, else none."""
    if model.info.bos:
        return [model.bos_token]
    eos = getattr(model.tokenizer, "eos_token_id", None)
    return [eos] if isinstance(eos, int) else []


def _starting_at(texts: Iterable[str], number: int) -> Iterator[str]:
    return texts.starting_at(number) if isinstance(texts, TextStream) else islice(texts, number, None)


def held_out_blocks(
    model: HookedModel,
    source: Source,
    context: int,
    n: int | None = 64,
    held_out_every: int = HELD_OUT_EVERY,
    per_document: int | None = None,
    split: str = "train",
    column: str = "text",
) -> Blocks:
    """Blocks of `context` tokens out of the documents that `TokenBlocks` leaves out, none across two documents.

    Args:
        model, source, context, split, column: as of the `TokenBlocks`.
        n: blocks at most; all by default None. A stream without end needs a number.
        held_out_every: as of the `TokenBlocks`.
        per_document: blocks of one document at most.

    Raises:
        UserError: no held-out document has a block's tokens.
    """
    _check(model, (0, 1), held_out_every)
    texts, name = documents(source, split, column)
    chosen = (text for number, text in enumerate(texts) if number % held_out_every == 0)
    return cut(model, chosen, f"{name}, held out", context, n, per_document)
