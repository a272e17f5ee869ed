"""A run is a folder: `runs/<experiment>/<id>/`.

1. The id is a hash of the config, the inputs (model and data hashes) and the package's version: the same question
   always has the same folder.
2. Each part of the work is saved under `results/` as soon as it is done, so an interrupted run continues from there.
3. `manifest.json` says what made the numbers: versions, seeds, hashes, command, commit, time, memory.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import plotly.graph_objects as go
from safetensors import SafetensorError

from mechinterp.errors import UserError
from mechinterp.files import write_text
from mechinterp.manifest import now, peak_memory_bytes, plain_config, run_id, start_manifest
from mechinterp.reporting.report import Report

R = TypeVar("R")

#: What a loader raises when the file that it reads is damaged.
DAMAGED = (ValueError, OSError, KeyError, EOFError, SafetensorError)
_held: set[Path] = set()


class Run:
    """One run of one experiment. Make it with `Run.open`; use it in a `with` block, or end it with `finish`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._opened = time.monotonic()
        self._seconds_before = float(manifest["seconds"])

    @classmethod
    def open(
        cls, experiment: str, config: Any, root: Path | str = Path("runs"), inputs: Mapping[str, str] | None = None
    ) -> Run:
        """Open the folder of this config, and make it on the first call.

        Args:
            experiment: name of the experiment, one folder below `root`.
            config: a dataclass instance. A field with `metadata={"in_id": False}` (an output path, a verbosity) is
                written down but does not change the id.
            root: the folder of all runs.
            inputs: what the numbers depend on besides the config, `{"model": sha256, "pairs": sha256}`.

        Raises:
            UserError: another live process has this run open, or the config cannot be written as JSON.
        """
        _check_name(experiment, "experiment")
        inputs = dict(inputs or {})
        path = Path(root).absolute() / experiment / run_id(experiment, config, inputs)
        for folder in ("results", "figures"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        _lock(path / "lock")
        _write_json(path / "config.json", plain_config(config))
        manifest, diff = start_manifest(path, experiment, config, inputs, before=_read_json(path / "manifest.json"))
        if diff:
            write_text(path / "uncommitted.diff", diff)
        else:
            (path / "uncommitted.diff").unlink(missing_ok=True)
        run = cls(path, manifest)
        run._write_manifest()
        return run

    def part(self, name: str, make: Callable[[], R], load: Callable[[Path], R], save: Callable[[R, Path], None]) -> R:
        """The part's result: loaded from `results/<name>` if an earlier run finished it, made and saved otherwise.

        `save` gets a temporary path, which becomes `results/<name>` in one step, so a part that exists is whole.
        A part that does not load, or whose bytes changed since it was written, is named in the log and made again.
        """
        _check_name(name, "part")
        path = self.path / "results" / name
        if path.exists():
            try:
                self._check_bytes(name, path)
                result = load(path)
                self.log(f"{name}: done before, loaded{self._made_elsewhere(name)}")
                return result
            except DAMAGED as error:
                self.log(f"{name}: damaged ({_first_line(error)}), made again")
        began = time.monotonic()
        result = make()
        partial = path.with_name(f".partial-{name}")
        _remove(partial)
        save(result, partial)
        digest = _sha256(partial)
        _remove(path)
        os.replace(partial, path)
        seconds = time.monotonic() - began
        self.manifest["parts"][name] = {"seconds": round(seconds, 3), "finished": now(), "sha256": digest}
        self.manifest["parts"][name]["commit"] = self._commit()
        self._write_manifest()
        self.log(f"{name}: {seconds:.1f} s")
        return result

    def log(self, message: str) -> None:
        """Print the message, and append it with the time to `log.txt`."""
        print(message, flush=True)
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{now()}  {message}\n")

    def figure(self, name: str, figure: go.Figure) -> Path:
        """Save a figure as `figures/<name>.json` (plotly's JSON)."""
        _check_name(name, "figure")
        path = self.path / "figures" / f"{name}.json"
        write_text(path, figure.to_json() or "")
        return path

    def finish(self, report: Report | None = None) -> Path:
        """Close the run: complete the manifest, write the report (with that manifest), let go of the lock.

        Returns the path of `report.html`, or of the folder when there is no report.
        """
        self.manifest["finished"] = now()
        self._write_manifest()
        path = self.path
        if report is not None:
            path = dataclasses.replace(report, manifest=self.manifest).write(self.path / "report.html")
        self.close()
        return path

    def close(self) -> None:
        """Let go of the lock. The run can be opened again, and continues."""
        _unlock(self.path / "lock")

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.log(f"stopped: {kind.__name__ if kind else ''}: {_first_line(error)}")
            self._write_manifest()
        self.close()

    def _commit(self) -> str | None:
        return (self.manifest["git"] or {}).get("commit")

    def _made_elsewhere(self, name: str) -> str:
        """A warning where the code has changed since: the id knows the package's version, not its commit."""
        commit = self.manifest["parts"].get(name, {}).get("commit")
        return "" if commit in (None, self._commit()) else f" (made at commit {commit[:10]}, not the present one)"

    def _check_bytes(self, name: str, path: Path) -> None:
        expected = self.manifest["parts"].get(name, {}).get("sha256")
        if expected is not None and _sha256(path) != expected:
            raise ValueError("its bytes differ from those that were written")

    def _write_manifest(self) -> None:
        self.manifest["seconds"] = round(self._seconds_before + time.monotonic() - self._opened, 3)
        self.manifest["peak_memory_bytes"] = max(peak_memory_bytes(), self.manifest["peak_memory_bytes"])
        _write_json(self.path / "manifest.json", self.manifest)


# ---- files ---------------------------------------------------------------------------------------------------------


def _lock(path: Path) -> None:
    """Hold `path` for this process. A lock whose process is gone is stale, and is taken over."""
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            pid = _lock_owner(path)
            # In a container a process often has the pid of the one that was killed before it: our own pid is stale
            # too, unless this very process holds the lock.
            if path in _held or (pid is not None and pid != os.getpid() and _is_alive(pid)):
                raise UserError(
                    f"the run {path.parent} is open already (pid {pid}); wait for it, or delete {path} "
                    "if that process is not a run"
                ) from None
            path.unlink(missing_ok=True)
    with os.fdopen(descriptor, "w") as file:
        file.write(str(os.getpid()))
    if not _held:
        atexit.register(_unlock_all)
    _held.add(path)


def _lock_owner(path: Path) -> int | None:
    for _ in range(20):  # the other process may be between creating the file and writing its pid
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        if text:
            return int(text) if text.isdecimal() else None
        time.sleep(0.01)
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it lives, as another user
    return True


def _unlock(path: Path) -> None:
    if path in _held:
        _held.discard(path)
        path.unlink(missing_ok=True)


def _unlock_all() -> None:
    for path in list(_held):
        _unlock(path)


def _sha256(path: Path) -> str:
    """Of a file, or of a folder's names and files."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file != path:
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is none or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_name(name: str, kind: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{name!r} is not a name for a {kind}: use letters, digits, '.', '_' and '-'")
