"""Indirect object identification: the prompts are what the task says they are."""

import re

import pytest
import torch

from mechinterp import UserError
from mechinterp.tasks import ioi
from mechinterp.tasks.ioi import NAMES, TEMPLATES
from tests.tasks.word_model import word_model


def words(model, prompts, i):
    """Tokens of prompt i by text, padding included."""
    return model.token_strings(prompts.tokens[i])


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("corruption", ["swapped-subject", "new-names"])
def test_roles_stand_at_the_right_words(bos, corruption):
    model = word_model(bos)
    task = ioi(model, n=48, seed=3, corruption=corruption)
    assert task.clean.mask is not None, "templates differ in length, so some prompts are padded"
    assert task.roles == ("IO", "S1", "S1+1", "S2", "END") and len(task) == 48
    for i in range(48):
        clean, corrupted = words(model, task.clean, i), words(model, task.corrupted, i)
        at = {role: int(where[i]) for role, where in task.clean.roles.items()}
        assert at == {role: int(where[i]) for role, where in task.corrupted.roles.items()}
        io, s = clean[at["IO"]], clean[at["S1"]]
        assert {io, s} <= set(NAMES) and io != s and clean[at["S2"]] == s
        assert [w for w in clean if w in NAMES].count(s) == 2 and [w for w in clean if w in NAMES].count(io) == 1
        assert at["S1+1"] == at["S1"] + 1 and at["END"] == len(clean) - 1 and clean[-1] == "to"
        assert model.token_strings(task.answers.answer[i, 0, :1]) == [io]
        assert model.token_strings(task.answers.wrong[i, 0, :1]) == [s]
        assert int(task.answers.pos[i, 0]) == at["END"]
        differs = [j for j in range(len(clean)) if clean[j] != corrupted[j]]
        if corruption == "swapped-subject":
            assert differs == [at["S2"]] and corrupted[at["S2"]] == io
        else:
            assert differs == sorted([at["IO"], at["S1"], at["S2"]])
            three = [corrupted[j] for j in differs]
            assert len({*three, io, s}) == 5 and set(three) <= set(NAMES)
        if bos:
            assert clean[int(task.clean.padding[i])] == "<s>" and clean.count("<s>") == 1
    assert task.clean.bos is bos


def test_the_text_is_that_of_its_template():
    model = word_model()
    task = ioi(model, n=24, seed=0)
    for i in range(24):
        text = " ".join(words(model, task.clean, i)[int(task.clean.padding[i]) :])
        template = re.sub(r"\\\{\w\\\}|\\\{\w+\\\}", r"\\w+", re.escape(TEMPLATES[int(task.clean.template[i])]))
        assert re.fullmatch(template, text), text


@pytest.mark.parametrize("n", [2, 12, 16, 24, 64])
@pytest.mark.parametrize("seed", range(3))
def test_orders_and_templates_are_balanced(n, seed):
    task = ioi(word_model(), n=n, seed=seed)
    abba = task.clean.roles["IO"] < task.clean.roles["S1"]
    assert int(abba.sum()) == n // 2
    counts = torch.bincount(task.clean.template, minlength=len(TEMPLATES))
    assert counts.max() - counts.min() <= 1
    if n % 24 == 0:
        for template in range(len(TEMPLATES)):
            assert int(abba[task.clean.template == template].sum()) * 2 == counts[template]


def test_a_seed_is_a_task():
    model = word_model()
    a, b, c = (ioi(model, n=24, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.clean.tokens, b.clean.tokens) and torch.equal(a.donor.tokens, b.donor.tokens)
    assert not torch.equal(a.clean.tokens, c.clean.tokens)
    assert dict(a.source) == {"task": "ioi", "n": 24, "seed": 1, "corruption": "swapped-subject"}
    other = ioi(model, n=24, seed=1, corruption="new-names")
    assert torch.equal(other.clean.tokens, a.clean.tokens), "a corruption must not change the clean prompts"
    assert other.corruption == "new-names"


@pytest.mark.parametrize("corruption", ["swapped-subject", "new-names"])
def test_donors_have_other_names_and_the_other_order(corruption):
    model = word_model(True)
    task = ioi(model, n=48, seed=5, corruption=corruption)
    assert torch.equal(task.donor.padding, task.clean.padding) and task.donor.n_pos == task.clean.n_pos
    for i in range(48):
        donor = words(model, task.donor, i)
        names = {w for w in donor if w in NAMES}
        assert len(names) == 2
        assert not names & {*words(model, task.clean, i), *words(model, task.corrupted, i)}
        at = {role: int(where[i]) for role, where in task.donor.roles.items()}
        assert donor[at["S1"]] == donor[at["S2"]] != donor[at["IO"]] and donor[at["END"]] == "to"
        assert (at["IO"] < at["S1"]) != (int(task.clean.roles["IO"][i]) < int(task.clean.roles["S1"][i]))
        rest = [w for w in donor if w not in NAMES]
        assert rest == [w for w in words(model, task.clean, i) if w not in NAMES], "only the names differ"


def test_the_same_answer_in_other_words():
    model = word_model()
    task = ioi(model, n=24, seed=5)
    for i in range(24):
        clean, other = words(model, task.clean, i), words(model, task.same_answer, i)
        differs = [(a, b) for a, b in zip(clean, other, strict=True) if a != b]
        assert len(differs) == 2 and not {w for pair in differs for w in pair} & set(NAMES)


def test_words_that_the_tokenizer_lacks_are_not_used():
    model = word_model(without=("Mary", "garden"))
    task = ioi(model, n=64)
    used = {w for i in range(64) for w in words(model, task.clean, i)}
    assert not used & {"Mary", "garden", "<unk>"}


def test_too_few_names_are_an_error():
    model = word_model(without=tuple(NAMES[:-7]))
    with pytest.raises(UserError, match=f"has 7 of our {len(NAMES)} names as single tokens; the task needs 8"):
        ioi(model)


@pytest.mark.parametrize("settings, says", [({"n": 0}, "n must be at least 1; found 0")])
def test_bad_settings(settings, says):
    with pytest.raises(UserError, match=says):
        ioi(word_model(), **settings)


def test_the_preview_shows_tokens_and_roles():
    text = ioi(word_model(True), n=2).preview(word_model(True))
    assert "[S1]" in text and "to[END]" in text and "clean" in text and "corrupted" in text and "answer" in text
    assert "<pad>" not in text
