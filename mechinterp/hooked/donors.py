"""Donors: for each prompt of a run another prompt whose activation may stand in for its own."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.prompts import Positions, Prompts

By = Literal["position", "role", "template"]


def draw_donors(over: Prompts, prompts: Prompts, by: By, positions: Positions, seed: int) -> Tensor:
    """`[prompt]` which prompt of `over` each prompt of the run takes; never its own number.

    Args:
        over: prompts to draw from.
        prompts: of the run.
        by: see `interventions.Resample`.
        positions: that are set.
        seed: of the draw; the same seed gives each prompt the same donor.

    Raises:
        UserError: no other prompt has that length, and the same template or roles at the same positions.
    """
    draw, fits, chosen = torch.Generator().manual_seed(seed), _fits(over, prompts, by, positions), []
    for i in range(len(prompts)):
        same = [j for j in fits[i].nonzero().flatten().tolist() if j != i]
        if not same:
            also = {"position": "", "role": " and its roles at the same positions", "template": " and its template"}
            raise UserError(f"Resample: no other prompt has the length of prompt {i}{also[by]}")
        chosen.append(same[int(torch.randint(len(same), (1,), generator=draw))])
    return torch.tensor(chosen)


def _fits(over: Prompts, prompts: Prompts, by: By, positions: Positions) -> Tensor:
    """`[prompt over]` bool: which prompts of `over` may stand in for each prompt of the run."""
    fits = prompts.padding.cpu()[:, None] == over.padding.cpu()
    if by == "template":
        if prompts.template is None or over.template is None:
            raise UserError("Resample(by='template') needs prompts with templates; found none. Valid: by='position'")
        fits &= prompts.template.cpu()[:, None] == over.template.cpu()
    if by == "role":
        for name in _roles_to_align(over, prompts, positions):
            fits &= prompts.roles[name].cpu()[:, None] == over.roles[name].cpu()
    return fits


def _roles_to_align(over: Prompts, prompts: Prompts, positions: Positions) -> list[str]:
    """The roles that are set, or all where positions are no roles."""
    asked = [positions] if isinstance(positions, str) else positions
    named = [name for name in prompts.roles if isinstance(asked, Sequence) and name in asked] or list(prompts.roles)
    lacking = [name for name in named if name not in over.roles]
    if lacking or not named:
        what = f"no role {lacking[0]!r} in `over`" if lacking else "none"
        raise UserError(f"Resample(by='role') needs prompts with roles; found {what}. Valid: by='position'")
    return named
