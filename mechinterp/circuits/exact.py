"""Exact effects: every edge, or every node, patched alone and the model run on from there.

1. One patched edge u→v changes nothing but the input of v: x_v = R_v + (a_u − s_u), all of it known from the recorded
   runs. So the run restarts at v's layer with one input replaced, and no masked mixing behind it. A patched node adds
   the same difference to the residual stream itself.
2. A row is an edge in a prompt; rows of many edges share calls, each joining at its own layer and at the first position
   that its source changes (hooked/replays.py). Where a source is the same in both runs its effect is 0 and nothing is
   run.
3. Inputs that the model does not have (`qkv="ungrouped"`) have no site to be patched at: those edges are run as masks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.engine import Engine, Part
from mechinterp.circuits.graph import Destination, Graph, Source
from mechinterp.circuits.methods import Method, helps
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.hooked.weights import mlp_out

Target = tuple[Site, int | None]  # where a difference is added: a site, and its head


@dataclass(frozen=True)
class Exact(Method):
    """The effect of every edge alone: activation patching of edges."""

    name: ClassVar[str] = "exact"

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        for part in engine.parts():
            yield part.index, helps(engine, edge_changes(part, torch.arange(engine.graph.n_edges))).T


@dataclass(frozen=True)
class ExactNodes(Method):
    """The effect of every node alone: activation patching of heads and MLPs."""

    name: ClassVar[str] = "exact-nodes"
    level: ClassVar[Literal["edge", "node"]] = "node"

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(engine.graph.sources) * len(engine.graph.places)
        for part in engine.parts():
            yield part.index, helps(engine, node_changes(part, torch.arange(n))).T


def edge_changes(part: Part, edges: Tensor) -> Tensor:
    """`[edge batch]` change of the metric when each of these edges alone is ablated (or restored)."""
    graph = part.graph
    if graph.qkv == "ungrouped":
        return _by_masks(part, edges)
    destinations, sources, places = graph.edges[edges].T.tolist()
    targets = [reads(graph, graph.destinations[v]) for v in destinations]
    return _changes(part, targets, sources, places)


def node_changes(part: Part, nodes: Tensor) -> Tensor:
    """`[node batch]` change of the metric when each of these nodes alone is; a node is source · places + place."""
    n_places = len(part.graph.places)
    sources, places = (nodes // n_places).tolist(), (nodes % n_places).tolist()
    return _changes(part, [_writes(part.graph.sources[u]) for u in sources], sources, places)


def reads(graph: Graph, one: Destination) -> list[Target]:
    """The inputs that an edge into this destination changes."""
    model = graph.model
    if one.input == "logits":
        return [(Site("resid_post", model.n_layers - 1), None)]
    if one.input == "mlp":
        return [(Site("mlp_in", one.layer), None)]
    if one.input != "qkv":
        return [(Site(f"{one.input}_input", one.layer), one.index)]
    size = model.n_heads // model.n_kv_heads
    queries: list[Target] = [(Site("q_input", one.layer), one.index * size + i) for i in range(size)]
    return [*queries, (Site("k_input", one.layer), one.index), (Site("v_input", one.layer), one.index)]


def _writes(one: Source) -> list[Target]:
    """The residual stream, where this source adds to it."""
    if one.kind == "embed":
        return [(Site("resid_pre", 0), None)]
    return [(Site("mlp_out" if one.kind in ("mlp", "neuron") else "attn_out", one.layer), None)]


def _changes(part: Part, targets: list[list[Target]], sources: list[int], places: list[int]) -> Tensor:
    """`[case batch]` change of the metric when the difference of a source, at a place, is added at its targets."""
    engine, index, index_of = part.engine, part.index, {}
    base = part.recording.base_logits(engine.read, index).cpu()
    clean = engine.clean_logits if engine.metric.needs_clean else None

    def metric(logits: Tensor, prompts: Tensor) -> Tensor:
        return engine.metric(logits, engine.pairs.answers.take(prompts), None if clean is None else clean[prompts])

    at, layers = engine.place[index][:, part.start :], torch.zeros(len(sources), dtype=torch.long)
    starts = torch.zeros(len(sources), len(index), dtype=torch.long)
    for case, (source, place) in enumerate(zip(sources, places, strict=True)):
        if (source, place) not in index_of:
            changed = (_difference(part, source) != 0).any(-1).cpu() & (at == place)
            first = torch.where(changed.any(-1), changed.int().argmax(-1) + part.start, engine.base.n_pos)
            index_of[source, place] = first
        starts[case], layers[case] = index_of[source, place], targets[case][0][0].layer or 0

    def edits(cases: Tensor) -> Mapping[str, Edit]:
        rows_at: dict[str, list[tuple[int, int | None]]] = {}
        for row, case in enumerate(cases.tolist()):
            for site, head in targets[case]:
                rows_at.setdefault(site.hook_name, []).append((row, head))
        ours = [(sources[case], places[case]) for case in cases.tolist()]
        return {name: _add(part, rows, ours) for name, rows in rows_at.items()}

    of_base, made = metric(base, index), torch.zeros(len(sources), len(index))
    with tqdm(total=starts.numel(), desc="exact", unit="run", disable=not engine.progress, leave=False) as bar:
        bar.update(int((starts >= engine.base.n_pos).sum()))
        for cases, prompts, logits in replay(part.recording, engine.read, layers, starts, edits):
            local = prompts - index[0]
            made[cases, local] = (metric(logits, prompts) - of_base[local]).to(made)
            bar.update(len(cases))
    return made


def _difference(part: Part, source: int) -> Tensor:
    """`[batch pos d_model]` a_u − s_u of one source."""
    one, graph = part.graph.sources[source], part.graph
    if one.kind == "neuron":
        delta = part.ablated.neurons[one.layer] - part.live.neurons[one.layer]
        return delta[..., one.index, None] * mlp_out(graph.model, one.layer)[0][one.index].to(delta)
    return part.differences[int(graph.vector_row[source])]


def _add(part: Part, rows_at: list[tuple[int, int | None]], cases: list[tuple[int, int]]) -> Edit:
    """The function that adds each case's difference at its row and head; `cases` are (source, place) of all rows."""
    row = torch.tensor([row for row, _ in rows_at])
    heads = None if rows_at[0][1] is None else torch.tensor([head or 0 for _, head in rows_at])
    return partial(_added, part, row, heads, [cases[i] for i in row.tolist()])


