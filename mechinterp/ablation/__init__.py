"""Knock-outs of heads, MLPs, neurons and edges of attention, and what the model does to make up for them."""

from mechinterp.ablation.cumulative import Cumulative, cumulative
from mechinterp.ablation.knock_out import KnockOut, knock_out
from mechinterp.ablation.pairwise import Pairwise, pairwise
from mechinterp.ablation.scan import ScanResult, scan
from mechinterp.ablation.self_repair import SelfRepair, self_repair

__all__ = [
    "Cumulative",
    "KnockOut",
    "Pairwise",
    "ScanResult",
    "SelfRepair",
    "cumulative",
    "knock_out",
    "pairwise",
    "scan",
    "self_repair",
]
