"""Stores of activations: what is read is what was written, whenever the writing stopped; damage is named."""

import errno
import json
import random
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mechinterp import files
from mechinterp.errors import UserError
from mechinterp.sae.activations import store_writer
from mechinterp.sae.activations.buffer import ShuffleBuffer
from mechinterp.sae.activations.chunks import Chunks
from mechinterp.sae.activations.store import Store, write_store
from mechinterp.sae.activations.store_format import Manifest, Origin

WIDTHS = {"blocks.1.hook_resid_post": 5, "blocks.0.hook_mlp_out": 3}
ORIGIN = Origin("tiny", "a" * 64, {"first": True, "tokens": [0], "outlier": None}, 128, "words.txt")
TOKENS, PER_SHARD = 100, 16  # six whole shards and one of four


class Drawn:
    """Random rows in chunks of unequal length, finite or not; its generator is part of the state."""

    def __init__(self, n: int | None = None, longest: int = 23, seed: int = 0, dtype: torch.dtype = torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.longest, self.dtype, self.done, self.calls = n, longest, dtype, 0, 0

    def chunk(self) -> dict[str, Tensor]:
        if self.n is not None and self.done >= self.n:
            raise StopIteration
        self.calls += 1
        length = (self.calls * 5) % (self.longest + 1)
        length = min(length, self.n - self.done) if self.n is not None else length
        self.done += length
        rows = torch.randn(length, sum(WIDTHS.values()), generator=self.generator)
        tables = rows.to(self.dtype).split(list(WIDTHS.values()), dim=1)
        return dict(zip(WIDTHS, tables, strict=True))

    def state_dict(self):
        return {"generator": self.generator.get_state(), "done": self.done, "calls": self.calls}

    def load_state_dict(self, state) -> None:
        self.generator.set_state(state["generator"])
        self.done, self.calls = state["done"], state["calls"]


def everything(chunks: Chunks) -> dict[str, Tensor]:
    """All rows of a finite source."""
    parts = []
    try:
        while True:
            parts.append(chunks.chunk())
    except StopIteration:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def expected(n: int = TOKENS) -> dict[str, Tensor]:
    rows = everything(Drawn(n=max(n, 500)))
    return {name: table[:n] for name, table in rows.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A complete store; tests do not change it."""
    folder = tmp_path_factory.mktemp("stores") / "made"
    write_store(folder, Drawn(), ORIGIN, TOKENS, PER_SHARD)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A store that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in content(made).items():
        (folder / name).write_bytes(data)
    return folder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# Writing


def test_what_is_read_is_what_was_written(made):
    store = Store.open(made)
    assert len(store) == TOKENS
    assert store.hook_names == tuple(WIDTHS)
    assert same(everything(store.chunks(endless=False)), expected())
    store.verify()


def test_the_folder(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert [shard["tokens"] for shard in manifest["shards"]] == [16] * 6 + [4]
    assert manifest["origin"]["exclusion"] == {"first": True, "tokens": [0], "outlier": None}
    assert (manifest["complete"], manifest["state"], manifest["version"]) == (True, None, 1)
    assert sorted(content(made)) == ["manifest.json"] + [f"shard-{i:06d}.safetensors" for i in range(7)]
    shard = load_file(made / "shard-000001.safetensors")  # any reader of safetensors reads it
    assert all(torch.equal(shard[name], expected()[name][16:32]) for name in WIDTHS)


def test_chunks_longer_than_a_shard(tmp_path):
    write_store(tmp_path / "s", Drawn(longest=90), ORIGIN, 200, 7)
    rows = everything(Drawn(n=500, longest=90))
    wanted = {name: table[:200] for name, table in rows.items()}
    assert same(everything(Store.open(tmp_path / "s").chunks(endless=False)), wanted)


@pytest.mark.parametrize("n", [64, 70])  # at the end of a shard, and within one
def test_a_source_that_ends_makes_a_smaller_complete_store(tmp_path, n):
    done = write_store(tmp_path / "s", Drawn(n=n), ORIGIN, TOKENS, PER_SHARD)
    assert (done.complete, done.tokens, done.asked) == (True, n, TOKENS)
    assert same(everything(Store.open(tmp_path / "s").chunks(endless=False)), everything(Drawn(n=n)))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision(tmp_path, name):
    dtype = getattr(torch, name)
    write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD, dtype=dtype)
    wanted = {site: rows.to(dtype) for site, rows in expected().items()}
    assert same(everything(Store.open(tmp_path / "s").chunks(endless=False)), wanted)


def test_rows_of_half_precision_are_stored_as_float32_by_default(tmp_path):
    write_store(tmp_path / "s", Drawn(dtype=torch.bfloat16), ORIGIN, 20, 20)
    wanted = {name: rows.bfloat16().float() for name, rows in expected(20).items()}
    assert same(everything(Store.open(tmp_path / "s").chunks(endless=False)), wanted)


def test_values_beyond_float16_are_refused(tmp_path):
    class Huge(Drawn):
        def chunk(self):
            return {name: rows * 1e6 for name, rows in super().chunk().items()}

    with pytest.raises(UserError, match=r"beyond float16.*store it as bfloat16"):
        write_store(tmp_path / "s", Huge(), ORIGIN, TOKENS, PER_SHARD, dtype=torch.float16)


def test_progress(tmp_path):
    seen: list[int] = []
    write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == TOKENS


# Interrupted


class Dies(Exception):
    """Stands for the end of the process: nothing of ours catches it."""


def dying_at(monkeypatch, n: int) -> None:
    """The process ends at the n-th of: writing a file, renaming it, in turn. What is written until then stays."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= n:
                raise Dies
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(files.os, "replace", counted(files.os.replace))
    unlink = files.Path.unlink  # a killed process tidies nothing
    monkeypatch.setattr(files.Path, "unlink", lambda *args, **kwargs: unlink(*args, **kwargs) if calls < n else None)
    monkeypatch.setattr(store_writer, "save_file", counted(store_writer.save_file))


def test_a_write_that_dies_anywhere_continues_to_the_same_bytes(made, tmp_path):
    # Five events a shard (write and rename of shard and state, rename of the manifest), the first manifest before
    # them; no state behind the last.
    for moment in range(1, 1 + 6 * 5 + 3 + 1):
        folder = tmp_path / f"at{moment}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Dies):
            dying_at(patch, moment)
            write_store(folder, Drawn(), ORIGIN, TOKENS, PER_SHARD)
        write_store(folder, Drawn(seed=9), ORIGIN, TOKENS, PER_SHARD) if moment > 6 else write_store(
            folder, Drawn(), ORIGIN, TOKENS, PER_SHARD
        )
        assert content(folder) == content(made), f"after dying at {moment}"


def test_whole_shards_are_kept_and_not_harvested_again(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dies):
        dying_at(patch, 22)
        write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("shard-*")}
    found = Manifest.load(tmp_path / "s")
    assert not found.complete and len(found.shards) == 4
    source, calls = Drawn(), []
    original = source.chunk
    source.chunk = lambda: calls.append(1) or original()
    write_store(tmp_path / "s", source, ORIGIN, TOKENS, PER_SHARD)
    whole = Drawn()
    write_store(tmp_path / "whole", whole, ORIGIN, TOKENS, PER_SHARD)
    assert len(calls) < whole.calls / 2
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("shard-*")}
    assert all(after[shard.file] == before[shard.file] for shard in found.shards)


