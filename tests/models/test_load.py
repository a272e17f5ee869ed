import json
import os
import time
import urllib.error
from email.message import Message

import pytest
import torch
import transformers as hf
from torch import nn

from mechinterp.errors import UserError
from mechinterp.models import pretrained
from mechinterp.models.load import load, local_names
from mechinterp.models.planted import LETTERS, word_tokenizer

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def tiny(family):
    tokens = {"vocab_size": 54, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **tokens)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **sizes, **tokens)).eval()


@pytest.fixture
def folder(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "tiny")
    word_tokenizer(LETTERS).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_folder(family, as_type, tmp_path):
    original = tiny(family)
    original.save_pretrained(tmp_path)
    word_tokenizer(LETTERS).save_pretrained(tmp_path)
    model = load(as_type(tmp_path), device="cpu")
    original.set_attn_implementation("eager")
    torch.testing.assert_close(model.bridge(TOKENS), original(TOKENS).logits, rtol=0, atol=1e-6)
    assert model.info.source == "folder" and not model.info.bos and not model.info.processed
    assert model.tokenizer("a b").input_ids == [0, 1]
    assert not model.bridge.training and not any(p.requires_grad for p in model.bridge.parameters())
    assert model.n_kv_heads == (4 if family == "gpt2" else 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_module(family):
    original = tiny(family)
    before = {name: weight.clone() for name, weight in original.named_parameters()}
    logits = original(TOKENS).logits
    model = load(original.train(), tokenizer=word_tokenizer(LETTERS))
    torch.testing.assert_close(model.bridge(TOKENS), logits, rtol=0, atol=1e-6)
    assert model.info.source == "module" and not model.bridge.training
    after = dict(model.bridge.original_model.named_parameters())
    for name, weight in before.items():
        same = [other for key, other in after.items() if key.replace("._original_component", "") == name]
        assert all(torch.equal(weight, other) for other in same)
    with pytest.raises(UserError, match="loaded before"):
        load(model.bridge.original_model)


def test_module_keeps_its_dtype_unless_told():
    assert load(tiny("gpt2").to(torch.bfloat16)).dtype == torch.bfloat16
    assert load(tiny("gpt2").to(torch.bfloat16), dtype="float32").dtype == torch.float32
    model = load(tiny("llama"), dtype=torch.bfloat16, device="cpu")
    assert model.dtype == model.bridge(TOKENS).dtype == torch.bfloat16


def test_pattern_hooks_fire():
    """Eager attention, whatever the module came with."""
    model = load(tiny("llama"))
    _, cache = model.bridge.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_pattern")
    assert cache["blocks.1.attn.hook_pattern"].shape == (1, 4, 8, 8)


def test_process(folder):
    model, raw = load(folder, process=True), load(folder)
    assert model.info.processed and "processed" in model.header() and "raw" in raw.header()
    expected = raw.bridge(TOKENS).log_softmax(-1)
    torch.testing.assert_close(model.bridge(TOKENS).log_softmax(-1), expected, rtol=0, atol=1e-4)


def test_gpt2_in_its_real_configuration():
    with torch.device("meta"):
        module = hf.GPT2LMHeadModel(hf.GPT2Config())
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02)
    module.tie_weights()
    assert module.num_parameters() == 124_439_808
    model = load(module)
    assert (model.n_layers, model.n_heads, model.d_model, model.d_head, model.d_vocab) == (12, 12, 768, 64, 50257)
    assert model.bridge(TOKENS).isfinite().all()


