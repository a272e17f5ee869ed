"""Planted models: transformers whose weights are written by hand, so that the true circuit is known edge by edge.

`planted-induction` (induction.py) has serial edges only, `planted-and` (conjunction.py) an AND gate in an MLP,
`planted-or` (backup.py) a backup path under grouped-query attention. circuit.py says what the types of edges mean,
weights.py how the weights are made; `mechinterp.tasks.planted` makes the prompt pairs that go with each model.
"""

from mechinterp.models.planted.backup import CIRCUIT as OR
from mechinterp.models.planted.backup import build_or
from mechinterp.models.planted.circuit import Planted, PlantedCircuit
from mechinterp.models.planted.conjunction import CIRCUIT as AND
from mechinterp.models.planted.conjunction import build_and
from mechinterp.models.planted.induction import CIRCUIT as INDUCTION
from mechinterp.models.planted.induction import LETTERS, build_induction
from mechinterp.models.planted.weights import word_tokenizer

__all__ = ["LETTERS", "PLANTED", "Planted", "PlantedCircuit", "circuit", "word_tokenizer"]

PLANTED: dict[str, Planted] = {
    "planted-induction": Planted(
        "two-layer attention-only transformer with hand-written weights: an induction circuit and six distractor heads",
        build_induction,
        INDUCTION,
    ),
    "planted-and": Planted(
        "two-layer transformer with hand-written weights: an MLP that tells a word said twice in a row",
        build_and,
        AND,
    ),
    "planted-or": Planted(
        "two-layer transformer with hand-written weights and grouped-query attention: induction with a backup head",
        build_or,
        OR,
    ),
}


def circuit(name: str) -> PlantedCircuit:
    """The true circuit of a planted model, for example `circuit("planted-induction").heads`."""
    return PLANTED[name].circuit
