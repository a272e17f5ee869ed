"""Gradient scores are the slopes of the masked forward; exact effects are the masked forward, edge by edge."""

import pytest
import torch

from mechinterp.circuits.engine import Engine
from mechinterp.circuits.exact import edge_changes, node_changes
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.methods import EAP, EAPIG
from mechinterp.hooked.weights import final_norm
from tests.circuits.test_engine import asked
from tests.families import FAMILIES, full_logits, model, pairs


def changes(engine, method):
    """`[prompt edge]` change of the metric that a method ascribes to each edge."""
    return -torch.cat([scores for _, scores in method.scores(engine)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_eap_is_the_slope_of_the_masked_forward(family, padded):
    """∂m/∂(cut) at the clean point, by central differences of single masks in float64's stead: a step of 1e-2 either
    side, for edges of every kind."""
    of = model(family)
    task = pairs(of, padded)
    engine = Engine(Graph(of), task)
    found = changes(engine, EAP())
    edges = torch.linspace(0, engine.graph.n_edges - 1, 24).long().unique()
    step = 1e-2
    kept = torch.ones(2 * len(edges), engine.graph.n_edges)
    for i, edge in enumerate(edges):
        kept[2 * i, edge], kept[2 * i + 1, edge] = 1 - step, 1 + step
    values = engine.values(engine.graph.mask(kept)).double()
    slope = (values[::2] - values[1::2]) / (2 * step)
    scale = max(1.0, float(found.abs().max()))
    assert (slope.T - found[:, edges]).abs().max() < 5e-3 * scale
    assert found[:, edges].abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("qkv", "padded"), [("kv_group", False), ("kv_group", True), ("merged", False)])
def test_exact_edges_are_single_masks(family, qkv, padded):
    """Restarting at the destination equals the masked forward with one edge cut, for every edge."""
    of = model(family)
    engine = Engine(Graph(of, qkv=qkv), pairs(of, padded))
    n = engine.graph.n_edges
    fast = torch.cat([edge_changes(part, torch.arange(n)) for part in engine.parts()], 1)
    slow = engine.values(engine.graph.mask(1 - torch.eye(n))) - engine.full
    assert (fast - slow).abs().max() < 1e-4
    assert slow.abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_nodes_are_node_masks(family):
    """A node's effect is that of all of its edges cut at once."""
    of = model(family)
    engine = Engine(Graph(of), pairs(of, True))
    graph = engine.graph
    fast = torch.cat([node_changes(part, torch.arange(graph.n_nodes)) for part in engine.parts()], 1)
    kept = torch.stack([(graph.node_of != node).float() for node in range(graph.n_nodes)])
    assert (fast - (engine.values(graph.mask(kept)) - engine.full)).abs().max() < 1e-4


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # a soft-cap is not linear
def test_all_edges_into_the_logits_are_a_cut(family):
    """Σ_u EAP(u→logits) is the metric with the corrupted run's final residual behind the final norm, its scale held at
    the clean value, less the clean metric; plus what the slope of that scale adds, since norms are live."""
    of = model(family)
    task = pairs(of, False)
    engine = Engine(Graph(of), task)
    found = changes(engine, EAP())[:, engine.graph.edges[:, 0] == len(engine.graph.destinations) - 1].sum(-1)
    seen = {}

    def keep(name):
        def hook(activation, hook):
            seen[name] = activation.detach().clone()[:, -1]

        return hook

    last = f"blocks.{of.n_layers - 1}.hook_out"
    full_logits(of, task.corrupted, [(last, keep("corrupted"))])
    clean_metric = asked(of, task, full_logits(of, task.clean, [(last, keep("clean"))]))
    norm, module, unembed = final_norm(of), of.bridge.ln_final.original_component, of.bridge.unembed.original_component
    epsilon = getattr(module, "eps", getattr(module, "variance_epsilon", 0))
    x, delta = seen["clean"], seen["corrupted"] - seen["clean"]

    def scale(x):
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        return (x.square().mean(-1, keepdim=True) + epsilon).sqrt()

    def metric(x, scale):
        return asked(of, task, unembed(norm.linear(x, scale) + norm.bias)[:, None])

    assert (metric(x, scale(x)) - clean_metric).abs().max() < 1e-4  # the norm is what we say it is
    frozen = metric(seen["corrupted"], scale(x)) - clean_metric
    at = scale(x).requires_grad_()
    slope = torch.autograd.grad(metric(x, at).sum(), at)[0]
    moved = x.clone().requires_grad_()
    turned = (torch.autograd.grad(scale(moved).sum(), moved)[0] * delta).sum(-1, keepdim=True)
    assert (found - frozen - (slope * turned).sum(-1)).abs().max() < 1e-3
    assert (slope * turned).abs().max() > 1e-2  # it is no small matter


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_complete(family):
    """The embedding's edges together bring the whole change, but for the rule's error, which falls with its steps."""
    of = model(family)
    engine = Engine(Graph(of), pairs(of, False))
    change = engine.empty - engine.full
    from_embedding = engine.graph.edges[:, 1] == 0
    many = 160 if family == "opt" else 64  # the kinks of a ReLU slow the rule down
    errors = [
        (changes(engine, EAPIG(steps))[:, from_embedding].sum(-1) - change).abs().max().item() for steps in (8, many)
    ]
    assert errors[1] < 0.02 * float(change.abs().max())
    assert errors[1] < errors[0] or errors[0] < 1e-3
