"""The toy models of superposition in small: the experiment runs to its end, says what it found, and continues."""

import json

import numpy as np
import pytest
import torch

import mechinterp as mi
from experiments.superposition import Config, main
from experiments.superposition_models import Phases, Trained, grid, pentagon_rows
from experiments.superposition_report import said_interval, shapes_text
from experiments.superposition_shapes import NEAR, SHAPES, TOGETHER, ShapeRow, sets, shape_rows
from mechinterp.sae.toys.toy_models import STICKY_FRACTIONS
from mechinterp.statistics import Interval

SMALL = {
    "preset": "tiny", "steps": 1500, "batch": 128, "learning_rate": 3e-2, "restarts": 3, "n_importances": 2,
    "n_densities": 3, "phase_restarts": 2, "sae_tokens": 8192,
}  # fmt: skip


def test_it_runs_reports_and_continues(tmp_path, capsys):
    config = Config(root=str(tmp_path), **SMALL)
    page = main(config)
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1] == str(page) and ("No comparison" in said or "No reference" in said)
    report = json.loads(page.with_name("report.json").read_text())
    assert "pentagon" in report["answer"] and "nan" not in report["answer"]
    assert "NaN" not in page.read_text().split("<script>")[0]
    assert [len(section["figures"]) for section in report["sections"]] == [1, 2, 1, 1, 0, 0]
    rows = report["sections"][0]["table"]["rows"]
    assert [row[2] for row in rows] == [2] * len(rows), "without a ReLU as many features as dimensions"
    assert rows[0][1].startswith("2"), "dense features: no superposition"
    assert all(int(row[3].split()[0]) >= 2 for row in rows[-2:]), "sparse ones: a pentagon, but for one start at most"
    assert all(float(row[4].split()[0].rstrip("°")) < 5 < 30 < float(row[5].rstrip("°")) for row in rows[-2:])
    assert report["command"].startswith("python experiments/superposition.py --preset tiny --steps 1500")
    assert main(config) == page
    assert capsys.readouterr().out.count("done before, loaded") == 4


def hand_made(W: torch.Tensor) -> Trained:
    """Two equal starts of one density."""
    return Trained(torch.stack([W, W])[None], torch.tensor([0.1]), torch.zeros(1, 2), W[None])


def pentagon_and_pairs(n: int) -> torch.Tensor:
    """A pentagon in a plane of its own, antipodal pairs in n dimensions."""
    angles = torch.arange(5) * 2 * torch.pi / 5
    pentagon = torch.stack([angles.cos(), angles.sin()])
    return torch.block_diag(pentagon, *[torch.tensor([[1.0, -1.0]])] * n)


def antiprism() -> torch.Tensor:
    """Two squares, turned by 45°, at the height where every vector has 3/8."""
    turns = torch.arange(8) * torch.pi / 2 + torch.tensor([0.0] * 4 + [torch.pi / 4] * 4)
    height = torch.tensor([1.0] * 4 + [-1.0] * 4) / 3**0.5
    return torch.stack([turns.cos() * (2 / 3) ** 0.5, turns.sin() * (2 / 3) ** 0.5, height])


def triangle(size: float = 1.0) -> torch.Tensor:
    """Three features in a plane."""
    angles = torch.arange(3) * 2 * torch.pi / 3
    return size * torch.stack([angles.cos(), angles.sin()])


def tetrahedron() -> torch.Tensor:
    """Four features in a space."""
    return torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 3**0.5


def test_every_published_shape_is_told_from_the_others():
    parts = (torch.eye(1), tetrahedron(), triangle(0.9), pentagon_and_pairs(2), antiprism())
    rows = shape_rows(hand_made(torch.block_diag(*parts, torch.zeros(1, 2))), seed=0)
    assert [row.exact for row in rows] == [2 * n for n in (1, 4, 3, 4, 5, 8)], "in two equal starts"
    assert all(row.found and row.alike == row.near == row.near_alike == row.exact for row in rows)
    assert [row.name for row in rows] == list(SHAPES) == list(STICKY_FRACTIONS)
    assert all(dims / features == STICKY_FRACTIONS[name] for name, (features, dims) in SHAPES.items())


