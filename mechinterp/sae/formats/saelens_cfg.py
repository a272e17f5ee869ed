"""What stands in SAELens's `cfg.json`: in the words of all its releases, and what it says that we have no equal of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechinterp.errors import UserError
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.metadata import Metadata

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
NOTES = (
    "model_name", "hook_name", "hook_name_out", "hook_head_index", "context_size", "prepend_bos", "dataset_path",
    "exclude_special_tokens", "seqpos_slice", "model_class_name", "model_from_pretrained_kwargs", "neuronpedia_id",
    "sae_lens_version", "sae_lens_training_version",
)  # fmt: skip
READ = (
    "model_name", "hook_name", "hook_name_out", "hook_head_index", "context_size", "prepend_bos", "dataset_path",
    "sae_lens_version", "mechinterp",
)  # fmt: skip
NORMALISATIONS = {
    "expected_average_only_in": "its scale is not in the folder; fold it in with SAELens (fold_activation_norm_scaling_"
    "factor) and save again",
    "constant_norm_rescale": "every token is rescaled to one norm",
    "layer_norm": "every token is standardised",
    "covariance_whitening": "its matrix is not folded in; fold it in with SAELens (fold_activation_whitening) and save "
    "again",
}


def modern(cfg: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A config of any release in today's words, with `metadata` and `architecture`.

    Raises:
        UserError: an option that changes what is computed and that we have no equal of.
    """
    made = {RENAMED.get(name, name): value for name, value in cfg.items()}
    given = made.get("metadata", {})
    if not isinstance(given, dict):
        raise UserError(f"{where}: metadata must be an object; found {given!r}")
    made["metadata"] = {name: made[name] for name in NOTES if name in made} | given
    made.setdefault("architecture", "standard")
    activation = made.get("activation_fn", "relu")
    if activation == "topk":
        made["architecture"] = "topk"
        made["k"] = (made.get("activation_fn_kwargs") or {}).get("k", made.get("k"))
    elif activation != "relu":
        raise UserError(f"{where}: activation_fn {activation!r} is not supported; valid: relu, topk")
    if _is_old(made["metadata"]) and "hook_z" in str(made["metadata"].get("hook_name", "")):
        made.setdefault("reshape_activations", "hook_z")
    _refuse(made, where)
    return made


def metadata(cfg: Mapping[str, Any], where: Path) -> Metadata:
    """Where a foreign autoencoder belongs. What has no place of its own in `Metadata` is kept under `training`."""
    notes = cfg["metadata"]
    reads = (str(notes["hook_name"]),) if notes.get("hook_name") else ()
    writes = (str(notes["hook_name_out"]),) if notes.get("hook_name_out") else ()
    if not writes and "transcoder" not in cfg["architecture"]:
        writes = reads
    context, bos, special = (notes.get(name) for name in ("context_size", "prepend_bos", "exclude_special_tokens"))
    if context is not None and (isinstance(context, bool) or not isinstance(context, int)):
        raise UserError(f"{where}: context_size must be a whole number; found {context!r}")
    if bos is not None and not isinstance(bos, bool):
        raise UserError(f"{where}: prepend_bos must be true or false; found {bos!r}")
    tokens = tuple(special) if isinstance(special, list) and all(isinstance(one, int) for one in special) else ()
    return Metadata(
        model=str(notes.get("model_name") or ""),
        reads=reads,
        writes=writes,
        exclusion=Exclusion(tokens=tokens),
        context=context,
        bos=bos,
        text=str(notes.get("dataset_path") or ""),
        training={name: value for name, value in notes.items() if name not in READ and value is not None},
    )


def _is_old(notes: Mapping[str, Any]) -> bool:
    """Before release 6, which moved what is not of the weights to `metadata`."""
    release = str(notes.get("sae_lens_version") or "0").split(".")[0]
    return not release.isdigit() or int(release) < 6


def _refuse(cfg: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for what changes the meaning and has no equal here."""
    normalise = cfg.get("normalize_activations")
    normalise = {None: "none", False: "none", True: "expected_average_only_in"}.get(normalise, normalise)
    if normalise != "none":
        reason = NORMALISATIONS.get(str(normalise), "it is unknown")
        raise UserError(f"{where}: normalize_activations {normalise!r} is not supported ({reason}); valid: 'none'")
    reshape = cfg.get("reshape_activations", "none")
    if reshape != "none":
        raise UserError(
            f"{where}: reshape_activations {reshape!r} is not supported (it reads all heads of a site side by side); "
            "valid: 'none'"
        )
    head = cfg["metadata"].get("hook_head_index")
    if head is not None:
        raise UserError(
            f"{where}: hook_head_index {head} is not supported (it reads one head of its site); valid: null"
        )
    if cfg.get("finetuning_scaling_factor"):
        raise UserError(f"{where}: finetuning_scaling_factor is not supported; valid: false")
