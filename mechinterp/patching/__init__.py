"""Activation patching."""

from mechinterp.patching.result import SweepResult
from mechinterp.patching.sweep import sweep

__all__ = ["SweepResult", "sweep"]
