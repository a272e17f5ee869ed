"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mechinterp.errors import UserError, one_line

CFG, SPARSITY = "cfg.json", "sparsity.safetensors"
SAELENS_WEIGHTS, SPARSIFY_WEIGHTS = "sae_weights.safetensors", "sae.safetensors"
OURS = {CFG, SPARSITY, SAELENS_WEIGHTS, SPARSIFY_WEIGHTS}
"""What a folder may hold that is written anew."""


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, beside `folder`, which takes its place when the block ends; removed if the block fails.

    Raises:
        UserError: `folder` holds something else than an autoencoder, or cannot be written.
    """
    folder = Path(folder).absolute()
    _check(folder)
    partial, before = (folder.with_name(f".{kind}-{folder.name}") for kind in ("partial", "before"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
        os.replace(partial, folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if before.exists() and not folder.exists():
            os.replace(before, folder)
        raise UserError(f"cannot write {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file."""
    made = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(made, path, metadata={"format": "pt"})


def _check(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is no folder that could be written anew; name another one")
    others = sorted({one.name for one in folder.iterdir()} - OURS) if folder.is_dir() else []
    if others:
        raise UserError(
            f"{folder} holds other things than an autoencoder ({', '.join(others[:3])}); name another folder"
        )
