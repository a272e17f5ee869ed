"""Heads by what they attend to and by what their weights do."""

from mechinterp.heads.causal import CausalResult, knock_out_top
from mechinterp.heads.composition import CompositionResult, composition
from mechinterp.heads.copying import CopyingResult, copying
from mechinterp.heads.factors import FactorsResult, factors
from mechinterp.heads.matching import MatchingResult, matching
from mechinterp.heads.patterns import PatternResult, patterns
from mechinterp.heads.tokens import repeated_tokens

__all__ = [
    "CausalResult",
    "CompositionResult",
    "CopyingResult",
    "FactorsResult",
    "MatchingResult",
    "PatternResult",
    "composition",
    "copying",
    "factors",
    "knock_out_top",
    "matching",
    "patterns",
    "repeated_tokens",
]
