"""Noised runs with activations put back: the rows of a causal trace, with as little work as possible.

1. The run that activations come from is recorded once, without noise; it keeps the site in every layer.
2. Each draw of noise is a run of its own, recorded once under that noise.
3. A cell is a window of layers and, in each prompt, one position. Its row joins the noised run at the first layer of
   the window and at that position (hooked/replays.py); in every layer of the window the activation there is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks
from mechinterp.hooked import schedule, suffix
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Noise, Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Recording
from mechinterp.metrics import Metric
from mechinterp.tasks.pairs import PromptPairs


@dataclass(frozen=True, eq=False)
class Cells:
    """What is put back, one cell at a time.

    Attributes:
        windows: of each cell, the first and the last layer.
        at: `[cell prompt]` position, padding counted; n_pos or more where the cell puts nothing back.
    """

    windows: Sequence[tuple[int, int]]
    at: Tensor


@dataclass
class Restorer:
    """Runs prompts clean, noised, and noised with activations put back.

    Attributes:
        metric: of every run; `pairs` are those that it prepared.
        site: what is put back.
        noises: the draws.
        reference: logits of the clean run `[prompt target column]`, once `clean` was called.
    """

    model: HookedModel
    pairs: PromptPairs
    metric: Metric
    site: str
    noises: Sequence[Noise]
    max_tokens: int | None = None
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        self.read = self.metric.read(self.pairs)
        # A plain function, in force or as the metric, must see every prompt, in order, from the first position.
        in_force = all(bound.intervention.folds for bound in self.model.in_force)
        self.folds = in_force and self.read.positions is not None

    def metric_of(self, prompts: Prompts) -> Tensor:
        """`[prompt]` metric of prompts without noise; the first call gives the reference of the metric."""
        parts = [self._base_logits(suffix.record(self.model, prompts, (), index)) for index in self._parts(0)]
        logits = torch.cat(parts)
        self.reference = logits if self.reference is None else self.reference
        return self._metric(logits, torch.arange(len(prompts)))

    def noised(self) -> Tensor:
        """`[draw prompt]` metric of the noised runs."""
        made = torch.empty(len(self.noises), len(self.pairs))
        for index in self._parts(0):
            for draw, noise in enumerate(self.noises):
                made[draw, index] = self._metric(self._base_logits(self._record(noise, index)), index)
        return made

    def run(self, cells: Cells, source: Prompts, label: str | None = None) -> Tensor:
        """`[draw cell prompt]` metric of the noised runs with each cell put back.

        Args:
            cells: what is put back.
            source: prompts that activations come from, position by position.
            label: of the progress bar; None shows none.
        """
        noised = self.noised()
        restored = noised[:, None].expand(-1, len(cells.at), -1).clone()
        layers = sorted({layer for first, last in cells.windows for layer in range(first, last + 1)})
        sites = [self.model.resolve(Site(self.site, layer), write=True) for layer in layers]
        with tqdm(total=restored.numel(), desc=label, disable=label is None, unit="run") as bar:
            for index in self._parts(len(sites)):
                kept = suffix.record(self.model, source, sites, index).activations
                values = {site.layer or 0: kept[site.hook_name] for site in sites}
                if any(value.isnan().any() for value in values.values()):
                    raise UserError(f"the activations to put back hold NaN at {self.site}")
                for draw, noise in enumerate(self.noises):
                    self._restore(self._record(noise, index), values, cells, restored[draw], bar)
        return restored

    def _record(self, noise: Noise, index: Tensor) -> Recording:
        with self.model.intervene(noise):
            return suffix.record(self.model, self.pairs.clean, (), index)

    def _parts(self, n_sites: int) -> Sequence[Tensor]:
        """Consecutive prompts that are recorded at once."""
        n = len(self.pairs)
        fits = schedule.prompts_to_record(self.model, self.pairs.clean.n_pos, n_sites) if self.folds else n
        return torch.arange(n).split(min(n, fits))

    def _base_logits(self, recording: Recording) -> Tensor:
        """`[batch target column]` of a recorded run as it is."""
        index, n_pos = recording.index.cpu(), recording.prompts.n_pos
        parts = chunks(self.model, len(index), n_pos, self.read.columns is None) if self.folds else [index]
        return torch.cat([recording.base_logits(self.read, index[part]).cpu() for part in parts])

    def _metric(self, logits: Tensor, prompts: Tensor) -> Tensor:
        reference = None if self.reference is None else self.reference[prompts]
        return self.metric(logits, self.pairs.answers.take(prompts), reference).float()

    def _restore(self, recording: Recording, values: dict[int, Tensor], cells: Cells, made: Tensor, bar: tqdm) -> None:
        """Fill `made` `[cell prompt]` for the recorded prompts."""
        starts = cells.at[:, recording.index.cpu()]
        firsts = torch.tensor([first for first, _ in cells.windows])
        lasts = torch.tensor([last for _, last in cells.windows])

        def edits_of(rows: Tensor) -> dict[str, Edit]:
            first, last = firsts[rows], lasts[rows]
            return {
                Site(self.site, layer).hook_name: self._edit(value, rows[here], here, cells.at, recording)
                for layer, value in values.items()
                if len(here := ((first <= layer) & (layer <= last)).nonzero().flatten())
            }

        calls = replay(recording, self.read, firsts, starts, edits_of, folds=self.folds, max_tokens=self.max_tokens)
        left = starts.numel()
        for rows, prompts, logits in calls:
            made[rows, prompts] = self._metric(logits, prompts)
            left -= len(rows)
            bar.update(len(rows))
        bar.update(left)

    def _edit(self, value: Tensor, case: Tensor, here: Tensor, at: Tensor, recording: Recording) -> Edit:
        """The function that sets a position of each of the rows `here`, of cells `case`, to `value` `[batch pos …]`."""

        def edit(activation: Tensor, rows: Rows) -> Tensor:
            prompts = rows.index.cpu()[here]
            places = at[case, prompts]
            local = prompts - recording.index.cpu()[0]
            # Without `folds` a cell's call holds all prompts, also those in which it puts nothing back.
            some = places < recording.prompts.n_pos
            new = activation.clone()
            new[here[some], places[some] - rows.start] = value[local[some], places[some]].to(activation)
            return new

        return edit
