"""Activations handed to a function inside the one forward, so that none is kept; the run stops behind the last one."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from mechinterp.hooked.forward import Bound, Edit, Plan, call_bridge
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site


class _Seen(Exception):
    pass


def read(
    model: HookedModel,
    prompts: Prompts,
    sites: Sequence[Site],
    use: Callable[[int, Tensor], None],
    edits: Mapping[str, Edit] | None = None,
    in_force: Sequence[Bound] = (),
) -> None:
    """Run prompts and call `use(i, activation)` at each of `sites`.

    Args:
        model: the hooked model.
        prompts: what to run, in one call.
        sites: in the order of the forward pass.
        use: gets the index into `sites` and the activation, which it must not change.
        edits: hook name -> function of (activation, rows), before anything is read.
        in_force: interventions that hold in this run, before the edits. All of the model is then run, so that each
            of them fires.

    Raises:
        UserError: a site that the model does not have.
    """
    prompts, sites = prompts.to(model.device), [model.resolve(site) for site in sites]

    def reader(i: int) -> Edit:
        def look(activation: Tensor, rows: Rows) -> Tensor:
            use(i, activation)
            if i == len(sites) - 1 and not in_force:
                raise _Seen
            return activation

        return look

    plan = Plan.of(model, in_force, edits=edits)
    for i, site in enumerate(sites):
        plan.add(site.hook_name, reader(i))
    try:
        with plan.installed(Rows.all(prompts)):
            call_bridge(model, prompts)
    except _Seen:
        pass
