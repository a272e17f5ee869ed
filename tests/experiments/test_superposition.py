"""The toy models of superposition in small: the experiment runs to its end, says what it found, and continues."""

import json

import numpy as np
import pytest
import torch

import mechinterp as mi
from experiments.superposition import Config, fractions_text, main, said_interval
from experiments.superposition_models import NEAR, FractionRow, Phases, Trained, fraction_rows, grid, pentagon_rows
from mechinterp.sae.toy_models import STICKY_FRACTIONS
from mechinterp.statistics import Interval

SMALL = {
    "steps": 300, "batch": 64, "learning_rate": 2e-2, "restarts": 3, "n_importances": 2, "n_densities": 3,
    "phase_restarts": 2, "n_features": 12, "d_hidden": 4, "uniform_densities": 3, "uniform_restarts": 2,
    "uniform_steps": 50, "sae_tokens": 8192,
}  # fmt: skip


def test_it_runs_reports_and_continues(tmp_path, capsys):
    config = Config(root=str(tmp_path), **SMALL)
    page = main(config)
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1] == str(page) and ("No comparison" in said or "No reference" in said)
    report = json.loads(page.with_name("report.json").read_text())
    assert "pentagon" in report["answer"] and "nan" not in report["answer"]
    assert "NaN" not in page.read_text().split("<script>")[0]
    assert [len(section["figures"]) for section in report["sections"]] == [1, 2, 1, 2, 0, 0]
    rows = report["sections"][0]["table"]["rows"]
    assert [row[2] for row in rows] == [2] * len(rows), "without a ReLU as many features as dimensions"
    assert rows[0][1].startswith("2"), "dense features: no superposition"
    assert int(rows[-1][3].split()[0]) >= 1, "sparse ones: a pentagon"
    assert report["command"].startswith("python experiments/superposition.py --steps 300 --batch 64")
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


def test_clusters_are_found_where_they_are_and_only_there():
    W = pentagon_and_pairs(3)
    rows = {row.name: row for row in fraction_rows(hand_made(W), seed=0)}
    assert rows["pentagon"].share.estimate == pytest.approx(5 / 11) and rows["pentagon"].clusters
    assert rows["antipodal pair"].share.estimate == pytest.approx(6 / 11) and rows["antipodal pair"].clusters
    assert not any(rows[name].clusters for name in rows if name not in ("pentagon", "antipodal pair"))


def test_a_continuum_is_no_cluster():
    """Pairs of all lengths have dimensionalities everywhere: windows hold no more than what lies beside them."""
    generator = torch.Generator().manual_seed(3)
    models = []
    for _ in range(12):
        lengths = 0.3 + 2.7 * torch.rand(100, generator=generator)  # no edge of their range near a window
        models.append(torch.block_diag(*[torch.tensor([[1.0, float(-one)]]) for one in lengths]))
    trained = Trained(torch.stack(models)[None], torch.tensor([0.1]), torch.zeros(1, 12), models[0][None])
    for row in fraction_rows(trained, seed=0):
        if row.name in ("triangle", "pentagon", "square antiprism"):
            assert row.share.estimate > 0.01, "the windows are not empty"
            assert abs(row.excess.estimate) < 0.3 * row.share.estimate and not row.clusters, row


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


def test_what_is_no_cluster_is_said():
    def interval(value: float) -> Interval:
        return Interval(*(np.array(value + shift) for shift in (0, -0.01, 0.01)))

    low = FractionRow("pentagon", 0.4, interval(0.02), 0.03, 0.01, interval(-0.01), False)
    unsure = FractionRow("triangle", 2 / 3, interval(0.05), 0.03, 0.01, interval(0.02), False)
    said = fractions_text([low, unsure])
    assert said.startswith("No fraction stands out.")
    assert "At pentagon (0.4) lie 2.0%, no more than the 3.0% of the controls." in said
    assert "At triangle (0.667) lie 5.0%, not reliably more than the 3.0%" in said
    assert said_interval(Interval(np.array(2.0), np.array(2.0), np.array(2.0)), 1) == "2.0"
    fractions = sorted(STICKY_FRACTIONS.values())
    assert min(np.diff(fractions)) > 2 * NEAR, "windows do not overlap"


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"restarts": 1}, "restarts must be at least 2"), ({"n_features": 10}, "more features than dimensions")],
    ids=["restarts", "features"],
)
def test_bad_settings_are_one_line(settings, found):
    with pytest.raises(mi.UserError, match=found):
        Config(**settings)
