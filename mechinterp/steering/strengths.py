"""How much a steering vector changes a behaviour, against random directions, and what else it changes.

1. `strength` times the vector is added at its site in prompts that ask for the behaviour, and the metric of every
   prompt is read. The prompts are run once; each strength is a suffix run from the vector's layer on
   (hooked/replays.py). Strength 0 is the unsteered run itself.
2. *Control*: random directions of the same norm at the same strengths. A vector passes where it moves the metric by
   more than every one of them, and the interval of its change excludes 0.
3. *Side effect*: KL(unsteered ‖ steered) of the next token at every position of unrelated text, steered everywhere,
   for the vector and for some of the random directions. A change that costs as much KL as a broken model has is no
   finding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance, templates_of
from mechinterp.hooked import schedule, suffix
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.hooked.prompts import Positions, Prompts
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Read
from mechinterp.metrics import Function, Metric, as_metric
from mechinterp.statistics import bootstrap_ratio, interval_scope
from mechinterp.steering.result import SteeringResult
from mechinterp.steering.vectors import SteeringVector, steerable
from mechinterp.tasks.pairs import Answers, PromptPairs, Target
from mechinterp.text import Blocks, blocks

# KL needs the whole vocabulary at every position: a few of the random directions are enough to compare with.
KL_DRAWS = 4
# From (logits, which prompts, their unsteered logits) to a number a row.
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def sweep(
    model: HookedModel,
    steering: SteeringVector,
    prompts: PromptPairs | Input,
    metric: Metric | str | Callable[[Tensor], Tensor] | None = None,
    strengths: Sequence[float] = (-4, -2, -1, 1, 2, 4),
    *,
    draws: int = 19,
    positions: Positions = None,
    unrelated: Blocks | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SteeringResult:
    """Steer with a range of strengths, and with random directions.

    Args:
        model: the hooked model; interventions in force stay in force.
        steering: what to add.
        prompts: pairs, whose clean side is run (see `probes`), or plain prompts for a metric that is a function.
        metric: a metric, its name, or a function of logits `[batch pos d_vocab]` to `[batch]`; the logit difference.
        strengths: factors of the vector; 0 is always among them.
        draws: random directions. By luck alone the vector beats them all in 1 of `draws` + 1 cases.
        positions: of the prompts (see `Prompts.select`); everywhere by default.
        unrelated: text for the side effect; by default 8 blocks of 32 tokens of the built-in text.
        seed: of the random directions and the intervals.
        progress: show a progress bar.

    Returns:
        The metric, its change, control and side effect by strength.

    Raises:
        UserError: no strength but 0, no draws, a metric that cannot score the prompts.
    """
    metric = as_metric(metric)
    given = prompts if isinstance(prompts, PromptPairs) else _without_answers(model, prompts, metric)
    pairs = metric.prepare(given)
    site, factors = steerable(model, steering.site), _factors(strengths)
    if draws < 1:
        raise UserError(f"draws must be at least 1, for a control; found {draws}")
    text = blocks(model, length=32, n=8, per_document=1) if unrelated is None else unrelated
    seeds = np.random.SeedSequence(seed).generate_state(draws).tolist()
    directions = torch.stack([steering.direction, *[steering.random(one).direction for one in seeds]])
    values = _Runner(model, site, directions, factors).behaviour(pairs, metric, positions, progress)
    kl = _Runner(model, site, directions[: 1 + KL_DRAWS], factors).side_effect(text.prompts, progress)
    arrays = _statistics(values, kl, factors, templates_of(given), text.document.cpu().numpy(), seed)
    arrays |= {"steered": (("strength", "prompt"), values[0]), "random": (("draw", "strength", "prompt"), values[1:])}
    about = provenance(model, given) | {
        "site": str(site),
        "vector": dict(steering.about),
        "norm": steering.norm,
        "metric": metric.name,
        "positions": "all" if positions is None else str(positions),
        "draws": draws,
        "seed": seed,
        "unrelated": f"{len(text)} blocks of {text.prompts.n_pos} tokens of {text.source}",
        "control": f"{draws} random directions of the same norm, all beaten by luck in 1 of {draws + 1} cases",
        "scope": interval_scope(templates_of(given)),
    }
    return SteeringResult(xr.Dataset(arrays, coords={"strength": factors}), about)


def _factors(strengths: Sequence[float]) -> list[float]:
    factors = sorted({0.0, *map(float, strengths)})
    if len(factors) < 2 or not np.isfinite(factors).all():
        raise UserError(f"strengths must be finite, and one of them not 0; found {list(strengths)}")
    return factors


def _without_answers(model: HookedModel, given: Input, metric: Metric) -> PromptPairs:
    """Plain prompts as pairs that ask for nothing. Raises UserError for a metric that needs answers."""
    if not isinstance(metric, Function):
        raise UserError(
            f"{metric.name} needs prompts with answers; found plain prompts. Valid: pairs (steering.probes makes them) "
            "or a function of logits as the metric"
        )
    prompts = model.to_prompts(given)
    answers = Answers.build([[Target(prompts.n_pos - 1, {}, {})] for _ in range(len(prompts))])
    return PromptPairs("prompts", "none", prompts, prompts, answers)


@dataclass(frozen=True, eq=False)
class _Runner:
    """Runs prompts with every direction at every strength.

    Attributes:
        directions: `[direction …]`, of the site's shape without batch and pos.
        factors: the strengths, 0 among them.
    """

    model: HookedModel
    site: Site
    directions: Tensor
    factors: Sequence[float]

    def behaviour(self, pairs: PromptPairs, metric: Metric, positions: Positions, progress: bool) -> np.ndarray:
        """`[direction strength prompt]` metric of the clean prompts."""

        def score(logits: Tensor, which: Tensor, unsteered: Tensor) -> Tensor:
            return metric(logits, pairs.answers.take(which), unsteered)

        chosen = pairs.clean.select(positions).cpu() & pairs.clean.real.cpu()
        label = f"steer {self.site}" if progress else None
        return self._run(pairs.clean, chosen, metric.read(pairs), score, label)

    def side_effect(self, prompts: Prompts, progress: bool) -> np.ndarray:
        """`[direction strength prompt]` KL(unsteered ‖ steered), nats a token, steered everywhere."""
        real = prompts.real.cpu()

        def score(logits: Tensor, which: Tensor, unsteered: Tensor) -> Tensor:
            was, now = unsteered.float().log_softmax(-1), logits.float().log_softmax(-1)
            kl = (was.exp() * (was - now)).sum(-1)
            return (kl * real[which]).sum(1) / real[which].sum(1)

        every = Read(torch.arange(prompts.n_pos).expand(len(prompts), -1))
        return self._run(prompts, real, every, score, "side effect" if progress else None)

    def _run(self, prompts: Prompts, chosen: Tensor, read: Read, score: Score, label: str | None) -> np.ndarray:
        """`[direction strength prompt]` scores, steered at the `[prompt pos]` positions chosen."""
        n, n_pos = len(prompts), prompts.n_pos
        # A plain function, in force or as the metric, must see every prompt, in order, from the first position.
        folds = read.positions is not None and all(one.intervention.folds for one in self.model.in_force)
        vocab, every = read.columns is None, read.positions is None or read.positions.shape[1] > 1
        most = schedule.max_tokens(self.model, n_pos, vocab, every)
        steps = [factor for factor in self.factors if factor != 0]
        added = torch.einsum("s,d...->ds...", torch.tensor(steps), self.directions).flatten(0, 1)
        layers = torch.full((len(added),), self.site.layer or 0)
        unsteered, steered = torch.empty(n), torch.empty(len(added), n)
        with tqdm(total=steered.numel(), desc=label, disable=label is None, unit="run") as bar:
            for index in chunks(self.model, n, n_pos, vocab, every) if folds else [torch.arange(n)]:
                recording = suffix.record(self.model, prompts, (), index)
                base = recording.base_logits(read).cpu()
                unsteered[index] = score(base, index, base).float()
                steered[:, index] = unsteered[index]
                first = torch.where(chosen[index].any(1), chosen[index].int().argmax(1), n_pos)
                starts = first.expand(len(added), -1)
                edits = partial(self._edits, added, chosen)
                for cases, which, logits in replay(
                    recording, read, layers, starts, edits, folds=folds, max_tokens=most
                ):
                    steered[cases, which] = score(logits, which, base[which - index[0]]).float()
                    bar.update(len(cases))
            bar.update(steered.numel() - bar.n)
        made = np.empty((len(self.directions), len(self.factors), n))
        moved = np.array(self.factors) != 0
        made[:, ~moved] = unsteered.double().numpy()
        made[:, moved] = steered.double().numpy().reshape(len(made), len(steps), n)
        return made

    def _edits(self, added: Tensor, chosen: Tensor, cases: Tensor) -> dict[str, Edit]:
        """The edit of a call: to each row its case's vector, at its prompt's positions."""

        def edit(activation: Tensor, rows: Rows) -> Tensor:
            at = chosen[rows.index.cpu()][:, rows.start :].to(activation.device)
            at = at.reshape(*at.shape, *[1] * (activation.ndim - 2))
            return torch.where(at, activation + added[cases].to(activation).unsqueeze(1), activation)

        return {self.site.hook_name: edit}


def _statistics(
    values: np.ndarray,
    kl: np.ndarray,
    factors: Sequence[float],
    clusters: np.ndarray | None,
    documents: np.ndarray,
    seed: int,
) -> dict[str, tuple[str, np.ndarray]]:
    """Arrays over `strength`; `values` `[direction strength prompt]` and `kl` `[direction strength block]`, the vector
    first."""
    zero = list(factors).index(0.0)
    change = values - values[:, [zero]]
    mean, moved, cost = (
        bootstrap_ratio(values[0], None, clusters, seed=seed),
        bootstrap_ratio(change[0], None, clusters, seed=seed),
        bootstrap_ratio(kl[0], None, documents, seed=seed),
    )
    random = change[1:].mean(-1)
    beats = (np.abs(moved.estimate) > np.abs(random).max(0)) & (moved.low * moved.high > 0)
    arrays = {
        "mean": mean.estimate, "ci_low": mean.low, "ci_high": mean.high,
        "change": moved.estimate, "change_low": moved.low, "change_high": moved.high,
        "control": random.mean(0), "control_low": random.min(0), "control_high": random.max(0), "passes": beats,
        "kl": cost.estimate, "kl_low": cost.low, "kl_high": cost.high, "kl_control": kl[1:].mean((0, -1)),
    }  # fmt: skip
    return {name: ("strength", array) for name, array in arrays.items()}
