"""The toy models of the experiment `superposition`: three families, what is trained, and what is measured.

1. *Pentagon.* Five features of falling importance in two dimensions, from dense to sparse.
2. *Phases.* Two features in one dimension, over sparsity and the importance of the second, beside the theory.
3. *Uniform.* Many features, all alike: dimensions per feature (superposition_shapes.py has the rest).

Controls: the same models without a ReLU, and the same lengths in random directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechinterp.sae.toys import toy_models as toy
from mechinterp.statistics import Interval, bootstrap_ratio

CONTROL_DRAWS = 16
LINEAR_STEPS = 3000
"""Models without a ReLU settle early: more steps than these are not taken."""


@dataclass(frozen=True)
class Training:
    """How all models are trained."""

    steps: int = 3000
    batch: int = 256
    learning_rate: float = 1e-2
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """Models of one family; `density` varies along the first axis, restarts along the second.

    Attributes:
        W: `[density restart hidden feature]`.
        density: `[density]`, 1 − S.
        loss: `[density restart]` on samples that were not trained on.
        linear: `[density hidden feature]` weights of a model without a ReLU, the control.
    """

    W: Tensor
    density: Tensor
    loss: Tensor
    linear: Tensor

    def save(self, path: Path) -> None:
        """As safetensors."""
        save_file({one.name: getattr(self, one.name).contiguous() for one in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> "Trained":
        """What `save` wrote."""
        return cls(**load_file(path))

    def best(self) -> Tensor:
        """`[density hidden feature]`: of each density the restart with the lowest loss."""
        return self.W[torch.arange(len(self.W)), self.loss.argmin(1)]


def train_family(d_hidden: int, density: Sequence[float], importance: Tensor, restarts: int, how: Training) -> Trained:
    """Restarts of every density side by side, and one linear model of each; importance `[density feature]`."""
    n_features, shape = importance.shape[1], (len(density), restarts)
    repeated = [one for one in density for _ in range(restarts)]
    models = toy.ToyModels(n_features, d_hidden, repeated, importance.repeat_interleave(restarts, 0), seed=how.seed)
    linear = toy.ToyModels(n_features, d_hidden, density, importance, relu=False, seed=how.seed)
    toy.train(models, how.steps, how.batch, how.learning_rate, how.seed)
    toy.train(linear, min(how.steps, LINEAR_STEPS), how.batch, how.learning_rate, how.seed)
    return Trained(
        W=models.W.detach().unflatten(0, shape),
        density=torch.tensor(list(density)),
        loss=toy.held_out_loss(models, seed=how.seed + 1).view(shape),
        linear=linear.W.detach(),
    )


@dataclass(frozen=True)
class Uniform:
    """Models whose features are all alike: sizes, and densities with 1/(1 − S) from 1 to `sparsest` in equal ratios."""

    n_features: int
    d_hidden: int
    densities: int
    restarts: int
    how: Training
    sparsest: float = 20.0

    def train(self) -> Trained:
        """All of them."""
        density = geometric(1.0, 1 / self.sparsest, self.densities)
        return train_family(
            self.d_hidden, density, torch.ones(self.densities, self.n_features), self.restarts, self.how
        )


def geometric(first: float, last: float, n: int) -> list[float]:
    """`n` numbers from `first` to `last` with one ratio between neighbours."""
    return np.geomspace(first, last, n).tolist()


# ---- five features in two dimensions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PentagonRow:
    """What became of five features at one density; intervals are over restarts, nan where there are none.

    Attributes:
        represented: how many features are represented.
        linear: how many the linear model represents.
        pentagons: restarts with a regular pentagon, to 5°.
        restarts: of how many.
        deviation: largest deviation of an angle between neighbours from 72°, where all five are represented.
        random: the same of the same lengths in random directions, mean.
    """

    density: float
    represented: Interval
    linear: int
    pentagons: int
    restarts: int
    deviation: Interval | None
    random: float | None


def pentagon_rows(trained: Trained, seed: int) -> list[PentagonRow]:
    """A row a density."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    densities = [round(one, 6) for one in trained.density.tolist()]  # as they were before float32
    for density, W, linear in zip(densities, trained.W, trained.linear, strict=True):
        counts = toy.represented(W).sum(1)
        full = W[counts == 5]
        random = [toy.random_directions(one, generator) for one in full for _ in range(CONTROL_DRAWS)]
        row = PentagonRow(
            density=density,
            represented=over_units(counts),
            linear=int(toy.represented(linear).sum()),
            pentagons=sum(toy.is_polygon(one, 5) for one in W),
            restarts=len(W),
            deviation=over_units([toy.polygon_deviation(one) for one in full]) if len(full) else None,
            random=float(np.mean([toy.polygon_deviation(one) for one in random])) if random else None,
        )
        rows.append(row)
    return rows


