"""From a name, a folder, a file or a transformers module to a hooked model.

Local names come first: embedded models (catalog.py), planted models (planted.py), folders, GGUF files, the hub's local
cache; the network is asked last, and once.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.models import pretrained
from mechinterp.models.catalog import CATALOG, RECORD, announce, fetch, folder_of, safetensors_fault
from mechinterp.models.planted import PLANTED

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WELL_KNOWN = (
    "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilbert/distilgpt2", "EleutherAI/pythia-70m",
    "EleutherAI/pythia-160m", "EleutherAI/pythia-410m", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B",
)  # fmt: skip

Tokenizer = PreTrainedTokenizerBase | None


class LocalModel(NamedTuple):
    """A model that can be loaded by name. `cached`: without a download."""

    name: str
    kind: str
    description: str
    cached: bool


class Source(NamedTuple):
    """A model before its bridge: a module, or for planted models the bridge itself."""

    module: PreTrainedModel | TransformerBridge
    tokenizer: Tokenizer
    kind: str
    description: str


def load(
    model: str | Path | nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    bos: bool | None = None,
    process: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
) -> HookedModel:
    """Load a causal language model with hooks, in eval mode and without parameter gradients.

    Args:
        model: an embedded name ("smollm2-135m"), a planted one ("planted-induction"), a Hugging Face folder, a GGUF
            file (dequantised), a hub name ("gpt2"), or a transformers model. Such a model is wrapped in place: its
            submodules are replaced by hooked ones, its attention becomes eager, `device` and `dtype` are applied to it
            where they are given, and `process=True` rewrites its weights.
        device: by default CUDA where there is one, else the CPU; a transformers model stays where it is.
        dtype: "float32" (the default), "float16", "bfloat16" or a torch dtype; a transformers model keeps its own.
        bos: prepend a BOS to text; by default exactly where the model's own tokenizer adds one.
        process: fold norms and biases and centre the weights (TransformerLens's compatibility mode); default: raw.
        revision: branch, tag or commit of a hub name.
        tokenizer: a tokenizer, or a folder or hub name that has one, instead of the model's own.

    Raises:
        UserError: unknown name, closed network, damaged or missing files, an architecture without a bridge or that is
            no causal decoder, unknown device or dtype, a BOS asked of a tokenizer that has none.
    """
    to_device = _device(device, given_module=isinstance(model, nn.Module))
    to_dtype = _dtype(dtype, given_module=isinstance(model, nn.Module))
    if revision is not None and (isinstance(model, nn.Module) or not _is_hub_name(str(model))):
        raise UserError(f"revision={revision!r} was given, but {_shown(model)} is local; only hub names have revisions")
    with pretrained.quiet():
        source = _source(model, to_dtype or torch.float32, revision)
        chosen = _tokenizer(tokenizer) if tokenizer is not None else source.tokenizer
        prepends = _bos(bos, chosen, _shown(model))
        bridge = _bridge(source, _shown(model), to_device, to_dtype)
        if process:
            _process(bridge, _shown(model))
        return HookedModel(bridge, chosen, ModelInfo(_shown(model), source.description, source.kind, process, prepends))


def local_names() -> list[LocalModel]:
    """Every model that has a name here: embedded, planted, and those of the hub's local cache."""
    embedded = [
        LocalModel(e.name, "embedded", e.description, (folder_of(e) / RECORD).is_file()) for e in CATALOG.values()
    ]
    planted = [LocalModel(name, "planted", entry.description, True) for name, entry in PLANTED.items()]
    hub = [LocalModel(name, "hub", "in the hub's local cache", True) for name in pretrained.hub_cache_names()]
    return embedded + planted + hub


def _source(model: str | Path | nn.Module, dtype: torch.dtype, revision: str | None) -> Source:
    """Find the model, local places first."""
    if isinstance(model, nn.Module):
        return _given(model)
    name, path = str(model), Path(model).expanduser()
    if name in CATALOG:
        entry = CATALOG[name]
        return Source(*_folder(fetch(entry), dtype), "embedded", entry.description)
    if name in PLANTED:
        entry = PLANTED[name]
        return Source(*entry.build(), "planted", entry.description)
    if _is_folder(path):
        return Source(*_folder(path, dtype), "folder", "")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file, but not a .gguf one; give the folder that holds config.json and weights"
            )
        announce(f"dequantising {path.name} ...")
        return Source(*pretrained.read_gguf(path), "gguf", "dequantised GGUF")
    if isinstance(model, Path) or not _is_hub_name(name):
        found = "the folder has no config.json" if path.is_dir() else "no such folder or GGUF file"
        raise UserError(f"there is no model at {path}: {found}{_nearest(name)}")
    if pretrained.in_hub_cache(name, revision):
        return Source(*pretrained.read(name, dtype, local=True, revision=revision), "hub", _at(revision))
    fault = pretrained.hub_fault(name, revision)
    if fault:
        raise UserError(f"cannot load the model {name!r}: {fault}{_nearest(name)}")
    announce(f"fetching {name} from the hub ...")
    return Source(*pretrained.read(name, dtype, local=False, revision=revision), "hub", _at(revision))


