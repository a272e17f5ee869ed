"""Repeated tokens are what they say, the user's own are checked by number, and the control repeats nothing."""

import pytest
import torch

from mechinterp import UserError
from mechinterp.heads import repeated_tokens
from mechinterp.heads.tokens import as_prompts, default_period, fresh, ordinary_tokens
from mechinterp.hooked.prompts import Prompts
from tests.checks import checks_off
from tests.families import model


@pytest.mark.parametrize("copies", [2, 3])
def test_random_tokens_repeat(planted, copies):
    prompts = repeated_tokens(planted, n=5, period=7, copies=copies, seed=3)
    assert prompts.tokens.shape == (5, 7 * copies) and prompts.mask is None and not prompts.bos
    special = set(planted.tokenizer.all_special_ids)
    for row in prompts.tokens.tolist():
        assert row == row[:7] * copies
        assert len(set(row[:7])) == 7 and not set(row) & special
    assert list(prompts.roles) == [f"COPY{i + 1}" for i in range(copies)]
    assert prompts.roles["COPY2"].tolist() == [7] * 5
    assert torch.equal(prompts.tokens, repeated_tokens(planted, n=5, period=7, copies=copies, seed=3).tokens)
    assert not torch.equal(prompts.tokens, repeated_tokens(planted, n=5, period=7, copies=copies, seed=4).tokens)


def test_a_bos_stands_in_front_where_the_model_has_one(with_bos):
    prompts = repeated_tokens(with_bos, n=3, period=5)
    assert prompts.bos and prompts.tokens.shape == (3, 11)
    assert (prompts.tokens[:, 0] == with_bos.bos_token).all() and not (
        prompts.tokens[:, 1:] == with_bos.bos_token
    ).any()
    assert prompts.roles["COPY1"].tolist() == [1] * 3 and as_prompts(with_bos, prompts, None)[1] == 5
    for row in prompts.tokens.tolist():
        assert row[1:6] == row[6:]


def test_the_default_period_fits_the_model(planted):
    assert default_period(planted) == 26  # 52 letters: half of them are fresh for the control
    assert default_period(model("gpt2")) == 16  # 32 positions
    assert as_prompts(planted, repeated_tokens(planted, n=2), None)[1] == 26


def test_special_added_and_unused_ids_are_no_tokens(with_bos):
    tokens = ordinary_tokens(with_bos)
    assert with_bos.bos_token not in tokens and with_bos.pad_token not in tokens
    assert max(tokens) < len(with_bos.tokenizer) <= with_bos.d_vocab
    assert len(ordinary_tokens(model("gpt2"))) == model("gpt2").d_vocab


def test_given_lists_are_used_as_they_are(with_bos):
    bos = with_bos.bos_token
    rows = [[bos, 9, 3, 4, 5, 3, 4, 5], [bos, 6, 7, 8, 6, 7, 8]]
    prompts, period = as_prompts(with_bos, rows, 3)
    assert prompts.bos and period == 3
    assert prompts.tokens[0].tolist() == rows[0] and prompts.tokens[1, 1:].tolist() == rows[1]
    assert prompts.padding.tolist() == [0, 1]
    assert not as_prompts(with_bos, [rows[0], rows[1][1:]], 3)[0].bos, "one of them has none"
    tensor = torch.tensor(rows[0])
    assert torch.equal(as_prompts(with_bos, tensor, 3)[0].tokens[0], tensor)
    text = "John Mary to John Mary to"
    assert as_prompts(with_bos, [text], 3)[0].tokens.tolist() == [with_bos.encode(text)]


@pytest.mark.parametrize(
    ("rows", "period", "says"),
    [
        ([[1, 2, 1, 2], [1, 2, 99, 2]], 2, "sequence 2: token id 99 is outside the vocabulary of 54"),
        ([[1, 2, 1, 2], [-1, 2, 3, 2]], 2, "sequence 2: token id -1"),
        ([[1, 2, 1, 2], [1, 2, 3]], 2, "sequence 2 has 3 tokens; two copies of 2 need 4"),
        ([[1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 4, 3]], 3, r"sequence 2: .* token 2 of the copy is 'e', not 'c'"),
        ([[1, 2, 1, 2]], 1, "period must be at least 2; found 1"),
        ([[1, 2]], None, "sequence 1 has 2 tokens; a pattern needs 3"),
        ([[1, 2] * 40], 2, "sequence 1 has 80 tokens; planted-induction has 64 positions"),
        (torch.tensor([[1.0, 2.5, 3.0]]), None, r"sequence 1 must be a list of token ids; found \[1.0, 2.5"),
        ([[1, 2, 3], [1, "x", 3]], None, r"sequence 2 must be a list of token ids; found \[1, 'x'"),
        ([7], None, "sequence 1 must be a list of token ids; found 7"),
        ([], None, "found no prompts"),
        ([[]], None, "at least one token"),
    ],
)
def test_a_bad_sequence_is_named(planted, rows, period, says):
    with checks_off(), pytest.raises(UserError, match=says):
        as_prompts(planted, rows, period)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"period": 1}, "2 … 32"),
        ({"period": 33}, r"2 … 32 \(52 tokens, 64 positions\)"),
        ({"period": 22, "copies": 3}, "2 … 21"),
        ({"n": 0}, "n ≥ 1"),
        ({"copies": 1}, "copies ≥ 2"),
    ],
)
def test_what_does_not_fit_is_refused(planted, asked, says):
    with pytest.raises(UserError, match=says):
        repeated_tokens(planted, **asked)


def test_the_control_repeats_nothing(planted):
    rows = [[50, *range(10), *range(10)], [*range(20, 30), *range(20, 30)]]
    prompts, period = as_prompts(planted, rows, 10)
    control, share = fresh(planted, prompts, period, seed=1)
    assert share == 1.0
    for row, real, old in zip(control.tokens, prompts.real, prompts.tokens, strict=True):
        kept = row[real].tolist()
        assert kept[:-10] == old[real].tolist()[:-10]
        assert len(set(kept[-10:])) == 10 and not set(kept[-10:]) & set(kept[:-10])
        assert not set(kept) & {*planted.tokenizer.all_special_ids}


@pytest.mark.parametrize("period", [4, 5, 31])
def test_where_fresh_tokens_run_out_no_offset_matches(planted, monkeypatch, period):
    few = list(range(period + 1))
    monkeypatch.setattr("mechinterp.heads.tokens.ordinary_tokens", lambda of: few)
    prompts = Prompts(torch.tensor([few[:period] * 2]))
    control, share = fresh(planted, prompts, period)
    assert share == pytest.approx(1 / period)
    row = control.tokens[0].tolist()
    assert len(set(row[period:])) == period
    for query in range(period, 2 * period):
        assert row[query] not in (row[query - period], row[query - period + 1])


def test_a_vocabulary_too_small_for_any_control(planted, monkeypatch):
    monkeypatch.setattr("mechinterp.heads.tokens.ordinary_tokens", lambda of: [0, 1, 2])
    with pytest.raises(UserError, match="no 2 tokens are left for the control"):
        fresh(planted, Prompts(torch.tensor([[0, 1, 0, 1]])), 2)
