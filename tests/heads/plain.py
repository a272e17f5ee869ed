"""What heads read and write, written out once more from the wrapped modules: whole matrices, one head at a time."""

import torch

from tests.families import full_logits

LAYER_NORM = ("gpt2", "neox", "opt", "phi")


def gain(of, norm):
    """A norm's gains; Gemma's are offsets from 1."""
    weight = norm.original_component.weight.double()
    return 1 + weight if of.info.name == "gemma2" else weight


def centred(of, x):
    """Without the mean over the last axis, where the family's norms take it out."""
    return x - x.mean(-1, keepdim=True) if of.info.name in LAYER_NORM else x


def embedded(of, tokens, kind):
    """`[token d_model]`: raw, or behind block 0 without its attention."""
    kept = []
    zero = [("blocks.0.hook_attn_out", lambda x, hook: x * 0)]
    if "hook_pos_embed" in of.hook_points:
        zero.append(("hook_pos_embed", lambda x, hook: x * 0))
    name = "blocks.0.hook_resid_pre" if kind == "raw" else "blocks.0.hook_resid_post"
    keep = (name, lambda x, hook: kept.append(x[:, 0].detach().double()))
    full_logits(of, of.to_prompts(tokens[:, None]), [*zero, keep])
    return kept[0]


def read(of, layer, stream):
    """What a layer's heads see of the stream, less the norm's bias: `[token d_model]`."""
    norm = of.bridge.blocks[layer].ln1.original_component
    stream = stream.float()
    return (norm(stream) - norm(torch.zeros_like(stream))).double()


def weight(of, layer, head, name):
    """`[d_model d_head]` of a query head's queries, keys or values."""
    made = getattr(of.bridge.blocks[layer].attn, f"W_{name.upper()}").double()
    return made[head * len(made) // of.n_heads]


def bias(of, layer, head, name):
    """`[d_head]`."""
    made = getattr(of.bridge.blocks[layer].attn, f"b_{name.upper()}")
    return 0 if made is None else made.double()[head * len(made) // of.n_heads]


def ov(of, layer, head, folded=True):
    """`[d_model d_model]`; with the gain of the norm in front, unless the stream has been through it."""
    block = of.bridge.blocks[layer]
    made = weight(of, layer, head, "v") @ block.attn.W_O[head].double()
    if folded:
        made = centred(of, (gain(of, block.ln1)[:, None] * made).T).T
    return centred(of, made * gain(of, block.ln1_post) if of.info.name == "gemma2" else made)


def qk(of, layer, head, form):
    """`[d_model d_model]`, of a form `[d_head d_head]`."""
    scale = gain(of, of.bridge.blocks[layer].ln1)[:, None]
    query, key = (centred(of, (scale * weight(of, layer, head, name)).T).T for name in ("q", "k"))
    return query @ form.double() @ key.T


def to_logits(of, write):
    """`[… d_vocab]` logits of what is written, less their mean."""
    logits = centred(of, write) * gain(of, of.bridge.ln_final) @ of.bridge.unembed.original_component.weight.double().T
    return logits - logits.mean(-1, keepdim=True)
