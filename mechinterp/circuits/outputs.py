"""What every source of the graph writes into the residual stream, from recorded activations."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechinterp.circuits.graph import Graph
from mechinterp.hooked.sites import Site
from mechinterp.hooked.weights import mlp_out


@dataclass(frozen=True, eq=False)
class Outputs:
    """What sources write, constants aside.

    Attributes:
        vectors: `[source batch pos d_model]` of every source but neurons, in the graph's order.
        neurons: by layer, `[batch pos neuron]`, where the graph has neurons.
    """

    vectors: Tensor
    neurons: Mapping[int, Tensor] = field(default_factory=dict)


def sites(graph: Graph) -> list[Site]:
    """What is recorded to know every source's output, in the order of the sources."""
    made = [Site("resid_pre", 0)]
    for layer in range(graph.model.n_layers):
        made.append(Site("z" if graph.heads_add_up else "attn_out", layer))
        if graph.has_mlp:
            made.append(Site("mlp_out" if graph.mlp == "layer" else "mlp_post", layer))
    return made


def site_of(graph: Graph, source: int) -> Site:
    """Where a source's output is read and can be replaced: its head of `z`, its neuron, its MLP."""
    one = graph.sources[source]
    if one.kind == "embed":
        return Site("resid_pre", 0)
    if one.kind == "head":
        return Site("z", one.layer, head=one.index)
    if one.kind == "attention":
        return Site("attn_out", one.layer)
    return Site("mlp_out", one.layer) if one.kind == "mlp" else Site("mlp_post", one.layer, neuron=one.index)


def written(graph: Graph, site: Site, activation: Tensor) -> Tensor:
    """`[batch source pos d_model]` what the sources at a site write, from its activation `[batch pos …]`."""
    if site.name != "z":
        return activation[:, None]
    weight = graph.model.bridge.blocks[site.layer].attn.W_O
    batch, pos, head, d_head = activation.shape
    by_head = activation.permute(2, 0, 1, 3).reshape(head, batch * pos, d_head)
    return torch.bmm(by_head, weight.to(activation)).unflatten(1, (batch, pos)).transpose(0, 1)


def outputs(graph: Graph, activations: Mapping[str, Tensor], start: int = 0) -> Outputs:
    """Of recorded activations, by hook name, from position `start` on."""
    vectors, neurons = [], {}
    for site in sites(graph):
        activation = activations[site.hook_name][:, start:]
        if site.name == "mlp_post":
            neurons[site.layer] = activation
        else:
            vectors.append(written(graph, site, activation).transpose(0, 1))
    return Outputs(torch.cat(vectors), neurons)


def constants(graph: Graph, like: Outputs) -> Tensor:
    """`[source 1 1 d_model]` what a source writes when it is silent: an MLP's output bias, else nothing."""
    made = like.vectors.new_zeros(like.vectors.shape[0], 1, 1, like.vectors.shape[-1])
    row = 0
    for source in graph.sources:
        if source.kind == "mlp" and Site("ln2_post_scale", source.layer) not in graph.model.site_list:
            made[row, 0, 0] = mlp_out(graph.model, source.layer)[1]
        row += source.kind != "neuron"
    return made
