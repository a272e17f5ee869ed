"""Multiply-adds of the matmuls that each side of circuits.py does, and the least that could do it.

Norms, softmax and activations are left out. With d = d_model, h query heads and g key/value heads of d_head, a token in
a block costs B = 2·d·(h·d_head) + 2·d·(g·d_head) + (2, or 3 if gated)·d·d_mlp, attention 2·h·d_head for each (query,
key), unembedding d·V. A backward with respect to activations costs as much as its forward, in attention twice as much;
weights take no gradient.

*Others* run whole rows of P positions with all P keys (padding included) and all logits, and mix or score with a
multiply-add for each edge, position and dimension.
*Least*: real positions only, from the first one that differs on where the prompts have been recorded, and each query
with the keys up to its own; 2·d for the logit difference.
- EAP-IG: the two recorded runs, a forward and a backward a step, E·P·d once.
- a circuit: only nodes that are in it and inputs that an edge of it reaches; each input mixes from its kept or its cut
  edges, whichever are fewer.
- an exact edge: its input's projection, one head's attention and its output, the MLP, and whole blocks from there on.
- EAP: a forward of either side, a backward, E·P·d.
"""

import torch
from measure import timed
from torch import Tensor

from mechinterp.circuits.graph import Destination, Graph
from mechinterp.tasks.pairs import PromptPairs


def rate() -> float:
    """Multiply-adds a second of a large matmul on this machine, the best of some: no matmul will be faster."""
    one, two = torch.rand(2, 1024, 1024)
    return 1024**3 / min(timed(lambda: one @ two)[0] for _ in range(6))


class Work:
    """Multiply-adds of the other side, and the least, on a graph and pairs."""

    def __init__(self, graph: Graph, pairs: PromptPairs):
        model, config = graph.model, graph.model.bridge.cfg
        self.graph, self.layers, self.d, self.d_head = graph, model.n_layers, model.d_model, model.d_head
        self.heads, self.vocab = model.n_heads, model.d_vocab
        self.mlp = (3 if getattr(config, "gated_mlp", False) else 2) * self.d * graph.n_neurons
        self.block = 2 * self.d * self.d_head * (self.heads + model.n_kv_heads) + self.mlp
        self.width, self.n = pairs.clean.n_pos, len(pairs)
        differs = pairs.clean.tokens != pairs.corrupted.tokens
        first, pads = differs.int().argmax(-1).tolist(), pairs.clean.padding.tolist()
        self.spans = [(0, self.width - pad, at - pad) for at, pad in zip(first, pads, strict=True)]

    def row(self, layers: int) -> int:
        """Of `layers` blocks on a whole row, as the others run them."""
        return layers * (self.width * self.block + 2 * self.heads * self.d_head * self.width**2)

    def whole(self) -> int:
        """Forward of a whole row with all logits."""
        return self.row(self.layers) + self.width * self.d * self.vocab

    def back(self) -> int:
        """Backward of the same."""
        return self.whole() + self.layers * 2 * self.heads * self.d_head * self.width**2

    @staticmethod
    def keys(start: int, stop: int) -> int:
        """(query, key) pairs of positions start … stop − 1."""
        return (stop * (stop + 1) - start * (start + 1)) // 2

    def least(self, layers: int, start: int, stop: int, backward: bool = False) -> int:
        """Blocks on positions start … stop − 1."""
        attention = 2 * self.heads * self.d_head * self.keys(start, stop) * (2 if backward else 1)
        return layers * ((stop - start) * self.block + attention)

    def recorded(self) -> int:
        """Both sides of all prompts, without unembedding."""
        return sum(2 * self.least(self.layers, start, stop) for start, stop, _ in self.spans)

    def eap_ig(self, steps: int) -> tuple[int, int]:
        """EAP-IG's own code, and the least."""
        edges = self.graph.n_edges * self.d
        other = self.n * (2 * self.whole() + steps * (self.whole() + self.back() + edges * self.width))
        least = self.recorded()
        for _, stop, at in self.spans:
            once = self.least(self.layers, at, stop) + self.least(self.layers, at, stop, backward=True) + 2 * self.d
            least += steps * once + edges * (stop - at)
        return other, least

    def grid(self, kept: Tensor) -> tuple[int, int]:
        """EAP-IG's own evaluation of circuits `[circuit edge]`, and the least."""
        other, least = 0, self.recorded()
        for one in kept:
            mixed = self.graph.n_edges * self.d * self.width
            other += self.n * (2 * self.whole() + (0 if bool(one.all()) else mixed))
            for _, stop, at in self.spans:
                least += self._circuit(self.graph.mask_of(one), stop - at, self.keys(at, stop))
        return other, least

    def _circuit(self, present: Tensor, tokens: int, keys: int) -> int:
        """The least that a circuit `[destination source]` costs on a prompt."""
        made, writes = 2 * self.d, present.any(0).tolist()
        for v, one in enumerate(self.graph.destinations):
            n_kept = int(present[v].sum())
            if n_kept:
                made += min(n_kept, one.n_sources - n_kept) * self.d * tokens
                made += {"mlp": self.mlp, "logits": 0}.get(one.input, self.d * self.d_head) * tokens
        n_heads = sum(source.kind == "head" and used for source, used in zip(self.graph.sources, writes, strict=True))
        return made + n_heads * (self.d * self.d_head * tokens + 2 * self.d_head * keys)

    def exact(self, edges: Tensor) -> tuple[int, int]:
        """A restart at the layer of each of these edges, all destinations mixed, and the least."""
        destinations = self.graph.destinations
        mixing = torch.zeros(self.layers + 1, dtype=torch.long)
        for one in destinations:
            mixing[: min(one.layer, self.layers - 1) + 1] += one.n_sources * self.d * self.width
        other = least = 0
        for v in self.graph.edges[edges, 0].tolist():
            layer = min(destinations[v].layer, self.layers - 1)
            again = self.row(self.layers - layer) + self.width * self.d * self.vocab + int(mixing[layer])
            other += self.n * again
            least += sum(self._edge(destinations[v], stop, at) for _, stop, at in self.spans)
        return other, least

    def _edge(self, one: Destination, stop: int, at: int) -> int:
        """The least that one patched input costs on a prompt."""
        if one.input == "logits":
            return 2 * self.d
        made = 2 * self.d + (stop - at) * self.mlp + self.least(self.layers - one.layer - 1, at, stop)
        if one.input != "mlp":
            made += 2 * (stop - at) * self.d * self.d_head + 2 * self.d_head * self.keys(at, stop)
        return made

    def eap(self) -> tuple[int, int]:
        """A plain forward and backward, and the least that EAP costs."""
        least = self.recorded()
        for _, stop, at in self.spans:
            least += self.least(self.layers, at, stop, backward=True) + self.graph.n_edges * self.d * (stop - at)
        return self.n * (self.whole() + self.back()), least
