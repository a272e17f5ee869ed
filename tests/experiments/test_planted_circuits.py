"""The comparison of search methods with known circuits: the truth it compares with, its rows, and its report."""

import json

import pytest

import mechinterp as mi
from experiments.planted_circuits import CONTROL, Config, as_text, explanations, finding, main
from experiments.planted_search import Row, units, visible
from mechinterp.circuits import ExactNodes, Graph, find
from mechinterp.models.planted import PLANTED, circuit
from mechinterp.tasks.planted import task_of

KEYS = {"model", "method", "direction", "precision", "recall", "auroc", "seconds"}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_the_nodes_that_a_direction_shows_are_those_that_a_patch_moves(name, direction):
    """The rule for nodes follows from the types of edges; patches of whole nodes agree with it."""
    model = mi.load(name, device="cpu")
    scores = find(
        Graph(model), task_of(name)(model, 4, seed=5), ExactNodes(), direction=direction, controls=False, draws=0,
        progress=False,
    )  # fmt: skip
    moved = {scores.name(int(node)) for node in (scores.values.abs() > 1e-5).nonzero().flatten()}
    assert moved == set(units(visible(circuit(name), direction, "node"), "node"))


def test_run_rows_report_and_resume(tmp_path, capsys):
    out = tmp_path / "rows.json"
    config = Config(
        model="planted-or", n=4, methods=("exact", "eap", "eap-ig"), root=str(tmp_path / "runs"), json=str(out)
    )
    page = main(config)
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1] == str(page) and "5 midpoint steps" in said and "residual" in said
    rows = json.loads(out.read_text())
    assert [(row["method"], row["direction"]) for row in rows] == [
        (method, direction) for method in (*config.methods, CONTROL) for direction in ("noise", "denoise")
    ]
    assert all(row.keys() > KEYS and row["model"] == "planted-or" and row["seconds"] >= 0 for row in rows)
    by = {(row["method"], row["direction"]): row for row in rows}
    exact = by["exact", "noise"]
    assert (exact["precision"], exact["recall"], exact["auroc"]) == (1, 1, 1) and exact["auroc_circuit"] < 1
    eap = by["eap", "noise"]
    assert eap["missed"] == ["embed->a0.kv0<v>"] and eap["missed_score"] == 0 and eap["missed_effect"] > 7
    assert (eap["precision"], eap["recall"]) == (1, 0.5)
    ig = by["eap-ig", "noise"]
    assert set(ig["unseen"]) == set(circuit("planted-or").or_edges) and ig["precision"] == pytest.approx(1 / 3)
    assert by[CONTROL, "denoise"]["recall"] < 0.5 and by[CONTROL, "denoise"]["auroc"] < 0.9
    report = json.loads(page.with_name("report.json").read_text())
    assert [section["heading"] for section in report["sections"]] == [
        "Every method on every model", "Where a method fails, and why", "planted-or",
        "Are integrated gradients complete?",
    ]  # fmt: skip
    assert "with exact." in report["answer"] and "whole circuit" in report["answer"]
    assert "NaN" not in page.read_text().split("<script>")[0]
    assert main(config) == page
    assert "planted-or.json: done before, loaded" in capsys.readouterr().out
    assert json.loads(out.read_text()) == rows


def test_only_failures_are_explained():
    """And a failure for which no reason is written says so; a refusal is a row without numbers."""
    good = Row("planted-or", "exact", "noise", "edge", "threshold", 1.0, 1.0, 1.0, 1.0, 0.1, ("a->b<q>",))
    refused = Row("planted-or", "other", "noise", "edge", "threshold", refused="no gradient")
    missed = Row(
        "planted-or", "odd", "noise", "edge", "threshold", None, 0.0, 0.5, 0.5, 0.1, (), ("a->b<q>",), (), (), 8.0, 0.0
    )
    said = explanations([good, refused, missed])
    assert len(said) == 2
    assert said[0] == "other refuses planted-or (noise): no gradient."
    assert said[1].startswith("odd misses edges (planted-or noise 1 of 1)") and said[1].endswith("not explained.")
    assert "refused" in as_text([refused]) and "1 missed" in as_text([missed])
    answer = finding([good, missed], [])
    assert "with exact." in answer and "by odd (recall down to 0.00)" in answer
    assert "whole circuit" not in answer, "one edge is not"


@pytest.mark.parametrize(
    ("config", "found"),
    [(Config(model="gpt2"), "'gpt2' is no planted model"), (Config(methods=("eap", "nope")), "unknown method 'nope'")],
)
def test_bad_input_is_one_line_before_anything_runs(config, found):
    with pytest.raises(mi.UserError, match=found):
        main(config)
