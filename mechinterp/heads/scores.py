"""Attention scores as a bilinear form of a head's query and key at an offset: asked of the model, not of its settings.

1. With the queries of every layer overwritten by unit vectors e_i and the keys by e_j, the score of a query with the
   key `offset` positions before it is entry (i, j) of the form. One forward holds all pairs (i, j) and all offsets:
   key p is e_p, query p is e_(p + s), and each shift s gives one diagonal.
2. What rotary embedding, its share of the head, the convention of its pairs, attention scale, query and key norms and
   their gains do is in the form. Scores under queries of zeros are taken off (ALiBi), a soft-cap is undone.
3. The form is linear, so the mean over offsets of the scores is the score of the mean form.

Under query and key norms the form is for queries and keys that are divided by their root mean square first. Learned
positions act through the residual stream: the form has the content alone, the same at every offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.heads.reading import read
from mechinterp.heads.tokens import context, default_period
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site

Offset = int | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class ScoreForm:
    """Scores before a soft-cap, of one layer: `query · matrix · key`.

    Attributes:
        matrix: `[d_head d_head]`, attention scale included.
        normed: whether query and key are divided by their root mean square first (query and key norms).
        offsets: that the matrix is the mean over; those that the layer's window hides are left out.
    """

    matrix: Tensor
    normed: bool
    offsets: tuple[int, ...]

    def scale(self, x: Tensor) -> Tensor:
        """`[… one]` what a query or key `[… d_head]` is divided by."""
        return x.square().mean(-1, keepdim=True).sqrt() if self.normed else torch.ones_like(x[..., :1])


def as_offsets(model: HookedModel, offset: Offset) -> list[int]:
    """1 … period - 1 of random repeated tokens by default, or those given. Raises UserError for a negative one."""
    if offset is None:
        return list(range(1, default_period(model)))
    offsets = [offset] if isinstance(offset, int) else list(offset)
    if not offsets or min(offsets) < 0:
        raise UserError(f"an offset is a number of positions from key to query, 0 or more; found {offset}")
    return offsets


def described(offsets: Sequence[int]) -> str:
    """The offsets in words: `at offset 7`, `mean over offsets 1 … 49`."""
    if len(offsets) == 1:
        return f"at offset {offsets[0]}"
    return f"mean over {len(offsets)} offsets, {min(offsets)} … {max(offsets)}"


def score_forms(model: HookedModel, layers: Sequence[int], offset: Offset = None) -> dict[int, ScoreForm]:
    """The form of each layer, at one offset or the mean over several (1 … period - 1 by default).

    Raises:
        UserError: an offset that no query of a layer sees or that the context does not have, a norm over all heads at
            once, or attention that is computed out of sight.
    """
    offsets = as_offsets(model, offset)
    hidden = [layer for layer in layers if Site("attn_scores", layer) not in model.site_list]
    forms = {layer: _unseen(model, layer, offsets) for layer in hidden}
    seen = sorted(set(layers) - set(hidden))
    if seen:
        forms |= _asked(model, seen, offsets)
    return forms


def _unseen(model: HookedModel, layer: int, offsets: Sequence[int]) -> ScoreForm:
    """Where the wrapped module keeps its scores to itself: plain scaled dot products, if positions are learned."""
    if getattr(model.bridge.cfg, "positional_embedding_type", None) != "standard":
        raise UserError(
            f"{model.info.name} computes attention inside the wrapped module, so that its scores at an offset are not "
            "seen; valid: composition(kind='v'), factors(circuit='ov'), copying"
        )
    scale: Any = getattr(model.bridge.blocks[layer].attn.original_component, "scaling", model.d_head**-0.5)
    return ScoreForm(scale * torch.eye(model.d_head, device=model.device), False, tuple(offsets))


def _normed(model: HookedModel, layer: int) -> bool:
    """Whether queries and keys go through a norm of their own. Raises UserError for one over all heads at once."""
    name = f"blocks.{layer}.attn.q_norm.hook_scale"
    if name not in model.shapes:
        return False
    weight: Any = model.bridge.blocks[layer].attn.q_norm.original_component.weight
    if weight.numel() != model.d_head:
        raise UserError(
            f"{model.info.name} norms its queries with {weight.numel()} gains, over or by all heads of a layer; only "
            f"norms within a head ({model.d_head} gains) have a score that is linear in one head's query and key"
        )
    return True


def _asked(model: HookedModel, layers: Sequence[int], offsets: Sequence[int]) -> dict[int, ScoreForm]:
    normed = {layer: _normed(model, layer) for layer in layers}
    design = _Design.of(model, max(offsets))
    cap = float(getattr(model.bridge.cfg, "attn_scores_soft_cap", 0) or 0)
    forms: dict[int, ScoreForm] = {}

    def use(i: int, scores: Tensor) -> None:
        layer, scores = layers[i], scores.float()
        masked = scores[-1:] < -1e4  # the last row has queries of zeros
        if cap > 0:
            scores = cap * torch.atanh((scores / cap).clamp(-1, 1))
        scores = (scores - scores[-1:]).masked_fill(masked, torch.nan)
        found = {offset: design.gather(scores, offset) for offset in offsets}
        kept = {offset: matrix for offset, matrix in found.items() if not matrix.isnan().any()}
        if not kept:
            raise UserError(
                f"layer {layer} sees no key {min(offsets)} positions before a query; valid: smaller offsets"
            )
        # A unit vector has the root mean square 1 / sqrt(d_head), which the norms of query and key divided by.
        matrix = torch.stack(list(kept.values())).mean(0) / (model.d_head if normed[layer] else 1)
        forms[layer] = ScoreForm(matrix, normed[layer], tuple(kept))

    edits: dict[str, Edit] = {}
    for layer in layers:
        size = 1e3 if normed[layer] else 1.0  # beside which the norm's epsilon is lost
        edits[Site("q", layer).hook_name] = _overwrite(size * design.queries)
        edits[Site("k", layer).hook_name] = _overwrite(size * design.keys)
    sites = [Site("attn_scores", layer) for layer in layers]
    read(model, Prompts(torch.zeros(design.queries.shape[:2], dtype=torch.long)), sites, use, edits)
    return forms


def _overwrite(value: Tensor) -> Edit:
    def edit(activation: Tensor, rows: Rows) -> Tensor:
        return value.to(activation)

    return edit


@dataclass(frozen=True, eq=False)
class _Design:
    """Which unit vectors stand where, so that every pair of them meets at every offset.

    A sequence has `first` positions in front, and then as many queries as the context holds. Slot p of block b stands
    for u = p + b · (number of queries): its key is e_(u mod d_head), its query e_(u + shift mod d_head), and each head
    of each row has a shift of its own. The last row has queries of zeros.

    Attributes:
        queries: `[batch pos head d_head]`.
        keys: `[batch pos kv_head d_head]`.
        row, head, query: `[slot]` where each slot's score is.
        u, shift: `[slot]`.
    """

    queries: Tensor
    keys: Tensor
    row: Tensor
    head: Tensor
    query: Tensor
    u: Tensor
    shift: Tensor

    @classmethod
    def of(cls, model: HookedModel, first: int) -> "_Design":
        """For offsets up to `first`."""
        d, n_heads = model.d_head, model.n_heads
        n_pos = min(first + d, context(model) or first + d)
        if n_pos <= first:
            raise UserError(f"an offset of {first} needs {first + 1} positions; {model.info.name} has {context(model)}")
        by_block = -(-d // n_heads)
        n_rows = -(-d // (n_pos - first)) * by_block
        row, pos, head = torch.arange(n_rows)[:, None, None], torch.arange(n_pos)[:, None], torch.arange(n_heads)
        u = (pos + row // by_block * (n_pos - first)).expand(n_rows, n_pos, n_heads)
        shift = ((row % by_block) * n_heads + head).expand_as(u)
        eye = torch.eye(d)
        queries, keys = eye[(u + shift) % d], eye[u[:, :, :1] % d].expand(-1, -1, model.n_kv_heads, -1)
        used = (shift < d) & (pos >= first)
        return cls(
            torch.cat([queries, torch.zeros_like(queries[:1])]),
            torch.cat([keys, keys[:1]]),
            row=row.expand_as(u)[used],
            head=head.expand_as(u)[used],
            query=pos.expand_as(u)[used],
            u=u[used],
            shift=shift[used],
        )

    def gather(self, scores: Tensor, offset: int) -> Tensor:
        """`[d_head d_head]` from scores `[batch head query key]`."""
        d = self.queries.shape[-1]
        matrix = scores.new_full((d, d), torch.nan)
        matrix[(self.u + self.shift) % d, (self.u - offset) % d] = scores[
            self.row, self.head, self.query, self.query - offset
        ]
        return matrix
