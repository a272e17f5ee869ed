"""Prompt pairs: answers, padding, teacher forcing."""

import pytest
import torch

from mechinterp import UserError, evaluate
from mechinterp.metrics import METRICS
from mechinterp.patching.cells import spots
from mechinterp.tasks.pairs import Answers, PromptPairs, Target, assemble
from tests.families import full_logits, model, pairs
from tests.tasks.word_model import word_model


def test_answers_are_padded_with_weight_nothing():
    made = Answers.build(
        [[Target(5, {1: 1.0}, {2: 3.0, 3: 1.0})], [Target(2, {4: 1.0, 5: 1.0}, {}), Target(4, {6: 2.0}, {7: 1.0})]]
    )
    assert made.pos.tolist() == [[5, 5], [2, 4]] and made.weight.tolist() == [[1, 0], [0.5, 0.5]]
    assert made.wrong[0, 0].tolist() == [2, 3] and made.wrong_weight[0, 0].tolist() == [0.75, 0.25]
    assert made.answer_weight[1].tolist() == [[0.5, 0.5], [1, 0]]
    assert not made.has_wrong and made.take(torch.tensor([0])).has_wrong


def test_positions_move_with_padding_and_bos():
    of = word_model(True)
    rows = [[5, 6, 7, 8], [9, 10]]
    targets = [[Target(3, {1: 1.0}, {2: 1.0})], [Target(1, {1: 1.0}, {2: 1.0}), Target(0, {3: 1.0}, {4: 1.0})]]
    task = assemble(of, "t", "c", rows, rows, [{"X": 0}, {"Y": 1}], targets)
    bos, pad = of.tokenizer.bos_token_id, of.pad_token
    assert task.clean.tokens.tolist() == [[bos, 5, 6, 7, 8], [pad, pad, bos, 9, 10]]
    assert task.clean.real.tolist() == [[True] * 5, [False, False, True, True, True]]
    assert {name: at.tolist() for name, at in task.clean.roles.items()} == {"X": [1, -1], "Y": [-1, 4]}
    assert task.answers.pos.tolist() == [[4, 4], [4, 3]]
    plain = assemble(of, "t", "c", rows, rows, [{}, {}], targets, bos=False)
    assert plain.clean.tokens.tolist() == [[5, 6, 7, 8], [pad, pad, 9, 10]] and not plain.clean.bos


def test_sides_of_unequal_length_are_shown_by_token():
    of = word_model()
    a, b = of.encode("When Mary and John"), of.encode("When Mary")
    with pytest.raises(UserError) as caught:
        assemble(of, "t", "c", [a, a], [a, b], [{}, {}], [[Target(0, {1: 1.0}, {})]] * 2)
    assert "pair 2: the clean side has 4 tokens, the corrupted 2" in str(caught.value)
    assert "When | Mary | and | John" in str(caught.value)


def test_some_of_the_pairs_are_the_same_pairs():
    of = model("llama")
    task = pairs(of, True)
    index = torch.tensor([3, 1])
    some = task.take(index)
    assert len(some) == 2 and torch.equal(some.clean.tokens, task.clean.tokens[index])
    assert torch.allclose(evaluate(of, some), evaluate(of, task)[index], atol=1e-5)


def test_another_prompt_of_the_same_length_and_another_answer():
    task = pairs(model("llama"), True, n=9)
    other = task.other_prompts()
    assert torch.equal(other.padding, task.clean.padding)
    index = [(task.clean.tokens == row).all(-1).nonzero().item() for row in other.tokens]
    answers, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]
    assert (answers[index] != answers).all() and (answers[index] != wrong).all()
    assert task.take(torch.tensor([0, 1])).other_prompts() is None, "one is longer than the other"


def continued(of, n_wrong=0):
    """Pairs of three lengths whose answers have one to three tokens, with a role."""
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]
    corrupted = [[1, 2, 3, 4, 15], [6, 7, 18], [9, 10, 11, 22]]
    more = [[30, 31], [32], [33, 34, 35]]
    targets = [[Target(len(p) - 1, {m[0]: 1.0}, {})] for p, m in zip(prompts, more, strict=True)]
    made = assemble(
        of,
        "long",
        "c",
        prompts,
        corrupted,
        [{"X": 1}, {"X": 0}, {}],
        targets,
        continuations=more,
        long_answer="' a b' of line 1 is 2 tokens: ' a' | ' b'",
    )
    return made, prompts, corrupted, more


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_teacher_forcing_is_the_sum_by_hand(family):
    of = model(family)
    task, prompts, corrupted, more = continued(of)
    for side, texts in (("clean", prompts), ("corrupted", corrupted)):
        got = evaluate(of, task, "seq-logprob", side)
        for i, (prompt, answer) in enumerate(zip(texts, more, strict=True)):
            logits = full_logits(of, of.to_prompts([prompt + answer]), [])[0].log_softmax(-1)
            want = sum(float(logits[len(prompt) - 1 + j, token]) for j, token in enumerate(answer))
            assert abs(float(got[i]) - want) < 1e-4 * abs(want) + 1e-4


def test_roles_stay_at_their_tokens_under_teacher_forcing():
    of = model("llama")
    task = continued(of)[0]
    longer = task.teacher_forced()
    assert [longer.clean.tokens[i, int(longer.clean.roles["X"][i])].item() for i in (0, 1)] == [2, 6]
    assert int(longer.clean.roles["X"][2]) == -1
    assert longer.continuations is None and longer.teacher_forced() is longer


@pytest.mark.parametrize("name", [name for name in METRICS if name != "seq-logprob"])
def test_other_metrics_refuse_answers_of_several_tokens(name):
    with pytest.raises(
        UserError, match=f"{name} needs answers of one token, but ' a b' of line 1 is 2 tokens: ' a' | ' b'"
    ):
        evaluate(model("llama"), continued(model("llama"))[0], name)


def test_single_token_answers_are_logprobs():
    of = model("llama")
    task = pairs(of, True)
    assert isinstance(task, PromptPairs)
    assert torch.allclose(evaluate(of, task, "seq-logprob"), evaluate(of, task, "logprob"))


def test_positions_of_a_teacher_forced_task_are_the_prompts_own():
    of = model("llama")
    task, prompts, *_ = continued(of)
    longer = task.teacher_forced()
    tokens = longer.clean.tokens

    def at(positions):
        return [tokens[i][mask].tolist() for i, mask in enumerate(spots(longer, positions)[1][0].mask)]

    assert at("all") == prompts
    assert at("last") == at([-1]) == [[p[-1]] for p in prompts]
    assert at([1]) == [[p[1]] for p in prompts] and at([-2]) == [[p[-2]] for p in prompts]


def test_control_prompts_have_the_length_of_their_pair():
    target = [[Target(2, {1: 1.0}, {2: 1.0})]]
    for extra in ({"donor": ([[1, 2]], [{}])}, {"same_answer": [[1, 2, 3, 4]]}):
        with pytest.raises(UserError, match="pair 1: a control prompt differs from it in length"):
            assemble(model("llama"), "t", "c", [[1, 2, 3]], [[1, 2, 4]], [{}], target, **extra)
