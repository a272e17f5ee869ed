"""QK matching, from the weights: does a head's query of a token find the key of the same token?

1. Query and key of every token of a random sample are computed from its embedding, by default behind MLP 0, with the
   norm's own scale for it (and those of query and key norms), biases included.
2. Their score at an offset, or the mean over several (scores.py), is compared with the scores of the same query with
   the keys of all tokens of the sample: as a z-score (at most the root of their number), and as the share of the others
   that it exceeds.
3. With `via`, keys are what a previous-token head writes of a token: the match of a token to the position *after* its
   previous occurrence, which makes an induction head (K-composition; Elhage et al. 2021). Such a key is a part of a sum
   whose scale is not known; neither z-score nor rank depends on it.
4. Interval over tokens. Two nulls: every token of the sample matched to another one, in all cyclic shifts of their
   order; and keys that are turned at random within the head, so that it reads the same of both tokens but compares them
   otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance
from mechinterp.heads.matrices import Embedding, as_embedding, as_layers, divisor, embed, reads, writes
from mechinterp.heads.scores import Offset, ScoreForm, as_offsets, described, score_forms
from mechinterp.heads.tokens import sample_tokens
from mechinterp.hooked import weights
from mechinterp.hooked.model import HookedModel
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio


@dataclass(frozen=True, repr=False)
class MatchingResult(Result):
    """Matching of every head.

    `data` holds over `layer head`: `z`, `ci_low`, `ci_high` (95% over tokens), `rank_share` (of the other tokens that
    score below the same one; ½ is chance), `null` (the largest mean z of any shift or turn), `passes` (above it, and
    the interval above 0); `z_by_token` with a further axis `token` (labels: ids).
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """The heads that match best."""
        frame = self.to_frame()
        frame.insert(0, "cell", [f"L{a}H{b}" for a, b in zip(frame["layer"], frame["head"], strict=True)])
        return frame.sort_values("z", ascending=False, kind="stable").head(n).reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row a head."""
        return self.data.drop_dims("token").to_dataframe().reset_index()

    def to_json(self) -> dict[str, Any]:
        """Plain values: `[layer][head]` grids, and what was run; undefined is None."""
        grids = self.data.drop_dims("token")
        made = {str(name): plain(grids[name]) for name in grids.data_vars}
        return {**made, "layers": plain(self.data["layer"]), **plain(self.about)}

    def summary(self) -> str:
        """One line: how many heads match, and which does best."""
        best, about = self.top(1).iloc[0], self.about
        return (
            f"QK matching of a token to {about['to']}, {about['offset']}: {int(self.data['passes'].sum())} heads pass; "
            f"best {best['cell']}, z {best['z']:.1f} [{best['ci_low']:.1f}, {best['ci_high']:.1f}] "
            f"(n={about['n_tokens']} tokens, 95% over tokens)"
        )


def matching(
    model: HookedModel,
    layers: Sequence[int] | None = None,
    offset: Offset = None,
    embedding: Embedding = "mlp0",
    *,
    via: tuple[int, int] | None = None,
    n_tokens: int = 200,
    draws: int = 100,
    seed: int = 0,
) -> MatchingResult:
    """Score every head on finding the same token, at an offset.

    Args:
        model: the hooked model.
        layers: which; all by default (all behind `via`).
        offset: positions from the key to the query, one or several to take the mean over; 1 … period - 1 by default.
        embedding: "mlp0", the residual stream behind block 0 with its attention's output at zero; or "raw".
        via: (layer, head) of a previous-token head whose output the keys read, in place of the token's embedding.
        n_tokens: sample of the vocabulary.
        draws: random turns of the null.
        seed: of sample and interval.

    Raises:
        UserError: an unknown layer, head or embedding, an offset out of sight, or layers not behind `via`.
    """
    if draws < 1:
        raise UserError(f"matching needs draws ≥ 1; found {draws}")
    layers = _behind(model, as_layers(model, layers), layers is None, via)
    tokens, offsets = sample_tokens(model, n_tokens, seed), as_offsets(model, offset)
    forms = score_forms(model, layers, offsets)
    kinds: dict[int, Embedding] = {layer: as_embedding(model, embedding, layer) for layer in layers}
    embedded: dict[Embedding, Tensor] = {kind: embed(model, tokens, kind) for kind in set(kinds.values())}
    written = None if via is None else _written_by(model, tokens, embedding, *via)
    turns = torch.linalg.qr(
        torch.randn(draws, model.d_head, model.d_head, generator=torch.Generator().manual_seed(seed))
    )[0]
    found = []
    for layer in layers:
        pair = _queries_and_keys(model, layer, embedded[kinds[layer]], written, forms[layer])
        found.append(_z_scores(*pair, forms[layer].matrix, turns))
    about = provenance(model) | {
        "to": "itself" if via is None else f"what L{via[0]}H{via[1]} writes of it",
        "via": None if via is None else list(via),
        "embedding": embedding,
        "offset": described(offsets),
        "offsets": {str(layer): list(forms[layer].offsets) for layer in layers},
        "n_tokens": len(tokens),
        "seed": seed,
        "draws": draws,
        "control": "the largest of: each token matched to another one, all cyclic shifts of the sample; keys turned at "
        "random within the head",
    }
    return MatchingResult(_dataset(layers, tokens, found, seed), about)


def _behind(model: HookedModel, layers: list[int], default: bool, via: tuple[int, int] | None) -> list[int]:
    """Those of the layers that can read what `via` writes."""
    if via is None:
        return layers
    layer, head = via
    if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
        raise UserError(
            f"via=({layer}, {head}): {model.info.name} has layers 0 … {model.n_layers - 1} and heads 0 … "
            f"{model.n_heads - 1}"
        )
    behind = [each for each in layers if each > layer]
    if not behind or (len(behind) < len(layers) and not default):
        raise UserError(f"no head of layers {layers} reads what L{layer}H{head} writes; valid: layers behind {layer}")
    return behind


def _written_by(model: HookedModel, tokens: Tensor, embedding: Embedding, layer: int, head: int) -> Tensor:
    """`[token d_model]` what a head writes when it attends to each token, without biases."""
    stream = embed(model, tokens, as_embedding(model, embedding, layer))
    return stream / divisor(model, layer, stream) @ reads(model, layer, "v")[head] @ writes(model, layer)[head]


def _queries_and_keys(
    model: HookedModel, layer: int, stream: Tensor, written: Tensor | None, form: ScoreForm
) -> tuple[Tensor, Tensor]:
    """`[head token d_head]` each, of tokens in the residual stream `[token d_model]`."""
    normed = stream / divisor(model, layer, stream)
    weight, bias = weights.head_in(model, layer, "q")
    queries = torch.einsum("td,hde->hte", normed, weight.float()) + bias.float()[:, None]
    weight, bias = weights.head_in(model, layer, "k")
    if written is not None:
        return queries / form.scale(queries), torch.einsum("td,hde->hte", written, weight.float())
    keys = torch.einsum("td,hde->hte", normed, weight.float()) + bias.float()[:, None]
    return queries / form.scale(queries), keys / form.scale(keys)


def _z_scores(
    queries: Tensor, keys: Tensor, matrix: Tensor, turns: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[head token]` z-score and share of the other tokens that score lower, `[head]` the largest mean z of the nulls.

    Args:
        queries, keys: `[head token d_head]`.
        turns: `[draw d_head d_head]` rotations.
    """
    made = []
    n = queries.shape[1]
    shift = (torch.arange(n)[:, None] + torch.arange(1, n)) % n  # [token shift]
    for query, key in zip((queries @ matrix).cpu(), keys.cpu(), strict=True):
        scores = query @ key.T
        z, own = _standardised(scores), scores.diagonal()[:, None]
        below = ((scores < own).sum(-1) + ((scores == own).sum(-1) - 1) / 2) / (n - 1)
        turned = _standardised(query @ turns @ key.T).diagonal(dim1=1, dim2=2).mean(1)
        null = torch.cat([z.gather(1, shift).mean(0), turned]).amax()
        made.append((z.diagonal().double().numpy(), below.double().numpy(), float(null)))
    z, below, null = (np.stack(each) for each in zip(*made, strict=True))
    return z, below, null


def _standardised(scores: Tensor) -> Tensor:
    """`[… query key]` in standard deviations over keys; 0 for a query that scores all of them the same."""
    away, size = scores - scores.mean(-1, keepdim=True), scores.abs().amax(-1, keepdim=True)
    spread = away.square().mean(-1, keepdim=True).sqrt()
    return torch.where(spread > 1e-6 * size, away / spread, 0.0)


def _dataset(layers: list[int], tokens: Tensor, found: list[tuple[np.ndarray, ...]], seed: int) -> xr.Dataset:
    z, below, null = (np.stack(each) for each in zip(*found, strict=True))
    interval = bootstrap_ratio(z, seed=seed)
    grids = {
        "z": interval.estimate,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "rank_share": below.mean(-1),
        "null": null,
        "passes": (interval.estimate > null) & (interval.low > 0),
    }
    arrays: dict[str, Any] = {name: (("layer", "head"), values) for name, values in grids.items()}
    arrays["z_by_token"] = (("layer", "head", "token"), z)
    return xr.Dataset(arrays, coords={"layer": layers, "head": range(z.shape[1]), "token": tokens.tolist()})
