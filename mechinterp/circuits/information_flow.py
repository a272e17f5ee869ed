"""Information-flow routes: how much of what a destination reads comes from each source, from one run.

Ferrando & Voita 2024, "Information flow routes: automatically interpreting language models at scale".

1. What a destination reads is a sum, x_v = Σ_u s_u + c, where c are the biases of all that has written. They are a
   source like any other here, but have no edge.
2. A source is near the sum if taking it out leaves little: proximity(s, x) = max(0, ‖x‖₁ − ‖x − s‖₁), at a position.
   A source that points away from the sum has none.
3. The importance of an edge is its source's share of the proximities of all sources, biases among them: 0 … 1, and with
   the share of the biases they add up to 1 (or are all 0, where no source is near). It is the same for the queries, the
   keys and the values of a layer, which read one residual stream.
4. Over positions shares are averaged: over those at an edge's place that are no padding and do not stand behind the
   last one that the metric reads; at the logits, over the positions that it reads, by their weight in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Destination, Graph
from mechinterp.circuits.methods import Method
from mechinterp.circuits.outputs import Outputs, outputs, sites
from mechinterp.hooked import suffix
from mechinterp.hooked.sites import Site
from mechinterp.hooked.weights import mlp_out


@dataclass(frozen=True)
class InformationFlow(Method):
    """Information-flow routes of the clean run: shares, 0 … 1, of no sign.

    One forward of the clean prompts: neither the corrupted run nor the metric's values have a part in it, whichever the
    ablation and the direction. So it finds what flows, not what the answer depends on: what the two prompts of a pair
    have in common counts like what tells them apart.
    """

    name: ClassVar[str] = "ifr"

    @property
    def reads_labels(self) -> bool:
        return False

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        graph = engine.graph
        reads = {v.n_sources: _site(v) for v in graph.destinations}
        clean = engine.pairs.clean
        for index in torch.arange(len(engine)).split(engine.rows_per_call):
            kept = suffix.record(engine.model, clean, [*sites(graph), *reads.values()], index).activations
            live = outputs(graph, kept)
            read, asked = positions(engine, index)
            made = torch.zeros(len(index), *graph.valid.shape)
            for n_sources, site in reads.items():
                share = shares(graph, live, kept[site.hook_name], n_sources).cpu()
                for i, v in enumerate(graph.destinations):
                    if v.n_sources == n_sources:
                        weight = asked if v.input == "logits" else read
                        made[:, i, :n_sources] = torch.einsum("sbp,bpl->bsl", share, weight)
            yield index, graph.gather(made)


def _site(one: Destination) -> Site:
    """The residual stream that a destination reads. Those that read the same sources read the same one."""
    if one.input == "logits":
        return Site("resid_post", one.layer - 1)
    return Site("mlp_in" if one.input == "mlp" else "resid_pre", one.layer)


def positions(engine: Engine, index: Tensor) -> tuple[Tensor, Tensor]:
    """`[batch pos place]` weights of positions within each place, which sum to 1 or, where a prompt has no such
    position, are 0: of positions that are read by anything, and of those that the metric asks for."""
    answers, prompts = engine.pairs.answers.take(index), engine.pairs.clean
    asked = torch.zeros(len(index), prompts.n_pos).scatter_add_(1, answers.pos.cpu(), answers.weight.float().cpu())
    pos = torch.arange(prompts.n_pos)
    last = torch.where(asked > 0, pos, -1).amax(1, keepdim=True)
    read = prompts.real.cpu()[index] & (pos <= last)
    at = engine.place[index].cpu()[..., None] == torch.arange(len(engine.graph.places))
    weights = torch.stack([read.float(), asked])[..., None] * at.float()
    total = weights.sum(2, keepdim=True)
    of_read, of_asked = torch.where(total > 0, weights / total, 0.0)
    return of_read, of_asked


def shares(graph: Graph, live: Outputs, resid: Tensor, n_sources: int) -> Tensor:
    """`[source batch pos]` each source's share of the residual stream `[batch pos d_model]` that reads the first
    `n_sources` of them; the biases have what is missing to 1."""
    whole = torch.zeros_like(resid)
    near = resid.new_zeros(n_sources, *resid.shape[:-1])
    for columns, written in _written(graph, live, n_sources):
        near[columns] = proximity(written, resid)
        whole += written.sum(0)
    total = near.sum(0) + proximity(resid - whole, resid)
    return torch.where(total > 0, near / total, 0.0)


def proximity(part: Tensor, whole: Tensor) -> Tensor:
    """`[…]` max(0, ‖x‖₁ − ‖x − s‖₁) of parts s `[… d_model]` of sums x."""
    return (whole.abs().sum(-1) - (whole - part).abs().sum(-1)).clamp(min=0)


def _written(graph: Graph, live: Outputs, n_sources: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns `[source]` and what these sources write `[source batch pos d_model]`: first all that are kept as vectors,
    then neurons, as many at a time."""
    columns = (graph.vector_row[:n_sources] >= 0).nonzero().flatten()
    yield columns, live.vectors[: len(columns)]
    for layer, neurons in live.neurons.items():
        first = graph.source_index[f"m{layer}.n0"]
        if first < n_sources:
            weight = mlp_out(graph.model, layer)[0].to(neurons)
            for some in torch.arange(len(weight)).split(len(live.vectors)):
                yield first + some, neurons.movedim(-1, 0)[some, ..., None] * weight[some, None, None]
