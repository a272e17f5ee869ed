"""sparsify's folders: `cfg.json` and `sae.safetensors`. All are TopK; a transcoder's output is as wide as its input."""

import re
from pathlib import Path
from typing import Any

from mechinterp.errors import UserError
from mechinterp.results import write_json
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.formats.note import KEY, Note
from mechinterp.sae.formats.weights import build, flag, read_json, read_tensors, require, whole, widen
from mechinterp.sae.formats.writing import CFG, SPARSIFY_WEIGHTS, write_tensors, writing
from mechinterp.sae.metadata import Metadata

OURS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}
"""Its names of tensors, and ours."""


def save_sparsify(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Write a folder that sparsify loads, and in which it computes the same.

    Args:
        sae: a TopK autoencoder, or a transcoder whose output is as wide as its input.
        folder: is replaced if it holds an autoencoder, and nothing else.

    Raises:
        UserError: sparsify has no such kind, the folder holds other things, or cannot be written.
    """
    config = sae.config
    if config.architecture != "topk":
        raise UserError(f"sparsify has TopK alone; this autoencoder is {config.architecture} (SAELens has more kinds)")
    if config.d_in != config.d_out:
        raise UserError(
            f"sparsify's output is as wide as its input; here {config.d_in} are read, {config.d_out} written"
        )
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": sae.unit_norm,
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": not config.centred,
        "d_in": config.d_in,
        KEY: Note.of(sae, config).to_json(),
    }
    tensors = {name: getattr(sae, ours) for name, ours in OURS.items()}
    with writing(folder) as partial:
        write_json(partial / CFG, cfg)
        write_tensors(partial / SPARSIFY_WEIGHTS, {name: value for name, value in tensors.items() if value is not None})
    return Path(folder)


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder of a sparsify folder, in at least float32.

    Raises:
        UserError: damaged or missing files, unknown or missing tensors, or an activation that we have no equal of.
    """
    where = folder / CFG
    cfg = read_json(where)
    activation = cfg.get("activation", "topk")
    if activation != "topk":
        raise UserError(f"{where}: activation {activation!r} is not supported; valid: 'topk'")
    config = _config(cfg, where)
    weights = read_tensors(folder / SPARSIFY_WEIGHTS)
    d_in, d_sae = config.d_in, config.d_sae
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,),
    }  # fmt: skip
    if config.skip:
        shapes["W_skip"] = (d_in, d_in)
    require(weights, shapes, folder / SPARSIFY_WEIGHTS)
    ours = {OURS[name]: value for name, value in widen(weights).items()}
    note = Note.read(cfg, where)
    if note is None:
        return build(config, _metadata(config, folder.name), ours)
    if (note.config.d_in, note.config.d_sae, note.config.k, note.config.skip, note.config.centred) != (
        d_in, d_sae, config.k, config.skip, config.centred,
    ):  # fmt: skip
        raise UserError(f"{where} contradicts what stands in it under {KEY!r}: {config} is not {note.config}")
    return build(note.config, note.metadata, ours)


def _config(cfg: dict[str, Any], where: Path) -> SAEConfig:
    d_in = whole(cfg, "d_in", where)
    given = cfg.get("num_latents") or d_in * whole({"expansion_factor": 32} | cfg, "expansion_factor", where)
    d_sae = whole({"num_latents": given}, "num_latents", where)
    skip, one_way = (flag(cfg, name, False, where) for name in ("skip_connection", "transcode"))
    k = whole({"k": 32} | cfg, "k", where)
    try:
        return SAEConfig("topk", d_in, d_sae, k=k, skip=skip, centred=not one_way)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _metadata(config: SAEConfig, name: str) -> Metadata:
    """sparsify names a folder after the module whose output it reads; for a block's that is a site of ours."""
    block = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)", name)
    if block is None or not config.centred:
        return Metadata()
    reads = (f"blocks.{block.group(1)}.hook_resid_post",)
    return Metadata(reads=reads, writes=reads)
