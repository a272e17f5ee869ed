"""What is kept of a pass over text for chosen features: the best and a random draw of their contexts, and counts.

Nothing here grows with the text but the counts by document and by token. A `Batch` holds the activations of the chosen
features on some blocks; each of the collectors below takes what it needs of it and lets it go.

- `Top`: the blocks of largest activation, at most one a document. Exact: the peak of every block is compared.
- `Draw`: every (feature, position) that is on gets a random key, and the largest keys stay: a uniform sample without
  replacement of a stream whose length is not known before (Vitter 1985 calls it a reservoir).
- `Counts`: positions on by document, activation by token, a histogram, sums and maxima.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Bins of the histogram: four an octave, so that shapes can be compared whatever the unit of the activations.
PER_OCTAVE, LOWEST, HIGHEST = 4, -40, 60  # edges 2 ** (i / PER_OCTAVE), i = LOWEST … HIGHEST: 0.001 to 32,768


@dataclass(frozen=True, eq=False)
class Batch:
    """Chosen features on some blocks of text.

    Attributes:
        values: `[feature prompt pos]` activations, 0 where a position is excluded.
        tokens: `[prompt pos]` ids.
        kept: `[prompt pos]` bool, False at excluded positions and padding.
        real: `[prompt pos]` bool, False at padding.
        document: `[prompt]` number of each block's document.
        first: number of the first block.
    """

    values: Tensor
    tokens: Tensor
    kept: Tensor
    real: Tensor
    document: Tensor
    first: int

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Block, position and feature `[entry]` of what is on, in the order of the text."""
        block, pos, feature = self.values.permute(1, 2, 0).nonzero(as_tuple=True)
        return block, pos, feature


