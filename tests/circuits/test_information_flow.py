"""Information-flow routes by loops over raw activations, one destination, source and position at a time."""

import pytest
import torch

from mechinterp import load
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.information_flow import InformationFlow, shares
from mechinterp.circuits.outputs import Outputs
from mechinterp.tasks.planted import task_of
from tests.circuits.plain import source_outputs
from tests.families import FAMILIES, full_logits, model, pairs


def scores(engine):
    """`[prompt edge]`."""
    return torch.cat([each for _, each in InformationFlow().scores(engine)])


def streams(of, prompts):
    """`[batch pos d_model]` inputs of every layer's attention, and the last layer's output, by hook name."""
    seen = {}

    def keep(name):
        def hook(activation, hook):
            seen[name] = activation.detach().clone()

        return hook

    names = [f"blocks.{layer}.hook_in" for layer in range(of.n_layers)] + [f"blocks.{of.n_layers - 1}.hook_out"]
    full_logits(of, prompts, [(name, keep(name)) for name in names])
    return seen


def plain_share(written, whole, name):
    """A source's share of a sum, from vectors `[d_model]` by name; what is missing in the sum is a source too."""
    parts = [*written.values(), whole - sum(written.values())]
    near = [max(0.0, float(whole.abs().sum() - (whole - part).abs().sum())) for part in parts]
    return near[list(written).index(name)] / sum(near) if sum(near) else 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_mean_shares_of_what_is_read(family):
    """All edges into a head of the last layer, at its real positions, and into the logits, at the last one."""
    of, task = model(family), pairs(model(family), True, n=3)
    engine = Engine(Graph(of), task)
    graph, found = engine.graph, scores(engine)
    outputs, seen = source_outputs(of, task.clean, not graph.heads_add_up), streams(of, task.clean)
    last = of.n_layers - 1
    reads = {f"a{last}.h1<q>": seen[f"blocks.{last}.hook_in"], "logits": seen[f"blocks.{last}.hook_out"]}
    for name, stream in reads.items():
        v = graph.destinations[graph.destination_index[name]]
        before = [one.name for one in graph.sources[: v.n_sources]]
        for prompt in range(len(task)):
            real = task.clean.real[prompt].nonzero().flatten().tolist()
            at = real[-1:] if name == "logits" else real
            for source in before[:: 1 if name == "logits" else 3]:
                each = [plain_share({u: outputs[u][prompt, p] for u in before}, stream[prompt, p], source) for p in at]
                edge = graph.edge(f"{source}->{name}")
                assert abs(float(found[prompt, edge]) - sum(each) / len(each)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_add_up_to_one_with_the_biases(family):
    """One where there are no biases, less somewhere where there are; keys and queries have the same."""
    of = model(family)
    engine = Engine(Graph(of), pairs(of, True))
    found, graph = scores(engine), engine.graph
    total = torch.zeros(len(found), len(graph.destinations)).index_add_(1, graph.edges[:, 0], found)
    assert (found >= 0).all() and (total < 1 + 1e-5).all()
    assert torch.allclose(total[:, 0], torch.ones(len(found)), atol=1e-5)  # the embedding alone, no bias before it
    if family in ("gemma2", "qwen3"):
        assert torch.allclose(total, torch.ones_like(total), atol=1e-4)
    else:
        assert total.min() < 0.995
    key = graph.destination_index["a2.h0<k>" if of.n_kv_heads == of.n_heads else "a2.kv0<k>"]
    query = graph.destination_index["a2.h0<q>"]
    assert torch.equal(found[:, graph.edges[:, 0] == key], found[:, graph.edges[:, 0] == query])


def test_a_share_by_hand():
    """x = (3, −1): of s = (3, 0) 3 are near, of (0, 1) none, and of the bias (0, −2) 4 − |(3, 1)| = 0."""
    graph = Graph(model("gpt2"))
    vectors = torch.tensor([[3.0, 0.0], [0.0, 1.0]])[:, None, None]
    whole = torch.tensor([3.0, -1.0])[None, None]
    assert shares(graph, Outputs(vectors), whole, 2).flatten().tolist() == [1.0, 0.0]
    whole = torch.tensor([3.0, 3.0])[None, None]  # bias (0, 2): near are 3, 1 and 2
    assert torch.allclose(shares(graph, Outputs(vectors), whole, 2).flatten(), torch.tensor([3 / 6, 1 / 6]))


def test_places_hold_the_mean_of_their_positions():
    of = model("llama")
    task = pairs(of, False)
    every = Engine(Graph(of, positions="all"), task)
    whole, by_pos = scores(Engine(Graph(of), task)), scores(every)
    n = task.clean.n_pos
    by_pos = by_pos.unflatten(1, (-1, n))
    logits = Graph(of).edges[:, 0] == len(every.graph.destinations) - 1
    assert torch.allclose(by_pos[:, ~logits].mean(-1), whole[:, ~logits], atol=1e-5)
    assert (by_pos[:, logits, :-1] == 0).all()  # logits are read at the last position only
    assert torch.allclose(by_pos[:, logits, -1], whole[:, logits], atol=1e-5)


def test_neurons_share_like_other_sources():
    """Into the logits, by loops: neurons write their activation times their row of W_out."""
    of, task = model("gpt2"), pairs(model("gpt2"), False, n=2)
    engine = Engine(Graph(of, mlp="neuron"), task)
    seen = {}

    def keep(name):
        def hook(activation, hook):
            seen[name] = activation.detach().clone()

        return hook

    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(of.n_layers)] + ["blocks.2.hook_out"]
    full_logits(of, task.clean, [(name, keep(name)) for name in names])
    outputs = source_outputs(of, task.clean)
    written = {name: one[0, -1] for name, one in outputs.items() if name[0] != "m"}
    for layer in range(of.n_layers):
        weight = of.bridge.blocks[layer].mlp.W_out
        post = seen[f"blocks.{layer}.mlp.hook_post"][0, -1]
        written |= {f"m{layer}.n{i}": post[i] * weight[i] for i in range(len(weight))}
    found = scores(engine)[0]
    for source in ("embed", "a1.h2", "m0.n5", "m2.n60"):
        want = plain_share(written, seen["blocks.2.hook_out"][0, -1], source)
        assert abs(float(found[engine.graph.edge(f"{source}->logits")]) - want) < 1e-5


