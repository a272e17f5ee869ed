"""Text becomes blocks that never cross a document."""

import json

import pytest
import torch

from mechinterp import load
from mechinterp.errors import UserError
from mechinterp.evaluation import token_losses
from mechinterp.hooked.interventions import Zero
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.models.planted import LETTERS, word_tokenizer
from mechinterp.text import blocks, documents
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
    ],
)
def test_bad_files(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        documents(str(tmp_path / name))


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
