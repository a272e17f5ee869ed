"""What stays of logits `[row d_vocab]` once a lens has made them; a row is one prompt at one position.

Reading them costs as much as making them if it is done carelessly: every pass over the vocabulary counts, so there are
few, and a block of rows stays in the processor's cache from the first pass to the last.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.tasks.pairs import Answers

Values = dict[str, Tensor]
BLOCK = {"cpu": 6_000_000, "cuda": 1_000_000_000}  # bytes of logits between the passes


@dataclass(frozen=True, eq=False)
class Final:
    """The model's own distribution: probabilities `[row d_vocab]` and their entropy `[row]`, in nats."""

    prob: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Final":
        """Of the model's logits."""
        prob = logits.softmax(-1)
        return cls(prob, logits.logsumexp(-1) - torch.linalg.vecdot(prob, logits))

    def take(self, rows: slice) -> "Final":
        """Some rows."""
        return Final(self.prob[rows], self.entropy[rows])

    def kl(self, logits: Tensor, log_total: Tensor) -> Tensor:
        """`[row]` KL(final ‖ softmax of `logits`), in nats; `log_total` is their logsumexp."""
        cross_entropy = log_total - torch.linalg.vecdot(self.prob, logits)
        return (cross_entropy - self.entropy).clamp(min=0)  # less than 0 is rounding


def measure(logits: Tensor, final: Final, asked: Answers | None, top: int) -> Values:
    """First tokens, entropy, KL from `final`, logsumexp, and what is `asked` (fields `[row k]`) by row."""
    blocks = list(_blocks(logits))
    parts = [_measure(logits[at], final.take(at), None if asked is None else rows_of(asked, at), top) for at in blocks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK.get(logits.device.type, BLOCK["cuda"]) // (4 * logits.shape[-1]))
    yield from (slice(start, start + size) for start in range(0, len(logits), size))


def rows_of(asked: Answers, rows: slice) -> Answers:
    """Some rows."""
    return Answers(**{name: value[rows] for name, value in vars(asked).items()})


def _measure(logits: Tensor, final: Final, asked: Answers | None, top: int) -> Values:
    best = logits.topk(min(max(top, 2), logits.shape[-1]))
    peak = best.values[:, 0]
    prob = logits.softmax(-1)
    log_total = peak - prob.amax(-1).log()
    made = {
        "log_total": log_total,
        "kl": final.kl(logits, log_total),
        "entropy": log_total - torch.linalg.vecdot(prob, logits),
        "top_token": best.indices[:, :top],
        "top_prob": (best.values[:, :top] - log_total[:, None]).exp(),
        "tie": (best.values[:, 1:2] == peak[:, None]).any(-1).float(),  # whether the first place is shared
    }
    return made if asked is None else made | answer_values(logits, log_total, asked)


def answer_values(logits: Tensor, log_total: Tensor, asked: Answers) -> Values:
    """Probability (the sum over several answers), rank (of the best of several), and the logit difference."""
    chosen = logits.gather(-1, asked.answer)
    known = asked.answer_weight > 0
    # int32: torch sums bools into int64 five times more slowly.
    rank = (logits > chosen.masked_fill(~known, -torch.inf).amax(-1, keepdim=True)).sum(-1, dtype=torch.int32)
    made = {
        "prob": ((chosen - log_total[:, None]).exp() * known).sum(-1),
        "answer_rank": rank.float(),
        "log_rank": (1 + rank).log(),
    }
    if bool((asked.wrong_weight > 0).any()):
        against = (logits.gather(-1, asked.wrong) * asked.wrong_weight).sum(-1)
        made["logit_diff"] = (chosen * asked.answer_weight).sum(-1) - against
    return made
