"""Edge masks learned by gradient descent, with an L0 penalty (Louizos et al. 2018, "Learning sparse neural networks
through L0 regularization"; Cao et al. 2021; Bhaskar et al. 2024, "Finding transformer circuits with edge pruning").

1. Every edge has a number log_alpha. A step draws one mask from the hard-concrete distribution: with u uniform,
   s = sigmoid((log u − log(1 − u) + log_alpha) / β), stretched to (γ, ζ) and clamped to 0 … 1, so that edges are often
   exactly cut or exactly kept, and the mask still has a gradient.
2. The loss is how far the metric of the masked run is from that of the base run: the mean over prompts of the absolute
   difference, as a share of the same mean with every edge cut. If the metric is KL, that is KL itself, scaled. More
   than the model's own logit difference is no gain, so with a logit difference nothing changes if answer and wrong
   answer change places: swapped labels are no control for this method. Denoising, the base run is the corrupted one:
   what is kept is what may not be restored if the behaviour is to stay away.
3. A Lagrangian holds the expected share of kept edges at the target: + a (share − target) + b (share − target)², with a
   and b raised by the gradient while the rest is lowered (Adam). The target falls from 1 over the first half of the
   steps.
4. A warm start gives log_alpha in the order of |EAP-IG| scores: the smallest begins at 0, the largest at 4. Without it
   all begin at 2.
5. The score of an edge is its probability of being kept, P(mask > 0) = sigmoid(log_alpha − β log(−γ / ζ)).

A step takes as many prompts as fit in one call, in turn, and holds what one forward and backward of these holds, beside
four numbers an edge: memory does not grow with the number of prompts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, repeat
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.engine import Engine, Part
from mechinterp.circuits.methods import EAPIG, Method
from mechinterp.errors import UserError

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch of Louizos et al.


@dataclass(frozen=True)
class LearnedMask(Method):
    """Hard-concrete edge masks, trained to keep a share of the edges and the behaviour.

    Attributes:
        share: target share of edges that are kept.
        steps: of training.
        lr: of Adam, for log_alpha and for the Lagrangian.
        warm_start: begin in the order of EAP-IG scores.
        seed: of the masks that are drawn.
    """

    name: ClassVar[str] = "learned-mask"
    per_prompt: ClassVar[bool] = False
    share: float = 0.02
    steps: int = 200
    lr: float = 0.2
    warm_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"learned-mask: share lies between 0 and 1; found {self.share}")
        if self.steps < 1 or self.lr <= 0:
            raise UserError(f"learned-mask needs steps ≥ 1 and lr > 0; found steps={self.steps}, lr={self.lr}")

    @property
    def reads_labels(self) -> bool:
        return False

    def check(self, engine: Engine) -> None:
        if engine.metric.name == "rank":
            raise UserError("rank has no gradient: it changes in steps. Valid: logit-diff, prob, logprob, kl")

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        self.check(engine)
        if torch.allclose(engine.empty, engine.full, rtol=1e-4, atol=1e-5):  # but for float noise
            raise UserError(f"learned-mask: cutting every edge leaves {engine.metric.name} as it is: nothing to learn")
        yield torch.arange(len(engine)), p_kept(self._train(engine))[None]

    def _train(self, engine: Engine) -> Tensor:
        """`[edge]` log_alpha."""
        draw = torch.Generator().manual_seed(self.seed)
        log_alpha = (_warm(engine) if self.warm_start else torch.full((engine.graph.n_edges,), 2.0)).requires_grad_()
        multipliers = torch.zeros(2, requires_grad=True)
        groups = [{"params": [log_alpha]}, {"params": [multipliers], "maximize": True}]
        adam = torch.optim.Adam(groups, lr=self.lr)
        parts = _parts(engine)
        with tqdm(range(self.steps), desc=self.name, unit="step", disable=not engine.progress) as bar:
            for step in bar:
                target = max(self.share, 1 - (1 - self.share) * step / max(1, self.steps // 2))
                loss = _distance(next(parts), sample(log_alpha, draw))
                excess = p_kept(log_alpha).mean() - target
                total = loss + multipliers[0] * excess + multipliers[1] * excess**2
                log_alpha.grad, multipliers.grad = torch.autograd.grad(total, [log_alpha, multipliers])
                adam.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", excess=f"{excess.item():.3f}")
        return log_alpha.detach()


def sample(log_alpha: Tensor, draw: torch.Generator) -> Tensor:
    """`[edge]` a mask in 0 … 1 from the hard-concrete distribution; differentiable in log_alpha."""
    uniform = torch.rand(log_alpha.shape, generator=draw).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((uniform.logit() + log_alpha) / BETA)
    return (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def p_kept(log_alpha: Tensor) -> Tensor:
    """`[edge]` probability that a drawn mask is above 0."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def _distance(part: Part, kept: Tensor) -> Tensor:
    """Loss of one circuit on some prompts; see the module."""
    engine = part.engine
    whole = (engine.empty - engine.full).abs().mean()
    values = part.metric(engine.graph.mask(kept[None]))[0]
    return (values - engine.full[part.index].to(values)).abs().mean() / whole.to(values)


def _warm(engine: Engine) -> Tensor:
    """`[edge]` log_alpha from 0 to 4 in the order of mean |EAP-IG| over prompts; equal scores begin alike."""
    total = sum(scores.float().cpu().abs().sum(0) for _, scores in EAPIG().scores(engine))
    assert isinstance(total, Tensor)
    distinct, rank = torch.unique(total, return_inverse=True)
    return 4 * rank / max(1, len(distinct) - 1)


def _parts(engine: Engine) -> Iterator[Part]:
    """The prompts, a call's at a time, over and over; recorded once if one call holds them all."""
    if len(engine) <= engine.rows_per_call:
        return repeat(next(engine.parts()))
    return chain.from_iterable(engine.parts() for _ in count())
