"""What one head reads and writes, direction by direction: the singular values of its OV or QK matrix, and tokens.

1. The matrix is a product of thin factors; QR of both leaves the SVD of a `[d_head d_head]` matrix, which is exact.
2. OV: each direction is read from the residual stream (the tokens whose embedding, divided by its norm's scale, lies
   furthest along it) and written (the tokens whose logits it raises and lowers most).
3. QK, at an offset (scores.py): each direction is read by the query and by the key. Query and key norms are frozen at
   their mean scale over a run on repeated random tokens.
4. The sign of a pair of directions is free: the token furthest along the first has a positive coefficient. Control: how
   far, in standard deviations over the vocabulary, the furthest token lies along random directions.

Millidge & Black 2022.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance
from mechinterp.heads.matrices import Embedding, as_embedding, as_layers, divisor, embed, readout, reads, writes
from mechinterp.heads.scores import Offset, as_offsets, described, score_forms
from mechinterp.heads.tokens import repeated_tokens
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import Site
from mechinterp.results import Result, plain

Circuit = Literal["ov", "qk"]
RANDOM_DIRECTIONS = 200
CONTROL = "the furthest token along random directions, in standard deviations over the vocabulary: 95% lie below"


@dataclass(frozen=True, repr=False)
class FactorsResult(Result):
    """Directions of one head, strongest first.

    `data` holds over `feature`: `singular_value` and `share` (of the sum of squares); `left_z` and `right_z`, the
    furthest token in standard deviations over the vocabulary; over `feature rank`, for each of the sides `left` (what
    is read; the query) and `right` (what is written; the key): `left_high`, `left_low` token ids at the two ends, and
    `left_high_value`, `left_low_value` their coefficients (and so for `right`). `about` has `left_control` and
    `right_control`: what 95% of random directions stay below, as z.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """The strongest directions with the tokens at their ends."""
        rows = []
        for i in range(min(n, self.data.sizes["feature"])):
            one = self.data.isel(feature=i)
            row = {"direction": i, "singular_value": float(one["singular_value"]), "share": float(one["share"])}
            for side in ("left", "right"):
                row[f"{side}_z"] = float(one[f"{side}_z"])
                row |= {f"{side}_{end}": self.texts(i, f"{side}_{end}")[:5] for end in ("high", "low")}
            rows.append(row)
        return pd.DataFrame(rows)

    def texts(self, direction: int, end: str) -> list[str]:
        """Tokens at an end (`left_high`, `left_low`, `right_high`, `right_low`) of a direction, furthest first."""
        return [self.about["texts"][str(i)] for i in self.data[end].isel(feature=direction).values.tolist()]

    def to_json(self) -> dict[str, Any]:
        """Plain values by direction, and what was asked."""
        about = {name: value for name, value in self.about.items() if name != "texts"}
        ends = [f"{side}_{end}" for side in ("left", "right") for end in ("high", "low")]
        texts = {f"{end}_text": [self.texts(i, end) for i in range(self.data.sizes["feature"])] for end in ends}
        return {**{str(name): plain(array) for name, array in self.data.data_vars.items()}, **texts, **plain(about)}

    def summary(self) -> str:
        """One line: the strongest direction and its tokens."""
        about, left, right = self.about, self.texts(0, "left_high")[:3], self.texts(0, "right_high")[:3]
        verb = "reads {} and writes {}" if about["circuit"] == "ov" else "matches queries {} with keys {}"
        share = float(self.data["share"][0])
        where = f" {about['offset']}" if about["offset"] else ""
        return (
            f"{about['circuit'].upper()} of {about['head']}{where}: the first direction ({share:.0%}) "
            + verb.format(left, right)
        )


