"""What the subcommands share: names, flags of a model and of prompt pairs, and checks that need no torch."""

import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from mechinterp.errors import UserError
from mechinterp.pairs_file import read_pairs_file

# The names that the library knows, repeated here because their modules import torch; a test holds them equal.
SiteName = Literal[
    "resid_pre", "q_input", "k_input", "v_input", "ln1_scale", "q", "k", "v", "rot_q", "rot_k", "attn_scores",
    "pattern", "z", "ln1_post_scale", "attn_out", "resid_mid", "mlp_in", "ln2_scale", "mlp_normed", "mlp_pre",
    "mlp_pre_linear", "mlp_post", "ln2_post_scale", "mlp_out", "resid_post",
]  # fmt: skip
MetricName = Literal["logit-diff", "prob", "logprob", "seq-logprob", "rank", "kl"]
Direction = Literal["denoise", "noise"]
TaskName = Literal[
    "ioi", "greater-than", "gendered-pronoun", "agreement", "docstring", "induction", "capitals",
]  # fmt: skip
Corruption = Literal["swapped-subject", "new-names"]
DTypeName = Literal["float32", "float16", "bfloat16"]

Switch = FlagCreatePairsOff[bool]  # a flag without its opposite
OutputFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class Command:
    """A subcommand: a field is a flag, the string below it is its help; commands/<its name>.py does the work."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, before anything slow."""

    def run(self, command: str) -> int:
        """Do it; the exit code. `command` is the command line, for reports."""
        return import_module(f"mechinterp.commands.{type(self).__name__.lower()}").run(self, command)


@dataclass(frozen=True)
class ModelFlags(Command):
    """How a model is loaded."""

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


@dataclass(frozen=True, kw_only=True)
class OnModel(ModelFlags):
    """What every command that loads a model takes."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A name (`mechinterp models` lists those that are here), a model folder, a GGUF file, or a hub name."""


@dataclass(frozen=True)
class PairsFlags(Command):
    """Which prompt pairs to run."""

    pairs: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Prompt pairs as JSON lines: clean, corrupted, answer, wrong, and optionally roles and targets."""
    task: Annotated[TaskName | None, tyro.conf.arg(metavar=f"{{{','.join(get_args(TaskName))}}}")] = None
    """Make prompt pairs, instead of --pairs."""
    n: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """How many pairs: of a task 32 by default; of a file all, or its first INT."""
    seed: int = 0
    """Seed of the pairs, the intervals and the controls."""
    corruption: Annotated[Corruption | None, tyro.conf.arg(metavar="{swapped-subject,new-names}")] = None
    """How --task ioi makes the corrupted prompts; swapped-subject by default."""

    def check_flags(self) -> None:
        """Raise UserError for flags that contradict each other, or an unreadable pairs file."""
        super().check_flags()
        require((self.pairs is None) != (self.task is None), "give the prompt pairs: either --pairs FILE or --task")
        require(self.n is None or self.n >= 1, f"--n must be at least 1; found {self.n}")
        if self.corruption is not None:
            require(self.task == "ioi", f"--corruption {self.corruption} is for --task ioi only")
        if self.pairs is not None:
            found = len(read_pairs_file(self.pairs))
            require((self.n or 1) <= found, f"--n {self.n} was asked for, but {self.pairs} holds {found} pairs")


@dataclass(frozen=True)
class OnPairs(PairsFlags, OnModel):
    """What every command that runs prompt pairs on a model takes."""


def parse_layers(text: str | None, flag: str = "--layers") -> list[int] | None:
    """`3,4,8-11` as numbers; negative ones count from the end. None stays None. Raises UserError for anything else."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part.strip())
        require(found is not None, f"{flag} takes numbers and ranges such as 3,4,8-11; found {text!r}")
        assert found is not None
        first = int(found[1])
        layers += range(first, int(found[2]) + 1) if found[2] else [first]
    require(len(set(layers)) == len(layers) > 0, f"{flag} {text} names a layer twice, or none")
    return layers


def parse_heads(
    text: str | None, flag: str = "--heads", whole_layers: bool = False
) -> list[tuple[int, int | None]] | None:
    """`9.6,10.0` (or `L9H6`) as (layer, head) pairs; with `whole_layers`, `9` is (9, None). None stays None.

    Raises UserError for anything else, and for an empty list.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    found = [re.fullmatch(r"L?(\d+)(?:[.H](\d+))?", part) for part in parts]
    good = bool(parts) and all(one and (one[2] is not None or whole_layers) for one in found)
    require(good, f"{flag} takes layer.index, such as 9.6,10.0; found {text!r}")
    made = [(int(one[1]), None if one[2] is None else int(one[2])) for one in found if one]
    require(len(set(made)) == len(made), f"{flag} {text} names one twice")
    return made


def parse_edges(text: str | None) -> list[tuple[tuple[int, int] | None, str, str]] | None:
    """`9.6:END>IO,*:END>S2` as (head, query role, key role); `*` is None, every head. Raises UserError else."""
    if text is None:
        return None
    edges: list[tuple[tuple[int, int] | None, str, str]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(?:\*|L?(\d+)[.H](\d+))\s*:\s*([^>:]+?)\s*>\s*([^>:]+?)\s*", part)
        require(found is not None, f"--edges takes head:QUERY>KEY, such as 9.6:END>IO or *:END>S2; found {text!r}")
        assert found is not None
        edges.append(((int(found[1]), int(found[2])) if found[1] else None, found[3], found[4]))
    return edges


def parse_strengths(text: str) -> list[float]:
    """`-2,0,2` as numbers. Raises UserError for anything else."""
    try:
        strengths = [float(part) for part in text.split(",")]
    except ValueError:
        strengths = []
    finite = bool(strengths) and all(abs(one) < float("inf") for one in strengths)
    require(finite, f"--strengths takes numbers such as -2,0,2; found {text!r}")
    return strengths


def check_outputs(*paths: Path | None) -> None:
    """Raise UserError for a file that could not be written after the work is done."""
    wanted = [path.absolute() for path in paths if path is not None]
    require(len(set(wanted)) == len(wanted), f"two outputs would be written to {wanted[0] if wanted else ''}")
    for path in wanted:
        require(path.parent.is_dir(), f"cannot write {path}: there is no folder {path.parent}")
        require(not path.is_dir(), f"cannot write {path}: it is a folder")
        writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
        require(writable, f"cannot write {path}: permission denied")


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)
