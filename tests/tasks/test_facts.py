"""Facts: the prompts are what the task says they are, and the known ones are those that the model predicts."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as hf
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechinterp import UserError
from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.models.planted import word_tokenizer
from mechinterp.tasks import facts, from_file, known
from mechinterp.tasks.facts import RELATIONS
from mechinterp.tasks.pairs import Answers, Target


@cache
def word_model(bos: bool = False, without: tuple[str, ...] = ()) -> HookedModel:
    """A tiny random GPT-2 with one token a word, those in `without` unknown."""
    words = {"<s>"}
    for template, answers in RELATIONS.values():
        for subject, answer in answers.items():
            words |= {*template.format(subject).split(), answer}
    tokenizer = word_tokenizer(tuple(sorted(words - set(without))))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=24, n_layer=2, n_head=4)
    made = hf.GPT2LMHeadModel(config).eval()
    bridge = build_bridge_from_module(made, "GPT2LMHeadModel", hf_config=config, tokenizer=None)
    return HookedModel(bridge, tokenizer, ModelInfo("words", "tiny random", "module", False, bos))


def text_of(model, prompts, i):
    """The words of prompt i, without padding and BOS."""
    start = int(prompts.padding[i]) + int(prompts.bos)
    return " ".join(model.token_strings(prompts.tokens[i, start:]))


def test_the_facts_themselves():
    """About sixty, of relations enough to be resampled; no answer is in its own prompt, no subject comes first."""
    assert len(RELATIONS) >= 8 and 60 <= sum(len(answers) for _, answers in RELATIONS.values()) <= 90
    for template, answers in RELATIONS.values():
        assert template.count("{}") == 1 and not template.startswith("{}") and not template.endswith(" ")
        assert len(set(answers.values())) > 1
        for subject, answer in answers.items():
            assert answer not in template.format(subject).replace(",", "").split(), (subject, answer)


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_prompts_roles_and_answers(bos):
    model = word_model(bos)
    task = facts(model, check=False)
    relations = list(RELATIONS.values())
    assert task.roles == ("subject_first", "subject_last", "END") and task.clean.bos is bos
    assert task.clean.mask is not None and torch.equal(task.clean.padding, task.corrupted.padding)
    for i in range(len(task)):
        template, answers = relations[int(task.clean.template[i])]
        sides = []
        for prompts in (task.clean, task.corrupted):
            at = {role: int(where[i]) for role, where in prompts.roles.items()}
            subject = " ".join(model.token_strings(prompts.tokens[i, at["subject_first"] : at["subject_last"] + 1]))
            subject = subject.rstrip(",.") if subject not in answers else subject
            assert text_of(model, prompts, i) == template.format(subject) and at["END"] == prompts.n_pos - 1
            sides.append(subject)
        assert sides[0] != sides[1] and len(sides[0].split()) == len(sides[1].split())
        asked = model.token_strings([int(task.answers.answer[i, 0, 0]), int(task.answers.wrong[i, 0, 0])])
        assert asked == [answers[sides[0]], answers[sides[1]]] and asked[0] != asked[1]
        assert int(task.answers.pos[i, 0]) == task.clean.n_pos - 1
        if bos:
            assert model.token_strings(task.clean.tokens[i, task.clean.padding[i], None]) == ["<s>"]


def test_all_that_can_be_used_are():
    """Only a subject without another one of its length and with another answer is left out."""
    model = word_model()
    task = facts(model, check=False)
    used = {text_of(model, task.clean, i) for i in range(len(task))}
    assert len(used) == len(task), "each once"
    for template, answers in RELATIONS.values():
        for subject, answer in answers.items():
            others = [a for s, a in answers.items() if len(s.split()) == len(subject.split()) and a != answer]
            assert (template.format(subject) in used) == bool(others)


def test_a_seed_is_a_task():
    model = word_model()
    first, again, other = (facts(model, seed=seed, check=False) for seed in (1, 1, 2))
    assert torch.equal(first.clean.tokens, again.clean.tokens)
    assert torch.equal(first.corrupted.tokens, again.corrupted.tokens)
    assert not torch.equal(first.corrupted.tokens, other.corrupted.tokens)
    assert dict(first.source) == {"task": "facts", "facts": len(first), "seed": 1}
    assert first.seed == 1 and first.corruption == "other-subject"


@pytest.mark.parametrize("n", [1, 10, 24, 50])
def test_relations_are_balanced(n):
    task = facts(word_model(), n=n, check=False)
    assert len(task) == n and task.source["n"] == n
    counts = torch.bincount(task.clean.template, minlength=len(RELATIONS))
    if n <= 30:  # every relation has at least three
        assert counts.max() - counts.min() <= 1
    assert counts.max() <= -(-n // len(RELATIONS)) + 4


def test_words_that_the_tokenizer_lacks_are_not_used():
    model = word_model(without=("Paris", "France", "gold"))
    task = facts(model, check=False)
    words = {word for i in range(len(task)) for word in text_of(model, task.clean, i).split()}
    answers = set(model.token_strings(task.answers.answer.flatten()))
    assert not words & {"France", "gold", "<unk>"} and "Paris" not in answers and "Louvre" not in words
    nothing = tuple(answer for _, answers in RELATIONS.values() for answer in answers.values())
    with pytest.raises(UserError, match="no answer of our facts as a single token"):
        facts(word_model(without=nothing), check=False)


def answered(model, task, right):
    """The task with the model's own prediction as the answer of the prompts in `right`, its second one elsewhere."""
    best = model(task.clean)[:, -1].topk(2).indices
    end = task.clean.n_pos - 1
    made = [[Target(end, {int(best[i, 0 if i in right else 1]): 1.0}, {0: 1.0})] for i in range(len(task))]
    return replace(task, answers=Answers.build(made))


