"""What knocked-out activations become, and at which positions."""

from dataclasses import dataclass
from typing import Any, Literal, cast

from mechinterp.ablation.components import Components, by_layer, require_role
from mechinterp.ablation.edges import CutEdge
from mechinterp.errors import UserError
from mechinterp.hooked.interventions import Intervention, Mean, Resample, Zero
from mechinterp.hooked.means import By, require_same_places
from mechinterp.hooked.prompts import Positions, Prompts
from mechinterp.hooked.sites import Site
from mechinterp.patching.cells import Where, spots
from mechinterp.tasks.pairs import PromptPairs

Value = Literal["zero", "mean", "resample"]
Over = Literal["clean", "corrupted"] | Prompts


@dataclass(frozen=True, eq=False)
class Replacement:
    """How components are knocked out.

    Attributes:
        value: "zero"; "mean" over the prompts `over`; "resample": the activation of another one of them.
        over: the prompts that means and donors come from; `source` says which they are.
        by: see `interventions.Mean` and `interventions.Resample`.
        positions: where, as `Prompts.select` takes them; `asked` is what was asked for.
        seed: of the donors.
    """

    value: Value
    over: Prompts
    source: str
    by: By
    positions: Positions
    asked: Where
    seed: int

    @classmethod
    def of(cls, pairs: PromptPairs, value: Value, over: Over, by: By, positions: Where, seed: int) -> "Replacement":
        """From what a user asks for.

        Raises:
            UserError: an unknown value, source or grouping; positions that not every prompt has; a grouping by
                position of prompts whose roles do not align.
        """
        if value not in ("zero", "mean", "resample"):
            raise UserError(f"unknown value {value!r}; valid: 'zero', 'mean', 'resample'")
        if not isinstance(over, Prompts) and over not in ("clean", "corrupted"):
            raise UserError(f"unknown over={over!r}; valid: 'clean', 'corrupted', or Prompts")
        allowed = ("role", "template", "position", "all")[: 3 if value == "resample" else 4]
        if by not in allowed:
            raise UserError(f"unknown by={by!r} for value={value!r}; valid: {', '.join(map(repr, allowed))}")
        prompts = over if isinstance(over, Prompts) else getattr(pairs, over)
        if value == "resample" and by == "position":
            require_same_places(prompts, pairs.clean)
        source = over if isinstance(over, str) else "other prompts"
        return cls(value, prompts, source, by, places(pairs, positions), positions, seed)

    def interventions(self, components: Components, noop_ok: bool = False) -> list[Intervention]:
        """What knocks the components out: one for each hook point and, of edges, for each pair of positions."""
        cuts = [
            CutEdge(Site("pattern", layer, head=heads), edge.key_positions, positions=edge.query, noop_ok=noop_ok)
            for edge in components.edges
            for layer, heads in by_layer(edge.heads).items()
        ]
        return [*(self.at(site, noop_ok) for site in components.sites), *cuts]

    def at(self, site: Site, noop_ok: bool = False) -> Intervention:
        """The value, put in at a site."""
        if self.value == "zero":
            return Zero(site, positions=self.positions, noop_ok=noop_ok)
        if self.value == "mean":
            return Mean(site, self.over, self.by, positions=self.positions, noop_ok=noop_ok)
        by = cast(Literal["role", "template", "position"], self.by)
        return Resample(site, self.over, by=by, seed=self.seed, positions=self.positions, noop_ok=noop_ok)

    def about(self) -> dict[str, Any]:
        """As plain values."""
        asked = self.asked if isinstance(self.asked, str | int) else list(self.asked)
        taken = {} if self.value == "zero" else {"over": self.source, "n_over": len(self.over), "by": self.by}
        return {"value": self.value, **taken, "positions": asked}


def places(pairs: PromptPairs, positions: Where) -> Positions:
    """The positions that are all set at once, as `Prompts.select` takes them.

    Raises:
        UserError: unknown positions, a role that some prompts lack, or "each", which is no one set.
    """
    if positions == "each":
        raise UserError("a knock-out sets its positions all at once; valid: all, last, roles, role names, indices")
    axis, chosen = spots(pairs, positions)
    if axis is None:
        return None if positions == "all" else -1
    labels = [spot.label for spot in chosen]
    for label in labels:
        require_role(pairs, label)
    return labels
