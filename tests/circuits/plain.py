"""A circuit's forward as the formula says it, one destination and one source at a time, with raw hooks.

x_v = R_v + Σ_u (1 − m_vu)(a_u − s_u), written to `hook_q`, `hook_k`, `hook_v`, the MLP's input and the final residual.
It shares nothing with the engine but the names of nodes and the model's weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from tests.families import full_logits

Kept = Callable[[str, str], float | Tensor]  # source, destination -> the mask, a number or [batch pos]


def source_outputs(model: HookedModel, prompts: Prompts, by_layer: bool = False) -> dict[str, Tensor]:
    """`[batch pos d_model]` of every source of a plain run, by name. `by_layer`: attention is one source a layer."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(activation: Tensor, hook) -> None:  # under the name that was asked for: points have aliases
            seen[name] = activation.detach().clone()

        return hook

    names = ["blocks.0.hook_in"]
    for layer in range(model.n_layers):
        names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
    full_logits(model, prompts, [(name, keep(name)) for name in names if name in model.hook_points])
    made = {"embed": seen["blocks.0.hook_in"]}
    for layer in range(model.n_layers):
        if by_layer:
            made[f"a{layer}"] = layer_output(seen, layer, "attn", len(prompts))
        else:
            z, weight = seen[f"blocks.{layer}.attn.hook_z"], model.bridge.blocks[layer].attn.W_O
            made |= {f"a{layer}.h{head}": z[:, :, head] @ weight[head] for head in range(model.n_heads)}
        if f"blocks.{layer}.hook_mlp_out" in seen:
            made[f"m{layer}"] = layer_output(seen, layer, "mlp", len(prompts))
    return made


def layer_output(seen: dict[str, Tensor], layer: int, part: str, batch: int) -> Tensor:
    made = seen[f"blocks.{layer}.hook_{part}_out"]
    return made if made.ndim == 3 else made.unflatten(0, (batch, -1))


def masked_logits(
    model: HookedModel,
    prompts: Prompts,
    ablated: dict[str, Tensor],
    kept: Kept,
    ungrouped: bool = False,
    merged: bool = False,
) -> Tensor:
    """Logits `[batch pos d_vocab]` of a circuit in the run of `prompts`; `ablated` holds a_u by source."""
    by_layer = "a0" in ablated
    differences: dict[str, Tensor] = {}
    size = model.n_heads // model.n_kv_heads
    batch = len(prompts)

    def read(resid: Tensor, name: str, sources: list[str]) -> Tensor:
        made = resid.clone()
        for source in sources:
            m = kept(source, name)
            cut = 1 - (m[..., None] if isinstance(m, Tensor) else torch.tensor(float(m)))
            made += cut * differences[source]
        return made

    held: dict[str, Tensor] = {}

    def shaped(activation: Tensor) -> Tensor:
        return activation if activation.ndim >= 3 else activation.unflatten(0, (batch, -1))

    def attention_in(layer: int, resid: Tensor) -> None:
        block, sources = model.bridge.blocks[layer], list(differences)
        norm = block.ln1.original_component if hasattr(block, "ln1") else lambda x: x
        for letter in "qkv":
            weight, bias = getattr(block.attn, f"W_{letter.upper()}"), getattr(block.attn, f"b_{letter.upper()}")
            made = []
            for head in range(len(weight)):
                if merged:
                    name = f"a{layer}.{'kv' if size > 1 else 'h'}{head // size if letter == 'q' else head}<qkv>"
                elif letter == "q" or size == 1:
                    name = f"a{layer}.h{head}<{letter}>"
                else:
                    name = f"a{layer}.kv{head}<{letter}>"
                x = norm(read(resid, name, sources)) @ weight[head]
                made.append(x if bias is None else x + bias[head])
            held[f"{letter}{layer}"] = torch.stack(made, 2)

    def hooks_of(layer: int) -> list:
        block = model.bridge.blocks[layer]
        parallel = "Parallel" in type(block).__name__
        sequential_before_mlp = f"blocks.{layer}.ln2.hook_in"

        def on_input(resid: Tensor, hook) -> None:
            if layer == 0:
                differences["embed"] = ablated["embed"] - resid
            attention_in(layer, resid)
            if parallel:
                held[f"mlp{layer}"] = read(resid, f"m{layer}", list(differences))

        def give(letter: str):
            return lambda activation, hook: held[f"{letter}{layer}"]

        def on_z(z: Tensor, hook) -> None:
            for head in range(model.n_heads):
                differences[f"a{layer}.h{head}"] = ablated[f"a{layer}.h{head}"] - z[:, :, head] @ block.attn.W_O[head]

        def on_attn_out(out: Tensor, hook) -> None:
            differences[f"a{layer}"] = ablated[f"a{layer}"] - shaped(out)

        def on_mlp_read(resid: Tensor, hook) -> None:
            if not parallel:
                held[f"mlp{layer}"] = read(shaped(resid), f"m{layer}", list(differences))

        def on_mlp_in(x: Tensor, hook) -> Tensor:
            norm = block.ln2.original_component if hasattr(block, "ln2") else block.ln1.original_component
            made = norm(held[f"mlp{layer}"])
            return made.flatten(0, 1) if x.ndim == 2 else made

        def on_mlp_out(out: Tensor, hook) -> None:
            differences[f"m{layer}"] = ablated[f"m{layer}"] - shaped(out)

        made = [(f"blocks.{layer}.hook_in", on_input)]
        made += [(f"blocks.{layer}.attn.hook_{letter}", give(letter)) for letter in "qkv"]
        made.append(
            (f"blocks.{layer}.hook_attn_out", on_attn_out) if by_layer else (f"blocks.{layer}.attn.hook_z", on_z)
        )
        if f"m{layer}" in ablated:
            if not parallel:
                made.append((sequential_before_mlp, on_mlp_read))
            made += [(f"blocks.{layer}.mlp.hook_in", on_mlp_in), (f"blocks.{layer}.hook_mlp_out", on_mlp_out)]
        return made

    def on_final(resid: Tensor, hook) -> Tensor:
        return read(resid, "logits", list(differences))

    hooks = [hook for layer in range(model.n_layers) for hook in hooks_of(layer)]
    hooks.append((f"blocks.{model.n_layers - 1}.hook_out", on_final))
    return full_logits(model, prompts, hooks)
