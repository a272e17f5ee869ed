"""The nodes that a circuit is drawn with.

They are what writes and the logits, and one node more for each input that belongs to several of them: the keys of a
key/value group, say, are an input of every head of the group. From such a node `feeds` leads to what it is an input of.
"""

from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.graph import Destination


def reached(destination: Destination) -> str:
    """The node that a destination is an input of: `a9.h6` of `a9.h6<q>`, `a9.kv2` of `a9.kv2<k>`."""
    return destination.name.partition("<")[0]


def nodes(circuit: Circuit) -> list[tuple[str, str, int, int | None]]:
    """Name, kind, layer and head (key/value group, neuron) of every node, in the order of the forward pass.

    Kinds are those of `graph.Source`, "input" for what is only read into, and "logits".
    """
    graph = circuit.graph
    used, inputs = set(circuit.nodes), _inputs(circuit)
    made: list[tuple[str, str, int, int | None]] = []
    layer = -1
    for source in graph.sources:
        if source.layer != layer:  # a layer's own inputs stand before what they feed
            layer = source.layer
            made += [(name, "input", layer, one.index) for name, one in inputs.items() if one.layer == layer]
        if source.name in used:
            indexed = source.kind in ("head", "neuron")
            made.append((source.name, source.kind, source.layer, source.index if indexed else None))
    return [*made, ("logits", "logits", graph.model.n_layers, None)] if "logits" in used else made


def feeds(circuit: Circuit) -> list[tuple[str, str]]:
    """From every node of kind "input" to the nodes of the circuit that it is an input of."""
    used = set(circuit.nodes)
    named = [(name, circuit.graph.sources[u].name) for name, one in _inputs(circuit).items() for u in one.feeds]
    return [(name, source) for name, source in named if source in used]


def _inputs(circuit: Circuit) -> dict[str, Destination]:
    """What edges of the circuit enter that is no source itself, by name; the logits aside."""
    graph = circuit.graph
    entered = [graph.destinations[v] for v in graph.edges[circuit.kept][:, 0].unique().tolist()]
    return {reached(one): one for one in entered if one.feeds and reached(one) not in graph.source_index}
