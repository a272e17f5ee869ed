"""Run a model on prompt pairs and score it: per prompt, under the interventions in force."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked import schedule, suffix
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.suffix import Read
from mechinterp.metrics import Function, LogitDiff, Metric, Prob, as_metric
from mechinterp.statistics import Interval, bootstrap_ratio, interval_scope
from mechinterp.tasks.pairs import PromptPairs


def evaluate(
    model: HookedModel,
    pairs: PromptPairs,
    metric: Metric | str | Callable[[Tensor], Tensor] | None = None,
    side: str = "clean",
) -> Tensor:
    """The metric of every prompt of one side, under the interventions in force.

    Args:
        model: the hooked model.
        pairs: prompts and answers.
        metric: a metric, its name, or a function of logits `[batch pos d_vocab]` to `[batch]`.
        side: "clean" or "corrupted".

    Returns:
        `[prompt]` values, on the CPU.

    Raises:
        UserError: unknown metric or side, or pairs that the metric cannot score.
    """
    if side not in ("clean", "corrupted"):
        raise UserError(f"unknown side {side!r}; valid: 'clean', 'corrupted'")
    metric = as_metric(metric)
    pairs = metric.prepare(pairs)
    read = metric.read(pairs)
    logits = read_logits(model, pairs.clean if side == "clean" else pairs.corrupted, read)
    clean = None
    if metric.needs_clean:
        clean = logits if side == "clean" else read_logits(model, pairs.clean, read)
    return metric(logits, pairs.answers, clean)


def read_logits(model: HookedModel, prompts: Prompts, read: Read) -> Tensor:
    """`[prompt target column]` on the CPU: what `read` asks for, in chunks that fit into memory."""
    parts = []
    for index in chunks(model, len(prompts), prompts.n_pos, read.columns is None):
        recording = suffix.record(model, prompts, index=index)
        parts.append(recording.base_logits(read).cpu())
    return torch.cat(parts)


def chunks(model: HookedModel, n: int, n_pos: int, read_vocab: bool, every_position: bool = False) -> Iterator[Tensor]:
    """Consecutive prompts to run at once; all of them when a plain function in force may look at the whole batch.

    `read_vocab`: logits over the whole vocabulary are kept, at one position a prompt or at `every_position`.
    """
    if all(bound.intervention.folds for bound in model.in_force):
        per_call = max(1, schedule.max_tokens(model, n_pos, read_vocab, every_position) // n_pos)
    else:
        per_call = n
    yield from torch.arange(n).split(per_call)


@dataclass(frozen=True)
class Baseline:
    """What the model does on the task before anything is changed.

    Attributes:
        metric: name.
        clean, corrupted: mean of the metric, with its interval.
        accuracy: share of prompts whose answer beats the wrong answer (clean side); None without wrong answers.
        prob: mean probability of the answer (clean side); None where answers are not single tokens.
        n: prompts.
        scope: what the intervals generalise over.
    """

    metric: str
    clean: Interval
    corrupted: Interval
    accuracy: float | None
    prob: float | None
    n: int
    scope: str

    def __str__(self) -> str:
        def show(interval: Interval) -> str:
            return f"{float(interval.estimate):.2f} [{float(interval.low):.2f}, {float(interval.high):.2f}]"

        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.0%}"
        prob = "" if self.prob is None else f", P(answer) {self.prob:.2f}"
        return (
            f"clean {self.metric} {show(self.clean)}, corrupted {show(self.corrupted)}{accuracy}{prob}, "
            f"n={self.n} (95% {self.scope})"
        )


def baseline(model: HookedModel, pairs: PromptPairs, metric: Metric | str | None = None, seed: int = 0) -> Baseline:
    """Metric of the clean and the corrupted prompts, accuracy and probability of the answer, with intervals."""
    metric = as_metric(metric)
    ready = metric.prepare(pairs)
    # The whole vocabulary of the clean run, once: accuracy and probability come from it too.
    clean = read_logits(model, ready.clean, Read(metric.read(ready).positions))
    corrupted = read_logits(model, ready.corrupted, metric.read(ready))
    clusters = templates_of(pairs)

    def interval(logits: Tensor) -> Interval:
        values = metric(logits, ready.answers, clean).double().numpy()
        return bootstrap_ratio(values, clusters=clusters, seed=seed)

    accuracy, prob = None, None
    if pairs.continuations is None and not isinstance(metric, Function):
        prob = float(Prob()(clean, ready.answers).mean())
        if pairs.answers.has_wrong:
            gap = LogitDiff()(_columns(clean, LogitDiff().read(ready)), ready.answers)
            accuracy = float((gap > 0).double().mean())
    ours, theirs = interval(_columns(clean, metric.read(ready))), interval(corrupted)
    return Baseline(metric.name, ours, theirs, accuracy, prob, len(pairs), interval_scope(clusters))


def _columns(logits: Tensor, read: Read) -> Tensor:
    """The columns that a metric reads, out of the whole vocabulary."""
    return logits if read.columns is None else logits.gather(-1, read.columns)


def provenance(model: HookedModel, pairs: PromptPairs | None = None) -> dict[str, Any]:
    """What every result says of its origin, as plain values: the model, what is in force, the pairs."""
    about: dict[str, Any] = {
        "model": model.info.name,
        "header": model.header(),
        "in_force": [f"{type(one.intervention).__name__} at {one.writes}" for one in model.in_force],
    }
    if pairs is not None:
        about |= {
            "bos": bool(pairs.clean.bos),
            "task": pairs.name,
            "corruption": pairs.corruption,
            "pairs": dict(pairs.source),
            "n_prompts": len(pairs),
        }
    return about


def token_losses(model: HookedModel, prompts: Prompts) -> Tensor:
    """`[prompt pos]` loss of predicting each token from those before it, in nats, under the interventions in force.

    Position 0 and padding have no loss: nan.
    """
    losses = torch.full(prompts.tokens.shape, torch.nan)
    real = prompts.real.cpu()
    for index in chunks(model, len(prompts), prompts.n_pos, read_vocab=True, every_position=True):
        part = prompts.take(index)
        logits = suffix.record(model, prompts, index=index).base_logits(Read())
        predicted = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), part.tokens[:, 1:].flatten().to(logits.device), reduction="none"
        )
        losses[index, 1:] = predicted.reshape(len(index), -1).cpu()
    begun = real & real.roll(1, dims=1)
    begun[:, 0] = False
    return losses.masked_fill(~begun, torch.nan)


def templates_of(pairs: PromptPairs) -> np.ndarray | None:
    """`[prompt]` template numbers, the clusters of every interval; None if the pairs have none."""
    return None if pairs.clean.template is None else pairs.clean.template.cpu().numpy()


def require_behaviour(metric: Metric, clean: Tensor, corrupted: Tensor) -> None:
    """Stop before a sweep of a behaviour that the model does not have.

    Raises:
        UserError: the mean clean metric is not better than the corrupted one, or a logit difference is not positive.
    """
    better, worse = float(clean.mean()), float(corrupted.mean())
    if metric.higher_is_better is False:
        better, worse = -better, -worse
    if better > worse and not (isinstance(metric, LogitDiff) and better <= 0):
        return
    raise UserError(
        f"the model does not do this task: mean {metric.name} is {float(clean.mean()):.3f} on the clean prompts and "
        f"{float(corrupted.mean()):.3f} on the corrupted ones (n={len(clean)}). Check the prompts, the answers' "
        "leading spaces and the BOS, or sweep all the same with force=True (--force)"
    )
