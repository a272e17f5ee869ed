"""The subcommands of `mechinterp sae`: train, evaluate, features, convert, harvest."""

import os
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from mechinterp.cli.flags import Command, ModelFlags, OutputFile, Switch, check_outputs, require
from mechinterp.sae.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig, Command):
    """The settings of a training run as flags.

    They are checked by `config` and not while they are parsed: the parser takes any ValueError for one of its own, and
    shows it in a box, in front of which it says something else.
    """

    def __post_init__(self) -> None:
        """Nothing yet."""

    @property
    def config(self) -> TrainConfig:
        """The settings without the flags of the command. Raises UserError for those that are not valid."""
        return TrainConfig(**{one.name: getattr(self, one.name) for one in fields(TrainConfig)})

    def check_flags(self) -> None:
        """Raise UserError for settings that are not valid, or a folder that cannot be made."""
        folder = self.config.folder.absolute()
        above = next(one for one in (folder, *folder.parents) if one.exists())
        require(above.is_dir(), f"cannot write {folder}: {above} is a file")
        require(os.access(above, os.W_OK | os.X_OK), f"cannot write {folder}: no permission to write into {above}")


@dataclass(frozen=True, kw_only=True)
class SaeTrain(TrainFlags):
    """Train sparse autoencoders on text; the folder says what they were trained by, and can be resumed."""

    resume: Switch = False
    """Continue from the newest checkpoint in --out; the final weights are those of a run that never stopped."""


@dataclass(frozen=True, kw_only=True)
class SaeHarvest(TrainFlags):
    """Write the activations that a training run would read to disk, --n-tokens of them, into --out."""

    store_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the numbers on disk."""
    shard_tokens: int = 131_072
    """Tokens of a shard."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, or a folder that is missing or cannot be made."""
        super().check_flags()
        require(self.out is not None, "give the folder to write activations to: --out FOLDER")
        require(self.store is None, "--store is for sae train; a harvest writes to --out")
        require(self.shard_tokens >= 1, f"--shard-tokens must be at least 1; found {self.shard_tokens}")


@dataclass(frozen=True, kw_only=True)
class OnText(ModelFlags):
    """What runs an autoencoder in its model, on text."""

    folder: Annotated[Positional[str], tyro.conf.arg(metavar="DIR")]
    """A run's folder, a folder of SAELens, sparsify or dictionary_learning, or a hub name (owner/name:folder)."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Where the model is, if not under the name that the autoencoder says."""
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE")] = ()
    """Text that it was not trained on: files, or .jsonl files with a text a line."""
    dataset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A hub data set instead."""
    split: str = "train"
    """Of the data set."""
    column: str = "text"
    """Of the data set, or the field of a .jsonl file."""
    blocks: int = 64
    """Token blocks at most."""
    length: int | None = None
    """Tokens of a block; those of the training by default, or 128."""
    seed: int = 0
    """Of the draws and the intervals."""

    def check_flags(self) -> None:
        """Raise UserError for flags that contradict each other, or text that is not there."""
        super().check_flags()
        require(bool(self.text) != bool(self.dataset), "give the text: either --text FILE … or --dataset NAME")
        for path in self.text:
            require(path.is_file(), f"no such text file: {path}")
        require(self.blocks >= 1, f"--blocks must be at least 1; found {self.blocks}")
        require(self.length is None or self.length >= 2, f"--length must be at least 2; found {self.length}")


@dataclass(frozen=True, kw_only=True)
class SaeEvaluate(OnText):
    """Sparsity, error, and what is lost when it is spliced into the model, on held-out text, with intervals."""

    json: OutputFile = None
    """Write every number, with its interval, here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or an output that cannot be written."""
        super().check_flags()
        check_outputs(self.json)


@dataclass(frozen=True, kw_only=True)
class SaeFeatures(OnText):
    """What features are about: contexts, density, logits that they write, neighbours."""

    n: int = 100
    """Features to describe: half of the largest total activation, half drawn."""
    features: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT")] = ()
    """Or these."""
    html: OutputFile = None
    """Write a dashboard here: one file that opens offline."""
    json: OutputFile = None
    """Write the same as data here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or outputs that cannot be written."""
        super().check_flags()
        require(self.n >= 1, f"--n must be at least 1; found {self.n}")
        check_outputs(self.html, self.json)


@dataclass(frozen=True)
class SaeConvert(Command):
    """Write an autoencoder in another tool's format."""

    folder: Annotated[Positional[str], tyro.conf.arg(metavar="DIR")]
    """A run's folder, a folder of SAELens, sparsify or dictionary_learning, or a hub name (owner/name:folder)."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write."""
    to: Literal["saelens", "sparsify"] = "saelens"
    """The format."""

    def check_flags(self) -> None:
        """Raise UserError for a folder that cannot be made."""
        require(self.out.absolute().parent.is_dir(), f"cannot write {self.out}: there is no folder above it")


@dataclass(frozen=True)
class Sae(Command):
    """Train sparse autoencoders, and use them."""

    action: (
        Annotated[SaeTrain, tyro.conf.subcommand("train")]
        | Annotated[SaeEvaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[SaeFeatures, tyro.conf.subcommand("features")]
        | Annotated[SaeConvert, tyro.conf.subcommand("convert")]
        | Annotated[SaeHarvest, tyro.conf.subcommand("harvest")]
    )

    def check_flags(self) -> None:
        """Raise UserError for wrong flags of the action."""
        self.action.check_flags()

    def run(self, command: str) -> int:
        """Do it; the exit code."""
        module = import_module("mechinterp.commands.sae")
        actions = {
            SaeTrain: module.train,
            SaeEvaluate: module.evaluate,
            SaeFeatures: module.features,
            SaeConvert: module.convert,
            SaeHarvest: module.harvest,
        }
        return actions[type(self.action)](self.action, command)
