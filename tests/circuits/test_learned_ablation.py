"""Learned ablations: the gradient of their vectors, and that they hurt less than means on other prompts."""

import pytest
import torch

from mechinterp.circuits.ablations import Ablation
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.learned_ablation import learn_ablation
from mechinterp.errors import UserError
from tests.circuits.plain import masked_logits, source_outputs
from tests.families import full_logits, model, pairs


@pytest.mark.parametrize(("family", "padded"), [("gpt2", True), ("llama", False), ("gemma2", False), ("neox", True)])
def test_gradient_of_the_vectors(family, padded):
    """∂KL/∂vectors is the central difference of the forward by raw hooks with the vectors in the sources' place."""
    of = model(family)
    task, graph = pairs(of, padded), Graph(of)
    draw = torch.Generator().manual_seed(1)
    vectors = torch.randn(len(graph.sources), of.d_model, generator=draw).requires_grad_()
    mask = torch.rand(graph.valid.shape, generator=draw)
    engine = Engine(graph, task, Ablation("learned", vectors=vectors), metric="kl")
    (part,) = engine.parts()
    value = part.metric(mask[None]).mean()
    (grad,) = torch.autograd.grad(value, vectors)
    clean = full_logits(of, task.clean, [])[:, -1].log_softmax(-1)
    shape = next(iter(source_outputs(of, task.clean, not graph.heads_add_up).values())).shape

    def kl(given):
        ablated = {source.name: given[i].expand(shape) for i, source in enumerate(graph.sources)}

        def kept(source, destination):
            return float(mask[graph.destination_index[destination], graph.source_index[source], 0])

        ours = masked_logits(of, task.clean, ablated, kept)[:, -1].log_softmax(-1)
        return (clean.exp() * (clean - ours)).sum(-1).mean().double()

    assert abs(kl(vectors.detach()) - value.item()) < 1e-4
    step, along = 1e-2, torch.randn(3, *vectors.shape, generator=draw)
    along /= along.flatten(1).norm(dim=1)[:, None, None]
    slope = [(kl(vectors.detach() + step * d) - kl(vectors.detach() - step * d)) / (2 * step) for d in along]
    want = [float((grad * d).sum()) for d in along]
    assert grad.flatten(1).any(1).all()
    assert max(abs(a - b) for a, b in zip(slope, want, strict=True)) < 2e-2 * max(map(abs, want))


def random_cuts(graph, task, ablation):
    """`[circuit prompt]` KL with random sources cut, none to all of them; the same cuts for every ablation."""
    draw = torch.Generator().manual_seed(11)
    kept = torch.rand(16, len(graph.sources), generator=draw) >= torch.rand(16, 1, generator=draw)
    return Engine(graph, task, ablation, metric="kl").values(graph.mask(kept[:, graph.edges[:, 1]]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hurts_less_than_means_on_other_prompts(family):
    of = model(family)
    graph, task = Graph(of), pairs(of, False, n=48)
    train, held_out = task.take(torch.arange(32)), task.take(torch.arange(32, 48))
    learned = learn_ablation(graph, train, steps=60, lr=0.03, progress=False)
    mean = random_cuts(graph, held_out, Ablation("mean", train.clean, "all")).mean(0)
    ours = random_cuts(graph, held_out, learned).mean(0)
    gain = mean - ours  # by prompt
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5  # three standard errors above nothing
    assert gain.mean() > 0.1 * mean.mean()


def test_begins_with_the_mean_and_the_seed_decides():
    """A tiny rate leaves the mean of what each source writes, over prompts and positions; a seed repeats itself."""
    of = model("gpt2")
    graph, task = Graph(of), pairs(of, True)
    start = learn_ablation(graph, task, steps=1, lr=1e-9, progress=False).vectors
    real = task.clean.real
    want = torch.stack([one[real].mean(0) for one in source_outputs(of, task.clean).values()])
    assert start is not None and (start - want).abs().max() < 1e-5
    first, again, other = (
        learn_ablation(graph, task, steps=3, seed=seed, progress=False).vectors for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and not first.requires_grad


def test_refuses():
    of = model("gpt2")
    task = pairs(of, False)
    with pytest.raises(UserError, match="Valid: mlp='layer'"):
        learn_ablation(Graph(of, mlp="neuron"), task)
    with pytest.raises(UserError, match="steps ≥ 1"):
        learn_ablation(Graph(of), task, steps=0)
