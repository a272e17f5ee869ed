"""Text becomes blocks that never cross a document."""

import json
import sys
from itertools import islice

import datasets
import pytest
import torch

from mechinterp import docstrings, load
from mechinterp.errors import UserError
from mechinterp.evaluation import token_losses
from mechinterp.hooked.interventions import Zero
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.models.planted import LETTERS, word_tokenizer
from mechinterp.text import PASSAGE, blocks, documents, parts
from tests.checks import checks_off
from tests.families import FAMILIES, full_logits, model, module


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    module("llama").save_pretrained(path)
    word_tokenizer(LETTERS).save_pretrained(path)
    return load(path, device="cpu")


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    module("llama").save_pretrained(path)
    tokenizer = word_tokenizer((*LETTERS, "<s>"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(path)
    return load(path, device="cpu", bos=True)


def test_blocks_do_not_cross_documents(of):
    texts = ["a b c d e f g", "h i", "j k l m n"]
    made = blocks(of, texts, length=3, n=None)
    words = [" ".join(of.token_strings(row)) for row in made.prompts.tokens]
    assert words == ["a b c", "d e f", "j k l"] and made.document.tolist() == [0, 0, 2]
    assert blocks(of, texts, length=3, n=2).document.tolist() == [0, 0]
    assert blocks(of, texts, length=3, n=None, per_document=1).document.tolist() == [0, 2]
    before, after = made.split(0.5)
    assert before.document.tolist() == [0, 0] and after.document.tolist() == [2]


def test_a_bos_begins_every_block_and_counts(with_bos):
    made = blocks(with_bos, ["a b c d e"], length=3)
    bos = with_bos.bos_token
    assert made.prompts.bos and made.prompts.tokens[:, 0].tolist() == [bos, bos]
    assert [with_bos.token_strings(row[1:]) for row in made.prompts.tokens] == [["a", "b"], ["c", "d"]]


def test_files_and_what_every_python_carries(of, tmp_path):
    plain = tmp_path / "t.txt"
    plain.write_text("a b c\n\n\nd e f\n")
    assert list(documents(plain)[0]) == ["a b c", "d e f\n"] and documents(plain)[1] == "t.txt"
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in ("a b", "c d")))
    assert list(documents(str(lines))[0]) == ["a b", "c d"]
    topics, name = documents()
    assert name == "built-in" and sum(map(len, topics)) > 300_000


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.txt", None, "no such text file"),
        ("t.txt", "  ", "holds no text"),
        ("t.jsonl", '{"text": "a"}\n{"body": "b"}', "line 2: expected a JSON object with a text in 'text'"),
        ("t.jsonl", '{"text": 3}', "line 1: 'text' must be a text; found 3"),
        ("t.txt", "", "holds no text"),
        ("t.txt", "a\0b", "it is binary"),
        ("t.txt", b"\xff\xfe\x00", "cannot read text from"),
    ],
    ids=["none", "blank", "column", "number", "empty", "zeros", "bytes"],
)
def test_bad_files(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        documents(str(tmp_path / name))


def paragraph(words):
    return " ".join(["word"] * words)


def test_a_novel_is_cut_into_passages():
    novel = "\n\n".join(["Chapter 1", *[paragraph(40 + i % 7) for i in range(300)]]) + "\n"
    passages = parts(novel)
    assert "".join(passages) == novel  # not a character is lost
    assert all(PASSAGE <= len(one) <= PASSAGE + 300 for one in passages[:-1]) and len(passages) >= 5
    assert all(one.endswith("word\n\n") for one in passages[:-1])
    assert parts("a b\n\nc d\n") == ["a b\n\nc d\n"]  # shorter than a passage


@pytest.mark.parametrize("between", ["\n", " "])
def test_a_long_paragraph_is_cut_at_lines_or_else_at_words(between):
    text = between.join([paragraph(20)] * 500)
    passages = parts(text)
    assert "".join(passages) == text and len(passages) == 5
    assert all(len(one) <= PASSAGE + 100 and one.endswith(f"word{between}") for one in passages[:-1])
    assert parts("x" * 3 * PASSAGE) == ["x" * 3 * PASSAGE]


def test_articles_of_wikitext_are_documents():
    article = " \n = {} = \n \n Some words . \n\n\n \n = = History = = \n \n More , 1 = 1 . \n"
    text = article.format("First") + article.format("Second ( film )") + article.format("Third")
    found = parts(text)
    assert [one.splitlines()[0] for one in found] == [" = First = ", " = Second ( film ) = ", " = Third = "]
    assert all("History" in one for one in found)
    late = "A text of another kind.\n\n\n = Not an article = \n and more"
    assert len(parts(late)) == 2 and parts(late)[0] == "A text of another kind."


def test_several_files(tmp_path):
    (tmp_path / "a.txt").write_text("a b\n\n\nc d")
    (tmp_path / "b.jsonl").write_text('{"body": "e f"}')
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    for given in (paths, tuple(paths), [str(path) for path in paths], [paths[0], str(paths[1])]):
        found, name = documents(given, column="body")
        assert list(found) == ["a b", "c d", "e f"] and name == "a.txt, b.jsonl"
    assert list(documents(["a b", str(paths[0])])[0]) == ["a b", str(paths[0])]  # no list of files: texts
    with pytest.raises(UserError, match=r"no such text file: .*c\.txt"):
        documents([paths[0], tmp_path / "c.txt"])
    for empty, says in (([], "an empty list"), ([" ", ""], "the 2 texts that were given are empty")):
        with pytest.raises(UserError, match=says):
            documents(empty)


@pytest.mark.parametrize("streamed", [False, True])
def test_data_sets(streamed):
    def made(rows):
        whole = datasets.Dataset.from_list(rows)
        return whole.to_iterable_dataset() if streamed else whole

    rows = [{"text": letter * 3, "n": 1} for letter in "abcde"]
    found, _ = documents(made(rows))
    assert list(found) == ["aaa", "bbb", "ccc", "ddd", "eee"] == list(found)  # again and again
    assert hasattr(found, "__len__") != streamed
    if streamed:
        assert list(found.starting_at(3)) == ["ddd", "eee"]
    assert list(documents(made([{"body": "x"}]), column="body")[0]) == ["x"]
    with pytest.raises(UserError, match=r"the data set has no column 'body'; it has: text, n"):
        documents(made(rows), column="body")
    with pytest.raises(UserError, match=r"row 0: 'n' must be a text; found '1'"):
        documents(made(rows), column="n")
    several = datasets.IterableDatasetDict if streamed else datasets.DatasetDict
    with checks_off(), pytest.raises(UserError, match=r"several splits was given \(train\); give one of them"):
        documents(several(train=made(rows)))


def test_docstrings_are_read_and_never_imported():
    before = set(sys.modules)
    found, name = documents("docstrings")
    first = list(islice(found, 40))
    assert name == "docstrings" and list(islice(found, 40)) == first and len(set(first)) == 40
    assert all(len(one) >= docstrings.LEAST for one in first)
    assert list(islice(docstrings.Installed(), 40)) == first  # the same order when it is read anew
    assert {one.partition(".")[0] for one in set(sys.modules) - before} <= {"mechinterp"}


def test_docstrings_of_a_file(tmp_path, monkeypatch):
    quoted = '"""{}"""\n'
    text = [
        "What it is for, told at some length." + " And so on." * 40,
        "What the class is for, told at length." + " And so on." * 40,
    ]
    (tmp_path / "tests").mkdir()
    source = (
        quoted.format(text[0])
        + f"class A:\n    {quoted.format(text[1])}    def f(self):\n        {quoted.format('Short.')}"
    )
    for name in ("a.py", "copy.py", "tests/b.py"):
        (tmp_path / name).write_text(source)
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [one.split("\n\n") for one in docstrings.Installed()] == [text]


def test_texts_that_are_too_short(of):
    with pytest.raises(UserError, match=r"no document of 2 texts has 5 tokens; the longest has 3"):
        blocks(of, ["a b", "a b c"], length=5)
    with pytest.raises(UserError, match=r"blocks of 99 tokens were asked for; valid: 2 … 32"):
        blocks(of, ["a b"], length=99)
    with pytest.raises(UserError, match="need two documents; found 1"):
        blocks(of, ["a b c d"], length=2).split(0.5)


def test_a_data_set_that_cannot_be_had(of):
    with pytest.raises(UserError, match=r"text 'no-such/set' is no file here and cannot be had from the hub"):
        blocks(of, "no-such/set", length=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_losses_are_cross_entropies(family):
    of = model(family)
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    prompts = Prompts.from_lists(rows)
    for edits in ((), (Zero(Site("z", 1, head=1)),)):
        with of.intervene(*edits):
            losses = token_losses(of, prompts)
        hooks = [("blocks.1.attn.hook_z", zero_head)] if edits else []
        for i, row in enumerate(rows):
            logits = full_logits(of, Prompts(torch.tensor([row])), hooks)[0]
            want = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="none")
            torch.testing.assert_close(losses[i, -len(row) + 1 :], want, atol=1e-4, rtol=1e-4)
            assert losses[i, : -len(row) + 1].isnan().all()


def zero_head(z, hook):
    z = z.clone()
    z[:, :, 1] = 0
    return z
