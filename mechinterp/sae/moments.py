"""The scale of a model's activations: what training divides by, and what explained variance is a share of."""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.sae.harvest import Harvest

EMPTY_CHUNKS = 100  # chunks without a token, one after another, after which the rule is taken to keep none


@dataclass(frozen=True, eq=False)
class Moments:
    """How large the activations of a site are, without the excluded positions.

    Attributes:
        n: tokens measured.
        mean: `[d]`, float32, on the CPU.
        mean_square: mean ‖x‖².
        mean_norm: mean ‖x‖.
    """

    n: int
    mean: Tensor
    mean_square: float
    mean_norm: float

    @property
    def variance(self) -> float:
        """Mean ‖x − mean‖²."""
        return self.mean_square - float(self.mean.double().square().sum())


def normalisation(harvest: Harvest, n_tokens: int) -> dict[str, Moments]:
    """Moments of each site over the first `n_tokens` kept tokens of the text; the harvest stays where it is.

    Every rank of a distributed run reads the same beginning of the whole text, so that all have the same scale.

    Returns:
        Hook name -> moments; of fewer tokens where a finite source has no more.

    Raises:
        UserError: fewer than one token asked for, or the rule keeps none.
    """
    if n_tokens < 1:
        raise UserError(f"the scale of activations needs at least one token; asked for {n_tokens}")
    sums = {name: _Sums(width) for name, width in harvest.widths.items()}
    first, empty = next(iter(sums.values())), 0
    with suppress(StopIteration):
        chunks = harvest.fresh(shard=(0, 1))
        while first.n < n_tokens and empty < EMPTY_CHUNKS:
            before = first.n
            for name, rows in chunks.chunk().items():
                sums[name].add(rows[: n_tokens - before])
            empty = empty + 1 if first.n == before else 0
    if first.n < 1 or empty == EMPTY_CHUNKS:
        raise UserError(
            f"the exclusion rule {harvest.exclusion} keeps no token of {EMPTY_CHUNKS} chunks or all the text"
        )
    return {name: one.moments() for name, one in sums.items()}


class _Sums:
    """Sums over tokens: float32 on the device within a chunk, float64 over chunks."""

    def __init__(self, width: int):
        self.n, self.total, self.squares, self.norms = 0, torch.zeros(width, dtype=torch.float64), 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.float()
        norms = torch.linalg.vector_norm(rows, dim=-1)
        self.n += len(rows)
        self.total += rows.sum(0).cpu().double()
        self.norms += float(norms.sum())
        self.squares += float(norms.square().sum())

    def moments(self) -> Moments:
        return Moments(self.n, (self.total / self.n).float(), self.squares / self.n, self.norms / self.n)
