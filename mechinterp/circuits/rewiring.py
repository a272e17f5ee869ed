"""Rewirings of a circuit: the same nodes with the same number of edges, between the same layers, joined otherwise.

A pair of edges u1→v1 and u2→v2 whose sources lie in one layer and whose destinations lie in one layer (and at one
place) exchange their destinations, over and over (Maslov & Sneppen 2002). What is left to differ is who is joined to
whom: a circuit that is no better than its rewirings has found the right layers, not the right edges.
"""

import torch

from mechinterp.circuits.circuit import Circuit

SWAPS_PER_EDGE = 10


def rewire(circuit: Circuit, seed: int) -> Circuit:
    """A rewiring; edges that have no partner to exchange with stay where they are."""
    graph = circuit.graph
    draw = torch.Generator().manual_seed(seed)
    chosen = circuit.kept.nonzero().flatten()
    triples = graph.edges[chosen].tolist()  # destination, source, place
    present = {tuple(triple) for triple in triples}
    classes: dict[tuple[int, int, int], list[int]] = {}
    for i, (destination, source, place) in enumerate(triples):
        key = (graph.destinations[destination].layer, graph.sources[source].layer, place)
        classes.setdefault(key, []).append(i)
    groups = [members for members in classes.values() if len(members) > 1]
    exists = graph.valid
    for members in groups:
        picks = torch.randint(len(members), (SWAPS_PER_EDGE * len(members), 2), generator=draw).tolist()
        for i, j in ((members[a], members[b]) for a, b in picks if a != b):
            (v1, u1, place), (v2, u2, _) = triples[i], triples[j]
            new = (v2, u1, place), (v1, u2, place)
            if new[0] in present or new[1] in present or not (exists[new[0]] and exists[new[1]]):
                continue
            present -= {tuple(triples[i]), tuple(triples[j])}
            present |= set(new)
            triples[i], triples[j] = list(new[0]), list(new[1])
    kept = torch.zeros(graph.valid.shape, dtype=torch.bool)
    kept[tuple(torch.tensor(triples).T)] = True
    return Circuit(graph, graph.prune(graph.gather(kept)), None, None, {**circuit.about, "rewired": seed})
