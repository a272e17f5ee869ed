"""Metrics: logits at the positions that a task reads -> one number a prompt.

A `Metric` says which token columns it needs (`columns`), so that a sweep unembeds no others, and computes from the
slice `[batch target column]`. A plain function of all logits `[batch pos d_vocab]` works too, at full price.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.suffix import Read
from mechinterp.tasks.pairs import Answers, PromptPairs


@dataclass(frozen=True)
class Metric:
    """Base of the metrics. `name` is what the CLI calls it."""

    name = ""
    higher_is_better = True
    needs_clean = False

    def prepare(self, pairs: PromptPairs) -> PromptPairs:
        """The pairs that this metric runs on. Raises UserError if they are not of the kind that it needs."""
        if pairs.continuations is not None:
            raise UserError(f"{self.name} needs answers of one token, but {pairs.long_answer}. Valid: seq-logprob")
        return pairs

    def columns(self, answers: Answers) -> Tensor | None:
        """`[prompt target column]` token ids that are read; None for the whole vocabulary."""
        return None

    def read(self, pairs: PromptPairs) -> Read:
        """Positions and columns that a run must give."""
        return Read(pairs.answers.pos, self.columns(pairs.answers))

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        """`[batch]` from logits `[batch target column]`; `clean` are the clean run's where `needs_clean`."""
        raise NotImplementedError


@dataclass(frozen=True)
class LogitDiff(Metric):
    """Logit of the answer less that of the wrong answer (weighted means over several), averaged over targets."""

    name = "logit-diff"

    def prepare(self, pairs: PromptPairs) -> PromptPairs:
        pairs = super().prepare(pairs)
        if not pairs.answers.has_wrong:
            raise UserError("logit-diff needs a wrong answer for every pair; found pairs without. Valid: prob, logprob")
        return pairs

    def columns(self, answers: Answers) -> Tensor:
        return torch.cat([answers.answer, answers.wrong], dim=-1)

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        weights = torch.cat([answers.answer_weight, -answers.wrong_weight], dim=-1)
        return ((logits.float() * weights).sum(-1) * answers.weight).sum(-1)


@dataclass(frozen=True)
class Prob(Metric):
    """Probability of the answer (the sum over several), averaged over targets."""

    name = "prob"

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        chosen = logits.float().softmax(-1).gather(-1, answers.answer)
        return ((chosen * (answers.answer_weight > 0)).sum(-1) * answers.weight).sum(-1)


@dataclass(frozen=True)
class LogProb(Metric):
    """Natural log-probability of the answer (weighted mean over several), averaged over targets."""

    name = "logprob"

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        chosen = logits.float().log_softmax(-1).gather(-1, answers.answer)
        return ((chosen * answers.answer_weight).sum(-1) * answers.weight).sum(-1)


@dataclass(frozen=True)
class SeqLogProb(Metric):
    """Natural log-probability of the whole answer by teacher forcing: the sum over its tokens."""

    name = "seq-logprob"

    def prepare(self, pairs: PromptPairs) -> PromptPairs:
        return pairs.teacher_forced()

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        chosen = logits.float().log_softmax(-1).gather(-1, answers.answer)
        return ((chosen * answers.answer_weight).sum(-1) * (answers.weight > 0)).sum(-1)


@dataclass(frozen=True)
class Rank(Metric):
    """Tokens that the model finds likelier than the answer (the best of several); 0 is first. Averaged over targets."""

    name = "rank"
    higher_is_better = False

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        chosen = logits.gather(-1, answers.answer).masked_fill(answers.answer_weight == 0, -torch.inf).amax(-1)
        return ((logits > chosen[..., None]).sum(-1) * answers.weight).sum(-1)


@dataclass(frozen=True)
class KL(Metric):
    """KL(clean ‖ this run) of the next-token distribution, in nats, averaged over targets."""

    name = "kl"
    higher_is_better = False
    needs_clean = True

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        assert clean is not None, "KL compares with the clean run"
        reference, ours = clean.float().log_softmax(-1), logits.float().log_softmax(-1)
        return ((reference.exp() * (reference - ours)).sum(-1) * answers.weight).sum(-1)


@dataclass(frozen=True)
class Function(Metric):
    """A plain function of all logits `[batch pos d_vocab]` to `[batch]`; it reads everything."""

    function: Callable[[Tensor], Tensor]
    name = "function"

    def read(self, pairs: PromptPairs) -> Read:
        return Read()

    def __call__(self, logits: Tensor, answers: Answers, clean: Tensor | None = None) -> Tensor:
        value = self.function(logits)
        if value.shape != logits.shape[:1]:
            raise UserError(f"a metric gives [batch], here {tuple(logits.shape[:1])}; found {tuple(value.shape)}")
        return value


METRICS: dict[str, type[Metric]] = {m.name: m for m in (LogitDiff, Prob, LogProb, SeqLogProb, Rank, KL)}


def as_metric(metric: Metric | str | Callable[[Tensor], Tensor] | None) -> Metric:
    """A metric from itself, its name (UserError if unknown), or a plain function; None is the logit difference."""
    if metric is None:
        return LogitDiff()
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise UserError(f"unknown metric {metric!r}; valid: {', '.join(METRICS)}")
        return METRICS[metric]()
    return Function(metric)