def test_a_source_that_fails_leaves_a_store_that_continues(made, tmp_path):
    class Failing(Drawn):
        def chunk(self):
            if self.calls == 6:
                raise RuntimeError("out of memory")
            return super().chunk()

    with pytest.raises(RuntimeError, match="out of memory"):
        write_store(tmp_path / "s", Failing(), ORIGIN, TOKENS, PER_SHARD)
    assert not Manifest.load(tmp_path / "s").complete
    with pytest.raises(UserError, match=r"not finished: \d+ of 100 tokens"):
        Store.open(tmp_path / "s")
    write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    assert content(tmp_path / "s") == content(made)


def test_what_a_dead_process_left_is_removed(copy, made):
    # It died between the last manifest and the removal of the state before; and within a shard, in a run before.
    for name in ("state-000005.safetensors", ".partial-shard-000003.safetensors", ".partial-manifest.json"):
        (copy / name).write_bytes(b"left")
    write_store(copy, Drawn(), ORIGIN, TOKENS, PER_SHARD)
    assert content(copy) == content(made)


def test_a_complete_store_is_left_as_it_is(copy):
    source = Drawn()
    assert write_store(copy, source, ORIGIN, TOKENS, PER_SHARD).complete
    assert source.calls == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"origin": Origin("tiny", "a" * 64, ORIGIN.exclusion, 64, "words.txt")}, "context 128, not 64"),
        ({"origin": Origin("other", "b" * 64, ORIGIN.exclusion, 128, "words.txt")}, 'model "tiny", not "other"'),
        ({"origin": replace(ORIGIN, reading={"seed": 5})}, 'reading {}, not {"seed": 5}'),
        ({"n_tokens": 200}, "n_tokens 100, not 200"),
        ({"shard_tokens": 8}, "shard_tokens 16, not 8"),
        ({"dtype": torch.bfloat16}, "dtype float32, not bfloat16"),
    ],
    ids=["context", "model", "reading", "tokens", "shards", "dtype"],
)
def test_a_store_begun_otherwise_is_not_continued(copy, changes, words):
    before = content(copy)
    asked = {"origin": ORIGIN, "n_tokens": TOKENS, "shard_tokens": PER_SHARD, "dtype": torch.float32} | changes
    with pytest.raises(UserError, match=words):
        write_store(copy, Drawn(), **asked)
    assert content(copy) == before


