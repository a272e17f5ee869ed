"""ACDC against a plain loop that tries one edge at a time, and on the planted circuit."""

import pytest
import torch

import mechinterp as mi
from mechinterp.circuits.acdc import ACDC
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.find import find
from mechinterp.circuits.graph import Graph
from mechinterp.errors import UserError
from mechinterp.models import planted
from mechinterp.tasks.planted import other_tokens
from tests.circuits.plain import masked_logits, source_outputs
from tests.circuits.test_engine import asked
from tests.families import full_logits, model, pairs

ENDS = {"noise": ("clean", "corrupted", 1), "denoise": ("corrupted", "clean", -1)}


def values_of(of, task, direction, metric):
    """Circuit, as a set of (source, destination) -> how much it hurts, by raw hooks."""
    base, other, sign = ENDS[direction]
    ablated = source_outputs(of, getattr(task, other))
    clean = full_logits(of, task.clean, [])[:, -1].log_softmax(-1)

    def hurt(kept):
        logits = masked_logits(of, getattr(task, base), ablated, lambda u, v: float((u, v) in kept))
        if metric == "kl":
            ours = logits[:, -1].log_softmax(-1)
            return sign * (clean.exp() * (clean - ours)).sum(-1).mean().item()
        return -sign * asked(of, task, logits).mean().item()

    return hurt


def one_at_a_time(graph, hurt, thresholds, order):
    """`name -> score` of the edges that survive, and how near any decision was to its threshold."""
    edges = [(graph.sources[u].name, graph.destinations[v].name) for v, u, _ in graph.edges.tolist()]
    kept, scores, margin = set(edges), {}, torch.inf
    for threshold in thresholds:
        now = hurt(kept)
        for edge in edges if order == "forward" else edges[::-1]:
            if edge not in kept:
                continue
            then = hurt(kept - {edge})
            margin = min(margin, abs(then - now - threshold))
            if then - now < threshold:
                kept, now = alive(graph, kept - {edge}), then
        scores |= dict.fromkeys(kept, threshold)
    return {f"{u}->{v}": score for (u, v), score in scores.items()}, margin


def alive(graph, kept):
    """Without the inputs of nodes that nobody reads."""
    while True:
        read = {source for source, _ in kept} | {"logits"}
        fed = {v.name: {graph.sources[i].name for i in v.feeds} or {"logits"} for v in graph.destinations}
        left = {edge for edge in kept if fed[edge[1]] & read}
        if left == kept:
            return kept
        kept = left


@pytest.mark.parametrize(
    ("family", "direction", "metric", "order", "thresholds"),
    [
        ("llama", "noise", "kl", "reverse", (0.1, 0.5)),
        ("gpt2", "denoise", "logit-diff", "forward", (0.3,)),
    ],
)
def test_equals_single_trials(family, direction, metric, order, thresholds):
    """Edges tried in batches, as if all were cut, are the edges that single runs by raw hooks cut."""
    of = model(family)
    task = pairs(of, False, n=2, length=6)
    graph = Graph(of)
    hurt = values_of(of, task, direction, metric)
    want, margin = one_at_a_time(graph, hurt, thresholds, order)
    assert margin > 1e-5  # float noise decides nothing
    engine = Engine(graph, task, direction=direction, metric=metric)
    assert engine.rows_per_call > 8  # several trials do share a call
    ((index, scores),) = ACDC(thresholds, order).scores(engine)
    got = {graph.edge_name(int(i)): float(scores[0, i]) for i in scores[0].nonzero().flatten()}
    assert index.tolist() == [0, 1]
    assert got == pytest.approx(want)
    assert sorted(set(got.values())) == pytest.approx(thresholds) and len(got) < graph.n_edges / 2


@pytest.mark.parametrize("order", ["reverse", "forward"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_finds_the_planted_circuit(order, direction):
    """Every true edge of `planted-induction` and no other, selected by the threshold."""
    of = mi.load("planted-induction")
    scores = find(
        Graph(of), other_tokens(of, 8), ACDC((0.1, 1.0), order), direction=direction, controls=False, progress=False
    )
    for threshold in (0.1, 1.0):
        assert set(scores.select(threshold=threshold).edges) == set(planted.circuit("planted-induction").serial)


def test_sees_what_differs_between_the_prompts():
    """With the predecessors swapped only the path through the keys differs."""
    of = mi.load("planted-induction")
    scores = find(Graph(of), mi.tasks.induction(of, n=8), ACDC(0.1), controls=False, progress=False)
    path = {"embed->a0.h2<v>", "a0.h2->a1.h2<k>", "a1.h2->logits"}
    assert set(scores.select(threshold=0.1).edges) == path


def test_dead_edges_are_cut_without_a_run(monkeypatch):
    """With a threshold above any effect, only the edges into the logits are run: nothing else is read any more."""
    of = model("gpt2")
    engine = Engine(Graph(of), pairs(of, False))
    run, tried = Engine.values, []
    monkeypatch.setattr(Engine, "values", lambda self, masks: tried.append(len(masks)) or run(self, masks))
    ((_, scores),) = ACDC(1e6).scores(engine)
    into_logits = int((engine.graph.edges[:, 0] == len(engine.graph.destinations) - 1).sum())
    widest = engine.rows_per_call // len(engine)
    assert not scores.any()
    assert into_logits < sum(tried) <= into_logits + widest + 1 < engine.graph.n_edges


@pytest.mark.parametrize("threshold", [0.0, -1.0, (), (0.1, 0.1), (0.3, 0.1)])
def test_refuses_thresholds_that_do_not_rise(threshold):
    with pytest.raises(UserError, match="above 0, or several that rise"):
        ACDC(threshold)
