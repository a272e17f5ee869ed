"""Positions that are left out: by place, by token, and written to JSON."""

import json

import pytest
import torch

from mechinterp import load
from mechinterp.errors import UserError
from mechinterp.hooked.prompts import Prompts
from mechinterp.models.planted import LETTERS, word_tokenizer
from mechinterp.sae.activations.exclusion import Exclusion
from tests.families import model, module


def test_the_first_token_of_each_row_is_not_the_first_column():
    prompts = Prompts.from_lists([[7, 8, 9, 7], [8, 9]], pad=0)
    kept = Exclusion().mask(prompts.tokens, prompts.real)
    assert kept.tolist() == [[False, True, True, True], [False, False, False, True]]
    everything = Exclusion(first=False).mask(prompts.tokens, prompts.real)
    assert torch.equal(everything, prompts.real)


def test_tokens_are_left_out_wherever_they_stand():
    tokens = torch.tensor([[7, 8, 9, 7], [1, 1, 7, 1]])
    real = torch.ones_like(tokens, dtype=torch.bool)
    kept = Exclusion(first=False, tokens=(9, 7)).mask(tokens, real)
    assert kept.tolist() == [[False, True, False, False], [True, True, False, True]]
    assert Exclusion(tokens=(9, 7)).mask(tokens, real).tolist() == [
        [False, True, False, False],
        [False, True, False, True],
    ]


def test_a_model_gives_its_special_tokens(tmp_path):
    module("llama").save_pretrained(tmp_path)
    tokenizer = word_tokenizer((*LETTERS[:10], "<s>", "<reserved>"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(["<reserved>"], special_tokens=True)  # special, but in none of the named roles
    tokenizer.save_pretrained(tmp_path)
    rule = Exclusion.of_model(load(tmp_path, device="cpu"), outlier=12)
    wanted = sorted(tokenizer.convert_tokens_to_ids(["<s>", "<reserved>", "<pad>", "<unk>"]))
    assert rule == Exclusion(True, tuple(wanted), 12)
    assert Exclusion.of_model(model("llama")) == Exclusion()  # no tokenizer


@pytest.mark.parametrize("rule", [Exclusion(), Exclusion(False, (3, 1), 10.0)], ids=["default", "all"])
def test_there_and_back_through_json(rule):
    assert Exclusion.of(json.loads(json.dumps(rule.to_json()))) == rule


def test_what_is_not_given_is_as_by_default():
    assert Exclusion.of({"tokens": [5, 5, 2]}) == Exclusion(True, (2, 5), None)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"last": True}, "has no last; valid: first, tokens, outlier"),
        ({"first": 1}, "first must be true or false; found 1"),
        ({"tokens": ["a"]}, r"must be a list of ids; found \['a'\]"),
        ({"tokens": [-1]}, "must be ids ≥ 0; found -1"),
        ({"outlier": "10"}, "must be a number or none; found '10'"),
        ({"outlier": 1.0}, "above 1, or none; found 1.0"),
        ({"outlier": float("nan")}, "above 1, or none; found nan"),
    ],
    ids=["unknown", "first", "words", "negative", "text", "small", "nan"],
)
def test_bad_rules(values, says):
    with pytest.raises(UserError, match=says):
        Exclusion.of(values)
