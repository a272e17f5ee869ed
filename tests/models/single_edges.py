"""The effect of every single edge by brute force: TransformerLens's own hooks, our own projections, one run an edge.

For models without norms. Nothing of mechinterp's engine, graph or sites is used, so that it can judge them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.tasks.pairs import PromptPairs

Hooks = list[tuple[str | Callable, Callable]]


def sources(bridge: TransformerBridge) -> list[tuple[str, int]]:
    """Every source with its place in the order of the forward pass: attention of layer l is 2 l, its MLP 2 l + 1."""
    config = bridge.cfg
    listed = [("embed", -1)]
    for layer in range(config.n_layers):
        listed += [(f"a{layer}.h{head}", 2 * layer) for head in range(config.n_heads)]
        listed += [] if config.attn_only else [(f"m{layer}", 2 * layer + 1)]
    return listed


def destinations(bridge: TransformerBridge) -> Iterator[tuple[str, int, tuple]]:
    """Name, place in the order, and (kind, layer, index) of every destination."""
    config = bridge.cfg
    groups = config.n_key_value_heads or config.n_heads
    shared = "kv" if groups < config.n_heads else "h"
    for layer in range(config.n_layers):
        for head in range(config.n_heads):
            yield f"a{layer}.h{head}<q>", 2 * layer, ("q", layer, head)
        for kind in "kv":
            for group in range(groups):
                yield f"a{layer}.{shared}{group}<{kind}>", 2 * layer, (kind, layer, group)
        if not config.attn_only:
            yield f"m{layer}", 2 * layer + 1, ("mlp", layer, 0)
    yield "logits", 2 * config.n_layers, ("logits", 0, 0)


def contributions(bridge: TransformerBridge, tokens: Tensor) -> tuple[dict[str, Tensor], ActivationCache]:
    """What every source adds to the residual stream `[batch pos d_model]`, and the run's cache."""
    _, cache = bridge.run_with_cache(tokens)
    made = {"embed": cache["blocks.0.hook_resid_pre"]}
    for layer in range(bridge.cfg.n_layers):
        for head in range(bridge.cfg.n_heads):
            made[f"a{layer}.h{head}"] = cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ bridge.W_O[layer, head]
        if not bridge.cfg.attn_only:
            made[f"m{layer}"] = cache[f"blocks.{layer}.hook_mlp_out"]
    return made, cache


def patched(bridge: TransformerBridge, cache: ActivationCache, where: tuple, change: Tensor) -> Hooks:
    """Hooks that add `change` to the input of one destination and to nothing else."""
    kind, layer, index = where
    if kind == "logits":
        return [("ln_final.hook_in", lambda resid, hook: resid + change)]
    if kind == "mlp":
        return [(f"blocks.{layer}.mlp.hook_in", lambda resid, hook: resid + change)]
    weights, biases = getattr(bridge, f"W_{kind.upper()}"), getattr(bridge, f"b_{kind.upper()}")
    made = (cache[f"blocks.{layer}.hook_resid_pre"] + change) @ weights[layer, index] + biases[layer, index]

    def write(activation: Tensor, hook: object) -> Tensor:
        activation = activation.clone()
        activation[:, :, index] = made
        return activation

    return [(f"blocks.{layer}.attn.hook_{kind}", write)]


@torch.no_grad()
def effects(bridge: TransformerBridge, pairs: PromptPairs, direction: str) -> dict[str, Tensor]:
    """`[prompt]` change of the logit difference when one edge is exchanged, for every edge that can be.

    Args:
        bridge: without norms.
        pairs: with one answer and one wrong answer each.
        direction: "noise" runs the clean prompts with one contribution of the corrupted run; "denoise" the reverse.
    """
    tokens = [pairs.clean.tokens, pairs.corrupted.tokens]
    base, other = tokens if direction == "noise" else tokens[::-1]
    own, cache = contributions(bridge, base)
    theirs, _ = contributions(bridge, other)
    rows = torch.arange(len(base))
    answers = pairs.answers

    def metric(hooks: Hooks) -> Tensor:
        logits = bridge.run_with_hooks(base, fwd_hooks=hooks)[rows, answers.pos[:, 0]]
        return logits[rows, answers.answer[:, 0, 0]] - logits[rows, answers.wrong[:, 0, 0]]

    unpatched = metric([])
    found = {}
    for destination, at, where in destinations(bridge):
        for source, since in sources(bridge):
            if since < at:
                hooks = patched(bridge, cache, where, theirs[source] - own[source])
                found[f"{source}->{destination}"] = metric(hooks) - unpatched
    return found