def test_neither_direction_nor_corruption_nor_memory_matters():
    of, task = model("qwen3"), pairs(model("qwen3"), True)
    want = scores(Engine(Graph(of), task))
    small = Engine(Graph(of), task, "zero")
    small.max_bytes = small.bytes_per_prompt
    assert torch.allclose(scores(small), want, atol=1e-5)
    assert torch.allclose(scores(Engine(Graph(of), task, direction="denoise")), want, atol=1e-5)


@pytest.mark.parametrize("name", ["planted-and", "planted-or"])
def test_the_last_mlp_brings_planted_answers(name):
    """Of all but the embedding, whose token stays in the stream, the MLP that answers is nearest to the last stream."""
    of = load(name, device="cpu")
    engine = Engine(Graph(of), task_of(name)(of, n=16, seed=7))
    found, graph = scores(engine).mean(0), engine.graph
    at_logits = {
        graph.edge_name(i): float(found[i])
        for i in range(graph.n_edges)
        if graph.edges[i, 0] == len(graph.destinations) - 1
    }
    at_logits.pop("embed->logits")
    assert max(at_logits, key=at_logits.__getitem__) == "m1->logits"


def test_planted_induction_stands_out_in_its_layer():
    """The induction head brings the most of its layer into the logits."""
    of = load("planted-induction", device="cpu")
    engine = Engine(Graph(of), task_of("planted-induction")(of, n=16, seed=7))
    found = scores(engine).mean(0)
    heads = torch.stack([found[engine.graph.edge(f"a1.h{head}->logits")] for head in range(of.n_heads)])
    assert heads.argmax() == 2 and heads[2] > 1.5 * heads[[0, 1, 3]].max()