def test_a_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        write_store(tmp_path, Drawn(), ORIGIN, TOKENS, PER_SHARD)
    assert content(tmp_path) == {"thesis.tex": b"years"}


def test_a_damaged_state_is_named(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dies):
        dying_at(patch, 22)
        write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    state = Manifest.load(tmp_path / "s").state
    assert state is not None and state.file is not None
    with (tmp_path / "s" / state.file).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(UserError, match=state.file):
        write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)


# The disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
@pytest.mark.parametrize("at", [1, 2, 5, 8])  # a shard or a state
def test_a_full_disk(made, tmp_path, error, at):
    calls = 0

    def full(tensors, path):
        nonlocal calls
        calls += 1
        if calls == at:
            Path(path).write_bytes(b"half of")
            raise error
        return original(tensors, path)

    original = store_writer.save_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "save_file", full)
        whole = (at - 1) // 2
        with pytest.raises(UserError, match=f"the disk is full; {whole} shards with {whole * PER_SHARD} tokens"):
            write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    found = Manifest.load(tmp_path / "s")
    named = {"manifest.json"} | {shard.file for shard in found.shards}
    named |= {found.state.file} if found.state and found.state.file else set()
    assert set(content(tmp_path / "s")) == named
    write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    assert content(tmp_path / "s") == content(made)


def test_a_disk_that_is_full_at_the_manifest(made, tmp_path):
    def full(path, text):
        if len(json.loads(text)["shards"]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        files.write_text(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechinterp.sae.activations.store_format.write_text", full)
        with pytest.raises(UserError, match="the disk is full; 1 shards"):
            write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    shards = sorted(path.name for path in (tmp_path / "s").glob("*shard*"))
    assert shards == ["shard-000000.safetensors"]
    write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    assert content(tmp_path / "s") == content(made)


def test_room_is_asked_for_before(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 3199, 3199))
    with pytest.raises(UserError, match=r"100 tokens .* 99 tokens would fit"):  # 32 bytes each
        write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 3200, 3200))
    write_store(tmp_path / "s", Drawn(), ORIGIN, TOKENS, PER_SHARD)


def test_an_empty_source_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"words\.txt gives no token"):
        write_store(tmp_path / "s", Drawn(n=0), ORIGIN, TOKENS, PER_SHARD)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "bad", [{"n_tokens": 0}, {"shard_tokens": 0}, {"dtype": torch.int8}], ids=["n", "shard", "dtype"]
)
def test_bad_sizes(tmp_path, bad):
    asked = {"n_tokens": 10, "shard_tokens": 5} | bad
    with pytest.raises(UserError):
        write_store(tmp_path / "s", Drawn(), ORIGIN, **asked)


# Reading


