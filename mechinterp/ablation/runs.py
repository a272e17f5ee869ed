"""Many knock-outs of the same prompts, each exact, both metrics of each from one run.

1. The prompts that means and donors come from are run once; every site of every knock-out is kept (`bind`).
2. The clean prompts are run once and recorded. A knock-out begins at the first layer and, in each prompt, at the first
   position that it sets: only that suffix is run, many knock-outs in one call (hooked/replays.py).
3. Of each run the logits at the answer's positions are read once: the logit difference and P(answer) come from the same
   slice. Where only the logit difference is wanted no other column is unembedded.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks
from mechinterp.hooked import suffix
from mechinterp.hooked.forward import Bound, Edit
from mechinterp.hooked.interventions import Intervention, Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Read
from mechinterp.metrics import LogitDiff, Prob
from mechinterp.patching.cells import Recordings
from mechinterp.tasks.pairs import Answers, PromptPairs

MetricName = Literal["logit_diff", "prob"]
BOTH: tuple[MetricName, ...] = ("logit_diff", "prob")


@dataclass(frozen=True, eq=False)
class Measured:
    """Metrics before and after.

    Attributes:
        names: of the metrics.
        before: `[metric prompt]`.
        after: `[metric set prompt]`, of every knock-out.
    """

    names: tuple[MetricName, ...]
    before: Tensor
    after: Tensor

    def __getitem__(self, name: MetricName) -> tuple[Tensor, Tensor]:
        """`[prompt]` before and `[set prompt]` after, in double precision."""
        at = self.names.index(name)
        return self.before[at].double(), self.after[at].double()


def measure(
    model: HookedModel,
    pairs: PromptPairs,
    sets: Sequence[Sequence[Bound]],
    names: Sequence[MetricName] = BOTH,
    *,
    force: bool = False,
    label: str | None = None,
    max_tokens: int | None = None,
) -> Measured:
    """The metrics of every prompt without and under each set of interventions.

    Args:
        model: the hooked model; interventions in force stay in force.
        pairs: clean prompts and answers.
        sets: interventions that act together, bound (`bind`); an empty set is the run without any.
        names: of the metrics.
        force: go on although the model does not do the task.
        label: of the progress bar; None shows none.
        max_tokens: rows × positions of a call; by default from the free memory.

    Raises:
        UserError: unknown metrics, answers of several tokens or without a wrong one, a model that does not do the task.
    """
    names, read = tuple(names), read_of(pairs, names)
    prompts, n = pairs.clean, len(pairs)
    recordings = Recordings(model, [], all(bound.intervention.folds for bound in model.in_force))
    before = scores(recordings.logits(prompts, read), pairs.answers, names)
    if not force:
        _require_behaviour(names, before)
    starts, layers = _starts(prompts, sets), torch.tensor([_first_layer(one) for one in sets])
    after = before[:, None].repeat(1, len(sets), 1)
    with tqdm(total=int((starts < prompts.n_pos).sum()), desc=label, disable=label is None, unit="run") as bar:
        for index in torch.arange(n).split(recordings.at_once(prompts)):
            recording = recordings.of(prompts, index)
            calls = replay(
                recording, read, layers, starts[:, index], lambda cases: _edits(sets, cases),
                folds=recordings.folds, max_tokens=max_tokens,
            )  # fmt: skip
            for cases, rows, logits in calls:
                after[:, cases, rows] = scores(logits, pairs.answers.take(rows), names)
                bar.update(len(cases))
    return Measured(names, before, after)


def bind(model: HookedModel, sets: Sequence[Sequence[Intervention]], over: Prompts | None) -> list[list[Bound]]:
    """The interventions of all sets on the model; `over`, which their values come from, is run once.

    All of one kind at one hook point must have the same value and positions, but for heads and neurons.
    """
    sites = [[(model.resolve(i.reads), model.resolve(i.writes, write=True)) for i in one] for one in sets]
    taken = list(dict.fromkeys(reads.whole for one in sites for reads, _ in one))
    kept: dict[str, Tensor] = {}

    def capture(prompts: Prompts, site: Site) -> Tensor:
        assert over is not None and prompts is over
        if not kept:
            kept.update(_activations(model, over, taken))
        return kept[site.hook_name]

    states: dict[tuple[type, str], object] = {}
    bound = []
    for interventions, at in zip(sets, sites, strict=True):
        bound.append([])
        for one, (reads, writes) in zip(interventions, at, strict=True):
            key = type(one), reads.hook_name
            if key not in states:
                states[key] = one.prepare(capture)
            bound[-1].append(Bound(one, reads, writes, states[key]))
    return bound


@contextmanager
def under(model: HookedModel, bound: Sequence[Bound]) -> Iterator[None]:
    """Bound interventions in force, after those already in force; `HookedModel.intervene` without binding anew."""
    in_force, model.in_force = model.in_force, [*model.in_force, *bound]
    try:
        yield
    finally:
        model.in_force = in_force


def require_change(bound: Iterable[Bound]) -> None:
    """Raise UserError for an intervention that never fired or changed nothing."""
    for one in bound:
        one.verdict()


def _activations(model: HookedModel, prompts: Prompts, sites: Sequence[Site]) -> dict[str, Tensor]:
    """`[prompt …]` of every site, by hook name, from one run."""
    index = chunks(model, len(prompts), prompts.n_pos, read_vocab=False)
    parts = [suffix.record(model, prompts, sites, part).activations for part in index]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_of(pairs: PromptPairs, names: Sequence[MetricName]) -> Read:
    """What a run must give for these metrics.

    Raises:
        UserError: none or unknown ones, or pairs that they cannot score.
    """
    unknown = [name for name in names if name not in BOTH]
    if unknown or not names:
        raise UserError(f"unknown metrics {unknown or list(names)}; valid: {', '.join(BOTH)}")
    if "logit_diff" in names:
        LogitDiff().prepare(pairs)
    Prob().prepare(pairs)
    return Read(pairs.answers.pos, None if "prob" in names else LogitDiff().columns(pairs.answers))


def scores(logits: Tensor, answers: Answers, names: Sequence[MetricName]) -> Tensor:
    """`[metric batch]` from logits `[batch target column]`: of the whole vocabulary where P(answer) is wanted."""
    made = []
    for name in names:
        columns = LogitDiff().columns(answers)
        if name == "prob":
            made.append(Prob()(logits, answers))
        else:
            made.append(LogitDiff()(logits.gather(-1, columns) if "prob" in names else logits, answers))
    return torch.stack(made)


def _require_behaviour(names: Sequence[MetricName], before: Tensor) -> None:
    if "logit_diff" in names and (mean := float(before[names.index("logit_diff")].mean())) <= 0:
        raise UserError(
            f"the model does not do this task: its mean logit difference is {mean:.3f} (n={before.shape[1]}) before "
            "anything is knocked out. Check the prompts, the answers' leading spaces and the BOS, or go on with "
            "force=True (--force)"
        )


def _first_layer(bounds: Iterable[Bound]) -> int:
    return min((bound.writes.layer or 0 for bound in bounds), default=0)


def _starts(prompts: Prompts, sets: Sequence[Sequence[Bound]]) -> Tensor:
    """`[set prompt]` the first token that a set touches; n_pos where it touches none."""
    real, starts, of = prompts.real.cpu(), [], dict[int, Tensor]()
    for one in sets:
        first = torch.full((len(prompts),), prompts.n_pos)
        for bound in one:
            positions = bound.intervention.positions
            if id(positions) not in of:
                chosen = prompts.select(positions).cpu() & real
                of[id(positions)] = torch.where(chosen.any(-1), chosen.int().argmax(-1), prompts.n_pos)
            first = torch.minimum(first, of[id(positions)])
        starts.append(first)
    return torch.stack(starts) if starts else torch.zeros(0, len(prompts), dtype=torch.long)


def _edits(sets: Sequence[Sequence[Bound]], cases: Tensor) -> dict[str, Edit]:
    """What a call does at each hook point; `cases` `[row]` are the sets of its rows."""
    at_hook: dict[str, list[tuple[Bound, Tensor]]] = {}
    for case in cases.unique().tolist():
        rows = (cases == case).nonzero().flatten()
        for bound in sets[case]:
            at_hook.setdefault(bound.writes.hook_name, []).append((bound, rows))
    return {name: _edit(those) for name, those in at_hook.items()}


def _edit(those: Sequence[tuple[Bound, Tensor]]) -> Edit:
    """Each intervention on its own rows. All of a set have joined the call at its first layer, before they act."""

    def edit(activation: Tensor, rows: Rows) -> Tensor:
        new = activation.clone()
        for bound, at in those:
            at = at.to(activation.device)
            new[at] = bound.edit(new[at], replace(rows, index=rows.index[at]))
        return new

    return edit