def bos_tokenizer(adds):
    tokenizer = word_tokenizer((*LETTERS, "<s>"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds:
        from tokenizers.processors import TemplateProcessing

        bos = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


@pytest.mark.parametrize("adds", [False, True])
def test_bos_follows_the_tokenizer_unless_told(adds):
    assert load(tiny("gpt2"), tokenizer=bos_tokenizer(adds)).info.bos is adds
    assert load(tiny("gpt2"), tokenizer=bos_tokenizer(adds), bos=True).info.bos is True
    assert load(tiny("gpt2"), tokenizer=bos_tokenizer(adds), bos=False).info.bos is False


def test_bos_needs_a_token(folder):
    with pytest.raises(UserError, match="BOS was asked for"):
        load(folder, bos=True)
    with pytest.raises(UserError, match="BOS was asked for"):
        load(tiny("gpt2"), bos=True)


def test_folder_without_tokenizer(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "cuda:99"}, "cuda:99 was asked for"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; valid are float32, float16, bfloat16"),
        ({"dtype": torch.int32}, "unknown dtype 'torch.int32'"),
        ({"revision": "v1"}, "only hub names have revisions"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        load("planted-induction", **options)


def test_local_names():
    names = {model.name: model for model in local_names()}
    assert names["planted-induction"].cached and names["smollm2-135m"].kind == "embedded"


# Names that are nowhere


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(pretrained.constants, "is_offline_mode", lambda: False)


def answers(monkeypatch, fault):
    def urlopen(request, timeout):
        assert timeout <= 5
        raise fault

    monkeypatch.setattr(pretrained.urllib.request, "urlopen", urlopen)


@pytest.mark.parametrize(
    "fault, message",
    [
        (urllib.error.URLError("Name or service not known"), "cannot be reached"),
        (TimeoutError("timed out"), "cannot be reached"),
        (urllib.error.HTTPError("", 404, "Not Found", Message(), None), "has no such model"),
        (urllib.error.HTTPError("", 401, "Unauthorized", Message(), None), "has no such model"),
        (urllib.error.HTTPError("", 403, "Forbidden", Message(), None), "refuses it: 403 Forbidden"),
    ],
)
def test_unknown_name(fault, message, monkeypatch, online, capfd):
    answers(monkeypatch, fault)
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as error:
        load("smolm2-135m")
    assert time.perf_counter() - start < 2
    assert "Did you mean 'smollm2-135m'?" in str(error.value) and "planted-induction" in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_hub_switched_off():
    with pytest.raises(UserError, match="hub is switched off"):
        load("EleutherAI/pythia-70m", revision="step1000")


@pytest.mark.parametrize("name", ["/no/where", "./tiny", "model.gguf", "a/b/c", ""])
def test_no_such_path(name):
    with pytest.raises(UserError, match="there is no model at"):
        load(name)


def test_hub_cache_is_used_without_a_network(folder, tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    os.rename(folder, repository / "snapshots" / commit)
    monkeypatch.setattr(pretrained.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = load("someone/tiny")
    assert model.info.source == "hub" and model.tokenizer("b").input_ids == [1]
    assert "someone/tiny" in [known.name for known in local_names()]
    with pytest.raises(UserError, match="hub is switched off"):
        load("someone/tiny", revision="other")


# Folders and modules that cannot be loaded


def test_folder_that_hides_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(UserError, match="hub is switched off"):
        load("gpt2")
    with pytest.raises(UserError, match=r"no config\.json"):
        load("./gpt2")


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not a \.gguf one"):
        load(tmp_path / "weights.bin")
    (tmp_path / "weights.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(UserError, match=r"cannot load the GGUF file .*weights\.gguf"):
        load(tmp_path / "weights.gguf")


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        UserError, match=r"model.safetensors is damaged: it has \d+ bytes where its header asks for \d+"
    ):
        load(folder)


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model"')
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        load(folder)


def test_missing_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .* transformer.h.1.mlp.c_fc.weight"):
        load(folder)


def test_bad_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load(folder)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_never_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch(str(folder / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load a model from"):
        load(folder)
    assert not (folder / "ran").exists()


def test_remote_code_is_never_run(folder):
    classes = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": classes}))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nC = M = None\n")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load(folder)
    assert not (folder / "ran").exists()


def test_other_kinds_of_models(tmp_path):
    sizes = {"vocab_size": 54, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    bert = hf.BertForMaskedLM(hf.BertConfig(num_attention_heads=2, **sizes))
    with pytest.raises(UserError, match=r"not a causal language model \(bert\)"):
        load(bert)
    bert.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not a causal language model \(bert\)"):
        load(tmp_path)
    t5 = hf.T5Config(vocab_size=54, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(UserError, match="encoder-decoder"):
        load(hf.T5ForConditionalGeneration(t5))
    with pytest.raises(UserError, match="no unembedding"):
        load(tiny("gpt2").transformer)
    with pytest.raises(UserError, match="cannot load a Linear"):
        load(nn.Linear(2, 2))


def test_unsupported_architecture():
    config = hf.BioGptConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="no adapter for the architecture BioGptForCausalLM"):
        load(hf.BioGptForCausalLM(config))


def test_no_attention():
    config = hf.MambaConfig(vocab_size=54, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"no attention layers|cannot wrap"):
        load(hf.MambaForCausalLM(config))
