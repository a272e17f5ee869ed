"""One circuit, many ways to ask how faithful it is: the range of answers is part of the answer.

Faithfulness depends on what is cut (edges, or whole nodes), on what a cut edge carries, on whether a circuit is left in
the clean run or restored into the corrupted one, and on whether it is kept at all positions (Miller, Chughtai &
Saunders 2024, "Transformer circuit faithfulness metrics are not robust"). The same edges are run under every
combination.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from tqdm.auto import tqdm

from mechinterp.circuits.ablations import Ablation, Direction
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.runner import Runner, held_out_of
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, templates_of
from mechinterp.metrics import Metric
from mechinterp.results import Result, plain
from mechinterp.statistics import interval_scope
from mechinterp.tasks.pairs import PromptPairs

SEPARATOR = " · "
LABELS = ("level", "ablation", "direction", "positions")
NUMBERS = ("faithfulness", "ci_low", "ci_high", "edges")
Level = Literal["edge", "node"]
Positions = Literal["all", "roles"]


@dataclass(frozen=True, repr=False)
class ProtocolSweep(Result):
    """Faithfulness by protocol.

    `data` holds, over `protocol` ("edge · resample · noise · all", …): `faithfulness`, `ci_low`, `ci_high` (95%) and
    `edges`.
    """

    def top(self, n: int = 24) -> pd.DataFrame:
        """All protocols, from the least to the most faithful."""
        frame = self.to_frame()
        parts = [label.split(SEPARATOR) for label in frame.pop("protocol")]
        for i, name in enumerate(LABELS):
            frame.insert(i, name, [part[i] for part in parts])
        return frame.sort_values("faithfulness", kind="stable").head(n).reset_index(drop=True)

    def summary(self) -> str:
        """The range of answers in one line."""
        values = self.data["faithfulness"].values
        defined = values[np.isfinite(values)]
        if not defined.size:
            return "undefined under every protocol: the runs do not differ"
        return (
            f"the same circuit of {self.about['edges']} edges has a faithfulness of {defined.min():.2f} … "
            f"{defined.max():.2f} under {len(defined)} protocols (n={self.about['n_prompts']}, 95% "
            f"{self.about['scope']})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, one row a protocol."""
        return {
            **self.about,
            "protocols": [plain(row) for row in self.top(len(self.data["protocol"])).to_dict("records")],
        }


def protocol_sweep(
    circuit: Circuit,
    pairs: PromptPairs,
    *,
    levels: Sequence[Level] = ("edge", "node"),
    ablations: Sequence[Ablation | str] = ("resample", "mean", "zero"),
    directions: Sequence[Direction] = ("noise", "denoise"),
    positions: Sequence[Positions] = ("all", "roles"),
    metric: Metric | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ProtocolSweep:
    """Faithfulness of a circuit under every combination.

    Args:
        circuit: of a graph without places.
        pairs: held out.
        levels: "edge" keeps the circuit's edges, "node" every edge out of a node that has one in the circuit.
        ablations: what cut edges carry. Only "resample" can be denoised.
        directions: "noise" leaves the circuit in the clean run, "denoise" restores it into the corrupted run.
        positions: "all", or "roles": edges are kept at positions that have a role, and cut elsewhere. Left out where
            the pairs have no roles.
        metric: as elsewhere; by default that of the search.
        seed: of the intervals.
        progress: show a progress bar.

    Raises:
        UserError: a circuit with places, no protocol, no pair that was not searched on.
    """
    graph = circuit.graph
    if graph.positions:
        raise UserError(f"a protocol sweep lays a circuit on positions itself; found {graph!r}")
    where: list[Positions] = [one for one in positions if one == "all" or pairs.roles]
    asked = [Ablation.of(one) for one in ablations]
    plans: list[tuple[Ablation, Direction, Positions]] = [
        (ablation, direction, at)
        for ablation in asked
        for direction in directions
        for at in where
        if direction == "noise" or ablation.kind == "resample"
    ]
    if not plans or not levels:
        raise UserError(
            "a protocol sweep needs a protocol: denoising goes with 'resample', roles with pairs that have them"
        )
    pairs, _ = held_out_of(circuit.about, pairs)
    rows, labels = [], []
    for ablation, direction, at in tqdm(plans, desc="protocols", disable=not progress):
        laid = graph if at == "all" else replace(graph, positions="roles").at(pairs)
        runner = Runner.of(laid, pairs, ablation, direction, metric or circuit.about.get("metric"))
        for level in levels:
            kept = circuit.kept if level == "edge" else graph.nodes_of(circuit.kept)[graph.node_of]
            here = graph.mask_of(kept)[..., None].expand(-1, -1, len(laid.places)).clone()
            if at == "roles":
                here[..., -1] = False
            one = Circuit(laid, laid.gather(here))
            estimate, low, high = (float(side[0]) for side in runner.ratio(runner.run(one).metric[None], seed))
            labels.append(SEPARATOR.join((level, _named(ablation), direction, at)))
            rows.append((estimate, low, high, float(kept.sum())))
    columns = {name: ("protocol", column) for name, column in zip(NUMBERS, np.array(rows).T, strict=True)}
    about = provenance(graph.model, pairs) | {
        "edges": len(circuit),
        "metric": runner.engine.metric.name,
        "seed": seed,
        "scope": interval_scope(templates_of(pairs)),
    }
    return ProtocolSweep(xr.Dataset(columns, coords={"protocol": labels}), about)


def _named(ablation: Ablation) -> str:
    """`mean by role` where means were asked for by something."""
    return ablation.kind if ablation.by is None else f"{ablation.kind} by {ablation.by}"
