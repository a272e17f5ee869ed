"""A sparse autoencoder that takes the superposition of a toy model apart: does it find the model's feature directions?

1. Train uniform toy models at several densities, and on the hidden activations of each an autoencoder with TopK.
2. Compare its decoder with the directions of the represented features: mean max cosine, recovered fraction.
3. Control: the same autoencoder on normal activations with the same mean and covariance, which hold no sparse features;
   and random directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.superposition_models import Training, train_family
from mechinterp.sae.activations.source import source_of
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.toys import toy_models as toy
from mechinterp.sae.toys.known_dictionary import Recovery, SampledChunks, recovery
from mechinterp.sae.training.train import train

WIDTH = 2  # features of an autoencoder for each feature of the toy model
BATCH, BUFFER = 1024, 16_384


@dataclass(frozen=True, eq=False)
class TakenApart:
    """Toy models and what autoencoders made of them.

    Attributes:
        density: `[density]`, 1 − S.
        W: `[density hidden feature]` of the toy models.
        decoder: `[density learned hidden]` of the autoencoders.
        normal: `[density learned hidden]` of those on normal activations.
        k: `[density]` features a token of both.
    """

    density: Tensor
    W: Tensor
    decoder: Tensor
    normal: Tensor
    k: Tensor

    def save(self, path: Path) -> None:
        """As safetensors."""
        save_file({one.name: getattr(self, one.name).contiguous() for one in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> "TakenApart":
        """What `save` wrote."""
        return cls(**load_file(path))

    def recoveries(self, seed: int) -> list[tuple[Recovery, Recovery]]:
        """Of each density: of the autoencoder, and of the control, beside the represented features' directions."""
        made = []
        for W, decoder, normal in zip(self.W, self.decoder, self.normal, strict=True):
            truth = W[:, toy.represented(W)].T
            made.append((recovery(truth, decoder, seed=seed), recovery(truth, normal, seed=seed)))
        return made


def take_apart(
    density: Sequence[float], n_features: int, d_hidden: int, n_tokens: int, restarts: int, how: Training
) -> TakenApart:
    """Train toy models and autoencoders."""
    models = train_family(d_hidden, density, torch.ones(len(density), n_features), restarts, how)
    W = models.best()
    k = [max(1, round(one * n_features)) for one in density]  # as many as are active on average
    learned: list[list[Tensor]] = [[], []]
    for one, p, count in zip(W, density, k, strict=True):
        for which, made in enumerate(learned):
            chunks = toy.hidden_chunks(one, p, seed=how.seed + 1)
            chunks = normal_chunks(chunks, how.seed + 1) if which else chunks
            made.append(autoencoder(chunks, WIDTH * n_features, count, n_tokens, how.seed))
    return TakenApart(torch.tensor(list(density)), W, torch.stack(learned[0]), torch.stack(learned[1]), torch.tensor(k))


def normal_chunks(chunks: SampledChunks, seed: int) -> SampledChunks:
    """Normal activations with the mean and the covariance of a chunk: the same geometry, no sparse features."""
    rows = torch.cat([chunks.chunk()["toy"] for _ in range(8)])
    mean, root = rows.mean(0), torch.linalg.cholesky(torch.cov(rows.T) + 1e-6 * torch.eye(rows.shape[1]))

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return mean + torch.randn(n, len(mean), generator=generator) @ root.T

    return SampledChunks(draw, 4096, seed, "normal")


def autoencoder(chunks: SampledChunks, d_sae: int, k: int, n_tokens: int, seed: int) -> Tensor:
    """`[learned hidden]` decoder of an autoencoder trained on the chunks."""
    with TemporaryDirectory() as folder:
        config = TrainConfig(
            model="toy", architecture="topk", d_sae=d_sae, k=k, n_tokens=n_tokens, batch=BATCH, buffer=BUFFER,
            eval_every=0, checkpoint_every=0, seed=seed, device="cpu", out=Path(folder) / "sae",
        )  # fmt: skip
        run = train(config, source=source_of(chunks, "toy", config, {}), progress=False)
        return run.sae.W_dec.detach().clone()
