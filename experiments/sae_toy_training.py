"""Autoencoders on a known dictionary, for the experiment `sae_toy`: recipes, training, what they are measured by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.superposition_sae import normal_chunks
from mechinterp.sae.activations.source import Source, source_of, synthetic_source
from mechinterp.sae.architectures import make
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.config import TOP_K, TrainConfig
from mechinterp.sae.toys.known_dictionary import KnownDictionary, cosine_matrix, greedy_matching
from mechinterp.sae.training.train import train
from mechinterp.statistics import Interval, bootstrap_ratio

# Settings of each architecture, chosen on a dictionary of another seed (100) than those that are reported. The three
# of the target come first.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "topk": {"learning_rate": 1e-2},
    "batchtopk": {"learning_rate": 1e-2},
    "jumprelu": {"learning_rate": 3e-3, "sparsity": 0.03, "bandwidth": 0.1, "threshold": 0.1},
    "matryoshka": {"learning_rate": 1e-2, "prefixes": (0.25, 0.5, 1.0)},
    "standard": {"learning_rate": 3e-3, "sparsity": 2.0},
    "gated": {"learning_rate": 3e-3, "sparsity": 0.5},
}
TARGETED = ("topk", "batchtopk", "jumprelu")
NORMAL = "topk on normal activations"
RECOVERED = 0.9  # cosine from which a feature counts as recovered
BUFFER = 16_384


@dataclass(frozen=True)
class Sizes:
    """What is trained, on how much. Checked by `KnownDictionary` and `TrainConfig`."""

    n_features: int = 128
    """True features."""
    d: int = 64
    """Dimensions."""
    density: float = 0.03
    """Chance of a feature to fire."""
    d_sae: int = 192
    """Learned features."""
    k: int = 4
    """Features a token of the TopK family."""
    n_tokens: int = 500_000
    """Activations that each autoencoder is trained on."""
    batch: int = 1024
    """Of a training step."""
    test_tokens: int = 32_768
    """Fresh activations that it is measured on."""
    n_seeds: int = 3
    """Dictionaries, each with a training of its own."""
    seed: int = 0
    """The first of them."""

    def dictionary(self, seed: int) -> KnownDictionary:
        """The truth of a seed."""
        return KnownDictionary(self.n_features, self.d, density=self.density, seed=seed)

    @property
    def seeds(self) -> range:
        """Of dictionaries and trainings."""
        return range(self.seed, self.seed + self.n_seeds)

    def settings(self, architecture: str, seed: int, out: Path | None = None) -> TrainConfig:
        """Of a training run."""
        k = self.k if architecture in TOP_K else TrainConfig.k
        return TrainConfig(
            model="toy", d_sae=self.d_sae, k=k, n_tokens=self.n_tokens, batch=self.batch,
            buffer=max(BUFFER, self.batch), eval_every=0, checkpoint_every=0, seed=seed, device="cpu", out=out,
            **{"architecture": architecture, **RECIPES[architecture]},
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Learned:
    """Autoencoders of one architecture.

    Attributes:
        decoder: `[seed learned d]`, after training.
        untrained: `[seed learned d]`, before it.
        fvu: `[seed]` fraction of variance that is not explained, on fresh activations.
        l0: `[seed]` features a token there.
    """

    decoder: Tensor
    untrained: Tensor
    fvu: Tensor
    l0: Tensor

    def save(self, path: Path) -> None:
        """As safetensors."""
        save_file({one.name: getattr(self, one.name).contiguous() for one in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> "Learned":
        """What `save` wrote."""
        return cls(**load_file(path))


def learn(name: str, sizes: Sizes) -> Learned:
    """Train one architecture (or the control `NORMAL`) on every dictionary, and measure it on fresh activations."""
    architecture = "topk" if name == NORMAL else name
    made: list[tuple[Tensor, Tensor, float, float]] = []
    for seed in sizes.seeds:
        truth = sizes.dictionary(seed)
        with TemporaryDirectory() as folder:
            config = sizes.settings(architecture, seed, Path(folder) / "sae")
            source = synthetic_source(truth, config)
            if name == NORMAL:
                source = normal_source(truth, config)
            sae = train(config, source=source, progress=False).sae
        test = truth.sample(sizes.test_tokens, torch.Generator().manual_seed(seed + 2**20)).activations
        made.append((sae.W_dec.detach().clone(), fresh(config, sizes.d), *error_and_l0(sae, test)))
    decoders, untrained, fvu, l0 = zip(*made, strict=True)
    return Learned(torch.stack(decoders), torch.stack(untrained), torch.tensor(fvu), torch.tensor(l0))


def normal_source(truth: KnownDictionary, config: TrainConfig) -> Source:
    """Normal activations with the mean and the covariance of the dictionary's: no sparse features are in them."""
    chunks = normal_chunks(truth.chunks(seed=config.seed + 1), config.seed + 2)
    return source_of(chunks, "toy", config, {"normal": True})


