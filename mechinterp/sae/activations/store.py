"""Activations from disk: a store that `write_store` made, as a source of chunks.

Reading goes straight into the tensors: as fast as a plain read of the same bytes from a disk, nine tenths as fast where
the system has them in memory. The length and the header of every shard are checked as it is read; its sha256 is not:
that takes four times as long as the reading (two cores, no disk in between). `verify` does it, once after a copy, say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.sae.activations.store_format import (
    DTYPES,
    Manifest,
    Origin,
    Shard,
    offsets,
    require_file,
    require_sha256,
)
from mechinterp.sae.activations.store_writer import write_store as write_store  # one place for those who write and read

# Of a chunk by default. Memory of this size is used again by the next chunk; larger pieces go back to the system, and
# taking them anew costs more than the reading.
CHUNK_BYTES = 8_000_000


@dataclass(frozen=True, eq=False)
class Store:
    """Rows of activations of one or several sites, in a folder. Made by `Store.open`."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, incomplete: bool = False) -> "Store":
        """Read the manifest, and see that every shard is there and has its length.

        Args:
            folder: of the store.
            incomplete: whether a store whose harvest was interrupted will do.

        Raises:
            UserError: no store, of another version, damaged, or incomplete.
        """
        folder = Path(folder)
        made = cls(folder, Manifest.load(folder))
        found = made.manifest
        if not (found.complete or incomplete) or not found.shards:
            raise UserError(
                f"the store in {folder} is not finished: {found.tokens:,} of {found.asked:,} tokens; harvest again "
                "with the same settings and it continues"
            )
        for shard in found.shards:
            require_file(folder / shard.file, shard)
        return made

    def __len__(self) -> int:
        """Tokens."""
        return self.manifest.tokens

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The sites, by TransformerLens's names."""
        return tuple(self.manifest.widths)

    def require(
        self,
        model: str,
        weights_hash: str,
        hook_names: Sequence[str] = (),
        exclusion: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> None:
        """Raise UserError, naming what differs, unless the rows are of these weights and have these sites.

        Args:
            model: name, for the message: the weights decide.
            weights_hash: `HookedModel.weights_hash()`.
            hook_names: sites that must be there; the store may have more.
            exclusion: rule for excluded positions, as plain values; any will do by default None.
            context: tokens of a sequence; any will do by default None.
        """
        mine = self.manifest.origin
        asked = {**asdict(mine), "model": model, "weights_hash": weights_hash}
        asked |= {"exclusion": mine.exclusion if exclusion is None else exclusion}
        asked |= {"context": mine.context if context is None else context}
        differs = mine.differences(Origin(**asked))
        missing = [name for name in hook_names if name not in self.manifest.widths]
        if missing:
            differs.append(f"sites {', '.join(self.hook_names)}, not {', '.join(missing)}")
        if differs:
            raise UserError(f"the store in {self.folder} does not fit: it has {'; '.join(differs)}")

    def verify(self) -> None:
        """Compare the sha256 of every shard. Raises UserError naming the first that is damaged."""
        for shard in self.manifest.shards:
            require_sha256(self.folder / shard.file, shard)

    def chunks(
        self,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        hook_names: Sequence[str] | None = None,
        endless: bool = True,
        chunk_tokens: int | None = None,
        device: str | torch.device = "cpu",
    ) -> "StoreChunks":
        """The rows as a source of chunks.

        Args:
            seed: of the order of the chunks, over all shards, which is another one in every pass; that of writing by
                default None.
            shard: `(rank, world)`: every world-th chunk, from the rank-th on. In a pass the ranks read every chunk
                once, and may read unequally many.
            hook_names: some of the sites; all by default None.
            endless: begin anew after the last shard, instead of raising StopIteration.
            chunk_tokens: rows of a chunk, 8 MB by default None; the last chunk of a shard may have fewer.
            device: where the chunks go.

        Raises:
            UserError: a rank outside the world, more ranks than shards, a site that is not there, or `chunk_tokens`
                below 1.
        """
        rank, world = shard
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} of {world} was asked for; valid: a rank below the world")
        names = self.hook_names if hook_names is None else tuple(hook_names)
        missing = [name for name in names if name not in self.hook_names]
        if missing or not names:
            raise UserError(f"{self.folder} has no {', '.join(missing) or 'such sites'}; it has {self.hook_names}")
        if chunk_tokens is None:
            row = sum(self.manifest.widths[name] for name in names) * DTYPES[self.manifest.dtype].itemsize
            chunk_tokens = max(1, CHUNK_BYTES // row)
        if chunk_tokens < 1:
            raise UserError(f"chunk_tokens must be at least 1; found {chunk_tokens}")
        pieces = sum(-(-one.tokens // chunk_tokens) for one in self.manifest.shards)
        if world > pieces:
            raise UserError(
                f"{world} processes cannot share the {pieces} chunks of {self.folder}: ask for smaller chunks"
            )
        return StoreChunks(self, names, seed, rank, world, endless, chunk_tokens, torch.device(device))


class StoreChunks:
    """The rows of a store, some at a time (Chunks). Made by `Store.chunks`."""

    def __init__(
        self,
        store: Store,
        names: tuple[str, ...],
        seed: int | None,
        rank: int,
        world: int,
        endless: bool,
        chunk_tokens: int,
        device: torch.device,
    ) -> None:
        self.store, self.names, self.endless = store, names, endless
        self.seed, self.rank, self.world, self.chunk_tokens = seed, rank, world, chunk_tokens
        self.device = device
        self._pass, self._position = 0, 0  # of the pieces of this rank, in the order of the pass
        self._order: tuple[int, list[tuple[int, int]]] = (-1, [])  # of which pass, and its pieces
        self._offsets: dict[str, dict[str, int]] = {}  # by shard, as they are first read

    def chunk(self) -> dict[str, Tensor]:
        """Hook name -> the next `[token d]`, in the dtype of the store.

        Raises:
            StopIteration: the one pass is over.
            UserError: a shard is missing or damaged; the message names it.
        """
        if self._position == len(self._pieces()):
            if not self.endless:
                raise StopIteration
            self._pass, self._position = self._pass + 1, 0
        number, start = self._pieces()[self._position]
        shard = self.store.manifest.shards[number]
        rows = self._read(shard, start, min(self.chunk_tokens, shard.tokens - start))
        self._position += 1
        return rows

    def _pieces(self) -> list[tuple[int, int]]:
        """This rank's pieces of this pass, (shard, first row). All ranks draw the same order, and deal it out.

        Pieces are shuffled over the whole store, not inside of shards: a shard may be one book, and an autoencoder ends
        up fitted to the book that came last.
        """
        if self._order[0] != self._pass:
            shards = enumerate(self.store.manifest.shards)
            every = [(number, start) for number, shard in shards for start in range(0, shard.tokens, self.chunk_tokens)]
            order = range(len(every))
            if self.seed is not None:
                order = np.random.default_rng([self.seed, self._pass]).permutation(len(every)).tolist()
            self._order = self._pass, [every[one] for one in order][self.rank :: self.world]
        return self._order[1]

    def _read(self, shard: Shard, start: int, n: int) -> dict[str, Tensor]:
        """Rows start … start + n of a shard, read into fresh tensors."""
        path, manifest = self.store.folder / shard.file, self.store.manifest
        if shard.file not in self._offsets:
            self._offsets[shard.file] = offsets(path, shard, manifest)
        rows = {name: torch.empty(n, manifest.widths[name], dtype=DTYPES[manifest.dtype]) for name in self.names}
        try:
            with path.open("rb", buffering=0) as file:
                for name, table in rows.items():
                    file.seek(self._offsets[shard.file][name] + start * manifest.widths[name] * table.element_size())
                    _read_into(file, table)
        except OSError as error:
            raise UserError(f"cannot read the shard {path}: {error}") from error
        return {name: table.to(self.device) for name, table in rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where the next chunk begins, and in what order the shards are read; plain values."""
        return {
            "store": self.store.manifest.digest,
            "sites": list(self.names),
            "seed": self.seed,
            "rank": self.rank,
            "world": self.world,
            "chunk_tokens": self.chunk_tokens,
            "pass": self._pass,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken. Raises UserError if it is of another store, order, rank or chunk size."""
        here = self.state_dict()
        place = ("pass", "position")
        differs = [
            f"{name} {state.get(name)}, not {value}"
            for name, value in here.items()
            if name not in place and state.get(name) != value
        ]
        if differs:
            raise UserError(f"the state is of other chunks than these of {self.store.folder}: {'; '.join(differs)}")
        self._pass, self._position = (int(state[name]) for name in place)


def _read_into(file: Any, table: Tensor) -> None:
    """Fill a tensor from a file. Raises OSError at the file's end."""
    view = table.view(torch.uint8).numpy().data.cast("B")
    done = 0
    while done < len(view):  # the system reads at most 2 GB at a time
        n = file.readinto(view[done:])
        if not n:
            raise OSError(f"it ends {len(view) - done:,} bytes too early")
        done += n