def _given(module: nn.Module) -> Source:
    """A module that the user made."""
    found = type(module).__name__
    if not isinstance(module, PreTrainedModel):
        raise UserError(
            f"cannot load a {found}: give a causal language model of transformers, or a name, folder or file"
        )
    pretrained.require_causal(module.config, f"the given {found}")
    if any(isinstance(part, GeneralizedComponent) for part in module.modules()):
        raise UserError(f"the given {found} has hooks already: it was loaded before; use that model, or a fresh one")
    if module.get_output_embeddings() is None:
        raise UserError(f"the given {found} has no unembedding; give the model with its language-modelling head")
    module.set_attn_implementation("eager")
    return Source(module, None, "module", "")


def _folder(folder: Path, dtype: torch.dtype) -> pretrained.Read:
    """A Hugging Face folder, its files checked first."""
    if not any((folder / name).is_file() for name in pretrained.WEIGHTS):
        raise UserError(f"{folder} has no weights: expected one of {', '.join(pretrained.WEIGHTS)}")
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        try:
            json.loads(path.read_text(encoding="utf-8") if path.is_file() else "{}")
        except ValueError as error:
            raise UserError(f"cannot load the model: {path} is not valid JSON: {error}") from error
    for path in sorted(folder.glob("*.safetensors")):
        fault = safetensors_fault(path)
        if fault:
            raise UserError(f"cannot load the model: {path} is damaged: {fault}")
    return pretrained.read(folder, dtype, local=True)


def _is_folder(path: Path) -> bool:
    """Whether a path is a model folder; any other folder must not hide a hub name."""
    return (path / "config.json").is_file()


def _bridge(source: Source, shown: str, device: torch.device | None, dtype: torch.dtype | None) -> TransformerBridge:
    """Wrap a module in TransformerLens's bridge, on its device and in its dtype."""
    given = source.module
    if isinstance(given, TransformerBridge):
        # Buffers as well: the bridge gives the unembedding a bias of zeros that is no parameter.
        given.original_model.to(device=device, dtype=dtype)
        weight = next(given.original_model.parameters())
        given.cfg.device, given.cfg.dtype = str(weight.device), weight.dtype
        return given
    given.eval().requires_grad_(False)
    if dtype is not None:
        # Parameters only: buffers such as rotary frequencies lose too much below float32.
        for parameter in given.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if device is not None:
        nn.Module.to(given, device)
    architecture = _architecture(given)
    try:
        # No tokenizer: the bridge would prepend a BOS by its own rules.
        bridge = build_bridge_from_module(given, architecture, hf_config=given.config, model_name=shown)
    except (ValueError, AttributeError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"TransformerLens cannot wrap {architecture} ({shown}): {pretrained.first_line(error)}"
        ) from error
    if not any(".attn.hook_" in name for name in bridge.hook_dict):
        raise UserError(f"{shown} ({architecture}) has no attention layers; mechinterp works on transformers")
    return bridge


