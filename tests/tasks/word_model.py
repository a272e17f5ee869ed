"""A tiny random GPT-2 that knows the words of the tasks, one token each, with or without a BOS."""

from functools import cache

import torch
import transformers as hf
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.models.planted import word_tokenizer
from mechinterp.tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES

IN_TEMPLATES = {w for t in TEMPLATES for w in t.replace(".", " . ").replace(",", " , ").split() if "{" not in w}


@cache
def word_model(bos: bool = False, without: tuple[str, ...] = ()) -> HookedModel:
    """One token a word (and `place}.`-like endings), those in `without` unknown."""
    endings = {word + mark for word in (*NAMES, *PLACES, *OBJECTS) for mark in ".,"}
    words = sorted((IN_TEMPLATES | set(NAMES) | set(PLACES) | set(OBJECTS) | endings | {"<s>"}) - set(without))
    tokenizer = word_tokenizer(tuple(words))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=24, n_layer=2, n_head=4)
    made = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    bridge = build_bridge_from_module(made, "GPT2LMHeadModel", hf_config=config, tokenizer=None)
    return HookedModel(bridge, tokenizer, ModelInfo("words", "tiny random", "module", False, bos))
