"""Activations whose features are known: sparse codes times a dictionary with more directions than dimensions.

1. *Dictionary.* Unit vectors in random directions (or those that are given). A feature fires with a probability of its
   own; features of a group may fire together.
2. *Chunks.* The same as an endless source of activations, which a trainer takes in the place of a model.
3. *Recovery.* How much of the dictionary a sparse autoencoder found, beside as many random directions.

The setting of Sharkey et al. 2022, "Taking features out of superposition with sparse autoencoders", whose measure is
the mean max cosine similarity.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mechinterp.errors import UserError
from mechinterp.statistics import Interval, bootstrap_ratio

Draw = Callable[[int, torch.Generator], Tensor]


class Sample(NamedTuple):
    """Activations `[token d]` and the codes `[token feature]` that they are made of."""

    activations: Tensor
    codes: Tensor


@dataclass(frozen=True)
class KnownDictionary:
    """A sparse dictionary; the same values always have the same directions.

    Raises:
        UserError: a value out of its range, or firing probabilities above 1.
    """

    n_features: int
    """true features"""
    d: int
    """dimensions of the activations"""
    density: float = 0.02
    """mean probability that a feature fires on a token"""
    zipf: float = 0.0
    """the probability falls with the rank of a feature as rank^−zipf; 0: all are alike"""
    correlation: float = 0.0
    """of the normal variables that decide which features of a group fire; each feature's probability stays as it is"""
    group: int = 2
    """features of a group, neighbours in rank"""
    low: float = 0.5
    """smallest magnitude of a feature that fires"""
    high: float = 1.5
    """largest magnitude; uniform between the two"""
    noise: float = 0.0
    """standard deviation of the normal noise on each dimension"""
    seed: int = 0
    """of the directions"""

    def __post_init__(self) -> None:
        if min(self.n_features, self.d, self.group) < 1:
            raise UserError(
                f"n_features, d and group must be at least 1; found {self.n_features}, {self.d} and {self.group}"
            )
        if not (0 < self.density <= 1 and 0 <= self.correlation <= 1 and self.zipf >= 0):
            raise UserError(
                "density must lie in (0, 1], correlation in [0, 1] and zipf must be at least 0; found "
                f"{self.density}, {self.correlation} and {self.zipf}"
            )
        if not (0 < self.low <= self.high and self.noise >= 0):
            raise UserError(
                f"magnitudes must be above 0, low not above high, and noise at least 0; found {self.low} to "
                f"{self.high} and {self.noise}"
            )
        most = float(self.probabilities().max())
        if most > 1 + 1e-6:
            raise UserError(
                f"with density {self.density} and zipf {self.zipf} the commonest feature would fire with probability "
                f"{most:.2f}; lower one of them"
            )

    def directions(self) -> Float[Tensor, "feature d"]:
        """Unit vectors, uniform on the sphere."""
        return normalize(torch.randn(self.n_features, self.d, generator=_generator(self.seed, *b"directions")))

    def probabilities(self) -> Float[Tensor, " feature"]:
        """The chance of each feature to fire, the commonest first."""
        weights = torch.arange(1, self.n_features + 1, dtype=torch.float64) ** -self.zipf
        return (weights * (self.density / weights.mean())).float()

    def codes(self, n: int, generator: torch.Generator) -> Float[Tensor, "token feature"]:
        """Codes of `n` tokens: 0, or a magnitude."""
        fires = self._scores(n, generator) < torch.special.ndtri(self.probabilities().clamp_max(1.0).double()).float()
        magnitudes = torch.rand(n, self.n_features, generator=generator) * (self.high - self.low) + self.low
        return magnitudes * fires

    def _scores(self, n: int, generator: torch.Generator) -> Float[Tensor, "token feature"]:
        """Standard normal variables; those of a group share a part (a one-factor Gaussian copula)."""
        own = torch.randn(n, self.n_features, generator=generator)
        if self.correlation == 0:
            return own
        shared = torch.randn(n, -(-self.n_features // self.group), generator=generator)
        shared = shared.repeat_interleave(self.group, 1)[:, : self.n_features]
        return shared * self.correlation**0.5 + own * (1 - self.correlation) ** 0.5

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """Activations and codes of `n` tokens."""
        codes = self.codes(n, generator)
        activations = codes @ self.directions()
        if self.noise:
            activations += self.noise * torch.randn(n, self.d, generator=generator)
        return Sample(activations, codes)

    def chunks(self, tokens: int = 4096, seed: int = 0) -> "SampledChunks":
        """An endless source of activations for a trainer, under the name "toy"."""
        return SampledChunks(lambda n, generator: self.sample(n, generator).activations, tokens, seed, repr(self))


class SampledChunks:
    """An endless source of activations, in the place of a model that reads text.

    Chunk i depends on the seed and on i alone, so a source that is put back to its state goes on bit for bit.
    """

    def __init__(self, draw: Draw, tokens: int, seed: int, origin: str, name: str = "toy") -> None:
        """
        Args:
            draw: (n, generator) -> activations `[token d]`.
            tokens: of a chunk.
            seed: of the chunks.
            origin: what `draw` draws from, in words that change when it does: a state of another source is refused.
            name: of the site that the activations stand for.

        Raises:
            UserError: fewer than one token a chunk.
        """
        if tokens < 1:
            raise UserError(f"a chunk needs at least 1 token; found {tokens}")
        self._draw, self._tokens, self._seed, self._name = draw, tokens, seed, name
        self._origin = hashlib.sha256(f"{origin} {tokens} {seed}".encode()).hexdigest()[:16]
        self._next = 0

    def chunk(self) -> dict[str, Tensor]:
        """The next activations `[token d]`, by the name of their site."""
        made = self._draw(self._tokens, _generator(self._seed, self._next))
        self._next += 1
        return {self._name: made}

    def state_dict(self) -> dict[str, Any]:
        """Plain values: which chunk is next, and of which source."""
        return {"next": self._next, "origin": self._origin}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises UserError for one of another source (other settings, chunk size or seed)."""
        found = {key: state.get(key) for key in ("next", "origin")}
        if found["origin"] != self._origin or not isinstance(found["next"], int):
            raise UserError(
                f"the state {found} is not of this source of activations, which has the origin {self._origin}; "
                "make it with the same settings, tokens a chunk and seed"
            )
        self._next = found["next"]


def _generator(*words: int) -> torch.Generator:
    """A stream of its own for each tuple of numbers.

    A plain seed would give the directions of seed 0 to every other draw of that shape with seed 0: to the control, or
    to the starting weights of an autoencoder, which would then have the answer.
    """
    mixed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))  # 63 bits are what torch takes


# ---- recovery ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    """How much of a true dictionary was found. Intervals are over features; undefined is nan.

    Attributes:
        mean_max_cosine: over true features, of the largest cosine with a learned one.
        reverse: over learned features, of the largest cosine with a true one: low where features are made up.
        recovered: share of the true features with a cosine of at least `threshold`.
        matched: mean cosine when no learned feature may stand for two true ones (greedy, so a lower bound of the best
            matching); 0 for a true feature that is left without a partner.
        unique: as `recovered`, of the matched ones.
        control: mean_max_cosine of as many random directions, mean over draws.
        control_recovered: their recovered share.
        n_true, n_learned, threshold: what was compared; learned directions of length 0 do not count.
    """

    mean_max_cosine: Interval
    reverse: Interval
    recovered: Interval
    matched: Interval
    unique: Interval
    control: float
    control_recovered: float
    n_true: int
    n_learned: int
    threshold: float

    def summary(self) -> str:
        """In one line."""
        at, share = self.mean_max_cosine, self.recovered
        return (
            f"mean max cosine {at.estimate:.3f} [{at.low:.3f}, {at.high:.3f}] over {self.n_true} true features "
            f"({self.control:.3f} for random directions), {share.estimate:.1%} [{share.low:.1%}, {share.high:.1%}] "
            f"recovered at {self.threshold:g} ({self.control_recovered:.1%} for random directions)"
        )


def recovery(
    truth: Float[Tensor, "feature d"],
    learned: Float[Tensor, "learned d_learned"],
    threshold: float = 0.9,
    draws: int = 8,
    seed: int = 0,
) -> Recovery:
    """Compare learned directions with the true ones. Signed cosines: codes are not negative, so a sign is no freedom.

    Args:
        truth, learned: directions in rows, of any length.
        threshold: cosine from which a feature counts as recovered.
        draws: of random directions for the control.
        seed: of the control and the intervals.

    Raises:
        UserError: other dimensions, no true feature, or no learned one that is not 0.
    """
    learned = _checked(truth, learned)
    cosines = cosine_matrix(truth, learned)
    best, matched = cosines.amax(1), greedy_matching(cosines)
    generator = _generator(seed, *b"control")
    random = [cosine_matrix(truth, torch.randn(learned.shape, generator=generator)).amax(1) for _ in range(draws)]
    null = torch.stack(random) if random else torch.full((1, 1), float("nan"))
    return Recovery(
        mean_max_cosine=_mean(best, seed),
        reverse=_mean(cosines.amax(0), seed),
        recovered=_mean((best >= threshold).float(), seed),
        matched=_mean(matched, seed),
        unique=_mean((matched >= threshold).float(), seed),
        control=float(null.mean()),
        control_recovered=float((null >= threshold).float().mean()),
        n_true=len(truth),
        n_learned=len(learned),
        threshold=threshold,
    )


def cosine_matrix(truth: Float[Tensor, "feature d"], learned: Float[Tensor, "learned d"]) -> Tensor:
    """`[feature learned]` cosines."""
    return normalize(truth.float(), dim=1) @ normalize(learned.float(), dim=1).T


def greedy_matching(cosines: Float[Tensor, "feature learned"]) -> Float[Tensor, " feature"]:
    """Cosine of each true feature with its partner, the largest cosine first; 0 without a partner.

    Pairs that prefer each other to all that are left are what a greedy matching takes next, so whole rounds of such
    pairs are taken at once.
    """
    left = cosines.clone()
    matched = torch.zeros(len(cosines))
    for _ in range(min(cosines.shape)):
        choice = left.argmax(1)
        mutual = (left.argmax(0)[choice] == torch.arange(len(left))) & (left.amax(1) > -torch.inf)
        rows = mutual.nonzero().flatten()
        if not len(rows):
            break
        matched[rows] = cosines[rows, choice[rows]]
        left[rows] = -torch.inf
        left[:, choice[rows]] = -torch.inf
    return matched


def _checked(truth: Tensor, learned: Tensor) -> Tensor:
    """The learned directions that are not 0."""
    kept = learned[learned.norm(dim=1) > 0]
    if truth.shape[1] != learned.shape[1] or not len(truth) or not len(kept):
        raise UserError(
            f"true and learned directions must be rows of one length, and there must be some; found "
            f"{list(truth.shape)} and {list(learned.shape)}, of which {len(kept)} are not 0"
        )
    return kept


def _mean(values: Tensor, seed: int) -> Interval:
    return bootstrap_ratio(values.double().numpy(), seed=seed)
