"""dictionary_learning's TopK autoencoder (PyPI dictionary-learning 0.1.0), trained by `TopKTrainer.update`.

    python dictionary_learning.py FOLDER        see sae_step.py

All is as it comes: AuxK over all features (without dead ones it costs nothing), projection, clipping, Adam, unit norms.
"""

import sys

# This file has the name of the package; its folder is not where that is to be looked for.
sys.path.append(sys.path.pop(0))

from itertools import count

import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from sae_step import TOTAL, Given, stepping


def main() -> None:
    """Serve."""
    given = Given()
    trainer = TopKTrainer(TOTAL, given.d_in, given.d_sae, given.k, layer=0, lm_name="none", device="cpu")
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(given.weights["W_enc"])
        trainer.ae.encoder.bias.copy_(given.weights["b_enc"])
        trainer.ae.decoder.weight.copy_(given.weights["W_dec"].T)
        trainer.ae.b_dec.copy_(given.weights["b_dec"])
    numbers = count(1)  # step 0 would also find a median for b_dec

    def steps(n: int) -> None:
        for _ in range(n):
            trainer.update(next(numbers), given.x)

    stepping(steps, lambda: trainer.ae(given.x))


if __name__ == "__main__":
    main()
