"""The experiment from end to end on the real model with few prompts, and the names that it gives to heads."""

import json

import numpy as np
import pytest
import xarray as xr

import mechinterp as mi
from experiments.ioi_patching import (
    LOOKS,
    REFERENCE,
    Config,
    begins_with,
    finding,
    found_heads,
    head_name,
    main,
    reference_gaps,
)
from mechinterp.patching import SweepResult


def looks(**weights: float) -> list[float]:
    """Attention by look, `END_IO=.5` for END→IO; nothing elsewhere."""
    return [weights.get(f"{query}_{key}".replace("+", ""), 0.0) for query, key in LOOKS]


@pytest.mark.parametrize(
    ("attention", "direct", "name"),
    [
        (looks(END_IO=0.6), 0.3, "name mover"),
        (looks(END_IO=0.6), -0.3, "negative name mover"),
        (looks(END_S2=0.6), 0.4, "subject suppressor"),
        (looks(END_S2=0.6), 0.0, "S-inhibition"),
        (looks(S2_S1=0.5), 0.01, "duplicate token"),
        (looks(S2_S11=0.5), 0.01, "induction"),
        (looks(S11_S1=0.5), 0.01, "previous token"),
        (looks(END_END=0.8), 0.3, "writer, looks at END"),
        (looks(), 0.3, "writer, looks elsewhere"),
        (looks(), 0.0, "unnamed"),
    ],
)
def test_a_head_is_named_by_look_and_write(attention, direct, name):
    assert head_name(attention, direct) == name


def result(patched: np.ndarray, n_prompts: int = 3) -> SweepResult:
    """A sweep of two layers and two heads with given patched metrics `[layer head prompt]`."""
    grid = np.zeros((2, 2))
    data = xr.Dataset(
        {
            "effect": (["layer", "head"], patched.mean(-1) / 2),
            **{name: (["layer", "head"], grid) for name in ("ci_low", "ci_high", "control")},
            "passes": (["layer", "head"], np.array([[True, False], [False, False]])),
            "patched": (["layer", "head", "prompt"], patched),
            "base": ("prompt", np.zeros(n_prompts)),
            "source": ("prompt", np.full(n_prompts, 2.0)),
        },
        coords={"layer": [0, 1], "head": [0, 1]},
    )
    about = {
        "n_prompts": n_prompts,
        "site": "z",
        "scope": "over prompts",
        "direction": "denoise",
        "metric": "logit-diff",
    }
    return SweepResult(data, about)


def test_a_reference_that_differs_is_seen_and_only_its_prompts_are_compared():
    patched = np.zeros((2, 2, 3))
    patched[0, 0] = [2.0, 2.0, -9.0]
    sweeps = {"heads_end-denoise-new-names": result(patched)}
    values = {"n": 2, "heads_end": [[1.0, 0.0], [0.0, 0.25]]}
    assert reference_gaps(sweeps, {"corruptions": {"new-names": values}}) == {"heads_end new-names": 0.25}
    assert reference_gaps(sweeps, {"corruptions": {"new-names": {**values, "n": 64}}}) == {}


def test_no_head_is_a_finding_too():
    nothing = result(np.zeros((2, 2, 3)))
    nothing.data["passes"][:] = False
    sweeps = {"heads_end-denoise-swapped-subject": nothing}
    assert found_heads(sweeps) == []
    assert "no head passes" in finding(mi.load("planted-induction"), sweeps, [], Config())


def test_published_classes_are_complete():
    classes = json.loads((REFERENCE / "ioi_gpt2.json").read_text())["classes"]
    heads = [head for members in classes.values() for head in members]
    assert len(heads) == len(set(heads)) == 26


@pytest.mark.real_model
def test_reference_prompts_are_the_tasks_own(smollm2):
    listed = json.loads((REFERENCE / "ioi_smollm2_pairs.json").read_text())["pairs"]
    for corruption, pairs in listed.items():
        assert begins_with(mi.tasks.ioi(smollm2, 20, 0, corruption), pairs)
        assert not begins_with(mi.tasks.ioi(smollm2, 20, 1, corruption), pairs)
        assert not begins_with(mi.tasks.ioi(smollm2, 8, 0, corruption), pairs)


@pytest.mark.real_model
def test_run_report_and_resume(tmp_path, capsys):
    config = Config(n=8, n_heads=2, minutes=0, root=str(tmp_path))
    page = main(config)
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1] == str(page)
    kept = json.loads(page.with_name("report.json").read_text())
    assert "no BOS" in kept["header"] and "n=8" in kept["answer"] and "L23H3" in json.dumps(kept["sections"])
    assert any("No comparison" in caveat for caveat in kept["caveats"]), "eight pairs are fewer than the reference's"
    assert {p.name for p in page.parent.iterdir()} >= {"config.json", "manifest.json", "results", "figures", "log.txt"}
    sweep = SweepResult.load(page.parent / "results" / "heads_end-denoise-swapped-subject")
    assert sweep.data["effect"].shape == (30, 9, 1)
    assert "dropped for time: attn_out-roles, mlp_out-roles" in said
    assert main(config) == page
    again = capsys.readouterr().out
    assert again.count("done before, loaded") == 10


def test_an_unknown_model_is_one_line():
    with pytest.raises(mi.UserError, match="no-such-model"):
        main(Config(model="no-such-model"))
