"""ACDC: cut edges one after another, each beside all that were cut before (Conmy et al. 2023, "Towards automated
circuit discovery for mechanistic interpretability").

1. Begin with every edge. Go over the edges from the logits back to the embedding (or the other way round).
2. Cut an edge for good if that hurts by less than the threshold: noising, if the mean of the metric falls by less (the
   KL divergence rises by less); denoising, if it rises by less. An edge that holds the behaviour back is cut, whatever
   its size: with the logit difference the circuit may overshoot the model. KL has its minimum at the clean run, so with
   it such edges are kept.
3. A node with no outgoing edge left writes to nobody: its incoming edges are cut without a run.
4. With several thresholds there is a pass for each, and each begins with what the one before left. The score of an edge
   is the largest threshold at which it is still kept, 0 if there is none: scores rank edges, and selecting by
   `threshold=τ` gives the circuit of τ.

Whether an edge is cut depends on those before it, but most are cut: so the next k edges are tried in one call, circuit
j without the first j of them, as if all were cut. Everything up to the first refusal is then what single runs would
have given; k doubles while nothing is refused and halves when something is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.methods import Method, helps
from mechinterp.errors import UserError


@dataclass(frozen=True)
class ACDC(Method):
    """Automated circuit discovery: cut what can be cut, one edge after another.

    Attributes:
        threshold: what cutting an edge may cost, in the metric's unit; or a rising schedule.
        order: "reverse" from the logits to the embedding, as published; or "forward".
    """

    name: ClassVar[str] = "acdc"
    per_prompt: ClassVar[bool] = False
    threshold: float | tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    order: Literal["reverse", "forward"] = "reverse"

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.thresholds, self.thresholds[1:], strict=False))
        if not self.thresholds or self.thresholds[0] <= 0 or not rising:
            raise UserError(f"acdc needs one threshold above 0, or several that rise; found {self.threshold}")
        if self.order not in ("reverse", "forward"):
            raise UserError(f"acdc: unknown order {self.order!r}; valid: 'reverse', 'forward'")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each pass."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        kept = torch.ones(engine.graph.n_edges, dtype=torch.bool)
        scores = torch.zeros(engine.graph.n_edges)
        for threshold in self.thresholds:
            kept = self._sweep(engine, kept, threshold)
            scores[kept] = threshold
        yield torch.arange(len(engine)), scores[None]

    def _sweep(self, engine: Engine, kept: Tensor, threshold: float) -> Tensor:
        """`[edge]` what one pass leaves of the edges that are `kept`."""
        waiting = kept.nonzero().flatten()  # the graph's own order: by destination, as they read
        waiting = waiting.flip(0) if self.order == "reverse" else waiting
        hurt, width, widest = _hurt(engine, kept[None])[0], 1, max(1, engine.rows_per_call // len(engine))
        with tqdm(total=len(waiting), desc=f"acdc {threshold:g}", unit="edge", disable=not engine.progress) as bar:
            while len(waiting):
                tried = waiting[:width]
                circuits = kept.repeat(len(tried), 1)
                circuits[:, tried] = torch.ones(len(tried), len(tried)).triu(1).bool()  # the j-th has lost j + 1 edges
                hurts = _hurt(engine, circuits)
                refused = (hurts.diff(prepend=hurt[None]) >= threshold).nonzero().flatten().tolist()
                n_cut = refused[0] if refused else len(tried)
                if n_cut:
                    kept, hurt = _without_dead(engine.graph, circuits[n_cut - 1]), hurts[n_cut - 1]
                left = waiting[n_cut + bool(refused) :]
                left = left[kept[left]]
                width = max(1, width // 2) if refused else min(2 * width, widest)
                bar.update(len(waiting) - len(left))
                waiting = left
        return kept


def _hurt(engine: Engine, kept: Tensor) -> Tensor:
    """`[circuit]` the metric's mean over prompts, its sign turned so that a cut that matters makes it rise."""
    return helps(engine, engine.values(engine.graph.mask(kept))).double().mean(1)


def _without_dead(graph: Graph, kept: Tensor) -> Tensor:
    """`[edge]` without edges into nodes that have no outgoing edge left.

    Not `Graph.prune`: an edge that the embedding does not reach still has an effect where values are not resampled.
    """
    while True:
        writes = graph.mask_of(kept).any(0)
        alive = (graph.feeds & writes).any(1)
        alive[-1] = True  # the logits feed no source
        left = kept & alive[graph.edges[:, 0]]
        if torch.equal(left, kept):
            return kept
        kept = left
