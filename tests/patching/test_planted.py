"""On a model whose circuit was written by hand, a sweep finds that circuit: no head less, no head more."""

import numpy as np
import pytest

from mechinterp import load
from mechinterp.models.planted import circuit
from mechinterp.patching import sweep
from mechinterp.tasks import induction

PLANTED = "planted-induction"


@pytest.fixture(scope="module")
def model():
    return load(PLANTED, device="cpu")


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_sweep_finds_exactly_the_planted_heads(model, direction, seed):
    result = sweep(model, induction(model, n=32, seed=seed), "z", "all", direction, progress=False)
    planted = set(circuit(PLANTED).heads)
    for row in result.to_frame().to_dict("records"):
        if (row["layer"], row["head"]) in planted:
            assert row["passes"] and row["effect"] > 0.3, row
            assert 0 < row["ci_low"] <= row["effect"] <= row["ci_high"]
        else:
            assert not row["passes"] and abs(row["effect"]) < 1e-4, row
    names = [row["cell"] for row in result.top(2).to_dict("records")]
    assert {*names} == {f"L{layer}H{head}" for layer, head in planted}


def test_by_role_the_circuit_acts_where_it_should(model):
    """The previous-token head moves A to B's position (and C to D's), the induction head answers at END."""
    result = sweep(model, induction(model, n=32), "z", "roles", progress=False)
    effect = result.data["effect"]
    assert float(effect.sel(layer=1, head=2, role="END")) > 0.9
    both = float(effect.sel(layer=0, head=2, role="B1") + effect.sel(layer=0, head=2, role="D1"))
    assert both > 0.5
    rest = effect.copy()
    for at in (
        {"layer": 1, "head": 2, "role": "END"},
        {"layer": 0, "head": 2, "role": "B1"},
        {"layer": 0, "head": 2, "role": "D1"},
    ):
        rest.loc[at] = 0
    assert float(np.abs(rest).max()) < 0.02


def test_a_planted_head_that_is_knocked_out_leaves_no_task(model):
    from mechinterp import Site, UserError, Zero

    task = induction(model, n=16)
    for layer, head in circuit(PLANTED).heads:
        with (
            model.intervene(Zero(Site("z", layer, head=head))),
            pytest.raises(UserError, match="does not do this task"),
        ):
            sweep(model, task, progress=False)
    with model.intervene(Zero(Site("z", 0, head=0))):
        assert sweep(model, task, progress=False).data["passes"].sum() == 2


def test_keys_carry_the_circuit(model):
    """K-composition: of all keys only those of the induction head matter (its decoy writes where nothing is read)."""
    result = sweep(model, induction(model, n=16), "k", "all", progress=False)
    effect = result.data["effect"]
    axis = effect.dims[1]
    assert float(effect.sel({"layer": 1, axis: 2})) > 0.3
    assert float(np.abs(effect.where((effect["layer"] != 1) | (effect[axis] != 2), 0)).max()) < 1e-4
