"""Checkpoints of a training run: everything that it needs to go on as if it had never stopped.

`checkpoints/tokens-000000512000/` holds parts, each a `.safetensors` file with the tensors and a `.json` file with the
plain values and the checksum of the tensors: `training` (weights, optimizer, counters), and `source-0` … of each
process (buffer, data cursor, random states). They are written to a folder aside, which is renamed when all are there:
a checkpoint that has its name is whole. Older ones are removed after that.
"""

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechinterp.errors import UserError, one_line
from mechinterp.results import plain, write_json
from mechinterp.sae.training.distributed import Processes

State = dict[str, Any]  # flat: tensors and plain values


class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: holds one folder a checkpoint.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes | None = None):
        self.folder, self.keep, self.processes = folder, keep, processes or Processes()

    def write(self, tokens: int, training: Mapping[str, Any], source: Mapping[str, Any]) -> Path:
        """Write one, then remove those that are too old. Every process calls this.

        Args:
            tokens: trained on so far; the checkpoint's name.
            training: state that is the same in all processes; the first one writes it.
            source: this process's own.

        Raises:
            UserError: it could not be written; earlier ones stay as they are.
        """
        path = self.folder / f"tokens-{tokens:012d}"
        partial = self.folder / f".partial-{path.name}"
        try:
            with self.processes.together(), self._writing(path):
                if self.processes.first:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    write_part(partial, "training", training)
            with self.processes.together(), self._writing(path):
                write_part(partial, f"source-{self.processes.rank}", source)
            with self.processes.together(), self._writing(path):
                if self.processes.first:
                    shutil.rmtree(path, ignore_errors=True)
                    os.replace(partial, path)
                    self._remove_old()
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return path

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the checkpoint {path}: {_reason(error)}; {self._last_good()}") from error

    def _remove_old(self) -> None:
        for old in self.paths()[: -self.keep]:
            # Renamed first: what has the name of a checkpoint is whole at every moment.
            aside = self.folder / f".partial-{old.name}"
            os.replace(old, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def paths(self) -> list[Path]:
        """Those that are whole, oldest first."""
        return sorted(path for path in self.folder.glob("tokens-*") if path.is_dir())

    def newest(self) -> tuple[Path, State, State] | None:
        """The newest that can be read, with its two states; None where there is none.

        Damaged ones are passed over, and lose the name of a checkpoint: they would push good ones out.

        Raises:
            UserError: all are damaged, or the checkpoint is of another number of processes.
        """
        if self.processes.first:
            for partial in self.folder.glob(".partial-*"):
                shutil.rmtree(partial, ignore_errors=True)
        damaged: list[tuple[Path, UserError]] = []
        for path in reversed(self.paths()):
            n_processes = len(list(path.glob("source-*.json")))
            if n_processes and n_processes != self.processes.size:
                raise UserError(f"{path} is of {n_processes} processes; this run has {self.processes.size}")
            try:
                with self.processes.together():  # all go on from the same one
                    states = read_part(path, "training"), read_part(path, f"source-{self.processes.rank}")
            except UserError as error:
                damaged.append((path, error))
                continue
            if self.processes.first:
                for old, error in damaged:
                    os.replace(old, old.with_name(f"damaged-{old.name}"))
                    print(f"passed over: {error}", flush=True)
            return path, *states
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} can be read; the newest: {damaged[0][1]}")
        return None

    def _last_good(self) -> str:
        whole = self.paths()
        return f"the last good one is {whole[-1]}: make room and resume" if whole else "there is no earlier one"


def write_part(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write a flat state: its tensors, then its plain values with the checksum of the tensors."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    file = folder / f"{name}.safetensors"
    save_file(tensors, file)
    values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    write_json(folder / f"{name}.json", {"sha256": _digest(file), "values": values})


def read_part(folder: Path, name: str) -> State:
    """Read what `write_part` wrote. Raises UserError naming the file that is missing or damaged."""
    file, note = folder / f"{name}.safetensors", folder / f"{name}.json"
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        digest = _digest(file)
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {folder}: {_reason(error)}") from error
    if not isinstance(found, dict) or found.get("sha256") != digest:
        raise UserError(f"{file} is damaged: its bytes are not those that {note.name} was written for")
    return found["values"] | tensors


def random_states() -> State:
    """Of every generator that code outside of ours may draw from."""
    made: State = {"random.python": json.dumps(random.getstate()), "random.torch": torch.get_rng_state()}
    made |= {"random.numpy": json.dumps(plain(np.random.get_state(legacy=False)))}  # noqa: NPY002 (of other people's code)
    if torch.cuda.is_available():
        made |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return made


def set_random_states(state: Mapping[str, Any]) -> None:
    """Put back what `random_states` took."""
    version, numbers, gauss = json.loads(state["random.python"])
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["random.torch"])
    numpy = json.loads(state["random.numpy"])
    numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy)  # noqa: NPY002
    for i in range(torch.cuda.device_count()):
        if f"random.cuda.{i}" in state:
            torch.cuda.set_rng_state(state[f"random.cuda.{i}"], i)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return os.strerror(errno.ENOSPC) if error.errno == errno.ENOSPC else str(error)
    return one_line(error)
