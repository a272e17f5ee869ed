"""Subcommands that analyse: patch, lens, dla, heads, ablate, attention, steer."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from mechinterp.cli.flags import (
    Direction,
    MetricName,
    OnPairs,
    OutputFile,
    SiteName,
    Switch,
    check_outputs,
    parse_layers,
)


@dataclass(frozen=True)
class Patch(OnPairs):
    """Patch every cell of a site, one at a time: effects with intervals and controls."""

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
        parse_layers(self.layers)
        check_outputs(self.json, self.html)
