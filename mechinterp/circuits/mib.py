"""Circuits as MIB and EAP-IG write them: JSON with `cfg`, `nodes` and `edges` (Mueller et al. 2025; Hanna et al. 2024).

1. Names. Their `input` is our `embed`; `a5.h3`, `m5`, `logits` and `a5.h3->a9.h6<q>` are the same. (What their input
   writes is the token embedding alone, ours has the positions' as well: the same for prompts of one length, another
   under zero ablation.)
2. Signs. They score the change of a *loss* when an edge is cut, so that there, too, positive helps; nothing is turned.
3. Grouped-query attention. Their graph has key and value inputs for every query head, ours (`qkv="kv_group"`) one for
   the heads of a group. Cutting a group's edge is cutting those of all its heads, so to first order its score is their
   sum: exactly so for EAP. Read, scores of a group's heads are added; written, each head gets an equal share. A
   group's edge is in a circuit if those of all its heads are; a file in which they differ is refused, and can be read
   with `Graph(model, qkv="ungrouped")`.
4. In their files a circuit is `in_graph`, beside the scores of all edges. An edge that a file does not list is not in
   the circuit and has the score 0, as when their own code reads it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.graph import Destination, Graph
from mechinterp.circuits.scores import Scores
from mechinterp.errors import UserError
from mechinterp.files import write_text


def save(path: str | Path, found: Scores | Circuit) -> None:
    """Write scores (no edge is in a circuit yet, as after EAP-IG's `attribute`), or a circuit with its scores.

    Edges of a circuit without scores, or without a score for an edge, have the score 0. Scores of nodes are written for
    nodes and, for each edge, that of the node it comes out of.

    Raises:
        UserError: a graph that their format cannot hold; see `require_convertible`.
    """
    graph = found.graph
    require_convertible(graph)
    if isinstance(found, Scores):
        kept, scores = torch.zeros(graph.n_edges, dtype=torch.bool), found.of_edges
    else:
        kept, scores = found.kept, found.scores
    scores = torch.zeros(graph.n_edges) if scores is None else scores.nan_to_num(0.0)
    edges: dict[str, dict[str, Any]] = {}
    for (v, u, _), score, is_in in zip(graph.edges.tolist(), scores.tolist(), kept.tolist(), strict=True):
        theirs = _their_inputs(graph, graph.destinations[v])
        for name in theirs:
            edges[f"{_their_name(graph.sources[u].name)}->{name}"] = {"score": score / len(theirs), "in_graph": is_in}
    used = set(found.nodes) if isinstance(found, Circuit) else {"logits"}
    nodes: dict[str, dict[str, Any]] = {}
    for i, name in enumerate([*graph.source_index, "logits"]):
        nodes[_their_name(name)] = {"in_graph": name in used or name == "logits"}
        if isinstance(found, Scores) and found.level == "node" and name != "logits":
            nodes[_their_name(name)]["score"] = float(found.values[i])
    write_text(path, json.dumps({"cfg": _config(graph), "nodes": nodes, "edges": edges}, allow_nan=False) + "\n")


def load_scores(path: str | Path, graph: Graph) -> Scores:
    """The scores of all edges.

    Raises:
        UserError: see `load_circuit`, but for heads of a group that differ.
    """
    found = _read(path, graph)
    scores, _ = _by_edge(path, found, graph)
    return Scores(graph, scores, "edge", scores.new_zeros(0, graph.n_edges), about=_about(path, graph))


def load_circuit(path: str | Path, graph: Graph) -> Circuit:
    """The edges that are `in_graph`, with the scores of all edges.

    Raises:
        UserError: a graph that their format cannot hold, a file that is not theirs, one of another model, an edge that
            cannot exist, a score that is not a finite number, or heads of a group of which some are in and others not.
    """
    found = _read(path, graph)
    scores, members = _by_edge(path, found, graph)
    size = torch.tensor([len(_their_inputs(graph, one)) for one in graph.destinations])[graph.edges[:, 0]]
    split = ((members > 0) & (members < size)).nonzero().flatten()
    if len(split):
        raise UserError(
            f"{path}: of the {int(size[split[0]])} heads that share {graph.edge_name(int(split[0]))}, "
            f"{int(members[split[0]])} are in the circuit ({len(split)} such edges), which this model cannot have. "
            "Valid: Graph(model, qkv='ungrouped')"
        )
    return Circuit(graph, members == size, scores, None, _about(path, graph))


def require_convertible(graph: Graph) -> None:
    """Raise UserError for a graph whose nodes are not theirs: heads, one MLP a layer, no positions."""
    for is_other, what in (
        (bool(graph.positions), f"positions={graph.positions!r}; valid: positions=False"),
        (graph.mlp != "layer", "neurons; valid: mlp='layer'"),
        (graph.qkv == "merged", "merged inputs; valid: qkv='kv_group' or 'ungrouped'"),
        (not graph.has_mlp, "no MLPs, and theirs always has them"),
        (not graph.heads_add_up, "attention layers as single sources (a norm follows them), and theirs has heads"),
    ):
        if is_other:
            raise UserError(f"MIB's format cannot hold this graph of {graph.model.info.name}: it has {what}")


def _their_name(name: str) -> str:
    return "input" if name == "embed" else name


def _their_inputs(graph: Graph, destination: Destination) -> list[str]:
    """Names of the inputs of theirs that a destination is: one of each head of a group."""
    if destination.input not in ("k", "v") or len(destination.feeds) == 1:
        return [destination.name]
    return [f"{graph.sources[u].name}<{destination.input}>" for u in destination.feeds]


def _config(graph: Graph) -> dict[str, Any]:
    model = graph.model
    return {
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "parallel_attn_mlp": bool(graph.parallel),
        "d_model": model.d_model,
    }


def _about(path: str | Path, graph: Graph) -> dict[str, Any]:
    return {"model": graph.model.info.name, "source": f"MIB's format, {Path(path).name}"}


def _read(path: str | Path, graph: Graph) -> dict[str, Any]:
    """The file, if it is theirs and of this model."""
    require_convertible(graph)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such circuit file: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a circuit from {path}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("cfg", "nodes", "edges")):
        raise UserError(f"{path} is no circuit in MIB's format: an object with cfg, nodes and edges is expected")
    if any(isinstance(node, dict) and "neurons" in node for node in found["nodes"].values()):
        raise UserError(f"{path} keeps or cuts neurons of node outputs, which this graph does not have")
    for name, here in _config(graph).items():
        if found["cfg"].get(name, here) != here:
            raise UserError(
                f"{path} is a graph of another model: its {name} is {found['cfg'][name]}, {graph.model.info.name} has "
                f"{here}"
            )
    return found


def _by_edge(path: str | Path, found: Mapping[str, Any], graph: Graph) -> tuple[Tensor, Tensor]:
    """`[edge]` scores, added up over the heads of a group, and how many of their edges are in the circuit."""
    ours = {name: one.name for one in graph.destinations for name in _their_inputs(graph, one)}
    scores, members = [0.0] * graph.n_edges, [0] * graph.n_edges
    for name, edge in found["edges"].items():
        source, _, destination = name.partition("->")
        if source == "embed":
            raise UserError(f"{path}: edge {name!r} has no place in MIB's format, whose embedding is 'input'")
        source = "embed" if source == "input" else source
        number = graph.edge(f"{source}->{ours.get(destination, destination)}")
        score, is_in = (edge.get("score"), edge.get("in_graph")) if isinstance(edge, dict) else (None, None)
        if not isinstance(score, int | float) or not isinstance(is_in, bool):
            raise UserError(f"{path}: edge {name!r} needs a score and in_graph; found {edge!r}")
        scores[number] += score
        members[number] += is_in
    made = torch.tensor(scores)
    if not bool(made.isfinite().all()):
        raise UserError(f"{path}: {int((~made.isfinite()).sum())} scores are not finite numbers")
    return made, torch.tensor(members)
