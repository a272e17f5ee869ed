"""The tuned lens: an affine translator for each layer, h + A h + b, before the model's final norm and unembedding.

Trained by tuning.py; here it is a value that is applied, saved and loaded. It belongs to the very weights that it was
trained on: a lens of another model is refused.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
"""

import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.files import replacing
from mechinterp.hooked.model import HookedModel
from mechinterp.results import write_json

PARAMETERS, CONFIG = "params.safetensors", "config.json"
# What config.json holds besides the settings of the training.
ORIGIN = ("model", "weights_hash", "d_model", "n_layers", "text", "documents", "block_length", "losses")


@dataclass(frozen=True)
class TunedLensConfig:
    """How a tuned lens is trained. The defaults take some minutes for SmolLM2-135M on two cores."""

    steps: int = 100
    """optimizer steps, after the least-squares start"""
    blocks_per_step: int = 2
    """blocks of text in the forward pass of a step"""
    positions: int = 128
    """positions of those blocks that a step trains on; they are the same for all layers"""
    columns: int = 2048
    """tokens of the vocabulary that a step estimates the KL from: half the likeliest, half drawn from the rest"""
    start_blocks: int = 160
    """blocks of text whose residual streams the least-squares start is fitted to"""
    ridge: float = 1e-3
    """ridge of the start, in units of each coordinate's variance"""
    learning_rate: float = 1e-2
    """largest step of Adam, in standardised coordinates; it falls to 0 along a cosine"""
    seed: int = 0
    """of the order of blocks, the positions and the drawn columns"""

    def __post_init__(self) -> None:
        for name in ("steps", "blocks_per_step", "positions", "columns", "start_blocks"):
            least = 2 if name == "columns" else 1
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}; found {getattr(self, name)}")
        if not (self.ridge > 0 and self.learning_rate > 0):
            raise UserError(f"ridge and learning_rate must be above 0; found {self.ridge}, {self.learning_rate}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TunedLensConfig":
        """From plain values. Raises UserError for unknown or missing keys."""
        known = {one.name for one in fields(cls)}
        if set(values) != known:
            wrong = sorted(set(values) ^ known)
            raise UserError(f"settings of a tuned lens must be {', '.join(sorted(known))}; unknown or missing: {wrong}")
        return cls(**values)


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of the rows 0 … n_layers − 1; the last row is the model's own output and needs none.

    Attributes:
        weight: `[layer d_model d_model]`, A; as in a torch Linear the first `d_model` is the output.
        bias: `[layer d_model]`, b.
        mean_output: `[d_vocab]` mean of the model's output distribution over the training positions: the lens that
            reads nothing, the control of an evaluation.
        config: how it was trained.
        origin: plain values: model and hash of its weights, sizes, the text and its documents, the loss of every step.
    """

    weight: Tensor
    bias: Tensor
    mean_output: Tensor
    config: TunedLensConfig
    origin: Mapping[str, Any]
    _fits: "weakref.WeakSet[HookedModel]" = field(default_factory=weakref.WeakSet, repr=False)

    @property
    def about(self) -> dict[str, Any]:
        """Where the lens comes from, in short, for the results that it is used in."""
        return {name: self.origin[name] for name in ORIGIN if name not in ("documents", "losses")} | asdict(self.config)

    def translate(self, layer: int, resid: Tensor) -> Tensor:
        """`[… d_model]` of a row as the last row would have it."""
        if layer == len(self.weight):
            return resid
        x = resid.to(self.weight.dtype)
        return (x + torch.nn.functional.linear(x, self.weight[layer], self.bias[layer])).to(resid.dtype)

    def require(self, model: HookedModel) -> None:
        """Raise UserError unless the lens was trained on these weights."""
        if model in self._fits:
            return
        asked = {"d_model": model.d_model, "n_layers": model.n_layers}
        differs = [
            f"{name} {self.origin[name]}, not {value}" for name, value in asked.items() if self.origin[name] != value
        ]
        if not differs and self.origin["weights_hash"] != model.weights_hash():
            differs = ["other weights (or another dtype or processing)"]
        if differs:
            raise UserError(
                f"this tuned lens was trained on {self.origin['model']}, which has {', '.join(differs)}; "
                f"the model here is {model.info.name}: train a lens of its own"
            )
        self._fits.add(model)

    def save(self, folder: str | Path) -> None:
        """Write `params.safetensors` and then `config.json`, each whole or not at all; the latter vouches for both."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight, "bias": self.bias, "mean_output": self.mean_output}
        with replacing(folder / PARAMETERS) as partial:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        note = {**self.origin, "training": asdict(self.config), "sha256": _digest(folder / PARAMETERS)}
        write_json(folder / CONFIG, note)

    @classmethod
    def load(cls, folder: str | Path, model: HookedModel) -> "TunedLens":
        """Read what `save` wrote, onto the model's device.

        Raises:
            UserError: missing or damaged files, unknown keys, or a lens of another model.
        """
        folder = Path(folder)
        try:
            note = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            found = _digest(folder / PARAMETERS)
            tensors = load_file(folder / PARAMETERS, device=str(model.device))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot read a tuned lens from {folder}: {error}") from error
        expected = {*ORIGIN, "training", "sha256"}
        if not isinstance(note, dict) or set(note) != expected:
            wrong = sorted(set(note) ^ expected) if isinstance(note, dict) else type(note).__name__
            raise UserError(f"{folder / CONFIG} is no tuned lens of ours: unknown or missing keys {wrong}")
        if note["sha256"] != found or set(tensors) != {"weight", "bias", "mean_output"}:
            raise UserError(f"{folder / PARAMETERS} is not the file that {CONFIG} beside it was written for")
        config = TunedLensConfig.of(note["training"])
        origin = {name: note[name] for name in ORIGIN}
        made = cls(tensors["weight"], tensors["bias"], tensors["mean_output"], config, origin)
        made.require(model)
        return made


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
