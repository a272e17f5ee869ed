"""Q-, K- and V-composition: how much of what a head reads lies in what an earlier head writes, from the weights.

1. W_OV of a source is A B (what it reads, what it writes), the matrix of a destination is C D: its W_QK at an offset
   (scores.py) for "q" and "k", its W_OV for "v". The composition is ‖A B C D‖ / (‖A B‖ ‖C D‖), Frobenius norms
   (Elhage et al. 2021).
2. Of A and D only the Gram matrices matter: with A = Q R by QR, ‖A B C D‖ = ‖R B · C S‖, S from D. So each source is
   a `[d_head d_model]` matrix, each destination a `[d_model d_head]` one, and a pair has a `[d_head d_head]` product.
3. Null: matrices of the same singular values in random directions. The square of their composition has the mean 1 / d
   and a variance in closed form (fourth moments of a random orthogonal matrix), with d the dimensions that a norm
   leaves. Its root has the mean and standard deviation of a gamma variable's with these two moments. Composition is
   reported less that mean, and with that standard deviation.

The scales of norms, and of query and key norms, are factors of a head's matrix and cancel. Memory: all sources and, a
layer at a time, the destinations and their products with the sources: `peak_bytes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance
from mechinterp.heads.matrices import as_layers, reads, writes
from mechinterp.heads.scores import Offset, ScoreForm, as_offsets, described, score_forms
from mechinterp.hooked import weights
from mechinterp.hooked.model import HookedModel
from mechinterp.results import Result, plain

Input = Literal["q", "k", "v"]


@dataclass(frozen=True, repr=False)
class CompositionResult(Result):
    """Composition of every pair of heads.

    `data` holds over `source destination` (labels `L9H6`): `composition` (0 … 1), `null` and `null_sd` of random
    matrices, `excess` (composition - null) and `z` (excess / null_sd); NaN where the source is not in an earlier layer.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """The pairs of largest excess."""
        excess = self.data["excess"].values
        order = np.argsort(-np.nan_to_num(excess, nan=-np.inf), axis=None, kind="stable")
        order = order[: min(n, int(np.isfinite(excess).sum()))]
        source, destination = np.unravel_index(order, excess.shape)
        numbers = {str(name): array.values[source, destination] for name, array in self.data.data_vars.items()}
        labels = {
            "source": self.data["source"].values[source],
            "destination": self.data["destination"].values[destination],
        }
        return pd.DataFrame(labels | numbers)

    def to_json(self) -> dict[str, Any]:
        """Plain values: `[source][destination]` and their labels; undefined is None."""
        grids = {name: plain(self.data[name].astype(float).round(6)) for name in ("excess", "composition", "null_sd")}
        labels = {name: plain(self.data[name]) for name in ("source", "destination")}
        return {**grids, **labels, **plain(self.about)}

    def summary(self) -> str:
        """One line: the pair that composes most."""
        about = self.about
        if not np.isfinite(self.data["excess"].values).any():
            return f"{about['kind']}-composition: no head reads another's output"
        best = self.top(1).iloc[0]
        at = f" {about['offset']}" if about["offset"] else ""
        return (
            f"{about['kind'].upper()}-composition{at}: most {best['source']} → {best['destination']} "
            f"{best['composition']:.3f}, random {best['null']:.3f} ± {best['null_sd']:.4f} (z {best['z']:.0f})"
        )


def composition(
    model: HookedModel, kind: Input, layers: Sequence[int] | None = None, offset: Offset = None
) -> CompositionResult:
    """How much each head's queries, keys or values read of each earlier head.

    Args:
        model: the hooked model.
        kind: "q", "k" or "v": which input of the destination.
        layers: of sources and destinations; all by default.
        offset: positions from key to query for "q" and "k", one or several to take the mean over; 1 … period - 1 by
            default.

    Returns:
        Composition of all pairs.

    Raises:
        UserError: an unknown kind or layer, an offset with "v" or out of sight, attention that is out of sight.
    """
    if kind not in get_args(Input):
        raise UserError(f"unknown composition {kind!r}; valid: {', '.join(get_args(Input))}")
    if kind == "v" and offset is not None:
        raise UserError("values do not depend on an offset; offset is for composition(kind='q' or 'k')")
    layers = as_layers(model, layers)
    offsets = [] if kind == "v" else as_offsets(model, offset)
    forms = {} if kind == "v" else score_forms(model, layers, offsets)
    sources = torch.cat([_source(model, layer) for layer in layers])  # [source d_head d_model]
    n = len(sources)
    found = np.full((3, n, n), np.nan)
    space = model.d_model - int(weights.final_norm(model).centred)
    for i, layer in enumerate(layers[1:], 1):
        earlier = sources[: i * model.n_heads]
        destinations = _destination(model, layer, kind, forms.get(layer))
        block = slice(i * model.n_heads, (i + 1) * model.n_heads)
        found[0, : len(earlier), block] = _composed(earlier, destinations)
        mean, sd = random_composition(spread(earlier)[:, None], spread(destinations.transpose(1, 2)), space)
        found[1, : len(earlier), block], found[2, : len(earlier), block] = mean, sd
    labels = [f"L{layer}H{head}" for layer in layers for head in range(model.n_heads)]
    about = provenance(model) | {
        "kind": kind,
        "offset": described(offsets) if offsets else None,
        "offsets": {str(layer): list(form.offsets) for layer, form in forms.items()},
        "control": "matrices of the same singular values in random directions",
        "peak_bytes": peak_bytes(model, len(layers)),
    }
    return CompositionResult(_dataset(found, labels), about)


