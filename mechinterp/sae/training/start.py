"""Autoencoders at the start of their training: shape, scale, first weights. The same in every process.

Each starts at the geometric median of a sample of the buffer, and at a scale that the sample gives: mean norm √d, or
mean squared norm 1, whichever the constants of the architecture belong to.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.sae import architectures
from mechinterp.sae.activations.source import Job, Source
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.config import TOP_K, TrainConfig
from mechinterp.sae.training.distributed import Processes
from mechinterp.sae.training.trainer import Trainer

SAMPLE = 65_536  # tokens that the scale and the start of b_dec are taken from


def trainers_of(config: TrainConfig, source: Source, processes: Processes) -> dict[str, Trainer]:
    """A trainer for every autoencoder, by the name of its job."""
    sample = source.sample(min(SAMPLE, config.buffer))
    return {job.name: _trainer(config, job, sample, processes) for job in source.jobs}


def _trainer(config: TrainConfig, job: Job, sample: Mapping[str, Tensor], processes: Processes) -> Trainer:
    read = [sample[name] for name in job.reads]
    written = [sample[name] for name in job.writes]
    scales = tuple(_scales(one, config.scale, processes) for one in (read, written))
    settings = config.resolved(sum(one.shape[1] for one in read))
    sae = _fresh(settings, job, read, written).to(processes.device(config.device))
    trainer = Trainer(sae, settings, (scales[0], scales[1]), processes)
    y = trainer.scaled(torch.cat(read, 1), torch.cat(written, 1))[1]
    sae.start_at(y)
    processes.broadcast(sae.b_dec.data)
    return trainer


def _scales(sites: list[Tensor], kind: str, processes: Processes) -> Tensor:
    """`[site]` factors that bring activations `[token d]` to mean norm √d, or to mean squared norm 1."""
    found = []
    for x in sites:
        square = x.float().square().sum(1)
        sums = torch.stack([square.sqrt().sum().double(), square.sum().double(), square.new_tensor(len(x)).double()])
        norm, mean_square, n = processes.sum(sums).tolist()
        if not 0 < norm < math.inf:
            raise UserError(f"the activations to train on have a mean norm of {norm / max(n, 1)}: no scale fits them")
        found.append(x.shape[1] ** 0.5 / (norm / n) if kind == "norm" else (mean_square / n) ** -0.5)
    return torch.tensor(found, device=sites[0].device)


def _fresh(config: TrainConfig, job: Job, read: list[Tensor], written: list[Tensor]) -> SparseAutoencoder:
    shape = SAEConfig(
        architecture=config.architecture,
        d_in=sum(one.shape[1] for one in read),
        d_out=sum(one.shape[1] for one in written),
        d_sae=config.d_sae,
        k=config.k if config.architecture in TOP_K else None,
        skip=config.kind == "skip-transcoder",
        centred=not config.transcodes,
        n_sites=len(read),
        prefixes=config.prefix_sizes() if config.architecture == "matryoshka" else (),
    )
    return architectures.make(shape, job.metadata, config.seed, config.threshold)
