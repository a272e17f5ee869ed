"""`mechinterp sites MODEL`."""

from collections.abc import Sequence
from typing import Any

from mechinterp.cli.models import Sites
from mechinterp.commands.inputs import load_model
from mechinterp.commands.output import save, table
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import KINDS
from mechinterp.results import write_json


def run(args: Sites, command: str) -> int:
    """`mechinterp sites MODEL`."""
    model = load_model(args)
    listed = [_describe(model, name) for name in dict.fromkeys(site.name for site in model.site_list)]
    rows = [
        (one["site"], one["shape"], one["layers"], "yes" if one["writable"] else "no", one["meaning"]) for one in listed
    ]
    print(table(("site", "shape", "layers", "writable", "meaning"), rows))
    if args.json:
        save(args.json, {"model": args.model, "header": model.header(), "sites": listed}, write_json)
    return 0


def _describe(model: HookedModel, name: str) -> dict[str, Any]:
    """One row of `sites`."""
    present = [site for site in model.site_list if site.name == name]
    first = present[0]
    sizes = {first.kind.head_axis: model.axis_size(first)} if first.kind.head_axis else {}
    if first.kind.axes[-1] not in ("key", "one"):
        sizes[first.kind.axes[-1]] = model.width(first)
    return {
        "site": name,
        "axes": list(first.kind.axes),
        "sizes": sizes,
        "shape": "[" + " ".join(f"{a}={sizes[a]}" if a in sizes else a for a in first.kind.axes) + "]",
        "layers": _layers([site.layer for site in present if site.layer is not None], model.n_layers),
        "writable": all(model.writable(site) for site in present),
        "hook": first.kind.hook,
        "meaning": KINDS[name].meaning,
    }


def _layers(layers: Sequence[int], n_layers: int) -> str:
    if not layers:
        return "–"
    return "all" if len(layers) == n_layers else " ".join(map(str, layers))
