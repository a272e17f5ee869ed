"""Every row that is changed is run once, in a call that begins early enough, and gives what a full run gives."""

import pytest
import torch

from mechinterp.hooked import suffix
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Read
from tests.families import FAMILIES, full_logits, model, pairs

# (layer, position from the end) that each case sets to zero; the last one does nothing.
CASES = [(0, 2), (2, 1), (1, 1), (1, 4), (0, None)]


def run(of, task, **options):
    """`[case prompt column]` of all cases, the recorded run where a case is not run, and how often each row came."""
    recording = suffix.record(of, task.clean)
    read = Read(task.answers.pos, task.answers.answer[:, :1])
    n_pos = task.clean.n_pos
    starts = torch.tensor([[n_pos - (back or 0)] * len(task) for _, back in CASES])
    starts[0, 1] = n_pos  # the first case spares the second prompt
    layers = torch.tensor([layer for layer, _ in CASES])

    def edits_of(cases):
        assert (layers[cases].diff() >= 0).all(), "rows join in the order of their layers"
        return {Site("mlp_out", layer).hook_name: edit(cases, layer) for layer in set(layers[cases].tolist())}

    def edit(cases, layer):
        def zero(activation, rows):
            new = activation.clone()
            for row in range(len(activation)):
                case, prompt = int(cases[row]), int(rows.index[row])
                if layers[case] == layer and starts[case, prompt] < n_pos:
                    new[row, starts[case, prompt] - rows.start] = 0
            return new

        return zero

    values = recording.base_logits(read)[:, 0].expand(len(CASES), -1, -1).clone()
    times = torch.zeros(len(CASES), len(task), dtype=torch.long)
    for cases, prompts, logits in replay(recording, read, layers, starts, edits_of, **options):
        values[cases, prompts] = logits[:, 0]
        times[cases, prompts] += 1
    return values, times, starts


@pytest.mark.parametrize("options", [{}, {"max_tokens": 1}, {"folds": False}], ids=["plain", "one row", "unfolded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_full_runs(family, options):
    of = model(family)
    task = pairs(of, True)
    values, times, starts = run(of, task, **options)
    expected = (starts < task.clean.n_pos).long()
    if "folds" in options:
        expected[0] = 1  # all prompts together, or none
    assert torch.equal(times, expected)
    for case, (layer, back) in enumerate(CASES):

        def zero(x, hook, case=case, back=back):
            x = x.clone()
            for prompt in range(len(task)):
                if back is not None and starts[case, prompt] < task.clean.n_pos:
                    x[prompt, starts[case, prompt]] = 0
            return x

        logits = full_logits(of, task.clean, [(Site("mlp_out", layer).hook_name, zero)])
        want = logits[torch.arange(4), task.answers.pos[:, 0]].gather(-1, task.answers.answer[:, 0])
        torch.testing.assert_close(values[case], want, atol=1e-4, rtol=1e-4)
    assert (values[1] - values[-1]).abs().max() > 1e-2
