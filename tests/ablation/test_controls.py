"""Random sets are drawn from the same layers, and their knock-outs are what stands beside ours."""

import json

import numpy as np
import pytest

from mechinterp.ablation import knock_out
from mechinterp.ablation.components import Components
from mechinterp.ablation.controls import random_like
from tests.ablation.reference import templated
from tests.families import model, pairs


def labels(control):
    return [set(one.labels) for one in control.sets]


def test_random_sets_are_of_the_same_layers_and_hold_none_of_the_heads():
    of = model("llama")
    task = pairs(of, True)
    asked = Components.of(of, task, heads=[(1, 0), (1, 3), (2, 2)], neurons=[(0, 5)], edges=[((0, 1), "END", "A")])
    control = random_like(of, task, asked, 30, seed=0)
    assert len(control.sets) == 30 and len(set(control.sets)) == 30
    for one in control.sets:
        assert not set(one.heads) & set(asked.heads) and not set(one.neurons) & set(asked.neurons)
        assert sorted(layer for layer, _ in one.heads) == [1, 1, 2] and one.neurons[0][0] == 0
        assert len({*one.heads}) == 3
        (edge,) = one.edges
        assert edge.heads == ((0, 1),) and edge.query == "END"
        query, was, now = (task.clean.select(at).int().argmax(-1) for at in ("END", "A", edge.key_positions))
        assert (now != was).all() and (now <= query).all() and task.clean.real[range(4), now].all()
    assert "heads of the same layers, neurons of the same layers, other keys" in control.note
    assert random_like(of, task, asked, 30, seed=0) == control != random_like(of, task, asked, 30, seed=1)


def test_there_are_no_more_sets_than_the_layers_have():
    of = model("llama")
    task = pairs(of, True)
    one = random_like(of, task, Components.of(of, task, heads=[(1, 2)]), 20, seed=0)
    assert sorted(map(str, one.sets)) == ["L1H0", "L1H1", "L1H3"] and one.note.startswith("3 random sets")
    exhausted = random_like(of, task, Components.of(of, task, heads=[(1, 0), (1, 1), (1, 2)]), 50, seed=0)
    assert all((1, 3) in made.heads and sum(layer == 1 for layer, _ in made.heads) == 1 for made in exhausted.sets)
    assert "a layer had too few" in exhausted.note
    mlps = random_like(of, task, Components.of(of, task, mlps=[0, 2]), 5, seed=0)
    assert mlps.sets == () and mlps.note.startswith("none")
    every = [(layer, one) for layer in range(3) for one in range(4)]
    result = knock_out(of, task, heads=every, force=True)
    assert result.about["table"]["logit_diff"]["control"] is None and "no control" in result.summary()
    json.dumps(result.to_json(), allow_nan=False)


def test_the_control_is_the_knock_out_of_the_random_sets():
    of = model("neox")
    task = templated(of, True)
    result = knock_out(of, task, heads=[(1, 2), (2, 3)], positions="END", draws=5, seed=2, force=True)
    control = random_like(of, task, Components.of(of, task, heads=[(1, 2), (2, 3)]), 5, seed=2)
    changes = []
    for i, made in enumerate(control.sets):
        alone = knock_out(of, task, heads=made.heads, positions="END", draws=0, force=True).data
        for name in ("logit_diff", "prob", "accuracy"):
            np.testing.assert_allclose(result.data[f"control_{name}"][i], alone[f"after_{name}"], atol=1e-5)
        changes.append(float((alone["after_logit_diff"] - alone["before_logit_diff"]).mean()))
    row = result.about["table"]["logit_diff"]
    assert row["control"] == pytest.approx(np.mean(changes), abs=1e-5)
    assert [row["control_low"], row["control_high"]] == pytest.approx([min(changes), max(changes)], abs=1e-5)
    assert row["control_as_large"] == np.mean(np.abs(changes) >= abs(row["change"]))
    beyond = result.data["after_logit_diff"] - result.data["control_logit_diff"].mean("draw")
    assert (
        row["beyond"] == pytest.approx(float(beyond.mean())) and row["beyond_low"] < row["beyond"] < row["beyond_high"]
    )
