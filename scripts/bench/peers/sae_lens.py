"""SAELens's TopK autoencoder (PyPI sae-lens 6.54.12), trained by its own `SAETrainer.step`. See sae_step.py.

    python sae_lens.py FOLDER [--sparse]

`--sparse` is its option `use_sparse_activations`, with which pre-activations cannot be multiplied by decoder norms on
the CPU; without, they are. All else is as it comes: Adam, gradient clipping, dead counts (it holds no norms and
projects no gradient).
"""

import os
import sys

os.environ["TQDM_DISABLE"] = "1"

# This file has the name of the package; its folder is not where that is to be looked for.
sys.path.append(sys.path.pop(0))

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from sae_step import TOTAL, Given, stepping


def main() -> None:
    """Serve."""
    given = Given()
    sparse = "--sparse" in sys.argv
    config = TopKTrainingSAEConfig(
        d_in=given.d_in, d_sae=given.d_sae, k=given.k, use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )  # fmt: skip
    sae = TopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(given.weights["W_enc"].T)
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(given.weights[name])
    batch = len(given.x)
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=TOTAL * batch, train_batch_size_samples=batch, lr_end=3e-5),
        sae,
        iter(lambda: given.x, None),
    )

    def steps(n: int) -> None:
        for _ in range(n):
            trainer.step(given.x)
            trainer.n_training_steps += 1

    stepping(steps, lambda: sae(given.x))


if __name__ == "__main__":
    main()
