"""Induction: the answer follows the earlier occurrence of the last token, and nothing else tells it."""

import pytest
import torch

from mechinterp import UserError, evaluate, load
from mechinterp.tasks import induction
from tests.tasks.word_model import word_model


@pytest.fixture(scope="module")
def planted():
    return load("planted-induction", device="cpu")


@pytest.mark.parametrize("length", [6, 12, 30])
def test_the_prompts(planted, length):
    task = induction(planted, n=20, seed=2, length=length)
    for i in range(20):
        clean, corrupted = task.clean.tokens[i].tolist(), task.corrupted.tokens[i].tolist()
        a, b, c, d, end = (int(task.clean.roles[name][i]) for name in ("A1", "B1", "C1", "D1", "END"))
        assert len(clean) == length + 1 and len(set(clean)) == length and end == length
        assert 1 <= a < b < c < d < end and clean[end] == clean[a]
        assert task.answers.answer[i, 0, 0] == clean[b] and task.answers.wrong[i, 0, 0] == clean[d]
        assert corrupted[c] == clean[a] and corrupted[a] == clean[c]
        assert [j for j in range(length + 1) if clean[j] != corrupted[j]] == [a, c]
        donor = task.donor.tokens[i].tolist()
        assert donor[end] == donor[c] and len(set(donor)) == length
        if length <= 26:
            assert not set(donor) & set(clean), "a donor has tokens of its own"


def test_it_is_seeded(planted):
    a, b, c = (induction(planted, n=8, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(a.clean.tokens, b.clean.tokens) and not torch.equal(a.clean.tokens, c.clean.tokens)


def test_the_planted_model_does_it(planted):
    task = induction(planted, n=32)
    assert evaluate(planted, task).min() > 3 and evaluate(planted, task, side="corrupted").max() < -3
    assert evaluate(planted, task, "prob").min() > 0.8


def test_special_tokens_are_not_used_and_a_bos_is_where_the_model_has_one():
    model = word_model(True)
    task = induction(model, n=30)
    assert task.clean.bos and (task.clean.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    special = torch.tensor(model.tokenizer.all_special_ids)
    assert not torch.isin(task.clean.tokens[:, 1:], special).any()
    rows = torch.arange(30)
    at = task.clean.roles
    assert (task.clean.tokens[rows, at["A1"]] == task.clean.tokens[rows, at["END"]]).all()
    assert (task.answers.answer[:, 0, 0] == task.clean.tokens[rows, at["B1"]]).all()
    assert (task.answers.pos[:, 0] == at["END"]).all()


@pytest.mark.parametrize("length", [5, 53])
def test_lengths_that_cannot_be(planted, length):
    with pytest.raises(UserError, match="length must be 6 … 52 for planted-induction"):
        induction(planted, length=length)