def test_require(made):
    store = Store.open(made)
    store.require("tiny", "a" * 64, list(WIDTHS), ORIGIN.exclusion, 128)
    store.require("a folder that moved", "a" * 64, ["blocks.0.hook_mlp_out"])
    with pytest.raises(UserError, match='model "tiny", not "big"; weights hash aaaaaaaaaaaa, not bbbbbbbbbbbb'):
        store.require("big", "b" * 64)
    with pytest.raises(UserError, match=r"sites blocks\.1.*, not blocks\.7\.hook_z"):
        store.require("tiny", "a" * 64, ["blocks.7.hook_z", "blocks.0.hook_mlp_out"])
    with pytest.raises(UserError, match=r'exclusion {"first": true.*, not {"first": false}'):
        store.require("tiny", "a" * 64, exclusion={"first": False})
    with pytest.raises(UserError, match="context 128, not 64"):
        store.require("tiny", "a" * 64, context=64)
    # A tuple is the list that JSON made of it.
    store.require("tiny", "a" * 64, exclusion={**ORIGIN.exclusion, "tokens": (0,)})


def test_some_of_the_sites(made):
    rows = everything(Store.open(made).chunks(hook_names=["blocks.0.hook_mlp_out"], endless=False, chunk_tokens=3))
    assert list(rows) == ["blocks.0.hook_mlp_out"]
    assert torch.equal(rows["blocks.0.hook_mlp_out"], expected()["blocks.0.hook_mlp_out"])


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_a_pass(made, seed, world):
    store = Store.open(made)
    parts = [everything(store.chunks(seed, (rank, world), endless=False, chunk_tokens=5)) for rank in range(world)]
    got = torch.cat([part["blocks.1.hook_resid_post"] for part in parts])
    wanted = expected()["blocks.1.hook_resid_post"]
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_the_order_of_shards(made):
    def firsts(seed):
        chunks = Store.open(made).chunks(seed, chunk_tokens=16)
        return [chunks.chunk()["blocks.0.hook_mlp_out"][0, 0].item() for _ in range(21)]

    assert firsts(None)[:7] == firsts(None)[7:14] == firsts(None)[14:]
    assert firsts(0) == firsts(0)
    passes = [firsts(0)[i : i + 7] for i in (0, 7, 14)] + [firsts(1)[:7]]
    assert len({tuple(one) for one in passes}) == 4
    assert len({tuple(sorted(one)) for one in passes}) == 1


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 11, 40])
def test_reading_continues(made, cut):
    store = Store.open(made)
    chunks = store.chunks(seed=3, shard=(1, 2), chunk_tokens=5)
    for _ in range(cut):
        chunks.chunk()
    state = json.loads(json.dumps(chunks.state_dict()))
    wanted = [chunks.chunk() for _ in range(20)]
    again = store.chunks(seed=3, shard=(1, 2), chunk_tokens=5)
    again.load_state_dict(state)
    assert all(same(again.chunk(), rows) for rows in wanted)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 4}, "seed 3, not 4"),
        ({"shard": (0, 1)}, "world 2, not 1"),
        ({"chunk_tokens": 6}, "chunk_tokens 5, not 6"),
    ],
    ids=["seed", "world", "chunk"],
)
def test_a_state_of_other_chunks_is_refused(made, other, words):
    store = Store.open(made)
    asked = {"seed": 3, "shard": (0, 2), "chunk_tokens": 5}
    state = store.chunks(**asked).state_dict()
    with pytest.raises(UserError, match=words):
        store.chunks(**(asked | other)).load_state_dict(state)


def test_a_state_of_another_store_is_refused(made, tmp_path):
    write_store(tmp_path / "s", Drawn(seed=1), ORIGIN, TOKENS, PER_SHARD)
    with pytest.raises(UserError, match="the state is of other chunks"):
        Store.open(tmp_path / "s").chunks().load_state_dict(Store.open(made).chunks().state_dict())


def test_through_a_buffer_and_back(made):
    store, rng = Store.open(made), random.Random(0)
    straight = ShuffleBuffer(store.chunks(seed=0, chunk_tokens=5), 30, 4, seed=0)
    wanted = [straight.batch() for _ in range(60)]
    buffer, got = ShuffleBuffer(store.chunks(seed=0, chunk_tokens=5), 30, 4, seed=0), []
    while len(got) < 60:
        got += [buffer.batch() for _ in range(min(rng.randint(1, 9), 60 - len(got)))]
        state, buffer = buffer.state_dict(), ShuffleBuffer(store.chunks(seed=0, chunk_tokens=5), 30, 4, seed=8)
        buffer.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"shard": (2, 2)}, "rank 2 of 2"),
        ({"shard": (0, 99)}, "99 processes cannot share the"),
        ({"hook_names": ["blocks.9.hook_z"]}, r"has no blocks\.9\.hook_z"),
        ({"chunk_tokens": 0}, "at least 1; found 0"),
    ],
    ids=["rank", "world", "site", "chunk"],
)
def test_bad_requests(made, asked, words):
    with pytest.raises(UserError, match=words):
        Store.open(made).chunks(**asked)


