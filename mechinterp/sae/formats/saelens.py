"""SAELens's folders: `cfg.json`, `sae_weights.safetensors`, and `sparsity.safetensors` where it is known.

Its W_enc is the transpose of ours. BatchTopK and Matryoshka are JumpReLU with one threshold for all, which is what they
are where there is no batch to choose from. What SAELens has no class for, TopK and gated transcoders, `save` writes
under a name that SAELens refuses (`topk_transcoder`), and `save_saelens` does not write.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.results import write_json
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.formats import saelens_cfg
from mechinterp.sae.formats.note import KEY, Note
from mechinterp.sae.formats.weights import (
    Weights,
    build,
    flag,
    fold_centre,
    fold_decoder_norm,
    read_json,
    read_tensors,
    require,
    whole,
    widen,
)
from mechinterp.sae.formats.writing import CFG, SAELENS_WEIGHTS, SPARSITY, write_tensors, writing

VERSION = "6.54.12"
"""The release of SAELens whose format is written."""

ITS_OWN = ("standard", "gated", "topk", "jumprelu")
ITS_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ONLY_OURS = ("topk_transcoder", "topk_skip_transcoder", "gated_transcoder", "gated_skip_transcoder")


def save(sae: SparseAutoencoder, folder: str | Path, sparsity: Tensor | None = None) -> Path:
    """Write any autoencoder, as a SAELens folder where SAELens has its kind; see `save_saelens` for the rest."""
    weights, config = _exported(sae)
    name = _name(sae, config)
    if sparsity is not None and sparsity.shape != (config.d_sae,):
        raise UserError(f"sparsity must be one number a feature, {config.d_sae}; found {tuple(sparsity.shape)}")
    cfg = _cfg(sae, config, name, weights["W_enc"].dtype)
    with writing(folder) as partial:
        write_json(partial / CFG, cfg)
        write_tensors(partial / SAELENS_WEIGHTS, weights)
        if sparsity is not None:
            write_tensors(partial / SPARSITY, {"sparsity": sparsity.float()})
    return Path(folder)


def save_saelens(sae: SparseAutoencoder, folder: str | Path, sparsity: Tensor | None = None) -> Path:
    """Write a folder that SAELens loads, and in which it computes the same.

    Args:
        sae: any but TopK and gated transcoders, which SAELens has no class for.
        folder: is replaced if it holds an autoencoder, and nothing else.
        sparsity: `[feature]` log10 of the share of tokens at which a feature is on.

    Raises:
        UserError: SAELens has no such kind, the folder holds other things, or cannot be written.
    """
    name = _name(sae, _exported(sae)[1])
    if name in ONLY_OURS:
        raise UserError(
            f"SAELens has no {name.replace('_', ' ')}; its transcoders are {', '.join(ITS_TRANSCODERS)}. sae.save "
            "writes a folder that is read here, and sparsify has TopK transcoders"
        )
    return save(sae, folder, sparsity)


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder of a SAELens folder, in at least float32.

    Raises:
        UserError: damaged or missing files, unknown or missing tensors, or an option that we have no equal of.
    """
    where = folder / CFG
    cfg = saelens_cfg.modern(read_json(where), where)
    weights = read_tensors(folder / SAELENS_WEIGHTS)
    _drop_ones(weights)
    config = _config(cfg, where)
    require(weights, _shapes(config), folder / SAELENS_WEIGHTS)
    weights = widen(weights)
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    note = Note.read(cfg["metadata"], where)
    if note is None:
        if flag(cfg, "rescale_acts_by_decoder_norm", False, where):
            fold_decoder_norm(weights, weights["W_dec"].norm(dim=1))
        return build(config, saelens_cfg.metadata(cfg, where), weights)
    return _as_noted(config, note, weights, where)


# Writing


def _exported(sae: SparseAutoencoder) -> tuple[Weights, SAEConfig]:
    """Tensors by SAELens's names and in its shapes, and what kind they are now."""
    config = sae.config
    weights = {name: value.detach().clone() for name, value in sae.named_parameters()}
    if config.architecture in ("jumprelu", "batchtopk", "matryoshka"):
        threshold = cast(Tensor, sae.threshold)  # [feature], or one of BatchTopK's
        weights["threshold"] = threshold.detach().to(sae.W_enc.dtype).expand(config.d_sae).clone()
        config = replace(config, architecture="jumprelu", k=None, prefixes=())
    if config.skip and config.centred:  # none of its kinds with a skip takes b_dec off the input
        one = torch.ones_like(weights["W_enc"][:, 0])
        gated = config.architecture == "gated"
        fold_centre(weights, {"b_gate": one, "b_mag": weights["r_mag"].exp()} if gated else {"b_enc": one})
        config = replace(config, centred=False)
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    return weights, config


