"""The `mechinterp` command: its grammar, and the checks that need no torch.

Each subcommand is a frozen dataclass: a field is a flag, the string below it is its help. `check_flags` looks at files
and flags; only then `run` imports commands.py, and with it torch, so that `--help` and a wrong flag answer at once.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from mechinterp import __version__
from mechinterp.errors import UserError
from mechinterp.pairs_file import read_pairs_file

# The names that the library knows, repeated here because their modules import torch; a test holds them equal.
SiteName = Literal[
    "resid_pre", "q_input", "k_input", "v_input", "ln1_scale", "q", "k", "v", "rot_q", "rot_k", "attn_scores",
    "pattern", "z", "ln1_post_scale", "attn_out", "resid_mid", "mlp_in", "ln2_scale", "mlp_pre", "mlp_pre_linear",
    "mlp_post", "ln2_post_scale", "mlp_out", "resid_post",
]  # fmt: skip
MetricName = Literal["logit-diff", "prob", "logprob", "seq-logprob", "rank", "kl"]
Direction = Literal["denoise", "noise"]
TaskName = Literal["ioi", "induction"]
Corruption = Literal["swapped-subject", "new-names"]
DTypeName = Literal["float32", "float16", "bfloat16"]

Switch = FlagCreatePairsOff[bool]  # a flag without its opposite
OutputFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
DESCRIPTION = (
    "Mechanistic interpretability of transformers: patch, measure, and be told how far to believe it. "
    "`mechinterp --version` prints the version."
)


@dataclass(frozen=True)
class OnModel:
    """What every command that loads a model takes."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A name (`mechinterp models` lists those that are here), a model folder, a GGUF file, or a hub name."""
    device: Annotated[str | None, tyro.conf.arg(metavar="DEVICE")] = None
    """cpu, cuda, cuda:1, mps. By default CUDA where there is one."""
    dtype: DTypeName = "float32"
    """Type of the weights."""
    bos: Switch = False
    """Put a BOS in front of text. Without --bos and --no-bos: where the model's own tokenizer does."""
    no_bos: Switch = False
    """Put no BOS in front of text."""
    process: bool = False
    """Fold norms and biases and centre the weights, as TransformerLens does by default."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REVISION")] = None
    """Branch, tag or commit of a hub name."""

    @property
    def prepend_bos(self) -> bool | None:
        """Whether to prepend a BOS; None follows the tokenizer."""
        return True if self.bos else False if self.no_bos else None

    def check_flags(self) -> None:
        """Raise UserError for flags that contradict each other."""
        if self.bos and self.no_bos:
            raise UserError("--bos and --no-bos were both given; give one, or neither for the tokenizer's own default")


@dataclass(frozen=True)
class Check(OnModel):
    """Test the identities that every analysis rests on, on any model. Exits with 1 if one fails."""

    n: int = 3
    """Prompts of random tokens."""
    seed: int = 0
    """Seed of the tokens."""
    json: OutputFile = None
    """Write the table here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags."""
        super().check_flags()
        _require(self.n >= 1, f"--n must be at least 1; found {self.n}")
        check_outputs(self.json)

    def run(self, command: str) -> int:
        """Do it; the exit code."""
        from mechinterp import commands

        return commands.check(self)


@dataclass(frozen=True)
class Sites(OnModel):
    """List the activations of a model that can be read and patched: shape, layers, meaning."""

    json: OutputFile = None
    """Write the table here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags."""
        super().check_flags()
        check_outputs(self.json)

    def run(self, command: str) -> int:
        """Do it; the exit code."""
        from mechinterp import commands

        return commands.sites(self)


@dataclass(frozen=True)
class Models:
    """List the models that have a name here, and whether they need a download."""

    refetch: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Fetch an embedded model again, and replace the cached one."""
    json: OutputFile = None
    """Write the table here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags."""
        check_outputs(self.json)

    def run(self, command: str) -> int:
        """Do it; the exit code."""
        from mechinterp import commands

        return commands.models(self)


