"""Weights around the residual stream, in one layout on every family: norms as linear maps, heads, MLPs, unembedding.

A norm is linear once its scale is known: `norm(x) = gain · (x, or x less its mean) / scale + bias`, where `scale` is
the activation of the norm's scale site. What a component writes can then be read off behind a norm (`Norm.linear`),
and a direction behind a norm can be pulled back to the residual stream before it (`Norm.pull_back`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mechinterp.hooked.sites import Site

if TYPE_CHECKING:
    from mechinterp.hooked.model import HookedModel


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm whose scale is given: linear, with a bias.

    Attributes:
        gain, bias: `[d_model]`, float32.
        centred: whether the mean is taken out first (LayerNorm; RMSNorm does not).
        scaled: whether it divides by a scale at all; False for a model without norms.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    scaled: bool

    def linear(self, x: Tensor, scale: Tensor) -> Tensor:
        """What `x` `[… d_model]`, a part of the norm's input, adds to its output; without the bias.

        `scale` broadcasts to x: the norm's divisor in the run that x comes from.
        """
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / scale * self.gain

    def pull_back(self, direction: Tensor, scale: Tensor) -> Tensor:
        """The vector `[… d_model]` whose dot product with a part of the input is `linear(part) · direction`."""
        back = direction * self.gain / scale
        return back - back.mean(-1, keepdim=True) if self.centred else back

    def fold(self, weight: Tensor) -> Tensor:
        """`[… d_model d_out]` a matrix behind the norm as it acts before it, but for the scale."""
        folded = self.gain[:, None] * weight
        return folded - folded.mean(-2, keepdim=True) if self.centred else folded


def norm_of(module: Callable[[Tensor], Tensor], d_model: int, device: torch.device) -> Norm:
    """The linear map of a norm, measured: what it makes of zeros, of a constant, and of a vector without a mean.

    Asking the module rather than its parameters by name is right on every family: Gemma's gains are offsets from 1,
    folded norms have none, a model without norms has the identity.
    """
    exact = copy.deepcopy(module).float() if isinstance(module, torch.nn.Module) else module
    signs = torch.ones(d_model, device=device)
    signs[::2] = -1
    flat = signs - signs.mean()
    probe = 1e4 * flat  # large, so that the norm's epsilon is lost beside it
    with torch.no_grad():
        bias, constant, out, doubled = (
            exact(x.expand(1, 1, -1))[0, 0] for x in (0 * probe, torch.full_like(probe, 1e4), probe, 2 * probe)
        )
    scaled = not torch.allclose(doubled - bias, 2 * (out - bias), rtol=1e-3)
    divisor = flat.square().mean().sqrt() if scaled else 1e-4
    gain = (out - bias) * divisor / flat
    response = (constant - bias).abs().max() * (1 if scaled else 1e-4)
    return Norm(gain, bias, bool(response < 1e-3 * gain.abs().max()), scaled)


def final_norm(model: "HookedModel") -> Norm:
    """The norm before the unembedding."""
    return norm_of(model.bridge.ln_final.original_component, model.d_model, model.device)


def input_norm(model: "HookedModel", layer: int, part: Literal["attn", "mlp"] = "attn") -> Norm:
    """The norm that a layer's attention (or MLP) reads the residual stream through."""
    site = Site("q_input" if part == "attn" else "mlp_in", layer)
    return norm_of(model.norm(site), model.d_model, model.device)


def post_norm(model: "HookedModel", layer: int, part: Literal["attn", "mlp"] = "attn") -> tuple[Norm, Site] | None:
    """The norm between a component and the residual stream that it writes to, and the site of its scale (Gemma-2, -3);
    None where there is none."""
    name = "ln1_post" if part == "attn" else "ln2_post"
    site = Site(f"{name}_scale", layer)
    if site not in model.site_list:
        return None
    return norm_of(getattr(model.bridge.blocks[layer], name).original_component, model.d_model, model.device), site


def head_out(model: "HookedModel", layer: int) -> tuple[Tensor, Tensor]:
    """W_O `[head d_head d_model]` and b_O `[d_model]` of a layer."""
    attention = model.bridge.blocks[layer].attn
    return attention.W_O, _or_zeros(attention.b_O, attention.W_O.new_zeros(model.d_model))


def head_in(model: "HookedModel", layer: int, name: Literal["q", "k", "v"], fold: bool = True) -> tuple[Tensor, Tensor]:
    """W `[head d_model d_head]` and b `[head d_head]` of a layer's queries, keys or values, one for each query head:
    under grouped-query attention the heads of a group have the same keys and values.

    With `fold` they act on the residual stream divided by the norm's scale (its gain, bias and centring folded in),
    else on the norm's output.
    """
    weight, bias = model.projection(Site(f"{name}_input", layer))
    if fold:
        norm = input_norm(model, layer)
        weight, bias = norm.fold(weight), bias + torch.einsum("d,hde->he", norm.bias.to(weight), weight)
    repeats = model.n_heads // weight.shape[0]
    return weight.repeat_interleave(repeats, 0), bias.repeat_interleave(repeats, 0)


def mlp_out(model: "HookedModel", layer: int) -> tuple[Tensor, Tensor]:
    """W_out `[neuron d_model]` and b_out `[d_model]` of a layer's MLP."""
    mlp = model.bridge.blocks[layer].mlp
    return mlp.W_out, _or_zeros(getattr(mlp, "b_out", None), mlp.W_out.new_zeros(model.d_model))


def unembedding(model: "HookedModel") -> tuple[Tensor, Tensor]:
    """W_U `[d_model d_vocab]` and b_U `[d_vocab]`."""
    head = model.bridge.unembed.original_component
    return head.weight.T, _or_zeros(head.bias, head.weight.new_zeros(head.weight.shape[0]))


def _or_zeros(value: Tensor | None, zeros: Tensor) -> Tensor:
    return zeros if value is None else value
