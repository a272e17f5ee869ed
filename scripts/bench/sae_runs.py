"""Harvest and whole training runs of sae.py, on SmolLM2."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from measure import timed
from peer import measured
from sae_table import Outcome, paired
from torch import Tensor

from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import Site
from mechinterp.sae import architectures
from mechinterp.sae.activations.ahead import Ahead
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.activations.harvest import Harvest
from mechinterp.sae.activations.source import Source, harvest_of, open_source, token_blocks
from mechinterp.sae.activations.tokens import FixedBlocks
from mechinterp.sae.autoencoder import SAEConfig
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.training.distributed import Processes
from mechinterp.sae.training.train import train
from mechinterp.sae.training.trainer import Trainer

SAME = 1e-5
Clock = Callable[[], float]
NEVER = 10**9  # tokens: steps that revive features cost more, and apart they would have others to revive


@dataclass(frozen=True)
class Run:
    """Sizes of a harvest and of a training run."""

    layer: int = 9
    context: int = 128
    blocks: int = 16
    d_sae: int = 9216
    batch: int = 2048
    steps: int = 40
    buffer: int = 16_384
    rounds: int = 6


QUICK = Run(1, 32, 4, 1024, 128, 6, 512, 2)


def harvest(model: HookedModel, size: Run) -> Outcome:
    """Chunks of a harvest beside plain forwards that stop behind the same layer; the other's speed as a share."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.d_vocab, (size.blocks, size.context), generator=draw)
    blocks = FixedBlocks(tokens.repeat(size.rounds + 1, 1))
    rows = Harvest(model, [Site("resid_post", size.layer)], blocks, Exclusion(), size.blocks)

    def plain() -> Tensor:
        with torch.no_grad():
            return model.bridge(tokens, stop_at_layer=size.layer + 1)

    (_, other_peak, wanted), (_, peak, made) = measured(plain), measured(rows.chunk)
    times: dict[str, list[float]] = {"plain": [], "harvest": []}
    for _ in range(size.rounds):
        times["plain"].append(1e3 * timed(plain)[0])
        times["harvest"].append(1e3 * timed(rows.chunk)[0])
    found = next(iter(made.values()))
    kept = wanted[:, 1:].flatten(0, 1)  # position 0 is left out
    assert len(found) == len(kept), "other positions are kept"
    other, ours = median(times["plain"]), median(times["harvest"])
    return Outcome(
        "harvest", "a plain forward with stop_at_layer", torch.get_num_threads(), other, ours,
        paired(times["plain"], times["harvest"]), at_least=0.9, unit="ms", tolerance=SAME,
        max_rel_diff=float((found - kept).abs().max() / kept.abs().max()), other_peak_bytes=other_peak,
        ours_peak_bytes=peak,
        what=f"SmolLM2 layer {size.layer}, {size.blocks} blocks of {size.context}, "
        f"{1e3 * tokens.numel() / ours:,.0f} tokens/s",
    )  # fmt: skip


# ---- training ------------------------------------------------------------------------------------------------------


class Watched(Source):
    """A source that notes when its first batch is asked for, and what was harvested by then."""

    started: float | None = None
    before = 0.0
    clock: Clock = time.perf_counter

    def batch(self) -> dict[str, Tensor]:
        if self.started is None:
            self.started, self.before = self.clock(), self.chunks()
        return super().batch()

    def chunks(self) -> float:
        """Harvested so far; of the last one a part, where it was smaller."""
        return self.harvest.counts.tokens / (self.harvest.batch_blocks * self.harvest.blocks.context)  # type: ignore


def training(model: HookedModel, size: Run, folder: Path, ahead: bool = False) -> Outcome:
    """The loop of `train` beside its harvest and its steps measured apart: their sum, or the larger with `ahead`.

    The loop begins with the first batch, when the buffer is full, and ends with the export: log and buffer belong to
    it, evaluations and checkpoints are left out.

    Args:
        model: SmolLM2.
        size: of the run.
        folder: for what the run writes.
        ahead: harvest in a thread of its own, with one thread of torch for either; wall time.
    """
    threads = torch.get_num_threads()
    wall = ahead or threads > 1
    clock = time.perf_counter if wall else time.process_time
    config = TrainConfig(
        model="smollm2-135m", layer=(size.layer,), d_sae=size.d_sae, batch=size.batch, context=size.context,
        n_tokens=size.steps * size.batch, buffer=size.buffer, harvest_blocks=size.blocks, eval_every=0,
        checkpoint_every=0, device="cpu", dead_after=NEVER, out=folder / f"{size.layer}-{ahead}",
    )  # fmt: skip
    apart = Apart(config, model)
    first = apart.measure(clock)
    source = Watched(**vars(open_source(config, model, Processes())))
    source.clock = clock  # of the instance: nothing is bound to it
    if ahead:  # as far as a training run on two devices is
        n = max(1, size.buffer // 2 // (size.blocks * (size.context - 1)))
        source.buffer.chunks = Ahead(source.harvest, n)  # type: ignore[arg-type]
    train(config, model=model, source=source, progress=False)
    assert source.started is not None
    spent = 1e3 * (clock() - source.started)
    chunks = source.chunks() - source.before
    second = apart.measure(clock)
    harvested, stepped = ((a + b) / 2 for a, b in zip(first, second, strict=True))
    parts = chunks * harvested, size.steps * stepped
    least = max(parts) if ahead else sum(parts)
    return Outcome(
        ("overlap" if ahead else "training") + ("" if size.layer == Run.layer else f" layer {size.layer}"),
        "the longer of harvest and steps" if ahead else "harvest + steps, apart", threads, least, spent, spent / least,
        at_most=1.15 if ahead else 1.1, unit="ms",
        what=f"{size.steps} steps of {stepped:.0f} ms, {chunks:.1f} chunks of {harvested:.0f} ms",
    )  # fmt: skip


class Apart:
    """Harvest and steps of a training run, each alone."""

    def __init__(self, config: TrainConfig, model: HookedModel):
        self.harvest, d = harvest_of(config, model, token_blocks(config, model)), model.d_model
        rows: list[Tensor] = []
        while sum(map(len, rows)) < config.batch:
            rows.append(next(iter(self.harvest.chunk().values())))
        self.x = torch.cat(rows)[: config.batch]
        scale = d**0.5 / self.x.norm(dim=1).mean()[None]
        sae = architectures.make(SAEConfig("topk", d, config.d_sae, config.k))
        self.trainer = Trainer(sae, config.resolved(d), (scale, scale))
        self.trainer.step(self.x)

    def measure(self, clock: Clock, n: int = 5) -> tuple[float, float]:
        """Milliseconds of a chunk and of a step, medians."""
        chunks, steps = [], []
        for _ in range(n):
            start = clock()
            self.harvest.chunk()
            chunks.append(clock() - start)
            start = clock()
            self.trainer.step(self.x)
            steps.append(clock() - start)
        return 1e3 * median(chunks), 1e3 * median(steps)
