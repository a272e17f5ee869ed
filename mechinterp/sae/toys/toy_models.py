"""The toy model of superposition: n features through fewer dimensions and back, x' = ReLU(WᵀWx + b).

1. *Data.* Each feature is 0 with probability S, its sparsity, and otherwise uniform in [0, 1]. `density` is 1 − S.
2. *Loss.* Σ_i I_i (x_i − x'_i)², a mean over samples; I_i is the importance of feature i.
3. *Training.* Many models at once, each with a density and importances of its own: `W` is `[instance hidden feature]`.
4. *Geometry.* How long a feature's vector is, whom it shares its dimensions with, and how many dimensions it has.

Elhage et al. 2022, "Toy Models of Superposition" (transformer-circuits.pub, arXiv 2209.10652), whose sections are named
below.
"""

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechinterp.errors import UserError
from mechinterp.sae.toys.known_dictionary import SampledChunks

#: Dimensions per feature of the polytopes whose fractions features stick to (section "The Geometry of Superposition",
#: "Feature Dimensionality"): vertices that share a space equally have its dimensions divided by their number.
STICKY_FRACTIONS: Mapping[str, float] = MappingProxyType(
    {
        "dedicated": 1.0,
        "tetrahedron": 3 / 4,
        "triangle": 2 / 3,
        "antipodal pair": 1 / 2,
        "pentagon": 2 / 5,
        "square antiprism": 3 / 8,
    }
)
#: What becomes of the second of two features in one dimension (section "Superposition as a Phase Change").
PHASES = ("not represented", "superposition", "dedicated")
REPRESENTED = 0.5
"""A feature whose vector is at least this long is represented; trained ones lie near 0 or near 1."""


class ToyModels(nn.Module):
    """Models that are trained side by side and know nothing of each other.

    Attributes:
        W: `[instance hidden feature]`; column i is the direction of feature i.
        b: `[instance feature]`.
        density: `[instance]` 1 − S, the chance that a feature is not 0.
        importance: `[instance feature]`.
    """

    density: Tensor
    importance: Tensor

    def __init__(
        self,
        n_features: int,
        d_hidden: int,
        density: Sequence[float],
        importance: Float[Tensor, "*instance feature"] | None = None,
        relu: bool = True,
        seed: int = 0,
    ) -> None:
        """Untrained models, one a density.

        Args:
            n_features, d_hidden: of every model.
            density: 1 − S of each instance, above 0 and at most 1.
            importance: `[feature]` for all or `[instance feature]`; 1 by default.
            relu: False for linear models, x' = WᵀWx + b, which show no superposition: a control.
            seed: of the starting weights (Xavier's normal distribution).

        Raises:
            UserError: sizes below 1, a density outside (0, 1], or importances that do not fit or are negative.
        """
        super().__init__()
        if min(n_features, d_hidden) < 1:
            raise UserError(f"a toy model needs features and dimensions; found {n_features} and {d_hidden}")
        _check_densities(density)
        shape = (len(density), n_features)
        weights = torch.ones(shape) if importance is None else importance.float()
        if weights.shape not in (shape, shape[1:]) or not (weights >= 0).all():
            raise UserError(
                f"importances must be at least 0 and of the shape {list(shape)}, [instance feature], or "
                f"{[n_features]}; found {list(weights.shape)}, the smallest {weights.min():g}"
            )
        self.relu = relu
        generator = torch.Generator().manual_seed(seed)
        scale = (2 / (n_features + d_hidden)) ** 0.5
        self.W = nn.Parameter(torch.randn(len(density), d_hidden, n_features, generator=generator) * scale)
        self.b = nn.Parameter(torch.zeros(shape))
        self.register_buffer("density", torch.tensor(list(density), dtype=torch.float32))
        self.register_buffer("importance", weights.expand(shape).clone())

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "instance batch feature"]:
        """Features of `n` samples of every instance."""
        instances, features = self.b.shape
        return stretched(torch.rand(instances, n, features, generator=generator), self.density[:, None, None])

    def hidden(self, x: Float[Tensor, "instance batch feature"]) -> Float[Tensor, "instance batch hidden"]:
        """Wx, what a sparse autoencoder would be given."""
        return x @ self.W.mT

    def forward(self, x: Float[Tensor, "instance batch feature"]) -> Float[Tensor, "instance batch feature"]:
        """ReLU(WᵀWx + b); without the ReLU for linear models."""
        made = torch.baddbmm(self.b[:, None], self.hidden(x), self.W)
        return torch.relu(made) if self.relu else made

    def loss(self, x: Float[Tensor, "instance batch feature"]) -> Float[Tensor, " instance"]:
        """Σ_i I_i (x_i − x'_i)², mean over samples. Section "Demonstrating Superposition"."""
        return ((x - self(x)).square().mean(1) * self.importance).sum(1)


