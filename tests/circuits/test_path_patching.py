"""Path patching equals its definition, written with raw hooks, on every family whose heads add up."""

import pytest
import torch

from mechinterp import UserError
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.path_patching import path_patch
from tests.circuits.test_engine import asked
from tests.families import FAMILIES, full_logits, model, pairs

ADD_UP = [family for family in FAMILIES if family != "gemma2"]


def runs(of, task):
    """`z` of every layer in both runs, and MLP outputs."""
    kept = []
    for side in (task.clean, task.corrupted):
        seen = {}

        def keep(name, seen=seen):
            def hook(activation, hook):
                seen[name] = activation.detach().clone()

            return hook

        names = [f"blocks.{layer}.{at}" for layer in range(of.n_layers) for at in ("attn.hook_z", "hook_mlp_out")]
        full_logits(of, side, [(name, keep(name)) for name in names])
        kept.append(seen)
    return kept


def plain_path_patch(of, task, sender, receiver):
    """`[prompt]` metric. sender: (layer, head) or (layer, None) for an MLP; receiver: (layer, head, letter) or None for
    the logits."""
    clean, corrupted = runs(of, task)
    held = {}

    def pin(layer):
        def hook(z, hook):
            made = clean[f"blocks.{layer}.attn.hook_z"].clone()
            if sender == (layer, sender[1]) and sender[1] is not None:
                made[:, :, sender[1]] = corrupted[f"blocks.{layer}.attn.hook_z"][:, :, sender[1]]
            return made

        return hook

    hooks = [(f"blocks.{layer}.attn.hook_z", pin(layer)) for layer in range(of.n_layers)]
    if sender[1] is None:
        name = f"blocks.{sender[0]}.hook_mlp_out"
        hooks.append((name, lambda out, hook: corrupted[name].reshape(out.shape)))
    if receiver is None:
        return asked(of, task, full_logits(of, task.clean, hooks))
    layer, head, letter = receiver
    block = of.bridge.blocks[layer]
    weight, bias = getattr(block.attn, f"W_{letter.upper()}"), getattr(block.attn, f"b_{letter.upper()}")

    def record(resid, hook):
        made = block.ln1.original_component(resid) @ weight[head]
        held["new"] = made if bias is None else made + bias[head]

    full_logits(of, task.clean, [*hooks, (f"blocks.{layer}.hook_in", record)])

    def put(activation, hook):
        activation = activation.clone()
        activation[:, :, head] = held["new"]
        return activation

    return asked(of, task, full_logits(of, task.clean, [(f"blocks.{layer}.attn.hook_{letter}", put)]))


@pytest.mark.parametrize("family", ADD_UP)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_hooks(family, padded):
    """Heads and MLPs into a query, a key and the logits."""
    of = model(family)
    task = pairs(of, padded)
    graph = Graph(of)
    group = "kv1" if of.n_kv_heads < of.n_heads else "h1"
    cases = {"logits": None, "a2.h3<q>": (2, 3, "q"), f"a2.{group}<k>": (2, 1, "k"), f"a2.{group}<v>": (2, 1, "v")}
    senders = {"a0.h1": (0, 1), "a1.h2": (1, 2), "m0": (0, None)}
    seen = 0.0
    for name, receiver in cases.items():
        found = path_patch(graph, task, [name], list(senders), force=True, progress=False)
        for sender, at in senders.items():
            want = plain_path_patch(of, task, at, receiver)
            got = torch.from_numpy(found.data["patched"].sel(source=sender).values)
            assert (got - want).abs().max() < 1e-4, (name, sender)
            seen = max(seen, float((want - torch.from_numpy(found.data["base"].values)).abs().max()))
    assert seen > 0.1


def test_bad_input():
    """One line each: what was asked, what is there."""
    of = model("llama")
    graph, task = Graph(of), pairs(of, False)
    for receivers, senders, said in (
        ([], None, "needs receivers"),
        (["a9.h9<q>"], None, "unknown receiver"),
        (["a1.h0<q>"], ["a2.h0"], "writes after every receiver"),
        (["logits"], ["a7.h0"], "unknown sender"),
    ):
        with pytest.raises(UserError, match=said):
            path_patch(graph, task, receivers, senders, force=True, progress=False)
    with pytest.raises(UserError, match="no places"):
        path_patch(Graph(of, positions="roles"), task, ["logits"], force=True, progress=False)
