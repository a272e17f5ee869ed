"""Circuits as GraphML, which networkx, Gephi, yEd and igraph open.

1. Nodes are what writes (`embed`, `a5.h3`, `m5`) and `logits`, with their kind, layer and head (or neuron).
2. Edges are those of the circuit, one element each, so that a head may have several from one node: `input` says which
   of its inputs an edge enters (q, k, v), `place` where, `score` and `inclusion` how much and how surely.
3. Where an input belongs to several heads (a key/value group), or to a part of a layer that is one source, it is a node
   of its own, such as `a9.kv2`, with an edge of kind `feeds`, without a score, to each of them in the circuit.
"""

import json
import math
from pathlib import Path
from xml.etree import ElementTree as ET

from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.nodes import feeds, nodes, reached
from mechinterp.files import write_text
from mechinterp.results import plain

NAMESPACE = "http://graphml.graphdrawing.org/xmlns"
# attribute -> what it belongs to, its type
KEYS = {
    "about": ("graph", "string"),
    "kind": ("all", "string"),
    "layer": ("node", "int"),
    "index": ("node", "int"),
    "label": ("node", "string"),
    "name": ("edge", "string"),
    "input": ("edge", "string"),
    "place": ("edge", "string"),
    "score": ("edge", "double"),
    "inclusion": ("edge", "double"),
}


def save(path: str | Path, circuit: Circuit) -> None:
    """Write a GraphML file; it appears whole or not at all."""
    write_text(path, graphml(circuit))


def graphml(circuit: Circuit) -> str:
    """The text of the file."""
    root = ET.Element("graphml", {"xmlns": NAMESPACE})
    for name, (of, type_name) in KEYS.items():
        ET.SubElement(root, "key", {"id": name, "for": of, "attr.name": name, "attr.type": type_name})
    graph = ET.SubElement(root, "graph", {"id": "circuit", "edgedefault": "directed"})
    _add(graph, {"about": json.dumps(plain(dict(circuit.about)), allow_nan=False)})
    for name, kind, layer, index in nodes(circuit):
        node = ET.SubElement(graph, "node", {"id": name})
        _add(node, {"label": name, "kind": kind, "layer": layer, "index": index})
    for number, (source, target, data) in enumerate(_edges(circuit)):
        edge = ET.SubElement(graph, "edge", {"id": f"e{number}", "source": source, "target": target})
        _add(edge, data)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _edges(circuit: Circuit) -> list[tuple[str, str, dict[str, str | float | None]]]:
    graph = circuit.graph
    made: list[tuple[str, str, dict[str, str | float | None]]] = []
    for edge in circuit.kept.nonzero().flatten().tolist():
        v, u, place = graph.edges[edge].tolist()
        one = graph.destinations[v]
        data: dict[str, str | float | None] = {
            "kind": "edge",
            "name": graph.edge_name(edge),
            "input": one.input,
            "place": graph.places[place] if graph.positions else None,
            "score": None if circuit.scores is None else float(circuit.scores[edge]),
            "inclusion": None if circuit.inclusion is None else float(circuit.inclusion[edge]),
        }
        made.append((graph.sources[u].name, reached(one), data))
    return made + [(source, target, {"kind": "feeds"}) for source, target in feeds(circuit)]


def _add(parent: ET.Element, data: dict[str, str | int | float | None] | dict[str, str | float | None]) -> None:
    """Attributes that are known."""
    for name, value in data.items():
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            ET.SubElement(parent, "data", {"key": name}).text = str(value)