@dataclass(frozen=True)
class Window:
    """Tokens shown about a position: `before` of them, the token itself, `after` of them."""

    before: int
    after: int

    @classmethod
    def of(cls, tokens: int) -> "Window":
        """Of so many tokens in all: a causal model's feature depends on what is before, so a quarter is after."""
        after = (tokens - 1) // 4
        return cls(tokens - 1 - after, after)

    @property
    def offsets(self) -> Tensor:
        """`[offset]` −before … after."""
        return torch.arange(-self.before, self.after + 1)

    def cut(self, batch: Batch, block: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and activations `[feature context offset]`: −1 and NaN beyond the block, NaN where excluded.

        Args:
            batch: what to cut from.
            block, pos: `[feature context]` the middle of each window; `block` is counted in the batch.
        """
        at = pos[..., None] + self.offsets
        inside = (at >= 0) & (at < batch.tokens.shape[1])
        at, block = at.clamp(0, batch.tokens.shape[1] - 1), block[..., None]
        inside &= batch.real[block, at]
        feature = torch.arange(len(batch.values))[:, None, None]
        values = torch.where(inside & batch.kept[block, at], batch.values[feature, block, at], torch.nan)
        return torch.where(inside, batch.tokens[block, at], -1), values


class Contexts:
    """Kept contexts of every feature, by falling score.

    Attributes:
        fields: `score`, `peak` (activation at the middle), `document`, `block`, `position` `[feature context]`; `token`
            and `activation` `[feature context offset]`. A score of −∞ is an empty place.
    """

    def __init__(self, n_features: int, n: int, window: Window, one_a_document: bool):
        self.n, self.window, self.one_a_document = n, window, one_a_document
        width, count = len(window.offsets), torch.full((n_features, n), -1)
        self.fields = {
            "score": torch.full((n_features, n), -torch.inf, dtype=torch.float64),
            "peak": torch.full((n_features, n), torch.nan),
            "document": count,
            "block": count.clone(),
            "position": count.clone(),
            "token": torch.full((n_features, n, width), -1),
            "activation": torch.full((n_features, n, width), torch.nan),
        }

    def offer(self, batch: Batch, score: Tensor, block: Tensor, pos: Tensor) -> None:
        """Take candidates `[feature candidate]` where their score is among the n best; ties go to the earlier text."""
        token, activation = self.window.cut(batch, block, pos)
        feature = torch.arange(len(batch.values))[:, None]
        new = {
            "score": score.double(),
            "peak": batch.values[feature, block, pos],
            "document": batch.document[block],
            "block": block + batch.first,
            "position": pos,
            "token": token,
            "activation": activation,
        }
        joined = {name: torch.cat([old, new[name].to(old.dtype)], 1) for name, old in self.fields.items()}
        ranked = joined["score"]
        if self.one_a_document:
            ranked = _first_of_each(ranked, joined["document"])
        order = ranked.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        self.fields = {name: _pick(field, order) for name, field in joined.items()}
        self.fields["score"] = ranked.gather(1, order)


class Top(Contexts):
    """The n contexts of largest activation of each feature, one a document."""

    def __init__(self, n_features: int, n: int, window: Window):
        super().__init__(n_features, n, window, one_a_document=True)

    def add(self, batch: Batch) -> None:
        """Offer the peak of every block; the first of equal ones."""
        peak, pos = batch.values.max(2)
        block = torch.arange(peak.shape[1]).expand_as(peak)
        self.offer(batch, torch.where(peak > 0, peak, -torch.inf), block, pos)


class Draw(Contexts):
    """A uniform draw of n positions at which each feature is on."""

    def __init__(self, n_features: int, n: int, window: Window, seed: int):
        super().__init__(n_features, n, window, one_a_document=False)
        self.random = np.random.default_rng(seed)

    def add(self, batch: Batch) -> None:
        """Offer those with the largest keys of the batch. The keys do not depend on how text is cut into batches."""
        block, pos, feature = batch.entries()
        keys = torch.full(batch.values.shape, -torch.inf, dtype=torch.float64)
        keys[feature, block, pos] = torch.from_numpy(self.random.random(len(block)))
        best, flat = keys.flatten(1).topk(min(self.n, keys[0].numel()))
        width = batch.tokens.shape[1]
        self.offer(batch, best, flat // width, flat % width)


class Counts:
    """Sums over the text.

    Attributes:
        on: `[feature document]` positions at which a feature is on.
        kept: `[document]` positions that are not excluded.
        occurrences: `[d_vocab]` kept positions with each token.
        total, largest: `[feature]` sum and maximum of the activations.
        histogram: `[feature bin]` positions by activation.
    """

    def __init__(self, n_features: int, n_documents: int, d_vocab: int):
        self.d_vocab = d_vocab
        self.on = torch.zeros(n_features, n_documents, dtype=torch.long)
        self.kept = torch.zeros(n_documents, dtype=torch.long)
        self.occurrences = torch.zeros(d_vocab, dtype=torch.long)
        self.total = torch.zeros(n_features, dtype=torch.float64)
        self.largest = torch.zeros(n_features)
        self.histogram = torch.zeros(n_features, HIGHEST - LOWEST, dtype=torch.long)
        self._pairs = (torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.float64))
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, batch: Batch, document: Tensor) -> None:
        """Count a batch; `document` `[prompt]` numbers the documents without gaps."""
        block, pos, feature = batch.entries()
        values = batch.values[feature, block, pos].double()
        self.on.index_put_((feature, document[block]), torch.ones_like(feature), accumulate=True)
        self.kept.index_add_(0, document, batch.kept.sum(1))
        self.occurrences += torch.bincount(batch.tokens[batch.kept], minlength=self.d_vocab)
        self.total.index_add_(0, feature, values)
        self.largest = torch.maximum(self.largest, batch.values.flatten(1).amax(1))
        bins = (values.log2() * PER_OCTAVE).floor().long().clamp(LOWEST, HIGHEST - 1) - LOWEST
        self.histogram.index_put_((feature, bins), torch.ones_like(feature), accumulate=True)
        key = feature * self.d_vocab + batch.tokens[block, pos]
        self._pending.append((key, torch.stack([values, torch.ones_like(values)], 1)))
        if sum(len(keys) for keys, _ in self._pending) > len(self._pairs[0]):  # as much again: each is sorted log times
            self._settle()

    def _settle(self) -> None:
        keys, sums = (torch.cat([kept, *new]) for kept, new in zip(self._pairs, self._apart(), strict=True))
        names, member = keys.unique(return_inverse=True)
        self._pairs = names, sums.new_zeros(len(names), 2).index_add_(0, member, sums)
        self._pending = []

    def _apart(self) -> tuple[list[Tensor], list[Tensor]]:
        return [keys for keys, _ in self._pending], [sums for _, sums in self._pending]

    def by_token(self, feature: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, their sum of activation, and at how many positions they have any; by falling sum."""
        self._settle()
        keys, sums = self._pairs
        low, high = torch.searchsorted(keys, torch.tensor([feature, feature + 1]) * self.d_vocab).tolist()
        order = sums[low:high, 0].sort(descending=True, stable=True).indices
        return keys[low:high][order] - feature * self.d_vocab, sums[low:high, 0][order], sums[low:high, 1][order].long()


def _pick(field: Tensor, order: Tensor) -> Tensor:
    """`[feature context …]` rows in an order of contexts `[feature n]`."""
    return field[torch.arange(len(field))[:, None], order]


def _first_of_each(score: Tensor, document: Tensor) -> Tensor:
    """`[feature candidate]` scores, −∞ for those whose document has a better candidate, or as good a one before it."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    named = _pick(document, order)
    same = (named[:, :, None] == named[:, None, :]).tril(-1).any(2)
    again = torch.zeros_like(same).scatter_(1, order, same)
    return score.masked_fill(again, -torch.inf)
