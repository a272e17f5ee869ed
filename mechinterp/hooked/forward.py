"""The one place that runs the model with interventions.

1. Interventions are bound to the model: sites resolved, means and sources computed (`bind`).
2. A `Plan` turns them, and the sites to be recorded, into one function per hook point: at a site the interventions
   apply in the order given, and the record holds the value after them.
3. `run` calls the bridge once with those hooks; they are always removed, exceptions included.
4. Every bound intervention knows whether it fired and whether it changed an element; `Bound.verdict` raises if not.

`q_input`, `k_input`, `v_input` and `mlp_in` are no hook points of their own: their value is read from the residual
stream, edited, and what the edit makes of the head's q, k, v (or of the MLP's input) is written there.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.interventions import Intervention, Rows
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site

if TYPE_CHECKING:
    from mechinterp.hooked.model import HookedModel

Edit = Callable[[Tensor, Rows], Tensor]


@dataclass(eq=False)
class Bound:
    """An intervention on a given model: its value is ready, and it counts what it did."""

    intervention: Intervention
    reads: Site
    writes: Site
    state: Any
    fired: bool = False
    changed: bool | Tensor = False
    _held: Tensor | None = None

    def read(self, activation: Tensor, rows: Rows) -> Tensor:
        """Compute the new value at the site that is read, to be written later in the same forward."""
        self._held = self.intervention.new_value(activation, self.state, rows)
        return activation

    def edit(self, activation: Tensor, rows: Rows) -> Tensor:
        """The activation at the written site after the intervention."""
        held, self._held = self._held, None
        if held is None and self.reads.hook_name != self.writes.hook_name:
            raise UserError(f"nothing can be written to {self.writes}: {self.reads}, which it is from, comes later")
        value = held if held is not None else self.intervention.new_value(activation, self.state, rows)
        new = self.intervention.at_write(value, activation, rows)
        if self.writes.basis is not None:
            new = activation + (new - activation) @ _projector(self.writes.basis).to(activation)
        selected = self._selection(activation, rows)
        new = new.expand_as(activation) if selected is None else torch.where(selected, new, activation)
        self.fired = True
        # Stays a tensor on the model's device: no synchronisation until the verdict.
        self.changed = self.changed | (new != activation).any()
        return new

    def _selection(self, activation: Tensor, rows: Rows) -> Tensor | None:
        """Bool that broadcasts to the activation: the chosen positions, heads and neurons; None for everything."""
        kind, parts = self.writes.kind, []
        if self.intervention.positions is not None:
            chosen = rows.of(rows.prompts.select(self.intervention.positions), 1).to(activation.device)
            shape = [1] * activation.ndim
            shape[0], shape[kind.dim(kind.pos_axis)] = chosen.shape
            parts.append(chosen.reshape(shape))
        for index, axis in ((self.writes.heads, kind.head_axis), (self.writes.neurons, kind.axes[-1])):
            if index is not None and axis is not None:
                parts.append(_one_hot(index, kind.dim(axis), activation))
        if not parts:
            return None
        selected = parts[0]
        for part in parts[1:]:
            selected = selected & part
        return selected

    def verdict(self) -> None:
        """Raise UserError if the intervention never fired, or changed nothing without saying that it may."""
        name = f"{type(self.intervention).__name__} at {self.writes}"
        if not self.fired:
            raise UserError(f"{name} never fired: the run did not reach that site")
        if not self.intervention.noop_ok and not bool(self.changed):
            raise UserError(f"{name} changed no element; if that is what you want, give it noop_ok=True")


def _projector(basis: Tensor) -> Tensor:
    """`[d d]` orthogonal projection onto the span of the rows of `basis` `[n d]`."""
    basis = basis.float()  # no inverse exists in half precision
    return torch.linalg.pinv(basis) @ basis


def _one_hot(index: Sequence[int], dim: int, activation: Tensor) -> Tensor:
    chosen = torch.zeros(activation.shape[dim], dtype=torch.bool, device=activation.device)
    chosen[list(index)] = True
    return chosen.reshape([-1 if d == dim else 1 for d in range(activation.ndim)])


def bind(model: "HookedModel", interventions: Iterable[Intervention]) -> list[Bound]:
    """Resolve the sites and compute the values, under the interventions that are in force on the model.

    Raises:
        UserError: a site that the model does not have, or that can be read but not written.
    """

    def capture(prompts: Prompts, site: Site) -> Tensor:
        kept: dict[str, Tensor] = {}
        run(model, prompts, record=[model.resolve(site)], into=kept)
        return kept[site.hook_name]

    bound = []
    for one in interventions:
        reads, writes = model.resolve(one.reads), model.resolve(one.writes, write=True)
        one.require(model)
        bound.append(Bound(one, reads, writes, one.prepare(capture)))
    return bound


@dataclass
class Plan:
    """What each hook point does in a forward pass: `edits[hook name]` run in order on the activation."""

    model: "HookedModel"
    edits: dict[str, list[Edit]] = field(default_factory=dict)

    def add(self, hook_name: str, edit: Edit) -> None:
        """Append a function to a hook point."""
        self.edits.setdefault(hook_name, []).append(edit)

    @classmethod
    def of(
        cls,
        model: "HookedModel",
        bound: Sequence[Bound],
        record: Sequence[Site] = (),
        into: Any = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> "Plan":
        """What interventions do, then `edits` by hook name, then records; sites computed from others among them."""
        edits = edits or {}
        plan = cls(model)
        virtual: dict[str, tuple[Site, list[Edit]]] = {}
        for one in bound:
            if one.reads.hook_name != one.writes.hook_name:
                plan._add_at(one.reads, one.read, virtual)
            plan._add_at(one.writes, one.edit, virtual)
        for name, edit in edits.items():
            plan._add_at(Site.from_hook(name), edit, virtual)
        for site in record:
            plan._add_at(site, partial(_keep, site.hook_name, into), virtual)
        edited = {one.writes.hook_name for one in bound} | set(edits)
        for site, at_site in virtual.values():
            scale = Site("ln2_scale" if site.name == "mlp_in" else "ln1_scale", site.layer).hook_name
            if scale in edited and site.hook_name in edited:
                raise UserError(f"{site} and the scale of its norm cannot be changed in one run: {scale} would be lost")
            _add_virtual(plan, site, at_site, writes=site.hook_name in edited)
        for site in {Site.from_hook(name) for name in edited}:
            if site.name == "resid_mid":
                plan._carry_skip(site)
        return plan

    def _add_at(self, site: Site, edit: Edit, virtual: dict[str, tuple[Site, list[Edit]]]) -> None:
        if site.kind.virtual:
            virtual.setdefault(site.hook_name, (site.whole, []))[1].append(edit)
        else:
            self.add(site.hook_name, edit)

    def _carry_skip(self, site: Site) -> None:
        """TransformerLens's resid_mid is only what the second norm reads: an edit must reach the skip beside it too."""
        held: dict[str, Tensor] = {}

        def before(resid: Tensor, rows: Rows) -> Tensor:
            held["old"] = resid
            return resid

        def after(resid: Tensor, rows: Rows) -> Tensor:
            held["new"] = resid
            return resid

        def carry(resid: Tensor, rows: Rows) -> Tensor:
            return resid + (held.pop("new") - held.pop("old"))

        self.edits[site.hook_name] = [before, *self.edits[site.hook_name], after]
        self.edits.setdefault(Site("resid_post", site.layer).hook_name, []).insert(0, carry)

    def within(self, prefix: str) -> "Plan":
        """The part at hook points whose names begin with `prefix`."""
        return Plan(self.model, {name: edits for name, edits in self.edits.items() if name.startswith(prefix)})

    @contextmanager
    def installed(self, rows: Rows) -> Iterator[None]:
        """The hooks, on the bridge, for the length of the context."""
        with ExitStack() as stack:
            if any(name.endswith("hook_scale") for name in self.edits):
                # The bridge warns that an edited scale takes its own path, at rounding's distance; that is what we ask.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
            for name, edits in self.edits.items():
                point = self.model.hook_points[name]
                handle = point.add_hook(partial(_hook, edits, rows))  # type: ignore[arg-type]
                stack.callback(point.fwd_hooks.remove, handle)
                stack.callback(handle.hook.remove)
            yield


