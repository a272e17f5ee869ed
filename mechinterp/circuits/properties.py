"""Completeness, minimality and sufficiency of a circuit's classes (Wang et al. 2023, section 4).

F(X) is the faithfulness of the edges X; taking nodes K out of X cuts every edge out of them.

1. *Completeness*: |F(C∖K) − F(M∖K)| should be small for every set K of the circuit's nodes: what the circuit lacks
   shows when the rest must stand without K. K is each class, random sets of nodes, and sets chosen greedily: node after
   node, of ten drawn the one whose removal sets the circuit and the model furthest apart.
2. *Minimality* of a class v: the largest |F(C∖(K∪v)) − F(C∖K)| over K in: nothing, each other class, random sets. A
   class that never matters is not part of the circuit. Control: the mean of the same maximum over random sets of as
   many other nodes of the circuit.
3. *Sufficiency* of a class: F of the circuit without all other classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.ablations import Ablation, Direction, as_direction
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.runner import Runner, held_out_of
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, templates_of
from mechinterp.metrics import Metric
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope
from mechinterp.tasks.pairs import PromptPairs

SEPARATOR = " · "
NUMBERS = ("estimate", "ci_low", "ci_high", "control")
CONTROLS = 3  # random sets of minimality's control: each is as dear as a class
CANDIDATES = 10  # drawn at each step of the greedy search, as in the paper


@dataclass(frozen=True, repr=False)
class Properties(Result):
    """`data` holds, over `row` ("completeness · name movers", …): `estimate`, `ci_low`, `ci_high` (95%, in units of
    faithfulness), and `control` of minimality (NaN elsewhere)."""

    def top(self, n: int = 40) -> pd.DataFrame:
        """All rows, the property and the class (or kind of set) apart."""
        frame = self.to_frame()
        parts = [label.split(SEPARATOR, 1) for label in frame.pop("row")]
        frame.insert(0, "of", [part[1] for part in parts])
        frame.insert(0, "property", [part[0] for part in parts])
        return frame.head(n)

    def summary(self) -> str:
        """The least complete set and the class that matters least."""
        rows = self.top(1000).to_dict("records")
        worst = max((row for row in rows if row["property"] == "completeness"), key=lambda row: row["estimate"])
        least = min((row for row in rows if row["property"] == "minimality"), key=lambda row: row["estimate"])
        return (
            f"least complete without {worst['of']}: {worst['estimate']:.2f} [{worst['ci_low']:.2f}, "
            f"{worst['ci_high']:.2f}]; the class that matters least is {least['of']}: {least['estimate']:.2f} "
            f"(random nodes {least['control']:.2f}; n={self.about['n_prompts']}, 95% {self.about['scope']})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.about, "rows": [plain(row) for row in self.top(1000).to_dict("records")]}


def properties(
    circuit: Circuit,
    pairs: PromptPairs,
    classes: Mapping[str, Sequence[str]],
    *,
    draws: int = 10,
    greedy_steps: int = 5,
    ablation: Ablation | str | None = None,
    direction: Direction | None = None,
    metric: Metric | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Properties:
    """Completeness, minimality and sufficiency.

    Args:
        circuit: the edges.
        pairs: held out.
        classes: name -> sources, such as {"name movers": ["a9.h6", "a9.h9"]}.
        draws: random sets.
        greedy_steps: nodes of the greedy set.
        ablation, direction, metric: by default those of the circuit's search.
        seed: of all that is drawn, and of the intervals.
        progress: show a progress bar.

    Raises:
        UserError: no class, or a node that the graph does not have.
    """
    about, graph = circuit.about, circuit.graph
    asked = Ablation.described(about, ablation)
    pairs, _ = held_out_of(about, pairs)
    runner = Runner.of(
        graph, pairs, asked, as_direction(direction or about.get("direction", "noise")), metric or about.get("metric")
    )
    with tqdm(desc="properties", unit="circuit", disable=not progress) as bar:
        study = _Study(runner, circuit, _nodes(graph, classes), draws, greedy_steps, seed, bar)
        rows = [*study.completeness(), *study.minimality(), *study.sufficiency()]
    columns = {name: ("row", np.array([row[name] for row in rows])) for name in NUMBERS}
    labels = [f"{row['property']}{SEPARATOR}{row['of']}" for row in rows]
    described = provenance(graph.model, pairs) | {
        "classes": {name: list(members) for name, members in classes.items()},
        "edges": len(circuit),
        **runner.engine.ablation.about(),
        "direction": runner.engine.direction,
        "metric": runner.engine.metric.name,
        "draws": draws,
        "seed": seed,
        "scope": interval_scope(templates_of(pairs)),
    }
    return Properties(xr.Dataset(columns, coords={"row": labels}), described)


def _nodes(graph: Graph, classes: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """`[node]` bool of every class."""
    if not classes:
        raise UserError("properties need at least one class of nodes; found none")
    made = {}
    for name, members in classes.items():
        chosen = torch.zeros(len(graph.sources), len(graph.places), dtype=torch.bool)
        for member in members:
            if member not in graph.source_index:
                raise UserError(
                    f"class {name!r}: this graph has no source {member!r}; sources are like a0.h0, m0, embed"
                )
            chosen[graph.source_index[member]] = True
        made[name] = chosen.flatten()
    return made


@dataclass
class _Study:
    """The runs of one circuit with nodes taken out."""

    runner: Runner
    circuit: Circuit
    classes: dict[str, Tensor]
    draws: int
    greedy_steps: int
    seed: int
    bar: tqdm

    def __post_init__(self) -> None:
        self.graph = self.circuit.graph
        self.draw = torch.Generator().manual_seed(self.seed)
        self.nothing = torch.zeros(self.graph.n_nodes, dtype=torch.bool)
        self.members = torch.stack(list(self.classes.values())).any(0).nonzero().flatten()

    def metric(self, without: Tensor, whole_model: bool = False) -> np.ndarray:
        """`[prompt]` of the circuit, or of the model, without some nodes `[node]`."""
        kept = torch.ones_like(self.circuit.kept) if whole_model else self.circuit.kept
        return self.runner.run(Circuit(self.graph, kept & ~without[self.graph.node_of]), self.bar).metric

    def row(self, kind: str, of: str, difference: np.ndarray, control: float = float("nan")) -> dict[str, Any]:
        """A mean difference in faithfulness, as a size with its interval."""
        whole = self.runner.full - self.runner.empty
        found = bootstrap_ratio(difference, whole, self.runner.clusters, seed=self.seed)
        sides = sorted((float(found.low), float(found.high)))
        estimate = float(found.estimate)
        if kind != "sufficiency" and estimate < 0:
            estimate, sides = -estimate, sorted(-side for side in sides)
        return {
            "property": kind,
            "of": of,
            "estimate": estimate,
            "ci_low": sides[0],
            "ci_high": sides[1],
            "control": control,
        }

    def gap(self, without: Tensor) -> np.ndarray:
        """`[prompt]` circuit less model, both without the nodes."""
        return self.metric(without) - self.metric(without, whole_model=True)

    def random(self) -> Tensor:
        """`[node]` bool: each of the classes' nodes with probability one half."""
        chosen = self.nothing.clone()
        chosen[self.members[torch.rand(len(self.members), generator=self.draw) < 0.5]] = True
        return chosen

    def completeness(self) -> list[dict[str, Any]]:
        rows = [self.row("completeness", name, self.gap(nodes)) for name, nodes in self.classes.items()]
        gaps = [self.gap(self.random()) for _ in range(self.draws)]
        if gaps:
            worst = max(gaps, key=lambda one: abs(one.mean()))
            rows.append(self.row("completeness", f"the worst of {self.draws} random sets", worst))
        if self.greedy_steps:
            rows.append(self.row("completeness", "a greedy set", self.greedy()))
        return rows

    def greedy(self) -> np.ndarray:
        """`[prompt]` gap of the set that grows where it tears circuit and model furthest apart."""
        chosen, best = self.nothing.clone(), self.gap(self.nothing)
        for _ in range(self.greedy_steps):
            left = self.members[~chosen[self.members]]
            tried = []
            for node in left[torch.randperm(len(left), generator=self.draw)[:CANDIDATES]].tolist():
                more = chosen.clone()
                more[node] = True
                tried.append((abs(float(self.gap(more).mean())), node))
            if not tried or max(tried)[0] <= abs(best.mean()):
                break
            chosen[max(tried)[1]] = True
            best = self.gap(chosen)
        return best

    def minimality(self) -> list[dict[str, Any]]:
        rows = []
        beside = [self.random() for _ in range(self.draws)]
        for name, nodes in self.classes.items():
            others = [other & ~nodes for other in (self.nothing, *self.classes.values(), *beside)]
            control = [abs(self.worst(self.as_many(nodes), others).mean()) for _ in range(min(self.draws, CONTROLS))]
            whole = abs((self.runner.full - self.runner.empty).mean())
            size = float(np.mean(control) / whole) if control and whole else float("nan")
            rows.append(self.row("minimality", name, self.worst(nodes, others), size))
        return rows

    def worst(self, nodes: Tensor, beside: list[Tensor]) -> np.ndarray:
        """`[prompt]` the largest change that taking out these nodes ever makes, beside sets that are taken out."""
        changes = [self.metric(other | nodes) - self.metric(other) for other in beside]
        return max(changes, key=lambda one: abs(one.mean()))

    def as_many(self, nodes: Tensor) -> Tensor:
        """`[node]` as many random other nodes of the circuit, the embedding left out."""
        present = self.graph.nodes_of(self.circuit.kept)
        present &= ~nodes
        present[: len(self.graph.places)] = False
        others = present.nonzero().flatten()
        chosen = self.nothing.clone()
        chosen[others[torch.randperm(len(others), generator=self.draw)[: int(nodes.sum())]]] = True
        return chosen

    def sufficiency(self) -> list[dict[str, Any]]:
        rows = []
        for name, nodes in self.classes.items():
            rest = torch.stack(list(self.classes.values())).any(0) & ~nodes
            rows.append(self.row("sufficiency", name, self.metric(rest) - self.runner.empty))
        return rows
