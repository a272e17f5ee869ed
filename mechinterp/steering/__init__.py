"""Steering: directions that change a behaviour, how much they change it, and at what cost."""

from mechinterp.steering.result import SteeringResult
from mechinterp.steering.strengths import sweep
from mechinterp.steering.vectors import SteeringVector, probes, vector

__all__ = ["SteeringResult", "SteeringVector", "probes", "sweep", "vector"]
