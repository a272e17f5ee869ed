"""Kinds of attention patterns: which key each query should attend to; the pattern moved or spread out as its null.

Every kind is a function of prompts that gives either targets `[prompt query]`, the key (padding counted) that each
query should attend to or -1, or weights `[prompt query key]`. A head's score is the mean over queries of its attention
there.

Position 0 of a prompt is a BOS or, without one, an attention sink: no score has it as a query or key. Attention to it
is a kind of its own, `first_token`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.prompts import Prompts

Kind = Callable[[Prompts], Tensor]


def _positions(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """`[one pos]` positions, padding counted, and `[prompt one]` where each prompt begins."""
    return torch.arange(prompts.n_pos)[None, :], prompts.padding.cpu()[:, None]


def _back(prompts: Prompts, offset: int, first_query: Tensor) -> Tensor:
    """Targets that lie `offset` before their query, from `first_query` on; never position 0 of the prompt."""
    pos, start = _positions(prompts)
    key = pos - offset
    return torch.where((pos >= first_query) & (pos > start) & (key > start), key, -1)


def previous_token(prompts: Prompts) -> Tensor:
    """The token before: queries from 2 on."""
    return _back(prompts, 1, _positions(prompts)[1])


def self_token(prompts: Prompts) -> Tensor:
    """The query itself: queries from 1 on."""
    return _back(prompts, 0, _positions(prompts)[1])


def first_token(prompts: Prompts) -> Tensor:
    """Position 0: queries from 1 on."""
    pos, start = _positions(prompts)
    return torch.where(pos > start, start, -1)


def _in_last_copy(offset: Callable[[int], int]) -> Callable[[int], Kind]:
    def with_period(period: int) -> Kind:
        def targets(prompts: Prompts) -> Tensor:
            return _back(prompts, offset(period), torch.tensor(prompts.n_pos - period))

        return targets

    return with_period


POSITIONAL: dict[str, Kind] = {
    "previous_token": previous_token,
    "first_token": first_token,
    "self": self_token,
}
# By the period: queries are the positions of the last copy.
CONTENT: dict[str, Callable[[int], Kind]] = {
    "induction": _in_last_copy(lambda period: period - 1),
    "duplicate_token": _in_last_copy(lambda period: period),
}


@dataclass(frozen=True, eq=False)
class Asked:
    """One kind on given prompts.

    Attributes:
        name: of the kind.
        content: whether its null is fresh tokens (else neighbouring keys and uniform attention).
        where: targets `[prompt query]` or weights `[prompt query key]`.
    """

    name: str
    content: bool
    where: Tensor

    @classmethod
    def of(cls, name: str, kind: Kind, content: bool, prompts: Prompts) -> "Asked":
        """Raises UserError for a function that gives another shape, future keys, or nothing for a prompt."""
        where, n, size = kind(prompts), len(prompts), prompts.n_pos
        where = where.cpu() if where.is_floating_point() else where.cpu().long()
        if where.shape not in ((n, size), (n, size, size)):
            raise UserError(
                f"pattern {name!r}: a kind gives [prompt query] keys or [prompt query key] weights, here [{n} {size}] "
                f"or [{n} {size} {size}]; found {list(where.shape)}"
            )
        asked, real = cls(name, content, where), prompts.real.cpu()
        for index in torch.arange(n).split(16):
            asked._check(index, real[index])
        return asked

    def _check(self, index: Tensor, real: Tensor) -> None:
        weights = self.weights(index)
        bad = ~weights.isfinite() | ((weights != 0) & ~(real[:, :, None] & real[:, None, :]).tril())
        if bad.any():
            i, query, key = bad.nonzero()[0].tolist()
            raise UserError(f"pattern {self.name!r}: sequence {index[i] + 1}: query {query} cannot attend to key {key}")
        empty = (weights == 0).all(-1).all(-1).nonzero().flatten()
        if len(empty):
            raise UserError(f"pattern {self.name!r} has no query in sequence {index[empty[0]] + 1}")

    def weights(self, index: Tensor) -> Tensor:
        """`[prompt query key]` of some prompts, divided by the number of queries that ask for anything."""
        where = self.where[index]
        if where.ndim == 2:
            one_hot = torch.nn.functional.one_hot(where + 1, where.shape[1] + 1)[..., 1:].float()
            return one_hot / (where >= 0).sum(1).clamp(min=1)[:, None, None]
        queries = (where != 0).any(-1).sum(-1).clamp(min=1)
        return where.float() / queries[:, None, None]


def uniform(prompts: Prompts) -> Tensor:
    """`[prompt query key]` attention that is the same to every token up to the query: 1 / (query + 1)."""
    pos, start = _positions(prompts)
    query = pos - start
    seen = (pos[:, None, :] <= pos[:, :, None]) & (pos[:, None, :] >= start[:, None])
    return seen / (query + 1).clamp(min=1)[:, :, None]


def shifted(weights: Tensor, even: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The same queries at keys moved by `by`, and what uniform attention gives `[prompt]` where there is no such key.

    Args:
        weights: `[prompt query key]`.
        even: `[prompt query key]` uniform attention.
        by: -1 or 1.
    """
    allowed = (even > 0) & (even.roll(1, -1) > 0)  # every key that a query sees, but position 0
    allowed[..., 0] = False
    moved = weights.roll(by, -1)
    edge = 0 if by > 0 else -1
    moved[..., edge] = 0
    kept = moved * allowed
    lost = weights.sum(-1) - kept.sum(-1)
    return kept, (lost * even.amax(-1)).sum(-1)
