"""Scores and circuits as files that explain themselves; circuit_file.py has the outline of the JSON.

1. What the numbers depend on is stored beside them: the model by its name, shape and a hash of its weights, the
   tokenizer by a hash of its vocabulary, the task, the ablation, the direction, the metric, the method and the seed.
2. Scores are stored with the digits that float32 needs, so that scores that are read back select the same circuits.
   Bootstrap draws are not stored: each edge keeps its 95% interval, and its inclusion probability at one size.
3. Reading checks all of it against the model at hand, and every edge against the graph.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp import __version__
from mechinterp.circuit_file import DIMENSIONS, FORMAT, VERSION, dump, read
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.scores import Scores
from mechinterp.errors import UserError
from mechinterp.files import write_text
from mechinterp.hooked.model import HookedModel
from mechinterp.results import plain

# What `about` says that stands at the top of a file; the rest of it stays under "about".
NAMED = ("task", "corruption", "n_prompts", "pairs_sha256", "method", "settings", "ablation", "direction", "metric",
         "baseline", "seed", "selection")  # fmt: skip
INCLUDED = 0.02  # share of the edges at which inclusion is stored with scores
SCORE = "what the edge (or node) does for the metric, in its unit; positive helps the behaviour"


def save(path: str | Path, found: Scores | Circuit) -> None:
    """Write one JSON file; it appears whole or not at all.

    Raises:
        UserError: a score, or an inclusion probability, that is not finite.
    """
    graph = found.graph
    head = _head(found)
    body = _of_scores(found) if isinstance(found, Scores) else _of_circuit(found)
    told = {*NAMED, *head, *body, "graph", "weights_sha256"}
    about = {name: value for name, value in found.about.items() if name not in told}
    layout = {"qkv": graph.qkv, "mlp": graph.mlp, "positions": graph.positions, "places": list(graph.places)}
    payload = plain(head | {"graph": layout | {"n_edges": graph.n_edges}, "about": about}) | body
    write_text(path, dump(payload) + "\n")


def load(path: str | Path, model: HookedModel, any_weights: bool = False) -> Scores | Circuit:
    """Read what `save` wrote.

    Scores come back with their intervals, and without bootstrap draws. Of a circuit, edges outside of it have the score
    NaN: the file does not know it.

    Args:
        model: that the file is about.
        any_weights: accept a model of the same shape and tokenizer whose weights are others (a fine-tuned one, or
            another precision).

    Raises:
        UserError: a file that `circuit_file.read` refuses, another model, other weights, another tokenizer, an edge
            that cannot exist, a wrong number of edges, or a score that is not a finite number.
    """
    found = read(path)
    _require_model(path, found, model, any_weights)
    options = found["graph"]
    graph = Graph(model, options["qkv"], options["mlp"], options["positions"], tuple(options["places"]))
    if options.get("n_edges", graph.n_edges) != graph.n_edges:
        raise UserError(f"{path} is of a graph of {options['n_edges']} edges; {graph!r} has {graph.n_edges}")
    about = _about(found)
    return _circuit(path, found, graph, about) if found["kind"] == "circuit" else _scores(path, found, graph, about)


# ---- objects to JSON -----------------------------------------------------------------------------------------------


def _head(found: Scores | Circuit) -> dict[str, Any]:
    model, about = found.graph.model, found.about
    weights = about.get("weights_sha256") or model.weights_hash()
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": "scores" if isinstance(found, Scores) else "circuit",
        "mechinterp": __version__,
        "model": {"name": about.get("model", model.info.name), "weights_sha256": weights}
        | {name: getattr(model, name) for name in DIMENSIONS},
        "tokenizer_sha256": model.tokenizer_hash(),
        **{name: about.get(name) for name in NAMED},
    }


def _of_scores(scores: Scores) -> dict[str, Any]:
    graph, level = scores.graph, scores.level
    if level == "edge":
        destination, source, place = graph.edges.T
        columns: dict[str, Any] = {"source": source.tolist(), "destination": destination.tolist()}
    else:
        source, place = (
            torch.arange(graph.n_nodes) // len(graph.places),
            torch.arange(graph.n_nodes) % len(graph.places),
        )
        columns = {"source": source.tolist()}
    if graph.positions:
        columns["place"] = place.tolist()
    columns["score"] = _digits(scores.values, "score")
    reading = {
        f"{level}s": f"columns; entry i of each is about {level} i. source, destination and place are numbers, from 0, "
        "of sources, destinations and graph.places",
        "score": SCORE,
    }
    if scores.interval is not None:
        low, high = scores.interval.numpy()
        columns |= {"ci_low": _rounded(low), "ci_high": _rounded(high)}
        reading["ci_low, ci_high"] = "95% interval of the score over prompts (bootstrap)"
    if len(scores.draws) and level == "edge":
        n = max(1, int(INCLUDED * graph.n_edges))
        columns["inclusion"] = _rounded(scores.inclusion(n).numpy())
        reading["inclusion"] = f"share of bootstrap draws in which the edge is among the {n} of largest |score|"
    if scores.rankings:
        reading["rankings"] = (
            f"controls: scores of the {level}s, in the same order, made without what the scores claim to know"
        )
    return {
        "level": level,
        "reading": reading,
        "sources": [source.name for source in graph.sources],
        "destinations": [destination.name for destination in graph.destinations],
        f"{level}s": columns,
        "rankings": {name: _digits(values, name) for name, values in scores.rankings.items()},
    }


def _of_circuit(circuit: Circuit) -> dict[str, Any]:
    graph = circuit.graph
    chosen = circuit.kept.nonzero().flatten()
    rows: list[dict[str, Any]] = []
    for destination, source, place in graph.edges[chosen].tolist():
        row = {"source": graph.sources[source].name, "destination": graph.destinations[destination].name}
        rows.append(row | ({"place": graph.places[place]} if graph.positions else {}))
    reading = {
        "nodes": "what writes along, or is reached by, an edge of the circuit, in the order of the forward pass",
        "edges": f"the edges that are kept, of the {graph.n_edges} of the graph; all others carry the ablation",
    }
    for name, values, meaning in (
        ("score", circuit.scores, SCORE),
        ("inclusion", circuit.inclusion, "share of bootstrap draws over prompts in which the edge is selected"),
    ):
        if values is None:
            continue
        reading[name] = meaning
        for row, value in zip(rows, _digits(values[chosen], name), strict=True):
            row[name] = value
    return {"reading": reading, "nodes": circuit.nodes, "edges": rows}


def _digits(values: Tensor, what: str) -> list[float]:
    """The shortest decimal numbers that are these float32 numbers."""
    if not bool(values.isfinite().all()):
        raise UserError(f"{int((~values.isfinite()).sum())} numbers of {what!r} are not finite: nothing was written")
    return [float(str(value)) for value in values.detach().cpu().float().numpy()]


def _rounded(values: np.ndarray) -> list[float]:
    """To four digits: for reading only."""
    return [float(f"{value:.4g}") for value in values.tolist()]


# ---- JSON to objects -----------------------------------------------------------------------------------------------


def _require_model(path: str | Path, found: Mapping[str, Any], model: HookedModel, any_weights: bool) -> None:
    said, here = found["model"], model.info.name
    for name in DIMENSIONS:
        if said[name] != getattr(model, name):
            raise UserError(
                f"{path} is a graph of another model, {said['name']}: its {name} is {said[name]}, {here} has "
                f"{getattr(model, name)}. Valid: load {said['name']}"
            )
    tokenizer = model.tokenizer_hash()
    if found.get("tokenizer_sha256") != tokenizer:
        written, now = (str(one)[:12] if one else "none" for one in (found.get("tokenizer_sha256"), tokenizer))
        raise UserError(
            f"{path} was made with another tokenizer (vocabulary {written}; {here} has {now}), so its prompts are "
            f"other tokens here. Valid: load {said['name']} with the tokenizer that it was searched with"
        )
    if not any_weights and said["weights_sha256"] != model.weights_hash():
        raise UserError(
            f"{path} was made with other weights of {said['name']} (sha256 {str(said['weights_sha256'])[:12]}; {here} "
            f"has {model.weights_hash()[:12]}): what it found need not hold here. If that is meant: any_weights=True"
        )


def _about(found: Mapping[str, Any]) -> dict[str, Any]:
    """As `find` made it: what stands at the top of the file, and the rest."""
    named = {name: found[name] for name in NAMED if found.get(name) is not None}
    layout = {name: value for name, value in found["graph"].items() if name != "n_edges"}
    model = {"model": found["model"]["name"], "weights_sha256": found["model"]["weights_sha256"]}
    level = {"level": found["level"]} if found["kind"] == "scores" else {}
    return {**found["about"], **named, **level, **model, "graph": layout}


def _scores(path: str | Path, found: Mapping[str, Any], graph: Graph, about: dict[str, Any]) -> Scores:
    level = found["level"]
    columns = found[f"{level}s"]
    expected = graph.n_edges if level == "edge" else graph.n_nodes
    if len(columns["score"]) != expected:
        raise UserError(f"{path} scores {len(columns['score'])} {level}s; {graph!r} has {expected}")
    order = _edge_order(path, found, graph) if level == "edge" else _node_order(path, found, graph)

    def in_order(values: Sequence[Any], what: str, order: Tensor) -> Tensor:
        made = torch.empty(len(order))
        made[order] = _numbers(path, values, len(order), what)
        return made

    rankings = {name: in_order(values, f"ranking {name!r}", order) for name, values in found["rankings"].items()}
    values = in_order(columns["score"], "a score", order)
    ends = [in_order(columns[name], name, order) for name in ("ci_low", "ci_high") if name in columns]
    interval = torch.stack(ends) if len(ends) == 2 else None
    return Scores(graph, values, level, values.new_zeros(0, expected), rankings, about, kept_interval=interval)


def _edge_order(path: str | Path, found: Mapping[str, Any], graph: Graph) -> Tensor:
    """`[edge]` the graph's number of each edge of the file, which may be in any order."""
    columns, places = found["edges"], found["graph"]["places"]
    n = len(columns["score"])
    ends = torch.tensor([columns["destination"], columns["source"], columns.get("place", [0] * n)]).T
    names = [one.name for one in graph.sources] == found["sources"]
    names &= [one.name for one in graph.destinations] == found["destinations"]
    if names and torch.equal(ends, graph.edges):
        return torch.arange(n)
    numbers = []
    for destination, source, place in ends.tolist():
        name = f"{found['sources'][source]}->{found['destinations'][destination]}"
        numbers.append(graph.edge(f"{name}@{places[place]}" if graph.positions else name))
    return _once(path, torch.tensor(numbers), graph)


