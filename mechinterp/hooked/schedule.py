"""Which rows share a forward pass: a plan that is cheap in tokens and in calls."""

from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mechinterp.hooked.model import HookedModel

# A call costs about as much as this many tokens (measured on SmolLM2-135M, two cores: scripts/bench/patching.py).
CALL_COST = 50


def batches(starts: Tensor, n_pos: int, max_tokens: int, layers: Tensor | None = None) -> list[Tensor]:
    """Rows grouped so that those of a group begin at nearly the same position.

    Rows are sorted by their first position. A row joins the group before it when beginning earlier than it needs to
    costs fewer tokens than a call of its own would.

    Args:
        starts: `[row]` first position that each row must run.
        n_pos: positions of the prompts.
        max_tokens: largest rows × positions of a call (one row is always allowed).
        layers: `[row]` layer that each row joins a call at; rows of a call are then in the order of their layers, and
            of as few layers as possible.

    Returns:
        Row indices of each call; together every row once. A call begins at the smallest start among its rows.
    """
    if len(starts) == 0:
        return []
    order = torch.argsort(starts, stable=True)
    firsts, counts = torch.unique_consecutive(starts[order], return_counts=True)
    groups: list[list[int]] = []  # [start, rows]
    for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        if groups and count * (first - groups[-1][0]) <= CALL_COST:
            groups[-1][1] += count
        else:
            groups.append([first, count])
    made, done = [], 0
    for first, count in groups:
        # A row of few positions still carries the keys and values of its prefix: four of those weigh as a token.
        per_call = max(1, min(max_tokens // (n_pos - first), 4 * max_tokens // n_pos))
        n_calls = -(-count // per_call)
        group = order[done : done + count]
        if layers is not None:
            group = group[torch.argsort(layers[group], stable=True)]
        made += list(group.tensor_split(n_calls))
        done += count
    return made


def max_tokens(model: "HookedModel", n_pos: int, read_vocab: bool, every_position: bool = False) -> int:
    """Rows × positions of a call that fit into a quarter of the free memory, and that the processor likes best."""
    config = model.bridge.cfg
    widths = 12 * model.d_model + 4 * (getattr(config, "d_mlp", None) or 0) + 4 * model.n_heads * n_pos
    per_token = model.dtype.itemsize * (
        widths + (model.d_vocab * (3 if every_position else 1 / n_pos) if read_vocab else 0)
    )
    best = 65_536 if model.device.type == "cuda" else 1_024
    return max(n_pos, min(best, int(free_bytes(model) / 4 / per_token)))


def prompts_to_record(model: "HookedModel", n_pos: int, n_sites: int) -> int:
    """Prompts of which two recordings (residual streams, keys and values, `n_sites` sites) take a quarter of the free
    memory. Attention patterns are counted at their own width."""
    widest = max(model.d_model, model.n_heads * n_pos, model.n_heads * model.d_head)
    per_layer = model.d_model + 2 * model.n_kv_heads * model.d_head
    per_prompt = 2 * model.dtype.itemsize * n_pos * (model.n_layers * per_layer + n_sites * widest)
    return max(1, int(free_bytes(model) / 4 / per_prompt))


def free_bytes(model: "HookedModel") -> int:
    """Free memory where the model runs."""
    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[0]
    return psutil.virtual_memory().available
