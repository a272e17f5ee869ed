"""Means over prompts: which positions share a mean, and which mean each position of a run takes.

Every position of the prompts that are averaged over has a group: all are in one, or positions, roles or the positions
of a template are kept apart. A run's positions take the mean of their group; a position that is to be set and has no
mean is an error, never another mean.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.prompts import Positions, Prompts

By = Literal["all", "position", "role", "template"]


@dataclass(frozen=True, eq=False)
class Means:
    """Means of an activation.

    Attributes:
        over, by: see `interventions.Mean`.
        table: `[group + 1 …]` the means; a last row of zeros is what is put where no mean is needed.
        found: `[group + 1]` bool: whether a token of `over` is in the group.
    """

    over: Prompts
    by: By
    table: Tensor
    found: Tensor

    @classmethod
    def of(cls, over: Prompts, by: By, activation: Tensor) -> "Means":
        """From an activation `[prompt pos …]` of `over`; padding is no part of any mean."""
        group = groups(over, over, by).masked_fill(~over.real, -1).to(activation.device)
        numbers = range(n_groups(over, by))
        means = [activation[group == number].mean(0) for number in numbers]
        found = [bool((group == number).any()) for number in numbers]
        table = torch.stack([*means, torch.zeros_like(activation[0, 0])])
        return cls(over, by, table, torch.tensor([*found, False]))

    def rows(self, prompts: Prompts, positions: Positions) -> Tensor:
        """`[prompt pos]` row of the table that each position of a run takes, on the CPU.

        Raises:
            UserError: the run's positions are not those of `over`, or one of `positions` has no mean.
        """
        require_fit(self.over, prompts, self.by)
        group = groups(self.over, prompts, self.by).cpu()
        known = (group >= 0) & self.found[group]
        missing = ~known & prompts.real.cpu() & prompts.select(positions).cpu()
        if missing.any():
            prompt, pos = missing.nonzero()[0].tolist()
            here = " or ".join(repr(name) for name, at in prompts.roles.items() if int(at[prompt]) == pos)
            have = [name for number, name in enumerate(self.over.roles, 1) if self.found[number]]
            raise UserError(
                f"Mean(by='role'): no prompt of `over` has {here or 'a token without a role'}, which prompt {prompt} "
                f"of the run has at token {pos - int(prompts.padding[prompt])}; roles with a mean: {', '.join(have)}"
            )
        return group.where(known, len(self.table) - 1)


def n_groups(over: Prompts, by: By) -> int:
    """How many means there are."""
    if by == "template":
        assert over.template is not None
        return len(over.template.unique()) * over.n_pos
    return {"all": 1, "position": over.n_pos, "role": 1 + len(over.roles)}[by]


def groups(over: Prompts, prompts: Prompts, by: By) -> Tensor:
    """`[prompt pos]` number of the group of each position of `prompts`; -1 for a role that `over` does not have."""
    places = torch.arange(prompts.n_pos, device=prompts.tokens.device).expand(len(prompts), -1)
    if by == "position":
        return places
    if by == "template":
        assert over.template is not None and prompts.template is not None
        names = over.template.unique().to(places.device)
        return torch.searchsorted(names, prompts.template)[:, None] * prompts.n_pos + places
    group = torch.zeros_like(places)
    if by == "role":
        for name in prompts.roles:
            if name not in over.roles:
                group[prompts.at_role(name)] = -1
        for number, name in enumerate(over.roles, 1):  # a later role wins where two share a position
            if name in prompts.roles:
                group[prompts.at_role(name)] = number
    return group


def require_groups(over: Prompts, by: By) -> None:
    """Raise UserError if no such mean can be taken over these prompts."""
    if by == "position":
        if over.mask is not None:
            raise UserError("Mean(by='position') needs prompts of one length; found several. Valid: by='role' or 'all'")
        require_same_places(over)
    if by == "role" and not over.roles:
        raise UserError("Mean(by='role') needs prompts with roles; found none. Valid: by='all' or 'position'")
    if by != "template":
        return
    if over.template is None:
        raise UserError("Mean(by='template') needs prompts with templates; found none. Valid: by='role' or 'all'")
    for template in over.template.unique():
        if len(over.padding[(over.template == template).cpu()].unique()) > 1:
            raise UserError(
                f"Mean(by='template') needs prompts of one length in a template; template {int(template)} has several. "
                "Valid: by='role' or 'all'"
            )


def require_fit(over: Prompts, prompts: Prompts, by: By) -> None:
    """Raise UserError if positions of the run are not the same words as those of `over`."""
    if by == "position":
        if over.n_pos != prompts.n_pos or prompts.mask is not None:
            found = "prompts of several lengths" if prompts.mask is not None else prompts.n_pos
            raise UserError(f"Mean(by='position') is over {over.n_pos} positions, the run has {found}")
        require_same_places(over, prompts)
    if by != "template":
        return
    if prompts.template is None or over.template is None or prompts.n_pos != over.n_pos:
        raise UserError("Mean(by='template') needs a run over the same templates and positions")
    for template in prompts.template.unique():
        ours, theirs = (p.padding[(p.template == template.to(p.tokens.device)).cpu()] for p in (prompts, over))
        if not len(theirs):
            raise UserError(f"Mean(by='template'): template {int(template)} of the run is not in `over`")
        if (ours != theirs[0]).any():
            raise UserError(
                f"Mean(by='template'): template {int(template)} has {over.n_pos - int(theirs[0])} tokens in `over` and "
                f"another number in the run"
            )


def require_same_places(*sets: Prompts) -> None:
    """Raise UserError where a role is not at one position in all prompts: a mean by position would mix roles."""
    for name in sets[0].roles:
        at = torch.cat([prompts.roles[name].cpu() for prompts in sets if name in prompts.roles])
        found = at[at >= 0].unique().tolist()
        if len(found) > 1:
            raise UserError(
                f"by='position' needs roles at the same positions; {name} is at {found[0]} and at {found[1]}. "
                "Valid: by='role'"
            )
