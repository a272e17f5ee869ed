"""The graph of a transformer: what writes into the residual stream, what reads from it, and the edges between them.

1. *Sources* write: the embedding, every head (what it adds through W_O), every MLP (or each of its neurons). Biases
   are constants and always kept. Where a norm stands between attention and the residual stream (Gemma-2, -3) heads do
   not add up behind it, so a layer's attention is one source there.
2. *Destinations* read: the queries of every head, the keys and the values of every key/value group, every MLP, the
   logits. Under grouped-query attention the heads of a group share their keys and values: separate inputs
   (`qkv="ungrouped"`) are offered, but the model has no such thing. `qkv="merged"` gives a group one input for all.
3. Sources are in the order in which they write, so a destination reads a prefix of them: everything before its layer,
   and for an MLP its own layer's heads, unless attention and MLP are parallel (GPT-NeoX, GPT-J).
4. With `positions` an edge exists once at each position ("all") or role ("roles").

Names: sources `embed`, `a5.h3` (`a5` where heads do not add up), `m5`, `m5.n17`; destinations `a9.h6<q>`, `a9.h6<k>`
(`a9.kv2<k>` where groups have several heads), `m9`, `logits`; edges `a5.h3->a9.h6<q>`, and `a5.h3->a9.h6<q>@END`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.forward import Plan, call_bridge
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.tasks.pairs import PromptPairs

QKV = Literal["kv_group", "ungrouped", "merged"]
Mlp = Literal["layer", "neuron"]
Input = Literal["q", "k", "v", "qkv", "mlp", "logits"]
REST = "rest"  # the place of every position that has no role


@dataclass(frozen=True)
class Source:
    """What writes. `kind` is "embed", "head", "attention" (a whole layer's, behind a norm), "mlp" or "neuron"; `index`
    is the head or neuron."""

    name: str
    kind: str
    layer: int
    index: int = 0


@dataclass(frozen=True)
class Destination:
    """What reads.

    Attributes:
        name: such as `a9.h6<q>`.
        input: which of its node's inputs it is.
        layer: n_layers for the logits.
        index: head, or key/value group.
        n_sources: the first so many sources are read.
        feeds: the sources that it is an input of; none for the logits.
    """

    name: str
    input: Input
    layer: int
    index: int
    n_sources: int
    feeds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """Sources, destinations and edges of a model.

    Masks are `[destination source place]`; edges are numbered along the valid entries of a mask, in that order.

    Attributes:
        model: the hooked model.
        qkv: inputs of attention: "kv_group" as the model has them, "ungrouped" one key and value input for each query
            head, "merged" one input for each group.
        mlp: whether an MLP is one source, or each of its neurons.
        positions: False, "all" (prompts of one length) or "roles".
        places: the positions or roles; known once the graph is laid on prompts (`at`).

    Raises:
        UserError: an unknown option.
    """

    model: HookedModel
    qkv: QKV = "kv_group"
    mlp: Mlp = "layer"
    positions: Literal[False, "all", "roles"] = False
    places: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        for name, valid in (
            ("qkv", ("kv_group", "ungrouped", "merged")),
            ("mlp", ("layer", "neuron")),
            ("positions", (False, "all", "roles")),
        ):
            if getattr(self, name) not in valid:
                raise UserError(f"Graph: unknown {name}={getattr(self, name)!r}; valid: {', '.join(map(repr, valid))}")
        if self.mlp == "neuron" and any(site.name == "ln2_post_scale" for site in self.model.site_list):
            raise UserError(
                f"Graph: neurons do not add up in {self.model.info.name}: a norm follows its MLPs. Valid: mlp='layer'"
            )

    def __repr__(self) -> str:
        return (
            f"Graph({self.model.info.name}: {len(self.sources)} sources, {len(self.destinations)} destinations, "
            f"{self.n_edges} edges, qkv={self.qkv!r}, mlp={self.mlp!r}, positions={self.positions!r})"
        )

    # Structure

    @cached_property
    def has_mlp(self) -> bool:
        """Whether the model has MLPs at all."""
        return any(site.name == "mlp_out" for site in self.model.site_list)

    @cached_property
    def heads_add_up(self) -> bool:
        """Whether a head's output can be told apart in the residual stream: no norm follows attention."""
        return not any(site.name == "ln1_post_scale" for site in self.model.site_list)

    @cached_property
    def parallel(self) -> bool:
        """Whether the MLP reads what attention reads, and so does not see its own layer's heads; measured."""
        model, read, before = self.model, Site("mlp_in", 0), Site("resid_pre", 0)
        kept: dict[str, Tensor] = {}

        def disturb(out: Tensor, rows: Rows) -> Tensor:
            return out + torch.linspace(-1, 2, out.numel(), device=out.device).reshape(out.shape)

        prompts = Prompts(torch.zeros(1, 2, dtype=torch.long, device=model.device))
        plan = Plan.of(model, [], [read, before], kept, {Site("attn_out", 0).hook_name: disturb})
        with plan.installed(Rows.all(prompts)):
            call_bridge(model, prompts)
        return torch.equal(kept[read.hook_name], kept[before.hook_name])

    @cached_property
    def n_neurons(self) -> int:
        """Width of an MLP."""
        return self.model.width(Site("mlp_post", 0))

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """In the order in which they write."""
        made = [Source("embed", "embed", -1)]
        for layer in range(self.model.n_layers):
            if self.heads_add_up:
                made += [Source(f"a{layer}.h{head}", "head", layer, head) for head in range(self.model.n_heads)]
            else:
                made.append(Source(f"a{layer}", "attention", layer))
            if self.has_mlp and self.mlp == "layer":
                made.append(Source(f"m{layer}", "mlp", layer))
            elif self.has_mlp:
                made += [Source(f"m{layer}.n{index}", "neuron", layer, index) for index in range(self.n_neurons)]
        return tuple(made)

    @cached_property
    def destinations(self) -> tuple[Destination, ...]:
        """In the order in which they read."""
        made = [one for layer in range(self.model.n_layers) for one in self._of_layer(layer)]
        return (*made, Destination("logits", "logits", self.model.n_layers, 0, len(self.sources), ()))

    def _of_layer(self, layer: int) -> list[Destination]:
        before = next(i for i, s in enumerate(self.sources) if s.layer == layer)
        heads = [i for i, s in enumerate(self.sources) if s.layer == layer and s.kind in ("head", "attention")]
        mlp = tuple(i for i, s in enumerate(self.sources) if s.layer == layer and s.kind in ("mlp", "neuron"))
        size = self.model.n_heads // self.model.n_kv_heads

        def fed(members: range) -> tuple[int, ...]:
            return tuple(heads[head] for head in members) if self.heads_add_up else tuple(heads)

        made, parallel = [], self.has_mlp and self.parallel
        if self.qkv != "merged":
            made += [
                Destination(f"a{layer}.h{head}<q>", "q", layer, head, before, fed(range(head, head + 1)))
                for head in range(self.model.n_heads)
            ]
        for name in ("qkv",) if self.qkv == "merged" else ("k", "v"):
            single = self.qkv == "ungrouped" or size == 1
            for group in range(self.model.n_heads if single else self.model.n_kv_heads):
                members = range(group, group + 1) if single else range(group * size, (group + 1) * size)
                node = f"a{layer}.{'h' if single else 'kv'}{group}"
                made.append(Destination(f"{node}<{name}>", name, layer, group, before, fed(members)))  # type: ignore[arg-type]
        if self.has_mlp:
            n_sources = before if parallel else before + len(heads)
            made.append(Destination(f"m{layer}", "mlp", layer, 0, n_sources, mlp))
        return made

    @cached_property
    def source_index(self) -> Mapping[str, int]:
        """Source by name."""
        return {source.name: i for i, source in enumerate(self.sources)}

    @cached_property
    def destination_index(self) -> Mapping[str, int]:
        """Destination by name."""
        return {destination.name: i for i, destination in enumerate(self.destinations)}

    @cached_property
    def vector_row(self) -> Tensor:
        """`[source]` its row among the sources that are kept as vectors of d_model: all but neurons, which get -1."""
        vector = torch.tensor([source.kind != "neuron" for source in self.sources])
        return torch.where(vector, vector.cumsum(0) - 1, -1)

    # Edges

    @cached_property
    def valid(self) -> Tensor:
        """`[destination source place]` bool: the edges that exist."""
        prefix = torch.tensor([destination.n_sources for destination in self.destinations])
        exists = torch.arange(len(self.sources)) < prefix[:, None]
        return exists[..., None].expand(-1, -1, len(self.places))

    @property
    def n_edges(self) -> int:
        """Edges, counted once at each place."""
        return int(self.valid.sum())

    @cached_property
    def edges(self) -> Tensor:
        """`[edge 3]`: destination, source and place of every edge."""
        return self.valid.nonzero()

    def edge_name(self, edge: int) -> str:
        """`a5.h3->a9.h6<q>`, with `@place` where there are places."""
        destination, source, place = self.edges[edge].tolist()
        return f"{self.sources[source].name}->{self.destinations[destination].name}{self._at(place)}"

    def _at(self, place: int) -> str:
        return f"@{self.places[place]}" if self.positions else ""

    @cached_property
    def _number(self) -> Tensor:
        """`[destination source place]` number of each edge, -1 where there is none."""
        number = torch.full(self.valid.shape, -1)
        number[self.valid] = torch.arange(self.n_edges)
        return number

    def edge(self, name: str) -> int:
        """Number of an edge by its name.

        Raises:
            UserError: a node or place that the graph does not have, or a source that comes after the destination.
        """
        text, _, place = name.partition("@")
        ends = text.split("->")
        if len(ends) != 2:
            raise UserError(f"an edge is written source->destination, such as embed->logits; found {name!r}")
        found = [ends[0] in self.source_index, ends[1] in self.destination_index, place in self.places]
        if not all(found):
            what, valid = [
                (f"source {ends[0]!r}", self.source_index),
                (f"destination {ends[1]!r}", self.destination_index),
                (f"place {place!r}", self.places),
            ][found.index(False)]
            some = list(valid)
            shown = ", ".join(some if len(some) <= 12 else [*some[:6], "…", *some[-4:]])
            raise UserError(f"edge {name!r}: this graph has no {what}; it has: {shown}")
        source, destination = self.source_index[ends[0]], self.destination_index[ends[1]]
        number = int(self._number[destination, source, self.places.index(place)])
        if number < 0:
            raise UserError(f"edge {name!r} cannot exist: {ends[0]} writes after {ends[1]} has read")
        return number

    def chosen(self, edges: Iterable[str | int]) -> Tensor:
        """`[edge]` bool from names or numbers of edges."""
        chosen = torch.zeros(self.n_edges, dtype=torch.bool)
        for edge in edges:
            chosen[self.edge(edge) if isinstance(edge, str) else edge] = True
        return chosen

    def mask(self, kept: Tensor) -> Tensor:
        """`[… destination source place]` float mask from `[… edge]`; entries without an edge are 1 (nothing is cut)."""
        mask = torch.ones(*kept.shape[:-1], *self.valid.shape, device=kept.device)
        mask[..., self.valid.to(kept.device)] = kept.to(mask.dtype)
        return mask

    def gather(self, values: Tensor) -> Tensor:
        """`[… edge]` from values `[… destination source place]`."""
        return values[..., self.valid.to(values.device)]

    @property
    def n_nodes(self) -> int:
        """Sources, counted once at each place: what is kept or ablated whole at the level of nodes."""
        return len(self.sources) * len(self.places)

    @cached_property
    def node_of(self) -> Tensor:
        """`[edge]` the node that each edge comes out of: source · places + place."""
        return self.edges[:, 1] * len(self.places) + self.edges[:, 2]

    def nodes_of(self, kept: Tensor) -> Tensor:
        """`[node]` bool: whether one of the edges that are kept, `[edge]` bool, comes out of it."""
        return torch.bincount(self.node_of[kept], minlength=self.n_nodes) > 0

    def node_name(self, node: int) -> str:
        """`a5.h3`, with `@place` where there are places."""
        source, place = divmod(node, len(self.places))
        return f"{self.sources[source].name}{self._at(place)}"

    def prune(self, kept: Tensor) -> Tensor:
        """`[edge]` without dead edges: those on no path from the embedding to the logits through edges that are kept.

        Removing them changes nothing that a circuit can carry from the input, and makes circuits of one size
        comparable. A head is reached through any one of its inputs. Places are not told apart on a path: attention
        moves information between them.
        """
        present = self.mask_of(kept)
        feeds = self.feeds
        reached = torch.zeros(len(self.sources), dtype=torch.bool)
        reached[0] = True
        for i, destination in enumerate(self.destinations):
            if destination.feeds and bool((present[i] & reached).any()):
                reached[list(destination.feeds)] = True
        useful = torch.zeros(len(self.destinations), dtype=torch.bool)
        useful[-1] = True
        leads = present[-1].clone()  # by source: whether it leads to the logits
        for i in range(len(self.destinations) - 2, -1, -1):
            useful[i] = bool((feeds[i] & leads).any())
            if useful[i]:
                leads |= present[i]
        alive = useful[:, None] & reached[None, :]
        return kept & alive[self.edges[:, 0], self.edges[:, 1]]

    def mask_of(self, kept: Tensor) -> Tensor:
        """`[destination source]` bool: whether an edge is kept at any place."""
        present = torch.zeros(self.valid.shape, dtype=torch.bool)
        present[self.valid] = kept.cpu()
        return present.any(-1)

    @cached_property
    def feeds(self) -> Tensor:
        """`[destination source]` bool: the sources that a destination is an input of."""
        feeds = torch.zeros(len(self.destinations), len(self.sources), dtype=torch.bool)
        for i, destination in enumerate(self.destinations):
            feeds[i, list(destination.feeds)] = True
        return feeds

    # On prompts

    def at(self, pairs: PromptPairs) -> "Graph":
        """The same graph with its places named by these prompts.

        Raises:
            UserError: positions="all" on prompts of several lengths, or "roles" on prompts without roles.
        """
        if not self.positions:
            return self
        if self.positions == "all":
            if pairs.clean.mask is not None:
                raise UserError("positions='all' needs prompts of one length; found several. Valid: 'roles', False")
            places = tuple(str(pos) for pos in range(pairs.clean.n_pos))
        else:
            if not pairs.clean.roles:
                raise UserError("positions='roles' needs prompts with roles; found none. Valid: 'all', False")
            places = (*pairs.clean.roles, REST)
        if self.places not in (("",), places):
            raise UserError(f"the graph is laid on {', '.join(self.places)}; these prompts have {', '.join(places)}")
        return replace(self, places=places)

    def place_of(self, pairs: PromptPairs) -> Tensor:
        """`[prompt pos]` number of the place of each position."""
        prompts = pairs.clean
        if not self.positions:
            return torch.zeros(prompts.tokens.shape, dtype=torch.long)
        if self.positions == "all":
            return torch.arange(prompts.n_pos).expand(len(prompts), -1)
        place = torch.full(prompts.tokens.shape, len(self.places) - 1)
        for number, role in enumerate(self.places[:-1]):  # a later role wins where two share a position
            place[prompts.at_role(role).cpu()] = number
        return place