def test_known_keeps_what_the_model_predicts():
    model = word_model()
    task = facts(model, n=12, check=False)
    right = [0, 3, 4, 11]
    kept = known(model, answered(model, task, right))
    assert torch.equal(kept.clean.tokens, task.clean.tokens[right])
    assert torch.equal(kept.corrupted.tokens, task.corrupted.tokens[right])
    assert torch.equal(kept.clean.template, task.clean.template[right])
    assert kept.source == {**task.source, "known": 4, "dropped": 8}
    with pytest.raises(UserError, match="words answers none of these 12 prompts with its first prediction"):
        known(model, answered(model, task, []))


def test_one_of_several_answers_is_enough():
    model = word_model()
    task = facts(model, n=3, check=False)
    best = model(task.clean)[:, -1].topk(3).indices.tolist()
    made = [[Target(task.clean.n_pos - 1, {row[2]: 1.0, row[at]: 1.0}, {})] for at, row in enumerate(best)]
    kept = known(model, replace(task, answers=Answers.build(made)))  # the likeliest is among the first row's alone
    assert torch.equal(kept.clean.tokens, task.clean.tokens[:1])


def test_facts_are_checked_by_default():
    model = word_model()
    with pytest.raises(UserError, match="answers none of these"):
        facts(model)  # a random model knows nothing


def test_bad_input(tmp_path):
    model = word_model()
    for n in (0, -1):
        with pytest.raises(UserError, match=f"n must be at least 1; found {n}"):
            facts(model, n=n, check=False)
    most = len(facts(model, check=False))
    with pytest.raises(UserError, match=f"{most + 1} facts were asked for; {most} are left .* Valid: n up to {most}"):
        facts(model, n=most + 1, check=False)
    file = tmp_path / "long.jsonl"
    file.write_text('{"clean": "The capital of", "corrupted": "The country of", "answer": "Paris France"}\n')
    with pytest.raises(UserError, match="known needs answers of one token"):
        known(model, from_file(model, file))


@pytest.mark.real_model
def test_smollm2_knows_most_of_them(smollm2):
    task = facts(smollm2)
    assert len(task) >= 48 and len(task.clean.template.unique()) == len(RELATIONS)
    assert task.source["known"] == len(task) and task.source["dropped"] > 0
    logits = smollm2(task.clean.take(torch.arange(8)))[:, -1]
    assert torch.equal(logits.argmax(-1), task.answers.answer[:8, 0, 0])
