"""What a sweep gives back: names, tables, JSON, files, and no ratio over nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp import UserError
from mechinterp.patching import SweepResult, sweep
from mechinterp.results import write_json
from mechinterp.tasks.pairs import Answers, Target
from tests.checks import checks_off
from tests.families import model, pairs


def sharp(of, task):
    """The pairs with the answers that the model itself prefers on the clean side, so that ratios are defined."""
    change = of(task.clean)[:, -1] - of(task.corrupted)[:, -1]
    best, worst = change.argmax(-1).tolist(), change.argmin(-1).tolist()
    end = task.clean.n_pos - 1
    return replace(
        task, answers=Answers.build([[Target(end, {a: 1.0}, {b: 1.0})] for a, b in zip(best, worst, strict=True)])
    )


@pytest.fixture(scope="module")
def heads():
    of = model("llama")
    return sweep(of, sharp(of, pairs(of, True, n=12)), "z", "roles", progress=False)


def walk(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)
    else:
        yield value


def test_labels_of_the_grid(heads):
    assert heads.dims == ["layer", "head", "role"]
    assert heads.data["effect"].shape == (3, 4, 3) and heads.data["patched"].shape == (3, 4, 3, 12)
    assert list(heads.data["role"].values) == ["A", "B", "END"]
    assert heads.about["direction"] == "denoise" and heads.about["n_prompts"] == 12 and heads.about["in_force"] == []


def test_the_effect_is_a_ratio_of_means(heads):
    data = heads.data
    want = (data["patched"] - data["base"]).mean("prompt") / (data["source"] - data["base"]).mean()
    assert np.isfinite(data["effect"]).all(), "the case should be defined"
    np.testing.assert_allclose(data["effect"], want, atol=1e-9)
    np.testing.assert_allclose(heads.per_prompt.mean("prompt"), data["effect"], atol=1e-9)
    assert (data["ci_low"] <= data["effect"]).all() and (data["effect"] <= data["ci_high"]).all()


def test_json_has_every_field_and_no_nan(heads, tmp_path):
    made = heads.to_json()
    fields = "model site direction metric positions n_prompts dims coords effect ci_low ci_high"
    more = "baseline per_prompt threshold control bos seed"
    assert {*fields.split(), *more.split()} <= set(made)
    text = json.dumps(made, allow_nan=False)
    assert json.loads(text) == made
    assert np.shape(made["effect"]) == tuple(len(made["coords"][dim]) for dim in made["dims"]) == (3, 4, 3)
    np.testing.assert_allclose(np.mean(made["per_prompt"], axis=-1), made["effect"], atol=1e-9)
    data = heads.data
    assert made["baseline"] == pytest.approx(
        {"clean": float(data["source"].mean()), "corrupted": float(data["base"].mean())}
    )
    assert not any(isinstance(x, float) and np.isnan(x) for x in walk(made))
    assert any(x is None for x in walk(made["control"])), "only the largest cells have a donor control"
    write_json(tmp_path / "sweep.json", made)
    assert json.loads((tmp_path / "sweep.json").read_text()) == made


def test_it_is_the_same_from_disk(heads, tmp_path):
    heads.save(tmp_path / "heads.safetensors")
    again = SweepResult.load(tmp_path / "heads.safetensors")
    assert again.data.identical(heads.data) and again.to_json() == heads.to_json()
    assert again.top(5).equals(heads.top(5)) and repr(again) == repr(heads)


def test_the_top_is_the_top_and_marks_what_passes(heads):
    top = heads.top(7)
    assert len(top) == 7 and list(top.index) == list(range(7))
    sizes = np.sort(np.abs(heads.data["effect"].values.flatten()))[::-1]
    np.testing.assert_allclose(top["effect"].abs(), sizes[:7])
    for row in top.to_dict("records"):
        at = {"layer": row["layer"], "head": row["head"], "role": row["role"]}
        assert row["cell"] == f"L{row['layer']}H{row['head']} {row['role']}"
        assert row["effect"] == float(heads.data["effect"].sel(at)) and row["passes"] == bool(
            heads.data["passes"].sel(at)
        )
    assert len(heads.top(1000)) == 36


def test_no_cell_passes_below_the_threshold(heads):
    passes, effect = heads.data["passes"].values, heads.data["effect"].values
    assert (np.abs(effect[passes]) > heads.about["threshold"]).all()
    assert np.isfinite(heads.data["control"].values[passes]).all()


@pytest.mark.parametrize(
    "site, positions, label",
    [
        ("z", "all", "L0H0"),
        ("k", "all", "k L0KV0"),
        ("resid_pre", "roles", "resid_pre L0 A"),
        ("mlp_out", "last", "mlp_out L0"),
        ("mlp_out", "END", "mlp_out L0 END"),
    ],
)
def test_names_of_cells(site, positions, label):
    of = model("llama")
    result = sweep(of, pairs(of, False), site, positions, layers=[0], progress=False, force=True)
    labels = {result.label(row) for row in result.to_frame().to_dict("records")}
    assert label in labels and len(labels) == result.data["effect"].size


def test_positions_are_named_by_their_tokens():
    of = model("gpt2")
    task = pairs(of, False)
    row = task.clean.tokens[:1].expand(4, -1)
    same = replace(task, clean=replace(task.clean, tokens=row))
    result = sweep(of, same, "resid_pre", "each", layers=[1], progress=False, force=True)
    assert result.dims == ["layer", "pos"] and list(result.data["pos"].values) == list(range(8))
    assert result.label({"layer": 1, "pos": 3}) == f"resid_pre L1 {int(row[0, 3])}_3"


def test_layers_that_were_asked_for():
    of = model("llama")
    task = pairs(of, False)
    some = sweep(of, task, "z", "roles", layers=[2, 0], progress=False, force=True).data
    every = sweep(of, task, "z", "roles", progress=False, force=True).data
    assert list(some["layer"].values) == [2, 0]
    assert abs(some["patched"] - every["patched"].sel(layer=[2, 0])).max() < 1e-4


def alike(of):
    """Pairs whose two sides have the same metric on average: half of them are turned round."""
    task = pairs(of, False, n=8)
    turned = torch.arange(8)[:, None] % 2 == 1
    clean, corrupted = task.clean.tokens, task.corrupted.tokens
    return replace(
        task,
        clean=replace(task.clean, tokens=torch.where(turned, corrupted.roll(1, 0), clean)),
        corrupted=replace(task.corrupted, tokens=torch.where(turned, clean.roll(1, 0), corrupted)),
        answers=task.answers.take(torch.arange(8) // 2 * 2),
    )


def test_a_ratio_over_nothing_is_undefined(tmp_path):
    of = model("llama")
    result = sweep(of, alike(of), "z", progress=False, force=True)
    assert abs(result.data["source"] - result.data["base"]).max() > 0.1, "the runs do differ, prompt by prompt"
    for name in ("effect", "ci_low", "ci_high", "control"):
        assert result.data[name].isnull().all()
    assert not result.data["passes"].any() and result.per_prompt.isnull().all()
    made = result.to_json()
    json.dumps(made, allow_nan=False)
    assert all(x is None for name in ("effect", "ci_low", "ci_high", "control", "per_prompt") for x in walk(made[name]))
    assert made["threshold"] is None and made["baseline"]["clean"] is not None
    assert "undefined" in result.summary() and "undefined" in repr(result)
    result.save(tmp_path / "undefined")
    assert SweepResult.load(tmp_path / "undefined").data.identical(result.data)


def test_one_pair_has_an_effect_without_an_interval():
    of = model("llama")
    result = sweep(of, pairs(of, False, n=1), "z", "roles", progress=False, force=True)
    assert np.isfinite(result.data["effect"]).all() and result.data["ci_low"].isnull().all()
    assert not result.data["passes"].any()
    json.dumps(result.to_json(), allow_nan=False)
    assert "[" not in result.summary()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"site": "patern"}, "did you mean 'pattern'"),
        ({"site": "embed"}, "'embed' cannot be swept"),
        ({"site": "rot_q"}, "gpt2 has no site rot_q"),
        ({"layers": [3]}, "layers 0 … 2"),
        ({"positions": "IO"}, "unknown positions 'IO'; valid: all, each, last, roles, indices, or roles: A, B, END"),
        ({"positions": "END,IO"}, "unknown positions 'IO'"),
        ({"positions": []}, "no positions given"),
        ({"positions": 9}, "position 9 is outside prompt 0, of 8 tokens"),
        ({"direction": "sideways"}, "unknown direction 'sideways'; valid: 'denoise', 'noise'"),
        ({"metric": "loss"}, "unknown metric 'loss'"),
    ],
    ids=str,
)
def test_what_cannot_be_swept(change, says):
    of = model("gpt2")
    with checks_off(), pytest.raises(UserError, match=says):
        sweep(of, pairs(of, False), **{"force": True, "progress": False, **change})


def test_each_position_needs_prompts_of_one_length():
    of = model("gpt2")
    with pytest.raises(UserError, match="positions 'each' needs prompts of one length; valid here: all, last"):
        sweep(of, pairs(of, True), positions="each", force=True, progress=False)


@pytest.mark.parametrize("metric", ["logit-diff", "prob", "rank", "kl"])
def test_a_task_that_the_model_does_not_do(metric):
    """Clean and corrupted change places: then the model 'does' the reverse of it."""
    of = model("llama")
    task = pairs(of, False)
    from mechinterp import evaluate

    sides = [float(evaluate(of, task, metric, side).mean()) for side in ("clean", "corrupted")]
    worse = (sides[0] > sides[1]) == (metric in ("rank", "kl"))
    undone = task if worse else replace(task, clean=task.corrupted, corrupted=task.clean)
    if metric == "kl":
        with pytest.raises(UserError, match="the model does not do this task"):
            sweep(of, replace(task, corrupted=task.clean), metric=metric, progress=False)
        return
    with pytest.raises(UserError, match=f"the model does not do this task: mean {metric} is .* force=True"):
        sweep(of, undone, metric=metric, progress=False)
