"""The engine against the formula, written with raw hooks, on every architecture."""

import pytest
import torch

import mechinterp as mi
from mechinterp import UserError
from mechinterp.circuits.ablations import Ablation
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.hooked.interventions import Zero
from mechinterp.hooked.sites import Site
from tests.checks import checks_off
from tests.circuits.plain import masked_logits, source_outputs
from tests.families import FAMILIES, full_logits, model, pairs

SHAPES = [("kv_group", False), ("kv_group", True), ("merged", False)]


def asked(of, task, logits):
    """`[batch]` logit difference at the last position."""
    rows = torch.arange(len(task))
    last = logits[:, -1]
    return last[rows, task.answers.answer[:, 0, 0]] - last[rows, task.answers.wrong[:, 0, 0]]


def by_name(graph, mask):
    """A mask as a function of names."""

    def kept(source, destination):
        return float(mask[graph.destination_index[destination], graph.source_index[source], 0])

    return kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("qkv", "padded"), SHAPES)
def test_masks_equal_the_formula(family, qkv, padded):
    """All kept is the clean run, none the corrupted one; a binary and a continuous mask are the formula."""
    of = model(family)
    task = pairs(of, padded)
    graph = Graph(of, qkv=qkv)
    engine = Engine(graph, task)
    draw = torch.Generator().manual_seed(1)
    masks = torch.rand(2, *graph.valid.shape, generator=draw)
    masks[0] = (masks[0] < 0.6).float()
    ones, zeros = torch.ones(1, *graph.valid.shape), torch.zeros(1, *graph.valid.shape)
    got = engine.values(torch.cat([ones, zeros, masks]))
    by_layer = not graph.heads_add_up
    ablated = source_outputs(of, task.corrupted, by_layer)
    want = [asked(of, task, full_logits(of, side, [])) for side in (task.clean, task.corrupted)]
    for mask in masks:
        logits = masked_logits(of, task.clean, ablated, by_name(graph, mask), merged=qkv == "merged")
        want.append(asked(of, task, logits))
    assert (got - torch.stack(want)).abs().max() < 1e-4
    assert (got[2] - got[0]).abs().max() > 0.1 and (got[2] - got[3]).abs().max() > 0.1  # the masks do something


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_places_and_masks_by_prompt(family):
    """A mask for each position, and one for each prompt, are the formula with [batch pos] masks."""
    of = model(family)
    task = pairs(of, False)
    graph = Graph(of, positions="all").at(task)
    engine = Engine(graph, task)
    draw = torch.Generator().manual_seed(2)
    shared = torch.rand(1, *graph.valid.shape, generator=draw)
    by_prompt = torch.rand(1, len(task), *graph.valid.shape, generator=draw)
    ablated = source_outputs(of, task.corrupted)

    def kept(mask):
        def value(source, destination):
            here = mask[..., graph.destination_index[destination], graph.source_index[source], :]
            return here.expand(len(task), -1)

        return value

    for masks, one in ((shared, shared[0][None]), (by_prompt, by_prompt[0])):
        want = asked(of, task, masked_logits(of, task.clean, ablated, kept(one)))
        assert (engine.values(masks)[0] - want).abs().max() < 1e-4
    assert (engine.values(shared)[0] - engine.values(by_prompt)[0]).abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_roles(padded):
    """Roles stand at other positions in padded prompts; the rest is a place of its own."""
    of = model("llama")
    task = pairs(of, padded)
    graph = Graph(of, positions="roles").at(task)
    mask = torch.rand(graph.valid.shape, generator=torch.Generator().manual_seed(3))
    place = graph.place_of(task)

    def kept(source, destination):
        return mask[graph.destination_index[destination], graph.source_index[source]][place]

    want = asked(of, task, masked_logits(of, task.clean, source_outputs(of, task.corrupted), kept))
    assert (Engine(graph, task).values(mask[None])[0] - want).abs().max() < 1e-4


