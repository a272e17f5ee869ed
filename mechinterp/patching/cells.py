"""The cells of a sweep, and the runner that patches them with as little work as possible."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, read_logits
from mechinterp.hooked import schedule, suffix
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Recording
from mechinterp.metrics import Metric
from mechinterp.tasks.pairs import PromptPairs

Where = str | int | Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class Spot:
    """A set of positions: its label, and `[prompt pos]` bool."""

    label: str | int
    mask: Tensor


@dataclass(frozen=True)
class Cell:
    """One thing to patch: a layer, a head where the site has heads, and the number of a spot."""

    layer: int
    head: int | None
    spot: int


def spots(pairs: PromptPairs, positions: Where) -> tuple[str | None, list[Spot]]:
    """The axis that `positions` make (`pos`, `role` or None) and its spots.

    Raises:
        UserError: positions of no known kind, unknown roles, or "each" for prompts of several lengths.
    """
    prompts = pairs.clean
    # Positions are the prompt's own: of an answer that teacher forcing appended nothing is patched.
    ends = prompts.n_pos - (torch.zeros(len(pairs), dtype=torch.long) if pairs.appended is None else pairs.appended)
    places = torch.arange(prompts.n_pos)
    if positions == "all":
        return None, [Spot("all", prompts.real.cpu() & (places < ends[:, None]))]
    if positions == "last":
        return None, [Spot("last", places == ends[:, None] - 1)]
    if positions == "each":
        if prompts.mask is not None or len(ends.unique()) > 1:
            raise UserError("positions 'each' needs prompts of one length; valid here: all, last, roles, role names")
        return "pos", [Spot(i, prompts.select(i)) for i in range(int(ends[0]))]
    if positions == "roles":
        if not pairs.roles:
            raise UserError("positions 'roles' needs a task with roles; these pairs have none. Valid: all, each, last")
        named: list[str | int] = list(pairs.roles)
    elif isinstance(positions, str):
        named = [int(p) if p.strip().lstrip("-").isdigit() else p.strip() for p in positions.split(",")]
    else:
        named = [positions] if isinstance(positions, int) else list(positions)
    if not named:
        raise UserError("no positions given; valid: all, each, last, roles, role names, indices")
    if all(isinstance(one, int) for one in named):
        counted = torch.tensor(named).expand(len(pairs), -1)
        counted = torch.where(counted < 0, counted + (ends - prompts.n_pos)[:, None], counted)
        return "pos", [Spot(one, prompts.select(at)) for one, at in zip(named, counted.T, strict=True)]
    unknown = [one for one in named if one not in pairs.roles]
    if unknown:
        roles = ", ".join(pairs.roles) or "none"
        raise UserError(f"unknown positions {unknown[0]!r}; valid: all, each, last, roles, indices, or roles: {roles}")
    return "role", [Spot(one, prompts.at_role(cast(str, one))) for one in named]


@dataclass
class Recordings:
    """Recorded runs of a sweep. Where memory holds all prompts at once, a run whose metric was read is not repeated.

    Attributes:
        sites: what every recording keeps.
        folds: whether prompts may be run apart from each other.
    """

    model: HookedModel
    sites: Sequence[Site]
    folds: bool
    _whole: dict[int, Recording] = field(default_factory=dict)  # by the identity of the prompts

    def at_once(self, prompts: Prompts) -> int:
        """Prompts of a recording."""
        fits = schedule.prompts_to_record(self.model, prompts.n_pos, len(self.sites))
        return min(fits, len(prompts)) if self.folds else len(prompts)

    def of(self, prompts: Prompts, index: Tensor) -> Recording:
        """The recording of the prompts at `index`."""
        return self._whole.get(id(prompts)) or suffix.record(self.model, prompts, self.sites, index)

    def logits(self, prompts: Prompts, read: suffix.Read) -> Tensor:
        """`[prompt target column]` of the unpatched run, on the CPU; the recording is kept if it is whole."""
        if self.at_once(prompts) < len(prompts):
            return read_logits(self.model, prompts, read)
        recording = self._whole[id(prompts)] = self.of(prompts, torch.arange(len(prompts)))
        parts = chunks(self.model, len(prompts), prompts.n_pos, read.columns is None)
        return torch.cat([recording.base_logits(read, index).cpu() for index in parts])


@dataclass
class CellRunner:
    """Patches cells of one site into a base run, from any source prompts.

    Attributes:
        recordings: of the base run and of the sources.
        base: `[prompt]` metric of the base run: the value of every row that is not run.
        clean: logits of the clean run for metrics that compare with it.
        rows_run, rows_identical: (cell, prompt) rows that were run, and that needed no run.
    """

    model: HookedModel
    pairs: PromptPairs
    metric: Metric
    prompts: Prompts
    recordings: Recordings
    spots: Sequence[Spot]
    base: Tensor
    clean: Tensor | None
    max_tokens: int | None = None
    rows_run: int = 0
    rows_identical: int = 0

    def __post_init__(self) -> None:
        self.read, self.sites = self.metric.read(self.pairs), self.recordings.sites

    def run(self, cells: Sequence[Cell], source: Prompts, label: str | None = None) -> Tensor:
        """`[cell prompt]` metric of the base run with each cell set to its activation in `source`."""
        values = self.base.expand(len(cells), -1).clone()
        n = len(self.prompts)
        with tqdm(total=len(cells) * n, desc=label, disable=label is None, unit="run") as bar:
            for index in torch.arange(n).split(self.recordings.at_once(self.prompts)):
                recording = self.recordings.of(self.prompts, index)
                sources = self.recordings.of(source, index).activations
                self._run_recorded(recording, sources, cells, values, bar)
        return values

    def _run_recorded(
        self, recording: Recording, sources: dict[str, Tensor], cells: Sequence[Cell], values: Tensor, bar: tqdm
    ) -> None:
        """Fill `values` for the recorded prompts."""
        starts = self._starts(recording, sources, cells)
        layers = torch.tensor([cell.layer for cell in cells])
        left = starts.numel()

        def edits_of(cases: Tensor) -> dict[str, suffix.Edit]:
            these = [cells[i] for i in cases.tolist()]
            among = {cell.layer for cell in these}
            here = [site for site in self.sites if site.layer in among]
            return {site.hook_name: self._edit(sources[site.hook_name], site, these, recording) for site in here}

        calls = replay(
            recording, self.read, layers, starts, edits_of, folds=self.recordings.folds, max_tokens=self.max_tokens
        )
        for cases, prompts, logits in calls:
            clean = None if self.clean is None else self.clean[prompts]
            values[cases, prompts] = self.metric(logits, self.pairs.answers.take(prompts), clean).to(values)
            self.rows_run += len(cases)
            left -= len(cases)
            bar.update(len(cases))
        self.rows_identical += left
        bar.update(left)

    def _starts(self, recording: Recording, sources: dict[str, Tensor], cells: Sequence[Cell]) -> Tensor:
        """`[cell batch]` first position that patching the cell changes; n_pos where it changes nothing."""
        index, n_pos = recording.index.cpu(), self.prompts.n_pos
        starts = torch.full((len(cells), len(index)), n_pos)
        for site in self.sites:
            chosen = [i for i, cell in enumerate(cells) if cell.layer == site.layer]
            if not chosen:
                continue
            source = sources[site.hook_name]
            if source.isnan().any():
                raise UserError(f"the source of the patch holds NaN at {site}")
            changed = self._changed(recording.activations[site.hook_name], source, site).cpu()
            for i in chosen:
                touched = self._touched(changed, cells[i], index)
                starts[i] = torch.where(touched.any(-1), touched.int().argmax(-1), n_pos)
        return starts

    def _changed(self, base: Tensor, source: Tensor, site: Site) -> Tensor:
        """`[batch pos head]` bool (one head where the site has none): where the two activations differ."""
        differs = (base != source).any(-1)
        if site.kind.head_axis is None:
            return differs[..., None]
        return differs.transpose(1, 2) if site.kind.dim(site.kind.head_axis) == 1 else differs

    def _touched(self, changed: Tensor, cell: Cell, index: Tensor) -> Tensor:
        """`[batch pos]` bool: where patching the cell changes something."""
        return changed[:, :, cell.head or 0] & self.spots[cell.spot].mask[index]

    def _edit(self, source: Tensor, site: Site, cells: Sequence[Cell], recording: Recording) -> suffix.Edit:
        """The function that puts the cells of a site's layer in place; `cells` are those of all rows, by layer."""
        kind = site.kind
        pos_dim = kind.dim(kind.pos_axis)
        masks = torch.stack([spot.mask for spot in self.spots])
        first = bisect_left(cells, site.layer or 0, key=lambda cell: cell.layer)
        last = bisect_right(cells, site.layer or 0, key=lambda cell: cell.layer)
        spot = torch.tensor([cell.spot for cell in cells[first:last]])
        head = torch.tensor([cell.head or 0 for cell in cells[first:last]])

        def edit(activation: Tensor, rows: Rows) -> Tensor:
            here, old = replace(rows, index=rows.index[first:last]), activation[first:last]
            at = masks[spot, here.index.cpu()][:, rows.start :].to(old.device)
            selected = at.reshape([at.shape[d and 1] if d in (0, pos_dim) else 1 for d in range(old.ndim)])
            if kind.head_axis is not None:
                head_dim = kind.dim(kind.head_axis)
                heads = head[:, None] == torch.arange(old.shape[head_dim])
                shape = [heads.shape[d and 1] if d in (0, head_dim) else 1 for d in range(old.ndim)]
                selected = selected & heads.to(old.device).reshape(shape)
            new = torch.where(selected, recording.local(here).of(source, pos_dim).to(old), old)
            return torch.cat([activation[:first], new, activation[last:]])

        return edit
