"""Activation patching and causal tracing."""

from mechinterp.patching.result import SweepResult
from mechinterp.patching.sweep import sweep
from mechinterp.patching.trace_result import TraceResult
from mechinterp.patching.tracing import trace

__all__ = ["SweepResult", "TraceResult", "sweep", "trace"]
