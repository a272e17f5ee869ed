"""Random components like those that are knocked out: the control of every knock-out.

The claim is that *these* components matter. Its null: as many of the same kind, drawn from the same layers, knocked
out in the same way at the same positions. Heads and neurons are drawn from their own layer, and from other layers only
where it has none left; an MLP has no other in its layer. For an edge the heads and the query stay, and each prompt's
key becomes another token that the query sees.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechinterp.ablation.components import Components, Edge
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.pairs import PromptPairs

# Sets are drawn anew where they were drawn before, so many times at most for each that is wanted.
TRIES = 20


@dataclass(frozen=True)
class Control:
    """Random sets, all different, and in words what they are."""

    sets: tuple[Components, ...]
    note: str


def random_like(
    model: HookedModel, pairs: PromptPairs, components: Components, draws: int, seed: int, ordered: bool = False
) -> Control:
    """Up to `draws` different sets of random components, the i-th head of a set like the i-th of `components`.

    Fewer where the layers have no more (a layer of 9 heads has 8 others), none where the model has nothing else. With
    `ordered` two orders of the same heads are different sets.
    """
    draw, seen, elsewhere = random.Random(seed), dict[Components, Components](), set[str]()
    for _ in range(TRIES * draws):
        made = _random_set(model, pairs, components, draw, elsewhere)
        if made is None or len(seen) == draws:
            break
        seen.setdefault(made if ordered else replace(made, heads=tuple(sorted(made.heads))), made)
    if not seen:
        return Control((), "none" if draws < 1 else "none: the model has no other components to draw")
    kinds = [name for name in ("heads", "neurons", "mlps", "edges") if getattr(components, name)]
    words = {
        "heads": "heads of the same layers" + (" (and of others: a layer had too few)" if "heads" in elsewhere else ""),
        "neurons": "neurons of the same layers" + (" (and of others)" if "neurons" in elsewhere else ""),
        "mlps": "MLPs of other layers",
        "edges": "other keys of the same heads and queries",
    }
    return Control(
        tuple(seen.values()), f"{len(seen)} random sets: as many " + ", ".join(words[kind] for kind in kinds)
    )


def _random_set(
    model: HookedModel,
    pairs: PromptPairs,
    components: Components,
    draw: random.Random,
    elsewhere: set[str],
) -> Components | None:
    """One draw; None where there is nothing left to draw. Kinds that other layers had to help out go to `elsewhere`."""
    heads = _matched(components.heads, {layer: range(model.n_heads) for layer in range(model.n_layers)}, draw)
    present = [site.layer or 0 for site in model.site_list if site.name == "mlp_out"]
    width = (
        {s.layer or 0: model.width(s) for s in model.site_list if s.name == "mlp_post"} if components.neurons else {}
    )
    neurons = _matched(components.neurons, {layer: range(n) for layer, n in width.items()}, draw)
    left = [layer for layer in present if layer not in components.mlps]
    edges = [_other_key(pairs, edge, draw) for edge in components.edges]
    if heads is None or neurons is None or len(left) < len(components.mlps) or None in edges:
        return None
    for name, chosen in (("heads", heads), ("neurons", neurons)):
        if sorted(layer for layer, _ in chosen) != sorted(layer for layer, _ in getattr(components, name)):
            elsewhere.add(name)
    mlps = draw.sample(left, len(components.mlps))
    return Components(tuple(heads), tuple(sorted(mlps)), tuple(neurons), tuple(edge for edge in edges if edge))


def _matched(
    wanted: Sequence[tuple[int, int]], every: dict[int, range], draw: random.Random
) -> list[tuple[int, int]] | None:
    """For each (layer, index) another one of that layer, or of any where none is left; None if the model has none."""
    taken = set(wanted)
    chosen = []
    for layer, _ in wanted:
        free = [(layer, index) for index in every[layer] if (layer, index) not in taken]
        free = free or [(at, index) for at, all_of in every.items() for index in all_of if (at, index) not in taken]
        if not free:
            return None
        chosen.append(draw.choice(free))
        taken.add(chosen[-1])
    return chosen


def _other_key(pairs: PromptPairs, edge: Edge, draw: random.Random) -> Edge | None:
    """The edge with another key in every prompt, drawn from the tokens up to the query; None if one prompt has none."""
    prompts = pairs.clean
    padding = prompts.padding.tolist()
    query, key = (prompts.select(place).int().argmax(-1).tolist() for place in (edge.query, edge.key_positions))
    keys = []
    for prompt, start in enumerate(padding):
        others = [at - start for at in range(start, query[prompt] + 1) if at != key[prompt]]
        if not others:
            return None
        keys.append(draw.choice(others))
    return Edge(edge.heads, edge.query, tuple(keys), edge.everywhere)
