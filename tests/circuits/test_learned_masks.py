"""Learned masks: the distribution they are drawn from, the gradient that moves them, and the planted circuit."""

import pytest
import torch

import mechinterp as mi
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.find import find
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.learned_masks import LearnedMask, p_kept, sample
from mechinterp.errors import UserError
from mechinterp.models import planted
from mechinterp.tasks.planted import other_tokens
from tests.families import model, pairs

CASES = [
    ("gpt2", {}, "logit-diff"),
    ("llama", {}, "kl"),
    ("llama", {"qkv": "ungrouped"}, "logit-diff"),
    ("qwen3", {"positions": "all"}, "kl"),
    ("gemma2", {}, "logit-diff"),
    ("neox", {"qkv": "merged"}, "logit-diff"),
]


@pytest.mark.parametrize(("family", "options", "metric"), CASES)
def test_gradient_of_a_random_mask(family, options, metric):
    """∂ metric / ∂ mask, through `Graph.mask`, is the central difference of the masked forward along random directions,
    away from both ends of the mask."""
    of = model(family)
    engine = Engine(Graph(of, **options), pairs(of, family == "gpt2"), metric=metric)
    graph = engine.graph
    draw = torch.Generator().manual_seed(2)
    mask = (0.6 + 0.3 * torch.rand(graph.n_edges, generator=draw)).requires_grad_()
    (part,) = engine.parts()
    (grad,) = torch.autograd.grad(part.metric(graph.mask(mask[None])).sum(), mask)
    step, along = 1e-3, torch.randn(4, graph.n_edges, generator=draw).sign()
    moved = torch.cat([mask.detach() + step * along, mask.detach() - step * along])
    up, down = engine.values(graph.mask(moved)).double().sum(1).split(4)
    slope = (up - down) / (2 * step)
    want = along.double() @ grad.double()
    assert (slope - want).abs().max() < 2e-2 * want.abs().max()
    # With positions, those before the first difference and those that nobody reads have no slope.
    assert want.abs().max() > 0.5 and grad.count_nonzero() > 0.4 * graph.n_edges


def test_drawn_masks_are_hard_concrete():
    """P(mask > 0) is what the scores say, masks reach both ends, and log_alpha gets a gradient in between only."""
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).repeat_interleave(20_000).requires_grad_()
    drawn = sample(log_alpha, torch.Generator().manual_seed(0))
    share = (drawn > 0).float().unflatten(0, (5, -1)).mean(1)
    assert (share - p_kept(log_alpha).detach().unflatten(0, (5, -1))[:, 0]).abs().max() < 0.015
    assert (drawn == 0).any() and (drawn == 1).any() and ((drawn > 0) & (drawn < 1)).any()
    (grad,) = torch.autograd.grad(drawn.sum(), log_alpha)
    between = (drawn > 0) & (drawn < 1)
    assert (grad[between] > 0).all() and not grad[~between].any()


@pytest.mark.parametrize(("direction", "metric", "warm_start"), [("noise", "kl", True), ("denoise", None, False)])
def test_finds_the_planted_circuit(direction, metric, warm_start):
    """The true edges of `planted-induction` have the largest scores, far from all others."""
    of = mi.load("planted-induction")
    graph, true = Graph(of), planted.circuit("planted-induction").serial
    method = LearnedMask(share=len(true) / graph.n_edges, steps=80, lr=0.3, warm_start=warm_start)
    task = other_tokens(of, 8)
    scores = find(graph, task, method, direction=direction, metric=metric, controls=False, progress=False)
    circuit = scores.select(edges=len(true))
    assert set(circuit.edges) == set(true)
    assert scores.values[circuit.kept].min() > 0.9 and scores.values[~circuit.kept].max() < 0.1


def test_the_seed_decides():
    """The same seed gives the same scores, another one others."""
    of = model("llama")
    engine = Engine(Graph(of), pairs(of, True))
    first, again, other = (next(LearnedMask(steps=3, seed=seed).scores(engine))[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_prompts_in_several_calls(monkeypatch):
    """Where one call cannot hold the prompts, steps take them in turn."""
    of = model("gpt2")
    engine = Engine(Graph(of), pairs(of, False))
    monkeypatch.setattr(Engine, "rows_per_call", 2)
    seen, run = [], type(next(engine.parts())).metric

    def metric(part, mask, pins=None):
        seen.append(part.index.tolist())
        return run(part, mask, pins)

    monkeypatch.setattr("mechinterp.circuits.engine.Part.metric", metric)
    next(LearnedMask(steps=3, warm_start=False).scores(engine))
    assert seen == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"share": 0.0}, "between 0 and 1"), ({"share": 1.0}, "between 0 and 1"), ({"steps": 0}, "steps ≥ 1")],
)
def test_refuses_settings(settings, message):
    with pytest.raises(UserError, match=message):
        LearnedMask(**settings)


def test_refuses_what_has_no_gradient_or_no_effect():
    of = model("gpt2")
    task = pairs(of, False)
    with pytest.raises(UserError, match="rank has no gradient"):
        next(LearnedMask().scores(Engine(Graph(of), task, metric="rank")))
    same = type(task)(task.name, task.corruption, task.clean, task.clean, task.answers)
    with pytest.raises(UserError, match="nothing to learn"):
        next(LearnedMask().scores(Engine(Graph(of), same)))