def _hook(edits: Sequence[Edit], rows: Rows, activation: Tensor, hook: Any) -> Tensor | None:
    """A TransformerLens hook that applies `edits` in order; None when nothing was edited."""
    # OPT flattens batch and pos before its second norm: give every edit [batch pos ...].
    flat = activation.ndim == 2
    shaped = activation.unflatten(0, (len(rows.index), -1)) if flat else activation
    new = shaped
    for edit in edits:
        new = edit(new, rows)
    if new is shaped:
        return None
    return new.flatten(0, 1) if flat else new


def _keep(name: str, into: Any, activation: Tensor, rows: Rows) -> Tensor:
    """Record an activation; a function `into(name, activation)` copies what it needs of it."""
    if callable(into):
        into(name, activation.detach())
    else:
        # A clone: later hooks may edit the live tensor in place.
        into[name] = activation.detach().clone()
    return activation


def _add_virtual(plan: Plan, site: Site, edits: list[Edit], writes: bool) -> None:
    """Read a head's (or the MLP's) input from the residual stream, edit it, write what the edit makes of it."""
    held: dict[str, Tensor] = {}
    plan.add(plan.model.resid_read_by(site), partial(_read_input, plan.model, site, edits, held))
    if writes:
        target = "mlp.hook_in" if site.name == "mlp_in" else f"attn.hook_{site.name[0]}"
        # First of all: what is done to q, k or v itself, and its record, comes after what is done to their inputs.
        write = partial(_write_input, plan.model, site, held)
        plan.edits.setdefault(f"blocks.{site.layer}.{target}", []).insert(0, write)


