"""Pairs from JSON lines: the form, and every way that a file can be wrong."""

import json
import re

import pytest
import torch

from mechinterp import UserError, evaluate
from mechinterp.pairs_file import read_pairs_file
from mechinterp.tasks import from_file
from tests.tasks.word_model import word_model

PAIR = {"clean": "When Mary and John", "corrupted": "When John and Mary", "answer": "gave", "wrong": "left"}


def written(tmp_path, *lines):
    path = tmp_path / "my pairs.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    )
    return path


def ids(of, *words):
    return [of.encode(word, bos=False)[0] for word in words]


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_the_whole_form(tmp_path, bos):
    of = word_model(bos)
    long = {
        "clean": "When Mary and John gave Tom the book",
        "corrupted": "When Mary and John gave Tom the cup",
        "roles": {"first": 1, "last": -1},
        "targets": [
            {"pos": 1, "answer": "and", "wrong": ["left", "gave"]},
            {"pos": -1, "answer": [["to", 3], ["left", 1]], "wrong": {"gave": 2.0, "and": 6}},
        ],
    }
    short = {**PAIR, "roles": {"first": 0}}
    task = from_file(of, written(tmp_path, long, "", short))
    assert len(task) == 2 and task.name == "my pairs" and task.source["file"] == "my pairs.jsonl"
    shift, width = int(bos), 8 + int(bos)
    assert task.clean.tokens.shape == (2, width)
    assert task.clean.roles["first"].tolist() == [1 + shift, 4 + shift] and task.clean.roles["last"].tolist() == [
        7 + shift,
        -1,
    ]
    assert of.token_strings(task.clean.tokens[0, [1 + shift]]) == ["Mary"]
    assert of.token_strings(task.clean.tokens[1, [4 + shift]]) == ["When"]
    answers = task.answers
    assert answers.pos.tolist() == [[1 + shift, 7 + shift], [7 + shift, 7 + shift]]
    assert answers.weight.tolist() == [[0.5, 0.5], [1, 0]]
    assert answers.answer[0, 1].tolist() == ids(of, "to", "left") and answers.answer_weight[0, 1].tolist() == [
        0.75,
        0.25,
    ]
    assert answers.wrong[0].tolist() == [ids(of, "left", "gave"), ids(of, "gave", "and")]
    assert answers.wrong_weight[0].tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert answers.answer[1, 0, 0] == ids(of, "gave")[0] and task.continuations is None


def test_the_metric_of_a_file_is_that_of_its_lines(tmp_path):
    of = word_model()
    path = written(
        tmp_path, PAIR, {**PAIR, "clean": "After Mary and John left", "corrupted": "After John and Mary left"}
    )
    got = evaluate(of, from_file(of, path))
    for i, text in enumerate(("When Mary and John", "After Mary and John left")):
        logits = of(text)[0, -1]
        gave, left = ids(of, "gave", "left")
        assert abs(float(got[i]) - float(logits[gave] - logits[left])) < 1e-4


def test_several_targets_are_averaged(tmp_path):
    of = word_model()
    line = {
        "clean": "When Mary and John",
        "corrupted": "When John and John",
        "targets": [
            {"pos": 0, "answer": "to", "wrong": "gave"},
            {"pos": 2, "answer": [["and", 1], ["left", 3]], "wrong": "gave"},
        ],
    }
    logits = of("When Mary and John")[0]
    to, gave, both, left = ids(of, "to", "gave", "and", "left")
    want = (logits[0, to] - logits[0, gave] + (logits[2, both] + 3 * logits[2, left]) / 4 - logits[2, gave]) / 2
    assert torch.allclose(evaluate(of, from_file(of, written(tmp_path, line))), want[None], atol=1e-4)


def test_line_separators_inside_a_text_are_text(tmp_path):
    """U+2028 may stand in a JSON string as it is; only a line feed ends a line."""
    lines = read_pairs_file(written(tmp_path, {**PAIR, "clean": "When\u2028Mary and John\x85"}))
    assert len(lines) == 1 and lines[0].clean == "When\u2028Mary and John\x85"
    path = tmp_path / "crlf.jsonl"
    path.write_bytes((json.dumps(PAIR) + "\r\n\r\n" + json.dumps(PAIR) + "\r\n").encode())
    assert [line.number for line in read_pairs_file(path)] == [1, 3]


