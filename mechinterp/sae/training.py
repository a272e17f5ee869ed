"""Training sparse autoencoders: from settings to a folder that holds one.

1. A source gives batches of activations of every site that is read (activations.py): the model runs over packed text,
   up to the last of the sites, through a shuffle buffer; or a store on disk stands for it.
2. Every autoencoder has a trainer (trainer.py), and all of them train on the same tokens in one pass.
3. Each starts at the geometric median of a sample of the buffer, and at a scale that the sample gives: mean norm √d, or
   mean squared norm 1, whichever the constants of the architecture belong to.
4. The log, evaluations on held-out text, and checkpoints are due after so many steps or tokens. A checkpoint holds all
   that comes after it depends on (checkpoints.py), so that a resumed run ends with the same weights, bit for bit.
5. At the end scales are folded into the weights, and `RUN/sae/` is written in SAELens's format.

The folder: `config.json`, `manifest.json`, `log.jsonl`, `checkpoints/`, and at the end `sae/`.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.manifest import now, peak_memory_bytes, start_manifest
from mechinterp.results import write_json
from mechinterp.sae import architectures, formats
from mechinterp.sae.activations import Job, Source, open_source
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.checkpoints import Checkpoints, random_states, set_random_states
from mechinterp.sae.config import TOP_K, TrainConfig
from mechinterp.sae.distributed import Processes
from mechinterp.sae.run_log import RunLog
from mechinterp.sae.trainer import Trainer

SAMPLE = 65_536  # tokens that the scale and the start of b_dec are taken from
Found = tuple[Path, dict[str, Any], dict[str, Any]]  # a checkpoint, and its two states
# What a resumed run may have otherwise than its checkpoint: none of it changes a weight.
FREE = ("out", "log_every", "checkpoint_every", "keep", "tracker", "project", "run_name")


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


def train(
    config: TrainConfig,
    *,
    model: HookedModel | None = None,
    source: Source | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train what the settings say; the folder of the run is `config.folder`.

    Args:
        config: settings.
        model: instead of loading `config.model`.
        source: instead of activations of a model, such as `synthetic.source`.
        resume: continue from the newest checkpoint of the folder, if there is one.
        progress: show a progress bar.

    Raises:
        UserError: settings that do not fit the model or the text, a folder that holds another run, a checkpoint of
            other settings, a loss that is not finite, a disk that is full.
    """
    processes = Processes.started()
    if config.autocast and processes.device(config.device).type != "cuda":
        raise UserError("autocast is for CUDA: elsewhere bfloat16 is slower than float32")
    checkpoints = Checkpoints(config.folder / "checkpoints", config.keep, processes)
    found = _found(config, checkpoints, resume)
    with processes.together():
        _make_folder(config.folder)
    with processes.together():
        source = source or open_source(config, model, processes)
        _require_share(source, config, processes)
    try:
        return _resumed(config, source, checkpoints, processes, found).to_the_end(progress)
    finally:
        source.close()


def _resumed(
    config: TrainConfig, source: Source, checkpoints: Checkpoints, processes: Processes, found: Found | None
) -> "_Run":
    """The run at its start, or where the checkpoint was written."""
    if found is None:
        return _Run(config, source, _trainers(config, source, processes), checkpoints, processes)
    path, training, reading = found
    _require_same(path, training, config, source)
    source.load_state_dict(reading)
    set_random_states(reading)
    trainers = _trainers(config, source, processes)
    for name, trainer in trainers.items():
        trainer.load_state_dict(_under(f"{name}/", training))
    return _Run(config, source, trainers, checkpoints, processes, training["tokens"], training["seconds"])


def _found(config: TrainConfig, checkpoints: Checkpoints, resume: bool) -> Found | None:
    """The checkpoint to go on from."""
    settings = config.folder / "config.json"
    found = checkpoints.newest() if resume else None
    if found is None and settings.exists():
        if not resume:
            raise UserError(
                f"{config.folder} holds a run already: --resume (resume=True) continues it, or take another folder"
            )
        # It will begin anew, and so must not write over another run.
        asked = {name: value for name, value in config.to_json().items() if value is not None}
        _require_settings(f"{config.folder} holds a run without a checkpoint", _read(settings), asked)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _require_share(source: Source, config: TrainConfig, processes: Processes) -> None:
    given, share = source.buffer.batch_size, processes.share(config.batch)
    if given != share:
        raise UserError(f"the source gives batches of {given} tokens; the settings ask for {share} in each process")


def _make_folder(folder: Path) -> None:
    """Before hours of work rather than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write a run into {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write a run into {folder}: Permission denied")


def _require_same(path: Path, state: Mapping[str, Any], config: TrainConfig, source: Source) -> None:
    """Raise UserError naming what the checkpoint was made with and these settings are not."""
    _require_settings(f"{path} is a checkpoint", state["config"], config.to_json())
    if state["origin"] != source.origin:
        other = [name for name in source.origin if state["origin"].get(name) != source.origin[name]]
        raise UserError(f"{path} is a checkpoint of another {', '.join(other)}")


def _require_settings(what: str, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differ = [name for name in asked if name not in FREE and before.get(name) != asked[name]]
    if differ:
        shown = ", ".join(f"{name} {before.get(name)!r}, not {asked[name]!r}" for name in differ)
        raise UserError(f"{what} of other settings: {shown}")


def _under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# ---- what is trained -----------------------------------------------------------------------------------------------


def _trainers(config: TrainConfig, source: Source, processes: Processes) -> dict[str, Trainer]:
    """A trainer for every autoencoder, at its start: the same in every process."""
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


# ---- the run -------------------------------------------------------------------------------------------------------


class _Run:
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
            before = json.loads((self.folder / "manifest.json").read_text()) if self.step else {}
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
        values: dict[str, Any] = {}
        if self.step % self.config.log_every == 0 or last:
            self._require_finite()
            values |= self._named({name: trainer.averages() for name, trainer in self.trainers.items()})
            values |= self.source.counts()
        if len(self.source.held_out) and (self._due(self.settings.eval_every) or (last and self.settings.eval_every)):
            values |= {f"held_out_{name}": value for name, value in self._named(self._held_out()).items()}
        if values and log is not None:
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
        for name, trainer in self.trainers.items():
            training |= {f"{name}/{key}": value for key, value in trainer.state_dict().items()}
        self.checkpoints.write(self.tokens, training, self.source.state_dict() | random_states())

    # The end

    def _end(self, manifest: dict[str, Any]) -> TrainedRun:
        held_out = self._held_out() if len(self.source.held_out) else {}
        density = self._densities()
        saes = {name: self._exported(name) for name in self.trainers}
        with self.processes.together():
            if self.processes.first:
                self._write(saes, density, manifest)
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
        note = {one: value for one, value in asdict(self.settings).items() if one not in FREE}
        plain = {one: value for one, value in self.settings.to_json().items() if one in note}
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
