"""The stream of token blocks: what is in it, what is held out of it, and that it continues where it stopped."""

import json
import random
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch

from mechinterp import load
from mechinterp.errors import UserError
from mechinterp.models.planted import LETTERS, word_tokenizer
from mechinterp.sae.activations import tokens as tokens_module
from mechinterp.sae.activations.tokens import TokenBlocks, held_out_blocks
from tests.families import model, module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model whose tokenizer knows letters, `<s>` and `</s>`."""
    path = tmp_path_factory.mktemp("model")
    module("llama").save_pretrained(path)
    tokenizer = word_tokenizer((*LETTERS, "<s>", "</s>"))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def of(saved):
    return load(saved, device="cpu", bos=False)


@pytest.fixture(scope="module")
def with_bos(saved):
    return load(saved, device="cpu", bos=True)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """The tokenizer gets two documents at once, so that a stream has many places to stop at."""
    monkeypatch.setattr(tokens_module, "_DOCUMENTS", 2)


def texts(n=23, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(LETTERS, k=draw.randint(1, 12))) for _ in range(n)]


def words(of, blocks):
    return [" ".join(of.token_strings(row)) for row in blocks]


def test_blocks_are_the_documents_one_after_another(of):
    stream = TokenBlocks(of, ["a b", "c d e", "f g", "h i"], 4, held_out_every=None)
    assert words(of, stream.take(5)) == [
        "a b </s> c", "d e </s> f", "g </s> h i", "</s> a b </s>", "c d e </s>",
    ]  # fmt: skip
    assert stream.take(0).shape == (0, 4) and stream.take(1).dtype == torch.int64


def test_a_bos_begins_each_block_and_is_not_doubled(with_bos):
    stream = TokenBlocks(with_bos, ["a b c", "d e f g", "h i"], 4, held_out_every=None)
    # The second block would begin with the separator after c: its own BOS stands for it.
    assert words(with_bos, stream.take(4)) == ["<s> a b c", "<s> d e f", "<s> g <s> h", "<s> i <s> a"]


def test_held_out_documents_are_in_no_training_block(of):
    documents = [" ".join([letter] * 5) for letter in LETTERS[:12]]
    seen = {word for row in TokenBlocks(of, documents, 4, held_out_every=4).take(40) for word in of.token_strings(row)}
    assert seen == {letter for i, letter in enumerate(LETTERS[:12]) if i % 4} | {"</s>"}
    held = held_out_blocks(of, documents, 4, held_out_every=4)
    assert words(of, held.prompts.tokens) == ["a a a a", "e e e e", "i i i i"] and held.document.tolist() == [0, 1, 2]
    assert held.source.endswith("held out")


def source_of(kind, folder):
    made, rows = texts(), [{"text": text} for text in texts()]
    if kind == "texts":
        return made
    if kind == "jsonl":
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "t.jsonl"
    if kind == "files":
        paths = [folder / "a.txt", folder / "b.txt"]
        for path, part in zip(paths, (made[:9], made[9:]), strict=True):
            path.write_text("\n\n\n".join(part))
        return tuple(paths)
    return (
        datasets.Dataset.from_list(rows)
        if kind == "data set"
        else datasets.Dataset.from_list(rows).to_iterable_dataset()
    )


KINDS = ["texts", "jsonl", "files", "data set", "stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_blocks(kind, of, tmp_path):
    want = TokenBlocks(of, texts(), 5, held_out_every=4).take(50)
    got = TokenBlocks(of, source_of(kind, tmp_path), 5, held_out_every=4).take(50)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_a_resumed_stream_gives_what_an_uninterrupted_one_gives(kind, bos, of, with_bos, tmp_path):
    each = with_bos if bos else of
    make = partial(TokenBlocks, each, source_of(kind, tmp_path), 5, (1, 2), 4)
    whole = make().take(60)  # several epochs
    draw = random.Random(kind)
    for _ in range(4):
        first, sizes = make(), [draw.randint(0, 7) for _ in range(4)]
        done = [first.take(n) for n in sizes]
        state = first.state_dict()
        ahead = first.take(3)  # a state must not move with the stream that it was taken from
        assert all(isinstance(one, torch.Tensor | str | int | None) for one in state.values())
        second = make()
        second.load_state_dict(state)
        assert second.epoch == state["epoch"]
        got = torch.cat([*done, second.take(60 - sum(sizes))])
        assert torch.equal(got, whole) and torch.equal(ahead, whole[sum(sizes) :][:3])


def test_epochs_are_counted_and_shuffled_anew(of):
    documents = list(LETTERS[:10])
    stream = TokenBlocks(of, documents, 20, held_out_every=None, seed=3)  # 10 documents and 10 separators
    epochs = []
    for number in range(3):
        epochs.append([word for word in of.token_strings(stream.take(1)[0]) if word != "</s>"])
        assert stream.epoch in (number, number + 1)
    assert all(sorted(epoch) == sorted(documents) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != documents
    again = TokenBlocks(of, documents, 20, held_out_every=None, seed=3)
    again.take(1)
    later = TokenBlocks(of, documents, 20, held_out_every=None, seed=3)
    later.load_state_dict(again.state_dict())
    assert [w for w in of.token_strings(later.take(1)[0]) if w != "</s>"] == epochs[1]


@pytest.mark.parametrize("kind", ["texts", "stream"])
def test_ranks_share_the_documents_out(kind, of, tmp_path):
    documents = [" ".join([letter] * 3) for letter in LETTERS[:13]]
    source = documents if kind == "texts" else datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()
    seen = []
    for rank in range(3):
        stream = TokenBlocks(of, source, 4, shard=(rank, 3), held_out_every=5)
        seen.append({word for row in stream.take(9) for word in of.token_strings(row)} - {"</s>"})
    trained = [letter for i, letter in enumerate(LETTERS[:13]) if i % 5]
    assert seen == [set(trained[rank::3]) for rank in range(3)]


def test_a_fresh_stream_begins_anew_and_leaves_the_other_alone(of):
    stream = TokenBlocks(of, texts(), 5)
    first = stream.take(3)
    assert torch.equal(stream.fresh().take(3), first)
    whole = TokenBlocks(of, texts(), 5).take(6)
    assert torch.equal(stream.take(3), whole[3:])
    assert torch.equal(TokenBlocks(of, texts(), 5, (1, 2)).fresh((0, 1)).take(6), whole)


def test_a_stream_that_fails_loses_no_document(of):
    class Fails(datasets.IterableDataset):
        column_names, broken = ["text"], True

        def __init__(self):
            pass

        def __iter__(self):
            return self.skip(0)

        def skip(self, n):
            for number, text in enumerate(texts()):
                if number == 7 and self.broken:
                    raise ConnectionError("the line is down")
                if number >= n:
                    yield {"text": text}

    source = Fails()
    stream = TokenBlocks(of, source, 5)
    with pytest.raises(ConnectionError):
        stream.take(20)
    source.broken = False
    assert torch.equal(stream.take(20), TokenBlocks(of, texts(), 5).take(20))


def test_a_state_of_other_settings_is_refused(of, with_bos):
    state = TokenBlocks(of, texts(), 5).state_dict()
    for other, says in [
        (TokenBlocks(of, texts(), 6), "context 5; this one has 6"),
        (TokenBlocks(of, texts(22), 5), "source '23 texts'; this one has '22 texts'"),
        (TokenBlocks(of, texts(), 5, (0, 2)), "world 1; this one has 2"),
        (TokenBlocks(of, texts(), 5, seed=1), "seed None; this one has 1"),
        (TokenBlocks(of, texts(), 5, held_out_every=9), "held_out_every 20; this one has 9"),
        (TokenBlocks(with_bos, texts(), 5), "bos False; this one has True"),
    ]:
        with pytest.raises(UserError, match=says):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda of: TokenBlocks(of, ["a b c", "d e"], 4).take(1),
            r"\(2 texts\) has 3 tokens, too few for one block of 4",
        ),
        (
            lambda of: TokenBlocks(of, ["a b c d e f"], 4).take(1),
            "has 0 tokens.*; of its documents number 0 and every 20th",
        ),
        (lambda of: TokenBlocks(of, texts(3), 4, (2, 3), None).take(9), None),
        (lambda of: TokenBlocks(of, texts(3), 4, (3, 4), None).take(1), r"\(3 texts, share 3 of 4\) has 0 tokens"),
        (lambda of: TokenBlocks(of, texts(), 4, (2, 2)), r"0 ≤ rank < world; found \(2, 2\)"),
        (lambda of: TokenBlocks(of, texts(), 33), "blocks of 33 tokens were asked for; valid: 2 … 32"),
        (lambda of: TokenBlocks(of, texts(), 4, held_out_every=1), "at least 2, or None to hold nothing out; found 1"),
        (
            lambda of: TokenBlocks(of, source_of("stream", Path()), 4, seed=1),
            "is a stream: its documents cannot be shuffled",
        ),
        (lambda of: TokenBlocks(model("llama"), texts(), 4), "has no tokenizer"),
        (
            lambda of: held_out_blocks(of, ["a b"], 4),
            "no document of 1 texts, held out has 4 tokens; the longest has 2",
        ),
    ],
    ids=["few", "one", "enough", "share", "rank", "context", "every", "seed", "tokenizer", "held"],
)
def test_bad_streams(make, says, of):
    if says is None:
        make(of)
        return
    with pytest.raises(UserError, match=says):
        make(of)
