"""Sparse autoencoders: train, resume, evaluate, splice, share. Names are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechinterp.sae.activations import Source, source_of, synthetic_source
    from mechinterp.sae.architectures import make
    from mechinterp.sae.attribution import attribute
    from mechinterp.sae.autoencoder import Objective, Output, SAEConfig, SparseAutoencoder
    from mechinterp.sae.config import TrainConfig
    from mechinterp.sae.evaluation import SAEEvaluation, evaluate
    from mechinterp.sae.exclusion import Exclusion
    from mechinterp.sae.features import Features, describe
    from mechinterp.sae.formats import convert, load, save, save_saelens, save_sparsify
    from mechinterp.sae.harvest import Harvest
    from mechinterp.sae.metadata import Metadata
    from mechinterp.sae.splice import Splice
    from mechinterp.sae.store import Store, write_store
    from mechinterp.sae.synthetic import KnownDictionary
    from mechinterp.sae.tokens import TokenBlocks, held_out_blocks
    from mechinterp.sae.training import TrainedRun, train

# Public name -> module that holds it. The settings come without torch, for the command line.
_HOMES = {
    "Source": "activations",
    "source_of": "activations",
    "synthetic_source": "activations",
    "make": "architectures",
    "attribute": "attribution",
    "Objective": "autoencoder",
    "Output": "autoencoder",
    "SAEConfig": "autoencoder",
    "SparseAutoencoder": "autoencoder",
    "TrainConfig": "config",
    "SAEEvaluation": "evaluation",
    "evaluate": "evaluation",
    "Exclusion": "exclusion",
    "Features": "features",
    "describe": "features",
    "convert": "formats",
    "load": "formats",
    "save": "formats",
    "save_saelens": "formats",
    "save_sparsify": "formats",
    "Harvest": "harvest",
    "Metadata": "metadata",
    "Splice": "splice",
    "Store": "store",
    "write_store": "store",
    "KnownDictionary": "synthetic",
    "TokenBlocks": "tokens",
    "held_out_blocks": "tokens",
    "TrainedRun": "training",
    "train": "training",
}
__all__ = [
    "Exclusion",
    "Features",
    "Harvest",
    "KnownDictionary",
    "Metadata",
    "Objective",
    "Output",
    "SAEConfig",
    "SAEEvaluation",
    "Source",
    "SparseAutoencoder",
    "Splice",
    "Store",
    "TokenBlocks",
    "TrainConfig",
    "TrainedRun",
    "attribute",
    "convert",
    "describe",
    "evaluate",
    "held_out_blocks",
    "load",
    "make",
    "save",
    "save_saelens",
    "save_sparsify",
    "source_of",
    "synthetic_source",
    "train",
    "write_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mechinterp.sae' has no attribute {name!r}")
    value = getattr(import_module(f"mechinterp.sae.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
