"""Control circuits made from a found one, that keep its shape and lose what it says.

- *rewired*: every node keeps its layer and its number of edges in and out. Two edges u1→v1 and u2→v2 exchange their
  destinations wherever both new edges can exist, over and over (Maslov & Sneppen 2002). What is lost is who is joined
  to whom: a circuit that is no better than its rewirings has found the right nodes, not the right edges.
- *permuted heads*: the same circuit on other heads. In every layer key/value groups are permuted, and the heads within
  them, no head to its own place; a head's inputs and outputs move together, so that layers, degrees and paths stay.
  What is lost is which heads.

Exchanges within one pair of layers alone would be no control: most edges of a real circuit have no partner there (on
SmolLM2's IOI circuit 83% of the edges stayed where they were).
"""

import torch
from torch import Tensor

from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.graph import Graph

SWAPS_PER_EDGE = 20


def rewire(circuit: Circuit, seed: int) -> Circuit:
    """A rewiring, dead edges pruned."""
    graph = circuit.graph
    draw = torch.Generator().manual_seed(seed)
    triples = [tuple(triple) for triple in graph.edges[circuit.kept].tolist()]  # destination, source, place
    if len(triples) < 2:
        return circuit
    present, exists = set(triples), graph.valid.numpy()
    for i, j in torch.randint(len(triples), (SWAPS_PER_EDGE * len(triples), 2), generator=draw).tolist():
        (v1, u1, place1), (v2, u2, place2) = triples[i], triples[j]
        new = (v2, u1, place1), (v1, u2, place2)
        if place1 == place2 and not present.intersection(new) and exists[new[0]] and exists[new[1]]:
            present.difference_update((triples[i], triples[j]))
            present.update(new)
            triples[i], triples[j] = new
    kept = torch.zeros(graph.valid.shape, dtype=torch.bool)
    kept[tuple(torch.tensor(triples).T)] = True
    return Circuit(graph, graph.prune(graph.gather(kept)), None, None, {**circuit.about, "control": "rewired"})


def permute_heads(circuit: Circuit, seed: int) -> Circuit:
    """The same circuit on other heads of the same layers."""
    graph, draw = circuit.graph, torch.Generator().manual_seed(seed)
    sources, destinations = torch.arange(len(graph.sources)), torch.arange(len(graph.destinations))
    for layer in range(graph.model.n_layers):
        groups, heads = _permutation(graph, draw)
        own = [i for i, one in enumerate(graph.sources) if one.layer == layer and one.kind == "head"]
        if own:
            sources[own] = sources[own][heads]
        for name in ("q", "k", "v", "qkv"):
            at = [i for i, one in enumerate(graph.destinations) if one.layer == layer and one.input == name]
            if at:
                destinations[at] = destinations[at][heads if len(at) == len(heads) else groups]
    kept = torch.zeros(graph.valid.shape, dtype=torch.bool)
    kept[graph.valid] = circuit.kept
    moved = graph.gather(kept[destinations][:, sources])
    return Circuit(graph, moved, None, None, {**circuit.about, "control": "permuted heads"})


def _permutation(graph: Graph, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which group, and which head, stands at each place of a layer; no head at its own, if there are several."""
    n_groups, n_heads = graph.model.n_kv_heads, graph.model.n_heads
    size = n_heads // n_groups
    while True:
        groups = torch.randperm(n_groups, generator=draw)
        within = torch.stack([torch.randperm(size, generator=draw) for _ in range(n_groups)])
        heads = (groups[:, None] * size + within).flatten()
        if n_heads == 1 or not bool((heads == torch.arange(n_heads)).any()):
            return groups, heads