def test_a_dimensionality_alone_is_no_shape():
    """Ten unequal pairs: the longer vector of each has D = 2/5 or near it, and none is in a pentagon."""
    W = torch.block_diag(*[torch.tensor([[1.0, -((1 / 0.4 - 1) ** 0.5)]])] * 10)
    rows = {row.name: row for row in shape_rows(hand_made(W), seed=0)}
    assert rows["pentagon"].near == 20 and not rows["pentagon"].alike and not rows["pentagon"].found
    pair = rows["antipodal pair"]
    assert (pair.alike, pair.exact, pair.near) == (40, 0, 0) and not pair.found, "of two features, but not equal ones"
    assert pair.low == pytest.approx(0.4, abs=1e-3) and pair.high == pytest.approx(0.6, abs=1e-3)


def test_random_directions_are_no_shapes():
    W = torch.nn.functional.normalize(torch.randn(2, 3, 10, 40, generator=torch.Generator().manual_seed(0)), dim=2)
    trained = Trained(W, torch.tensor([0.5, 0.1]), torch.zeros(2, 3), W[:, 0])
    assert not any(row.found for row in shape_rows(trained, seed=0))
    assert (sets(W).size == 40).all(), "all in one set, which has all dimensions"
    assert np.allclose(sets(W).dims, sets(W).D.sum(-1, keepdims=True), atol=1e-4)


def test_the_shapes_hold_together():
    """Within a shape the graph of cosines is connected, so that it is one set."""
    for shape in (tetrahedron(), triangle(), pentagon_and_pairs(0), antiprism()):
        assert set(sets(shape[None, None]).size.ravel()) == {shape.shape[1]}
    assert np.cos(np.radians(72)) > TOGETHER and min(np.diff(sorted(STICKY_FRACTIONS.values()))) > 2 * NEAR


def test_pentagons_are_counted_beside_random_directions():
    rows = pentagon_rows(hand_made(pentagon_and_pairs(0)), seed=0)
    assert rows[0].pentagons == 2 and float(rows[0].represented.estimate) == 5 and rows[0].linear == 5
    assert rows[0].deviation is not None and float(rows[0].deviation.estimate) < 1e-3
    assert rows[0].random is not None and rows[0].random > 20
    none = pentagon_rows(hand_made(torch.eye(2, 5)), seed=0)
    assert none[0].pentagons == 0 and none[0].deviation is None and none[0].random is None


def test_the_boundary_is_between_the_last_shared_and_the_first_other():
    found = torch.tensor([[1, 1, 0], [1, 1, 1], [2, 2, 2]])
    phases = Phases(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.1, 0.3, 0.9]), found, found, found, 1, 1, 0, 0)
    assert phases.boundary() == [
        (pytest.approx(0.3), pytest.approx(0.9)), (pytest.approx(0.9), None), (None, pytest.approx(0.1))
    ]  # fmt: skip
    cells, weights = grid([0.5, 2.0], [0.1, 0.9])
    assert cells == [0.1, 0.9, 0.1, 0.9] and weights[:, 1].tolist() == [0.5, 0.5, 2.0, 2.0]


def test_what_is_no_shape_is_said():
    trained = hand_made(pentagon_and_pairs(0))
    no = ShapeRow("triangle", 2 / 3, 6, 0, 9, 3, 0.6, 0.65, 0, None, None)
    yes = ShapeRow("pentagon", 0.4, 10, 10, 10, 10, 0.4, 0.4, 0, 0, 0)
    assert shapes_text([yes], trained) == "Exact shapes: 10 features in pentagons (1/(1 − S) = 10.0)."
    said = shapes_text([no], trained)
    assert said.startswith("No exact shape") and "so that their D differ: triangle 0.60" in said
    assert "A fraction alone proves no shape. Of 9 features with D near 0.667, 3 are in a set like a triangle." in said
    absent = ShapeRow("tetrahedron", 0.75, 0, 0, 0, 0, float("nan"), float("nan"), 0, None, None)
    assert shapes_text([yes, absent], trained).endswith("Not found: tetrahedron.")
    assert said_interval(Interval(np.array(2.0), np.array(2.0), np.array(2.0)), 1) == "2.0"


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"restarts": 1}, "restarts must be at least 2"), ({"n_densities": 1}, "n_densities must be at least 2")],
    ids=["restarts", "densities"],
)
def test_bad_settings_are_one_line(settings, found):
    with pytest.raises(mi.UserError, match=found):
        main(Config(**settings))