def factors(
    model: HookedModel,
    layer: int,
    head: int,
    circuit: Circuit = "ov",
    offset: Offset = None,
    *,
    k: int = 10,
    n_tokens: int = 10,
    embedding: Embedding = "mlp0",
    seed: int = 0,
) -> FactorsResult:
    """Singular directions of a head's OV or QK matrix, with the tokens that each reads and writes.

    Args:
        model: the hooked model.
        layer, head: which head.
        circuit: "ov" or "qk".
        offset: positions from key to query for "qk", one or several to take the mean over; 1 … period - 1 by default.
        k: directions.
        n_tokens: tokens at each end of a direction.
        embedding: "mlp0" or "raw" (see `copying`).
        seed: of the control, and of the run that freezes query and key norms.

    Raises:
        UserError: an unknown circuit or head, an offset with "ov" or out of sight, attention out of sight.
    """
    if circuit not in get_args(Circuit):
        raise UserError(f"unknown circuit {circuit!r}; valid: {', '.join(get_args(Circuit))}")
    if circuit == "ov" and offset is not None:
        raise UserError("OV does not depend on an offset; offset is for factors(circuit='qk')")
    (layer,) = as_layers(model, [layer])
    if not 0 <= head < model.n_heads or k < 1 or n_tokens < 1:
        raise UserError(
            f"factors need head 0 … {model.n_heads - 1}, k ≥ 1, n_tokens ≥ 1; found {head}, {k}, {n_tokens}"
        )
    first, second, about = _matrix(model, layer, head, circuit, offset, seed)
    left, singular, right = thin_svd(first, second)
    kind = as_embedding(model, embedding, layer)
    stream = embed(model, torch.arange(model.d_vocab, device=model.device), kind)
    stream = stream / divisor(model, layer, stream)
    sign = _furthest_is_positive(stream @ left)
    arrays: dict[str, Any] = {
        "singular_value": ("feature", singular[:k].double().cpu().numpy()),
        "share": ("feature", (singular.square() / singular.square().sum())[:k].double().cpu().numpy()),
    }
    for side, directions, tokens in (("left", left, stream), ("right", right, stream if circuit == "qk" else None)):
        tokens = readout(model).T if tokens is None else tokens
        found, about[f"{side}_control"] = _ends(tokens, (directions * sign)[:, :k], min(n_tokens, len(tokens)), seed)
        arrays |= {f"{side}_{name}": value for name, value in found.items()}
    data = xr.Dataset(arrays)
    ends = np.concatenate(
        [data[f"{side}_{end}"].values.ravel() for side in ("left", "right") for end in ("high", "low")]
    )
    ids = np.unique(ends).tolist()
    about["texts"] = dict(zip(map(str, ids), model.token_strings(ids), strict=True))
    about |= {"embedding": "after MLP 0" if kind == "mlp0" else "raw", "seed": seed, "control": CONTROL}
    return FactorsResult(data, provenance(model) | about)


def _matrix(
    model: HookedModel, layer: int, head: int, circuit: Circuit, offset: Offset, seed: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`[d_model d_head]` twice, whose product (the second one transposed) is the head's matrix; and what it is."""
    about: dict[str, Any] = {"circuit": circuit, "head": f"L{layer}H{head}", "offset": None, "frozen_scales": None}
    if circuit == "ov":
        return reads(model, layer, "v")[head], writes(model, layer)[head].T, about
    offsets = as_offsets(model, offset)
    form = score_forms(model, [layer], offsets)[layer]
    first, second = reads(model, layer, "q")[head] @ form.matrix, reads(model, layer, "k")[head]
    about |= {"offset": described(offsets), "offsets": list(form.offsets)}
    if form.normed:
        scales = [_norm_scale(model, layer, head, name, seed) for name in ("q", "k")]
        about["frozen_scales"] = scales
        first = first / (scales[0] * scales[1])
    return first, second, about


def _norm_scale(model: HookedModel, layer: int, head: int, name: Literal["q", "k"], seed: int) -> float:
    """Mean of what a head's query (or key) norm divides by, over a run on repeated random tokens."""
    site = Site(name, layer)
    _, cache = model.run_with_cache(repeated_tokens(model, n=4, seed=seed), names_filter=[site])
    vectors = cache[site][:, 1:, head // (model.n_heads // model.axis_size(site))].float()  # position 0 is apart
    return float(vectors.square().mean(-1).sqrt().mean())


def thin_svd(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[d_model d_head]`, singular values `[d_head]`, V `[d_model d_head]` of `first @ second.T`, both
    `[d_model d_head]`."""
    q_first, r_first = torch.linalg.qr(first)
    q_second, r_second = torch.linalg.qr(second)
    u, singular, v = torch.linalg.svd(r_first @ r_second.T)
    return q_first @ u, singular, q_second @ v.T


def _furthest_is_positive(coefficients: Tensor) -> Tensor:
    """`[feature]` signs, from `[d_vocab feature]`."""
    furthest = coefficients.gather(0, coefficients.abs().argmax(0, keepdim=True))[0]
    return torch.where(furthest < 0, -1.0, 1.0)


def _ends(tokens: Tensor, directions: Tensor, n: int, seed: int) -> tuple[dict[str, Any], float]:
    """Of tokens `[d_vocab d_model]`, those furthest along `directions` `[d_model feature]`, both ways; the control."""
    along = tokens @ directions
    dims = ("feature", "rank")
    found: dict[str, Any] = {"z": ("feature", _furthest_z(along).double().cpu().numpy())}
    for end, largest in (("high", True), ("low", False)):
        values, ids = along.topk(n, dim=0, largest=largest)
        found[end] = (dims, ids.T.cpu().numpy())
        found[f"{end}_value"] = (dims, values.T.double().cpu().numpy())
    draw = torch.randn(tokens.shape[1], RANDOM_DIRECTIONS, generator=torch.Generator().manual_seed(seed))
    return found, float(_furthest_z(tokens @ draw.to(tokens)).quantile(0.95))


def _furthest_z(along: Tensor) -> Tensor:
    """`[feature]` the furthest token of `[d_vocab feature]`, in standard deviations over the vocabulary."""
    return ((along - along.mean(0)).abs().amax(0) / along.std(0)).nan_to_num(0.0)
