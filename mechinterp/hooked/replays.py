"""Many edits of one recorded run: which rows must be run, which of them share a call, and what each call gives.

1. A case is something that is done to the run: it has a first layer, and in each prompt a first position that it
   changes. A row is a case in a prompt. Where a case changes nothing its row is the recorded run, and is not run.
2. Rows that begin at about the same position share a call (schedule.py), in the order of their first layers.
3. Each call is one suffix run (suffix.py): a row joins it at its own first layer.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mechinterp.hooked import schedule
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.suffix import Read, Recording


def replay(
    recording: Recording,
    read: Read,
    layers: Tensor,
    starts: Tensor,
    edits_of: Callable[[Tensor], Mapping[str, Edit]],
    *,
    folds: bool = True,
    max_tokens: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Run every case in every recorded prompt that it changes.

    Args:
        recording: of the run that is changed.
        read: which logits are wanted, for all prompts of the analysis.
        layers: `[case]` first layer that a case changes.
        starts: `[case batch]` first position that it changes in each recorded prompt; n_pos or more where it changes
            nothing.
        edits_of: from `[row]` cases of a call, whose layers ascend, to its edits by hook name. An edit sees the rows
            that have joined, which come first.
        folds: whether prompts may be run apart from each other; if not, a call is a case in all prompts.
        max_tokens: rows × positions of a call; by default from the free memory.

    Yields:
        Of every call `[row]` cases, `[row]` prompts of the analysis, and logits `[row target column]`, on the CPU.
    """
    model, n_pos, index = recording.model, recording.prompts.n_pos, recording.index.cpu()
    if not folds:  # all prompts are run together, from the first position, or none
        starts = torch.where((starts < n_pos).any(-1, keepdim=True), 0, n_pos).expand_as(starts)
    case_of, local = (starts < n_pos).nonzero(as_tuple=True)
    for batch, start in _calls(recording, read, starts[case_of, local], case_of, local, layers, folds, max_tokens):
        cases, prompts = case_of[batch], index[local[batch]]
        rows = Rows(recording.prompts, prompts.to(model.device), start)
        yield cases, prompts, recording.logits(layers[cases], rows, read, edits_of(cases)).cpu()


def _calls(
    recording: Recording,
    read: Read,
    starts: Tensor,
    case_of: Tensor,
    local: Tensor,
    layers: Tensor,
    folds: bool,
    max_tokens: int | None,
) -> list[tuple[Tensor, int]]:
    """Rows of each call, as indices into the arguments `[row]`, by layer; and the position that it begins at."""
    if not folds:
        return [((case_of == case).nonzero().flatten(), 0) for case in case_of.unique()]
    model, n_pos = recording.model, recording.prompts.n_pos
    if not model.levers.prefix:
        starts = torch.zeros_like(starts)
    assert read.positions is not None
    starts = torch.minimum(starts, read.positions.amin(1).cpu()[recording.index.cpu()[local]])
    per_call = schedule.max_tokens(model, n_pos, read.columns is None) if max_tokens is None else max_tokens
    made = schedule.batches(starts, n_pos, per_call, layers[case_of])
    return [(batch, int(starts[batch].min())) for batch in made]
