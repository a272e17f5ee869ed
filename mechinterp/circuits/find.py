"""Score every edge (or node) of a graph on a task, by any method.

1. The method scores the prompts, some at a time (methods.py, exact.py, …).
2. Scores are averaged over prompts; beside them the same average is kept over resampled prompts (statistics.py), so
   that intervals and inclusion probabilities cost no second run and memory does not grow with the prompts.
3. Control rankings are made from the same pairs (rankings.py).
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.ablations import Ablation, Direction
from mechinterp.circuits.acdc import ACDC
from mechinterp.circuits.atp_star import AtPStar
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.exact import Exact, ExactNodes
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.head_importance import HeadImportance
from mechinterp.circuits.information_flow import InformationFlow
from mechinterp.circuits.learned_masks import LearnedMask
from mechinterp.circuits.methods import EAP, EAPIG, CleanCorrupted, EAPIGActivations, Method
from mechinterp.circuits.rankings import by_norm, reinitialised, swap_labels
from mechinterp.circuits.scores import Scores, pair_hashes
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, require_behaviour, templates_of
from mechinterp.metrics import Metric
from mechinterp.statistics import resampling_weights
from mechinterp.tasks.pairs import PromptPairs

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        EAP, EAPIG, EAPIGActivations, CleanCorrupted, Exact, ExactNodes, AtPStar, HeadImportance, InformationFlow, ACDC,
        LearnedMask,
    )
}  # fmt: skip


def find(
    graph: Graph,
    pairs: PromptPairs,
    method: Method | str = "eap-ig",
    *,
    ablation: Ablation | str = "resample",
    direction: Direction = "noise",
    metric: Metric | str | None = None,
    controls: bool = True,
    draws: int = 100,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
    max_bytes: int | None = None,
) -> Scores:
    """Scores of every edge or node.

    Args:
        graph: of the model.
        pairs: clean and corrupted prompts to search on; evaluate on others.
        method: a method with its settings, such as `EAPIG(steps=10)`, or its name (`METHODS`).
        ablation, direction, metric: see `Engine`.
        controls: also make the control rankings (rankings.py), which costs the search twice more.
        draws: bootstrap draws over prompts that are kept; 0 for none.
        seed: of the bootstrap draws and of the control rankings.
        force: search although the model does not do the task.
        progress: show progress bars.
        max_bytes: memory of a call; by default a quarter of what is free.

    Raises:
        UserError: see `Engine` and the method; a model that does not do the task.
    """
    method = as_method(method)
    engine = Engine(graph, pairs, ablation, direction, metric, max_bytes, progress)
    method.check(engine)
    if not force:
        clean, corrupted = (engine.full, engine.empty) if direction == "noise" else (engine.empty, engine.full)
        require_behaviour(engine.metric, clean, corrupted)
    values, resampled = average(engine, method, draws, seed)
    made = rankings(engine, method, seed) if controls else {}
    told = about(engine, method, seed)
    return Scores(engine.graph, values, method.level, resampled, made, told, engine.ablation, pairs)


def rankings(engine: Engine, method: Method, seed: int) -> dict[str, Tensor]:
    """`[unit]` by control; labels are swapped where they are read at all."""

    def again(pairs: PromptPairs) -> Tensor:
        settings = (engine.ablation, engine.direction, engine.metric, engine.max_bytes, engine.progress)
        return average(Engine(engine.graph, pairs, *settings), method, 0, seed)[0]

    made = {"norm": by_norm(engine, method.level, seed)}
    with reinitialised(engine.model, seed):
        made["reinitialised"] = again(engine.pairs)
    reads_labels = method.reads_labels and not engine.metric.needs_clean and engine.pairs.answers.has_wrong
    if reads_labels:
        made["swapped-labels"] = again(swap_labels(engine.pairs, seed))
    return made


def as_method(method: Method | str) -> Method:
    """From itself or its name. Raises UserError for an unknown name."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; valid: {', '.join(METHODS)}")
    return METHODS[method]()


def average(engine: Engine, method: Method, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """`[unit]` mean scores over prompts, and `[draw unit]` over resampled prompts."""
    n = len(engine)
    draws = draws if method.per_prompt else 0
    weights = torch.from_numpy(resampling_weights(n, templates_of(engine.pairs), max(draws, 1), seed)).float()[:draws]
    total, resampled = torch.zeros(()), torch.zeros(())
    with tqdm(total=n, desc=method.name, unit="prompt", disable=not engine.progress) as bar:
        for index, scores in method.scores(engine):
            scores = scores.float().cpu()
            if not method.per_prompt:
                return scores[0], scores.new_zeros(0, scores.shape[1])
            total = total + scores.sum(0)
            resampled = resampled + weights[:, index] @ scores
            bar.update(len(index))
    return total / n, resampled / weights.sum(1, keepdim=True)


def about(engine: Engine, method: Method, seed: int) -> dict:
    """How scores were made, as plain values; `full` is the whole model, `empty` none of its edges."""
    graph, ends = engine.graph, [float(engine.full.mean()), float(engine.empty.mean())]
    ends = ends if engine.direction == "noise" else ends[::-1]
    return provenance(graph.model, engine.pairs) | {
        "weights_sha256": graph.model.weights_hash(),
        "method": method.name,
        "settings": dict(vars(method)),
        "level": method.level,
        **engine.ablation.about(),
        "direction": engine.direction,
        "metric": engine.metric.name,
        "seed": seed,
        "pairs_sha256": engine.pairs.hash(),
        "pair_hashes": pair_hashes(engine.pairs),
        "graph": {"qkv": graph.qkv, "mlp": graph.mlp, "positions": graph.positions, "places": list(graph.places)},
        "baseline": dict(zip(("full", "empty"), ends, strict=True)),
    }
