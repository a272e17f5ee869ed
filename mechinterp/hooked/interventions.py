"""Interventions: small frozen values that say what an activation becomes, at which site and positions.

`where` is a Site and positions; `what` is the class: Zero, Mean, Resample, Patch, Steer, Noise, Apply, and Splice
(sae/splice.py). All of them act through `new_value`, so that the one forward (forward.py) needs to know nothing of the
kinds. A value may depend on the live activation, and may be written to another site than the one that it was read from
(`Apply(..., to=...)`); there it may be joined with what is live (`at_write`).
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked import donors, means
from mechinterp.hooked.prompts import Positions, Prompts
from mechinterp.hooked.sites import Site

if TYPE_CHECKING:
    from mechinterp.hooked.model import HookedModel

Capture = Callable[[Prompts, Site], Tensor]


@dataclass(frozen=True)
class Rows:
    """Which prompts and positions a forward pass holds.

    Attributes:
        prompts: all prompts of the run.
        index: `[batch]` the prompt of each row.
        start: first position that is run; activations hold `pos` from there on.
    """

    prompts: Prompts
    index: Tensor
    start: int = 0

    @classmethod
    def all(cls, prompts: Prompts) -> "Rows":
        """Every prompt once, from position 0."""
        return cls(prompts, torch.arange(len(prompts), device=prompts.tokens.device))

    def whole_shape(self, activation: Tensor, pos_dim: int) -> tuple[int, ...]:
        """Shape of the activation if it held all prompts and all positions."""
        shape = list(activation.shape)
        shape[0], shape[pos_dim] = len(self.prompts), self.prompts.n_pos
        return tuple(shape)

    def of(self, per_prompt: Tensor, pos_dim: int) -> Tensor:
        """Rows and positions of a tensor that holds all prompts first and all positions at `pos_dim`."""
        rows = per_prompt[self.index.to(per_prompt.device)]
        return rows.narrow(pos_dim, self.start, rows.shape[pos_dim] - self.start)


def _require_same_padding(source: Prompts, prompts: Prompts, what: str) -> None:
    """Raise UserError where padding would be put in the place of tokens."""
    lengths = [p.n_pos - p.padding.cpu() for p in (source, prompts)]
    if not torch.equal(*lengths):
        i = int((lengths[0] != lengths[1]).nonzero()[0])
        raise UserError(f"{what} has {int(lengths[0][i])} tokens for prompt {i}, which has {int(lengths[1][i])}")


@dataclass(frozen=True, eq=False)
class Intervention:
    """What happens at a site. Subclasses give the value; this base says where and how strictly.

    Attributes:
        site: where to act; heads, neurons and a basis narrow it.
        positions: where in the sequence (see `Prompts.select`); for `pattern` and `attn_scores` these are queries.
        noop_ok: do not raise when no element changed.
    """

    site: Site
    positions: Positions = field(default=None, kw_only=True)
    noop_ok: bool = field(default=False, kw_only=True)

    @property
    def reads(self) -> Site:
        """The site that the value is computed from."""
        return self.site

    @property
    def writes(self) -> Site:
        """The site that is changed."""
        return self.site

    @property
    def folds(self) -> bool:
        """Whether rows and positions may be run apart from each other. Plain functions may look at the whole batch."""
        return True

    def require(self, model: "HookedModel") -> None:
        """Raise UserError unless it can act on this model; that the sites exist is checked without it."""
        return None

    def prepare(self, capture: Capture) -> Any:
        """Compute once, on entering, what the value needs; `capture(prompts, site)` runs the model."""
        return None

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        """The new activation, of a shape that broadcasts to the old one; `state` is what `prepare` returned."""
        raise NotImplementedError

    def at_write(self, value: Tensor, activation: Tensor, rows: Rows) -> Tensor:
        """What is written: `value` is what `new_value` made of the site that is read, `activation` the live one at the
        site that is written, which may be another. By default the value as it is."""
        return value


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """Set to zero."""

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        return torch.zeros_like(activation)


class _Once:
    """What is worked out of a run's prompts, once as long as they are the same: its rows ask for it again and again."""

    def __init__(self, make: Callable[[Prompts], Tensor]):
        self._make, self._of = make, None

    def __call__(self, prompts: Prompts) -> Tensor:
        if self._of is None or self._of[0] is not prompts:
            self._of = prompts, self._make(prompts)
        return self._of[1]


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """Set to the mean over other prompts.

    Attributes:
        over: the prompts that the mean is taken over, in their own run; padding is no part of it.
        by: "all" pools prompts and positions; "position" keeps positions apart (prompts of one length, roles at the
            same positions); "role" gives each role its own mean and pools the other positions; "template" averages
            within a template, by position (Wang et al. 2023). "role" and "template" need prompts that have them.

    Raises:
        UserError: on entering, prompts that this mean cannot be taken over; on running, a position to be set for which
            there is no mean.
    """

    over: Prompts
    by: means.By = "all"

    def prepare(self, capture: Capture) -> tuple[Tensor, _Once]:
        means.require_groups(self.over, self.by)
        over = capture(self.over, self.reads.whole).movedim(self.reads.kind.dim(self.reads.kind.pos_axis), 1)
        made = means.Means.of(self.over, self.by, over)
        return made.table, _Once(lambda prompts: made.rows(prompts, self.positions))

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        table, row_of = state
        mean = table[rows.of(row_of(rows.prompts), 1).to(table.device)]
        return mean.movedim(1, self.reads.kind.dim(self.reads.kind.pos_axis)).to(activation)


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Set to the activation of another run.

    Attributes:
        source: prompts to run, one for each prompt of the run and of the same lengths; or the activation itself,
            of the site's shape with all its heads.

    Raises:
        UserError: on entering, when the source holds NaN; on running, when its shape does not fit.
    """

    source: Prompts | Tensor

    def prepare(self, capture: Capture) -> Any:
        value = capture(self.source, self.reads.whole) if isinstance(self.source, Prompts) else self.source
        if value.isnan().any():
            raise UserError(f"the source of a patch at {self.site} holds NaN")
        return value

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        pos = self.reads.kind.dim(self.reads.kind.pos_axis)
        expected = rows.whole_shape(activation, pos)
        if tuple(state.shape) != expected:
            raise UserError(
                f"a patch at {self.site} has shape {tuple(state.shape)}; the run has {len(rows.prompts)} prompts of "
                f"{rows.prompts.n_pos} positions and needs {expected}, axes {' '.join(self.site.kind.axes)}"
            )
        if isinstance(self.source, Prompts):
            _require_same_padding(self.source, rows.prompts, f"the source of a patch at {self.site}")
        return rows.of(state, pos).to(activation)


@dataclass(frozen=True, eq=False)
class Resample(Intervention):
    """Set to the activation of another prompt of the same length, drawn anew for each prompt.

    Attributes:
        over: prompts to draw from, padded to the same number of positions as the run's.
        by: "position": any other prompt of that length; "role": one with the roles at the same positions (those that
            `positions` names, or all); "template": one of the same template.
        seed: of the draw; the same seed gives each prompt the same donor.

    Raises:
        UserError: on running, a prompt without a donor.
    """

    over: Prompts
    by: donors.By = field(default="position", kw_only=True)
    seed: int = 0

    def prepare(self, capture: Capture) -> tuple[Tensor, _Once]:
        return capture(self.over, self.reads.whole), _Once(self.donors)

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        source, donor_of = state
        pos = self.reads.kind.dim(self.reads.kind.pos_axis)
        if source.shape[pos] != rows.prompts.n_pos:
            raise UserError(f"Resample is over {source.shape[pos]} positions, the run has {rows.prompts.n_pos}")
        donated = source[donor_of(rows.prompts)[rows.index.cpu()].to(source.device)]
        return donated.narrow(pos, rows.start, donated.shape[pos] - rows.start).to(activation)

    def donors(self, prompts: Prompts) -> Tensor:
        """`[prompt]` which prompt of `over` each prompt of the run takes; never its own number."""
        return donors.draw_donors(self.over, prompts, self.by, self.positions, self.seed)


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """Add a vector.

    Attributes:
        vector: of a shape that broadcasts to the site's activation, such as `[d_model]`.
        strength: factor; 0 changes nothing, and says so by `noop_ok`.
    """

    vector: Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.strength == 0:
            object.__setattr__(self, "noop_ok", True)

    def prepare(self, capture: Capture) -> Any:
        if not self.vector.isfinite().all():
            raise UserError(f"the vector to steer with at {self.site} is not finite")

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        pos = self.reads.kind.dim(self.reads.kind.pos_axis)
        shape = rows.whole_shape(activation, pos)
        try:
            vector = self.vector.to(activation).expand(shape)
        except RuntimeError:
            raise UserError(f"a vector of shape {tuple(self.vector.shape)} does not fit {self.site}: {shape}") from None
        return activation + self.strength * rows.of(vector, pos)


@dataclass(frozen=True, eq=False)
class Noise(Intervention):
    """Add Gaussian noise: the same in every run of the same prompts with this seed, another at every site.

    Attributes:
        std: standard deviation, in the activation's units.
        seed: of the draw.
    """

    std: float
    seed: int = 0

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        pos = self.reads.kind.dim(self.reads.kind.pos_axis)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(str(self.reads).encode()))
        noise = torch.randn(rows.whole_shape(activation, pos), generator=draw)
        return activation + self.std * rows.of(noise, pos).to(activation)


@dataclass(frozen=True, eq=False)
class Apply(Intervention):
    """A plain function of the live activation.

    Attributes:
        function: `(activation, site) -> new activation`; it sees all heads, rows and positions of the run.
        to: site to write the value to; the same as `site` by default.
    """

    function: Callable[[Tensor, Site], Tensor]
    to: Site | None = None

    @property
    def writes(self) -> Site:
        return self.to or self.site

    @property
    def folds(self) -> bool:
        return False

    def new_value(self, activation: Tensor, state: Any, rows: Rows) -> Tensor:
        # A clone: a function that edits in place must not hide its change from the no-op check.
        return self.function(activation.clone(), self.site)
