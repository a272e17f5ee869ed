"""Greater-than: what may follow is above the start year, by decades or by endings as the tokenizer splits them."""

import re

import pytest
import torch

from mechinterp import UserError, evaluate
from mechinterp.tasks import greater_than
from mechinterp.tasks.greater_than import NOUNS
from tests.tasks.spaced_model import spaced_model


def text_of(model, prompts, i):
    return "".join(model.token_strings(prompts.tokens[i, int(prompts.padding[i]) :]))


def read(model, prompts, i):
    """The noun, the start year, and the century at the end."""
    text = text_of(model, prompts, i)
    (noun,) = [word for word in NOUNS if f" {word} " in text]
    ((century, ending),) = re.findall(r"(\d\d)(\d\d)", text)
    assert text.endswith(f" {century}")
    return noun, century, ending


def sets_of(model, answers, i):
    return (
        set(model.token_strings(ids[i, 0][weight[i, 0] > 0]))
        for ids, weight in ((answers.answer, answers.answer_weight), (answers.wrong, answers.wrong_weight))
    )


@pytest.mark.parametrize("digits", [1, 2], ids=["by decade", "by ending"])
def test_years_and_answers(digits):
    model = spaced_model(digits=digits)
    pairs = greater_than(model, n=48, seed=2)
    assert pairs.roles == ("NOUN", "XX", "YY", "YY+1", "END")
    for i in range(48):
        noun, century, ending = read(model, pairs.clean, i)
        assert read(model, pairs.corrupted, i) == (noun, century, "01")
        right, wrong = sets_of(model, pairs.answers, i)
        everything = {f"{e:02}"[:2] for e in range(100)} if digits == 2 else set("0123456789")
        own = ending[:1] if digits == 1 else ending
        assert right == {one for one in everything if int(one) > int(own)}
        assert wrong == {one for one in everything if int(one) < int(own)} and "10" <= ending < "90"
        at = {role: int(where[i]) for role, where in pairs.clean.roles.items()}
        strings = model.token_strings(pairs.clean.tokens[i])
        assert strings[at["YY"]] == own and strings[at["NOUN"]] == f" {noun}"
        assert strings[at["XX"]] == strings[at["END"]] == (century[1] if digits == 1 else f" {century}")
        assert at["YY"] == at["XX"] + 1 and at["YY+1"] == at["YY"] + 1
        assert digits == 2 or strings[at["YY+1"]] == ending[1]
        donor, same = read(model, pairs.donor, i), read(model, pairs.same_answer, i)
        assert donor[0] != noun != same[0] and donor[1] != century != same[1]
        assert abs(int(donor[2]) - int(ending)) >= 30 and same[2][:digits] == ending[:digits]


def test_metrics_are_over_the_sets():
    model = spaced_model()
    pairs = greater_than(model, n=8, seed=1)
    logits = model(pairs.clean)[:, -1]
    digit = [model.tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    for i in range(8):
        decade = int(read(model, pairs.clean, i)[2][0])
        above, below = logits[i, digit[decade + 1 :]], logits[i, digit[:decade]]
        got = evaluate(model, pairs.take(torch.tensor([i])))
        assert torch.allclose(got, (above.mean() - below.mean())[None], atol=1e-4)
        share = logits[i].softmax(-1)[digit[decade + 1 :]].sum()
        assert torch.allclose(evaluate(model, pairs.take(torch.tensor([i])), "prob"), share[None], atol=1e-5)


def test_a_few_years_may_be_one_token():
    """GPT-2 has some years, such as 1776, as one token: they are neither start years nor (as endings) answers."""
    model = spaced_model(digits=2)
    encode = type(model).encode

    class Merging(type(model)):
        def encode(self, text, bos=None):
            return [0] if text == " 1750" else encode(self, text, bos)

    merging = Merging(model.bridge, model.tokenizer, model.info)
    pairs = greater_than(merging, n=300)
    years = [read(model, pairs.clean, i)[1:] for i in range(300)]
    assert ("17", "50") not in years and any(ending == "50" for _, ending in years)
    for i, (century, ending) in enumerate(years):
        assert ("50" in set.union(*sets_of(model, pairs.answers, i))) == (century != "17" and ending != "50")


def test_tokenizers_that_split_years_elsewhere():
    with pytest.raises(UserError, match=r"last two digits are one token.* makes  173 \| 2 of ' 1732'"):
        greater_than(spaced_model(digits=3))


def test_too_few_nouns():
    with pytest.raises(UserError, match=f"has 1 of our {len(NOUNS)} nouns as single tokens; the task needs 2"):
        greater_than(spaced_model(without=NOUNS[1:]))
