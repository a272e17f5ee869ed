"""The experiments on the real model with few prompts: they run to their end, say what they found, and continue."""

import json
from pathlib import Path

import pytest

from experiments import factual_recall, induction_heads, ioi_circuit, ioi_knockout, steering
from experiments.expected import REFERENCE, compare
from experiments.settings import Settings

SMALL = {
    induction_heads: {"n": 4, "n_causal": 2, "period": 12, "k": 2, "draws": 2},
    ioi_knockout: {"n": 8, "k": 2, "draws": 2},
    factual_recall: {"n": 4, "every": 15, "draws": 1},
    ioi_circuit: {
        "n": 4,
        "n_held_out": 4,
        "method": "eap",
        "sample": 8,
        "n_paths": 2,
        "per_class": 1,
        "draws": 1,
    },
    steering: {"layers": (10, 14), "strengths": (-1.0, 1.0), "draws": 2, "new_tokens": 4},
}


@pytest.mark.real_model
@pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__.split(".")[-1])
def test_an_experiment_runs_and_continues(script, smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Settings, "load", lambda self: smollm2)
    config = script.Config(root=str(tmp_path), **SMALL[script])
    page = script.main(config)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(page) and "No comparison" in said
    report = json.loads((page.parent / "report.json").read_text())
    assert "smollm2" in report["answer"].lower() and report["sections"] and "nan" not in report["answer"]
    assert "NaN" not in page.read_text().split("<script>")[0]
    assert script.main(config) == page
    assert "done before, loaded" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*_*.json")), ids=lambda path: path.stem)
def test_references_are_whole(path):
    found = json.loads(path.read_text())
    if "values" not in found:
        pytest.skip("of another form: of the patching experiment, or published classes of nodes")
    assert found["source"] and found["settings"]
    assert all(tolerance > 0 for _, tolerance in found["values"].values())


def test_a_comparison_says_what_misses(tmp_path, monkeypatch):
    reference = {"source": "S.", "settings": {"n": 4}, "values": {"a": [1.0, 0.1], "b": [2.0, 0.1]}}
    (tmp_path / "x_m.json").write_text(json.dumps(reference))
    monkeypatch.setattr("experiments.expected.REFERENCE", Path(tmp_path))
    good = compare("x", "m", {"a": 1.05, "b": 2.0}, {"n": 4})
    assert good.agrees and good.verdict.startswith("All 2 values agree")
    bad = compare("x", "m", {"a": 1.05, "b": 2.2}, {"n": 4})
    assert not bad.agrees and "1 of 2 values DO NOT agree" in bad.verdict and "(b)" in bad.verdict
    assert "No comparison" in compare("x", "m", {}, {"n": 5}).verdict
    assert "No reference" in compare("x", "other", {}, {"n": 4}).verdict


def test_the_command_line_is_that_of_the_settings():
    config = ioi_knockout.Config(n=8, over="abc", no_bos=True, root="/elsewhere")
    assert config.command(ioi_knockout.__file__) == "python experiments/ioi_knockout.py --no-bos --n 8 --over abc"
    assert steering.Config().command("x/steering.py") == "python experiments/steering.py"


def test_heads_are_sorted_into_classes():
    heads = [(9, 9), (9, 6), (10, 7), (8, 6)]
    names = ["name mover", "subject suppressor", "negative name mover", "writer, looks elsewhere"]
    found = ioi_knockout.sort_heads(heads, [{"name": name} for name in names])
    assert found == {"movers": [(9, 9)], "suppressors": [(9, 6)], "negative heads": [(10, 7)]}
