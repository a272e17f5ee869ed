"""A tiny random GPT-2 whose tokens carry their leading space, as byte-level tokenizers have it."""

import re
import sys
from functools import cache

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.tasks import TASKS


def words_and_templates() -> list[str]:
    """Every word of the tasks after a space, and every template with a word in its slots."""
    texts = []
    for task in TASKS.values():
        for name, value in vars(sys.modules[task.__module__]).items():
            if name == "TEMPLATES":
                texts += [re.sub(r"\{\w+\}", "x", template) for template in value]
            elif name.isupper() and name != "RELATIONS":
                flat = [*value, *value.values()] if isinstance(value, dict) else value
                texts += [f" {word}" for one in flat for word in ([one] if isinstance(one, str) else one)]
    return texts


@cache
def spaced_model(bos: bool = False, without: tuple[str, ...] = (), digits: int = 1, longest: int = 20) -> HookedModel:
    """Words of up to `longest` letters are one token with the space before them, and so are `digits` digits (of which a
    single one has no space, as in SmolLM2); words in `without` are unknown."""
    number = r"\d" if digits == 1 else rf" ?\d{{1,{digits}}}"
    pattern = Regex(rf"{number}| ?[A-Za-z]{{1,{longest}}}| ?[^\sA-Za-z\d]+|\s")
    split = pre_tokenizers.Split(pattern, "isolated")
    known = {token for text in words_and_templates() for token, _ in split.pre_tokenize_str(text)}
    known |= {
        space + f"{i:0{width}}" for width in range(1, digits + 1) for i in range(10**width) for space in ("", " ")
    }
    known -= {f" {word}" for word in without}
    vocabulary = {token: i for i, token in enumerate([*sorted(known), " ", "<pad>", "<unk>", "<s>"])}
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=len(fast), n_positions=160, n_embd=24, n_layer=2, n_head=4)
    made = hf.GPT2LMHeadModel(config).eval()
    bridge = build_bridge_from_module(made, "GPT2LMHeadModel", hf_config=config, tokenizer=None)
    return HookedModel(bridge, fast, ModelInfo("spaced", "tiny random", "module", False, bos))
