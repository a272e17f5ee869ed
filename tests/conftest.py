"""What every test shares: shape checks, no hub, fixed seeds, and the small real model."""

import os

# Before transformers or huggingface_hub is imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MECHINTERP_KEEP_FREED_MEMORY"] = "0"  # tests of memory look at what the process holds

from jaxtyping import install_import_hook

# Shapes and types of every function of the package are checked in tests, and free at run time. The hook acts on
# modules as they are imported, so it must stand before the first import of mechinterp; lazy imports are caught as well.
# The tower: an int will do where a float is asked for, as PEP 484 and the type checker have it.
install_import_hook("mechinterp", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import random

import numpy as np
import pytest
import torch

import mechinterp


@pytest.fixture(autouse=True)
def seeds() -> None:
    """A test that draws from a global generator draws the same numbers whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third-party code may read it)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M, for tests marked real_model: fetched on first use, then loaded from the user's cache.

    Shared by the whole session: a test must leave it as it was (hooks are removed, weights are not written to).
    """
    return mechinterp.load("smollm2-135m")
