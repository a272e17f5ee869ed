"""AtP* is attribution patching with true changes of attention, averaged over backwards that leave a layer out."""

import pytest
import torch

from mechinterp import load
from mechinterp.circuits.atp_star import AtPStar
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.exact import ExactNodes
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.methods import EAP
from mechinterp.errors import UserError
from mechinterp.models.planted import circuit
from mechinterp.tasks.planted import task_of
from tests.circuits.plain_nodes import attribution, differences, fixed, slopes
from tests.circuits.test_methods import changes
from tests.families import FAMILIES, model, pairs

SEES_PATTERNS = tuple(family for family in FAMILIES if family != "opt")  # OPT shows its patterns after their use
PLAIN = AtPStar(qk_fix=False, grad_drop=False)


def scores(engine, method):
    """`[prompt node]`."""
    return torch.cat([each for _, each in method.scores(engine)])


def near(found, want):
    return (found - want).abs().max() < 1e-4 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_options_it_is_attribution_patching(family):
    """The sum of EAP over a node's edges, and the slope where the node writes, by raw hooks."""
    of, task = model(family), pairs(model(family), True)
    engine = Engine(Graph(of), task)
    found, edges = scores(engine, PLAIN), scores(engine, EAP())
    source = engine.graph.edges[:, 1]
    for node in range(engine.graph.n_nodes):
        assert near(found[:, node], edges[:, source == node].sum(1))
    deltas = differences(of, task, not engine.graph.heads_add_up)
    assert list(deltas) == [one.name for one in engine.graph.sources]
    assert near(-found, attribution(deltas, slopes(of, task, None)[0]))
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma2"])
def test_gradient_drop_averages_backwards_without_a_layer(family):
    of, task = model(family), pairs(model(family), True)
    engine = Engine(Graph(of), task)
    deltas = differences(of, task, not engine.graph.heads_add_up)
    each = torch.stack([attribution(deltas, slopes(of, task, drop)[0]) for drop in (None, *range(of.n_layers))])
    found = scores(engine, AtPStar(qk_fix=False))
    assert near(found, each.abs().mean(0))
    assert not near(found, each[0].abs())  # to leave layers out makes a difference
    assert (found >= 0).all()


@pytest.mark.parametrize("family", SEES_PATTERNS)
def test_the_query_key_fix_counts_true_changes_of_attention(family):
    """Changes of attention weights by raw hooks, times their gradient, in place of the linear ones."""
    of, task = model(family), pairs(model(family), True, n=2)
    engine = Engine(Graph(of), task)
    deltas = differences(of, task, not engine.graph.heads_add_up)
    found, want = scores(engine, AtPStar(grad_drop=False)), fixed(of, task, deltas, None)
    assert near(-found, want)
    assert (found - scores(engine, PLAIN)).abs().max() > 0.1  # the fix makes a difference


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_both_together(family):
    of, task = model(family), pairs(model(family), False, n=2)
    engine = Engine(Graph(of), task)
    deltas = differences(of, task, not engine.graph.heads_add_up)
    each = torch.stack([fixed(of, task, deltas, drop) for drop in (None, *range(of.n_layers))])
    assert near(scores(engine, AtPStar()), each.abs().mean(0))


@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_the_fix_is_linear_for_small_changes(family):
    """Also where patterns are not seen: a thousandth of the difference is attributed as without the fix."""
    engine = Engine(Graph(model(family)), pairs(model(family), True))
    parts = [shrunk(part) for part in engine.parts()]
    engine.parts = lambda: iter(parts)
    found, want = scores(engine, AtPStar(grad_drop=False)), scores(engine, PLAIN)
    assert (found - want).abs().max() < 1e-2 * want.abs().max()
    assert want.abs().max() > 1e-4


def shrunk(part):
    part.differences = part.differences * 1e-3
    return part


def test_places_move_their_own_positions():
    of = model("gpt2")
    task = pairs(of, False)
    engine = Engine(Graph(of, positions="all"), task)
    found = scores(engine, AtPStar(grad_drop=False)).unflatten(1, (-1, task.clean.n_pos))
    deltas = differences(of, task, False)
    for pos in (2, 5):
        here = torch.arange(task.clean.n_pos)[:, None] == pos
        want = fixed(of, task, {name: delta * here for name, delta in deltas.items()}, None)
        assert near(-found[:, :, pos], want)
    assert (found[:, :, :2] == 0).all()  # the prompts differ from position 2 on


def test_small_memory_and_keys_of_their_own_change_nothing():
    """Two rows a call, so that prompts and nodes come in parts; a node is the same thing whether a group's keys are one
    input or several."""
    of, task = model("llama"), pairs(model("llama"), True, n=3)
    method = AtPStar(grad_drop=False)
    want = scores(Engine(Graph(of), task), method)
    small = Engine(Graph(of), task)
    small.max_bytes = 2 * small.bytes_per_prompt
    assert small.rows_per_call == 2 and near(scores(small, method), want)
    assert near(scores(Engine(Graph(of, qkv="ungrouped"), task), method), want)


def test_signs_follow_the_direction():
    """Denoising, a score is what the clean value adds to the corrupted run."""
    of, task = model("qwen3"), pairs(model("qwen3"), False)
    engine = Engine(Graph(of), task, direction="denoise")
    edges, source = changes(engine, EAP()), engine.graph.edges[:, 1]
    want = torch.stack([-edges[:, source == node].sum(1) for node in range(engine.graph.n_nodes)], 1)
    assert near(scores(engine, PLAIN), want)


@pytest.mark.parametrize(
    "name, nodes",
    [
        ("planted-induction", {"embed", "a0.h2", "a1.h2"}),
        ("planted-and", {"embed", "a0.h1", "a0.h2", "m0", "a1.h3", "m1"}),
    ],
)
def test_planted_nodes_are_found_and_no_others(name, nodes):
    of = load(name, device="cpu")
    engine = Engine(Graph(of), task_of(name)(of, n=16, seed=7))
    assert {f"a{layer}.h{head}" for layer, head in circuit(name).heads} <= nodes
    for method in (AtPStar(), AtPStar(grad_drop=False)):
        found = scores(engine, method).mean(0)
        large = {engine.graph.node_name(node) for node in (found > 1).nonzero().flatten().tolist()}
        assert large == nodes
        assert found[[node not in nodes for node in map(engine.graph.node_name, range(len(found)))]].abs().max() < 1e-3


def test_the_fix_sees_through_saturated_attention():
    """The previous-token head of planted-induction acts through keys alone, at an attention of .9 and more: the fix
    comes nearer to the effect of patching it than the slope does."""
    of = load("planted-induction", device="cpu")
    engine = Engine(Graph(of), task_of("planted-induction")(of, n=16, seed=7))
    node = engine.graph.source_index["a0.h2"]
    plain, fix, true = (
        scores(engine, method)[:, node].mean() for method in (PLAIN, AtPStar(grad_drop=False), ExactNodes())
    )
    assert abs(fix - true) < 0.25 * abs(plain - true)


def test_what_it_cannot_do_is_refused():
    of = model("gpt2")
    for graph in (Graph(of, mlp="neuron"), Graph(of, qkv="merged")):
        engine = Engine(graph, pairs(of, False))
        with pytest.raises(UserError, match=r"query-key fix.*found Graph.*qk_fix=False"):
            next(AtPStar().scores(engine))
        assert scores(engine, PLAIN).abs().max() > 0.1
    with pytest.raises(UserError, match="KL"):
        next(AtPStar().scores(Engine(Graph(of), pairs(of, False), metric="kl")))
