"""Lenses: what the residual stream of each layer would say."""

from mechinterp.lens.direct_effects import DirectEffects, direct_effects
from mechinterp.lens.direct_logit import DirectLogit, direct_logit
from mechinterp.lens.held_out import TunedLensResult, evaluate_tuned_lens
from mechinterp.lens.logit_lens import logit_lens
from mechinterp.lens.result import LensResult
from mechinterp.lens.tuned_lens import TunedLens, TunedLensConfig
from mechinterp.lens.tuning import train_tuned_lens

__all__ = [
    "DirectEffects",
    "DirectLogit",
    "LensResult",
    "TunedLens",
    "TunedLensConfig",
    "TunedLensResult",
    "direct_effects",
    "direct_logit",
    "evaluate_tuned_lens",
    "logit_lens",
    "train_tuned_lens",
]
