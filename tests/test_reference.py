"""The independent implementation that the experiment is compared with agrees with a sweep."""

import pytest
import torch

from mechinterp.patching import sweep
from scripts.reference.ioi_plain import effects
from tests.families import model, module, pairs


@pytest.mark.parametrize("last_only", [False, True])
def test_plain_hooks_give_the_numbers_of_a_sweep(last_only):
    of = model("llama")
    task = pairs(of, padded=True)
    listed = [
        {
            "clean": task.clean.tokens[i, padding:].tolist(),
            "corrupted": task.corrupted.tokens[i, padding:].tolist(),
            "answer": int(task.answers.answer[i, 0, 0]),
            "wrong": int(task.answers.wrong[i, 0, 0]),
        }
        for i, padding in enumerate(task.clean.padding.tolist())
    ]
    with torch.no_grad():
        theirs = effects(module("llama"), listed, last_only)
    ours = sweep(of, task, "z", "last" if last_only else "all", progress=False, force=True)
    change = (ours.data["patched"] - ours.data["base"]).mean("prompt")
    share = change / (ours.data["source"] - ours.data["base"]).mean()
    want = torch.tensor(theirs["heads"])
    assert want.abs().max() > 1e-2
    assert (torch.tensor(share.values) - want).abs().max() < 1e-4 * max(1.0, float(want.abs().max()))
    assert abs(theirs["clean"] - float(ours.data["source"].mean())) < 1e-4
