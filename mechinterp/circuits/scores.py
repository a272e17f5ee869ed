"""Scores of every edge, and the circuits that are selected from them.

1. *top*: the n edges of largest score, signed or absolute. *threshold*: all edges above one. Edges on no path from the
   embedding to the logits are then pruned.
2. *greedy* (Hanna et al. 2024): from the logits down, the largest edge into a node that is already in the circuit, one
   after another; so everything leads to the logits, by construction.
3. Scores of nodes select nodes, in that order: a node keeps all edges out of it, and is left out where they would be
   more than n.
4. *Inclusion*: the share of bootstrap draws over prompts in which an edge is selected.
"""

import hashlib
import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechinterp.circuits.ablations import Ablation, as_direction
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.fidelity import Fidelity, fidelity
from mechinterp.circuits.graph import Graph
from mechinterp.errors import UserError
from mechinterp.tasks.pairs import PromptPairs

By = Literal["absolute", "signed"]
Connect = Literal["top", "greedy"]


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """What each edge (or node) does for the behaviour, in the metric's unit; positive helps.

    Attributes:
        graph: that the scores are of.
        values: `[edge]`, or `[node]` where `level` is "node".
        level: "edge" or "node".
        draws: `[draw edge]` scores over resampled prompts; none where the method does not score prompts apart.
        rankings: control -> `[unit]` scores made from the same pairs without what the scores claim to know.
        about: model, task, method, ablation, direction, metric, seed, …, as plain values.
        ablation: the values that cut edges carried; None: as `about` says.
        pairs: that were searched on, where they are still at hand.
        kept_interval: `[2 unit]` as a file holds it, where there are no draws.
    """

    graph: Graph
    values: Tensor
    level: Literal["edge", "node"]
    draws: Tensor
    rankings: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    ablation: Ablation | None = None
    pairs: PromptPairs | None = None
    kept_interval: Tensor | None = None

    def __post_init__(self) -> None:
        expected = self.graph.n_edges if self.level == "edge" else self.graph.n_nodes
        if tuple(self.values.shape) != (expected,):
            raise UserError(f"{self.graph!r} has {expected} {self.level}s; found scores of {list(self.values.shape)}")
        if not bool(self.values.isfinite().all()):
            raise UserError(
                f"{int((~self.values.isfinite()).sum())} scores are not finite: check the metric and weights"
            )

    @cached_property
    def interval(self) -> Tensor | None:
        """`[2 unit]` ends of the 95% interval over prompts: percentiles of the draws, or as read from a file."""
        if not len(self.draws):
            return self.kept_interval
        # Not torch.quantile, which refuses more than 16 million numbers.
        return torch.from_numpy(np.quantile(self.draws.numpy(), [0.025, 0.975], axis=0)).to(self.draws)

    @property
    def interval_of_edges(self) -> Tensor | None:
        """`[2 edge]` the same; an edge has that of its node where nodes were scored."""
        if self.interval is None or self.level == "edge":
            return self.interval
        return self.interval[:, self.graph.node_of]

    @property
    def of_edges(self) -> Tensor:
        """`[edge]` scores; an edge has that of the node it comes out of where nodes were scored."""
        return self.values if self.level == "edge" else self.values[self.graph.node_of]

    def name(self, unit: int) -> str:
        """Of an edge or node."""
        return self.graph.edge_name(unit) if self.level == "edge" else self.graph.node_name(unit)

    def select(
        self,
        edges: float | int | None = None,
        *,
        threshold: float | None = None,
        by: By = "absolute",
        connect: Connect = "top",
        prune: bool = True,
        ranking: str | None = None,
        inclusion: bool = True,
    ) -> Circuit:
        """A circuit.

        Args:
            edges: how many: a share (a float up to 1) or a number. Either this or `threshold`.
            threshold: the smallest score that is kept.
            by: "absolute" counts edges that hurt as well, "signed" only what helps most.
            connect: "top", or "greedy" from the logits.
            prune: take out edges on no path from the embedding to the logits.
            ranking: select from this control's scores instead.
            inclusion: count the bootstrap draws that select each edge.

        Raises:
            UserError: both or none of `edges` and `threshold`, one out of range, an unknown option.
        """
        if (edges is None) == (threshold is None):
            raise UserError("select: give either edges=, a share or a number, or threshold=")
        for name, value, valid in (("by", by, ("absolute", "signed")), ("connect", connect, ("top", "greedy"))):
            if value not in valid:
                raise UserError(f"select: unknown {name}={value!r}; valid: {', '.join(map(repr, valid))}")
        if ranking is not None and ranking not in self.rankings:
            raise UserError(f"select: no ranking {ranking!r}; these scores have: {', '.join(self.rankings) or 'none'}")
        if connect == "greedy" and (self.level == "node" or threshold is not None):
            raise UserError("select: connect='greedy' grows a number of edges; valid for scores of edges, with edges=")
        n_edges = self.graph.n_edges
        if isinstance(edges, float):
            if not 0 <= edges <= 1:
                raise UserError(f"select: a share of the edges lies in 0 … 1; found {edges}")
            edges = int(edges * n_edges)
        if edges is not None and not 0 <= edges <= n_edges:
            raise UserError(f"select: this graph has {n_edges} edges; {edges} were asked for")
        values = self.values if ranking is None else self.rankings[ranking]
        kept = choose(self.graph, values, self.level, edges, threshold, by, connect)
        kept = self.graph.prune(kept) if prune else kept
        how = {"edges": edges, "threshold": threshold, "by": by, "connect": connect, "ranking": ranking}
        share = None
        if inclusion and len(self.draws) and edges is not None and ranking is None:
            share = self.inclusion(edges, by, connect)
        of_edges = values if self.level == "edge" else values[self.graph.node_of]
        return Circuit(self.graph, kept, of_edges, share, {**self.about, "selection": how})

    def inclusion(self, edges: int, by: By = "absolute", connect: Connect = "top") -> Tensor:
        """`[edge]` share of bootstrap draws over prompts that select an edge, before dead edges are pruned.

        Raises:
            UserError: the method did not score prompts apart from each other.
        """
        if not len(self.draws):
            raise UserError(f"{self.about.get('method')} scores all prompts at once: there is nothing to resample")
        counted = torch.zeros(self.graph.n_edges)
        for values in self.draws:
            counted += choose(self.graph, values, self.level, edges, None, by, connect)
        return counted / len(self.draws)

    def fidelity(self, n: int = 200, pairs: PromptPairs | None = None, seed: int = 0) -> Fidelity:
        """Exact effects of a stratified sample of `n` edges beside their scores: rank correlation, error, missed mass.

        Args:
            n: edges.
            pairs: to patch on; by default those that were searched on.
            seed: of the sample.

        Raises:
            UserError: scores of nodes, or pairs that are no longer at hand.
        """
        pairs = self.pairs if pairs is None else pairs
        if self.level != "edge":
            raise UserError("fidelity compares edges with their exact effects; these are scores of nodes")
        if pairs is None:
            raise UserError("fidelity needs the pairs that were searched on, which a file does not hold: give pairs=")
        about = self.about
        direction, metric = as_direction(about.get("direction", "noise")), about.get("metric")
        engine = Engine(self.graph, pairs, Ablation.described(about, self.ablation), direction, metric)
        return fidelity(engine, self.values, n, seed)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The units of largest |score|, with their 95% interval over prompts where there are draws."""
        order = torch.argsort(self.values.abs(), descending=True, stable=True)[:n]
        frame = {self.level: [self.name(int(i)) for i in order], "score": self.values[order].numpy()}
        if self.interval is not None:
            low, high = self.interval[:, order].numpy()
            frame |= {"ci_low": low, "ci_high": high}
        return pd.DataFrame(frame)

    def summary(self) -> str:
        """One line: what was scored, how, and the largest unit."""
        about, best = self.about, self.top(1).iloc[0]
        interval = f" [{best['ci_low']:.3g}, {best['ci_high']:.3g}]" if "ci_low" in best else ""
        return (
            f"{about.get('method')} on {about.get('task')}, {about.get('ablation')} {about.get('direction')}, "
            f"n={about.get('n_prompts')}: {len(self.values)} {self.level}s, largest {best[self.level]} "
            f"{best['score']:.3g}{interval} ({about.get('metric')})"
        )

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.top(10).to_string(index=False, float_format='%.3g')}"


def pair_hashes(pairs: PromptPairs) -> list[str]:
    """One short hash of each pair, both sides: so that an evaluation can tell which pairs were searched on."""
    made = []
    for i in range(len(pairs)):
        digest = hashlib.sha256()
        for side in (pairs.clean, pairs.corrupted):
            digest.update(side.tokens[i][side.real[i]].cpu().numpy().tobytes())
        made.append(digest.hexdigest()[:12])
    return made


def choose(
    graph: Graph,
    values: Tensor,
    level: Literal["edge", "node"],
    edges: int | None,
    threshold: float | None,
    by: By,
    connect: Connect,
) -> Tensor:
    """`[edge]` bool: the selection from scores `[edge]` or `[node]`, before dead edges are pruned."""
    size = values.abs() if by == "absolute" else values
    if threshold is not None:
        kept = size >= threshold
        return kept if level == "edge" else kept[graph.node_of]
    assert edges is not None
    if level == "node":
        return _top_nodes(graph, size, edges)
    if connect == "greedy":
        return _greedy(graph, size, edges)
    kept = torch.zeros(graph.n_edges, dtype=torch.bool)
    kept[torch.argsort(size, descending=True, stable=True)[:edges]] = True
    return kept


def _top_nodes(graph: Graph, size: Tensor, edges: int) -> Tensor:
    """Nodes from the largest down; one that would make the edges more than asked for is left out."""
    count = torch.bincount(graph.node_of, minlength=graph.n_nodes).tolist()
    kept, left = torch.zeros(graph.n_nodes, dtype=torch.bool), edges
    for node in torch.argsort(size, descending=True, stable=True).tolist():
        if count[node] <= left:
            kept[node], left = True, left - count[node]
    return kept[graph.node_of]


def _greedy(graph: Graph, size: Tensor, edges: int) -> Tensor:
    """From the logits down: the largest edge into any node that has been reached."""
    into: dict[int, list[int]] = {}  # source -> destinations that are inputs of it
    for v, destination in enumerate(graph.destinations):
        for source in destination.feeds:
            into.setdefault(source, []).append(v)
    destination_of = graph.edges[:, 0]
    starts = torch.searchsorted(destination_of, torch.arange(len(graph.destinations) + 1))
    by_size = size.tolist()
    source_of = graph.edges[:, 1].tolist()
    waiting: list[tuple[float, int]] = []
    opened: set[int] = set()

    def open_destination(v: int) -> None:
        if v not in opened:
            opened.add(v)
            for edge in range(int(starts[v]), int(starts[v + 1])):
                heapq.heappush(waiting, (-by_size[edge], edge))

    open_destination(len(graph.destinations) - 1)
    kept = torch.zeros(graph.n_edges, dtype=torch.bool)
    for _ in range(edges):
        if not waiting:
            break
        _, edge = heapq.heappop(waiting)
        kept[edge] = True
        for v in into.get(source_of[edge], ()):
            open_destination(v)
    return kept
