"""Edges of attention taken away: some heads no longer see a key position from a query position.

The entry of the pattern is set to 0 and the rest of its row is scaled to sum to 1 again. This is what −inf in the
scores gives: the head looks elsewhere in its own proportions. (A 0 without the scaling would take away what was moved
and leave the rest as it was; it is no attention pattern.) A query that saw nothing else attends to nothing.
Geva et al. 2023 (attention knock-out).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mechinterp.hooked.interventions import Intervention, Rows
from mechinterp.hooked.prompts import Positions


@dataclass(frozen=True, eq=False)
class CutEdge(Intervention):
    """Take attention away from key positions; `positions` are the queries, the site is `pattern`.

    Attributes:
        keys: positions that are no longer seen (see `Prompts.select`).
    """

    keys: Positions

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        unseen = rows.prompts.select(self.keys)[rows.index.to(rows.prompts.tokens.device)].to(activation.device)
        kept = activation.masked_fill(unseen[:, None, None, :], 0.0)
        total = kept.sum(-1, keepdim=True)
        return kept / total.where(total > 0, 1)