def _architecture(module: PreTrainedModel) -> str:
    """The name under which the bridge knows a model's class, or the class that it was derived from."""
    for kind in type(module).__mro__:
        if kind.__name__ in SUPPORTED_ARCHITECTURES:
            return kind.__name__
    found = type(module).__name__
    near = difflib.get_close_matches(found, SUPPORTED_ARCHITECTURES, n=3)
    hint = f"; the nearest that it has: {', '.join(near)}" if near else ""
    raise UserError(f"TransformerLens has no adapter for the architecture {found}{hint}")


def _process(bridge: TransformerBridge, shown: str) -> None:
    try:
        bridge.enable_compatibility_mode()
    except (ValueError, RuntimeError, AttributeError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"{shown} cannot be processed: {pretrained.first_line(error)}; load it with raw weights"
        ) from error


def _tokenizer(given: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if Path(given).is_dir() or pretrained.in_hub_cache(str(given), None):
        return pretrained.read_tokenizer(given, local=True)
    fault = pretrained.hub_fault(str(given), None)
    if fault:
        raise UserError(f"cannot load the tokenizer {str(given)!r}: {fault}")
    return pretrained.read_tokenizer(given, local=False)


def _bos(asked: bool | None, tokenizer: Tokenizer, shown: str) -> bool:
    """Whether text gets a BOS: as asked, by default where the tokenizer itself adds one."""
    token = None if tokenizer is None else tokenizer.bos_token_id
    if asked and token is None:
        raise UserError(f"a BOS was asked for, but {'the tokenizer of ' if tokenizer else ''}{shown} has none")
    if tokenizer is None or token is None or asked is not None:
        return bool(asked)
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == token


def _device(asked: str | torch.device | None, *, given_module: bool) -> torch.device | None:
    """The device, checked. None leaves a given module where it is."""
    if asked is None:
        if given_module:
            return None
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UserError(f"unknown device {str(asked)!r}; valid are cpu, cuda, cuda:0, cuda:1, ..., mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device {device} was asked for, but torch {torch.__version__} finds {count} CUDA devices")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device mps was asked for, but torch finds none")
    elif device.type != "cpu":
        raise UserError(f"unknown device {str(asked)!r}; valid are cpu, cuda, cuda:0, cuda:1, ..., mps")
    return device


def _dtype(asked: str | torch.dtype | None, *, given_module: bool) -> torch.dtype | None:
    """The dtype, checked. None leaves a given module as it is."""
    if asked is None:
        return None if given_module else torch.float32
    dtype = DTYPES.get(asked) if isinstance(asked, str) else asked
    if dtype not in DTYPES.values():
        raise UserError(f"unknown dtype {str(asked)!r}; valid are {', '.join(DTYPES)}")
    return dtype


def _is_hub_name(name: str) -> bool:
    """Whether a name could be one of the hub's: `name` or `owner/name`, not a local name, file or model folder."""
    path = Path(name).expanduser()
    if name in CATALOG or name in PLANTED or path.is_file() or _is_folder(path):
        return False
    path_like = name.startswith(("/", ".", "~")) or "\\" in name or name.endswith(".gguf")
    return bool(name) and not path_like and name.count("/") <= 1


def _nearest(name: str) -> str:
    """What would work instead."""
    known = {model.name.lower(): model.name for model in local_names()} | {known.lower(): known for known in WELL_KNOWN}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    hint = f". Did you mean {known[near[0]]!r}?" if near and near[0] != name.lower() else "."
    local = ", ".join(model.name for model in local_names())
    return f"{hint} Local names: {local}; a model folder or a GGUF file works, too"


def _at(revision: str | None) -> str:
    return f"revision {revision}" if revision else ""


def _shown(model: str | Path | nn.Module) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
