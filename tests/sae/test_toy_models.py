"""The toy model's data, gradients and geometry against hand-made cases, and what it learns against theory."""

import math

import pytest
import torch

import mechinterp as mi
from mechinterp.sae.toys.toy_models import (
    PHASES,
    STICKY_FRACTIONS,
    ToyModels,
    critical_density,
    dimensionality,
    dimensions_per_feature,
    held_out_loss,
    hidden_chunks,
    is_polygon,
    norms,
    phase,
    phase_losses,
    polygon_deviation,
    random_directions,
    represented,
    train,
)


def polygon(n: int, size: float = 1.0) -> torch.Tensor:
    angles = torch.arange(n) * 2 * math.pi / n
    return size * torch.stack([angles.cos(), angles.sin()])


def tetrahedron() -> torch.Tensor:
    return torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 3**0.5


def square_antiprism() -> torch.Tensor:
    """Two squares, turned by 45°, at the height where the eight vectors are a tight frame."""
    height = 3**-0.5
    rings = [
        torch.stack([(angle.cos() * (1 - height**2) ** 0.5), (angle.sin() * (1 - height**2) ** 0.5), sign * height])
        for sign, turn in ((torch.tensor(1.0), 0.0), (torch.tensor(-1.0), math.pi / 4))
        for angle in torch.arange(4) * math.pi / 2 + turn
    ]
    return torch.stack(rings, 1)


SHAPES = {
    "dedicated": torch.eye(3),
    "tetrahedron": tetrahedron(),
    "triangle": polygon(3),
    "antipodal pair": torch.tensor([[1.0, -1.0]]),
    "pentagon": polygon(5),
    "square antiprism": square_antiprism(),
}


def test_features_are_as_sparse_as_they_should_be_and_uniform():
    x = ToyModels(8, 2, [1.0, 0.25]).sample(20_000, torch.Generator().manual_seed(0))
    assert (x >= 0).all() and x.max() <= 1
    fires = x > 0
    assert fires[0].float().mean() > 0.999 and abs(fires[1].float().mean() - 0.25) < 0.005
    assert abs(x[1][fires[1]].mean() - 0.5) < 0.01 and abs(x[1][fires[1]].var() - 1 / 12) < 0.003


def test_forward_and_loss_are_those_of_the_paper():
    models = ToyModels(4, 2, [0.5, 0.2, 1.0], importance=torch.tensor([1.0, 0.5, 0.25, 0.0]), seed=3)
    with torch.no_grad():
        models.b.copy_(torch.randn(3, 4) / 10)
    x = models.sample(6, torch.Generator().manual_seed(1))
    models.requires_grad_(False)
    for i in range(3):
        W, want = models.W[i], 0.0
        for one in x[i]:
            back = torch.relu(W.T @ (W @ one) + models.b[i])
            want += float((models.importance[i] * (one - back) ** 2).sum()) / 6
        assert float(models.loss(x)[i]) == pytest.approx(want, rel=1e-5)
        assert torch.allclose(models.hidden(x)[i], x[i] @ W.T, atol=1e-6)


def test_instances_know_nothing_of_each_other():
    """The gradient of one instance's loss is 0 in all others."""
    models = ToyModels(4, 2, [0.5, 0.2])
    models.loss(models.sample(8, torch.Generator().manual_seed(0)))[1].backward()
    assert models.W.grad is not None and models.b.grad is not None
    assert models.W.grad[1].abs().max() > 0 and models.W.grad[0].abs().max() == 0
    assert models.b.grad[0].abs().max() == 0


@pytest.mark.parametrize("name", STICKY_FRACTIONS)
def test_dimensionality_of_a_polytope_is_its_fraction(name):
    W = SHAPES[name]
    d = dimensionality(W)
    assert torch.allclose(d, torch.full_like(d, STICKY_FRACTIONS[name]), atol=1e-5)
    assert float(d.sum()) == pytest.approx(W.shape[0], abs=1e-4), "no dimension is left over"
    assert float(dimensions_per_feature(W)) == pytest.approx(STICKY_FRACTIONS[name], abs=1e-5)


def test_polytopes_in_orthogonal_spaces_keep_their_fractions():
    both = torch.block_diag(polygon(5, 1.1), torch.tensor([[0.9, -0.9]]))
    both = torch.cat([both, torch.zeros(3, 1)], 1)  # one feature that is not represented
    assert torch.allclose(dimensionality(both), torch.tensor([0.4] * 5 + [0.5] * 2 + [0.0]), atol=1e-5)
    assert represented(both).tolist() == [True] * 7 + [False]


def test_polygons_are_told_by_their_angles():
    assert polygon_deviation(polygon(5)) < 1e-3 and is_polygon(polygon(5), 5) and not is_polygon(polygon(5), 4)
    turned = polygon(5)
    angle = math.radians(20)
    turned[:, 0] = torch.tensor([math.cos(angle), math.sin(angle)])
    assert polygon_deviation(turned) == pytest.approx(20, abs=1e-3) and not is_polygon(turned, 5)
    pentagon_and_short = torch.cat([polygon(5), torch.tensor([[0.1], [0.1]])], 1)
    assert is_polygon(pentagon_and_short, 5), "what is not represented has no corner"
    assert math.isnan(polygon_deviation(polygon(2)))
    with pytest.raises(mi.UserError, match="2 dimensions"):
        polygon_deviation(torch.eye(3))