# Damage


SECOND = "shard-000001.safetensors"


def test_a_truncated_shard_is_named(copy):
    data = (copy / SECOND).read_bytes()
    (copy / SECOND).write_bytes(data[:-7])
    with pytest.raises(UserError, match=rf"{SECOND} is damaged: it has \d+ bytes of {len(data)}"):
        Store.open(copy)


def test_a_missing_shard_is_named(copy):
    (copy / SECOND).unlink()
    with pytest.raises(UserError, match=f"lacks its shard .*{SECOND}"):
        Store.open(copy)


def test_a_shard_that_is_lost_while_it_is_read_is_named(copy):
    chunks = Store.open(copy).chunks()
    chunks.chunk()
    (copy / SECOND).unlink()
    with pytest.raises(UserError, match=f"lacks its shard .*{SECOND}"):
        chunks.chunk()


@pytest.mark.parametrize("at", [0, 3, 7, 8, 30])
def test_a_damaged_header_is_named_when_it_is_read(copy, at):
    data = bytearray((copy / SECOND).read_bytes())
    data[at] ^= 0xFF
    (copy / SECOND).write_bytes(data)
    chunks = Store.open(copy).chunks()
    chunks.chunk()
    with pytest.raises(UserError, match=SECOND):
        chunks.chunk()


@pytest.mark.parametrize(
    ("old", "new"),
    [("[16,5]", "[15,5]"), ("[16,5]", "[16,6]"), ("F32", "I32"), ("hook_mlp_out", "hook_mlp_in_"), (",512]", ",511]")],
    ids=["tokens", "width", "dtype", "site", "extent"],
)
def test_a_header_that_says_something_else_is_named(copy, old, new):
    data = (copy / SECOND).read_bytes()
    assert old.encode() in data[:300]
    (copy / SECOND).write_bytes(data[:300].replace(old.encode(), new.encode()) + data[300:])
    chunks = Store.open(copy).chunks()
    chunks.chunk()
    with pytest.raises(UserError, match=f"{SECOND} is damaged: its header"):
        chunks.chunk()


def test_a_shard_in_place_of_another_is_named_by_verify(copy):
    (copy / SECOND).write_bytes((copy / "shard-000002.safetensors").read_bytes())
    with pytest.raises(UserError, match=f"{SECOND} is damaged: its sha256"):
        Store.open(copy).verify()


def test_one_wrong_bit_is_named_by_verify(copy):
    data = bytearray((copy / SECOND).read_bytes())
    data[-3] ^= 1
    (copy / SECOND).write_bytes(data)
    with pytest.raises(UserError, match=f"{SECOND} is damaged: its sha256"):
        Store.open(copy).verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"kind": "cats"}, "is not the manifest of a store"),
        ({"dtype": "int8"}, "is damaged"),
        ({"asked": None}, "is damaged"),
        ({"more": 1}, "is damaged"),
        ({"shards": [{"file": "../x.safetensors", "tokens": 1, "bytes": 9, "sha256": ""}]}, "no name of a file"),
        ({"origin": {"model": "tiny"}}, "is damaged"),
        ({"complete": False}, "needs the state"),
    ],
    ids=["version", "kind", "dtype", "asked", "more", "path", "origin", "state"],
)
def test_a_bad_manifest_is_named(copy, change, words):
    note = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(note | change))
    with pytest.raises(UserError, match=rf"manifest\.json.*{words}"):
        Store.open(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "null"], ids=["empty", "brace", "list", "byte", "null"])
def test_a_manifest_that_is_none(copy, text):
    (copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        Store.open(copy)


def test_no_store(tmp_path):
    with pytest.raises(UserError, match="is no store of activations"):
        Store.open(tmp_path)
    with pytest.raises(UserError, match="is no store of activations"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is no store of activations"):
        Store.open(tmp_path / "file")
    with pytest.raises(UserError, match="is no store of activations"):
        write_store(tmp_path / "file", Drawn(), ORIGIN, TOKENS, PER_SHARD)
