"""dictionary_learning's folders, read: `ae.pt` and `config.json`.

`ae.pt` is a pickle, and a pickle can run code when it is read: only tensors are read (`weights_only`), and a file that
asks for more is refused.

BatchTopK and Matryoshka are read with the threshold that is saved beside them. Plain autoencoders come as its own
reader gives them: decoder columns at norm 1, features scaled to match.
"""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UserError, one_line
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.formats.weights import Weights, build, fold_decoder_norm, read_json, require, whole, widen
from mechinterp.sae.metadata import Metadata

WEIGHTS, CONFIG = "ae.pt", "config.json"
KINDS = {  # its class: our architecture, and whether b_dec is taken off the input
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "GatedAutoEncoder": ("gated", True),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batchtopk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
OURS = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec",
    "bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
"""Its names of tensors that are not ours, and ours."""
COUNTS = ("k", "group_sizes")
"""Tensors of whole numbers, which are no weights."""


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder of a dictionary_learning folder, in at least float32.

    Raises:
        UserError: damaged or missing files, a pickle that asks for more than tensors, unknown or missing tensors, or a
            class that we have no equal of.
    """
    where = folder / CONFIG
    about = read_json(where)
    trainer = about.get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or name not in KINDS:
        raise UserError(f"{where}: dict_class {name!r} is not supported; valid: {', '.join(KINDS)}")
    given = read_pickle(folder / WEIGHTS)
    counts = {key: given.pop(key) for key in COUNTS if key in given}
    config = _config(KINDS[name], given, trainer, counts, where)
    if config.architecture == "topk":
        given.pop("threshold", None)  # for another way of running it, which is not its own default
    require(given, _shapes(name, config), folder / WEIGHTS)
    weights = _ours(widen(given), columns="encoder.weight" in given)
    norms = weights["W_dec"].norm(dim=1)
    if name == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms)):
        fold_decoder_norm(weights, norms)
    return build(config, _metadata(trainer, about), weights)


def read_pickle(path: Path) -> Weights:
    """The tensors of a pickled state, and nothing else. Raises UserError for a file that holds or asks for more."""
    try:
        with warnings.catch_warnings():  # of protocols that no peer writes: such files are refused below
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)", str(error))
        wants = f"it asks for {asked.group(1)}" if asked else one_line(error)
        raise UserError(f"{path} is not read: only tensors are taken from a pickle, and {wants}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise UserError(f"{path} must hold tensors by name; found {type(found).__name__}")
    return dict(found)


def _config(kind: tuple[str, bool], given: Weights, trainer: dict[str, Any], counts: Weights, where: Path) -> SAEConfig:
    architecture, centred = kind
    shape = next((tuple(given[name].shape) for name in ("decoder.weight", "W_enc") if name in given), ())
    if len(shape) != 2:
        raise UserError(f"{where}: the weights beside it have no encoder and decoder; found {', '.join(given)}")
    values = {name: value.tolist() for name, value in counts.items()}
    k = None
    if architecture in ("topk", "batchtopk", "matryoshka"):
        k = whole({"k": values.get("k", trainer.get("k"))}, "k", where)
        if trainer.get("k", k) != k:
            raise UserError(f"{where}: k is {trainer['k']}, and {k} in the weights beside it")
    prefixes: tuple[int, ...] = ()
    if architecture == "matryoshka":
        groups = values.get("group_sizes")
        if not isinstance(groups, list):
            raise UserError(f"{where}: the weights beside it have no group_sizes")
        prefixes = tuple(sum(groups[: at + 1]) for at in range(len(groups)))
    try:
        return SAEConfig(architecture, shape[0], shape[1], k=k, centred=centred, prefixes=prefixes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _shapes(name: str, config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors in the file."""
    d_in, d_sae = config.d_in, config.d_sae
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        threshold = () if config.architecture == "matryoshka" else (d_sae,)
        return {
            "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,),
            "threshold": threshold,
        }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}
    if name == "GatedAutoEncoder":
        return shapes | {"decoder_bias": (d_in,), "r_mag": (d_sae,), "gate_bias": (d_sae,), "mag_bias": (d_sae,)}
    shapes["encoder.bias"] = (d_sae,)
    shapes[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")] = (d_in,)
    if name == "BatchTopKSAE":
        shapes["threshold"] = ()
    return shapes


def _ours(weights: Weights, columns: bool) -> Weights:
    """By our names; features become rows. `columns`: as Linear modules, whose decoder has features as columns."""
    made = {OURS.get(name, name): value for name, value in weights.items()}
    turned = "W_dec" if columns else "W_enc"
    made[turned] = made[turned].T.contiguous()
    return made


def _metadata(trainer: dict[str, Any], about: dict[str, Any]) -> Metadata:
    """The model, and the site where its name says that it is a residual stream's."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    reads = (f"blocks.{layer}.hook_resid_post",) if isinstance(layer, int) and name.startswith("resid_post") else ()
    buffer = about.get("buffer")
    context = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    return Metadata(
        model=str(trainer.get("lm_name") or ""),
        reads=reads,
        writes=reads,
        context=context if isinstance(context, int) else None,
        training=trainer,
    )
