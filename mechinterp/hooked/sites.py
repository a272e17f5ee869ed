"""Sites: the places of a transformer that can be read and written, by the field's names.

A `Site("z", layer=9, head=6)` is TransformerLens's `blocks.9.attn.hook_z`, head 6. Most sites are one of its hook
points. The inputs of single heads (`q_input`, `k_input`, `v_input`) and of the MLP (`mlp_in`) are not: they are
computed from the residual stream, and an edit is projected onto the heads' queries, keys or values (forward.py),
which is exact on every family, also where TransformerLens's own flags raise or are wrong.
"""

import difflib
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mechinterp.axes import AXES
from mechinterp.errors import UserError


@dataclass(frozen=True)
class SiteKind:
    """What a site name stands for: hook name (with `{}` for the layer), axes, and a line of meaning."""

    hook: str
    axes: tuple[str, ...]
    meaning: str
    virtual: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.axes) - set(AXES)
        assert not unknown, f"{unknown} are not in the axis glossary (mechinterp/axes.py)"

    @property
    def layered(self) -> bool:
        """Whether there is one per layer."""
        return "{}" in self.hook

    @property
    def head_axis(self) -> str | None:
        """`head`, `kv_head` or None."""
        return next((axis for axis in self.axes if axis in ("head", "kv_head")), None)

    @property
    def pos_axis(self) -> str:
        """The axis that `positions` select on: `pos`, or `query` for attention patterns."""
        return "query" if "query" in self.axes else "pos"

    def dim(self, axis: str) -> int:
        """Index of an axis in the activation's shape."""
        return self.axes.index(axis)


_RESID = ("batch", "pos", "d_model")
_HEAD = ("batch", "pos", "head", "d_head")
_KV = ("batch", "pos", "kv_head", "d_head")
_MLP = ("batch", "pos", "d_mlp")
_ATTN = ("batch", "head", "query", "key")
_SCALE = ("batch", "pos", "one")

KINDS: dict[str, SiteKind] = {
    "embed": SiteKind("hook_embed", _RESID, "token embeddings"),
    "pos_embed": SiteKind("hook_pos_embed", _RESID, "learned position embeddings"),
    "resid_pre": SiteKind("blocks.{}.hook_resid_pre", _RESID, "residual stream before the block"),
    "q_input": SiteKind(
        "blocks.{}.hook_q_input", ("batch", "pos", "head", "d_model"), "residual that a head's queries read", True
    ),
    "k_input": SiteKind(
        "blocks.{}.hook_k_input", ("batch", "pos", "kv_head", "d_model"), "residual that a head's keys read", True
    ),
    "v_input": SiteKind(
        "blocks.{}.hook_v_input", ("batch", "pos", "kv_head", "d_model"), "residual that a head's values read", True
    ),
    "ln1_scale": SiteKind("blocks.{}.ln1.hook_scale", _SCALE, "divisor of the norm before attention"),
    "q": SiteKind("blocks.{}.attn.hook_q", _HEAD, "queries, before rotation"),
    "k": SiteKind("blocks.{}.attn.hook_k", _KV, "keys, before rotation"),
    "v": SiteKind("blocks.{}.attn.hook_v", _KV, "values"),
    "rot_q": SiteKind("blocks.{}.attn.hook_rot_q", _HEAD, "queries after rotary embedding"),
    "rot_k": SiteKind("blocks.{}.attn.hook_rot_k", _KV, "keys after rotary embedding"),
    "attn_scores": SiteKind("blocks.{}.attn.hook_attn_scores", _ATTN, "attention scores before the softmax"),
    "pattern": SiteKind("blocks.{}.attn.hook_pattern", _ATTN, "attention weights; rows sum to 1"),
    "z": SiteKind("blocks.{}.attn.hook_z", _HEAD, "head outputs: values mixed by the pattern, before W_O"),
    "ln1_post_scale": SiteKind("blocks.{}.ln1_post.hook_scale", _SCALE, "divisor of the norm after attention"),
    "attn_out": SiteKind("blocks.{}.hook_attn_out", _RESID, "what attention adds to the residual stream"),
    "resid_mid": SiteKind("blocks.{}.hook_resid_mid", _RESID, "residual stream between attention and MLP"),
    "mlp_in": SiteKind("blocks.{}.hook_mlp_in", _RESID, "residual that the MLP reads, before its norm", True),
    "ln2_scale": SiteKind("blocks.{}.ln2.hook_scale", _SCALE, "divisor of the norm before the MLP"),
    "mlp_normed": SiteKind("blocks.{}.mlp.hook_in", _RESID, "what the MLP's matrices read: its input after the norm"),
    "mlp_pre": SiteKind("blocks.{}.mlp.hook_pre", _MLP, "MLP before its non-linearity"),
    "mlp_pre_linear": SiteKind("blocks.{}.mlp.hook_pre_linear", _MLP, "linear branch of a gated MLP"),
    "mlp_post": SiteKind("blocks.{}.mlp.hook_post", _MLP, "neurons: what the MLP's output matrix reads"),
    "ln2_post_scale": SiteKind("blocks.{}.ln2_post.hook_scale", _SCALE, "divisor of the norm after the MLP"),
    "mlp_out": SiteKind("blocks.{}.hook_mlp_out", _RESID, "what the MLP adds to the residual stream"),
    "resid_post": SiteKind("blocks.{}.hook_resid_post", _RESID, "residual stream after the block"),
    "ln_final_scale": SiteKind("ln_final.hook_scale", _SCALE, "divisor of the final norm"),
}