def _read_input(
    model: "HookedModel", site: Site, edits: list[Edit], held: dict[str, Tensor], resid: Tensor, rows: Rows
) -> Tensor:
    """Edit copies of the residual stream, one a head."""
    wide = resid if site.name == "mlp_in" else resid.unsqueeze(2).expand(-1, -1, model.axis_size(site), -1)
    held["old"] = wide
    for edit in edits:
        wide = edit(wide, rows)
    held["new"] = wide
    return resid


def _write_input(model: "HookedModel", site: Site, held: dict[str, Tensor], activation: Tensor, rows: Rows) -> Tensor:
    """What the norm and the projection make of the edited inputs."""
    new, old = held.pop("new"), held.pop("old")
    made = model.norm(site)(new)
    if site.name != "mlp_in":
        weight, bias = model.projection(site)
        made = torch.einsum("bphd,hde->bphe", made, weight) + bias
    if new.requires_grad:
        return made  # a gradient exists also where an edit's value is the old one, as with a vector of zeros
    # Where the input was not edited the model's own value stays, bit for bit.
    edited = (new != old).any(-1, keepdim=True)
    return torch.where(edited, made, activation)


def run(
    model: "HookedModel",
    prompts: Prompts,
    interventions: Sequence[Intervention] = (),
    record: Sequence[Site] = (),
    into: dict[str, Tensor] | None = None,
) -> Tensor:
    """One full forward pass, under the interventions in force and those given.

    Args:
        model: the hooked model.
        prompts: what to run.
        interventions: for this run; they must fire and change something (see `Bound.verdict`).
        record: resolved sites to keep, in `into`, by hook name.
        into: where records go.

    Returns:
        Logits `[batch pos d_vocab]`.
    """
    own = bind(model, interventions)
    prompts = prompts.to(model.device)
    with Plan.of(model, [*model.in_force, *own], record, into).installed(Rows.all(prompts)):
        logits = call_bridge(model, prompts)
    for one in own:
        one.verdict()
    return logits


def call_bridge(model: "HookedModel", prompts: Prompts, cache: Any = None) -> Tensor:
    """The bridge on tokens, masked where they are padded. Logits `[batch pos d_vocab]`."""
    mask = None if prompts.mask is None else prompts.mask.long()
    if cache is None:
        return model.bridge(prompts.tokens, attention_mask=mask, use_cache=False)
    return model.bridge(prompts.tokens, attention_mask=mask, past_key_values=cache)
