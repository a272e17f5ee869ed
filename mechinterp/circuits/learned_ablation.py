"""Learn what to put in the place of a source, so that ablating it hurts least (Li & Janson 2024, "Optimal ablation for
interpretability").

1. Every source has one vector, the same for all prompts and positions. It starts as the mean of what the source writes
   in the clean prompts.
2. A step draws a share, uniform between 0 and 1, and cuts each source with this probability, along all of its edges:
   so vectors learn to stand in for their source alone, and beside many that are cut, as in a small circuit.
3. The loss is KL(clean ‖ this run), the mean over prompts; Adam moves the vectors.

What remains of the loss is due to what a source tells about the prompt; a mean or a resampled value also hurts by
putting the model into a state that it is never in.
"""

from itertools import chain, count

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.ablations import Ablation
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph
from mechinterp.errors import UserError
from mechinterp.tasks.pairs import PromptPairs


def learn_ablation(
    graph: Graph,
    pairs: PromptPairs,
    steps: int = 200,
    lr: float = 0.01,
    seed: int = 0,
    progress: bool = True,
    max_bytes: int | None = None,
) -> Ablation:
    """The constant in place of each source with which random ablations change the model's predictions least.

    A step takes as many prompts as fit in one call, in turn: memory does not grow with the number of prompts.

    Args:
        graph: of the model.
        pairs: clean prompts to learn on, and where their predictions are read; use the ablation on others.
        steps: of training.
        lr: of Adam, as a share of the size of an entry of what the source writes.
        seed: of the sources that are cut.
        progress: show a progress bar.
        max_bytes: memory of a call; by default a quarter of what is free.

    Returns:
        `Ablation("learned", vectors=…)`, vectors `[source d_model]`.

    Raises:
        UserError: see `Engine`; a graph of neurons, no steps, a rate that is not above 0.
    """
    if graph.mlp == "neuron":
        raise UserError(
            "learn_ablation learns one vector of d_model a source; neurons write numbers. Valid: mlp='layer'"
        )
    if steps < 1 or lr <= 0:
        raise UserError(f"learn_ablation needs steps ≥ 1 and lr > 0; found steps={steps}, lr={lr}")
    start, scale = _start(Engine(graph, pairs, Ablation("mean", "clean", "all"), "noise", "kl", max_bytes))
    vectors = start.clone().requires_grad_()
    engine = Engine(graph, pairs, Ablation("learned", vectors=vectors), "noise", "kl", max_bytes)
    moved = torch.zeros_like(start)  # from the start, in units of the scale: one rate then fits every source
    adam = torch.optim.Adam([moved], lr=lr)
    draw = torch.Generator().manual_seed(seed)
    # Parts hold the vectors as they were when a part was made: every step makes its own.
    parts = chain.from_iterable(engine.parts() for _ in count())
    with tqdm(range(steps), desc="learn ablation", unit="step", disable=not progress) as bar:
        for _ in bar:
            kept = torch.rand(len(graph.sources), generator=draw) >= torch.rand((), generator=draw)
            loss = next(parts).metric(engine.graph.mask(kept[None, engine.graph.edges[:, 1]])).mean()
            (moved.grad,) = torch.autograd.grad(loss, vectors)  # Adam does not mind that the scale is left out
            adam.step()
            with torch.no_grad():
                vectors.copy_(start + scale * moved)
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return Ablation("learned", vectors=vectors.detach())


def _start(engine: Engine) -> tuple[Tensor, Tensor]:
    """`[source d_model]` means, and `[source 1]` how large an entry of what a source writes is.

    The median over positions of the root mean square: the first position's output is huge in many models.
    """
    part = next(engine.parts())
    mean = part.ablated.vectors[:, 0, -1]  # the same everywhere; padding is on the left
    return mean, part.live.vectors.square().mean(-1).sqrt().flatten(1).median(1, keepdim=True).values
