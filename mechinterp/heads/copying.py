"""Copying and anti-copying heads, from their weights: does attending to a token raise its own logit?

1. A token's embedding E (by default behind MLP 0; layer 0 reads it raw), divided by its own norm's scale, goes through
   W_OV to logits over the whole vocabulary, less their mean. E W_OV W_U `[d_vocab d_vocab]` is never formed.
2. *Eigenvalues.* It has those of the `[d_head d_head]` matrix W_O W_U E W_V: their sum over the sum of their absolute
   values is 1 for a head that copies all it reads, -1 for one that suppresses it (Elhage et al. 2021). All tokens of
   the vocabulary count. Null: random W_OV with the same singular values.
3. *Top tokens.* The share of tokens whose own logit is among the `top_k` largest that the head writes when it attends
   to them (Wang et al. 2023), or the smallest (copy suppression, McDougall et al. 2023), over a random sample of
   tokens, with an interval over them. Ties count against. Null: the logit of another token of the sample in place of
   its own, which is as high in a head that raises the same tokens whatever it reads.

Memory: four matrices of the embedding's size, and `n_tokens` rows of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance
from mechinterp.heads.matrices import Embedding, as_embedding, as_layers, divisor, embed, readout, reads, writes
from mechinterp.heads.tokens import sample_tokens
from mechinterp.hooked.model import HookedModel
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio

# Below this share of the largest that its factors allow, all eigenvalues of a head are rounding.
NOTHING = 1e-6
ALPHA = 0.05


@dataclass(frozen=True, repr=False)
class CopyingResult(Result):
    """Copying of every head.

    `data` holds over `layer head`: `eigenvalue` (-1 … 1, NaN where a head writes nothing that is read), with
    `eigenvalue_null`, `eigenvalue_sd` and `eigenvalue_p` of the random matrices; `top_share` and `bottom_share`, each
    with `_low` and `_high` (95% over tokens), and `_null`, `_null_high`; `copies` and `suppresses` (both definitions
    beyond their nulls); `top_hits` and `bottom_hits` with a further axis `token` (labels: ids).
    """

    def top(self, n: int = 10, by: Literal["copying", "anti"] = "copying") -> pd.DataFrame:
        """The heads of largest eigenvalue score, or of smallest."""
        end = "top" if by == "copying" else "bottom"
        flag = "copies" if by == "copying" else "suppresses"
        names = ["eigenvalue", "eigenvalue_null", "eigenvalue_p"]
        names += [f"{end}_share", f"{end}_share_low", f"{end}_share_high", f"{end}_share_null", flag]
        frame = self.to_frame()
        frame.insert(0, "cell", [f"L{a}H{b}" for a, b in zip(frame["layer"], frame["head"], strict=True)])
        frame = frame.sort_values("eigenvalue", ascending=by == "anti", kind="stable", na_position="last")
        return frame.filter(["cell", *names]).head(n).reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row a head."""
        return self.data.drop_dims("token").to_dataframe().reset_index()

    def to_json(self) -> dict[str, Any]:
        """Plain values: `[layer][head]` grids, and what was run; undefined is None."""
        grids = self.data.drop_dims("token")
        made = {str(name): plain(grids[name]) for name in grids.data_vars}
        return {**made, "layers": plain(self.data["layer"]), **plain(self.about)}

    def summary(self) -> str:
        """One line: how many heads copy, and which does most."""
        best = self.top(1).iloc[0]
        return (
            f"OV copying: {int(self.data['copies'].sum())} heads copy, {int(self.data['suppresses'].sum())} suppress, "
            f"beyond both nulls; most {best['cell']}: eigenvalues {best['eigenvalue']:.2f}, own logit among the top "
            f"{self.about['top_k']} for {best['top_share']:.0%} [{best['top_share_low']:.0%}, "
            f"{best['top_share_high']:.0%}] of {self.about['n_tokens']} tokens"
        )