def _node_order(path: str | Path, found: Mapping[str, Any], graph: Graph) -> Tensor:
    columns = found["nodes"]
    unknown = [name for name in found["sources"] if name not in graph.source_index]
    if unknown:
        raise UserError(f"{path} scores the node {unknown[0]!r}, which {graph!r} does not have")
    source = torch.tensor([graph.source_index[found["sources"][i]] for i in columns["source"]])
    place = torch.tensor(columns.get("place", [0] * len(source)))
    return _once(path, source * len(graph.places) + place, graph)


def _once(path: str | Path, numbers: Tensor, graph: Graph) -> Tensor:
    if len(numbers.unique()) < len(numbers):
        raise UserError(f"{path} lists {len(numbers) - len(numbers.unique())} edges or nodes twice ({graph!r})")
    return numbers


def _circuit(path: str | Path, found: Mapping[str, Any], graph: Graph, about: dict[str, Any]) -> Circuit:
    rows = found["edges"]
    if any(("place" in row) != bool(graph.positions) for row in rows):
        raise UserError(
            f"{path} is damaged: its edges {'lack' if graph.positions else 'have'} places, its graph says not"
        )
    at = [f"{row['source']}->{row['destination']}" + (f"@{row['place']}" if graph.positions else "") for row in rows]
    numbers = _once(path, torch.tensor([graph.edge(name) for name in at], dtype=torch.long), graph)
    kept = torch.zeros(graph.n_edges, dtype=torch.bool)
    kept[numbers] = True
    given: dict[str, Tensor | None] = {"score": None, "inclusion": None}
    for name in given:
        if rows and name in rows[0]:
            values = torch.full((graph.n_edges,), torch.nan)
            values[numbers] = _numbers(path, [row[name] for row in rows], len(rows), f"the {name} of an edge")
            given[name] = values
    return Circuit(graph, kept, given["score"], given["inclusion"], about)


def _numbers(path: str | Path, values: Sequence[Any], n: int, what: str) -> Tensor:
    """`[n]` float32. Raises UserError for another number of them, or one that is not a finite number."""
    if not isinstance(values, list) or len(values) != n:
        raise UserError(f"{path}: {what} is not a list of {n} numbers")
    wrong = [one for one in values if type(one) not in (int, float)]
    made = torch.tensor([] if wrong else values, dtype=torch.float32)
    if wrong or not bool(made.isfinite().all()):
        found = wrong[0] if wrong else values[int((~made.isfinite()).nonzero()[0])]
        raise UserError(f"{path}: {what} is {found!r}; a finite number is needed")
    return made
