"""Agreement of scores and circuits with a known circuit, and of circuits with each other."""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch

from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.scores import Scores
from mechinterp.errors import UserError


def agreement(
    found: Scores | Circuit,
    truth: Iterable[str],
    *,
    level: Literal["edge", "node"] = "edge",
    threshold: float = 1e-5,
) -> dict[str, float | None]:
    """Precision, recall and AUROC of what was found against the true edges (or the nodes at their ends).

    Args:
        found: scores, ranked by absolute value; or a circuit, which has no ranking and so no AUROC.
        truth: names of the true edges.
        level: compare edges, or nodes: a node is found if an edge out of it is.
        threshold: the absolute score above which scores claim an edge.

    Returns:
        precision (None where nothing was claimed), recall, and auroc: the chance that a true one is ranked above
        another one, ties counted half (None for a circuit, or where all are true).

    Raises:
        UserError: a true edge that the graph does not have; no true edges.
    """
    graph = found.graph
    true = graph.chosen(truth)
    if not bool(true.any()):
        raise UserError("agreement needs a known circuit; found no true edges")
    size = found.of_edges.abs() if isinstance(found, Scores) else found.kept.float()
    claimed = size > threshold if isinstance(found, Scores) else found.kept
    if level == "node":
        true, claimed = graph.nodes_of(true), graph.nodes_of(claimed)
        size = torch.zeros(graph.n_nodes).scatter_reduce(0, graph.node_of, size, "amax")
    hits = int((true & claimed).sum())
    precision = hits / int(claimed.sum()) if bool(claimed.any()) else None
    return {
        "precision": precision,
        "recall": hits / int(true.sum()),
        "auroc": auroc(size.double().numpy(), true.numpy()) if isinstance(found, Scores) else None,
    }


def auroc(size: np.ndarray, true: np.ndarray) -> float | None:
    """Area under the ROC curve from ranks (Mann & Whitney); None where one of the two classes is empty."""
    n_true, n_false = int(true.sum()), int((~true).sum())
    if not n_true or not n_false:
        return None
    ranks = pd.Series(size).rank().to_numpy()
    return float((ranks[true].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def overlap(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """Jaccard index of the edges of every two circuits of one graph, by name.

    Raises:
        UserError: graphs of other sizes, or two empty circuits.
    """
    names = list(circuits)
    sizes = {circuits[name].graph.n_edges for name in names}
    if len(sizes) > 1:
        raise UserError(f"overlap compares circuits of one graph; found graphs of {sorted(sizes)} edges")
    made = np.ones((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            ours, theirs = circuits[a].kept, circuits[b].kept
            union = int((ours | theirs).sum())
            if not union:
                raise UserError(f"circuits {a!r} and {b!r} are both empty: their overlap is undefined")
            made[i, j] = made[j, i] = int((ours & theirs).sum()) / union
    return pd.DataFrame(made, index=names, columns=names)