def copying(
    model: HookedModel,
    layers: Sequence[int] | None = None,
    embedding: Embedding = "mlp0",
    *,
    n_tokens: int = 200,
    top_k: int = 10,
    draws: int = 20,
    seed: int = 0,
) -> CopyingResult:
    """Score every head on copying the token that it attends to.

    Args:
        model: the hooked model.
        layers: which; all by default.
        embedding: "mlp0", the residual stream behind block 0 with its attention's output at zero; or "raw".
        n_tokens: sample of the vocabulary for the top-token score.
        top_k: how many of the largest (smallest) logits count as top.
        draws: random matrices of the eigenvalue's null.
        seed: of sample, nulls and intervals.

    Raises:
        UserError: an unknown layer or embedding, or fewer than two tokens.
    """
    layers = as_layers(model, layers)
    kinds: dict[int, Embedding] = {layer: as_embedding(model, embedding, layer) for layer in layers}
    if not 1 <= top_k < model.d_vocab or draws < 1:
        raise UserError(f"copying needs 1 ≤ top_k < {model.d_vocab} and draws ≥ 1; found {top_k} and {draws}")
    tokens = sample_tokens(model, n_tokens, seed)
    logits, everything = readout(model), torch.arange(model.d_vocab, device=model.device)
    embedded: dict[Embedding, Tensor] = {kind: embed(model, everything, kind) for kind in set(kinds.values())}
    null = _Null.draw(model, draws, seed)
    eigen, top = [], []
    through: dict[Embedding, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        stream = embedded[kinds[layer]]
        scale = divisor(model, layer, stream[tokens])
        known = through.get(kinds[layer])
        if known is None or not torch.allclose(known[0], scale, rtol=1e-5):
            # [d_model d_model], the vocabulary summed over: the same for all layers whose norm divides alike.
            through[kinds[layer]] = (scale, logits @ (stream / divisor(model, layer, stream)))
        matrix, values, out = through[kinds[layer]][1], reads(model, layer, "v"), writes(model, layer)
        eigen.append(_eigenvalues(matrix, values, out, null))
        top.append(_hits(stream[tokens] / scale, values, out, logits, tokens, top_k))
    about = provenance(model) | {
        "embedding": "after MLP 0 (layer 0: raw)" if "mlp0" in kinds.values() else "raw",
        "n_tokens": len(tokens),
        "top_k": top_k,
        "draws": draws,
        "seed": seed,
        "control": "eigenvalues: random W_OV of the same singular values; top tokens: another token of the sample",
    }
    return CopyingResult(_dataset(layers, tokens, np.stack(eigen), np.stack(top), seed), about)


@dataclass(frozen=True, eq=False)
class _Null:
    """Random orthonormal frames `[draw d_model d_head]` for what a random head reads and writes."""

    reads: Tensor
    writes: Tensor

    @classmethod
    def draw(cls, model: HookedModel, draws: int, seed: int) -> "_Null":
        generator = torch.Generator().manual_seed(seed)
        shape = (2 * draws, model.d_model, min(model.d_head, model.d_model))
        frames = torch.linalg.qr(torch.randn(shape, generator=generator))[0].to(model.device)
        return cls(frames[:draws], frames[draws:])


def _eigenvalues(matrix: Tensor, values: Tensor, out: Tensor, null: _Null) -> np.ndarray:
    """`[head 4]`: score, mean and standard deviation of the null, and p (two-sided)."""
    own = torch.einsum("hed,dc,hcf->hef", out, matrix, values)
    largest = out.flatten(1).norm(dim=1) * matrix.norm() * values.flatten(1).norm(dim=1)
    random = null.writes.transpose(1, 2) @ matrix @ null.reads  # [draw d_head d_head]
    singular = torch.linalg.svdvals(torch.linalg.qr(values).R @ torch.linalg.qr(out.transpose(1, 2)).R.transpose(1, 2))
    found = []
    for head, score in enumerate(_share(own, largest)):
        drawn = _share(random * singular[head, : random.shape[-1]], largest[head]).numpy()
        p = (1 + (np.abs(drawn) >= abs(float(score))).sum()) / (1 + len(drawn))
        found.append([float(score), drawn.mean(), drawn.std(), p if np.isfinite(float(score)) else np.nan])
    return np.array(found)


def _share(square: Tensor, largest: Tensor) -> Tensor:
    """Sum of the eigenvalues over the sum of their absolute values, of `[… d_head d_head]`; NaN for nothing."""
    values = torch.linalg.eigvals(square.double().cpu())
    size = values.abs().sum(-1)
    return torch.where(size > NOTHING * largest.cpu(), values.real.sum(-1) / size, torch.nan)


def _hits(stream: Tensor, values: Tensor, out: Tensor, readout: Tensor, tokens: Tensor, top_k: int) -> np.ndarray:
    """`[end head token]` bool, ends: own logit among the top, among the bottom, and both for another token's logit."""
    found = []
    for head in range(len(values)):
        written = (stream @ values[head]) @ (out[head] @ readout)  # [token d_vocab]
        own = written.gather(1, torch.stack([tokens, tokens.roll(1)], 1))  # the token's, and another's
        # Beyond the first logit that is no longer among the top_k: a tie with it does not count.
        high = own > written.topk(top_k + 1).values[:, -1:]
        low = own < written.topk(top_k + 1, largest=False).values[:, -1:]
        found.append(torch.stack([high[:, 0], low[:, 0], high[:, 1], low[:, 1]]))
    return torch.stack(found, 1).cpu().numpy()


def _dataset(layers: list[int], tokens: Tensor, eigen: np.ndarray, hits: np.ndarray, seed: int) -> xr.Dataset:
    """Of `eigen` `[layer head 4]` and `hits` `[layer end head token]`."""
    names = ("eigenvalue", "eigenvalue_null", "eigenvalue_sd", "eigenvalue_p")
    grids = {name: eigen[..., i] for i, name in enumerate(names)}
    for i, end in enumerate(("top", "bottom")):
        own, other = (bootstrap_ratio(hits[:, j].astype(float), seed=seed) for j in (i, i + 2))
        limits = {"": own.estimate, "_low": own.low, "_high": own.high}
        limits |= {"_null": other.estimate, "_null_high": other.high}
        grids |= {f"{end}_share{suffix}": values for suffix, values in limits.items()}
    certain = grids["eigenvalue_p"] <= ALPHA
    for flag, end, sign in (("copies", "top", 1), ("suppresses", "bottom", -1)):
        beyond = grids[f"{end}_share_low"] > grids[f"{end}_share_null_high"]
        grids[flag] = certain & (sign * grids["eigenvalue"] > 0) & beyond
    arrays: dict[str, Any] = {name: (("layer", "head"), values) for name, values in grids.items()}
    for i, end in enumerate(("top", "bottom")):
        arrays[f"{end}_hits"] = (("layer", "head", "token"), hits[:, i])
    return xr.Dataset(arrays, coords={"layer": layers, "head": range(eigen.shape[1]), "token": tokens.tolist()})
