"""The plan of a sweep's calls: every row once, none begun too late, none too large."""

import pytest
import torch

from mechinterp.hooked import schedule
from tests.families import model

DRAWS = [
    (starts, n_pos, max_tokens)
    for seed in range(12)
    for n_pos, max_tokens in [(15, 64), (15, 1024), (40, 40), (7, 1), (100, 1000)]
    for starts in [torch.randint(0, n_pos, (seed * 17,), generator=torch.Generator().manual_seed(seed))]
]


@pytest.mark.parametrize(
    "starts, n_pos, max_tokens", DRAWS, ids=lambda value: str(len(value)) if torch.is_tensor(value) else str(value)
)
def test_every_row_once_early_enough_and_small_enough(starts, n_pos, max_tokens):
    calls = schedule.batches(starts, n_pos, max_tokens)
    assert sorted(torch.cat([*calls, torch.zeros(0).long()]).tolist()) == list(range(len(starts)))
    for rows in calls:
        assert len(rows) > 0
        first = int(starts[rows].min())
        assert len(rows) == 1 or len(rows) * (n_pos - first) <= max_tokens
    # Begun earlier than needed only where that is cheaper than a call of its own.
    waste = sum(int((starts[rows] - starts[rows].min()).sum()) for rows in calls)
    assert waste <= schedule.CALL_COST * n_pos


def test_far_starts_are_not_run_together():
    starts = torch.tensor([0] * 40 + [14] * 40)
    calls = schedule.batches(starts, 15, 10_000)
    assert sorted(int(starts[rows].min()) for rows in calls) == [0, 14]
    few = schedule.batches(torch.tensor([0, 14]), 15, 10_000)
    assert len(few) == 1, "one call of two rows is cheaper than two calls"


def test_the_budget_follows_the_free_memory(monkeypatch):
    of = model("gpt2")

    def free(nbytes):
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": nbytes}))

    free(2**40)
    most = schedule.max_tokens(of, 10, True)
    free(2**18)
    less = schedule.max_tokens(of, 10, True)
    assert 10 <= less < most
    assert less <= schedule.max_tokens(of, 10, False), "the vocabulary takes memory"
    free(0)
    assert schedule.max_tokens(of, 10, True) == 10, "one row is always run"
    assert schedule.prompts_to_record(of, 10, 3) == 1
    free(2**24)
    assert schedule.prompts_to_record(of, 10, 3) > schedule.prompts_to_record(of, 20, 30) >= 1