def _source(model: HookedModel, layer: int) -> Tensor:
    """`[head d_head d_model]` what heads write, weighted by how strongly they read."""
    return torch.linalg.qr(reads(model, layer, "v")).R @ writes(model, layer)


def _destination(model: HookedModel, layer: int, kind: Input, form: ScoreForm | None) -> Tensor:
    """`[head d_model d_head]` what heads read for their queries, keys or values, weighted by what they make of it."""
    if form is None:
        inner, outer = reads(model, layer, "v"), writes(model, layer).transpose(1, 2)
    elif kind == "q":
        inner, outer = reads(model, layer, "q") @ form.matrix, reads(model, layer, "k")
    else:
        inner, outer = reads(model, layer, "k") @ form.matrix.T, reads(model, layer, "q")
    return inner @ torch.linalg.qr(outer).R.transpose(1, 2)


def _composed(sources: Tensor, destinations: Tensor) -> np.ndarray:
    """`[source destination]` of `[source d_head d_model]` and `[destination d_model d_head]`."""
    product = sources.flatten(0, 1) @ destinations.transpose(0, 1).flatten(1)
    squares = product.square_().unflatten(0, sources.shape[:2]).unflatten(2, (len(destinations), -1)).sum((1, 3))
    norms = sources.flatten(1).norm(dim=1)[:, None] * destinations.flatten(1).norm(dim=1)
    return (squares.sqrt() / norms).cpu().numpy()


def spread(factors: Tensor) -> np.ndarray:
    """`[head]` of `[head d_head d_model]`: the sum of the fourth powers of the singular values over the square of the
    sum of their squares, 1 over their number if all are alike."""
    gram = (factors @ factors.transpose(1, 2)).double()
    return (gram.square().sum((1, 2)) / gram.diagonal(dim1=1, dim2=2).sum(1).square()).cpu().numpy()


def random_composition(a: np.ndarray, b: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the composition of two matrices in random directions of `d` dimensions.

    Args:
        a, b: `spread` of their singular values; they broadcast.
    """
    second = 3 * a * b / (d * (d + 2))  # E u_ij^4
    second = second + (a * (1 - b) + (1 - a) * b) / (d * (d + 2))  # E u_ij^2 u_ik^2
    second = second + (1 - a) * (1 - b) * (d + 1) / (d * (d - 1) * (d + 2))  # E u_ij^2 u_kl^2
    shape = torch.from_numpy(1 / (second * d**2 - 1))  # of the gamma variable; its mean is 1 / d
    root = (torch.lgamma(shape + 0.5) - torch.lgamma(shape)).exp() / shape.sqrt()
    return (root / d**0.5).numpy(), ((1 - root.square()).clamp(min=0) / d).sqrt().numpy()


def peak_bytes(model: HookedModel, n_layers: int) -> int:
    """Memory that composition takes beside the model: the sources, and one layer's destinations and products."""
    layer = model.n_heads * model.d_head
    tensors = n_layers * layer * model.d_model + 2 * layer * model.d_model + n_layers * layer * layer
    return 4 * tensors + 5 * 8 * (n_layers * model.n_heads) ** 2


def _dataset(found: np.ndarray, labels: list[str]) -> xr.Dataset:
    """Of `found` [composition, null, sd][source destination]."""
    value, null, sd = found
    grids = {"composition": value, "null": null, "null_sd": sd, "excess": value - null, "z": (value - null) / sd}
    arrays = {name: (("source", "destination"), grid) for name, grid in grids.items()}
    return xr.Dataset(arrays, coords={"source": labels, "destination": labels})
