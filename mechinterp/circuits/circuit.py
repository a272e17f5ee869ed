"""A circuit: the edges that are kept, and what the model does with them alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from mechinterp.circuits.ablations import Ablation
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.errors import UserError
from mechinterp.hooked.model import Input
from mechinterp.hooked.suffix import Read
from mechinterp.tasks.pairs import Answers, PromptPairs, Target

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Edges of a graph.

    Attributes:
        graph: that the edges are of.
        kept: `[edge]` bool.
        scores: `[edge]` what the edges were selected by; None for a circuit from elsewhere.
        inclusion: `[edge]` share of bootstrap draws over prompts that select each edge; None without.
        about: how it was found, as plain values.
    """

    graph: Graph
    kept: Tensor
    scores: Tensor | None = None
    inclusion: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, edges: list[str]) -> "Circuit":
        """From the names of edges. Raises UserError for one that the graph cannot have."""
        return cls(graph, graph.chosen(edges))

    def __len__(self) -> int:
        return int(self.kept.sum())

    @cached_property
    def edges(self) -> list[str]:
        """Names of the edges, in the graph's order."""
        return [self.graph.edge_name(int(edge)) for edge in self.kept.nonzero().flatten()]

    @cached_property
    def nodes(self) -> list[str]:
        """Names of the sources with an edge in or out, in the order of the forward pass; `logits` last if reached."""
        present = self.graph.mask_of(self.kept)
        used = present.any(0)
        for i, destination in enumerate(self.graph.destinations):
            if present[i].any():
                used[list(destination.feeds)] = True
        named = [source.name for source, is_used in zip(self.graph.sources, used.tolist(), strict=True) if is_used]
        return [*named, "logits"] if bool(present[-1].any()) else named

    @property
    def writers(self) -> set[str]:
        """Names of the sources that write along an edge of the circuit."""
        return {self.graph.sources[i].name for i in self.graph.edges[self.kept][:, 1].unique().tolist()}

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that write along an edge of the circuit."""
        sources = self.graph.edges[self.kept][:, 1].unique().tolist()
        return [(s.layer, s.index) for s in (self.graph.sources[i] for i in sources) if s.kind == "head"]

    @property
    def mask(self) -> Tensor:
        """`[destination source place]` 1 where an edge is kept."""
        return self.graph.mask(self.kept)

    def run(self, text: Input, corrupted: Input | None = None, ablation: Ablation | str | None = None) -> Tensor:
        """The circuit's own logits `[prompt pos d_vocab]`: in the run of `text` every edge outside of it is ablated,
        whichever direction it was found in.

        Args:
            text: the prompts.
            corrupted: prompts of the same lengths, whose activations cut edges carry; needed for "resample" and means.
            ablation: values along cut edges; by default those that the circuit was found with.

        Raises:
            UserError: no corrupted prompts where they are needed, or other lengths.
        """
        asked = Ablation.described(self.about, ablation)
        model = self.graph.model
        clean = model.to_prompts(text)
        if corrupted is None and asked.kind in ("resample", "mean"):
            raise UserError(
                f"cut edges of this circuit carry the corrupted run's activations (ablation {asked.kind!r}): give "
                "corrupted=, prompts of the same lengths, or ablation='zero'"
            )
        other = clean if corrupted is None else model.to_prompts(corrupted)
        if clean.tokens.shape != other.tokens.shape or not torch.equal(clean.real.cpu(), other.real.cpu()):
            raise UserError(
                f"text is {tuple(clean.tokens.shape)} tokens, corrupted {tuple(other.tokens.shape)}: pair them"
            )
        answers = Answers.build([[Target(clean.n_pos - 1, {0: 1.0}, {0: 1.0})]] * len(clean))
        pairs = PromptPairs("run", "given", clean, other, answers)
        engine = Engine(self.graph, pairs, asked, read=Read())
        return engine.logits(self.mask[None])[0]

    def to_frame(self) -> pd.DataFrame:
        """One row an edge: name, source, destination, score and inclusion probability."""
        chosen = self.kept.nonzero().flatten()
        triples = self.graph.edges[chosen].tolist()
        frame = {
            "edge": self.edges,
            "source": [self.graph.sources[u].name for _, u, _ in triples],
            "destination": [self.graph.destinations[v].name for v, _, _ in triples],
        }
        if self.scores is not None:
            frame["score"] = self.scores[chosen].tolist()
        if self.inclusion is not None:
            frame["inclusion"] = self.inclusion[chosen].tolist()
        return pd.DataFrame(frame)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The edges of largest |score|."""
        frame = self.to_frame()
        if "score" in frame:
            frame = frame.iloc[frame["score"].abs().argsort(kind="stable")[::-1]]
        return frame.head(n).reset_index(drop=True)

    def figure(self) -> "go.Figure":
        """The graph, layers from bottom to top."""
        from mechinterp.reporting.sections.circuits import circuit_figure  # drawing lies above: only this reaches up

        return circuit_figure(self)

    def summary(self) -> str:
        """One line: how many edges, nodes and heads."""
        share = len(self) / self.graph.n_edges
        found = f", found by {self.about['method']} on {self.about['task']}" if "method" in self.about else ""
        return (
            f"{len(self)} of {self.graph.n_edges} edges ({share:.1%}), {len(self.nodes)} nodes, {len(self.heads)} heads"
            f"{found}"
        )

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.top(10).to_string(index=False, float_format='%.3g')}"
