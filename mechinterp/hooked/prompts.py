"""Prompts: a batch of token sequences with its padding and the roles of its positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mechinterp.errors import UserError

Positions = int | str | Sequence[int | str] | Tensor | None


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token sequences of one batch, padded on the left.

    Attributes:
        tokens: `[prompt pos]` token ids.
        mask: `[prompt pos]` bool, False at padding; None when nothing is padded.
        roles: name -> `[prompt]` index into `pos` (padding counted), -1 where a prompt has no such role.
        template: `[prompt]` id of the template that a prompt was made from, None if there are none.
        bos: whether every prompt begins with a BOS that its text does not contain.
    """

    tokens: Tensor
    mask: Tensor | None = None
    roles: Mapping[str, Tensor] = field(default_factory=dict)
    template: Tensor | None = None
    bos: bool = False

    @classmethod
    def from_lists(cls, ids: Sequence[Sequence[int]], pad: int = 0, bos: bool = False) -> "Prompts":
        """Pad token lists on the left. Raises UserError when there are none or one is empty."""
        lengths = [len(row) for row in ids]
        if not lengths or min(lengths) == 0:
            raise UserError("a prompt needs at least one token; found " + ("no prompts" if not lengths else "none"))
        width = max(lengths)
        tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids], dtype=torch.long)
        mask = None
        if min(lengths) < width:
            mask = torch.arange(width)[None, :] >= (width - torch.tensor(lengths))[:, None]
        return cls(tokens, mask, bos=bos)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_pos(self) -> int:
        """Positions, padding included."""
        return self.tokens.shape[1]

    @property
    def padding(self) -> Tensor:
        """`[prompt]` number of padding positions on the left."""
        if self.mask is None:
            return torch.zeros(len(self), dtype=torch.long)
        return (~self.mask).sum(-1)

    @property
    def real(self) -> Tensor:
        """`[prompt pos]` bool, True at tokens that are not padding."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask

    def with_roles(self, roles: Mapping[str, Tensor], template: Tensor | None = None) -> "Prompts":
        """The same tokens with roles and templates attached."""
        return replace(self, roles=dict(roles), template=template)

    def take(self, index: Tensor) -> "Prompts":
        """The prompts at `index`, in that order, at the same width."""
        return replace(
            self,
            tokens=self.tokens[index],
            mask=None if self.mask is None else self.mask[index],
            roles={name: at[index] for name, at in self.roles.items()},
            template=None if self.template is None else self.template[index],
        )

    def select(self, positions: Positions) -> Tensor:
        """`[prompt pos]` bool: the chosen positions.

        Args:
            positions: None for all (padding included); an index, a role's name or several of them, the same for every
                prompt; or a tensor `[prompt]` or `[prompt k]` with each prompt's own. Indices from 0 count the tokens
                of the prompt (BOS counted, padding not); negative ones count from the end.

        Raises:
            UserError: an index outside the prompt, an unknown role, a tensor with another number of prompts.
        """
        if positions is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        if isinstance(positions, Tensor) and positions.ndim > 0:
            if positions.shape[0] != len(self):
                raise UserError(f"positions are for {positions.shape[0]} prompts, the run has {len(self)}")
            return self._at(positions.reshape(len(self), -1).long().cpu())
        chosen = torch.zeros_like(self.tokens, dtype=torch.bool)
        for one in [positions] if isinstance(positions, int | str | Tensor) else positions:
            chosen |= self.at_role(one) if isinstance(one, str) else self._at(torch.full((len(self), 1), int(one)))
        return chosen

    def at_role(self, role: str) -> Tensor:
        """`[prompt pos]` bool: the position of a role, nothing where a prompt has none. Raises UserError if unknown."""
        if role not in self.roles:
            known = ", ".join(self.roles) or "none: these prompts have no roles"
            raise UserError(f"unknown role {role!r}; roles of these prompts: {known}")
        at = self.roles[role].to(self.tokens.device)
        return torch.arange(self.n_pos, device=self.tokens.device)[None, :] == at[:, None]

    def _at(self, index: Tensor) -> Tensor:
        """`[prompt pos]` bool from `[prompt k]` indices that do not count padding."""
        padding = self.padding[:, None].cpu()
        at = torch.where(index < 0, index + self.n_pos, index + padding)
        bad = (at < padding) | (at >= self.n_pos)
        if bad.any():
            prompt, column = bad.nonzero()[0].tolist()
            length = self.n_pos - int(padding[prompt, 0])
            raise UserError(f"position {int(index[prompt, column])} is outside prompt {prompt}, of {length} tokens")
        return torch.zeros_like(self.tokens, dtype=torch.bool).cpu().scatter_(1, at, True).to(self.tokens.device)

    def to(self, device: torch.device | str) -> "Prompts":
        """The same prompts on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            roles={name: at.to(device) for name, at in self.roles.items()},
            template=None if self.template is None else self.template.to(device),
        )