# Other spellings of the same hook point that TransformerLens prints.
_ALIASES = {
    "blocks.{}.hook_in": "resid_pre",
    "blocks.{}.hook_out": "resid_post",
    "blocks.{}.ln2.hook_in": "resid_mid",
    "blocks.{}.ln2.hook_out": "mlp_normed",
    "blocks.{}.attn.o.hook_in": "z",
    "blocks.{}.mlp.out.hook_in": "mlp_post",
}
_BY_HOOK = {kind.hook: name for name, kind in KINDS.items()} | _ALIASES


@dataclass(frozen=True)
class Site:
    """A place in the model: a kind of activation, and optionally a layer, heads, neurons, or a basis.

    Attributes:
        name: one of `KINDS`, such as "resid_pre", "z", "pattern".
        layer: block index; negative counts from the end; None for `embed` and the final norm.
        head: one head or several (for `k`, `v` and their inputs: key/value heads); None means all.
        neuron: one index or several on the last axis; None means all.
        basis: `[n d]`, rows that span a subspace of the last axis (a direction, the decoder rows of a sparse
            autoencoder): an intervention then changes the activation within that span only.

    Raises:
        UserError: unknown name, a layer where there is none or none where one is needed, heads at a site without.
    """

    name: str
    layer: int | None = None
    head: int | tuple[int, ...] | None = None
    neuron: int | tuple[int, ...] | None = None
    basis: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UserError(f"unknown site {self.name!r}; {_nearest(self.name, KINDS)}")
        if not self.kind.layered and self.layer is not None:
            raise UserError(f"site {self.name!r} is not in a layer, but layer={self.layer} was given")
        if self.head is not None and self.kind.head_axis is None:
            raise UserError(f"site {self.name!r} has axes {' '.join(self.kind.axes)}: no heads, but head={self.head}")
        if self.basis is not None and (self.basis.ndim != 2 or not self.basis.isfinite().all()):
            raise UserError(f"basis must be finite, of shape [n d]; found shape {tuple(self.basis.shape)}")
        if self.layer is not None:
            object.__setattr__(self, "layer", operator.index(self.layer))
        for name in ("head", "neuron"):
            value: Any = getattr(self, name)
            if hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0:
                object.__setattr__(self, name, tuple(operator.index(i) for i in value))
            elif value is not None:
                object.__setattr__(self, name, operator.index(value))  # integers of numpy and torch, from tables

    @property
    def kind(self) -> SiteKind:
        """Hook, axes and meaning of this site's name."""
        return KINDS[self.name]

    @property
    def hook_name(self) -> str:
        """TransformerLens's name of the hook point; the layer must be resolved (not negative)."""
        if self.kind.layered and (self.layer is None or self.layer < 0):
            raise UserError(f"site {self} needs a layer ≥ 0 to have a hook name")
        return self.kind.hook.format(self.layer)

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The heads as a tuple, None for all."""
        return (self.head,) if isinstance(self.head, int) else self.head

    @property
    def neurons(self) -> tuple[int, ...] | None:
        """The neurons as a tuple, None for all."""
        return (self.neuron,) if isinstance(self.neuron, int) else self.neuron

    @property
    def whole(self) -> "Site":
        """The same site with all heads and neurons and no basis."""
        return Site(self.name, self.layer)

    def at(self, layer: int) -> "Site":
        """The same site in another layer."""
        return replace(self, layer=layer)

    def counted(self, n_layers: int) -> "Site":
        """The same site with a negative layer counted from 0, in a model of `n_layers`."""
        return self if self.layer is None or self.layer >= 0 else self.at(self.layer + n_layers)

    @classmethod
    def from_hook(cls, hook_name: str) -> "Site":
        """The site of a TransformerLens hook name such as `blocks.9.attn.hook_z` or `blocks.9.hook_out`.

        Raises:
            UserError: no site has that hook name; the nearest one is named.
        """
        found = re.search(r"blocks\.(-?\d+)\.", hook_name)
        template = hook_name.replace(found.group(0), "blocks.{}.", 1) if found else hook_name
        if template not in _BY_HOOK:
            raise UserError(f"unknown hook name {hook_name!r}; {_nearest(template, _BY_HOOK)}")
        return cls(_BY_HOOK[template], layer=int(found.group(1)) if found else None)

    def __str__(self) -> str:
        if isinstance(self.head, int) and self.name == "z":
            text = f"L{self.layer}H{self.head}"
        else:
            where = "" if self.layer is None else f" layer {self.layer}"
            heads = "" if self.head is None else f" head {self.head}"
            text = f"{self.name}{where}{heads}"
        text += "" if self.neuron is None else f" neuron {self.neuron}"
        return text if self.basis is None else f"{text} in a basis of {self.basis.shape[0]}"


def _nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean ...' from the valid names, or all of them when nothing is near."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "valid: " + ", ".join(valid)
