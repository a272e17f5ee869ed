"""The real model: grouped queries, 70,651 edges, prompts of several lengths."""

import pytest
import torch

import mechinterp as mi
from mechinterp.circuits import EAPIG, Circuit, Engine, Graph, evaluate, faithfulness, find
from mechinterp.circuits.exact import edge_changes
from mechinterp.circuits.rankings import by_norm

pytestmark = pytest.mark.real_model


def test_edges_and_ends(smollm2):
    """The published count of edges; both ends of every curve; exact effects of edges of every kind are single masks."""
    graph = Graph(smollm2)
    task = mi.tasks.ioi(smollm2, n=3, seed=0)
    engine = Engine(graph, task)
    assert graph.n_edges == 70_651
    assert (engine.full - mi.evaluate(smollm2, task)).abs().max() < 1e-3
    assert (engine.empty - mi.evaluate(smollm2, task, side="corrupted")).abs().max() < 1e-3
    names = ["embed->m0", "a23.h3->logits", "m0->a23.kv1<v>", "a20.h0->a23.h3<q>", "a16.h0->a17.kv1<k>", "a29.h1->m29"]
    edges = torch.tensor([graph.edge(name) for name in names])
    (part,) = engine.parts()
    kept = torch.ones(len(edges), graph.n_edges)
    kept[torch.arange(len(edges)), edges] = 0
    slow = engine.values(graph.mask(kept)) - engine.full
    assert (edge_changes(part, edges) - slow).abs().max() < 1e-3
    assert slow.abs().max() > 1


def test_two_percent_of_the_edges_compute_ioi(smollm2):
    """A small search finds edges that carry most of the behaviour on other prompts; a ranking by norm carries none."""
    graph = Graph(smollm2)
    search = mi.tasks.ioi(smollm2, n=8, seed=0)
    scores = find(graph, search, EAPIG(steps=3), draws=0, controls=False, progress=False)
    held_out = mi.tasks.ioi(smollm2, n=8, seed=1)
    result = evaluate(scores, held_out, sizes=(0.02, 1.0), control_sizes=(), progress=False)
    assert 0.7 < float(result.data["faithfulness"].sel(selection="absolute", size=0.02)) < 1.3
    ranking = by_norm(Engine(graph, search), "edge", 0)
    kept = torch.zeros(graph.n_edges, dtype=torch.bool)
    kept[ranking.argsort(descending=True)[: int(0.02 * graph.n_edges)]] = True
    control = faithfulness(Circuit(graph, graph.prune(kept)), held_out)
    assert control["faithfulness"] is not None and control["faithfulness"] < 0.3
