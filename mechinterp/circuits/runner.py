"""Runs circuits on pairs that they were not searched on, and says how faithful each one is.

f(C) = (m(C) − m(∅)) / (m(M) − m(∅)), m the mean metric over prompts, ∅ every edge ablated, M the whole model. When a
circuit is denoised, its edges are restored into the corrupted run: then ∅ is the corrupted run and M the clean one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.ablations import Ablation, Direction, as_direction
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.scores import pair_hashes
from mechinterp.errors import UserError
from mechinterp.evaluation import templates_of
from mechinterp.hooked.suffix import Read
from mechinterp.metrics import KL, LogitDiff, Metric, as_metric
from mechinterp.results import plain
from mechinterp.statistics import bootstrap_ratio
from mechinterp.tasks.pairs import PromptPairs


@dataclass(frozen=True, eq=False)
class Run:
    """What a circuit does on each prompt, `[prompt]`: the metric, whether the answer wins (None without wrong answers),
    and KL(model ‖ circuit) in nats."""

    metric: np.ndarray
    accuracy: np.ndarray | None
    kl: np.ndarray


class Runner:
    """Runs circuits on pairs, each distinct one once.

    Attributes:
        engine: reads the whole vocabulary where the task reads.
        full, empty: `[prompt]` metric of the whole model and of none of its edges.
    """

    def __init__(self, engine: Engine):
        self.engine, self._done = engine, dict[bytes, Run]()
        graph = engine.graph
        self._clean = engine.clean_logits
        ones, zeros = torch.ones(graph.n_edges, dtype=torch.bool), torch.zeros(graph.n_edges, dtype=torch.bool)
        self.full, self.empty = (self._run(kept).metric for kept in (ones, zeros))

    @classmethod
    def of(
        cls,
        graph: Graph,
        pairs: PromptPairs,
        ablation: Ablation,
        direction: Direction,
        metric: Metric | str | None,
        max_bytes: int | None = None,
    ) -> "Runner":
        """An engine that reads the whole vocabulary."""
        metric = as_metric(metric)
        whole = Read(metric.read(metric.prepare(pairs)).positions)
        return cls(Engine(graph, pairs, ablation, direction, metric, max_bytes, read=whole))

    def run(self, circuit: Circuit, bar: tqdm | None = None) -> Run:
        """Metric, accuracy and KL of a circuit."""
        made = self._run(circuit.kept)
        if bar is not None:
            bar.update()
        return made

    def _run(self, kept: Tensor) -> Run:
        key = kept.numpy().tobytes()
        if key not in self._done:
            engine = self.engine
            # Denoising restores a circuit into the corrupted run: there, what is kept is what is taken from the clean.
            inside = kept if engine.direction == "noise" else ~kept
            logits = engine.logits(engine.graph.mask(inside.float()[None]))[0]
            self._done[key] = self._measure(logits)
        return self._done[key]

    def _measure(self, logits: Tensor) -> Run:
        pairs, metric = self.engine.pairs, self.engine.metric
        columns = metric.columns(pairs.answers)
        values = metric(_take(logits, columns), pairs.answers, _take(self._clean, columns))
        accuracy = None
        if pairs.answers.has_wrong:
            gap = LogitDiff()(_take(logits, LogitDiff().columns(pairs.answers)), pairs.answers)
            accuracy = (gap > 0).double().numpy()
        kl = KL()(logits, pairs.answers, self._clean).double().clamp(min=0)  # rounding may leave it below
        return Run(values.double().numpy(), accuracy, kl.numpy())

    @property
    def clusters(self) -> np.ndarray | None:
        """`[prompt]` templates."""
        return templates_of(self.engine.pairs)

    def ratio(self, metric: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`[circuit]` faithfulness and the limits of its interval, from `[circuit prompt]`."""
        found = bootstrap_ratio(metric - self.empty, self.full - self.empty, self.clusters, seed=seed)
        return found.estimate, found.low, found.high


def _take(logits: Tensor, columns: Tensor | None) -> Tensor:
    return logits if columns is None else logits.gather(-1, columns.to(logits.device))


def held_out_of(about: Mapping[str, Any], pairs: PromptPairs) -> tuple[PromptPairs, int]:
    """The pairs that scores or a circuit were not searched on, and how many they were searched on.

    Raises:
        UserError: none is left.
    """
    searched = set(about.get("pair_hashes", ()))
    keep = [i for i, one in enumerate(pair_hashes(pairs)) if one not in searched]
    if not keep:
        raise UserError(
            f"all {len(pairs)} pairs were searched on: faithfulness needs others, such as another --seed of the task"
        )
    return (pairs if len(keep) == len(pairs) else pairs.take(torch.tensor(keep))), len(pairs) - len(keep)


def faithfulness(
    circuit: Circuit, pairs: PromptPairs, *, ablation: Ablation | str | None = None,
    direction: Direction | None = None, metric: Metric | str | None = None, seed: int = 0,
) -> dict[str, float | None]:  # fmt: skip
    """Of one circuit: `faithfulness`, `ci_low`, `ci_high`, `accuracy`, `kl`, `full`, `empty`, `metric`; a single
    circuit has no curve. Arguments as in `evaluate`."""
    about = circuit.about
    asked = Ablation.described(about, ablation)
    direction = as_direction(direction or about.get("direction", "noise"))
    pairs, _ = held_out_of(about, pairs)
    runner = Runner.of(circuit.graph, pairs, asked, direction, metric or about.get("metric"))
    run = runner.run(circuit)
    found = runner.ratio(run.metric[None], seed)
    values = {name: float(one[0]) for name, one in zip(("faithfulness", "ci_low", "ci_high"), found, strict=True)}
    ends = {"full": float(runner.full.mean()), "empty": float(runner.empty.mean()), "metric": float(run.metric.mean())}
    accuracy = None if run.accuracy is None else float(run.accuracy.mean())
    return plain({**values, "accuracy": accuracy, "kl": float(run.kl.mean()), **ends})
