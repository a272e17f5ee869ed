"""The edits of one masked forward: where a layer reads, all of its inputs are mixed; where a source writes, it is kept.

1. Where a layer reads the residual stream, the inputs of all of its destinations are mixed at once (mixing.py), pass
   the model's own norm, unfrozen, and its projections, and are written to q, k, v and the MLP's input. The attention,
   the MLPs and the final norm are the model's own.
2. Where a source writes, its live output, or the one that it is pinned to, goes to the store.
3. Separate key and value inputs for each query head, which grouped-query attention does not have, are run as copies of
   the row, one for each head of a group; every copy then takes each head from its own copy.
4. A tap at an input adds the gradient that comes back there to a buffer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechinterp.circuits.graph import Destination, Graph
from mechinterp.circuits.mixing import Mixer
from mechinterp.circuits.outputs import written
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.sites import Site


class _Tap(torch.autograd.Function):
    """Its input; the gradient that comes back is added to a buffer on its way."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, into: Tensor) -> Tensor:
        ctx.into = into
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.into.add_(grads[0])
        return grads[0] if ctx.needs_input_grad[0] else None, grads[0].new_zeros(()), None


@dataclass(frozen=True)
class Reading:
    """Destinations that read the residual stream together: a layer's attention, an MLP, or the logits."""

    layer: int
    start: int
    stop: int
    n_sources: int


