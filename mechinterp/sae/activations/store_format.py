"""The folder of a store of activations: `manifest.json`, and shards `shard-000000.safetensors`, `shard-000001…`.

A shard holds `[token d]` of every site, by hook name. The manifest lists the shards with rows, bytes and sha256, and
says what they were made from. It vouches for the folder: a file that it does not name is not part of the store.
While a store is being written, the manifest also holds the state of the harvest after the last shard; tensors of the
state lie in the one `state-….safetensors` that the manifest names. (A fixed name would not do: two files cannot be
replaced at one moment, so the state of shard n + 1 could stand beside the manifest of shard n.)
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import UserError
from mechinterp.files import write_text

MANIFEST, KIND, VERSION = "manifest.json", "mechinterp activations", 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as safetensors writes them
SHARD = re.compile(r"shard-\d{6,}\.safetensors")
STATE = re.compile(r"state-\d{6,}\.safetensors")


@dataclass(frozen=True)
class Origin:
    """What the activations are of. A store is used and continued with the same origin only."""

    model: str
    """name of the model"""
    weights_hash: str
    """`HookedModel.weights_hash()`"""
    exclusion: Mapping[str, Any]
    """the rule by which positions were left out, as plain values"""
    context: int
    """tokens of a sequence"""
    text: str
    """where the text came from"""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """what else decides which tokens are read, as plain values: see `source.harvest_into`"""

    def differences(self, other: "Origin") -> list[str]:
        """What of this origin the other has otherwise, in words."""
        mine, theirs = _plain(asdict(self)), _plain(asdict(other))
        # The weights tell a model; a name may be a folder that has moved.
        names = [name for name in mine if mine[name] != theirs[name]]
        if "weights_hash" not in names:
            names = [name for name in names if name != "model"]
        return [f"{name.replace('_', ' ')} {_short(mine[name])}, not {_short(theirs[name])}" for name in names]


@dataclass(frozen=True)
class Shard:
    """A file of the store."""

    file: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedState:
    """The harvest after the last shard: plain values, and the file of the tensors (None without any)."""

    values: Mapping[str, Any]
    file: str | None
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """What a store holds, and from what.

    Attributes:
        origin: model, exclusion rule, context and text.
        widths: hook name -> width.
        dtype: of the rows: float32, bfloat16 or float16.
        shard_tokens: rows of a shard; the last one may have fewer.
        asked: tokens that were asked for; a text may end before.
        complete: whether all that was asked for, or all that the text gives, is there.
        shards: in order.
        state: to continue from; None once the store is complete.
    """

    origin: Origin
    widths: Mapping[str, int]
    dtype: str
    shard_tokens: int
    asked: int
    complete: bool = False
    shards: tuple[Shard, ...] = ()
    state: SavedState | None = None

    @property
    def tokens(self) -> int:
        """Rows of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one row of every site."""
        return sum(self.widths.values()) * DTYPES[self.dtype].itemsize

    @property
    def digest(self) -> str:
        """sha256 over the checksums of the shards: two stores with the same digest hold the same rows."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def with_shard(self, shard: Shard, state: SavedState | None) -> "Manifest":
        """The manifest after one more shard."""
        return replace(self, shards=(*self.shards, shard), state=state)

    def save(self, folder: Path) -> None:
        """Write `manifest.json`; it appears whole or not at all."""
        note = {"kind": KIND, "version": VERSION, **asdict(self)}
        # Not results.write_json, which writes null for NaN: a state must come back as it was, or not be written.
        write_text(folder / MANIFEST, json.dumps(note, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read what `save` wrote.

        Raises:
            UserError: no such folder, no store, a manifest that is damaged or of another version.
        """
        path = folder / MANIFEST
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} is no store of activations: there is no {path}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the manifest {path}: {error}") from error
        if not isinstance(note, dict) or note.pop("kind", None) != KIND:
            raise UserError(f"{path} is not the manifest of a store of activations (its kind must be {KIND!r})")
        version = note.pop("version", None)
        if version != VERSION:
            raise UserError(f"{path} is of version {version!r}; this release reads version {VERSION}")
        try:
            made = cls._of(note)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the manifest {path} is damaged: {error!r}") from error
        return made

    @classmethod
    def _of(cls, note: dict[str, Any]) -> "Manifest":
        origin, shards = Origin(**note.pop("origin")), tuple(Shard(**one) for one in note.pop("shards"))
        saved = note.pop("state")
        made = cls(**note, origin=origin, shards=shards, state=None if saved is None else SavedState(**saved))
        numbers = [made.asked, made.shard_tokens, *made.widths.values()]
        numbers += [number for shard in shards for number in (shard.tokens, shard.bytes)]
        if made.dtype not in DTYPES or any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError("sizes must be whole numbers above 0, and the dtype one of " + ", ".join(DTYPES))
        if made.complete == (made.state is not None) and (shards or made.complete):
            raise ValueError("an unfinished store needs the state of its harvest, a complete one has none")
        # Names are checked, so that a manifest from elsewhere cannot point out of its folder.
        state_file = made.state.file if made.state else None
        named = [(SHARD, shard.file) for shard in shards] + ([(STATE, state_file)] if state_file else [])
        for pattern, name in named:
            if not pattern.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a file of a store")
        return made


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_file(path: Path, shard: Shard) -> None:
    """Raise UserError, with its name, when a shard is missing or has another length."""
    try:
        found = path.stat().st_size
    except OSError:
        raise UserError(f"the store lacks its shard {path}: it cannot be used without; harvest it again") from None
    if found != shard.bytes:
        raise UserError(f"{path} is damaged: it has {found:,} bytes of {shard.bytes:,}; harvest the store again")


def require_sha256(path: Path, shard: Shard) -> None:
    """Raise UserError, with its name, when the bytes of a shard are not those that were written."""
    require_file(path, shard)
    if digest(path) != shard.sha256:
        raise UserError(f"{path} is damaged: its sha256 is not the manifest's; harvest the store again")


def offsets(path: Path, shard: Shard, manifest: Manifest) -> dict[str, int]:
    """Hook name -> byte of the file at which its rows begin, from the header, which must be what the manifest says.

    Raises:
        UserError: the file is missing, of another length, or its header is damaged.
    """
    require_file(path, shard)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length >= shard.bytes:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        found = {name: _start(header[name], shard, manifest, width) for name, width in manifest.widths.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its header does not fit the manifest; harvest the store again") from error
    return {name: 8 + length + start for name, start in found.items()}


def _start(entry: Mapping[str, Any], shard: Shard, manifest: Manifest, width: int) -> int:
    """First byte of a tensor in the data of a file. Raises ValueError for another shape, dtype or extent."""
    start, end = entry["data_offsets"]
    nbytes = shard.tokens * width * DTYPES[manifest.dtype].itemsize
    found = (entry["dtype"], list(entry["shape"]), end - start)
    if found != (NAMES[manifest.dtype], [shard.tokens, width], nbytes) or not 0 <= start < end <= shard.bytes:
        raise ValueError(f"found {found}")
    return start


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    """A hash by its first digits; other values as they are."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