def test_ungrouped_inputs_are_those_of_a_model_with_as_many_keys_as_heads():
    """Keys and values of their own for each query head: the same as in a copy of the model that has them."""
    import transformers as hf
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from mechinterp.hooked.model import HookedModel, ModelInfo
    from tests.families import CONFIGS, module

    small = module("llama")
    config = CONFIGS["llama"]()
    config.num_key_value_heads = config.num_attention_heads
    large = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = small.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            grouped = tensor.unflatten(0, (2, 6)).repeat_interleave(2, 0)
            state[name] = grouped.flatten(0, 1)
    large.load_state_dict(state)
    bridge = build_bridge_from_module(large, type(large).__name__, hf_config=config, tokenizer=None)
    wide = HookedModel(bridge, None, ModelInfo("wide", "", "module", False, False))
    of = model("llama")
    task = pairs(of, True)
    ours, theirs = Graph(of, qkv="ungrouped"), Graph(wide)
    assert [one.name for one in ours.destinations] == [one.name for one in theirs.destinations]
    mask = torch.rand(2, *ours.valid.shape, generator=torch.Generator().manual_seed(4))
    got, want = Engine(ours, task).values(mask), Engine(theirs, task).values(mask)
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_neurons(family):
    """A layer's neurons with one mask are its MLP; a neuron cut everywhere is its activation replaced; a neuron cut at
    the logits is its write replaced there."""
    of = model(family)
    task = pairs(of, False)
    graph, whole = Graph(of, mlp="neuron"), Graph(of)
    engine = Engine(graph, task)
    draw = torch.Generator().manual_seed(5)
    mask = torch.rand(1, *whole.valid.shape, generator=draw)
    parent = [whole.source_index[source.name.partition(".n")[0]] for source in graph.sources]
    spread = mask[:, :, parent]
    assert (engine.values(spread) - Engine(whole, task).values(mask)).abs().max() < 1e-4
    seen = {}

    def keep(activation, hook):
        seen["post"] = activation.detach().clone().reshape(len(task), -1, activation.shape[-1])

    neuron, layer = 7, 1
    name = f"blocks.{layer}.mlp.out.hook_in"
    full_logits(of, task.corrupted, [(name, keep)])
    corrupted = seen["post"]
    full_logits(of, task.clean, [(name, keep)])
    delta = (corrupted - seen["post"])[..., neuron]

    def put(activation, hook):
        shape, made = activation.shape, activation.clone().reshape(len(task), -1, activation.shape[-1])
        made[..., neuron] += delta
        return made.reshape(shape)

    weight = of.bridge.blocks[layer].mlp.W_out[neuron]
    final = f"blocks.{of.n_layers - 1}.hook_out"
    everywhere = asked(of, task, full_logits(of, task.clean, [(name, put)]))
    at_logits = asked(
        of, task, full_logits(of, task.clean, [(final, lambda resid, hook: resid + delta[..., None] * weight)])
    )
    source = graph.source_index[f"m{layer}.n{neuron}"]
    masks = torch.ones(2, *graph.valid.shape)
    masks[0, :, source] = 0
    masks[1, -1, source] = 0
    assert (engine.values(masks) - torch.stack([everywhere, at_logits])).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_and_mean(family):
    """Cut edges carry the output bias, or the mean over the corrupted prompts by position."""
    of = model(family)
    task = pairs(of, False)
    graph = Graph(of)
    by_layer = not graph.heads_add_up
    live = source_outputs(of, task.corrupted, by_layer)
    mask = (torch.rand(graph.valid.shape, generator=torch.Generator().manual_seed(6)) < 0.7).float()
    silent = {name: torch.zeros_like(one) for name, one in live.items()}
    for layer in range(of.n_layers):
        bias = getattr(of.bridge.blocks[layer].mlp, "b_out", None)
        if bias is not None:
            silent[f"m{layer}"] += bias
    means = {name: one.mean(0, keepdim=True).expand_as(one) for name, one in live.items()}
    for ablation, values in ((Ablation("zero"), silent), (Ablation("mean", by="position"), means)):
        want = asked(of, task, masked_logits(of, task.clean, values, by_name(graph, mask)))
        got = Engine(graph, task, ablation).values(mask[None])[0]
        assert (got - want).abs().max() < 1e-4, ablation


def test_denoising_is_noising_of_the_other_side():
    """The corrupted run is the base, and cut edges carry the clean run's activations."""
    of = model("llama")
    task = pairs(of, False)
    graph = Graph(of)
    engine = Engine(graph, task, direction="denoise")
    mask = torch.rand(graph.valid.shape, generator=torch.Generator().manual_seed(7))
    logits = masked_logits(of, task.corrupted, source_outputs(of, task.clean), by_name(graph, mask))
    assert (engine.values(mask[None])[0] - asked(of, task, logits)).abs().max() < 1e-4
    assert (engine.empty - asked(of, task, full_logits(of, task.clean, []))).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_pins(family):
    """A pinned head and a pinned MLP write what they are given, in the residual stream and along every edge."""
    of = model(family)
    task = pairs(of, True)
    graph = Graph(of)
    engine = Engine(graph, task)
    draw = torch.Generator().manual_seed(8)
    z = torch.randn(len(task), task.clean.n_pos, of.d_head, generator=draw)
    mlp = torch.randn(len(task), task.clean.n_pos, of.d_model, generator=draw)

    def pinned_metric():
        hooks = [
            ("blocks.0.attn.hook_z", lambda live, hook: torch.cat([z[:, :, None], live[:, :, 1:]], 2)),
            ("blocks.1.hook_mlp_out", lambda live, hook: mlp.reshape(live.shape)),
        ]
        return asked(of, task, full_logits(of, task.clean, hooks))

    (part,) = engine.parts()
    z[:, : part.start] = part.recording.activations["blocks.0.attn.hook_z"][:, : part.start, 0]
    mlp[:, : part.start] = part.recording.activations["blocks.1.hook_mlp_out"][:, : part.start]
    want = pinned_metric()
    pins, ones = {"a0.h0": z, "m1": mlp}, torch.ones(1, *graph.valid.shape)
    assert (part.metric(ones, pins)[0] - want).abs().max() < 1e-4
    assert (part.metric(None, pins)[0] - want).abs().max() < 1e-4
    assert (want - engine.full).abs().max() > 0.1
    assert (part.metric(ones, pins) - part.metric(None, pins)).abs().max() < 1e-4
    with pytest.raises(UserError, match=r"no source 'a7\.h0'"):
        part.metric(None, {"a7.h0": z})


