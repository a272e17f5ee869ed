"""Attribution of nodes with raw hooks and autograd: probes at the outputs of components, no gradient at any input.

It shares nothing with the methods but the names of nodes: gradients are taken where sources write, the methods take
them where destinations read; the query-key fix is taken at attention weights, the method takes it at what they mix.
"""

import torch
from torch import Tensor

from tests.circuits.plain import source_outputs
from tests.circuits.test_engine import asked
from tests.families import full_logits


def differences(of, task, by_layer: bool) -> dict[str, Tensor]:
    """`[batch pos d_model]` corrupted less clean output of every source."""
    clean, corrupted = (source_outputs(of, side, by_layer) for side in (task.clean, task.corrupted))
    return {name: corrupted[name] - clean[name] for name in clean}


def slopes(of, task, drop: int | None) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """The metric's gradient at the outputs of the embedding, attention ("a0") and MLPs, by name, and at attention
    weights, by layer; no gradient passes through the components of layer `drop`."""
    probes: dict[str, Tensor] = {}

    def probe(name: str, detached: bool):
        def hook(activation: Tensor, hook) -> Tensor:
            probes[name] = torch.zeros_like(activation).requires_grad_()
            return (activation.detach() if detached else activation) + probes[name]

        return hook

    hooks = [("blocks.0.hook_in", probe("embed", False))]
    for layer in range(of.n_layers):
        hooks += [
            (f"blocks.{layer}.hook_attn_out", probe(f"a{layer}", layer == drop)),
            (f"blocks.{layer}.hook_mlp_out", probe(f"m{layer}", layer == drop)),
            (f"blocks.{layer}.attn.hook_pattern", probe(f"pattern{layer}", False)),
        ]
    hooks = [(name, hook) for name, hook in hooks if name in of.hook_points]
    metric = asked(of, task, full_logits(of, task.clean, hooks))
    found = torch.autograd.grad(metric.sum(), list(probes.values()), allow_unused=True)
    by_name = {
        name: torch.zeros_like(probes[name]) if grad is None else grad for name, grad in zip(probes, found, strict=True)
    }
    patterns = {layer: by_name.pop(f"pattern{layer}") for layer in range(of.n_layers) if f"pattern{layer}" in by_name}
    return by_name, patterns


def attribution(deltas: dict[str, Tensor], of_outputs: dict[str, Tensor]) -> Tensor:
    """`[batch source]` ⟨Δ_u, ∂m/∂s_u⟩: the gradient at a head's output is that at its layer's attention."""
    made = []
    for name, delta in deltas.items():
        slope = of_outputs[name.partition(".")[0]].reshape(delta.shape)
        made.append((delta * slope).sum((1, 2)))
    return torch.stack(made, 1)


def pattern(of, prompts, layer: int, delta: Tensor) -> Tensor:
    """`[batch head query key]` attention weights of a layer that reads `delta` besides."""
    shown: list[Tensor] = []

    def add(resid: Tensor, hook) -> Tensor:
        return resid + delta

    def show(weights: Tensor, hook) -> None:
        shown.append(weights)

    full_logits(of, prompts, [(f"blocks.{layer}.hook_in", add), (f"blocks.{layer}.attn.hook_pattern", show)])
    return shown[0]


def fixed(of, task, deltas: dict[str, Tensor], drop: int | None) -> Tensor:
    """`[batch source]` attribution in which the change of attention weights is exact: their linear change, by autograd,
    is taken away and their true one put in its place."""
    of_outputs, of_patterns = slopes(of, task, drop)
    made = attribution(deltas, of_outputs)
    for layer, slope in of_patterns.items():
        zero = torch.zeros_like(deltas["embed"]).requires_grad_()
        base = pattern(of, task.clean, layer, zero)
        linear = torch.autograd.grad((base * slope).sum(), zero)[0]
        for i, (name, delta) in enumerate(deltas.items()):
            if name != "embed" and int(name[1:].partition(".")[0]) >= layer:
                continue
            with torch.no_grad():
                change = pattern(of, task.clean, layer, delta) - base
            made[:, i] += (change * slope).sum((1, 2, 3)) - (delta * linear).sum((1, 2))
    return made.detach()
