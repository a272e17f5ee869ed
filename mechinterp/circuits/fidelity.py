"""How well scores stand for exact effects: a stratified sample of edges is patched exactly.

Edges are sorted by |score| and cut into four strata: the top .5%, up to 2%, up to 10%, the rest. As many are drawn from
each, so that the few large edges and the many small ones are both seen; sums are weighted back by the strata's sizes.

- *rank correlation*: Spearman's, over the sample, of scores and exact effects.
- *error*: mean |score − exact| of each stratum.
- *missed mass*: the share of Σ|exact effect| that lies in edges outside the top 2%, those that a circuit of this size
  leaves out; its interval resamples edges within strata.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechinterp.circuits.engine import Engine
from mechinterp.circuits.exact import edge_changes
from mechinterp.circuits.methods import helps
from mechinterp.errors import UserError

BOUNDS = (0.005, 0.02, 0.1, 1.0)
LEFT_OUT = 2  # strata from here on lie outside the top 2%


@dataclass(frozen=True, eq=False, repr=False)
class Fidelity:
    """Scores beside exact effects.

    Attributes:
        sample: one row an edge: edge, stratum, score, exact.
        rank_correlation: Spearman's over the sample; None where one of the two is constant.
        missed_mass: share of the exact effects outside the top 2%, with `low` and `high` (95%); None where all are 0.
        strata: one row a stratum: edges, sampled, mean |score|, mean |exact|, mean error.
    """

    sample: pd.DataFrame
    rank_correlation: float | None
    missed_mass: dict[str, float | None]
    strata: pd.DataFrame

    def __repr__(self) -> str:
        missed, correlation = self.missed_mass, self.rank_correlation
        told = "undefined" if correlation is None else f"{correlation:.2f}"
        mass = "undefined"
        if missed["value"] is not None:
            mass = f"{missed['value']:.0%} [{missed['low']:.0%}, {missed['high']:.0%}]"
        return f"rank correlation with exact effects {told}, missed mass {mass}\n{self.strata.to_string(index=False)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rank_correlation": self.rank_correlation,
            "missed_mass": self.missed_mass,
            "strata": [dict(row) for row in self.strata.to_dict("records")],
            "n": len(self.sample),
        }


def fidelity(engine: Engine, scores: Tensor, n: int, seed: int) -> Fidelity:
    """Patch `n` edges exactly and compare.

    Args:
        engine: of the search: its pairs, ablation, direction and metric.
        scores: `[edge]`.
        n: edges, spread over the strata.
        seed: of the sample and the interval.

    Raises:
        UserError: fewer edges than strata are asked for.
    """
    graph = engine.graph
    if min(n, graph.n_edges) < len(BOUNDS):
        raise UserError(f"fidelity needs at least {len(BOUNDS)} edges, one a stratum; found n={n} on {graph!r}")
    order = torch.argsort(scores.abs(), descending=True, stable=True)
    ends: list[int] = []
    for bound in BOUNDS:  # of a small graph, too, every stratum has an edge
        ends.append(max(int(bound * graph.n_edges), (ends or [0])[-1] + 1))
    draw = torch.Generator().manual_seed(seed)
    members = [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    chosen = [one[torch.randperm(len(one), generator=draw)[: -(-n // len(BOUNDS))]] for one in members]
    edges = torch.cat(chosen)
    changes = sum((edge_changes(part, edges).sum(1) for part in engine.parts()), torch.zeros(len(edges)))
    exact = helps(engine, changes / len(engine))
    stratum = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(one) for one in chosen]))
    sample = pd.DataFrame(
        {
            "edge": [graph.edge_name(int(edge)) for edge in edges],
            "stratum": stratum.numpy(),
            "score": scores[edges].double().numpy(),
            "exact": exact.double().numpy(),
        }
    )
    sizes = np.array([len(one) for one in members])
    ours, theirs = (sample[name].rank().to_numpy() for name in ("score", "exact"))
    varies = np.ptp(ours) > 0 and np.ptp(theirs) > 0
    correlation = float(np.corrcoef(ours, theirs)[0, 1]) if varies else None
    return Fidelity(sample, correlation, _missed(sample, sizes, seed), _strata(sample, sizes))


def _strata(sample: pd.DataFrame, sizes: np.ndarray) -> pd.DataFrame:
    rows = []
    starts = ("top", *(f"{bound:.1%}" for bound in BOUNDS[:-1]))
    for number, (size, start, end) in enumerate(zip(sizes, starts, BOUNDS, strict=True)):
        here = (sample["stratum"] == number).to_numpy()
        score, exact = (sample[name].to_numpy()[here] for name in ("score", "exact"))
        rows.append(
            {
                "stratum": f"{start} to {end:.1%}",
                "edges": int(size),
                "sampled": int(here.sum()),
                "mean |score|": float(np.abs(score).mean()),
                "mean |exact|": float(np.abs(exact).mean()),
                "mean error": float(np.abs(score - exact).mean()),
            }
        )
    return pd.DataFrame(rows)


def _missed(sample: pd.DataFrame, sizes: np.ndarray, seed: int, draws: int = 2000) -> dict[str, float | None]:
    rng = np.random.default_rng(seed)
    exact, stratum = np.abs(sample["exact"].to_numpy()), sample["stratum"].to_numpy()
    parts = [exact[stratum == number] for number in range(len(sizes))]

    def share(means: np.ndarray) -> np.ndarray:
        mass = means * sizes
        return np.asarray(mass[..., LEFT_OUT:].sum(-1) / mass.sum(-1))

    found = np.array([part.mean() for part in parts])
    if not found.any():
        return {"value": None, "low": None, "high": None}
    resampled = [part[rng.integers(len(part), size=(draws, len(part)))].mean(1) for part in parts]
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(share(np.stack(resampled, -1)), [0.025, 0.975])
    return {"value": float(share(found)), "low": float(low), "high": float(high)}
