"""Searches on planted models beside the truth: what a method claims, what it should, and what it overlooked.

1. Search. Take what the scores claim: units (edges, or nodes where those are scored) above a threshold, or, where
   scores of false units are not near 0 (`TOP_N`), as many of the largest as are true.
2. Compare with the units that a single patch shows in this direction: precision, recall and AUROC; beside it AUROC for
   the whole circuit.
3. Patch what was missed alone: how large an effect was overlooked, and what score did it have?
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import mechinterp as mi
from experiments.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mechinterp.circuits import Circuit, Graph, Scores
    from mechinterp.circuits.methods import Method
    from mechinterp.models.planted import PlantedCircuit
    from mechinterp.tasks import PromptPairs

Level = Literal["edge", "node"]
Direction = Literal["noise", "denoise"]
DIRECTIONS: tuple[Direction, ...] = ("noise", "denoise")
CONTROL = "norm (control)"
TOP_N = ("ifr", "learned-mask", CONTROL)  # all of their scores are well above 0


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Settings of the run; the same settings always have the same run folder."""

    model: str = "planted"
    """A planted model, or "planted" for all of them."""
    n: int = 32
    """Prompt pairs."""
    methods: tuple[str, ...] = ()
    """Methods; by default all."""
    threshold: float = 1e-5
    """Absolute score above which an edge or node is claimed; scores are logits, of a logit difference of 7 or 8."""
    steps: int = 5
    """Steps of integrated gradients; completeness is shown for four times as many, too."""
    mask_steps: int = 100
    """Training steps of learned masks."""

    def models(self) -> dict[str, mi.HookedModel]:
        """The models by name. Raises UserError for one that is not planted."""
        from mechinterp.models.planted import PLANTED

        names = tuple(PLANTED) if self.model == "planted" else (self.model,)
        unknown = [name for name in names if name not in PLANTED]
        if unknown:
            raise mi.UserError(
                f"{unknown[0]!r} is no planted model; valid: planted (all of them), {', '.join(PLANTED)}"
            )
        return {name: replace(self, model=name).load() for name in names}

    def chosen(self) -> tuple[str, ...]:
        """The methods. Raises UserError for an unknown one."""
        from mechinterp.circuits.find import as_method

        return tuple(as_method(name).name for name in self.methods or mi.circuits.METHODS)


@dataclass(frozen=True)
class Row:
    """One search beside the truth; undefined is None. `missed`, `unseen` and `outside` are names of units.

    Attributes:
        auroc_circuit: AUROC for the whole circuit, whatever this direction can show.
        missed: true and not claimed.
        unseen: claimed, of the circuit, but not for this direction to show.
        outside: claimed, not of the circuit.
        missed_effect, missed_score: the largest exact effect and the largest score of what was missed, in logits.
        refused: why the method does not work here.
    """

    model: str
    method: str
    direction: Direction
    level: Level
    claim: str
    precision: float | None = None
    recall: float | None = None
    auroc: float | None = None
    auroc_circuit: float | None = None
    seconds: float | None = None
    claimed: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    missed_effect: float | None = None
    missed_score: float | None = None
    refused: str = ""

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "Row":
        """From its plain values."""
        names = ("claimed", "missed", "unseen", "outside")
        return cls(**{**saved, **{name: tuple(saved[name]) for name in names}})

    @property
    def n_true(self) -> int:
        """How many units the direction can show."""
        return len(self.missed) + len(self.claimed) - len(self.unseen) - len(self.outside)

    @property
    def is_exact(self) -> bool:
        """Claims the truth and nothing else."""
        return self.precision == self.recall == 1.0


def searches(
    model: mi.HookedModel, pairs: "PromptPairs", config: SearchSettings, show: Callable[[Row], object]
) -> dict[str, Any]:
    """Rows of every method and of the control in both directions, each shown when it is done; and the completeness of
    integrated gradients. As plain values."""
    from mechinterp.models.planted import circuit

    graph, planted, rows, residuals = mi.circuits.Graph(model), circuit(model.info.name), [], []
    methods = config.chosen()
    for name in (*methods, CONTROL):
        for direction in DIRECTIONS:
            row = search(graph, pairs, planted, name, direction, config)
            show(row)
            rows.append(asdict(row))
    if "eap-ig" in methods:
        for direction in DIRECTIONS:
            residuals += [completeness(graph, pairs, direction, steps) for steps in (config.steps, 4 * config.steps)]
    return {"rows": rows, "residuals": residuals}


def search(
    graph: "Graph",
    pairs: "PromptPairs",
    planted: "PlantedCircuit",
    name: str,
    direction: Direction,
    config: SearchSettings,
) -> Row:
    """One search beside the truth."""
    level: Level = mi.circuits.METHODS[name].level if name != CONTROL else "edge"
    true = visible(planted, direction, level)
    n = len(units(true, level))
    row = Row(graph.model.info.name, name, direction, level, "top-n" if name in TOP_N else "threshold")
    began = time.perf_counter()
    try:
        scores = scored(graph, pairs, name, direction, n, config)
    except mi.UserError as error:
        return replace(row, refused=str(error))
    seconds = time.perf_counter() - began
    top = name in TOP_N
    made = scores.select(n if top else None, threshold=None if top else config.threshold, prune=False)
    measures = mi.circuits.agreement(made, true, level=level)
    row = replace(
        row, precision=measures["precision"], recall=measures["recall"], seconds=round(seconds, 3),
        auroc=mi.circuits.agreement(scores, true, level=level)["auroc"],
        auroc_circuit=mi.circuits.agreement(scores, planted.edges, level=level)["auroc"],
    )  # fmt: skip
    return beside_truth(row, made, scores, true, planted, pairs)