def over_units(values: Sequence[float] | Tensor) -> Interval:
    """Mean with an interval over restarts."""
    return bootstrap_ratio(np.asarray(values, dtype=np.float64))


# ---- two features in one dimension ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Phases:
    """What became of the second feature, `[importance density]`, as indices of `toy_models.PHASES`.

    Attributes:
        found: of the restart with the lowest loss.
        theory: the plain solution with the lowest loss.
        length: |W_2| of that restart.
        agrees: share of cells in which both are the same.
        single: the same share over single restarts.
        shuffled: the share for two cells drawn at random, one of each map: a control.
        linear: share of cells in which the linear model is in superposition: another.
    """

    importance: Tensor
    density: Tensor
    found: Tensor
    theory: Tensor
    length: Tensor
    agrees: float
    single: float
    shuffled: float
    linear: float

    def boundary(self) -> list[tuple[float | None, float | None]]:
        """Of each importance the last density with superposition and the next one; None where there is none.

        The last, not the first without: a sparse cell in which all starts got stuck is no end of the phase.
        """
        made = []
        for row in self.found == toy.PHASES.index("superposition"):
            shared = row.nonzero().flatten().tolist()
            after = shared[-1] + 1 if shared else 0
            low = float(self.density[after - 1]) if shared else None
            made.append((low, float(self.density[after]) if after < len(row) else None))
        return made


def grid(importance: Sequence[float], density: Sequence[float]) -> tuple[list[float], Tensor]:
    """Densities and importances `[cell feature]` of all cells, importances outside and densities inside."""
    second = torch.tensor(list(importance)).repeat_interleave(len(density))
    return [p for _ in importance for p in density], torch.stack([torch.ones_like(second), second], 1)


def read_phases(trained: Trained, importance: Sequence[float], density: Sequence[float]) -> Phases:
    """Beside the theory."""
    shape = (len(importance), len(density))
    theory = toy.phase_losses(trained.density, grid(importance, density)[1][:, 1]).argmin(-1)
    found = toy.phase(trained.best())
    shares = [torch.bincount(one, minlength=3) / one.numel() for one in (found, theory)]
    return Phases(
        importance=torch.tensor(list(importance)),
        density=torch.tensor(list(density)),
        found=found.view(shape),
        theory=theory.view(shape),
        length=toy.norms(trained.best())[:, 1].view(shape),
        agrees=float((found == theory).float().mean()),
        single=float((toy.phase(trained.W) == theory[:, None]).float().mean()),
        shuffled=float((shares[0] * shares[1]).sum()),
        linear=float((toy.phase(trained.linear) == toy.PHASES.index("superposition")).float().mean()),
    )


# ---- many features that are all alike ------------------------------------------------------------------------------


def per_feature(trained: Trained) -> tuple[Interval, np.ndarray]:
    """Dimensions per feature `[density]` with an interval over restarts, and the linear model's."""
    found = toy.dimensions_per_feature(trained.W).double().numpy()
    return bootstrap_ratio(found), toy.dimensions_per_feature(trained.linear).double().numpy()