def stretched(uniform: Tensor, density: float | Tensor) -> Tensor:
    """Features out of uniform numbers, one draw for both: what lies above S is uniform there, stretched to [0, 1]."""
    return ((uniform - (1 - density)) / density).clamp_min(0)


def _check_densities(density: Sequence[float]) -> None:
    wrong = [one for one in density if not 0 < one <= 1]
    if wrong or not density:
        found = f"found {wrong[0]}" if wrong else "found none"
        raise UserError(f"a density is the chance 1 − S that a feature is not 0, above 0 and at most 1; {found}")


# ---- training ------------------------------------------------------------------------------------------------------


def train(
    models: ToyModels, steps: int = 4000, batch: int = 256, learning_rate: float = 1e-2, seed: int = 0
) -> Float[Tensor, "{steps} instance"]:
    """Train all instances with Adam, the step size falling to 0 along a cosine. Returns the loss of every step.

    Adam's steps do not depend on the scale of a loss, so the sum over instances trains each as if it were alone.

    Raises:
        UserError: settings below 1 or not above 0, or a loss that is not finite.
    """
    if min(steps, batch) < 1 or not learning_rate > 0:
        raise UserError(
            f"steps and batch must be at least 1 and learning_rate above 0; found {steps}, {batch}, {learning_rate}"
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(models.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = torch.empty(steps, len(models.density))
    for step in range(steps):
        loss = models.loss(models.sample(batch, generator))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
    if not losses.isfinite().all():
        first = int((~losses.isfinite()).any(1).nonzero()[0])
        raise UserError(f"the loss was not finite at step {first} of {steps}; lower the learning rate {learning_rate}")
    return losses


@torch.no_grad()
def held_out_loss(models: ToyModels, n: int = 4096, seed: int = 1) -> Float[Tensor, " instance"]:
    """The loss on samples that were not trained on (another seed than the training's)."""
    return models.loss(models.sample(n, torch.Generator().manual_seed(seed)))


# ---- geometry ------------------------------------------------------------------------------------------------------


def norms(W: Float[Tensor, "*instance hidden feature"]) -> Float[Tensor, "*instance feature"]:
    """‖W_i‖: near 1 for a feature that is represented, near 0 for one that is not. "Demonstrating Superposition"."""
    return W.norm(dim=-2)


def represented(W: Float[Tensor, "*instance hidden feature"]) -> Bool[Tensor, "*instance feature"]:
    """Whether a feature's vector is at least `REPRESENTED` long."""
    return norms(W) >= REPRESENTED


def dimensionality(W: Float[Tensor, "*instance hidden feature"]) -> Float[Tensor, "*instance feature"]:
    """D_i = ‖W_i‖² / Σ_j (Ŵ_i·W_j)², the part of a dimension that a feature has, in [0, 1]; 0 for a vector of 0.

    Over the features it adds up to at most the number of dimensions. "Feature Dimensionality".
    """
    return norms(W).square() / _overlaps(W).clamp_min(1e-12)


def _overlaps(W: Float[Tensor, "*instance hidden feature"]) -> Float[Tensor, "*instance feature"]:
    """Σ_j (Ŵ_i·W_j)², j = i among them."""
    return (nn.functional.normalize(W, dim=-2).mT @ W).square().sum(-1)


def dimensions_per_feature(W: Float[Tensor, "*instance hidden feature"]) -> Float[Tensor, "*instance"]:
    """m / ‖W‖²_F, m the dimensions: 1 without superposition, 1/2 for antipodal pairs. "Uniform Superposition"."""
    return W.shape[-2] / W.square().sum((-2, -1)).clamp_min(1e-12)


def polygon_deviation(W: Float[Tensor, "hidden feature"]) -> float:
    """How far the represented features of a model with two dimensions are from a regular polygon, in degrees.

    The largest difference between an angle between neighbours and 360° / their number; nan below three features.

    Raises:
        UserError: not two dimensions.
    """
    if W.shape[0] != 2:
        raise UserError(f"angles between neighbours need 2 dimensions; found {W.shape[0]}")
    kept = W[:, represented(W)]
    n = kept.shape[1]
    if n < 3:
        return float("nan")
    angles = torch.atan2(kept[1], kept[0]).rad2deg().sort().values
    gaps = torch.cat([angles[1:], angles[:1] + 360]) - angles
    return float((gaps - 360 / n).abs().max())


def is_polygon(W: Float[Tensor, "hidden feature"], corners: int, tolerance: float = 5.0) -> bool:
    """Whether exactly `corners` features are represented, and form a regular polygon to `tolerance` degrees."""
    return int(represented(W).sum()) == corners and polygon_deviation(W) <= tolerance


def random_directions(
    W: Float[Tensor, "*instance hidden feature"], generator: torch.Generator
) -> Float[Tensor, "*instance hidden feature"]:
    """The same norms in random directions: the control of every measure of geometry."""
    drawn = torch.randn(W.shape, generator=generator)
    return nn.functional.normalize(drawn, dim=-2) * norms(W).unsqueeze(-2)


# ---- two features in one dimension ---------------------------------------------------------------------------------


def phase_losses(density: Float[Tensor, "*cell"], importance: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell phase"]:
    """Losses of the three plain solutions for two features in one dimension, in the order of `PHASES`.

    Feature 1 has importance 1, feature 2 `importance`; p is the density.

    - W = [1, 0] and W = [0, 1]: what is not represented is predicted by its mean, which leaves its variance
      p/3 − p²/4, times its importance.
    - W = [1, −1], b = 0: an error only where both are active (p²): the smaller of the two, squared; 1/6 on average for
      each feature.

    "Superposition as a Phase Change", the theoretical phase diagram.
    """
    p, second = density, importance
    variance = p / 3 - p.square() / 4
    return torch.stack([second * variance, (1 + second) * p.square() / 6, variance], -1)


def critical_density(importance: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """The density below which superposition has the lowest of `phase_losses`: 4 I / (2 + 5 I), I = min(r, 1/r)."""
    less = torch.minimum(importance, 1 / importance)
    return 4 * less / (2 + 5 * less)


def phase(W: Float[Tensor, "*cell 1 2"]) -> Int[Tensor, "*cell"]:
    """Index in `PHASES` of what became of the second feature; it is dedicated where the first is not represented."""
    first, second = represented(W).unbind(-1)
    return torch.where(second, torch.where(first, 1, 2), 0)


# ---- for a sparse autoencoder --------------------------------------------------------------------------------------


def hidden_chunks(
    W: Float[Tensor, "hidden feature"], density: float, tokens: int = 4096, seed: int = 0
) -> SampledChunks:
    """An endless source of the hidden activations Wx of one trained model, for a trainer, under the name "toy".

    Raises:
        UserError: a density outside (0, 1], or fewer than one token a chunk.
    """
    _check_densities([density])
    W = W.detach().clone()

    def draw(n: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(n, W.shape[1], generator=generator)
        return stretched(uniform, density) @ W.T

    digest = hashlib.sha256(W.contiguous().numpy().tobytes()).hexdigest()
    return SampledChunks(draw, tokens, seed, f"toy model {digest}, density {density}")
