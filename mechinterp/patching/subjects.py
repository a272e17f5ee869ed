"""The tokens that a causal trace restores: the subject's and those after it, by role or by position."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.prompts import Prompts
from mechinterp.patching.restore import Cells
from mechinterp.tasks.pairs import PromptPairs

# A subject of one token is apart from the last of several: to restore it early is to undo the noise.
ROLES = ("subject_only", "subject_first", "subject_middle", "subject_last", "next", "further", "last")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that are restored, one column at a time.

    Attributes:
        axis: `role` or `pos`.
        labels: along that axis.
        at: `[column prompt]` position, padding counted; `n_pos` where a prompt has no such token.
        label: `[column prompt]` index of its label; -1 where there is none.
        subject: `[prompt pos]` bool.
    """

    axis: str
    labels: list[str] | list[int]
    at: Tensor
    label: Tensor
    subject: Tensor

    def cells(self, wanted: Sequence[tuple[tuple[int, int], int | None]]) -> Cells:
        """Every column in each wanted window, or only the tokens of a label there."""
        nowhere = self.subject.shape[1]
        at = [self.at if one is None else self.at.where(self.label == one, nowhere) for _, one in wanted]
        return Cells([span for span, _ in wanted for _ in self.at], torch.cat(at))

    def average(self, restored: Tensor, n_windows: int) -> np.ndarray:
        """`[window label prompt draw]` mean over the tokens of a label, NaN where a prompt has none, from the cells'
        `[draw cell prompt]`."""
        values = restored.double().numpy().reshape(len(restored), n_windows, *self.at.shape)
        chosen = (self.label == torch.arange(len(self.labels))[:, None, None]).numpy()
        mean = np.einsum("lcp,dwcp->wlpd", chosen.astype(float), values)
        count = chosen.sum(1)[..., None]
        return np.divide(mean, count, out=np.full_like(mean, np.nan), where=count > 0)

    def counts(self) -> np.ndarray:
        """`[label]` prompts that have such a token."""
        return np.array([int((self.label == one).any(0).sum()) for one in range(len(self.labels))])

    def other_subject(self, pairs: PromptPairs) -> Prompts | None:
        """The other side of the pairs, if its subject is another one in all of them."""
        differs = (pairs.clean.tokens != pairs.corrupted.tokens).cpu() & self.subject
        return pairs.corrupted if bool(differs.any(1).all()) else None


def tokens_of(pairs: PromptPairs, first: Tensor, last: Tensor, positions: str) -> Tokens:
    """Which tokens are restored, and what each is called."""
    if positions not in ("roles", "each"):
        raise UserError(f"unknown positions {positions!r}; valid for a trace: roles, each")
    n_pos = pairs.clean.n_pos
    places = torch.arange(n_pos)[:, None]
    appended = torch.zeros_like(first) if pairs.appended is None else pairs.appended
    end = n_pos - 1 - appended
    subject = ((places >= first) & (places <= last)).T
    if positions == "each":
        if pairs.clean.mask is not None or len(end.unique()) > 1:
            raise UserError("positions 'each' needs prompts of one length; found several. Valid here: roles")
        # What noise cannot change is not run: there the effect is 0.
        columns = places[: int(end[0]) + 1]
        at = columns.expand(-1, len(first)).where(columns >= first, n_pos)
        return Tokens("pos", columns.flatten().tolist(), at, columns.expand_as(at), subject)
    at = first + places[: int((end - first).max()) + 1]
    # The later rule wins: a prompt's last token is its last, also where it follows the subject or belongs to it.
    rules = [
        (at > first, "subject_middle"), (at == first, "subject_first"), (at == last, "subject_last"),
        ((at == last) & (first == last), "subject_only"), (at > last, "further"), (at == last + 1, "next"),
        (at == end, "last"),
    ]  # fmt: skip
    label = torch.full_like(at, -1)
    for holds, name in rules:
        label = label.masked_fill(holds, ROLES.index(name))
    label = label.masked_fill(at > end, -1)
    present = [one for one in range(len(ROLES)) if (label == one).any()]
    renumbered = torch.full_like(label, -1)
    for new, old in enumerate(present):
        renumbered[label == old] = new
    return Tokens("role", [ROLES[one] for one in present], at.where(at <= end, n_pos), renumbered, subject)


def subject_of(pairs: PromptPairs, subject: str | tuple[str, str]) -> tuple[Tensor, Tensor]:
    """`[prompt]` positions of the subject's first and last token, padding counted."""
    names = (subject, subject) if isinstance(subject, str) else tuple(subject)
    if len(names) != 2:
        raise UserError(f"subject is a role, or the roles of its first and last token; found {list(names)}")
    ends = []
    for name in names:
        if name not in pairs.roles:
            raise UserError(f"unknown role {name!r} of the subject; roles here: {', '.join(pairs.roles) or 'none'}")
        ends.append(pairs.clean.roles[name].cpu())
        if (ends[-1] < 0).any():
            raise UserError(f"prompt {int((ends[-1] < 0).nonzero()[0])} has no token in the role {name!r}")
    first, last = ends
    if (last < first).any():
        raise UserError(f"{names[0]!r} comes after {names[1]!r} in prompt {int((last < first).nonzero()[0])}")
    read = pairs.answers.pos.amax(1).cpu()
    if (first > read).any():
        raise UserError(f"the answer of prompt {int((first > read).nonzero()[0])} is read before its subject begins")
    started = first == pairs.clean.padding.cpu()
    if started.any() and not pairs.clean.bos:
        warnings.warn(
            f"the subject of {int(started.sum())} of {len(pairs)} prompts holds position 0 and there is no BOS: that "
            "position is an attention sink, and noise there breaks a run whatever the subject is. Put a word or a BOS "
            "in front",
            UserWarning,
            stacklevel=3,
        )
    return first, last
