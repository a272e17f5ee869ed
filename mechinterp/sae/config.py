"""The settings of a training run: the flags of `mechinterp sae train`, and what a run writes down. Imports no torch."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from mechinterp.errors import UserError

Kind = Literal["sae", "transcoder", "skip-transcoder", "crosscoder"]
Architecture = Literal["standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"]
Penalty = Literal["l0", "tanh"]
Tracker = Literal["none", "trackio", "wandb"]
Dtype = Literal["float32", "float16", "bfloat16"]
TOP_K = ("topk", "batchtopk", "matryoshka")

# Per architecture (and penalty), each with the scale of activations that its published constants belong to: mean
# squared norm 1, or mean norm √d. Rajamanoharan et al. 2024 (gated, JumpReLU); Conerly et al. 2024 and 2025 (standard,
# tanh); for the TopK family (Gao et al. 2024) the loss is relative, and the learning rate is worked out from d_sae.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "standard": {"scale": "norm", "sparsity": 5.0, "learning_rate": 5e-5, "warm_up": 0.05},
    "gated": {"scale": "unit", "sparsity": 0.02, "learning_rate": 3e-4, "warm_up": 0.05},
    "jumprelu": {"scale": "unit", "sparsity": 0.001, "learning_rate": 7e-5, "warm_up": 0.1, "bandwidth": 0.001,
                 "threshold": 0.001},
    "jumprelu-tanh": {"scale": "norm", "sparsity": 20.0, "learning_rate": 2e-4, "warm_up": 1.0, "bandwidth": 2.0,
                      "threshold": 0.1, "pre_activation": 3e-6},
    "top-k": {"scale": "norm"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. What is None is worked out from the others, and written down as such."""

    model: str
    """Name, folder or GGUF file of the model."""
    text: tuple[Path, ...] = ()
    """Text files, or .jsonl files with a text a line. Without text and data set: docstrings of installed packages."""
    dataset: str | None = None
    """Name of a hub data set, streamed."""
    split: str = "train"
    """Of the data set."""
    column: str = "text"
    """Of the data set, or the field of a .jsonl file."""
    store: Path | None = None
    """Read activations from this folder (`mechinterp sae harvest`) instead of running the model."""

    kind: Kind = "sae"
    """A transcoder predicts another site than it reads, a crosscoder reads several layers at once."""
    architecture: Architecture = "topk"
    """Which features are kept, and how sparsity is had."""
    site: str = "resid_post"
    """What is read."""
    layer: int | tuple[int, ...] = -1
    """Of the site. With several, an autoencoder is trained on each, in one pass; or one crosscoder on all."""
    target: str | None = None
    """What a transcoder predicts, in the same layer; mlp_out by default."""
    d_sae: int = 4096
    """Features."""
    k: int = 32
    """Features a token, of topk, batchtopk and matryoshka."""
    prefixes: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    """Shares of the features that reconstruct alone, of matryoshka."""
    sparsity: float | None = None
    """Coefficient of the sparsity penalty, of standard, gated and jumprelu."""
    penalty: Penalty = "l0"
    """Of jumprelu: L0, or the tanh of Conerly et al. 2025."""
    bandwidth: float | None = None
    """Of jumprelu's straight-through gradient."""
    threshold: float | None = None
    """Of jumprelu, at the start."""
    pre_activation: float | None = None
    """Coefficient of jumprelu's loss of features below their thresholds, with the tanh penalty."""

    n_tokens: int = 10_000_000
    """Tokens to train on, excluded positions not counted."""
    batch: int = 2048
    """Tokens of a step, over all processes."""
    learning_rate: float | None = None
    """Largest step of Adam."""
    warm_up: float = 0.02
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.2
    """Share of the steps over which it falls to 0, at the end."""
    sparsity_warm_up: float | None = None
    """Share of the steps over which the sparsity coefficient rises."""
    clip: float = 1.0
    """Norm that the gradient is clipped to."""
    k_aux: int | None = None
    """Dead features that revive each other (TopK family); half of the width by default. 0 for none."""
    aux: float = 1 / 32
    """Coefficient of that loss."""
    dead_after: int | None = None
    """Tokens without firing after which a feature is dead: 10M, or a twentieth of n_tokens if that is less."""

    context: int = 128
    """Tokens of a block of text."""
    harvest_blocks: int = 16
    """Blocks in a forward pass of the model."""
    buffer: int = 131_072
    """Tokens of the shuffle buffer."""
    keep_first: bool = False
    """Train on position 0 of each block, too, where many models have an attention sink."""
    outlier: float | None = None
    """Drop tokens whose norm is above this multiple of the median norm."""
    held_out_every: int = 20
    """One document in so many is kept for evaluation."""

    log_every: int = 20
    """Steps between lines of the log."""
    eval_every: int | None = None
    """Tokens between evaluations on held-out text; a twentieth of n_tokens by default. 0 for none."""
    eval_tokens: int = 16_384
    """Held-out tokens of such an evaluation."""
    checkpoint_every: int | None = None
    """Tokens between checkpoints; a tenth of n_tokens by default. 0 for none."""
    keep: int = 2
    """Checkpoints that are kept."""

    seed: int = 0
    """Of the weights and of the order of the tokens."""
    device: str | None = None
    """Of the autoencoder; CUDA where there is one."""
    model_device: str | None = None
    """Of the model, if it runs on another device; harvest and training then go on at the same time."""
    dtype: Dtype = "float32"
    """Of the model's weights."""
    autocast: bool = False
    """Multiply in bfloat16, on CUDA only."""
    tracker: Tracker = "none"
    """Send the log to a tracker as well."""
    project: str = "mechinterp"
    """Of the tracker."""
    run_name: str | None = None
    """Of the tracker; the run's folder by default."""
    out: Path | None = field(default=None, metadata={"in_id": False})
    """Folder of the run; runs/sae/<hash of the settings> by default."""

    def __post_init__(self) -> None:
        for name, one in (("text", Path), ("layer", None), ("prefixes", None)):
            object.__setattr__(self, name, _several(name, getattr(self, name), one))
        for name in ("store", "out"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, str | Path), f"{name} must be a path or None; found {value!r}")
            object.__setattr__(self, name, None if value is None else Path(value))
        self._check_types()
        self._check_sources()
        self._check_shape()
        self._check_numbers()

    def _check_types(self) -> None:
        """Types and choices: settings come from files and from Python as well as from the command line."""
        choices = {"kind": Kind, "architecture": Architecture, "penalty": Penalty, "tracker": Tracker, "dtype": Dtype}
        for name, choice in choices.items():
            valid, found = get_args(choice), getattr(self, name)
            _require(found in valid, f"{name} must be one of {', '.join(valid)}; found {found!r}")
        for one in fields(TrainConfig):
            types = get_args(one.type) or (one.type,)
            if set(types) <= {int, float, bool, str, NoneType}:
                _require_type(one.name, getattr(self, one.name), types)
        for name, kind in (("layer", int), ("prefixes", float)):
            for value in getattr(self, name):
                _require_type(name, value, (kind,))

    def _check_sources(self) -> None:
        given = [name for name in ("text", "dataset", "store") if getattr(self, name)]
        _require(len(given) <= 1, f"give one of text, dataset and store; found {' and '.join(given)}")
        missing = [path for path in self.text if not path.is_file()]
        _require(not missing, f"no such text file: {missing[0] if missing else ''}")

    def _check_shape(self) -> None:
        _require(len(self.layers) > 0, "layer names none")
        _require(len(set(self.layers)) == len(self.layers), f"layer names one twice: {self.layers}")
        if self.kind == "crosscoder":
            _require(len(self.layers) > 1, f"a crosscoder reads several layers; found {self.layers}")
        _require(self.target is None or self.transcodes, f"target is for transcoders; this is a {self.kind}")
        if self.architecture in TOP_K:
            _require(1 <= self.k <= self.d_sae, f"k must be 1 … d_sae = {self.d_sae}; found {self.k}")
            _require(self.sparsity is None, f"sparsity is for standard, gated and jumprelu; {self.architecture} has k")
        _require(self.architecture == "jumprelu" or self.penalty == "l0", "penalty is for jumprelu")
        for name in ("bandwidth", "threshold", "pre_activation"):
            _require(self.architecture == "jumprelu" or getattr(self, name) is None, f"{name} is for jumprelu")
        _require(self.penalty == "tanh" or self.pre_activation is None, "pre_activation is for jumprelu's penalty tanh")
        if self.architecture == "matryoshka":
            self.prefix_sizes()

    def _check_numbers(self) -> None:
        _require(self.batch >= 2, f"batch must be at least 2, to have a variance; found {self.batch}")
        for name in ("d_sae", "n_tokens", "harvest_blocks", "log_every", "keep"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1; found {getattr(self, name)}")
        _require(self.eval_tokens >= 2, f"eval_tokens must be at least 2, to have a variance; found {self.eval_tokens}")
        for name in ("eval_every", "checkpoint_every", "k_aux", "dead_after"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} must be at least 0; found {value}")
        for name in ("sparsity", "bandwidth", "threshold", "learning_rate", "clip"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, f"{name} must be above 0 and finite; found {value}")
        for name in ("aux", "pre_activation"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < math.inf, f"{name} must be at least 0 and finite; found {value}")
        outlier = self.outlier
        _require(outlier is None or 1 < outlier < math.inf, f"outlier must be above 1 and finite; found {outlier}")
        _require(0 <= self.seed < 2**32, f"seed must be 0 … 2^32 - 1; found {self.seed}")
        for name in ("warm_up", "decay", "sparsity_warm_up"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, f"{name} is a share of the steps, 0 … 1; found {value}")
        _require(self.context >= 2, f"context must be at least 2; found {self.context}")
        _require(self.held_out_every >= 2, f"held_out_every must be at least 2; found {self.held_out_every}")
        _require(self.buffer >= self.batch, f"buffer must hold a batch of {self.batch}; found {self.buffer}")
        _require(self.n_tokens >= self.batch, f"n_tokens must be at least a batch, {self.batch}; found {self.n_tokens}")

    # What follows from them

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, also where one is given."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer

    @property
    def transcodes(self) -> bool:
        """Whether another site is predicted than is read."""
        return self.kind in ("transcoder", "skip-transcoder")

    @property
    def n_steps(self) -> int:
        """Whole batches in `n_tokens`."""
        return self.n_tokens // self.batch

    @property
    def scale(self) -> str:
        """ "norm": mean norm √d; "unit": mean squared norm 1."""
        return str(self._defaults["scale"])

    @property
    def _defaults(self) -> Mapping[str, Any]:
        if self.architecture in TOP_K:
            return DEFAULTS["top-k"]
        return DEFAULTS["jumprelu-tanh" if self.penalty == "tanh" else self.architecture]

    def prefix_sizes(self) -> tuple[int, ...]:
        """Matryoshka's prefixes in features. Raises UserError for shares that are no whole numbers of features."""
        good = all(0 < share <= 1 for share in self.prefixes)
        _require(good, f"prefixes are shares of the features, above 0 and up to 1; found {self.prefixes}")
        sizes = [share * self.d_sae for share in self.prefixes]
        wrong = [share for share, size in zip(self.prefixes, sizes, strict=True) if abs(size - round(size)) > 1e-6]
        _require(
            not wrong,
            f"d_sae {self.d_sae} cannot be divided: {wrong[0] if wrong else ''} of it is no whole number; valid for "
            f"the prefixes {', '.join(map(str, self.prefixes))}: a multiple of {self._divisor()}",
        )
        rounded = [round(size) for size in sizes]
        good = rounded == sorted(set(rounded)) and rounded[:1] > [0] and rounded[-1:] == [self.d_sae]
        _require(good, f"prefixes must ascend from above 0 to 1; found {self.prefixes}")
        return tuple(rounded)

    def _divisor(self) -> int:
        """The least number of features that every prefix is a whole number of (for shares of small denominators)."""
        return math.lcm(*(Fraction(share).limit_denominator(10_000).denominator for share in self.prefixes))

    def resolved(self, d_in: int) -> "TrainConfig":
        """The same settings with everything worked out that was None.

        Args:
            d_in: width of what an autoencoder reads.
        """
        chosen = dict(self._defaults)
        if self.architecture in TOP_K:
            # Gao et al. 2024, section 3: 2e-4 at 2^14 features, by 1 / √features.
            chosen |= {"learning_rate": 2e-4 / math.sqrt(self.d_sae / 2**14), "k_aux": d_in // 2}
        chosen["sparsity_warm_up"] = chosen.pop("warm_up", 0.0)
        chosen.pop("scale")
        chosen |= {
            "target": "mlp_out" if self.transcodes else None,
            "dead_after": min(10_000_000, self.n_tokens // 20),
            "eval_every": self.n_tokens // 20,
            "checkpoint_every": self.n_tokens // 10,
        }
        return TrainConfig(**_values(self) | {name: v for name, v in chosen.items() if getattr(self, name) is None})

    # On disk

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """From plain values. Raises UserError for unknown keys, or values that are not valid."""
        unknown = sorted(set(values) - {one.name for one in fields(cls)})
        _require(not unknown, f"unknown settings of a training run: {', '.join(unknown)}")
        _require("model" in values, "settings of a training run name a model; found none")
        return cls(**values)

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        if self.out is not None:
            return self.out
        values = {name: value for name, value in self.to_json().items() if name != "out"}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return Path("runs/sae") / digest[:12]


def _values(config: TrainConfig) -> dict[str, Any]:
    return {one.name: getattr(config, one.name) for one in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _several(name: str, value: Any, make: type | None) -> tuple[Any, ...]:
    """A tuple, also of one value."""
    alone = isinstance(value, str | Path | int | float)
    try:
        return tuple(one if make is None else make(one) for one in ([value] if alone else value))
    except TypeError:
        raise UserError(f"{name} must be one value or several; found {value!r}") from None


def _require_type(name: str, value: Any, types: tuple[Any, ...]) -> None:
    accepted = types + ((int,) if float in types else ())
    words = " or ".join("None" if one is NoneType else one.__name__ for one in types)
    _require(type(value) in accepted, f"{name} must be {words}; found {value!r}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
