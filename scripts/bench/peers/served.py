"""What the peer programs share: the model, the prompts, and calls that are answered one at a time.

A peer runs in an environment of its own. `circuits.py` writes a folder with the model (safetensors), `prompts.json` and
the tensors that a call needs, and sends one JSON line a call; the answer is one JSON line with the CPU seconds of the
measured part, how much the process grew at its peak, and a file of tensors.
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def seconds() -> float:
    """CPU seconds of this process on one thread, else wall seconds."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def resident(kind: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {kind} in /proc/self/status")


def forget_peak() -> int:
    """Give freed memory back and start the peak anew; the bytes held now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


class Prompts:
    """Pairs of one length: tokens `[prompt pos]` of both sides, and the two answers `[prompt]`."""

    def __init__(self, folder: Path):
        read = json.loads((folder / "prompts.json").read_text())
        self.clean, self.corrupted, self.answer, self.wrong = (
            torch.tensor(read[name]) for name in ("clean", "corrupted", "answer", "wrong")
        )

    def logit_diff(self, logits: Tensor) -> Tensor:
        """`[prompt]` from logits `[prompt d_vocab]` of the last position."""
        rows = torch.arange(len(logits))
        return logits[rows, self.answer] - logits[rows, self.wrong]


def hooked_transformer(folder: Path) -> Any:
    """TransformerLens 2's HookedTransformer with the weights as they are, split inputs and separate head outputs."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    module = GPT2LMHeadModel.from_pretrained(folder)
    of = module.config
    config = HookedTransformerConfig(
        n_layers=of.n_layer, d_model=of.n_embd, n_ctx=of.n_positions, d_head=of.n_embd // of.n_head, n_heads=of.n_head,
        d_mlp=4 * of.n_embd, d_vocab=of.vocab_size, act_fn="gelu_new", eps=of.layer_norm_epsilon,
        normalization_type="LN", use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True, device="cpu",
    )  # fmt: skip
    made = HookedTransformer(config)
    made.load_state_dict(convert_gpt2_weights(module, config), strict=False)
    return made.eval().requires_grad_(False)


def serve(folder: Path, calls: dict[str, Callable[[dict], tuple[float, dict[str, Tensor]]]]) -> None:
    """Answer calls from stdin until it ends. A call gives its seconds and its tensors."""
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        before = forget_peak()
        spent, tensors = calls[asked["call"]](asked)
        peak = resident("VmHWM") - before
        path = folder / f"answer-{asked['call']}-{number}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
        print(json.dumps({"seconds": spent, "peak_bytes": peak, "tensors": str(path)}), flush=True)
