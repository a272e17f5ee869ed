"""Circuit search: find the subgraph that computes a behaviour, and say how far to believe it.

`Graph` -> `find` -> `Scores` -> `select` -> `Circuit`, and `evaluate` on pairs that were not searched on.
"""

from mechinterp.circuits.ablations import Ablation
from mechinterp.circuits.agreement import agreement, overlap
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.evaluation import GRID, Evaluation, evaluate
from mechinterp.circuits.exact import Exact, ExactNodes
from mechinterp.circuits.find import METHODS, find
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.methods import EAP, EAPIG, CleanCorrupted, EAPIGActivations
from mechinterp.circuits.path_patching import path_patch
from mechinterp.circuits.properties import properties
from mechinterp.circuits.protocol import protocol_sweep
from mechinterp.circuits.rewiring import permute_heads, rewire
from mechinterp.circuits.runner import faithfulness
from mechinterp.circuits.scores import Scores

__all__ = [
    "EAP",
    "EAPIG",
    "GRID",
    "METHODS",
    "Ablation",
    "Circuit",
    "CleanCorrupted",
    "EAPIGActivations",
    "Engine",
    "Evaluation",
    "Exact",
    "ExactNodes",
    "Graph",
    "Scores",
    "agreement",
    "evaluate",
    "faithfulness",
    "find",
    "overlap",
    "path_patch",
    "permute_heads",
    "properties",
    "protocol_sweep",
    "rewire",
]
