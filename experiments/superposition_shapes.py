"""Do features that are all alike form the published shapes, each with its fraction of dimensions per feature?

1. *Sets.* Features belong together if |cos| of their directions is above `TOGETHER`, directly or through others. A set
   of k features has r = Σ D dimensions, D the dimensionality of each.
2. *Shapes.* A set of 5 features in 2 dimensions is a pentagon if each has D = 2/5, to ±`NEAR`; likewise the others.
3. *Why not D alone?* A dimensionality near 2/5 is no pentagon yet: two opposite features that others disturb have the
   same. So the features near each fraction are counted, too, with how many of them are in its shape.
4. *Control.* The same lengths in random directions.

Elhage et al. 2022, "The Geometry of Superposition", look for the shapes in the graph of the features in the same way.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.superposition_models import CONTROL_DRAWS, Trained
from mechinterp.sae.toys import toy_models as toy

NEAR = 0.01
"""How near a dimensionality has to be to a fraction."""
TOGETHER = 0.2
"""Below the cosines that hold the published shapes together, the smallest of which is cos 72° = 0.31."""
#: (features, dimensions) of the shapes whose fractions are published.
SHAPES = {
    "dedicated": (1, 1),
    "tetrahedron": (4, 3),
    "triangle": (3, 2),
    "antipodal pair": (2, 1),
    "pentagon": (5, 2),
    "square antiprism": (8, 3),
}


@dataclass(frozen=True, eq=False)
class Sets:
    """The set that each feature is in, all `[density restart feature]`; 0 for a feature that is not represented.

    Attributes:
        D: dimensionality.
        size: features of the set.
        dims: its dimensions, Σ D.
        spread: the largest deviation of a D in it from dimensions / features, in whole dimensions.
    """

    D: np.ndarray
    size: np.ndarray
    dims: np.ndarray
    spread: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Whether a feature is represented."""
        return self.size > 0

    def near(self, name: str) -> np.ndarray:
        """Whether a feature has the fraction of a shape."""
        return self.kept & (np.abs(self.D - toy.STICKY_FRACTIONS[name]) <= NEAR)

    def shape(self, name: str, exact: bool = True) -> np.ndarray:
        """Whether a feature is in a shape; with `exact` False, in a set of as many features and dimensions."""
        features, dims = SHAPES[name]
        made = (self.size == features) & (self.dims.round() == dims)
        return made & (self.spread <= NEAR) if exact else made


def sets(W: Tensor) -> Sets:
    """Of all models; W `[density restart hidden feature]`."""
    each = [[_sets(one) for one in models] for models in W]
    return Sets(*np.array(each).transpose(2, 0, 1, 3))


def _sets(W: Tensor) -> np.ndarray:
    """`[4 feature]`: D, size, dims and spread of one model."""
    kept = toy.represented(W)
    D = np.where(kept, toy.dimensionality(W).numpy(), 0.0)
    together = torch.eye(len(kept), dtype=torch.bool)
    unit = torch.nn.functional.normalize(W, dim=0)
    together |= ((unit.T @ unit).abs() > TOGETHER) & kept & kept[:, None]
    for _ in range(len(kept).bit_length()):  # whoever is reached in 2, 4, 8, … steps
        together = (together.float() @ together.float()) > 0
    member = together.numpy() & kept.numpy()
    size, dims = member.sum(1), member @ D
    own = dims.round().clip(1) / size.clip(1)
    spread = np.where(member, np.abs(D - own[:, None]), 0).max(1)
    return np.stack([D, size, dims, spread])


@dataclass(frozen=True)
class ShapeRow:
    """What became of one published shape; counts are of features, over all densities and starts.

    Attributes:
        alike: in sets of as many features and dimensions.
        exact: of these, in sets where every D is the fraction.
        near: with a D near the fraction, whatever set they are in.
        near_alike: of these, in sets of as many features and dimensions.
        low, high: limits of the D of `alike`, nan without any.
        random: the most `alike` ones of any draw of random directions, the control.
        first, last: indices of the densities with exact ones, None if there are none.
    """

    name: str
    fraction: float
    alike: int
    exact: int
    near: int
    near_alike: int
    low: float
    high: float
    random: int
    first: int | None
    last: int | None

    @property
    def found(self) -> bool:
        """Whether more features form the exact shape than come near it in any draw of random directions."""
        return self.exact > self.random


def shape_rows(trained: Trained, seed: int) -> list[ShapeRow]:
    """A row a published shape."""
    found = sets(trained.W)
    generator = torch.Generator().manual_seed(seed)
    random = [sets(toy.random_directions(trained.W, generator)) for _ in range(CONTROL_DRAWS)]
    rows = []
    for name, fraction in toy.STICKY_FRACTIONS.items():
        alike, exact, near = found.shape(name, exact=False), found.shape(name), found.near(name)
        where = np.flatnonzero(exact.sum((1, 2))).tolist()
        row = ShapeRow(
            name=name,
            fraction=fraction,
            alike=int(alike.sum()),
            exact=int(exact.sum()),
            near=int(near.sum()),
            near_alike=int((near & alike).sum()),
            low=float(found.D[alike].min()) if alike.any() else float("nan"),
            high=float(found.D[alike].max()) if alike.any() else float("nan"),
            random=max(int(one.shape(name, exact=False).sum()) for one in random),
            first=where[0] if where else None,
            last=where[-1] if where else None,
        )
        rows.append(row)
    return rows
