"""Head patching with plain transformers and torch forward hooks: what our own numbers are compared with.

    python scripts/reference/ioi_plain.py --model FOLDER --pairs experiments/reference/ioi_smollm2_pairs.json \
        --json experiments/reference/ioi_smollm2.json

It shares no code with the package, nor with TransformerLens; it is written to be checked by eye, not to be fast.

1. Pairs come as token ids (`ioi_pairs.py` writes them), one list a corruption. Prompts of one length are run together,
   without padding.
2. A head's output z is its slice of the input of `o_proj`. The clean run's slices are kept.
3. Denoising: in the run on the corrupted prompt, a head's slice is replaced by the clean one, at every position
   (`heads_all`) or at the last (`heads_end`). The heads of a layer share a batch, a copy of the prompts each.
4. The metric of a prompt is logit(answer) − logit(wrong) at the last position. Effects are ratios of means over
   prompts, (patched − corrupted) / (clean − corrupted): 0 is the corrupted run, 1 the clean one.

For models whose layers are `model.model.layers[i].self_attn.o_proj` (Llama and its kin).
"""

import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

Pair = dict[str, Any]  # clean, corrupted: token ids; answer, wrong: a token id


def by_length(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs of one length each."""
    groups = defaultdict(list)
    for pair in pairs:
        assert len(pair["clean"]) == len(pair["corrupted"]), "the sides of a pair have one length"
        groups[len(pair["clean"])].append(pair)
    return list(groups.values())


def logit_diff(model: torch.nn.Module, side: str, group: list[Pair], copies: int = 1) -> Tensor:
    """`[copy prompt]` of a run of one side, each prompt `copies` times, under the hooks that are in place."""
    tokens = torch.tensor([pair[side] for pair in group]).repeat(copies, 1)
    logits = model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
    answer, wrong = (torch.tensor([pair[name] for pair in group]).repeat(copies) for name in ("answer", "wrong"))
    rows = torch.arange(len(tokens))
    return (logits[rows, answer] - logits[rows, wrong]).reshape(copies, len(group))


def patched(model: torch.nn.Module, group: list[Pair], last_only: bool) -> dict[str, Tensor]:
    """`[prompt]` clean and corrupted, and `[layer head prompt]` with each head's output from the clean run."""
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    n_heads = model.config.num_attention_heads
    width = projections[0].in_features // n_heads
    where = slice(-1, None) if last_only else slice(None)
    clean_z: list[Tensor] = []
    handles = [o.register_forward_pre_hook(lambda module, args: clean_z.append(args[0].clone())) for o in projections]
    clean = logit_diff(model, "clean", group)[0]
    for handle in handles:
        handle.remove()
    heads = []
    for o, source in zip(projections, clean_z, strict=True):

        def put(module: torch.nn.Module, args: tuple[Tensor, ...], source: Tensor = source) -> tuple[Tensor, ...]:
            z = args[0].clone()
            for head in range(n_heads):  # copy number `head` of every prompt has that head patched
                rows, at = slice(head * len(group), (head + 1) * len(group)), slice(head * width, (head + 1) * width)
                z[rows, where, at] = source[:, where, at]
            return (z, *args[1:])

        handle = o.register_forward_pre_hook(put)
        heads.append(logit_diff(model, "corrupted", group, copies=n_heads))
        handle.remove()
    return {"clean": clean, "corrupted": logit_diff(model, "corrupted", group)[0], "heads": torch.stack(heads)}


def effects(model: torch.nn.Module, pairs: list[Pair], last_only: bool) -> dict[str, Any]:
    """Means of the two runs and `[layer][head]` effects, over all pairs."""
    runs = [patched(model, group, last_only) for group in by_length(pairs)]
    clean, corrupted, heads = (torch.cat([run[name].double() for run in runs], -1).mean(-1) for name in runs[0])
    shares = (heads - corrupted) / (clean - corrupted)
    return {"clean": float(clean), "corrupted": float(corrupted), "heads": shares.numpy().round(7).tolist()}


def main() -> int:
    """Read pairs, write effects."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a Hugging Face folder")
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="of ioi_pairs.py")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="what to write")
    args = parser.parse_args()
    given = json.loads(args.pairs.read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    found = {}
    with torch.no_grad():
        for corruption, pairs in given["pairs"].items():
            both = effects(model, pairs, last_only=False), effects(model, pairs, last_only=True)
            found[corruption] = {
                "n": len(pairs),
                "clean": both[0]["clean"],
                "corrupted": both[0]["corrupted"],
                "heads_all": both[0]["heads"],
                "heads_end": both[1]["heads"],
            }
            print(
                f"{corruption}: n={len(pairs)} clean {both[0]['clean']:.3f} corrupted {both[0]['corrupted']:.3f}",
                flush=True,
            )
    made = {
        "task": given["task"],
        "pairs_sha256": hashlib.sha256(args.pairs.read_bytes()).hexdigest(),
        "model_sha256": hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest(),
        "direction": "denoise",
        "dtype": "float32",
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "corruptions": found,
    }
    scratch = args.json.with_name(args.json.name + ".partial")
    scratch.write_text(json.dumps(made) + "\n")
    os.replace(scratch, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
