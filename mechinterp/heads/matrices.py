"""What heads read and write, between the embedding and the unembedding: thin factors, never `[d_model d_model]`.

Norms are folded in: reads act on the residual stream divided by the norm's scale; writes are behind the norm after
attention where there is one (its scale, a factor for each position, set to 1) and, where the norms that read them take
the mean out, without their mean. So raw and processed weights give the same. Biases are constants and left out.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.heads.reading import read
from mechinterp.hooked import weights
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site

Embedding = Literal["mlp0", "raw"]
TOKENS_AT_ONCE = 2048


def as_layers(model: HookedModel, layers: Sequence[int] | None) -> list[int]:
    """All layers, or those given, counted from 0 and ascending. Raises UserError for one that the model lacks."""
    if layers is None:
        return list(range(model.n_layers))
    wrong = [layer for layer in layers if not -model.n_layers <= layer < model.n_layers]
    if wrong or not layers:
        raise UserError(f"layers {list(layers)} were asked for; {model.info.name} has 0 … {model.n_layers - 1}")
    return sorted({layer % model.n_layers for layer in layers})


def reads(model: HookedModel, layer: int, name: Literal["q", "k", "v"]) -> Tensor:
    """`[head d_model d_head]` what a layer's queries, keys or values read, float32; one for each query head."""
    return weights.head_in(model, layer, name)[0].float()


def writes(model: HookedModel, layer: int) -> Tensor:
    """`[head d_head d_model]` what a layer's heads write of their z, float32."""
    out = weights.head_out(model, layer)[0].float()
    after = weights.post_norm(model, layer)
    if after is not None:
        out = after[0].linear(out, out.new_ones(1))
    return out - out.mean(-1, keepdim=True) if weights.final_norm(model).centred else out


def readout(model: HookedModel) -> Tensor:
    """`[d_model d_vocab]` logits of the residual stream divided by the final norm's scale, float32, less their mean
    over the vocabulary, which no probability depends on."""
    columns = weights.final_norm(model).fold(weights.unembedding(model)[0].float())
    return columns - columns.mean(-1, keepdim=True)


def as_embedding(model: HookedModel, embedding: str, layer: int) -> Embedding:
    """What the heads of a layer can read of a token: after MLP 0 there is an MLP 0, from layer 1 on.

    Raises:
        UserError: an unknown embedding.
    """
    if embedding not in get_args(Embedding):
        raise UserError(f"unknown embedding {embedding!r}; valid: {', '.join(get_args(Embedding))}")
    has_mlp = Site("mlp_out", 0) in model.site_list
    return "mlp0" if embedding == "mlp0" and layer > 0 and has_mlp else "raw"


def embed(model: HookedModel, tokens: Tensor, embedding: Embedding) -> Tensor:
    """`[token d_model]` tokens in the residual stream, float32: in front of block 0 without a position ("raw"), or
    behind it with the output of its attention set to zero ("mlp0": the embedding and what MLP 0 makes of it)."""
    site = Site("resid_pre" if embedding == "raw" else "resid_post", 0)
    away = [Site("pos_embed"), *([Site("attn_out", 0)] if embedding == "mlp0" else [])]
    edits: dict[str, Edit] = {each.hook_name: _zero for each in away if each in model.site_list}
    rows: list[Tensor] = []

    def use(i: int, resid: Tensor) -> None:
        rows.append(resid[:, 0].float())

    for part in tokens.split(TOKENS_AT_ONCE):
        read(model, Prompts(part[:, None]), [site], use, edits)
    return torch.cat(rows)


def _zero(activation: Tensor, rows: Rows) -> Tensor:
    return torch.zeros_like(activation)


def divisor(model: HookedModel, layer: int, resid: Tensor) -> Tensor:
    """`[… one]` what the norm in front of a layer's attention divides the residual stream `[… d_model]` by."""
    norm = weights.input_norm(model, layer)
    if not norm.scaled:
        return torch.ones_like(resid[..., :1])
    whole = norm.linear(resid, resid.new_ones(1))
    out = model.norm(Site("q_input", layer))(resid.to(model.dtype)).float() - norm.bias
    return (whole * whole).sum(-1, keepdim=True) / (whole * out).sum(-1, keepdim=True)
