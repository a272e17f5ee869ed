"""Tiny random models of every architecture family, with weights that make errors visible.

Default initialisation hides them: attention is near uniform and a head moves the logits by a few thousandths. Here
norm weights and biases are random, and weights are scaled until logits have a standard deviation ≥ 3 and the mean
largest attention weight is ≥ 0.4 (`tests/hooked/test_families.py` checks it).
"""

from functools import cache

import torch
import transformers as hf
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.hooked.prompts import Prompts
from mechinterp.tasks.pairs import PromptPairs, Target, assemble

VOCABULARY = 61
_WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
_GLU = {**_WIDTH, "intermediate_size": 40, "max_position_embeddings": 32}
CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=24, n_layer=3, n_head=4),
    "llama": lambda: hf.LlamaConfig(**_GLU, num_key_value_heads=2, head_dim=6, attention_bias=True),
    "neox": lambda: hf.GPTNeoXConfig(**_GLU),
    "gemma2": lambda: hf.Gemma2Config(
        **{**_GLU, "num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=4,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=8.0,
        final_logit_softcapping=9.0,
    ),
    "qwen3": lambda: hf.Qwen3Config(**_GLU, num_key_value_heads=2, head_dim=6),
    "opt": lambda: hf.OPTConfig(**_WIDTH, ffn_dim=40, max_position_embeddings=32, word_embed_proj_dim=24),
    "phi": lambda: hf.PhiConfig(**_GLU, partial_rotary_factor=0.34),
}
FAMILIES = tuple(CONFIGS)


def module(family: str) -> torch.nn.Module:
    """The transformers model, with weights drawn so that all of its parts matter."""
    config = CONFIGS[family]()
    made = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(sum(map(ord, family)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 1:
                gain = 0.0 if "bias" in name or family == "gemma2" else 1.0  # Gemma-2's norm weights are offsets from 1
                parameter.copy_(gain + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        _sharpen(made)
    return made


def _sharpen(made: torch.nn.Module) -> None:
    """Scale queries and keys, then the unembedding, until attention and logits are far from flat."""
    tokens = torch.randint(0, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(1))
    names = ("q_proj.weight", "k_proj.weight", "q_norm", "query_key_value.weight", "c_attn.weight")
    for _ in range(12):
        if torch.stack(made(tokens, output_attentions=True).attentions)[..., 3:, :].amax(-1).mean() > 0.45:
            break
        for name, parameter in made.named_parameters():
            if any(part in name for part in names):
                parameter.mul_(1.3)
    for _ in range(12):
        if made(tokens).logits.std() > 3.3:
            break
        made.get_output_embeddings().weight.mul_(1.3)


@cache
def model(family: str) -> HookedModel:
    """The hooked model over `module(family)`; shared, so tests leave it as it was."""
    made = module(family)
    bridge = build_bridge_from_module(made, type(made).__name__, hf_config=made.config, tokenizer=None)
    return HookedModel(bridge, None, ModelInfo(family, "tiny random", "module", False, False))


def pairs(of: HookedModel, padded: bool, n: int = 4, length: int = 8) -> PromptPairs:
    """Random pairs that differ at tokens 2 and 5, with roles there; padded ones have three lengths."""
    draw = torch.Generator().manual_seed(3)
    clean, corrupted, roles, targets = [], [], [], []
    for i in range(n):
        size = length - (i % 3 if padded else 0)
        row = torch.randint(0, of.d_vocab, (size,), generator=draw).tolist()
        other = list(row)
        other[2], other[5] = (row[2] + 7) % of.d_vocab, (row[5] + 11) % of.d_vocab
        clean.append(row)
        corrupted.append(other)
        roles.append({"A": 2, "B": 4, "END": size - 1})
        a, b = torch.randperm(of.d_vocab, generator=draw)[:2].tolist()
        targets.append([Target(size - 1, {a: 1.0}, {b: 1.0})])
    return assemble(of, "random", "two-tokens", clean, corrupted, roles, targets, bos=False)


def full_logits(of: HookedModel, prompts: Prompts, hooks: list) -> torch.Tensor:
    """The reference: TransformerLens's own hooked run, whole prompts, full logits."""
    mask = None if prompts.mask is None else prompts.mask.long()
    return of.bridge.run_with_hooks(prompts.tokens, fwd_hooks=hooks, attention_mask=mask, use_cache=False)
