"""Reading an autoencoder, whoever wrote it, and writing it for somebody else."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mechinterp.errors import UserError, one_line
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.formats import dictionary_learning, hub, saelens, sparsify
from mechinterp.sae.formats.weights import place, read_tensors
from mechinterp.sae.formats.writing import SAELENS_WEIGHTS, SPARSIFY_WEIGHTS, SPARSITY

READERS: dict[str, Callable[[Path], SparseAutoencoder]] = {
    SAELENS_WEIGHTS: saelens.read,
    SPARSIFY_WEIGHTS: sparsify.read,
    dictionary_learning.WEIGHTS: dictionary_learning.read,
}
"""By the file of weights that tells a format."""


def load(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> SparseAutoencoder:
    """A trained sparse autoencoder, which reads and writes raw activations.

    Args:
        source: a run's folder or its `sae` folder; a folder of SAELens, sparsify or dictionary_learning; or a name on
            the hub, OWNER/NAME or OWNER/NAME:FOLDER (a SAELens release is one, its sae_id is the FOLDER).
        device: where it is to be.
        dtype: of the weights; by default float32, or float64 where they were saved so.

    Raises:
        UserError: nothing there, damaged files, missing or unknown tensors, an option that changes what is computed and
            has no equal here, a pickle that asks for more than tensors, no network.
    """
    folder = _found(source)
    try:
        sae = READERS[_weights_in(folder)[0]](folder)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        # Readers name what they know of; a config can be wrong in more ways than that.
        raise UserError(f"{folder} is not read: {type(error).__name__} {one_line(error)}") from error
    for name, value in sae.state_dict().items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{folder}: {name} holds numbers that are not finite")
    return place(sae, device, dtype)


def read_sparsity(source: str | Path) -> Tensor | None:
    """`[feature]` log10 of the share of tokens at which a feature is on, as SAELens keeps it; None if it is not there.

    Raises:
        UserError: nothing there, or a file without `sparsity`.
    """
    path = _found(source) / SPARSITY
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    if set(tensors) != {"sparsity"}:
        raise UserError(f"{path} must hold sparsity alone; found {', '.join(tensors) or 'nothing'}")
    return tensors["sparsity"]


def convert(source: str | Path, out: str | Path, to: str = "saelens") -> Path:
    """Write an autoencoder, whoever wrote it, as a folder of "saelens" or "sparsify"; weights as float32 or wider.

    Raises:
        UserError: what `load`, `save_saelens` and `save_sparsify` raise, or an unknown format.
    """
    if to not in ("saelens", "sparsify"):
        raise UserError(f"unknown format {to!r} to convert to; valid: saelens, sparsify")
    sae = load(source)
    if to == "sparsify":
        return sparsify.save_sparsify(sae, out)
    return saelens.save_saelens(sae, out, read_sparsity(source))


def _found(source: str | Path) -> Path:
    """The folder that holds the weights."""
    folder = Path(source).expanduser()
    if not os.path.exists(folder):  # Path.exists raises for what is too long for a name
        name = hub.parse(source) if isinstance(source, str) else None
        if name is None:
            raise UserError(
                f"there is no folder {source}, and it is no name on the hub (OWNER/NAME or OWNER/NAME:FOLDER)"
            )
        folder = hub.fetch(*name)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder of the autoencoder")
    for one in (folder, folder / "sae"):
        kinds = _weights_in(one)
        if len(kinds) > 1:
            raise UserError(f"{one} holds several autoencoders: {', '.join(kinds)}; leave one there")
        if kinds:
            return one
    below = [one for at in (folder, folder / "sae") if at.is_dir() for one in at.iterdir() if one.is_dir()]
    inside = sorted(str(one.relative_to(folder)) for one in below if _weights_in(one))
    hint = f"; there are some in its folders {', '.join(inside[:8])}: name one" if inside else ""
    raise UserError(f"there is no autoencoder in {folder}: it needs one of {', '.join(READERS)}{hint}")


def _weights_in(folder: Path) -> list[str]:
    return [name for name in READERS if (folder / name).is_file()]
