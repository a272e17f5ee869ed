"""Sparse autoencoders: train, resume, evaluate, splice, share.

    config.py                          the settings of a run: flags, file, and their defaults
    autoencoder.py, architectures.py   what an autoencoder is, and its six kinds; kernels.py the sparse step under them
    activations/                       text -> tokens -> harvest -> shuffle buffer (or a store on disk) -> batches
    training/                          the step, the loop, checkpoints, several processes
    evaluation/, features/, splicing/  what it loses, what its features are about, what they do in the model
    formats/                           folders of SAELens, sparsify, dictionary_learning
    toys/                              ground truth: a known dictionary, toy models of superposition

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechinterp.sae.activations.exclusion import Exclusion
    from mechinterp.sae.activations.harvest import Harvest
    from mechinterp.sae.activations.source import Source, source_of, synthetic_source
    from mechinterp.sae.activations.store import Store, write_store
    from mechinterp.sae.activations.tokens import TokenBlocks, held_out_blocks
    from mechinterp.sae.architectures import make
    from mechinterp.sae.autoencoder import Objective, Output, SAEConfig, SparseAutoencoder
    from mechinterp.sae.config import TrainConfig
    from mechinterp.sae.evaluation.evaluate import SAEEvaluation, evaluate
    from mechinterp.sae.features.describe import Features, describe
    from mechinterp.sae.formats import convert, load, save, save_saelens, save_sparsify
    from mechinterp.sae.metadata import Metadata
    from mechinterp.sae.splicing.attribution import attribute
    from mechinterp.sae.splicing.splice import Splice
    from mechinterp.sae.toys.known_dictionary import KnownDictionary
    from mechinterp.sae.training.train import TrainedRun, train

# Public name -> module that holds it. The settings come without torch, for the command line.
_HOMES = {
    "Source": "activations.source",
    "source_of": "activations.source",
    "synthetic_source": "activations.source",
    "make": "architectures",
    "attribute": "splicing.attribution",
    "Objective": "autoencoder",
    "Output": "autoencoder",
    "SAEConfig": "autoencoder",
    "SparseAutoencoder": "autoencoder",
    "TrainConfig": "config",
    "SAEEvaluation": "evaluation.evaluate",
    "evaluate": "evaluation.evaluate",
    "Exclusion": "activations.exclusion",
    "Features": "features.describe",
    "describe": "features.describe",
    "convert": "formats",
    "load": "formats",
    "save": "formats",
    "save_saelens": "formats",
    "save_sparsify": "formats",
    "Harvest": "activations.harvest",
    "Metadata": "metadata",
    "Splice": "splicing.splice",
    "Store": "activations.store",
    "write_store": "activations.store",
    "KnownDictionary": "toys.known_dictionary",
    "TokenBlocks": "activations.tokens",
    "held_out_blocks": "activations.tokens",
    "TrainedRun": "training.train",
    "train": "training.train",
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