WRONG = {
    "no JSON": ('{"clean": ', "line 1 is not JSON: "),
    "a list": ("[1, 2]", "line 1 must be an object with clean, corrupted, answer, wrong; found list"),
    "unknown field": ({**PAIR, "anwser": "x"}, "unknown fields ['anwser']; valid: clean,"),
    "no clean": ({"corrupted": "a", "answer": "b"}, "needs 'clean', a text; found None"),
    "empty clean": ({**PAIR, "clean": ""}, "needs 'clean', a text; found ''"),
    "numbers": ({**PAIR, "corrupted": 3}, "needs 'corrupted', a text; found 3"),
    "no answer": ({"clean": "a", "corrupted": "b"}, "needs 'answer', a text or a list of texts"),
    "answer of nothing": ({**PAIR, "answer": []}, "'answer' is empty"),
    "an empty answer": ({**PAIR, "answer": ""}, "'answer' must be a text, a list of texts"),
    "answer of numbers": ({**PAIR, "answer": [1]}, "'answer' must be a text, a list of texts"),
    "no weight": ({**PAIR, "answer": [["gave", 0]]}, "[text, weight > 0]"),
    "negative weight": ({**PAIR, "wrong": {"gave": -1}}, "'wrong' must be"),
    "a triple": ({**PAIR, "answer": [["gave", 1, 2]]}, "'answer' must be"),
    "an empty pair": ({**PAIR, "answer": [[]]}, "'answer' must be"),
    "a weight of true": ({**PAIR, "answer": [["gave", True]]}, "'answer' must be"),
    "null wrong": ({**PAIR, "wrong": None}, "'wrong' must be"),
    "infinite weight": (json.dumps({**PAIR, "answer": [["gave", 7]]}).replace("7", "1e999"), "'answer' must be"),
    "NaN weight": (json.dumps({**PAIR, "answer": [["gave", 7]]}).replace("7", "NaN"), "'answer' must be"),
    "both": ({**PAIR, "targets": [{"pos": 0, "answer": "x"}]}, "has both 'targets' and 'answer'/'wrong'"),
    "no targets": ({"clean": "a", "corrupted": "b", "targets": []}, "'targets' must be a list of objects"),
    "target without pos": (
        {"clean": "a", "corrupted": "b", "targets": [{"answer": "x"}]},
        "pos must be a token index; found None",
    ),
    "strange target": (
        {"clean": "a", "corrupted": "b", "targets": [{"pos": 0, "answer": "x", "wrnog": "y"}]},
        "unknown fields ['wrnog']",
    ),
    "roles": ({**PAIR, "roles": ["S1"]}, "'roles' must be an object of name: token index"),
    "a role of text": ({**PAIR, "roles": {"S1": "Mary"}}, "role S1 must be a token index; found 'Mary'"),
    "a role of true": ({**PAIR, "roles": {"S1": True}}, "role S1 must be a token index; found True"),
    "a role of a half": ({**PAIR, "roles": {"S1": 1.5}}, "role S1 must be a token index; found 1.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named(tmp_path, name):
    line, says = WRONG[name]
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        read_pairs_file(written(tmp_path, line))
    assert "my pairs.jsonl, line 1" in str(caught.value)
    with pytest.raises(UserError, match="line 3"):
        read_pairs_file(written(tmp_path, PAIR, "", line))


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"no such pairs file: .*missing.jsonl"):
        read_pairs_file(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="holds no pairs"):
        read_pairs_file(written(tmp_path, "", "  "))
    with pytest.raises(UserError, match="cannot read pairs from"):
        read_pairs_file(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"clean": "\xe9"}')
    with pytest.raises(UserError, match="cannot read pairs from"):
        read_pairs_file(tmp_path / "latin")


@pytest.mark.parametrize(
    "line, says",
    [
        ({**PAIR, "corrupted": "When John"}, "pair 1: the clean side has 4 tokens, the corrupted 2"),
        ({**PAIR, "roles": {"S1": 4}}, "line 1: S1 is at token 4, but the prompt has 4 tokens"),
        ({**PAIR, "roles": {"S1": -5}}, "line 1: S1 is at token -5"),
        ({**PAIR, "answer": " "}, "line 1: ' ' is not in the vocabulary"),
        (
            {**PAIR, "answer": ["gave to", "to"]},
            "line 1: of several answers or targets each must be one token: ['gave to']",
        ),
        (
            {"clean": "When Mary", "corrupted": "When John", "targets": [{"pos": 2, "answer": "to"}]},
            "line 1: pos is at token 2",
        ),
        (
            {"clean": "When Mary", "corrupted": "When John", "targets": [{"pos": 0, "answer": "gave to"}]},
            "line 1 asks before the end",
        ),
    ],
)
def test_what_only_the_tokenizer_can_tell(tmp_path, line, says):
    with pytest.raises(UserError, match=re.escape(says)):
        from_file(word_model(True), written(tmp_path, line))


def test_answers_of_several_tokens_are_scored_by_teacher_forcing_alone(tmp_path):
    of = word_model()
    path = written(
        tmp_path,
        {**PAIR, "answer": "gave a book"},
        {**PAIR, "clean": "After Mary left", "corrupted": "After John left"},
    )
    task = from_file(of, path)
    with pytest.raises(
        UserError, match=re.escape("'gave a book' of line 1 is 3 tokens: 'gave' | 'a' | 'book'. Valid: seq-logprob")
    ):
        evaluate(of, task)
    got = evaluate(of, task, "seq-logprob")
    logits = of("When Mary and John gave a book")[0].log_softmax(-1)
    want = sum(float(logits[3 + j, token]) for j, token in enumerate(ids(of, "gave", "a", "book")))
    assert abs(float(got[0]) - want) < 1e-3
    assert abs(float(got[1]) - float(of("After Mary left")[0, -1].log_softmax(-1)[ids(of, "gave")[0]])) < 1e-3


def test_a_line_that_asks_before_the_end_is_not_scored_at_the_end(tmp_path):
    """Teacher forcing appends the answer: a question in the middle would be asked in another place, in silence."""
    middle = {"clean": "When Mary left", "corrupted": "When John left", "targets": [{"pos": 1, "answer": "and"}]}
    with pytest.raises(UserError, match="line 2 asks before the end"):
        from_file(word_model(), written(tmp_path, {**PAIR, "answer": "gave a book"}, middle))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({**PAIR, "wrong": PAIR["answer"]}, "also a wrong answer"),
        ({**PAIR, "answer": "Zanzibar"}, "not in the vocabulary"),
    ],
)
def test_an_answer_that_is_also_wrong_or_unknown_is_refused(tmp_path, line, says):
    with pytest.raises(UserError, match=says):
        from_file(word_model(), written(tmp_path, line))
