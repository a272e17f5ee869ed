"""Reading causal language models and tokenizers through transformers: folders, GGUF files, the hub and its cache.

No code of a checkpoint is ever run: `trust_remote_code` is off, safetensors are preferred, and a `.bin` file is read
by torch with `weights_only=True`, which builds tensors only.
"""

from __future__ import annotations

import io
import pickle
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from ssl import SSLError
from typing import cast

import torch
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound, HFValidationError
from huggingface_hub.utils import build_hf_headers, validate_repo_id
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from mechinterp.errors import UserError, one_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
PROBE_SECONDS = 5.0
# What transformers raises on a checkpoint that it cannot read.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, ImportError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip

Read = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading bars, logs and warnings of transformers, the hub and TransformerLens; put them back after."""
    level, hub_level = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def read(source: str | Path, dtype: torch.dtype, *, local: bool, revision: str | None = None) -> Read:
    """A model, with eager attention, and its tokenizer (None where there is none), from a folder or a hub name.

    Raises:
        UserError: not a causal language model, damaged files, weights that are missing from the checkpoint.
    """
    where = f"revision {revision} of {source}" if revision else str(source)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=local, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"cannot read the configuration of {where}: {first_line(error)}") from error
    require_causal(config, where)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            revision=revision,
            local_files_only=local,
            trust_remote_code=False,
            attn_implementation="eager",
            weights_only=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise UserError(f"cannot load a model from {where}: {first_line(error)}") from error
    module, report = cast("tuple[PreTrainedModel, dict[str, list]]", loaded)
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:  # transformers would go on with random numbers
        raise UserError(f"{where} lacks {len(missing)} weights that its config.json asks for, such as {missing[0]}")
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return module, None
    return module, read_tokenizer(source, local=local, revision=revision)


def read_tokenizer(source: str | Path, *, local: bool, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or a hub name."""
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, local_files_only=local, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"cannot load a tokenizer from {source}: {first_line(error)}") from error


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, dequantised to float32, and its tokenizer from a GGUF file.

    The weights go into a fresh model: the one that transformers returns is marked as quantised and cannot be saved.
    """
    try:
        with redirect_stderr(io.StringIO()):  # its progress bar heeds no switch
            loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except UNREADABLE as error:
        raise UserError(f"cannot load the GGUF file {path}: {first_line(error)}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    fresh = type(loaded)._from_config(config, dtype=torch.float32, attn_implementation="eager")
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    return fresh, tokenizer


def require_causal(config: PreTrainedConfig, where: str) -> None:
    """Raise UserError unless a config is of a decoder that predicts the next token."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"{where} is an encoder-decoder ({kind}); mechinterp works on causal decoders such as GPT-2")
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    named = [name for name in config.architectures or [] if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if not causal or (encoder and not named):
        raise UserError(f"{where} is not a causal language model ({kind}); mechinterp works on decoders such as GPT-2")


def in_hub_cache(name: str, revision: str | None) -> bool:
    """Whether the hub's local cache has a config and weights under this name."""
    try:
        cached = [isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in WEIGHTS]
        return any(cached) and isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def hub_cache_names() -> list[str]:
    """Models of the hub's local cache that can be loaded without a network."""
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(
        repo.repo_id for repo in repositories if repo.repo_type == "model" and in_hub_cache(repo.repo_id, None)
    )


def hub_fault(name: str, revision: str | None) -> str | None:
    """Why a hub name cannot be had now, or None if it can: one quick request instead of half a minute of retries."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "it is not a local name or file, and not a valid hub name"
    if constants.is_offline_mode():
        return "it is not a local name, and the hub is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set)"
    url = f"{constants.ENDPOINT}/{name}/resolve/{revision or 'main'}/config.json"
    request = urllib.request.Request(url, headers=build_hf_headers(), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 404):
            at = f" at revision {revision}" if revision else ""
            return f"it is not a local name, and {constants.ENDPOINT} has no such model{at} (or it is private)"
        return f"it is not a local name, and {constants.ENDPOINT} refuses it: {error.code} {error.reason}"
    except urllib.error.URLError as error:
        if isinstance(error.reason, SSLError):
            return None  # the hub's client may know certificates that urllib does not
        return f"it is not a local name, and {constants.ENDPOINT} cannot be reached ({error.reason})"
    except OSError as error:
        return f"it is not a local name, and {constants.ENDPOINT} cannot be reached ({error or type(error).__name__})"


def first_line(error: BaseException) -> str:
    """The first line of an error, without its full stop."""
    return one_line(error).rstrip(".")