def fresh(config: TrainConfig, d: int) -> Tensor:
    """`[learned d]` decoder of the same autoencoder before its training."""
    shape = SAEConfig(
        config.architecture, d, config.d_sae,
        k=config.k if config.architecture in TOP_K else None,
        prefixes=config.prefix_sizes() if config.architecture == "matryoshka" else (),
    )  # fmt: skip
    return make(shape, seed=config.seed).W_dec.detach().clone()


@torch.no_grad()
def error_and_l0(sae: SparseAutoencoder, x: Tensor) -> tuple[float, float]:
    """FVU about the mean, and features a token."""
    output = sae(x)
    missed = (x - output.reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    return float(missed), float(output.codes.l0()) / len(x)


def best_codes(sizes: Sizes, k: int) -> float:
    """FVU of the true directions with the true codes, the k largest of a token; mean over dictionaries.

    What TopK misses through its k alone: at density p many tokens have more than k features.
    """
    found = []
    for seed in sizes.seeds:
        truth = sizes.dictionary(seed)
        x, codes = truth.sample(sizes.test_tokens, torch.Generator().manual_seed(seed + 2**20))
        least = codes.topk(min(k, codes.shape[1])).values[:, -1:]
        made = (codes * (codes >= least)) @ truth.directions()
        found.append(float((x - made).square().sum() / (x - x.mean(0)).square().sum()))
    return float(np.mean(found))


@dataclass(frozen=True, eq=False)
class Score:
    """How much of the dictionaries was found. Intervals are over the true features of all dictionaries together.

    Attributes:
        name: of the architecture, or the control.
        cosine: mean max cosine.
        by_seed: the same of each dictionary.
        recovered: share of true features with a cosine of at least `RECOVERED`.
        unique: the same where a learned feature may stand for one true feature only.
        reverse: mean max cosine of learned features with true ones: low where features are spare.
        random, untrained: mean max cosine of as many random directions, and of the untrained decoder.
        fvu, l0: on fresh activations, `[seed]`.
        best: `[seed feature]` the cosines themselves.
    """

    name: str
    cosine: Interval
    by_seed: tuple[float, ...]
    recovered: Interval
    unique: Interval
    reverse: float
    random: float
    untrained: float
    fvu: np.ndarray
    l0: np.ndarray
    best: np.ndarray


def score(name: str, learned: Learned, sizes: Sizes) -> Score:
    """Compare decoders with the dictionaries that they were trained on."""
    truths = [sizes.dictionary(seed).directions() for seed in sizes.seeds]
    generator = torch.Generator().manual_seed(sizes.seed + 2**21)
    cosines = [cosine_matrix(truth, one) for truth, one in zip(truths, learned.decoder, strict=True)]
    random = [torch.randn(learned.decoder[0].shape, generator=generator) for _ in truths]
    best = torch.stack([one.amax(1) for one in cosines])
    matched = torch.stack([greedy_matching(one) for one in cosines])
    return Score(
        name=name,
        cosine=over_features(best, sizes.seed),
        by_seed=tuple(best.mean(1).tolist()),
        recovered=over_features(best >= RECOVERED, sizes.seed),
        unique=over_features(matched >= RECOVERED, sizes.seed),
        reverse=float(torch.stack([one.amax(0).mean() for one in cosines]).mean()),
        random=mean_best(truths, random),
        untrained=mean_best(truths, list(learned.untrained)),
        fvu=learned.fvu.numpy(),
        l0=learned.l0.numpy(),
        best=best.numpy(),
    )


def over_features(values: Tensor, seed: int) -> Interval:
    """Mean of `[seed feature]` with a 95% interval over features."""
    return bootstrap_ratio(values.flatten().double().numpy(), seed=seed)


def mean_best(truths: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean max cosine over the features of all dictionaries."""
    return float(torch.stack([cosine_matrix(*pair).amax(1) for pair in zip(truths, others, strict=True)]).mean())
