"""GraphML, parsed back with the standard library and with networkx, against the circuit's edge list."""

import json
from xml.etree import ElementTree as ET

import networkx
import pytest
import torch

from mechinterp.circuits import graphml
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.graph import Graph
from tests.circuits.test_files import CASES, random_scores
from tests.families import FAMILIES, model

XML = {"g": graphml.NAMESPACE}


def parsed(text):
    """Nodes and edges as dictionaries, numbers by the types that the file's keys declare."""
    root = ET.fromstring(text.encode())
    types = {key.get("id"): {"int": int, "double": float, "string": str}[key.get("attr.type")] for key in root[:-1]
             if key.tag.endswith("key")}  # fmt: skip

    def data(element):
        return {one.get("key"): types[one.get("key")](one.text) for one in element.findall("g:data", XML)}

    nodes = {node.get("id"): data(node) for node in root.findall(".//g:node", XML)}
    edges = [(edge.get("source"), edge.get("target"), data(edge)) for edge in root.findall(".//g:edge", XML)]
    return nodes, edges


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_edges_are_those_of_the_circuit(family, shape):
    circuit = random_scores(Graph(model(family), **shape)).select(edges=40, prune=False)
    nodes, edges = parsed(graphml.graphml(circuit))
    scored = [(source, target, data) for source, target, data in edges if data["kind"] == "edge"]
    expected = circuit.to_frame()
    assert [data["name"] for *_, data in scored] == expected["edge"].tolist() and len(scored) == 40
    assert [source for source, *_ in scored] == expected["source"].tolist()
    assert [target for _, target, _ in scored] == [name.split("<")[0] for name in expected["destination"]]
    assert [data["score"] for *_, data in scored] == pytest.approx(expected["score"].tolist(), rel=1e-6)
    assert [data["inclusion"] for *_, data in scored] == pytest.approx(expected["inclusion"].tolist())
    places = [name.partition("@")[2] or None for name in expected["edge"]]
    assert [data.get("place") for *_, data in scored] == places
    assert {source for source, *_ in edges} | {target for _, target, _ in edges} <= set(nodes)
    assert set(circuit.nodes) <= set(nodes)
    assert all(nodes[source]["layer"] <= nodes[target]["layer"] for source, target, _ in edges)


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_lead_through_shared_inputs(family):
    """Every head that a key/value group feeds is reached from it, as the graph of the model says."""
    graph = Graph(model(family))
    everything = Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool))
    nodes, edges = parsed(graphml.graphml(everything))
    fed = {(source, target) for source, target, data in edges if data["kind"] == "feeds"}
    layers, heads, groups = graph.model.n_layers, graph.model.n_heads, graph.model.n_kv_heads
    if family == "gemma2":  # heads are inputs of their layer's attention, a single source
        expected = {(f"a{layer}.h{head}", f"a{layer}") for layer in range(layers) for head in range(heads)}
        expected |= {(f"a{layer}.kv{group}", f"a{layer}") for layer in range(layers) for group in range(groups)}
    else:
        expected = {(f"a{a}.kv{h * groups // heads}", f"a{a}.h{h}") for a in range(layers) for h in range(heads)}
        expected = expected if groups < heads else set()
    assert fed == expected
    assert {name for name, data in nodes.items() if data["kind"] == "input"} == {source for source, _ in expected}


def test_networkx_opens_a_file(tmp_path):
    circuit = random_scores(Graph(model("llama"))).select(edges=60)
    graphml.save(tmp_path / "circuit.graphml", circuit)
    read = networkx.read_graphml(tmp_path / "circuit.graphml", force_multigraph=True)
    scored = {data["name"]: data["score"] for *_, data in read.edges(data=True) if data["kind"] == "edge"}
    assert scored == pytest.approx(dict(zip(circuit.edges, circuit.to_frame()["score"], strict=True)), rel=1e-6)
    assert networkx.is_directed_acyclic_graph(read)
    on_a_path = networkx.descendants(read, "embed") & networkx.ancestors(read, "logits")
    writing = {f"a{layer}.h{head}" for layer, head in circuit.heads}
    assert writing <= on_a_path and len(writing) > 4  # dead edges were pruned
    assert read.nodes["a1.h2"] == {"label": "a1.h2", "kind": "head", "layer": 1, "index": 2}
    assert json.loads(read.graph["about"])["task"] == "random"


def test_a_circuit_without_scores_has_none():
    circuit = Circuit.of(Graph(model("gpt2")), ["embed->m0", "m0->logits"])
    nodes, edges = parsed(graphml.graphml(circuit))
    assert list(nodes) == ["embed", "m0", "logits"]
    assert [(source, target) for source, target, _ in edges] == [("embed", "m0"), ("m0", "logits")]
    assert all(data.keys() == {"kind", "name", "input"} for *_, data in edges)
