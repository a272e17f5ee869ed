"""What is knocked out: heads, MLPs, neurons and edges of attention, by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Positions
from mechinterp.hooked.sites import Site
from mechinterp.tasks.pairs import PromptPairs

Head = tuple[int, int]
EdgeLike = tuple[Head | None, str | int, str | int]


@dataclass(frozen=True)
class Edge:
    """Attention of heads from one position to another.

    Attributes:
        heads: (layer, head) of each.
        query, key: a role or an index; a key may also be one index for each prompt.
        everywhere: whether the heads are all of the model's.
    """

    heads: tuple[Head, ...]
    query: str | int
    key: str | int | tuple[int, ...]
    everywhere: bool = False

    @property
    def key_positions(self) -> Positions:
        """The keys, as `Prompts.select` takes them."""
        return torch.tensor(self.key) if isinstance(self.key, tuple) else self.key

    def __str__(self) -> str:
        heads = "all heads" if self.everywhere else " ".join(f"L{layer}H{head}" for layer, head in self.heads)
        return f"{heads} {self.query}→{self.key}"


@dataclass(frozen=True)
class Components:
    """A set of components that are knocked out together. Layers are counted from 0.

    Attributes:
        heads, neurons: (layer, index) of each.
        mlps: layers.
        edges: of attention.
    """

    heads: tuple[Head, ...] = ()
    mlps: tuple[int, ...] = ()
    neurons: tuple[tuple[int, int], ...] = ()
    edges: tuple[Edge, ...] = ()

    @classmethod
    def of(
        cls,
        model: HookedModel,
        pairs: PromptPairs,
        heads: Sequence[Head] = (),
        mlps: Sequence[int] = (),
        neurons: Sequence[tuple[int, int]] = (),
        edges: Sequence[EdgeLike] = (),
    ) -> "Components":
        """Resolved on a model and a task.

        Raises:
            UserError: nothing at all, something twice, something that the model does not have or cannot change, or an
                edge between positions that not every prompt has.
        """
        made = cls(
            tuple(_indexed(model, "z", one) for one in heads),
            tuple(model.resolve(Site("mlp_out", layer), write=True).layer or 0 for layer in mlps),
            tuple(_indexed(model, "mlp_post", one) for one in neurons),
            tuple(_edge(model, pairs, one) for one in edges),
        )
        if made == cls():
            raise UserError(
                "nothing to knock out: the lists are empty. Valid: heads=[(layer, head), …], mlps=[layer, …], "
                "neurons=[(layer, index), …], edges=[((layer, head), 'END', 'IO'), …]"
            )
        twice = [label for label in made.labels if made.labels.count(label) > 1]
        if twice:
            raise UserError(f"{twice[0]} is named {len(twice)} times; a component can be knocked out once")
        return made

    @property
    def labels(self) -> list[str]:
        """`L9H6`, `m3`, `L3N17`, `L9H6 END→IO`."""
        heads = [f"L{layer}H{head}" for layer, head in self.heads]
        neurons = [f"L{layer}N{index}" for layer, index in self.neurons]
        return [*heads, *(f"m{layer}" for layer in self.mlps), *neurons, *map(str, self.edges)]

    def __str__(self) -> str:
        return "+".join(self.labels) or "nothing"

    @property
    def sites(self) -> list[Site]:
        """Sites of the heads, MLPs and neurons, one for each hook point."""
        heads = [Site("z", layer, head=_one(index)) for layer, index in by_layer(self.heads).items()]
        neurons = [Site("mlp_post", layer, neuron=_one(index)) for layer, index in by_layer(self.neurons).items()]
        return [*heads, *(Site("mlp_out", layer) for layer in self.mlps), *neurons]


def by_layer(pairs: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Layer -> indices, from (layer, index)."""
    return {at: tuple(index for layer, index in pairs if layer == at) for at in dict.fromkeys(at for at, _ in pairs)}


def _one(index: tuple[int, ...]) -> int | tuple[int, ...]:
    """A single index as such, so that its site prints as `L9H6`."""
    return index[0] if len(index) == 1 else index


def _indexed(model: HookedModel, name: str, one: tuple[int, int]) -> tuple[int, int]:
    """(layer, head) or (layer, neuron), with the layer counted from 0."""
    what = "neuron" if name == "mlp_post" else "head"
    if not isinstance(one, Sequence) or len(one) != 2:
        raise UserError(f"a {what} is (layer, {what}), such as (3, 1); found {one!r}")
    layer, index = one
    site = Site(name, layer, neuron=index) if what == "neuron" else Site(name, layer, head=index)
    return model.resolve(site, write=True).layer or 0, int(index)


def _edge(model: HookedModel, pairs: PromptPairs, one: EdgeLike) -> Edge:
    if not isinstance(one, Sequence) or len(one) != 3:
        raise UserError(f"an edge is (head or None, query, key), such as ((9, 6), 'END', 'IO'); found {one!r}")
    head, query, key = one
    every = [(layer, at) for layer in range(model.n_layers) for at in range(model.n_heads)]
    edge = Edge(tuple(_indexed(model, "pattern", at) for at in ([head] if head else every)), query, key, head is None)
    for place in (query, key):
        require_role(pairs, place)
    last, first = (pairs.clean.select(place).int().argmax(-1) for place in (query, key))
    ahead = (first > last).nonzero().flatten().tolist()
    if ahead:
        raise UserError(
            f"edge {edge}: {key} comes after {query} in {len(ahead)} of {len(pairs)} prompts (the first: prompt "
            f"{ahead[0]}), and attention does not look ahead"
        )
    return edge


def require_role(pairs: PromptPairs, place: str | int) -> None:
    """Raise UserError if `place` is a role that these pairs, or some of their prompts, do not have."""
    if isinstance(place, int):
        return
    if place not in pairs.roles:
        raise UserError(f"unknown role {place!r}; roles of these pairs: {', '.join(pairs.roles) or 'none'}")
    lacking = (pairs.clean.roles[place] < 0).nonzero().flatten().tolist()
    if lacking:
        whole = [name for name, at in pairs.clean.roles.items() if bool((at >= 0).all())]
        raise UserError(
            f"{len(lacking)} of {len(pairs)} prompts have no role {place!r} (the first: prompt {lacking[0]}); every "
            f"prompt has: {', '.join(whole) or 'none'}"
        )