@dataclass(frozen=True)
class Patch(OnModel):
    """Patch every cell of a site, one at a time: effects with intervals and controls."""

    pairs: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Prompt pairs as JSON lines: clean, corrupted, answer, wrong, and optionally roles and targets."""
    task: Annotated[TaskName | None, tyro.conf.arg(metavar="{ioi,induction}")] = None
    """Make prompt pairs, instead of --pairs."""
    n: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """How many pairs: of a task 32 by default; of a file all, or its first INT."""
    seed: int = 0
    """Seed of the pairs, the intervals and the controls."""
    corruption: Annotated[Corruption | None, tyro.conf.arg(metavar="{swapped-subject,new-names}")] = None
    """How --task ioi makes the corrupted prompts; swapped-subject by default."""
    site: SiteName = "z"
    """What to patch (`mechinterp sites MODEL` says what each one is, and which the model has)."""
    positions: str = "all"
    """all (the whole activation at once), each, last, roles (each in turn), role names (END,S2), or indices (0,-1)."""
    direction: Direction = "denoise"
    """denoise puts clean activations into the corrupted run, noise the reverse."""
    metric: MetricName = "logit-diff"
    """What to measure."""
    layers: Annotated[str | None, tyro.conf.arg(metavar="LAYERS")] = None
    """Which layers, such as 3,4,8-11; all by default."""
    json: OutputFile = None
    """Write effects, intervals, controls and the values of every prompt here."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""
    force: Switch = False
    """Sweep although the model does not do the task."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, an unreadable pairs file, or outputs that cannot be written."""
        super().check_flags()
        _require((self.pairs is None) != (self.task is None), "give the prompt pairs: either --pairs FILE or --task")
        _require(self.n is None or self.n >= 1, f"--n must be at least 1; found {self.n}")
        if self.corruption is not None:
            _require(self.task == "ioi", f"--corruption {self.corruption} is for --task ioi only")
        parse_layers(self.layers)
        check_outputs(self.json, self.html)
        if self.pairs is not None:
            found = len(read_pairs_file(self.pairs))
            _require((self.n or 1) <= found, f"--n {self.n} was asked for, but {self.pairs} holds {found} pairs")

    def run(self, command: str) -> int:
        """Do it; the exit code."""
        from mechinterp import commands

        return commands.patch(self, command)


@dataclass(frozen=True)
class Report:
    """Build report.html of a run folder again, and print its path."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run: runs/EXPERIMENT/ID."""

    def check_flags(self) -> None:
        """Raise UserError if there is no such folder."""
        _require(self.run_folder.is_dir(), f"there is no run folder at {self.run_folder.absolute()}")

    def run(self, command: str) -> int:
        """Do it; the exit code."""
        from mechinterp import commands

        return commands.report(self)


Command = (
    Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Sites, tyro.conf.subcommand("sites")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Patch, tyro.conf.subcommand("patch")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def parse_layers(text: str | None) -> list[int] | None:
    """`3,4,8-11` as numbers; negative ones count from the end. None stays None. Raises UserError for anything else."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part.strip())
        _require(found is not None, f"--layers takes numbers and ranges such as 3,4,8-11; found {text!r}")
        assert found is not None
        first = int(found[1])
        layers += range(first, int(found[2]) + 1) if found[2] else [first]
    _require(len(set(layers)) == len(layers) > 0, f"--layers {text} names a layer twice, or none")
    return layers


def check_outputs(*paths: Path | None) -> None:
    """Raise UserError for a file that could not be written after the work is done."""
    wanted = [path.absolute() for path in paths if path is not None]
    _require(len(set(wanted)) == len(wanted), f"two outputs would be written to {wanted[0] if wanted else ''}")
    for path in wanted:
        _require(path.parent.is_dir(), f"cannot write {path}: there is no folder {path.parent}")
        _require(not path.is_dir(), f"cannot write {path}: it is a folder")
        writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
        _require(writable, f"cannot write {path}: permission denied")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; by default the process's own). Returns the exit code.

    0: done. 1: `check` found an identity that fails. 2: bad input, said in one message on stderr. 130: interrupted.
    Wrong flags and `--help` leave through SystemExit, as argparse does.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given == ["--version"]:
        print(f"mechinterp {__version__}")
        return 0
    asked = tyro.cli(Command, prog="mechinterp", description=DESCRIPTION, args=given or ["--help"])
    try:
        asked.check_flags()
        return asked.run(shlex.join(["mechinterp", *given]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
