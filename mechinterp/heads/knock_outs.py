"""Losses of a repetition with sets of heads knocked out, and random sets to compare with.

1. The loss is that of the last copy, of its tokens from the second on: the first cannot be foreseen.
2. A head is knocked out by setting its z, at every position, to the mean over the other prompts at the same position
   (counted from the end), or to zero.
3. A run begins at the first layer that is changed (hooked/suffix.py).
4. Random sets have as many heads of each layer, and none of those that they are compared with.
"""

import random
from collections.abc import Sequence
from itertools import combinations, product
from math import comb, prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks
from mechinterp.heads.reading import read
from mechinterp.hooked import suffix
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Read

Head = tuple[int, int]
Value = Literal["mean", "zero"]


def losses_without(
    model: HookedModel, prompts: Prompts, period: int, conditions: Sequence[Sequence[Head]], value: Value
) -> np.ndarray:
    """`[condition prompt pos]` losses of the last copy from its second token on; the heads of a condition are out."""
    layers = sorted({layer for heads in conditions for layer, _ in heads})
    put = _values(model, prompts, layers, value)
    at = torch.arange(prompts.n_pos - period, prompts.n_pos - 1).expand(len(prompts), -1)
    losses = torch.zeros(len(conditions), len(prompts), period - 1, dtype=torch.float64)
    for index in chunks(model, len(prompts), prompts.n_pos, read_vocab=True, every_position=True):
        recording = suffix.record(model, prompts, index=index)
        rows = Rows(recording.prompts, recording.index)
        targets = recording.prompts.tokens[index][:, prompts.n_pos - period + 1 :]
        for i, heads in enumerate(conditions):
            first = min((layer for layer, _ in heads), default=model.n_layers - 1)
            logits = recording.logits(first, rows, Read(at), _edits(heads, put))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            losses[i, index] = loss.reshape(targets.shape).double().cpu()
    return losses.numpy()


def _edits(heads: Sequence[Head], put: dict[int, Tensor]) -> dict[str, Edit]:
    """What sets the z of heads to `put` `[prompt pos head d_head]` of their layer, by hook name."""

    def edit(layer: int) -> Edit:
        own = [head for at, head in heads if at == layer]

        def knock_out(z: Tensor, rows: Rows) -> Tensor:
            new = z.clone()
            new[:, :, own] = rows.of(put[layer], 1).to(z)[:, :, own]
            return new

        return knock_out

    return {Site("z", layer).hook_name: edit(layer) for layer in {layer for layer, _ in heads}}


def _values(model: HookedModel, prompts: Prompts, layers: Sequence[int], value: Value) -> dict[int, Tensor]:
    """By layer, `[prompt pos head d_head]`: what z is set to."""
    z = torch.zeros(len(layers), len(prompts), prompts.n_pos, model.n_heads, model.d_head)
    if value == "zero":
        return dict(zip(layers, z, strict=True))
    for index in chunks(model, len(prompts), prompts.n_pos, read_vocab=False):

        def keep(i: int, activation: Tensor, index: Tensor = index) -> None:
            z[i, index] = activation.float().cpu()

        read(model, prompts.take(index), [Site("z", layer) for layer in layers], keep, in_force=model.in_force)
    return {layer: mean_of_others(each, prompts.real.cpu()) for layer, each in zip(layers, z, strict=True)}


def mean_of_others(z: Tensor, real: Tensor) -> Tensor:
    """`[prompt pos head d_head]` mean over the other prompts at each position.

    Args:
        z: `[prompt pos head d_head]`.
        real: `[prompt pos]` where there are tokens.

    Raises:
        UserError: a token at a position where no other prompt has one.
    """
    count = real.sum(0) - real.long()
    alone = (real & (count == 0)).nonzero()
    if len(alone):
        prompt, pos = alone[0].tolist()
        raise UserError(
            f"no prompt but sequence {prompt + 1} has a token {real.shape[1] - pos} places from the end, so that there "
            "is no mean over others; valid: sequences of one length, or value='zero'"
        )
    z = z * real[..., None, None]
    return (z.sum(0) - z) / count.clamp(min=1)[..., None, None]


def others_of(model: HookedModel, top: Sequence[Head], layer: int) -> list[int]:
    """Heads of a layer that are not among the top."""
    return [head for head in range(model.n_heads) if (layer, head) not in top]


def random_sets(model: HookedModel, top: Sequence[Head], draws: int, seed: int) -> list[list[Head]]:
    """Different sets of as many heads of each layer as the top has there, never a top one; all, if `draws` allows."""
    if draws < 1:
        raise UserError(f"draws must be at least 1; found {draws}")
    counts = {layer: sum(layer == at for at, _ in top) for layer in sorted({layer for layer, _ in top})}
    others = {layer: others_of(model, top, layer) for layer in counts}
    short = [layer for layer, count in counts.items() if len(others[layer]) < count]
    if short:
        raise UserError(
            f"layer {short[0]} has {counts[short[0]]} of the top heads and only {len(others[short[0]])} others to draw "
            "from; choose a smaller k"
        )
    if prod(comb(len(others[layer]), count) for layer, count in counts.items()) <= draws:
        by_layer = [[[(at, h) for h in some] for some in combinations(others[at], n)] for at, n in counts.items()]
        return [[head for part in parts for head in part] for parts in product(*by_layer)]
    draw, found = random.Random(seed), {}
    while len(found) < draws:
        chosen = [(layer, h) for layer, count in counts.items() for h in sorted(draw.sample(others[layer], count))]
        found[tuple(chosen)] = chosen
    return list(found.values())
