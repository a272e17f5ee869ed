"""Train SAELens's TopK autoencoder on a store that `mechinterp sae harvest` wrote, by its own trainer.

    python train_sae_lens.py STORE OUT [--d-sae N] [--k N] [--tokens N] [--batch N] [--lr X] [--seed N]

Run it in SAELens's own environment (scripts/bench/peers/setup_sae.sh sae-lens). The tokens are those of the store, each
once, in an order of the seed; warm-up, decay and learning rate are those of ours, all else is as SAELens has it, the
activations scaled as it recommends (`expected_average_only_in`). OUT is a SAELens folder, which `mechinterp.sae.load`
reads.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file


def batches(store: Path, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows of all shards in one random order, again and again."""
    manifest = json.loads((store / "manifest.json").read_text())
    (name,) = manifest["widths"]
    rows = torch.cat([load_file(store / shard["file"])[name] for shard in manifest["shards"]])
    draw = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(rows), generator=draw).split(size):
            if len(index) == size:
                yield rows[index]


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
    ((hook_name, d_in),) = manifest["widths"].items()
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_in, d_sae=args.d_sae, k=args.k, normalize_activations="expected_average_only_in"
        )
    )  # fmt: skip
    sae.cfg.metadata.model_name = manifest["origin"]["model"]
    sae.cfg.metadata.hook_name = hook_name
    steps = args.tokens // args.batch
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * args.batch, train_batch_size_samples=args.batch, lr=args.lr, lr_end=args.lr,
            lr_warm_up_steps=round(0.02 * steps), lr_decay_steps=round(0.2 * steps), n_batches_for_norm_estimate=32,
        ),
        sae,
        batches(args.store, args.batch, args.seed),
    )  # fmt: skip
    trainer.fit().save_inference_model(str(args.out))


if __name__ == "__main__":
    main()