def scored(
    graph: "Graph", pairs: "PromptPairs", name: str, direction: Direction, n: int, config: SearchSettings
) -> "Scores":
    """Scores by a method, or those of the control."""
    from mechinterp.circuits.rankings import by_norm

    if name == CONTROL:
        values = by_norm(mi.circuits.Engine(graph, pairs, direction=direction), "edge", config.seed)
        return mi.circuits.Scores(graph, values, "edge", values.new_zeros(0, len(values)))
    method = method_of(name, n / graph.n_edges, config)
    return mi.circuits.find(
        graph, pairs, method, direction=direction, controls=False, draws=0, seed=config.seed, progress=False
    )


def method_of(name: str, share: float, config: SearchSettings) -> "Method":
    """The method with its settings; `share` is the true share of the edges, for what must be told how many to keep."""
    from mechinterp.circuits.learned_masks import LearnedMask

    made: dict[str, Callable[[], "Method"]] = {
        "eap-ig": lambda: mi.circuits.EAPIG(config.steps),
        "eap-ig-activations": lambda: mi.circuits.EAPIGActivations(config.steps),
        "learned-mask": lambda: LearnedMask(share, config.mask_steps, seed=config.seed),
    }
    return made.get(name, mi.circuits.METHODS[name])()


def visible(planted: "PlantedCircuit", direction: Direction, level: Level) -> tuple[str, ...]:
    """True edges that a patch of one edge shows in this direction; or those out of nodes that a patch of one node does.

    A patched node moves all of its edges at once. So it is seen where one of its edges is, and also where it holds
    several inputs of a gate, which alone are not.
    """
    shown, hidden = planted.and_edges, planted.or_edges
    shown, hidden = (shown, hidden) if direction == "noise" else (hidden, shown)
    edges = (*planted.serial, *shown)
    if level == "edge":
        return edges
    several = [node for node, count in Counter(map(source, hidden)).items() if count > 1]
    nodes = {*map(source, edges), *several}
    return tuple(edge for edge in planted.edges if source(edge) in nodes)


def source(edge: str) -> str:
    """The node that an edge comes out of."""
    return edge.partition("->")[0]


def units(edges: Iterable[str], level: Level) -> list[str]:
    """The edges themselves, or the nodes that they come out of."""
    return list(dict.fromkeys(edges if level == "edge" else map(source, edges)))


def beside_truth(
    row: Row, made: "Circuit", scores: "Scores", true: Iterable[str], planted: "PlantedCircuit", pairs: "PromptPairs"
) -> Row:
    """The row with the names of what was claimed and what was missed, and the exact effects of the latter."""
    level: Level = scores.level
    claimed, wanted, whole = (units(edges, level) for edges in (made.edges, true, planted.edges))
    missed = [unit for unit in wanted if unit not in claimed]
    row = replace(
        row, claimed=tuple(claimed), missed=tuple(missed),
        unseen=tuple(unit for unit in claimed if unit in whole and unit not in wanted),
        outside=tuple(unit for unit in claimed if unit not in whole),
    )  # fmt: skip
    if not missed:
        return row
    cut = cuts(scores.graph, missed, level)
    engine = mi.circuits.Engine(scores.graph, pairs, direction=row.direction)
    effects = (engine.values(scores.graph.mask((~cut).float())) - engine.full).mean(1).abs()
    size = (scores.of_edges.abs() * cut).amax(1)
    return replace(row, missed_effect=float(effects.max()), missed_score=float(size.max()))


def cuts(graph: "Graph", names: list[str], level: Level) -> "Tensor":
    """`[unit edge]` bool: the edges that a patch of each unit exchanges."""
    import torch

    if level == "edge":
        return torch.stack([graph.chosen([name]) for name in names])
    return torch.stack([graph.edges[:, 1] == graph.source_index[name] for name in names])


def completeness(graph: "Graph", pairs: "PromptPairs", direction: Direction, steps: int) -> dict[str, Any]:
    """The sum of the scores of the embedding's edges beside the whole change of the metric, means over prompts."""
    scores = mi.circuits.find(
        graph, pairs, mi.circuits.EAPIG(steps), direction=direction, controls=False, draws=0, progress=False
    )
    total = float(scores.values[graph.edges[:, 1] == graph.source_index["embed"]].sum())
    ends = scores.about["baseline"]
    change = ends["full"] - ends["empty"]
    return {
        "model": graph.model.info.name, "direction": direction, "steps": steps, "rule": mi.circuits.EAPIG().rule,
        "sum": total, "change": change, "residual": total - change, "share": (total - change) / change,
    }  # fmt: skip