def _name(sae: SparseAutoencoder, config: SAEConfig) -> str:
    """What SAELens calls it."""
    reads, writes = sae.metadata.reads, sae.metadata.writes
    one_way = not config.centred and (config.skip or config.d_in != config.d_out or reads != writes)
    if not one_way:
        return config.architecture
    kind = ("skip_" if config.skip else "") + "transcoder"
    return kind if config.architecture == "standard" else f"{config.architecture}_{kind}"


def _cfg(sae: SparseAutoencoder, config: SAEConfig, name: str, dtype: torch.dtype) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "architecture": name,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if "transcoder" in name:
        cfg["d_out"] = config.d_out
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    as_kept = replace(sae.config, centred=config.centred)
    return {**cfg, "metadata": {**_metadata(sae), KEY: Note.of(sae, as_kept).to_json()}}


def _metadata(sae: SparseAutoencoder) -> dict[str, Any]:
    """In SAELens's words."""
    of = sae.metadata
    made: dict[str, Any] = {"sae_lens_version": VERSION, "sae_lens_training_version": None}
    known = {
        "model_name": of.model,
        "hook_name": of.reads[0] if len(of.reads) == 1 else "",
        "hook_name_out": of.writes[0] if len(of.writes) == 1 and of.writes != of.reads else "",
        "dataset_path": of.text,
    }
    made |= {name: value for name, value in known.items() if value}
    return made | {"hook_head_index": None, "context_size": of.context, "prepend_bos": of.bos}


# Reading


def _config(cfg: Mapping[str, Any], where: Path) -> SAEConfig:
    """Shape and kind, by SAELens's names."""
    name = cfg["architecture"]
    if name not in (*ITS_OWN, *ITS_TRANSCODERS, *ONLY_OURS):
        raise UserError(
            f"{where}: the architecture {name!r} is not supported; valid: {', '.join((*ITS_OWN, *ITS_TRANSCODERS))}"
        )
    one_way, d_in = "transcoder" in name, whole(cfg, "d_in", where)
    kind = name.removesuffix("transcoder").removesuffix("skip_").removesuffix("_") or "standard"
    centred = flag(cfg, "apply_b_dec_to_input", not one_way, where)
    if one_way and centred:
        raise UserError(f"{where}: apply_b_dec_to_input must be false for a {name}")
    try:
        return SAEConfig(
            architecture=kind,
            d_in=d_in,
            d_sae=whole(cfg, "d_sae", where),
            k=whole(cfg, "k", where) if kind == "topk" else None,
            d_out=whole(cfg, "d_out", where) if one_way else d_in,
            skip="skip" in name,
            centred=centred,
        )
    except UserError as error:
        raise error if str(error).startswith(str(where)) else UserError(f"{where}: {error}") from error


def _shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors in the file."""
    feature = (config.d_sae,)
    shapes = {"W_enc": (config.d_in, config.d_sae), "W_dec": (config.d_sae, config.d_out), "b_dec": (config.d_out,)}
    shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag") if config.architecture == "gated" else ("b_enc",), feature)
    if config.architecture == "jumprelu":
        shapes["threshold"] = feature
    if config.skip:
        shapes["W_skip"] = (config.d_out, config.d_in)
    return shapes


def _drop_ones(weights: Weights) -> None:
    """Early releases wrote a scaling factor of ones, which does nothing; another one is left to be complained of."""
    factor = weights.get("scaling_factor")
    if factor is not None and torch.equal(factor, torch.ones_like(factor)):
        del weights["scaling_factor"]


def _as_noted(config: SAEConfig, note: Note, weights: Weights, where: Path) -> SparseAutoencoder:
    """What we wrote: as the architecture that it was trained as."""
    kept = note.config
    if kept.architecture in ("batchtopk", "matryoshka"):
        constant = config.architecture == "jumprelu" and bool((weights["threshold"] == weights["threshold"][0]).all())
        kept = replace(kept, architecture="jumprelu" if constant else kept.architecture, k=None, prefixes=())
    if replace(kept, n_sites=1) != config:
        raise UserError(f"{where} contradicts what stands in it under {KEY!r}: {config} is not {note.config}")
    if note.config.architecture in ("batchtopk", "matryoshka"):
        weights["threshold"] = weights["threshold"][0].clone()
    return build(note.config, note.metadata, weights, note.n_updates)
