"""What made the numbers of a run: its config as JSON, its id, and the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from mechinterp.errors import UserError

PACKAGES = ("torch", "transformers", "transformer-lens", "mechinterp")


def run_id(experiment: str, config: Any, inputs: Mapping[str, str]) -> str:
    """The first 12 hex digits of the sha256 of experiment, config, inputs and package version, as canonical JSON."""
    key = {
        "experiment": experiment,
        "config": plain_config(config, id_only=True),
        "inputs": dict(inputs),
        "version": _version("mechinterp"),
    }
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def start_manifest(
    path: Path, experiment: str, config: Any, inputs: Mapping[str, Any], before: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The manifest at the start of a session, and the uncommitted diff.

    Args:
        path: the run's folder.
        before: the manifest of the earlier sessions, whose parts, start and seconds are kept; empty at first.
    """
    torch = sys.modules.get("torch")  # a run without torch need not import it
    plain = plain_config(config)
    git, diff = _git_state(path)
    manifest = {
        "experiment": experiment,
        "id": path.name,
        "started": before.get("started", now()),
        "finished": None,
        "seconds": before.get("seconds", 0.0),
        "sessions": before.get("sessions", 0) + 1,
        "peak_memory_bytes": before.get("peak_memory_bytes", 0),
        "argv": list(sys.argv),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "seeds": {key: value for key, value in plain.items() if "seed" in key.lower()},
        "inputs": dict(inputs),
        "git": git,
        "platform": platform.platform(),
        "threads": torch.get_num_threads() if torch else os.cpu_count(),
        "parts": before.get("parts", {}),
    }
    return manifest, diff


def _git_state(run_path: Path) -> tuple[dict[str, Any] | None, str]:
    """Commit, and what differs from it, of the checkout that holds this package, or else of the working folder."""
    package = Path(__file__).parent
    folder = package if _git(package, "ls-files", Path(__file__).name) else Path.cwd()
    commit = _git(folder, "rev-parse", "HEAD").strip()
    if not commit:
        return None, ""
    top = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    diff = _git(top, "diff", "HEAD")
    untracked = _git(top, "ls-files", "--others", "--exclude-standard").splitlines()
    runs = run_path.parent.parent
    untracked = [name for name in untracked if runs not in (top / name).parents]
    return {"commit": commit, "dirty": bool(diff or untracked), "untracked": untracked[:50]}, diff


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no git, or a checkout too slow to ask: the manifest says null
    return done.stdout if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far; 0 where the system does not tell."""
    try:  # Linux: the child of a large process inherits that one's `ru_maxrss`, but has a VmHWM of its own
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows has no getrusage
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes


def plain_config(value: Any, id_only: bool = False) -> Any:
    """A config as JSON can hold it: dataclasses become dicts, paths strings, enums their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if not id_only or f.metadata.get("in_id", True)]
        return {field.name: plain_config(getattr(value, field.name), id_only) for field in fields}
    if isinstance(value, Enum):
        return plain_config(value.value, id_only)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_config(item, id_only) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_config(item, id_only) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_config(item, id_only) for item in value), key=str)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        raise UserError(f"a config holds {value}; a config may hold finite numbers only (use None for 'not set')")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise UserError(
        f"a config holds a {type(value).__name__}; it may hold numbers, strings, booleans, None, paths, enums, "
        "and lists, mappings or dataclasses of these"
    )


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
