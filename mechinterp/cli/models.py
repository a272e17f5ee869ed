"""Subcommands on models and runs: check, sites, models, report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from mechinterp.cli.flags import Command, OnModel, OutputFile, check_outputs, require


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
        require(self.n >= 1, f"--n must be at least 1; found {self.n}")
        check_outputs(self.json)


@dataclass(frozen=True)
class Sites(OnModel):
    """List the activations of a model that can be read and patched: shape, layers, meaning."""

    json: OutputFile = None
    """Write the table here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags."""
        super().check_flags()
        check_outputs(self.json)


@dataclass(frozen=True)
class Models(Command):
    """List the models that have a name here, and whether they need a download."""

    refetch: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Fetch an embedded model again, and replace the cached one."""
    json: OutputFile = None
    """Write the table here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags."""
        check_outputs(self.json)


@dataclass(frozen=True)
class Report(Command):
    """Build report.html of a run folder again, and print its path."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run: runs/EXPERIMENT/ID."""

    def check_flags(self) -> None:
        """Raise UserError if there is no such folder."""
        require(self.run_folder.is_dir(), f"there is no run folder at {self.run_folder.absolute()}")
