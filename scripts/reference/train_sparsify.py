"""Train sparsify's TopK coder on a store that `mechinterp sae harvest` wrote.

    python train_sparsify.py STORE OUT [--d-sae N] [--k N] [--tokens N] [--batch N] [--lr X] [--seed N]

Run it in sparsify's own environment (scripts/bench/peers/setup_sae.sh sparsify). The coder, its losses (AuxK of 1/32
among them), its start and its norms are sparsify's own; its trainer takes activations from hooks on a model only, so
the loop is written here as it has it, with Adam. The tokens are those of the store, each once, in an order of the seed;
learning rate, warm-up, decay and the scale of the activations are those of ours, so that what differs is the package.
OUT is a sparsify folder for raw activations, which `mechinterp.sae.load` reads.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-4 / (4608 / 2**14) ** 0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    manifest = json.loads((args.store / "manifest.json").read_text())
    (name,) = manifest["widths"]
    rows = torch.cat([load_file(args.store / shard["file"])[name] for shard in manifest["shards"]])
    scale = rows.shape[1] ** 0.5 / float(rows[:65_536].norm(dim=1).mean())
    coder = SparseCoder(rows.shape[1], SparseCoderConfig(num_latents=args.d_sae, k=args.k), device="cpu")
    coder.b_dec.data = rows[:65_536].mean(0) * scale
    optimizer = torch.optim.Adam(coder.parameters(), lr=args.lr)
    steps = args.tokens // args.batch
    order = torch.randperm(len(rows))
    since_fired = torch.zeros(args.d_sae, dtype=torch.long)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / (0.02 * steps), (steps - step) / (0.2 * steps))
        x = rows[order[step * args.batch : (step + 1) * args.batch]] * scale
        if coder.cfg.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=since_fired > args.tokens // 20)
        optimizer.zero_grad()
        (out.fvu + out.auxk_loss / 32).backward()
        if coder.cfg.normalize_decoder:
            coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        since_fired += args.batch
        since_fired[out.latent_indices.flatten().unique()] = 0
        if step % 20 == 0:
            print(f"step {step} of {steps}: FVU {float(out.fvu):.4f}", flush=True)
    with torch.no_grad():  # for raw activations: features come in their units
        coder.encoder.bias /= scale
        coder.b_dec /= scale
    coder.save_to_disk(args.out)


if __name__ == "__main__":
    main()
