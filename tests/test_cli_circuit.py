"""`mechinterp circuit` from end to end, on a planted model, and its bad input in one line each."""

import json
from pathlib import Path
from typing import get_args

import pytest

from mechinterp.circuits import METHODS
from mechinterp.circuits.ablations import Kind
from mechinterp.cli import main
from mechinterp.cli.circuits import AblationName, MethodName

FIND = ["circuit", "find", "planted-induction", "--task", "induction", "--n", "8", "--method"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    path = tmp_path_factory.mktemp("circuit") / "circuit.json"
    assert main([*FIND, "exact", "--out", str(path)]) == 0
    return path


def test_the_names_are_the_library_s():
    assert get_args(MethodName) == tuple(METHODS)
    assert set(get_args(AblationName)) == set(get_args(Kind)) - {"learned"}  # which needs to be trained first


def test_find_evaluate_show(scores, tmp_path, capsys):
    found = json.loads(scores.read_text())
    assert found["kind"] == "scores" and set(found["rankings"]) == {"norm", "reinitialised", "swapped-labels"}
    assert "mechinterp circuit find" in found["about"]["command"]
    out, page = tmp_path / "e.json", tmp_path / "e.html"
    asked = ["circuit", "evaluate", str(scores), "--task", "induction", "--n", "8", "--seed", "1"]
    assert main([*asked, "--control-sizes", "0.05", "--json", str(out), "--html", str(page)]) == 0
    made = json.loads(out.read_text())
    assert made["cmd"] < 0.05 and made["cpr"] > 0.9 and made["baseline"]["full"] > 0 > made["baseline"]["empty"]
    assert made["controls"]["norm@0.05"]["faithfulness"] < 0.5 and made["controls"]["norm@0.05"]["differs"]
    assert "The circuit" in page.read_text() and page.stat().st_size < 10_000_000
    capsys.readouterr()
    assert main(["circuit", "show", str(scores), "--top", "3"]) == 0
    said = capsys.readouterr().out
    assert "exact" in said and "a1.h2" in said and len(said.splitlines()) < 20


def test_one_circuit_is_evaluated_too(scores, tmp_path, capsys):
    import mechinterp as mi
    from mechinterp.circuits import files

    model = mi.load("planted-induction")
    circuit = files.load(scores, model).select(3)
    files.save(tmp_path / "one.json", circuit)
    out = tmp_path / "one-e.json"
    asked = ["circuit", "evaluate", str(tmp_path / "one.json"), "--task", "induction", "--n", "8", "--seed", "1"]
    assert main([*asked, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["faithfulness"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "extra"),
    [("eap-ig", ["--steps", "2", "--rule", "left"]), ("acdc", ["--threshold", "0.5"]), ("atp-star", []), ("ifr", [])],
)
def test_methods(method, extra, tmp_path):
    out = tmp_path / "c.json"
    assert main([*FIND, method, *extra, "--no-controls", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["method"] == method and found["rankings"] == {}


def test_places(tmp_path):
    out = tmp_path / "c.json"
    assert main([*FIND, "eap", "--positions", "roles", "--no-controls", "--out", str(out)]) == 0
    assert "END" in json.loads(out.read_text())["graph"]["places"]


def test_bad_input_is_one_line(scores, tmp_path, capsys):
    newer = json.loads(scores.read_text()) | {"version": 99}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    out = ["--out", str(tmp_path / "x.json")]
    evaluate = ["--task", "induction", "--n", "8"]
    cases = [
        ([*FIND, "eap", "--steps", "3", *out], "--steps is for"),
        ([*FIND, "eap", "--metric", "kl", *out], "its minimum where the two agree"),
        ([*FIND, "exact", "--ablation", "zero", "--direction", "denoise", *out], "has no meaning there"),
        ([*FIND, "eap", "--positions", "all", "--out", str(tmp_path / "no" / "x.json")], "there is no folder"),
        (["circuit", "show", str(tmp_path / "none.json")], "no such circuit file"),
        (["circuit", "show", str(tmp_path / "newer.json")], "of version 99"),
        (["circuit", "evaluate", str(scores), *evaluate], "were searched on"),
        (["circuit", "evaluate", str(scores), *evaluate, "--model", "planted-or"], "another"),
        (["circuit", "evaluate", str(scores), *evaluate, "--control-sizes", "2"], "--control-sizes takes shares"),
    ]
    for argv, said in cases:
        capsys.readouterr()
        assert main(argv) == 2, argv
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error, (argv, error)
    assert not Path(tmp_path / "x.json").exists()


def test_pairs_of_unequal_length_and_another_tokenizer(scores, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"clean": "a b c a", "corrupted": "a b c", "answer": "b", "wrong": "c"}) + "\n")
    argv = ["circuit", "evaluate", str(scores), "--pairs", str(pairs)]
    assert main(argv) == 2
    assert "a pair must have one" in capsys.readouterr().err
    other = json.loads(scores.read_text()) | {"tokenizer_sha256": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main(["circuit", "evaluate", str(tmp_path / "other.json"), "--task", "induction", "--n", "8"]) == 2
    assert "another tokenizer" in capsys.readouterr().err
