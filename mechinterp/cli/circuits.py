"""The subcommands of `mechinterp circuit`: find, evaluate, show."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from mechinterp.circuit_file import read_header
from mechinterp.cli.flags import (
    Command,
    Direction,
    MetricName,
    ModelFlags,
    OnPairs,
    OutputFile,
    PairsFlags,
    Switch,
    check_outputs,
    require,
)

# The names that the library knows, repeated here because their modules import torch; a test holds them equal.
MethodName = Literal[
    "eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact", "exact-nodes", "atp-star", "hisp", "ifr", "acdc",
    "learned-mask",
]  # fmt: skip
AblationName = Literal["resample", "zero", "mean"]
Rule = Literal["midpoint", "left", "right"]
WITH_STEPS = ("eap-ig", "eap-ig-activations")


@dataclass(frozen=True, kw_only=True)
class CircuitFind(OnPairs):
    """Score every edge (or node) on prompt pairs, and the control rankings beside it."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Write scores and control rankings here: a JSON file that explains itself."""
    method: MethodName = "eap-ig"
    """How units are scored."""
    ablation: AblationName = "resample"
    """What cut edges carry: the other run's activations, nothing, or means over the corrupted prompts."""
    direction: Direction = "noise"
    """noise ablates edges of the clean run, denoise restores edges of the corrupted run."""
    metric: MetricName = "logit-diff"
    """What edges are scored by."""
    steps: int | None = None
    """Points of an integrated gradient; 5 by default."""
    rule: Rule | None = None
    """Where they lie in their steps; midpoint by default, left and right as published code has them."""
    threshold: float | None = None
    """Of acdc: the change of the metric below which an edge is removed."""
    qkv: Literal["kv_group", "ungrouped", "merged"] = "kv_group"
    """Inputs of attention: as the model has them, keys and values for each query head, or one for each group."""
    mlp: Literal["layer", "neuron"] = "layer"
    """An MLP is one source, or each of its neurons."""
    positions: Literal["none", "all", "roles"] = "none"
    """Tell edges apart by position or role."""
    no_controls: Switch = False
    """Leave the control rankings out, which cost the search twice more."""
    force: Switch = False
    """Search although the model does not do the task."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, an unreadable pairs file, or an output that cannot be written."""
        super().check_flags()
        for name in ("steps", "rule"):
            given = getattr(self, name) is not None
            require(not given or self.method in WITH_STEPS, f"--{name} is for --method {' and '.join(WITH_STEPS)}")
        require(self.steps is None or self.steps >= 1, f"--steps must be at least 1; found {self.steps}")
        require(self.threshold is None or self.method == "acdc", "--threshold is for --method acdc")
        check_outputs(self.out)


@dataclass(frozen=True, kw_only=True)
class CircuitEvaluate(PairsFlags, ModelFlags):
    """How faithful circuits of every size are, on held-out pairs, beside controls."""

    file: Annotated[Positional[Path], tyro.conf.arg(metavar="CIRCUIT.JSON")]
    """Scores (or one circuit, which has a faithfulness and no curve)."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Where the model is, if not under the name that the file says."""
    any_weights: Switch = False
    """Evaluate on a model of the same shape and tokenizer with other weights."""
    control_sizes: str = "0.02"
    """Shares of the edges at which controls are evaluated, such as 0.02,0.1."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""
    json: OutputFile = None
    """Write curves, areas, intervals and controls here."""

    @property
    def sizes(self) -> tuple[float, ...]:
        """Of the controls."""
        try:
            sizes = tuple(float(part) for part in self.control_sizes.split(","))
        except ValueError:
            sizes = ()
        good = bool(sizes) and all(0 < size <= 1 for size in sizes)
        require(good, f"--control-sizes takes shares such as 0.02,0.1; found {self.control_sizes!r}")
        return sizes

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, an unreadable file, or outputs that cannot be written."""
        super().check_flags()
        assert self.sizes
        read_header(self.file)
        check_outputs(self.json, self.html)


@dataclass(frozen=True)
class CircuitShow(Command):
    """Print what a circuit file says, without loading its model."""

    file: Annotated[Positional[Path], tyro.conf.arg(metavar="CIRCUIT.JSON")]
    """Scores or a circuit."""
    top: int = 12
    """How many edges to print, of largest absolute score."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or an unreadable file."""
        require(self.top >= 1, f"--top must be at least 1; found {self.top}")


@dataclass(frozen=True)
class Circuit(Command):
    """Find the subgraph that computes a behaviour, and say how far to believe it."""

    action: (
        Annotated[CircuitFind, tyro.conf.subcommand("find")]
        | Annotated[CircuitEvaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[CircuitShow, tyro.conf.subcommand("show")]
    )

    def check_flags(self) -> None:
        """Raise UserError for wrong flags of the action."""
        self.action.check_flags()

    def run(self, command: str) -> int:
        """Do it; the exit code."""
        module = import_module("mechinterp.commands.circuit")
        actions = {CircuitFind: module.find, CircuitEvaluate: module.evaluate, CircuitShow: module.show}
        return actions[type(self.action)](self.action, command)
