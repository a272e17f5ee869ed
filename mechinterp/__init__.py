"""Mechanistic interpretability of transformers: patch, measure, and be told how far to believe it.

Names are imported when they are first used, so that `import mechinterp` is quick and fetches nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mechinterp import (
        ablation,
        circuits,
        evaluation,
        heads,
        lens,
        metrics,
        models,
        patching,
        reporting,
        results,
        sae,
        steering,
        tasks,
        text,
    )  # fmt: skip
    from mechinterp.errors import UserError
    from mechinterp.evaluation import baseline, evaluate
    from mechinterp.hooked.cache import Cache
    from mechinterp.hooked.interventions import Apply, Mean, Noise, Patch, Resample, Steer, Zero
    from mechinterp.hooked.model import HookedModel
    from mechinterp.hooked.prompts import Prompts
    from mechinterp.hooked.sites import Site
    from mechinterp.identities import check
    from mechinterp.models import load
    from mechinterp.sae.splicing.splice import Splice

# Public name -> module that holds it; None: the name is itself a module.
_HOMES: dict[str, str | None] = {
    "ablation": None,
    "circuits": None,
    "evaluation": None,
    "heads": None,
    "lens": None,
    "metrics": None,
    "models": None,
    "patching": None,
    "reporting": None,
    "results": None,
    "sae": None,
    "steering": None,
    "tasks": None,
    "text": None,
    "UserError": "errors",
    "baseline": "evaluation",
    "evaluate": "evaluation",
    "Cache": "hooked.cache",
    "Apply": "hooked.interventions",
    "Mean": "hooked.interventions",
    "Noise": "hooked.interventions",
    "Patch": "hooked.interventions",
    "Resample": "hooked.interventions",
    "Steer": "hooked.interventions",
    "Zero": "hooked.interventions",
    "HookedModel": "hooked.model",
    "Prompts": "hooked.prompts",
    "Site": "hooked.sites",
    "check": "identities",
    "load": "models",
    "Splice": "sae.splicing.splice",
}
__all__ = [
    "Apply",
    "Cache",
    "HookedModel",
    "Mean",
    "Noise",
    "Patch",
    "Prompts",
    "Resample",
    "Site",
    "Splice",
    "Steer",
    "UserError",
    "Zero",
    "ablation",
    "baseline",
    "check",
    "circuits",
    "evaluate",
    "evaluation",
    "heads",
    "lens",
    "load",
    "metrics",
    "models",
    "patching",
    "reporting",
    "results",
    "sae",
    "steering",
    "tasks",
    "text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mechinterp' has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"mechinterp.{name}") if home is None else getattr(import_module(f"mechinterp.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
