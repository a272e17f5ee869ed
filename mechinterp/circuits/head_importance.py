"""Head importance scores: how much the metric changes, to first order, as a head goes to its ablation value.

Michel, Levy & Neubig 2019, "Are sixteen heads really better than one?"; the "head importance score for pruning" of
Conmy et al. 2023, "Towards automated circuit discovery for mechanistic interpretability".

1. With Δ_u = a_u − s_u, the first-order change of the metric is ⟨Δ_u, ∂m/∂s_u⟩, and ∂m/∂s_u is the sum of the gradients
   at the inputs of everything that reads u: one forward and one backward give all of them.
2. Its absolute value is averaged over prompts, so that effects of opposite sign do not cancel.
3. Averages are divided by the ℓ2 norm of their group, because gradients have another scale in every layer. The heads
   (or neurons) of a layer are a group. What there is one of in a layer is normalised across layers: the embedding and
   the MLPs are one group; where a layer's attention is one source, so are these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.methods import Method, along_edges


@dataclass(frozen=True)
class HeadImportance(Method):
    """Head importance scores, normalised within layers: magnitudes, 0 and up, of no sign.

    The mean over prompts of a group has ℓ2 norm 1; a prompt's scores are its absolute values over the norm of the
    mean. That norm is taken in a pass of its own, so that no prompt's values are kept: two forwards and backwards a
    prompt. What 1 means differs between groups: heads of two layers are compared by their share in their own.
    """

    name: ClassVar[str] = "hisp"
    level: ClassVar[Literal["edge", "node"]] = "node"
    at_base: ClassVar[bool] = True

    @property
    def reads_labels(self) -> bool:
        return False  # magnitudes, prompt by prompt

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        self.check(engine)
        graph = engine.graph
        total = torch.zeros(graph.n_nodes)
        with tqdm(total=len(engine), desc="norms", unit="prompt", disable=not engine.progress, leave=False) as bar:
            for index, each in _magnitudes(engine):
                total += each.sum(0)
                bar.update(len(index))
        group = groups(graph)
        squares = torch.zeros(int(group.max()) + 1).index_add_(0, group, (total / len(engine)).square())
        norm = squares.sqrt()[group]
        for index, each in _magnitudes(engine):
            yield index, torch.where(norm > 0, each / norm, 0.0)


def _magnitudes(engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """`[batch]` prompts and `[batch node]` absolute first-order change of the metric."""
    for part in engine.parts():
        yield part.index, by_node(engine.graph, along_edges(part, part.gradients()[0])).abs().float().cpu()


def by_node(graph: Graph, scores: Tensor) -> Tensor:
    """`[batch node]` sums over the edges out of each node, from `[batch edge]`.

    A node's gradient is the sum of those at all that read it, so the sum of its edges' first-order changes is its own.
    """
    made = scores.new_zeros(len(scores), graph.n_nodes)
    return made.index_add_(1, graph.node_of.to(scores.device), scores)


def groups(graph: Graph) -> Tensor:
    """`[node]` number of the group that a node is normalised in."""
    kinds: dict[tuple[str, int], int] = {}
    made = []
    for source in graph.sources:
        if source.kind in ("head", "neuron"):
            key = (source.kind, source.layer)
        else:
            key = ("attention" if source.kind == "attention" else "mlp", -1)
        made += [kinds.setdefault(key, len(kinds))] * len(graph.places)
    return torch.tensor(made)
