"""What an edge mask does to the input of every destination, as one matrix product a layer.

For a destination v, the running residual stream R_v, the live output s_u of each source before it, its ablation value
a_u and the mask m (1: the edge is kept),

    x_v = R_v + Σ_u (1 − m_vu) (a_u − s_u).

1. The differences are kept source-major, `[circuit source row d_model]`, with a row for each prompt and position, and
   are written once, when the source writes (`write`).
2. All destinations of a layer are mixed in one product of their rows of 1 − m with that store (`mix`): as many
   multiplications as the edges need, and the store is read once.
3. Gradients go through both without a copy of the store: a product's backward adds to a second store of gradients, and
   a source's backward reads its rows there. A scalar that every step hands to the next one keeps the order.
4. Neurons are never written out in d_model: their differences `[circuit row neuron]` are weighted and multiplied by
   W_out for each destination.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Store:
    """Differences a_u − s_u of one run, `[circuit source row d_model]`, and their gradients where a backward runs."""

    def __init__(self, circuits: int, sources: int, rows: int, d_model: int, like: Tensor):
        self.value = torch.empty(circuits, sources, rows, d_model, dtype=like.dtype, device=like.device)
        self.grad: Tensor | None = None

    def gradients(self) -> Tensor:
        """`[circuit source row d_model]`, zeros at first."""
        if self.grad is None:
            self.grad = torch.zeros_like(self.value)
        return self.grad


class _Write(torch.autograd.Function):
    """Put a_u − s_u of consecutive sources into the store."""

    @staticmethod
    def forward(ctx: Any, order: Tensor, live: Tensor, ablated: Tensor, store: Store, first: int) -> Tensor:
        ctx.store, ctx.rows = store, slice(first, first + live.shape[1])
        ctx.shared = ablated.shape[0] < live.shape[0]
        torch.sub(ablated, live, out=store.value[:, ctx.rows])
        return order.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.store.gradients()[:, ctx.rows]
        of_ablated = None
        if ctx.needs_input_grad[2]:
            of_ablated = grad.sum(0, keepdim=True) if ctx.shared else grad
        return grad.new_zeros(()), -grad, of_ablated, None, None


class _Mix(torch.autograd.Function):
    """`resid` for every destination, plus what its cut edges change."""

    @staticmethod
    def forward(
        ctx: Any, order: Tensor, resid: Tensor, cut: Tensor, store: Store, places: list[Tensor] | None
    ) -> Tensor:
        """resid `[circuit row d_model]`, cut `[circuit|1 destination source place]`."""
        ctx.store, ctx.places = store, places
        ctx.save_for_backward(cut)
        read = store.value[:, : cut.shape[2]]
        if places is None:
            return torch.matmul(cut[..., 0], read.flatten(2)).unflatten(2, resid.shape[1:]).add_(resid[:, None])
        made = resid[:, None].expand(-1, cut.shape[1], -1, -1).clone()
        for place, rows in enumerate(places):
            if len(rows) and bool(cut[..., place].any()):
                mixed = torch.matmul(cut[..., place], read[:, :, rows].flatten(2))
                made[:, :, rows] += mixed.unflatten(2, (len(rows), -1))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (cut,), store = grads[0].contiguous(), ctx.saved_tensors, ctx.store
        n, wants_cut = cut.shape[2], ctx.needs_input_grad[2]
        if n == store.value.shape[1]:  # the logits, which read every source: a backward begins here
            store.grad = None
        read, of_store = store.value[:, :n], store.gradients()[:, :n]
        of_cut = torch.zeros_like(cut) if wants_cut else None
        places = ctx.places or [torch.arange(grad.shape[2], device=grad.device)]
        for place, rows in enumerate(places):
            if not len(rows):  # a role that no position from the first change on has
                continue
            whole = len(rows) == grad.shape[2]
            here = (grad if whole else grad[:, :, rows]).flatten(2)
            back = torch.matmul(cut[..., place].mT, here).unflatten(2, (len(rows), -1))
            if whole:
                of_store += back
            else:
                of_store[:, :, rows] += back
            if of_cut is not None:
                each = torch.matmul(here, (read if whole else read[:, :, rows]).flatten(2).mT)
                of_cut[..., place] = each.sum(0, keepdim=True) if cut.shape[0] < each.shape[0] else each
        return grad.new_zeros(()), grad.sum(1), of_cut, None, None


@dataclass
class Mixer:
    """The masked mixing of one run.

    Attributes:
        mask: `[circuit|1 destination source place]`, 1 where an edge is kept.
        ablated: `[circuit|1 source row d_model]` values of the sources that are kept as vectors.
        vectors: `[source]` their columns in the mask.
        store: where differences go.
        places: rows of each place; None where there is one place only.
        neurons: by layer, the first column of its neurons in the mask, their ablation values
            `[circuit|1 row neuron]`, and W_out `[neuron d_model]`.
    """

    mask: Tensor
    ablated: Tensor
    vectors: Tensor
    store: Store
    places: list[Tensor] | None
    neurons: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)
    written: int = 0
    _order: Tensor | None = None
    _live: dict[int, Tensor] = field(default_factory=dict)

    def write(self, live: Tensor) -> None:
        """The next sources have written `live` `[circuit source row d_model]`."""
        order = live.new_zeros(()) if self._order is None else self._order
        first, n = self.written, live.shape[1]
        self._order = _Write.apply(order, live, self.ablated[:, first : first + n], self.store, first)
        self.written += n

    def write_neurons(self, layer: int, live: Tensor) -> None:
        """A layer's neurons have written `live` `[circuit row neuron]`."""
        self._live[layer] = self.neurons[layer][1] - live

    def mix(self, resid: Tensor, destinations: slice, n_sources: int) -> Tensor:
        """`[circuit destination row d_model]` what destinations read of the residual stream `[circuit row d_model]`."""
        cut = 1 - self.mask[:, destinations]
        of_vectors = cut[:, :, self.vectors[self.vectors < n_sources]] if self.neurons else cut[:, :, :n_sources]
        assert self._order is not None, "the embedding writes before anything reads"
        made = _Mix.apply(self._order, resid, of_vectors, self.store, self.places)
        for layer, difference in self._live.items():
            first, _, weight = self.neurons[layer]
            if first < n_sources:
                made = made + self._mix_neurons(cut[:, :, first : first + len(weight)], difference, weight)
        return made

    def _mix_neurons(self, cut: Tensor, difference: Tensor, weight: Tensor) -> Tensor:
        """`[circuit destination row d_model]` from cut `[circuit|1 destination neuron place]`."""
        if self.places is None:
            return (cut[:, :, None, :, 0] * difference[:, None]) @ weight
        by_row = torch.empty(difference.shape[1], dtype=torch.long, device=cut.device)
        for place, rows in enumerate(self.places):
            by_row[rows] = place
        return (cut[..., by_row].movedim(-1, 2) * difference[:, None]) @ weight