def test_random_directions_keep_the_norms_alone():
    W = torch.randn(3, 4, 9)
    control = random_directions(W, torch.Generator().manual_seed(7))
    assert torch.allclose(norms(control), norms(W), atol=1e-5)
    assert torch.nn.functional.cosine_similarity(control, W, dim=1).abs().mean() < 0.6


def test_plain_losses_are_those_of_a_simulation():
    p, second, n = 0.3, 0.6, 200_000
    models = ToyModels(2, 1, [p] * 3, importance=torch.tensor([1.0, second]))
    with torch.no_grad():
        models.W.copy_(torch.tensor([[[1.0, 0.0]], [[1.0, -1.0]], [[0.0, 1.0]]]))
        models.b.copy_(torch.tensor([[0.0, p / 2], [0.0, 0.0], [p / 2, 0.0]]))
    want = phase_losses(torch.tensor(p), torch.tensor(second))
    assert torch.allclose(held_out_loss(models, n), want, rtol=0.02)
    assert phase(models.W.detach()).tolist() == [0, 1, 2] and PHASES[1] == "superposition"


@pytest.mark.parametrize("importance", [0.1, 0.5, 1.0, 3.0])
def test_superposition_wins_below_the_critical_density(importance):
    second = torch.tensor([importance] * 2)
    at = float(critical_density(second)[0])
    best = phase_losses(torch.tensor([at * 0.99, at * 1.01]), second).argmin(-1).tolist()
    assert best[0] == 1 and best[1] != 1


def test_sparse_features_form_a_pentagon_and_dense_ones_do_not():
    restarts = 4
    models = ToyModels(5, 2, [1.0] * restarts + [0.05] * restarts, 0.9 ** torch.arange(5))
    before = held_out_loss(models)
    losses = train(models, steps=1000, learning_rate=2e-2)
    after = held_out_loss(models)
    assert losses.shape == (1000, 8) and (after < before).all()
    best = after.view(2, restarts).argmin(1)
    dense, sparse = models.W.detach().view(2, restarts, 2, 5)[torch.arange(2), best]
    assert represented(dense).tolist() == [True, True, False, False, False], "the two most important ones, as PCA"
    assert dimensionality(dense)[:2].min() > 0.8, "they share no direction"
    assert is_polygon(sparse, 5, tolerance=8)


def test_linear_models_show_no_superposition():
    """Whatever the sparsity: as many features as dimensions."""
    models = ToyModels(5, 2, [1.0, 0.05], 0.9 ** torch.arange(5), relu=False)
    train(models, steps=1000, learning_rate=2e-2)
    assert represented(models.W.detach()).sum(1).tolist() == [2, 2]
    assert torch.allclose(dimensions_per_feature(models.W.detach()), torch.ones(2), atol=0.05)


def test_hidden_activations_are_chunks_that_resume():
    """Wx of features of the density asked for; a state of another model is refused."""
    W = torch.eye(4)
    source = hidden_chunks(W, 0.25, tokens=4000)
    first = source.chunk()["toy"]
    assert first.shape == (4000, 4) and abs(float((first > 0).float().mean()) - 0.25) < 0.02
    again = hidden_chunks(W, 0.25, tokens=4000)
    again.load_state_dict(source.state_dict())
    assert torch.equal(again.chunk()["toy"], source.chunk()["toy"])
    with pytest.raises(mi.UserError, match="not of this source"):
        hidden_chunks(2 * W, 0.25, tokens=4000).load_state_dict(source.state_dict())


def test_training_repeats_itself():
    made = []
    for seed in (0, 0, 1):
        models = ToyModels(5, 2, [0.1], seed=seed)
        train(models, steps=5, batch=16, seed=seed)
        made.append(models.W.detach().clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (lambda: ToyModels(0, 2, [0.5]), "features and dimensions; found 0 and 2"),
        (lambda: ToyModels(5, 2, []), "found none"),
        (lambda: ToyModels(5, 2, [0.5, 0.0]), "found 0.0"),
        (lambda: ToyModels(5, 2, [0.5], torch.ones(4)), r"found \[4\]"),
        (lambda: ToyModels(5, 2, [0.5], -torch.ones(5)), "the smallest -1"),
        (lambda: train(ToyModels(5, 2, [0.5]), steps=0), "steps and batch"),
        (lambda: train(ToyModels(5, 2, [0.5]), steps=200, learning_rate=1e20), "not finite at step"),
    ],
    ids=["size", "none", "density", "importance", "negative", "steps", "infinite"],
)
def test_bad_input_is_one_line(act, found):
    with pytest.raises(mi.UserError, match=found):
        act()
