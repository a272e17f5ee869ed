"""Training sparse autoencoders: from settings to a folder that holds one.

1. A source (activations/source.py) gives batches of activations of every site that is read: the model runs over packed
   text, up to the last of the sites, through a shuffle buffer; or a store on disk stands for it.
2. Every autoencoder has a trainer (trainer.py), and all of them train on the same tokens in one pass.
3. It starts at a scale and a centre that a sample of the buffer gives (start.py).
4. The loop is in run.py. The log, evaluations on held-out text, and checkpoints are due after so many steps or tokens.
   A checkpoint holds all that comes after it depends on (checkpoints.py), so that a resumed run ends with the same
   weights, bit for bit.
5. At the end scales are folded into the weights, and `RUN/sae/` is written in SAELens's format.

The folder: `config.json`, `manifest.json`, `log.jsonl`, `checkpoints/`, and at the end `sae/`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechinterp.data_sets import DataSet
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.sae import formats
from mechinterp.sae.activations.chunks import under
from mechinterp.sae.activations.memory import keep_freed_memory
from mechinterp.sae.activations.source import Source, open_source
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.training.checkpoints import Checkpoints, set_random_states
from mechinterp.sae.training.distributed import Processes
from mechinterp.sae.training.run import FREE, Run, TrainedRun
from mechinterp.sae.training.start import trainers_of

Found = tuple[Path, dict[str, Any], dict[str, Any]]  # a checkpoint, and its two states


def train(
    config: TrainConfig,
    *,
    model: HookedModel | None = None,
    source: Source | None = None,
    data: DataSet | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train what the settings say; the folder of the run is `config.folder`.

    Args:
        config: settings.
        model: instead of loading `config.model`.
        source: instead of activations of a model, such as `synthetic_source(…)` or `source_of(…)`.
        data: a data set of the `datasets` package, in the place of the text of the settings.
        resume: continue from the newest checkpoint of the folder, if there is one; a run that has ended is loaded.
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
        source = source or open_source(config, model, processes, data)
        _require_share(source, config, processes)
        ended = _ended(config, source) if resume else None
        if ended is None:
            _ = source.held_out  # now, so that text that will not do is refused before anything is written
    if ended is not None:
        return ended
    keep_freed_memory(processes.device(config.device))
    if progress and found is None and processes.first:  # the one part of a run that shows nothing else
        print(f"filling the shuffle buffer: {config.buffer:,} tokens", flush=True)
    try:
        return _resumed(config, source, checkpoints, processes, found).to_the_end(progress)
    finally:
        source.close()


def _ended(config: TrainConfig, source: Source) -> TrainedRun | None:
    """The run of these settings on this source, if it came to its end."""
    note = config.folder / "manifest.json"
    manifest = _read(note) if note.exists() else {}
    if not manifest.get("finished") or "held_out" not in manifest:
        return None
    asked = {name: value for name, value in config.to_json().items() if value is not None}
    _require_settings(f"{config.folder} holds a run", _read(config.folder / "config.json"), asked)
    _require_origin(f"{config.folder} holds a run", manifest["inputs"], source)
    folder, names = config.folder / "sae", list(manifest["held_out"])
    saes = {name: formats.load(folder / (name if len(names) > 1 else "")) for name in names}
    return TrainedRun(config.folder, saes, manifest["held_out"])


def _resumed(
    config: TrainConfig, source: Source, checkpoints: Checkpoints, processes: Processes, found: Found | None
) -> Run:
    """The run at its start, or where the checkpoint was written."""
    if found is None:
        return Run(config, source, trainers_of(config, source, processes), checkpoints, processes)
    path, training, reading = found
    _require_same(path, training, config, source)
    source.load_state_dict(reading)
    set_random_states(reading)
    trainers = trainers_of(config, source, processes)
    for name, trainer in trainers.items():
        trainer.load_state_dict(under(f"{name}/", training) | under(f"{name}/", reading))
    return Run(config, source, trainers, checkpoints, processes, training["tokens"], training["seconds"])


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
    _require_origin(f"{path} is a checkpoint", state["origin"], source)


def _require_origin(what: str, before: Mapping[str, Any], source: Source) -> None:
    other = [name for name in source.origin if before.get(name) != source.origin[name]]
    if other:
        raise UserError(f"{what} of another {', '.join(other)}")


def _require_settings(what: str, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differ = [name for name in asked if name not in FREE and before.get(name) != asked[name]]
    if differ:
        shown = ", ".join(f"{name} {before.get(name)!r}, not {asked[name]!r}" for name in differ)
        raise UserError(f"{what} of other settings: {shown}")
