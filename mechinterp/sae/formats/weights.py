"""From what a folder holds to a module: JSON and tensors are read, checked by name and shape, and put in place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mechinterp.errors import UserError, one_line
from mechinterp.sae.architectures import BatchTopK, make
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.metadata import Metadata

Weights = dict[str, Tensor]
SETTLED = round(1 / (1 - BatchTopK.DECAY))
"""Updates after which a threshold is an exponential mean: what a threshold made elsewhere counts as."""


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises UserError for a file that is missing or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object; found {type(found).__name__}")
    return found


def read_tensors(path: Path) -> Weights:
    """The tensors of a safetensors file. Raises UserError for a file that is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def whole(values: Mapping[str, Any], name: str, where: Path) -> int:
    """A whole number of at least 1 out of a config. Raises UserError if it is missing or something else."""
    found = values.get(name)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise UserError(f"{where}: {name} must be a whole number of at least 1; found {found!r}")
    return found


def flag(values: Mapping[str, Any], name: str, default: bool, where: Path) -> bool:
    """true or false out of a config. Raises UserError for something else."""
    found = values.get(name, default)
    if not isinstance(found, bool):
        raise UserError(f"{where}: {name} must be true or false; found {found!r}")
    return found


def require(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise UserError, naming every tensor that is missing, unknown, of another shape, or not of floats."""
    faults = [f"{name} is missing" for name in shapes if name not in weights]
    for name, tensor in weights.items():
        if name not in shapes:
            faults.append(f"{name} is unknown")
        elif tuple(tensor.shape) != shapes[name]:
            faults.append(f"{name} is {tuple(tensor.shape)}, not {shapes[name]}")
        elif not tensor.is_floating_point():
            faults.append(f"{name} is of {tensor.dtype}, not of floats")
    if faults:
        raise UserError(f"{where}: {'; '.join(faults)}. The config beside it asks for {', '.join(shapes)}")


def widen(weights: Mapping[str, Tensor]) -> Weights:
    """At least float32, in which every narrower weight is exact, and all of one type."""
    dtype = torch.float32
    for tensor in weights.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def fold_decoder_norm(weights: Weights, norms: Tensor) -> None:
    """Decoder rows over their norms `[feature]`, features times them: the same reconstruction."""
    weights["W_enc"] = weights["W_enc"] * norms[:, None]
    weights["b_enc"] = weights["b_enc"] * norms
    weights["W_dec"] = weights["W_dec"] / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None]


def fold_centre(weights: Weights, biases: Mapping[str, Tensor]) -> None:
    """Into the encoder's biases what `b_dec` takes off the input: W (x − b_dec) + b = W x + (b − W b_dec).

    Args:
        weights: `W_enc`, `b_dec`, and the biases, which are replaced.
        biases: names, and the factors `[feature]` that W_enc has where they are added.
    """
    taken = weights["W_enc"] @ weights["b_dec"]
    for name, factor in biases.items():
        weights[name] = weights[name] - factor * taken


def build(config: SAEConfig, metadata: Metadata, weights: Mapping[str, Tensor], n_updates: int = SETTLED) -> Any:
    """A module with the given weights, in our names and shapes; `threshold` is `[feature]`, or one of BatchTopK's."""
    state, sae = dict(weights), make(config, metadata)
    if config.architecture == "jumprelu":  # features are never below 0, so that a lower threshold does what 0 does
        state["threshold"] = state["threshold"].clamp_min(0)
    elif isinstance(sae, BatchTopK):
        state["threshold"] = state["threshold"].clamp_min(0)
        state["n_updates"] = torch.tensor(n_updates)
    sae.load_state_dict(state, assign=True)
    return sae.eval().requires_grad_(False)


def place(sae: SparseAutoencoder, device: str | torch.device, dtype: torch.dtype | None) -> SparseAutoencoder:
    """On a device, as another type. Thresholds are not narrowed: their logarithms would be, and move them by percents.

    Raises:
        UserError: a device that is not there, or a type that is not of floats.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(f"dtype must be of floats; found {dtype}")
    kept = {name: value for name, value in sae.state_dict().items() if "threshold" in name}
    try:
        sae = sae.to(device=device, dtype=dtype)
        for name, value in kept.items():
            getattr(sae, name).data = value.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot put an autoencoder on {device}: {one_line(error)}") from error
    return sae
