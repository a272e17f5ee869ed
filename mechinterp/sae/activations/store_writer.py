"""Activations to disk: shard by shard, so that an interrupted harvest continues where its last whole shard ended.

For every shard, in this order, each file written aside and renamed:

1. the shard;
2. the tensors of the state after it (of the source, and rows of its last chunk that the shard had no room for);
3. the manifest, which names both: from here on the shard belongs to the store;
4. the state before is removed.

If the process dies before 3, the manifest still names the shard and the state before; what it does not name is removed
when the harvest continues. The shards are then the same, bit for bit, as those of a harvest that was never interrupted.
(This holds when the process dies, not when the machine loses its power: files are not synced to the disk.)
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.files import replacing
from mechinterp.sae.activations.chunks import Chunks, n_rows, under, widths_of
from mechinterp.sae.activations.memory import require_memory
from mechinterp.sae.activations.store_format import (
    DTYPES,
    MANIFEST,
    SHARD,
    STATE,
    Manifest,
    Origin,
    SavedState,
    Shard,
    digest,
    require_file,
)

SHARD_TOKENS = 131_072  # 0.4 GB of float32 rows of width 768


def write_store(
    folder: str | Path,
    chunks: Chunks,
    origin: Origin,
    n_tokens: int,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Manifest:
    """Write the rows of `chunks` into a folder, or continue to: shards that are there are kept, and not read again.

    Args:
        folder: empty, not there yet, or a store that was begun with the same arguments.
        chunks: a fresh source; on continuing it is set to the state after the last whole shard.
        origin: what the rows are of.
        n_tokens: rows to write. A source that ends before makes a smaller, complete store.
        shard_tokens: rows of a shard, held in memory until it is written.
        progress: called with the rows so far, those of the shard at hand included, after every chunk.
        dtype: of the rows on disk: float32, bfloat16 or float16.

    Returns:
        The manifest of the complete store.

    Raises:
        UserError: a folder with other things in it, a store begun otherwise, a damaged state, a source without rows,
            values beyond float16, too little memory or room on the disk, a disk that is full. The shards written until
            then stay, and the same call continues behind them.
    """
    folder, dtype_name = Path(folder), str(dtype).removeprefix("torch.")
    if dtype_name not in DTYPES:
        raise UserError(f"activations are stored as {', '.join(DTYPES)}; found {dtype_name}")
    if n_tokens < 1 or shard_tokens < 1:
        raise UserError(f"n_tokens and shard_tokens must be at least 1; found {n_tokens} and {shard_tokens}")
    shard_tokens = min(shard_tokens, n_tokens)
    manifest, rest = _begun(folder), {}
    if manifest is not None:
        _require_same(folder, manifest, Manifest(origin, manifest.widths, dtype_name, shard_tokens, n_tokens))
        _remove_unnamed(folder, manifest)
        for shard in manifest.shards:
            require_file(folder / shard.file, shard)
        if manifest.complete:
            return manifest
        rest = _restore(folder, manifest, chunks)
    if manifest is None or manifest.state is None:  # nothing was written yet
        rest = _first_rows(chunks, origin)
        manifest = Manifest(origin, widths_of(rest), dtype_name, shard_tokens, n_tokens)
    _require_room(folder, manifest)
    with _disk(folder, manifest):
        folder.mkdir(parents=True, exist_ok=True)
        manifest.save(folder)
    return _Writer(folder, chunks, manifest, rest, progress).run()


class _Writer:
    """The loop over shards, and what it holds: the rows of the shard at hand, and those that come after it."""

    def __init__(
        self,
        folder: Path,
        chunks: Chunks,
        manifest: Manifest,
        rest: dict[str, Tensor],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.folder, self.chunks, self.manifest, self.rest, self.progress = folder, chunks, manifest, rest, progress
        dtype, n = DTYPES[manifest.dtype], manifest.shard_tokens
        require_memory("a shard", n, manifest.widths, dtype, torch.device("cpu"))
        self.space = {name: torch.empty(n, width, dtype=dtype) for name, width in manifest.widths.items()}

    def run(self) -> Manifest:
        """Write shards until there are as many tokens as were asked for, or the source ends."""
        while not self.manifest.complete:
            want = min(self.manifest.shard_tokens, self.manifest.asked - self.manifest.tokens)
            got = self._fill(want)
            done = got < want or self.manifest.tokens + got == self.manifest.asked
            with _disk(self.folder, self.manifest):
                self._commit(got, done)
            _remove_unnamed(self.folder, self.manifest)
        return self.manifest

    def _fill(self, want: int) -> int:
        """Take rows until there are `want`; fewer at the end of the source."""
        got = 0
        while got < want:
            if not n_rows(self.rest):
                try:
                    self.rest = self.chunks.chunk()
                except StopIteration:
                    break
                if widths_of(self.rest) != dict(self.manifest.widths):
                    raise ValueError(f"a chunk holds {widths_of(self.rest)}, the store {dict(self.manifest.widths)}")
            n = min(n_rows(self.rest), want - got)
            for name, space in self.space.items():
                space[got : got + n].copy_(self.rest[name][:n].detach())
            self.rest = {name: rows[n:] for name, rows in self.rest.items()}
            got += n
            if self.progress is not None:
                self.progress(self.manifest.tokens + got)
        return got

    def _commit(self, got: int, done: bool) -> None:
        """Write a shard, the state after it, and the manifest that names both."""
        made = self.manifest
        if got:
            shard = self._write_shard(got)
            made = made.with_shard(shard, None if done else self._write_state())
        made = replace(made, complete=done, state=None if done else made.state)
        made.save(self.folder)
        self.manifest = made

    def _write_shard(self, got: int) -> Shard:
        rows = {name: space[:got] for name, space in self.space.items()}
        for name, table in rows.items():
            if table.dtype == torch.float16 and not bool(table.isfinite().all()):
                raise UserError(f"{name} has values beyond float16 (65,504) or undefined ones: store it as bfloat16")
        path = self.folder / f"shard-{len(self.manifest.shards):06d}.safetensors"
        with replacing(path) as partial:
            save_file(rows, partial)
            return Shard(path.name, got, partial.stat().st_size, digest(partial))

    def _write_state(self) -> SavedState:
        state = {f"chunks.{name}": value for name, value in self.chunks.state_dict().items()}
        state |= {f"rest.{name}": rows for name, rows in self.rest.items() if len(rows)}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in state.items() if name not in tensors}
        if not tensors:
            return SavedState(values, None, None)
        path = self.folder / f"state-{len(self.manifest.shards):06d}.safetensors"
        with replacing(path) as partial:
            # Clones: safetensors refuses tensors that share memory, and a slice would be saved with all of its storage.
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, partial)
            return SavedState(values, path.name, digest(partial))


def _begun(folder: Path) -> Manifest | None:
    """The manifest of a store that is there; None for a missing folder or an empty one (a partial manifest aside)."""
    if folder.is_dir() and not (folder / MANIFEST).exists():
        others = [one.name for one in folder.iterdir() if one.name != f".partial-{MANIFEST}"]
        if others:
            raise UserError(f"{folder} holds no store, but other things ({others[0]} …): name a new or empty folder")
        return None
    return Manifest.load(folder) if folder.exists() else None


def _require_same(folder: Path, found: Manifest, asked: Manifest) -> None:
    """Raise UserError unless the store was begun as it is asked for now."""
    differs = found.origin.differences(asked.origin)
    for name in ("dtype", "shard_tokens", "asked"):
        if getattr(found, name) != getattr(asked, name):
            word = "n_tokens" if name == "asked" else name
            differs.append(f"{word} {getattr(found, name)}, not {getattr(asked, name)}")
    if differs:
        raise UserError(f"the store in {folder} was begun with {'; '.join(differs)}: name another folder")


def _remove_unnamed(folder: Path, manifest: Manifest) -> None:
    """Remove shards and states that the manifest does not name, and half-written files of ours."""
    keep = {shard.file for shard in manifest.shards} | {manifest.state.file if manifest.state else None}
    for path in folder.iterdir():
        name = path.name.removeprefix(".partial-")
        ours = SHARD.fullmatch(name) or STATE.fullmatch(name) or (name == MANIFEST and name != path.name)
        if ours and path.name not in keep:
            path.unlink(missing_ok=True)


def _restore(folder: Path, manifest: Manifest, chunks: Chunks) -> dict[str, Tensor]:
    """Set the source to the state after the last shard; the rows that had no room in it."""
    saved, tensors = manifest.state, {}
    if saved is None:
        return {}
    if saved.file is not None:
        path = folder / saved.file
        try:
            if digest(path) != saved.sha256:
                raise UserError(f"{path} is damaged: its sha256 is not the manifest's; the harvest cannot continue")
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the state of the harvest from {path}: {error}") from error
    state = {**saved.values, **tensors}
    chunks.load_state_dict(under("chunks.", state))
    rest = under("rest.", state)
    return {name: rest[name] for name in manifest.widths if name in rest}


def _first_rows(chunks: Chunks, origin: Origin) -> dict[str, Tensor]:
    try:
        while not n_rows(rows := chunks.chunk()):
            pass
    except StopIteration:
        raise UserError(f"{origin.text} gives no token to store: is it empty, or does the rule exclude all?") from None
    return rows


def _require_room(folder: Path, manifest: Manifest) -> None:
    """Raise UserError when the shards to come would not fit on the disk."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    free, left = shutil.disk_usage(there).free, manifest.asked - manifest.tokens
    needed = left * manifest.bytes_per_token
    if needed > free:
        raise UserError(
            f"{left:,} tokens of activations would take {needed / 1e9:.2f} GB in {folder}, of {free / 1e9:.2f} GB "
            f"free there; {free // manifest.bytes_per_token:,} tokens would fit"
        )


@contextmanager
def _disk(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Turn errors of writing into UserError, and leave nothing that the manifest does not name."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if folder.is_dir():
            _remove_unnamed(folder, manifest)
        # safetensors reports a full disk as an error of its own, with the number in its text.
        full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
        reason = "the disk is full" if full else str(error)
        raise UserError(
            f"cannot write the store in {folder}: {reason}; {len(manifest.shards)} shards with {manifest.tokens:,} "
            "tokens are whole, and the same call continues behind them"
        ) from error
