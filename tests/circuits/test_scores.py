"""Selections from scores, and what circuits say of themselves."""

import pytest
import torch

import mechinterp as mi
from mechinterp import UserError
from mechinterp.circuits import Circuit, Graph, Scores, find, overlap
from mechinterp.circuits.methods import EAPIG
from mechinterp.tasks.planted import task_of
from tests.families import model, pairs


def scored(values=None, level="edge", draws=0, **options):
    graph = Graph(model("llama"), **options)
    n = graph.n_edges if level == "edge" else graph.n_nodes
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(n, generator=draw) if values is None else values
    return Scores(graph, values, level, torch.randn(draws, n, generator=draw), {}, {"method": "given"})


def test_top_n_is_the_top():
    scores = scored()
    n = 30
    for by, size in (("absolute", scores.values.abs()), ("signed", scores.values)):
        kept = scores.select(n, by=by, prune=False).kept
        assert int(kept.sum()) == n and size[kept].min() >= size[~kept].max()
    assert len(scores.select(0.5, prune=False)) == scores.graph.n_edges // 2
    assert len(scores.select(1.0)) == scores.graph.n_edges
    kept = scores.select(threshold=1.0, prune=False).kept
    assert torch.equal(kept, scores.values.abs() >= 1.0)


def test_greedy_always_leads_to_the_logits():
    """Every edge of a greedy circuit leads to the logits, whatever the scores; a plain loop finds the same."""
    scores = scored()
    graph = scores.graph
    kept = scores.select(20, connect="greedy", prune=False).kept
    chosen: list[int] = []
    reached = {len(graph.destinations) - 1}
    while len(chosen) < 20:
        inside = [e for e in range(graph.n_edges) if int(graph.edges[e, 0]) in reached and e not in chosen]
        best = max(inside, key=lambda e: float(scores.values[e].abs()))
        chosen.append(best)
        source = int(graph.edges[best, 1])
        reached |= {i for i, one in enumerate(graph.destinations) if source in one.feeds}
    assert sorted(chosen) == kept.nonzero().flatten().tolist()


def test_nodes_keep_all_of_their_edges():
    scores = scored(level="node")
    circuit = scores.select(0.5, prune=False)
    sources = circuit.graph.edges[circuit.kept][:, 1].unique()
    count = torch.isin(circuit.graph.edges[:, 1], sources).sum()
    assert int(count) == len(circuit) <= 0.5 * circuit.graph.n_edges
    assert len(scores.select(3, prune=False)) > 0  # nodes of more edges than that are passed over


def test_inclusion_is_the_share_of_draws():
    scores = scored(draws=7)
    n = 25
    counted = torch.zeros(scores.graph.n_edges)
    for one in scores.draws:
        counted[one.abs().argsort(descending=True, stable=True)[:n]] += 1
    assert torch.equal(scores.select(n).inclusion, counted / 7)
    with pytest.raises(UserError, match="nothing to resample"):
        scored().inclusion(n)


def test_bootstrap_draws_are_means_over_resampled_prompts():
    """The draws that are kept along the way are the weighted means of per-prompt scores."""
    from mechinterp.circuits.engine import Engine
    from mechinterp.statistics import resampling_weights

    of = model("llama")
    task = pairs(of, False, n=6)
    scores = find(Graph(of), task, EAPIG(steps=2), draws=5, controls=False, force=True, progress=False)
    each = torch.cat([one for _, one in EAPIG(steps=2).scores(Engine(Graph(of), task))])
    weights = torch.from_numpy(resampling_weights(6, None, 5, 0)).float()
    assert torch.allclose(scores.values, each.mean(0), atol=1e-5)
    assert torch.allclose(scores.draws, weights @ each / weights.sum(1, keepdim=True), atol=1e-5)


def test_bad_input():
    scores = scored()
    for arguments, said in (
        ({}, "either edges="),
        ({"edges": 5, "threshold": 1.0}, "either edges="),
        ({"edges": 1.5}, "lies in 0"),
        ({"edges": 10**6}, "190 edges"),
        ({"edges": 5, "ranking": "norm"}, "no ranking 'norm'"),
        ({"threshold": 1.0, "connect": "greedy"}, "greedy' grows a number"),
    ):
        with pytest.raises(UserError, match=said):
            scores.select(**arguments)
    with pytest.raises(UserError, match="190 edges; found scores"):
        scored(torch.zeros(3))
    with pytest.raises(UserError, match="not finite"):
        scored(torch.full((190,), torch.nan))


def test_a_circuit_knows_its_nodes_and_runs():
    """Kept edges alone give the answer on the planted model; fewer do not."""
    of = mi.load("planted-induction")
    task = task_of("planted-induction")(of, 6, 0)
    graph = Graph(of)
    truth = mi.models.planted.circuit("planted-induction").edges
    circuit = Circuit.of(graph, list(truth))
    assert circuit.nodes == ["embed", "a0.h2", "a1.h2", "logits"] and circuit.heads == [(0, 2), (1, 2)]
    assert sorted(circuit.edges) == sorted(truth)
    logits = circuit.run(task.clean, task.corrupted)
    assert logits.shape == (6, task.clean.n_pos, of.d_vocab)
    answer = task.answers.answer[:, 0, 0]
    assert torch.equal(logits[:, -1].argmax(-1), answer)
    broken = Circuit.of(graph, list(truth[:-1])).run(task.clean, task.corrupted)
    assert not bool((broken[:, -1].argmax(-1) == answer).any())
    everything = Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool)).run(task.clean, task.corrupted)
    assert (everything - of(task.clean)).abs().max() < 1e-4
    with pytest.raises(UserError, match="give corrupted="):
        circuit.run(task.clean)
    with pytest.raises(UserError, match="pair them"):
        circuit.run(task.clean, task.corrupted.tokens[:, 1:])
    assert circuit.run(task.clean, ablation="zero").isfinite().all()


def test_overlap():
    graph = Graph(model("llama"))
    a, b = (Circuit.of(graph, names) for names in (["embed->m0", "m0->logits"], ["embed->m0", "embed->logits"]))
    table = overlap({"a": a, "b": b})
    assert table.loc["a", "b"] == pytest.approx(1 / 3) and table.loc["a", "a"] == 1
    with pytest.raises(UserError, match="both empty"):
        overlap({"a": Circuit.of(graph, []), "b": Circuit.of(graph, [])})
    with pytest.raises(UserError, match="one graph"):
        overlap({"a": a, "b": Circuit.of(Graph(model("gpt2")), [])})