def test_chunks_give_the_same(monkeypatch):
    """Prompts and circuits split by memory give what one call gives."""
    of = model("qwen3")
    task = pairs(of, True, n=6)
    graph = Graph(of)
    masks = torch.rand(3, *graph.valid.shape, generator=torch.Generator().manual_seed(9))
    whole = Engine(graph, task)
    few = Engine(graph, task, max_bytes=2 * whole.bytes_per_prompt)
    assert few.rows_per_call == 2 < whole.rows_per_call
    assert (whole.values(masks) - few.values(masks)).abs().max() < 1e-5


def test_memory_is_refused_in_one_line():
    of = model("llama")
    task = pairs(of, False)
    with pytest.raises(UserError, match="bytes are free"):
        Engine(Graph(of), task, max_bytes=10**18)
    with pytest.raises(UserError, match="one prompt of 8 tokens needs"):
        Engine(Graph(of), task, max_bytes=10)


def test_bad_input():
    of = model("llama")
    task = pairs(of, False)
    with checks_off(), pytest.raises(UserError, match="unknown ablation 'median'"):
        Engine(Graph(of), task, "median")
    with pytest.raises(UserError, match="has no meaning there"):
        Engine(Graph(of), task, "zero", "denoise")
    with pytest.raises(UserError, match="needs its vectors"):
        Engine(Graph(of), task, "learned")
    with checks_off(), pytest.raises(UserError, match="unknown direction"):
        Engine(Graph(of), task, direction="both")  # type: ignore[arg-type]
    with checks_off(), pytest.raises(UserError, match="plain function"):
        Engine(Graph(of), task, metric=lambda logits: logits[:, -1, 0])  # type: ignore[arg-type]


@pytest.mark.parametrize("site", ["q", "v", "k_input", "mlp_in"])
def test_what_a_masked_forward_would_overrule_is_refused(site):
    """Interventions on what the engine makes itself; others stay in force, in every circuit."""
    of = model("llama")
    task = pairs(of, True)
    with of.intervene(Zero(Site(site, 1), noop_ok=True)):
        with pytest.raises(UserError, match="is in force"):
            Engine(Graph(of), task)
        mi.evaluate(of, task)
    with of.intervene(Zero(Site("z", 1, head=2))):
        engine = Engine(Graph(of), task)
        assert (engine.full - mi.evaluate(of, task)).abs().max() < 1e-4
        assert (engine.empty - mi.evaluate(of, task, side="corrupted")).abs().max() < 1e-4


def test_gradients_of_runs_that_are_alive_together():
    """Two results before one backward, and the same backward twice, are as each alone."""
    of = model("gpt2")
    engine = Engine(Graph(of), pairs(of, False))
    (part,) = engine.parts()
    draw = torch.Generator().manual_seed(10)
    masks = [torch.rand(1, *engine.graph.valid.shape, generator=draw).requires_grad_() for _ in range(2)]
    alone = [torch.autograd.grad(part.metric(mask).sum(), mask)[0] for mask in masks]
    both = part.metric(masks[0]).sum() + part.metric(masks[1]).sum()
    for _ in range(2):
        together = torch.autograd.grad(both, masks, retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, together, strict=True))


def test_pins_that_cannot_be_put_in():
    of = model("llama")
    engine = Engine(Graph(of), pairs(of, False))
    (part,) = engine.parts()
    z = part.recording.activations["blocks.0.attn.hook_z"][:, :, 0]
    assert part.start > 0
    with pytest.raises(UserError, match="are not run again"):
        part.metric(None, {"a0.h0": torch.zeros_like(z)})
    with pytest.raises(UserError, match=r"a0\.h0 writes"):
        part.metric(None, {"a0.h0": z[:1]})
    neurons = Engine(Graph(of, mlp="neuron"), pairs(of, False))
    with pytest.raises(UserError, match="is a neuron"):
        next(iter(neurons.parts())).metric(None, {"m0.n3": z})
