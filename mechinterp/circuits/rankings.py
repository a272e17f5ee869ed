"""Control rankings: orders of the edges that know less than the scores claim to know, made from the same pairs.

A random circuit cuts every path and scores 0 for free, so it is no control. These are orders that a sceptic would try:

- *norm*: ‖a_u − s_u‖ of the source alone, its destinations in a random order: where the two runs differ at all.
- *reinitialised*: the same method on the model with its weights drawn anew, each matrix with its own spread.
- *swapped-labels*: the same method with answer and wrong answer exchanged in a random half of the prompts: what matters
  for these prompts, whatever the question is.

All of them are evaluated on the trained model and the true labels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mechinterp.circuits.engine import Engine
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.pairs import PromptPairs


def by_norm(engine: Engine, level: Literal["edge", "node"], seed: int) -> Tensor:
    """`[edge]` (or `[node]`) mean over prompts of ‖a_u − s_u‖ of an edge's source at its places."""
    graph = engine.graph
    total = torch.zeros(len(graph.sources), len(graph.places))
    for part in engine.parts():
        place = engine.place[part.index][:, part.start :]
        real = engine.base.real[part.index.to(engine.base.tokens.device)][:, part.start :].cpu()
        squares = part.squared_differences.cpu()  # [source batch pos]
        for number in range(len(graph.places)):
            here = (place == number) & real
            total[:, number] += (squares * here).sum(-1).sqrt().sum(-1)
    norms = (total / len(engine)).flatten()
    if level == "node":
        return norms
    # Edges out of one node are equal: a factor close to 1 decides between them, at random.
    draw = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed))
    return norms[graph.node_of] * (1 + 1e-3 * draw)


def swap_labels(pairs: PromptPairs, seed: int) -> PromptPairs:
    """Answer and wrong answer exchanged in a random half of the prompts.

    Raises:
        UserError: pairs without wrong answers.
    """
    if not pairs.answers.has_wrong:
        raise UserError("swapped labels need a wrong answer for every pair; found pairs without")
    swap = torch.zeros(len(pairs), dtype=torch.bool)
    swap[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[: len(pairs) // 2]] = True
    at, ours = swap[:, None, None].to(pairs.answers.answer.device), pairs.answers
    return replace(
        pairs,
        answers=replace(
            ours,
            answer=torch.where(at, ours.wrong, ours.answer),
            wrong=torch.where(at, ours.answer, ours.wrong),
            answer_weight=torch.where(at, ours.wrong_weight, ours.answer_weight),
            wrong_weight=torch.where(at, ours.answer_weight, ours.wrong_weight),
        ),
    )


@contextmanager
def reinitialised(model: HookedModel, seed: int) -> Iterator[HookedModel]:
    """The model with every matrix drawn anew from a normal of its own mean and spread; its weights come back at the
    end. Norms and biases stay."""
    parameters = {id(one): one for one in [*model.bridge.original_model.parameters(), *model.bridge.parameters()]}
    matrices = [one for one in parameters.values() if one.ndim >= 2]
    kept = [one.detach().clone() for one in matrices]
    draw = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for one in matrices:
                noise = torch.randn(one.shape, generator=draw).to(one)
                one.copy_(one.mean() + noise * one.std())
        yield model
    finally:
        with torch.no_grad():
            for one, old in zip(matrices, kept, strict=True):
                one.copy_(old)
