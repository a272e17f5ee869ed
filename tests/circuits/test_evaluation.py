"""Curves, areas, controls and protocols against plain sums, on models whose circuit is known."""

import json

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import UserError
from mechinterp.circuits import (
    Ablation,
    Circuit,
    Engine,
    Evaluation,
    Graph,
    agreement,
    evaluate,
    faithfulness,
    find,
    permute_heads,
    properties,
    protocol_sweep,
    rewire,
)
from mechinterp.circuits.agreement import auroc
from mechinterp.circuits.rankings import by_norm, reinitialised, swap_labels
from mechinterp.tasks.planted import task_of
from tests.families import model, pairs


@pytest.fixture(scope="module")
def planted():
    of = mi.load("planted-or")
    make = task_of("planted-or")
    scores = find(Graph(of), make(of, 12, 0), "eap-ig", draws=4, progress=False)
    return of, scores, make(of, 10, 1)


def test_the_curve_is_the_engine_at_every_size(planted):
    of, scores, held_out = planted
    result = evaluate(scores, held_out, control_sizes=(0.1,), progress=False)
    engine = Engine(Graph(of), held_out)
    full, empty = engine.full.mean(), engine.empty.mean()
    sizes = result.data["size"].values
    for by in ("absolute", "signed"):
        for k in sizes:
            circuit = scores.select(float(k), by=by)
            want = float((engine.values(circuit.mask[None])[0].mean() - empty) / (full - empty))
            got = float(result.data["faithfulness"].sel(selection=by, size=k))
            assert got == pytest.approx(want, abs=1e-5)
            assert int(result.data["edges"].sel(selection=by, size=k)) == len(circuit)
    absolute = result.data["faithfulness"].sel(selection="absolute").values
    signed = result.data["faithfulness"].sel(selection="signed").values
    assert result.about["cmd"]["value"] == pytest.approx(np.trapezoid(np.abs(1 - absolute), sizes))
    assert result.about["cpr"]["value"] == pytest.approx(np.trapezoid(signed, sizes))
    assert absolute[-1] == pytest.approx(1) and float(result.data["kl"].sel(selection="absolute", size=1.0)) < 1e-6
    names = {row["control"] for row in result.about["controls"]}
    assert names == {"norm", "norm-connected", "reinitialised", "swapped-labels", "rewired", "permuted-heads"}


def test_the_json_and_the_file(planted, tmp_path):
    _, scores, held_out = planted
    result = evaluate(scores, held_out, control_sizes=(0.1,), progress=False)
    made = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {"cmd", "cpr", "faithfulness", "baseline", "controls"} <= set(made)
    for curve in made["faithfulness"].values():
        assert len(curve["k"]) == len(curve["value"]) == len(curve["ci_low"]) == len(curve["ci_high"]) == 10
    assert set(made["baseline"]) == {"full", "empty"}
    result.save(tmp_path / "e")
    assert Evaluation.load(tmp_path / "e").summary() == result.summary()


def test_pairs_that_were_searched_on_are_dropped(planted):
    of, scores, held_out = planted
    with pytest.raises(UserError, match="all 12 pairs were searched on"):
        evaluate(scores, task_of("planted-or")(of, 12, 0), progress=False)
    assert evaluate(scores, held_out, sizes=(1.0,), control_sizes=(), progress=False).about["dropped"] == 0
    circuit, searched = scores.select(0.5), task_of("planted-or")(of, 12, 0)
    for measure in (
        lambda: faithfulness(circuit, searched),
        lambda: protocol_sweep(circuit, searched, progress=False),
        lambda: properties(circuit, searched, {"a": ["a0.h1"]}, progress=False),
    ):
        with pytest.raises(UserError, match="were searched on"):
            measure()


def test_areas_need_the_whole_grid(planted):
    """A grid that leaves sizes out has no CMD; sizes that do not ascend are refused."""
    _, scores, held_out = planted
    result = evaluate(scores, held_out, sizes=(0.2, 1.0), control_sizes=(), progress=False)
    assert result.about["cmd"]["value"] is None and "faithfulness at 20.0%" in result.summary()
    for sizes in ((0.5, 0.1), (0.0, 1.0), (0.5, 1.5), ()):
        with pytest.raises(UserError, match="ascending shares"):
            evaluate(scores, held_out, sizes=sizes, progress=False)


def test_one_circuit_has_a_faithfulness(planted):
    of, _, held_out = planted
    graph = Graph(of)
    truth = mi.models.planted.circuit("planted-or").edges
    values = faithfulness(Circuit.of(graph, list(truth)), held_out)
    assert values["faithfulness"] == pytest.approx(1, abs=1e-4) and values["accuracy"] == 1
    none = faithfulness(Circuit.of(graph, []), held_out)
    assert none["faithfulness"] == pytest.approx(0, abs=1e-6)


def test_norm_ranking_is_the_norm_of_what_differs():
    of = model("llama")
    task = pairs(of, True)
    engine = Engine(Graph(of), task)
    ranking = by_norm(engine, "edge", 0)
    from tests.circuits.plain import source_outputs

    clean, corrupted = source_outputs(of, task.clean), source_outputs(of, task.corrupted)
    real = task.clean.real
    for name in ("embed", "a1.h2", "m2"):
        delta = (corrupted[name] - clean[name]).square().sum(-1) * real
        want = float(delta.sum(-1).sqrt().mean())
        edge = engine.graph.edge(f"{name}->logits")
        assert float(ranking[edge]) == pytest.approx(want, rel=2e-3)