def _added(
    part: Part, row: Tensor, heads: Tensor | None, cases: list[tuple[int, int]], activation: Tensor, rows: Rows
) -> Tensor:
    prompt, skip = rows.index.cpu()[row], rows.start - part.start
    local = (prompt - part.index[0]).tolist()
    each = [_difference(part, source)[j, skip:] for (source, _), j in zip(cases, local, strict=True)]
    delta = torch.stack(each).to(activation)
    if part.graph.positions:
        here = part.engine.place[prompt, rows.start :] == torch.tensor([place for _, place in cases])[:, None]
        delta = delta * here[..., None].to(delta)
    made = activation.clone()
    if heads is None:
        made[row] += delta
    else:
        made[row, :, heads] += delta
    return made


def _by_masks(part: Part, edges: Tensor) -> Tensor:
    """The same by the masked forward, one circuit for each edge."""
    graph = part.graph
    base = part.metric(graph.mask(torch.ones(1, graph.n_edges)))[0]
    made = []
    for chunk in edges.split(max(1, part.engine.rows_per_call // len(part))):
        kept = torch.ones(len(chunk), graph.n_edges)
        kept[torch.arange(len(chunk)), chunk] = 0
        made.append(part.metric(graph.mask(kept)) - base)
    return torch.cat(made).cpu()
