"""The loop of a training run, and what is due in it: the log, evaluations, checkpoints, and the end."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.manifest import now, peak_memory_bytes, start_manifest
from mechinterp.results import write_json
from mechinterp.sae import formats
from mechinterp.sae.activations.source import Source
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.training.checkpoints import Checkpoints, random_states
from mechinterp.sae.training.distributed import Processes
from mechinterp.sae.training.run_log import RunLog
from mechinterp.sae.training.trainer import Trainer

# What a resumed run may have otherwise than its checkpoint: none of it changes a weight.
FREE = ("out", "log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep", "tracker", "project", "run_name")


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended.

    Attributes:
        path: its folder.
        saes: what it trained, by the name of the site (of the last, for a crosscoder), for raw activations.
        held_out: FVU and L0 on held-out text, by the same names.
    """

    path: Path
    saes: Mapping[str, SparseAutoencoder]
    held_out: Mapping[str, Mapping[str, float]]

    @property
    def sae(self) -> SparseAutoencoder:
        """The one autoencoder. Raises UserError where several were trained."""
        if len(self.saes) != 1:
            raise UserError(f"this run trained {len(self.saes)}: take one of .saes: {', '.join(self.saes)}")
        return next(iter(self.saes.values()))


class Run:
    """The loop, and what is due in it."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        trainers: Mapping[str, Trainer],
        checkpoints: Checkpoints,
        processes: Processes,
        tokens: int = 0,
        seconds: float = 0.0,
    ):
        self.config, self.source, self.trainers = config, source, trainers
        self.settings = next(iter(trainers.values())).config
        self.checkpoints, self.processes, self.tokens = checkpoints, processes, tokens
        self.folder = config.folder
        self._before, self._opened = seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """Of training so far, without what was lost when a session was killed."""
        return round(self._before + time.monotonic() - self._opened, 3)

    @property
    def step(self) -> int:
        return self.tokens // self.config.batch

    def to_the_end(self, progress: bool) -> TrainedRun:
        """Train, export, and say that it is finished."""
        log = None
        try:
            with self.processes.together():
                manifest = self._begin()
                if self.processes.first:
                    log = RunLog(self.folder, self.config, self.tokens, progress)
            while self.step < self.config.n_steps:
                self._advance(log)
            self._require_finite()
            ended = self._end(manifest)
        finally:
            if log is not None:
                log.close()
        return ended

    def _begin(self) -> dict[str, Any]:
        if not self.processes.first:
            return {}
        try:
            note = self.folder / "manifest.json"
            before = json.loads(note.read_text()) if self.step and note.exists() else {}
            manifest, _ = start_manifest(self.folder, "sae", self.config, self.source.origin, before)
            write_json(self.folder / "config.json", self.settings.to_json())
            write_json(self.folder / "manifest.json", manifest)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot begin a run in {self.folder}: {error}") from error
        return manifest

    def _advance(self, log: RunLog | None) -> None:
        """One step of every trainer, and what is due after it."""
        try:
            batch = self.source.batch()
        except StopIteration:
            raise UserError(
                f"the activations ended after {self.tokens:,} of {self.config.n_tokens:,} tokens: ask for fewer"
            ) from None
        for job in self.source.jobs:
            x, y = job.of(batch)
            self.trainers[job.name].step(x, y if self.config.transcodes else None)
        self.tokens += self.config.batch
        if log is not None:
            log.advance(self.config.batch)
        self._report(log)
        if self._due(self.settings.checkpoint_every) and self.step < self.config.n_steps:
            self._require_finite()
            self._checkpoint()

    def _due(self, every: int | None) -> bool:
        """Whether a multiple of `every` tokens was passed by this step."""
        return bool(every) and self.tokens // every > (self.tokens - self.config.batch) // every

    def _report(self, log: RunLog | None) -> None:
        last = self.step == self.config.n_steps
        evaluates = bool(self.settings.eval_every and self.source.held_out)
        evaluates = evaluates and (last or self._due(self.settings.eval_every))
        if not (evaluates or last or self.step % self.config.log_every == 0):
            return
        self._require_finite()
        values: dict[str, Any] = self._named({name: trainer.averages() for name, trainer in self.trainers.items()})
        values |= self.source.counts()
        if evaluates:
            values |= {f"held_out_{name}": value for name, value in self._named(self._held_out()).items()}
        if log is not None:
            log.write(self.step, self.tokens, values)

    def _named(self, by_trainer: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Plain names for one trainer, and names behind the site's for several."""
        if len(by_trainer) == 1:
            return dict(next(iter(by_trainer.values())))
        return {f"{key}/{name}": value for name, values in by_trainer.items() for key, value in values.items()}

    def _held_out(self) -> dict[str, dict[str, float]]:
        found = {}
        for job in self.source.jobs:
            x, y = job.of(self.source.held_out)
            found[job.name] = self.trainers[job.name].held_out(x, y if self.config.transcodes else None)
        return found

    def _require_finite(self) -> None:
        for name, trainer in self.trainers.items():
            steps = self.processes.gather(trainer.broken[None])  # a loss may be finite in other processes
            if steps.any():
                step = int(steps[steps > 0].min())
                whole = self.checkpoints.paths()
                kept = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint"
                raise UserError(
                    f"the loss of {name} is not finite at step {step}; {kept}. A lower learning rate may help"
                )

    def _checkpoint(self) -> None:
        training: dict[str, Any] = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "config": self.config.to_json(),
            "origin": dict(self.source.origin),
        }
        own = self.source.state_dict() | random_states()
        for name, trainer in self.trainers.items():
            training |= {f"{name}/{key}": value for key, value in trainer.state_dict().items()}
            own |= {f"{name}/{key}": value for key, value in trainer.sums().items()}
        self.checkpoints.write(self.tokens, training, own)

    # The end

    def _end(self, manifest: dict[str, Any]) -> TrainedRun:
        held_out = self._held_out() if len(self.source.held_out) else {}
        density = self._densities()
        saes = {name: self._exported(name) for name in self.trainers}
        with self.processes.together():
            if self.processes.first:
                # The names of all, also of those that nothing was held out for.
                self._write(saes, density, manifest | {"held_out": {name: held_out.get(name, {}) for name in saes}})
        return TrainedRun(self.folder, saes, held_out)

    def _write(
        self, saes: Mapping[str, SparseAutoencoder], density: Mapping[str, Tensor], manifest: dict[str, Any]
    ) -> None:
        for name, sae in saes.items():
            found = density.get(name)
            sparsity = None if found is None else found.log10().clamp_min(-10)  # SAELens's log of 0
            formats.save(sae, self.folder / "sae" / (name if len(saes) > 1 else ""), sparsity)
        manifest |= {"finished": now(), "seconds": self.seconds, "peak_memory_bytes": peak_memory_bytes()}
        try:
            write_json(self.folder / "manifest.json", manifest)
        except OSError as error:
            raise UserError(f"cannot write {self.folder / 'manifest.json'}: {error.strerror}") from error

    def _exported(self, name: str) -> SparseAutoencoder:
        """The autoencoder for raw activations; this is the end of its training."""
        trainer = self.trainers[name]
        sae = trainer.sae.eval().requires_grad_(False)
        sae.unscaled(*trainer.scales)
        plain = {one: value for one, value in self.settings.to_json().items() if one not in FREE}
        sae.metadata = replace(sae.metadata, n_tokens=self.tokens, training=plain)
        return sae

    @torch.no_grad()
    def _densities(self) -> dict[str, Tensor]:
        """`[feature]` share of held-out tokens at which each feature fires."""
        found = {}
        for job in self.source.jobs if len(self.source.held_out) else ():
            trainer = self.trainers[job.name]
            x, _ = trainer.scaled(job.of(self.source.held_out)[0], None)
            counts = sum(torch.bincount(trainer.sae.encode(some).sparse()[1], minlength=self.config.d_sae)
                         for some in x.split(self.config.batch))  # fmt: skip
            found[job.name] = counts / len(x)  # type: ignore[operator]
        return found
