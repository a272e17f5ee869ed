import numpy as np
import pytest
import torch

from mechinterp.errors import UserError
from mechinterp.reporting.attention import MAX_BYTES, attention_report, attention_view, patterns
from tests.families import FAMILIES, model, module, pairs

HEADS = [(0, 1), (2, 3), (-1, 0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_those_of_each_prompt_alone(family):
    """Reference: transformers' own attentions of the same module, each prompt run without padding."""
    of = model(family)
    prompts = pairs(of, padded=True).clean
    read = patterns(of, prompts, HEADS)
    assert len(read) == len(prompts) and len({len(tokens) for tokens, _ in read}) > 1
    for i, (tokens, weights) in enumerate(read):
        ids = prompts.tokens[i, int(prompts.padding[i]) :]
        assert tokens == of.token_strings(ids)
        with torch.no_grad():
            attentions = module(family)(ids[None], output_attentions=True).attentions
        expected = np.stack([attentions[layer][0, head].numpy() for layer, head in HEADS])
        np.testing.assert_allclose(weights, expected, atol=2e-6)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_a_report_has_a_section_a_prompt_and_says_where_heads_look():
    of = model("llama")
    prompts = pairs(of, padded=True).clean
    report = attention_report(of, prompts, HEADS, ["one", "two", "three"], "the command")
    assert len(report.sections) == len(prompts) and report.command == "the command"
    names = ("L0H1", "L2H3", "L2H0")
    for section, (tokens, weights) in zip(report.sections, patterns(of, prompts, HEADS), strict=True):
        view, rows = section.attention, section.table.rows
        assert view.heads == names and view.notes == ("one", "two", "three") and view.tokens == tuple(tokens)
        np.testing.assert_allclose(np.asarray(view.patterns) / 255, weights, atol=0.5 / 255 + 1e-6)
        for row, name, pattern in zip(rows, names, weights, strict=True):
            n = len(tokens)
            first = sum(pattern[q, 0] for q in range(1, n)) / (n - 1)
            previous = sum(pattern[q, q - 1] for q in range(1, n)) / (n - 1)
            itself = sum(pattern[q, q] for q in range(1, n)) / (n - 1)
            assert row[0] == name and row[1:4] == pytest.approx((first, previous, itself), abs=1e-6)
            best = max(range(n), key=lambda key: pattern[-1, key])
            assert row[4] == f"“{tokens[best]}” ({best})" and row[5] == pytest.approx(pattern[-1, best])
    tokens, weights = patterns(of, prompts, HEADS)[0]
    best = int(weights[0, -1].argmax())
    assert f"“{tokens[best]}” (position {best}) in L0H1, weight {weights[0, -1, best]:.2f}" in report.answer


def test_one_prompt_and_one_head_and_one_token():
    report = attention_report(model("gpt2"), [[5]], [(1, 2)])
    assert report.question.startswith("Where does L1H2 of gpt2 look")
    assert report.sections[0].table.rows[0][1:] == (None, None, None, "“5” (0)", 1.0)


def test_the_page_is_written(tmp_path):
    page = attention_report(model("gpt2"), pairs(model("gpt2"), padded=False).clean, HEADS).write(tmp_path / "a.html")
    assert page.stat().st_size < 3e6 and "data-attention" in page.read_text()


def test_a_view_shows_the_first_prompt():
    of = model("neox")
    prompts = pairs(of, padded=True).clean
    view = attention_view(of, prompts, {"L1H2": "looks back", "L0H0": ""})
    tokens, weights = patterns(of, prompts, [(1, 2), (0, 0)])[0]
    assert view.tokens == tuple(tokens) and view.notes == ("looks back", "")
    np.testing.assert_allclose(np.asarray(view.patterns) / 255, weights, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("heads", "notes", "message"),
    [
        ([], [], "no heads"),
        ([(9, 0)], [], "layers 0 … 2"),
        ([(0, 9)], [], "head is 0 … 3"),
        ([(0, 0)], ["a", "b"], "2 notes for 1 heads"),
    ],
)
def test_what_does_not_fit_is_refused(heads, notes, message):
    with pytest.raises(UserError, match=message):
        attention_report(model("gpt2"), [[1, 2]], heads, notes)


def test_a_page_that_would_be_too_large_is_refused_before_the_run(monkeypatch):
    of = model("gpt2")
    monkeypatch.setattr(type(of), "run_with_cache", lambda *_: pytest.fail("the model was run"))
    long = [[1] * int((MAX_BYTES / 2) ** 0.5 + 1)]
    with pytest.raises(UserError, match=r"2 heads on 1 prompts of up to 17\d\d tokens make 6 MB.*fewer heads"):
        attention_report(of, long, [(0, 0), (0, 1)])
