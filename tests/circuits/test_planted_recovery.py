"""Circuits that are known: exact search recovers them type by type, and gradients fail where a gate is flat."""

from functools import cache

import pytest
import torch

import mechinterp as mi
from mechinterp.circuits import EAPIG, Graph, agreement, find
from mechinterp.models.planted import PLANTED, circuit
from mechinterp.tasks.planted import task_of

NAMES = tuple(PLANTED)
NOTHING = 1e-5  # of a logit difference of 7 or 8
N = 4


@cache
def graph(name):
    return Graph(mi.load(name, device="cpu"))


@cache
def search(name, method, direction):
    pairs = task_of(name)(graph(name).model, N, seed=3)
    return find(graph(name), pairs, method, direction=direction, controls=False, draws=0, progress=False)


def by_type(name, direction):
    """True edges that the direction can show, and those that it cannot."""
    true = circuit(name)
    shown, hidden = true.and_edges, true.or_edges
    shown, hidden = (shown, hidden) if direction == "noise" else (hidden, shown)
    return (*true.serial, *shown), hidden


def claimed(scores):
    return {scores.graph.edge_name(int(edge)) for edge in (scores.values.abs() > NOTHING).nonzero().flatten()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_exact_search_finds_what_the_direction_shows(name, direction):
    """Serial edges in either direction, AND edges when noising, OR edges when denoising, and nothing else."""
    scores = search(name, "exact", direction)
    shown, hidden = by_type(name, direction)
    found = agreement(scores, shown, threshold=NOTHING)
    assert found == {"precision": 1.0, "recall": 1.0, "auroc": 1.0}
    assert all(scores.values[scores.graph.edge(edge)] > 1 for edge in shown), "and helps the behaviour"
    assert all(scores.values[scores.graph.edge(edge)].abs() < NOTHING for edge in hidden)


@pytest.mark.parametrize("name", NAMES)
def test_both_directions_together_are_the_circuit(name):
    noise, denoise = (claimed(search(name, "exact", direction)) for direction in ("noise", "denoise"))
    true = circuit(name)
    assert noise | denoise == set(true.edges)
    assert noise & denoise == set(true.serial)


def test_every_type_is_planted_somewhere():
    """Or else the tests above would hold of nothing."""
    for kind in ("serial", "and_edges", "or_edges"):
        assert any(getattr(circuit(name), kind) for name in NAMES)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_integrated_gradients_find_the_serial_circuit(direction):
    """AUROC of at least .95 (it is 1), and the scores of the embedding's edges are the whole change, but for 5%."""
    scores = search("planted-induction", "eap-ig", direction)
    auroc = agreement(scores, circuit("planted-induction").edges)["auroc"]
    assert auroc is not None and auroc >= 0.95
    ends = scores.about["baseline"]
    change = ends["full"] - ends["empty"]
    assert abs(residual(scores, change)) < 0.05 * change


def test_the_residual_falls_with_the_steps():
    """A gate opens on a short stretch of the line: few steps miss it."""
    pairs = task_of("planted-or")(graph("planted-or").model, N, seed=3)
    errors = []
    for steps in (5, 20):
        scores = find(graph("planted-or"), pairs, EAPIG(steps), controls=False, draws=0, progress=False)
        ends = scores.about["baseline"]
        errors.append(abs(residual(scores, ends["full"] - ends["empty"])) / (ends["full"] - ends["empty"]))
    assert errors[0] > 0.2 and errors[1] < errors[0] / 2


def residual(scores, change):
    from_embedding = scores.graph.edges[:, 1] == scores.graph.source_index["embed"]
    return float(scores.values[from_embedding].sum()) - change


@pytest.mark.parametrize(
    ("name", "direction"), [("planted-or", "noise"), ("planted-or", "denoise"), ("planted-and", "denoise")]
)
def test_a_flat_gate_hides_the_circuit_from_one_gradient(name, direction):
    """The slope behind a gate that is shut or saturated is zero, exactly: attribution patching sees the last edge only;
    integrated gradients pass the stretch where the gate opens, and see the whole circuit."""
    assert claimed(search(name, "eap", direction)) == {"m1->logits"}
    values = search(name, "eap", direction).values
    assert torch.equal(values != 0, values.abs() > NOTHING), "zero, not small"
    assert claimed(search(name, "eap-ig", direction)) == set(circuit(name).edges)