@dataclass(eq=False)
class MaskedRun:
    """The edits of one call: what is read, written and projected where.

    Attributes:
        graph: whose inputs are split.
        start: first position that is run.
        circuits: of the call.
        mixer: of the call's masks; None keeps every edge.
        pins: see `Part.logits`.
        layer: first block that is run.
        gradients: `[destination batch pos d_model]` buffer that gradients at the inputs are added to; None for none.
        anchor: scalar that makes every tap part of the autograd graph, also where nothing before it has a gradient.
    """

    graph: Graph
    start: int
    circuits: int
    mixer: Mixer | None
    pins: Mapping[str, Tensor]
    layer: int = 0
    gradients: Tensor | None = None
    anchor: Tensor | None = None
    _held: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.graph.model
        grouped = self.graph.qkv == "ungrouped"
        self.copies = self.model.n_heads // self.model.n_kv_heads if grouped else 1
        self.reads = readings(self.graph)

    def edits(self) -> dict[str, Edit]:
        """By hook name, for every layer that is run."""
        made: dict[str, Edit] = {}
        attention = {one.layer: one for one in self.reads if self.graph.destinations[one.start].input not in _LATE}
        mlps = {one.layer: one for one in self.reads if self.graph.destinations[one.start].input == "mlp"}
        for layer in range(self.layer, self.model.n_layers):
            split = self.mixer is not None or self.anchor is not None
            before = Site("resid_pre", layer).hook_name
            self._chain(made, before, self._embed if layer == 0 else None)
            self._chain(made, before, partial(self._read_attention, attention[layer]) if split else None)
            if split:
                for name in "qkv":
                    made[Site(name, layer).hook_name] = partial(self._give, f"{name}{layer}")
            z = Site("z", layer).hook_name
            self._chain(made, z, self._own_copy if self.copies > 1 else None)
            if self.graph.heads_add_up:
                self._chain(made, z, partial(self._wrote_heads, layer))
            else:
                out = Site("attn_out", layer)
                self._chain(made, out.hook_name, partial(self._wrote, out, f"a{layer}"))
            if self.graph.has_mlp:
                if split:
                    made[Site("mlp_in", layer).hook_name] = partial(self._read_late, mlps[layer])
                site = Site("mlp_post" if self.graph.mlp == "neuron" else "mlp_out", layer)
                self._chain(made, site.hook_name, partial(self._wrote, site, f"m{layer}"))
        if self.mixer is not None or self.anchor is not None:
            last = Site("resid_post", self.model.n_layers - 1).hook_name
            self._chain(made, last, partial(self._read_late, self.reads[-1]))
        return made

    @staticmethod
    def _chain(made: dict[str, Edit], name: str, edit: Edit | None) -> None:
        """Add an edit behind those at a hook point."""
        first = made.get(name)
        if edit is None:
            return
        made[name] = edit if first is None else lambda activation, rows: edit(first(activation, rows), rows)

    # Shapes: rows of a call are [copy circuit batch]; the mixer wants [circuit row d_model], row = batch·pos (or, with
    # one mask a prompt, circuits × prompts of one row of positions each), of one copy.

    def _to_mixer(self, activation: Tensor) -> Tensor:
        """`[circuit row …]` from rows of a call `[copy·circuit·batch pos …]`."""
        one = activation.unflatten(0, (self.copies, -1))[0]
        n = len(self.mixer.mask) if self.mixer is not None else self.circuits
        return one.unflatten(0, (n, -1)).flatten(1, 2)

    def _mixed(self, resid: Tensor, read: Reading) -> Tensor:
        """`[destination circuit·batch pos d_model]`: the inputs of destinations that read `resid` together."""
        one = resid.unflatten(0, (self.copies, -1))[0]
        if self.mixer is not None:
            mixed = self.mixer.mix(self._to_mixer(resid), slice(read.start, read.stop), read.n_sources)
            made = mixed.transpose(0, 1).reshape(read.stop - read.start, *one.shape)
        else:
            made = one.expand(read.stop - read.start, *one.shape)
        if self.anchor is None or self.gradients is None:
            return made
        return _Tap.apply(made, self.anchor, self.gradients[read.start : read.stop])

    def _embed(self, resid: Tensor, rows: Rows) -> Tensor:
        pinned = self._pin("embed", resid, rows)
        if self.mixer is not None:
            self.mixer.write(self._to_mixer(pinned)[:, None])
        return pinned

    def _pin(self, name: str, live: Tensor, rows: Rows) -> Tensor:
        """A source's given output, for the rows of a call, or its live one."""
        if name not in self.pins:
            return live
        pinned = self.pins[name][:, self.start :].to(live)
        return pinned.repeat(len(live) // len(pinned), *[1] * (pinned.ndim - 1))

    def _read_attention(self, read: Reading, resid: Tensor, rows: Rows) -> Tensor:
        """A layer's attention reads: make the queries, keys and values of its heads."""
        model, graph, layer = self.model, self.graph, read.layer
        inputs = [graph.destinations[i].input for i in range(read.start, read.stop)]
        normed = model.norm(Site("q_input", layer))(self._mixed(resid, read))
        for name in "qkv":
            weight, bias = model.projection(Site(f"{name}_input", layer))
            if graph.qkv == "merged":
                given = normed.repeat_interleave(len(weight) // len(normed), 0)
            else:
                first = inputs.index(name)
                given = normed[first : first + inputs.count(name)]
                weight, bias = (one.repeat_interleave(len(given) // len(one), 0) for one in (weight, bias))
            made = torch.einsum("vbpd,vde->bpve", given, weight) + bias
            self._held[f"{name}{layer}"] = self._to_copies(made, name)
        return resid

    def _to_copies(self, made: Tensor, name: str) -> Tensor:
        """`[copy·batch pos head d_head]`: every copy of a row has the queries of all heads, and of each group the key
        and value of its own head."""
        if self.copies == 1:
            return made
        if name == "q":
            return made.repeat(self.copies, 1, 1, 1)
        return made.unflatten(2, (-1, self.copies)).movedim(3, 0).flatten(0, 1)

    def _give(self, name: str, activation: Tensor, rows: Rows) -> Tensor:
        """What was made of the mixed inputs takes the place of the model's own."""
        return self._held.pop(name)

    def _own_copy(self, z: Tensor, rows: Rows) -> Tensor:
        """Every copy of a row takes each head from the copy that had this head's key and value."""
        by_copy = z.unflatten(0, (self.copies, -1)).unflatten(3, (-1, self.copies))
        own = torch.diagonal(by_copy, dim1=0, dim2=4).movedim(-1, 3)  # [batch pos kv_head copy d_head]
        return own.flatten(2, 3).repeat(self.copies, 1, 1, 1)

    def _wrote_heads(self, layer: int, z: Tensor, rows: Rows) -> Tensor:
        """The heads of a layer have written: pin, and keep what they write."""
        names = [f"a{layer}.h{head}" for head in range(self.model.n_heads)]
        if any(name in self.pins for name in names):
            z = torch.stack([self._pin(name, z[:, :, i], rows) for i, name in enumerate(names)], 2)
        self._keep(Site("z", layer), z)
        return z

    def _wrote(self, site: Site, name: str, activation: Tensor, rows: Rows) -> Tensor:
        """A layer's attention as a whole, or its MLP, has written."""
        activation = self._pin(name, activation, rows)
        self._keep(site, activation)
        return activation

    def _keep(self, site: Site, activation: Tensor) -> None:
        if self.mixer is None:
            return
        if site.name == "mlp_post":
            self.mixer.write_neurons(int(site.layer or 0), self._to_mixer(activation))
            return
        one = activation.unflatten(0, (self.copies, -1))[0]
        made = written(self.graph, site, one)  # [circuit·batch source pos d_model]
        n = len(self.mixer.mask)
        self.mixer.write(made.unflatten(0, (n, -1)).transpose(1, 2).flatten(2, 3))

    def _read_late(self, read: Reading, resid: Tensor, rows: Rows) -> Tensor:
        """What an MLP, or the final norm, reads."""
        made = self._mixed(resid, read)[0]
        return made.repeat(self.copies, 1, 1) if self.copies > 1 else made


_LATE = ("mlp", "logits")


def readings(graph: Graph) -> list[Reading]:
    """Destinations grouped by where they read: consecutive ones of a layer's attention together."""
    made: list[Reading] = []

    def kind(one: Destination) -> tuple[int, bool]:
        return one.layer, one.input in _LATE

    for i, one in enumerate(graph.destinations):
        if made and i and kind(graph.destinations[i - 1]) == kind(one):
            made[-1] = Reading(one.layer, made[-1].start, i + 1, one.n_sources)
        else:
            made.append(Reading(one.layer, i, i + 1, one.n_sources))
    return made