def test_reinitialised_weights_come_back():
    of = model("gpt2")
    task = pairs(of, False)
    before, digest = of(task.clean), of.weights_hash()
    with pytest.raises(KeyError), reinitialised(of, 0):
        assert (of(task.clean) - before).abs().max() > 0.1
        raise KeyError
    assert torch.equal(of(task.clean), before) and of.weights_hash() == digest


def test_swapped_labels_turn_half_of_the_metric():
    of = model("llama")
    task = pairs(of, False, n=8)
    swapped = swap_labels(task, 0)
    ours, theirs = mi.evaluate(of, task), mi.evaluate(of, swapped)
    turned = torch.isclose(ours, -theirs, atol=1e-5)
    assert int(turned.sum()) == 4 and torch.allclose(ours[~turned], theirs[~turned])


def test_rewirings_keep_degrees_and_permutations_keep_shape():
    graph = Graph(model("llama"))
    draw = torch.Generator().manual_seed(1)
    found = Circuit(graph, graph.prune(torch.rand(graph.n_edges, generator=draw) < 0.3))
    other = rewire(found, 0)
    kept, moved = graph.mask_of(found.kept), graph.mask_of(other.kept)
    if len(other) == len(found):  # nothing was pruned
        assert torch.equal(kept.sum(0), moved.sum(0)) and torch.equal(kept.sum(1), moved.sum(1))
    assert not torch.equal(kept, moved)
    turned = permute_heads(found, 0)
    again = graph.mask_of(turned.kept)
    assert len(turned) == len(found) and not torch.equal(again, kept)
    layer = torch.tensor([one.layer for one in graph.sources])
    for number in range(-1, 3):  # by layer, the same number of edges out, head by head in another order
        assert sorted(kept[:, layer == number].sum(0).tolist()) == sorted(again[:, layer == number].sum(0).tolist())
    assert torch.equal(graph.prune(turned.kept), turned.kept)  # its paths are whole, too
    one = Circuit.of(graph, ["embed->a1.h2<q>", "a1.h2->logits"])
    assert all("a1.h2->logits" not in permute_heads(one, seed).edges for seed in range(20))  # no head stays


def test_agreement():
    graph = Graph(mi.load("planted-induction"))
    truth = mi.models.planted.circuit("planted-induction").edges
    exact = agreement(Circuit.of(graph, list(truth)), truth)
    assert exact == {"precision": 1.0, "recall": 1.0, "auroc": None}
    half = agreement(Circuit.of(graph, [*truth[:2], "embed->logits"]), truth)
    assert half["precision"] == pytest.approx(2 / 3) and half["recall"] == pytest.approx(2 / 5)
    assert auroc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False])) == 1.0
    assert auroc(np.array([1.0, 1.0, 1.0]), np.array([True, False, False])) == 0.5
    assert auroc(np.array([1.0]), np.array([True])) is None
    with pytest.raises(UserError, match="no true edges"):
        agreement(Circuit.of(graph, []), [])


def test_protocols_disagree_where_they_must(planted):
    """The planted OR circuit, without one of its two branches: whole when noised, whole when denoised; nothing is left
    of it where all positions without a role are cut and the answer needs them."""
    of, _, held_out = planted
    graph = Graph(of)
    circuit = Circuit.of(graph, list(mi.models.planted.circuit("planted-or").edges))
    result = protocol_sweep(circuit, held_out, ablations=("resample", Ablation("mean", by="role")), progress=False)
    frame = result.top(100)
    whole = frame[(frame["ablation"] == "resample") & (frame["positions"] == "all")]
    assert len(whole) == 4 and np.allclose(whole["faithfulness"], 1, atol=1e-3)
    assert len(frame) == 2 * (2 + 1) * 2 and "protocols" in result.summary()
    assert not ((frame["ablation"] == "mean") & (frame["direction"] == "denoise")).any()


def test_completeness_minimality_sufficiency():
    """Of the planted OR circuit both branches suffice, so each is worth nothing beside the other and all alone."""
    of = mi.load("planted-or")
    held_out = task_of("planted-or")(of, 10, 1)
    circuit = Circuit.of(Graph(of), list(mi.models.planted.circuit("planted-or").edges))
    branches = {"one": ["a1.h1"], "other": ["a1.h2"]}
    rows = properties(circuit, held_out, branches, draws=2, greedy_steps=1, progress=False).top(100)
    at = {(row["property"], row["of"]): row["estimate"] for row in rows.to_dict("records")}
    assert at["sufficiency", "one"] == pytest.approx(1, abs=1e-3)
    assert at["sufficiency", "other"] == pytest.approx(1, abs=1e-3)
    assert at["minimality", "one"] == pytest.approx(1, abs=1e-3)  # beside the other's absence it is everything
    assert at["completeness", "one"] == pytest.approx(0, abs=1e-3)  # the circuit has all that the model has
    with pytest.raises(UserError, match=r"no source 'a9\.h9'"):
        properties(circuit, held_out, {"x": ["a9.h9"]}, progress=False)


def test_fidelity_of_exact_scores_is_perfect():
    of = mi.load("planted-induction")
    scores = find(Graph(of), task_of("planted-induction")(of, 8, 0), "exact", controls=False, progress=False)
    found = scores.fidelity(20)
    assert found.strata["mean error"].max() < 1e-5
    assert found.rank_correlation is None or found.rank_correlation > 0.99
    assert found.missed_mass["value"] is None or 0 <= found.missed_mass["value"] <= 1
    with pytest.raises(UserError, match="at least 4 edges"):
        scores.fidelity(2)
