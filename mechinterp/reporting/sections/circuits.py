"""A circuit in a report: its graph from the embedding to the logits, its strongest edges, and where its heads look."""

from collections import defaultdict
from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.nodes import feeds, nodes, reached
from mechinterp.circuits.scores import Scores
from mechinterp.errors import UserError
from mechinterp.reporting.attention import attention_view
from mechinterp.reporting.network import Edge, Node, network
from mechinterp.reporting.report import AttentionView, Section, Table
from mechinterp.results import plain
from mechinterp.tasks.pairs import PromptPairs

FOLLOWED = 150  # edges of a graph that a reader can follow
MAX_EDGES = 400  # that are drawn: more are not told apart
MAX_HEADS = 48  # whose attention is shown
MAX_BYTES = 2_000_000  # of patterns


def circuit_figure(circuit: Circuit, interval: Tensor | None = None) -> go.Figure:
    """The graph of a circuit, at most `MAX_EDGES` of its edges: those of largest |score|.

    Args:
        circuit: with one edge or more.
        interval: `[2 edge]` ends of the 95% interval of each edge's score.

    Raises:
        UserError: a circuit without edges, an interval of another shape.
    """
    graph = circuit.graph
    if interval is not None and tuple(interval.shape) != (2, graph.n_edges):
        raise UserError(f"circuit: an interval of shape {list(interval.shape)}; [2 edge] is [2 {graph.n_edges}]")
    if not len(circuit):
        raise UserError("circuit: it has no edges to draw")
    edges = _edges(circuit, _strongest(circuit), interval)
    ends = {end for edge in edges for end in (edge.source, edge.target)}
    shown = [node for node in _nodes(circuit) if node.name in ends]
    fed = [(source, target) for source, target in feeds(circuit) if {source, target} <= ends]
    left_out = len(circuit) - len(edges)
    facts = {
        name: circuit.about[name] for name in ("method", "ablation", "direction", "metric") if name in circuit.about
    }
    if "n_prompts" in circuit.about:
        facts["n"] = circuit.about["n_prompts"]
    facts["edges"] = f"{len(edges)} of {len(circuit)} drawn" if left_out else len(circuit)
    title = f"Circuit: {len(edges)} strongest of {len(circuit)} edges" if left_out else f"Circuit: {len(edges)} edges"
    return network(shown, edges, fed, title=title, facts=facts)


def strongest(scores: Scores, n: int = FOLLOWED) -> Circuit:
    """The circuit of the n edges of largest |score| other than 0: what a reader can follow."""
    return scores.select(min(n, int((scores.of_edges != 0).sum())))


def circuit_section(circuit: Circuit, pairs: PromptPairs | None = None, interval: Tensor | None = None) -> Section:
    """The graph, a table of the strongest edges, and with `pairs` the attention of the heads on their first prompt.

    Raises:
        UserError: see `circuit_figure`.
    """
    figure = circuit_figure(circuit, interval)
    left_out = max(0, len(circuit) - MAX_EDGES)
    text = (
        f"{circuit.summary()}.\n\nLayers from bottom to top. Width is |score| on a square-root scale; red helps the "
        "behaviour, blue and dashed hurts it. A small diamond is an input that several heads share. Choose a node to "
        "see its edges alone, with their numbers"
        + (", and a head to see where it looks." if pairs is not None else ".")
        + (f" {left_out} edges of smaller |score| are left out of the figure." if left_out else "")
    )
    chosen = _strongest(circuit)[:12]
    rows = [
        (edge.name, edge.score, edge.ci_low, edge.ci_high, edge.inclusion) for edge in _edges(circuit, chosen, interval)
    ]
    used = [0, *(i for i in range(1, 5) if any(row[i] is not None for row in rows))]
    names = ("edge", "score", "95% low", "95% high", "inclusion")
    table = Table(
        tuple(names[i] for i in used), tuple(tuple(plain(row[i]) for i in used) for row in rows),
        f"The {len(rows)} edges of largest |score|.",
    )  # fmt: skip
    view = None if pairs is None else _attention(circuit, pairs)
    return Section("The circuit", text, figures=(figure,), table=table, attention=view)


def _strongest(circuit: Circuit) -> Sequence[int]:
    """Edges by |score|, at most `MAX_EDGES`."""
    chosen = circuit.kept.nonzero().flatten()
    if circuit.scores is not None:
        chosen = chosen[torch.argsort(circuit.scores[chosen].abs(), descending=True, stable=True)]
    return chosen[:MAX_EDGES].tolist()


def _edges(circuit: Circuit, chosen: Sequence[int], interval: Tensor | None) -> list[Edge]:
    graph = circuit.graph
    made = []
    for edge in chosen:
        v, u, _ = graph.edges[edge].tolist()
        low, high = (None, None) if interval is None else interval[:, edge].tolist()
        made.append(
            Edge(
                graph.edge_name(edge),
                _drawn(graph.sources[u].name),
                _drawn(reached(graph.destinations[v])),
                None if circuit.scores is None else float(circuit.scores[edge]),
                low,
                high,
                None if circuit.inclusion is None else float(circuit.inclusion[edge]),
            )
        )
    return made


def _drawn(name: str) -> str:
    """The dot of a node: that of its MLP for a neuron."""
    return name.partition(".n")[0]


def _nodes(circuit: Circuit) -> list[Node]:
    size = circuit.graph.model.n_heads // circuit.graph.model.n_kv_heads
    made: dict[str, Node] = {}
    for name, kind, layer, index in nodes(circuit):
        column, at = float(index or 0), _drawn(name)
        if kind in ("neuron", "mlp") or at == f"m{layer}":
            made[at] = Node(at, at, "mlp", layer)
        elif kind == "input" and ".kv" in name:
            made[name] = Node(name, name, "input", layer, (column + 0.5) * size - 0.5)
        elif kind in ("head", "input"):
            made[name] = Node(name, f"h{index}", "head", layer, column, f"L{layer}H{index}" if kind == "head" else None)
        else:
            made[name] = Node(name, name, kind, layer)  # type: ignore[arg-type]
    return list(made.values())


def _attention(circuit: Circuit, pairs: PromptPairs) -> AttentionView | None:
    """Of the heads whose edges out are the strongest, in the order of the layers; None for a circuit without heads."""
    graph = circuit.graph
    n = int(pairs.clean.real[0].sum())
    out: dict[tuple[int, int], list[Edge]] = defaultdict(list)
    for edge in _edges(circuit, _strongest(circuit), None):
        source = graph.sources[graph.source_index[edge.source]] if edge.source in graph.source_index else None
        if source is not None and source.kind == "head":
            out[source.layer, source.index].append(edge)
    ranked = sorted(out, key=lambda head: -sum(abs(edge.score or 0.0) for edge in out[head]))
    chosen = sorted(ranked[: min(MAX_HEADS, max(1, MAX_BYTES // n**2))])
    if not chosen:
        return None
    return attention_view(graph.model, pairs.clean, {f"L{a}H{b}": _note(out[a, b]) for a, b in chosen})


def _note(edges: Sequence[Edge]) -> str:
    """The strongest edges out of a head."""
    named = [
        edge.name.partition("->")[2] + (f" ({edge.score:.3g})" if edge.score is not None else "") for edge in edges
    ]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"writes to {', '.join(named[:3])}{more}"
