"""The engine against the formula, written with raw hooks, on every architecture."""

import pytest
import torch
from tests.families import FAMILIES, full_logits, model, pairs
from tests.circuits.plain import masked_logits, source_outputs

from mechinterp.circuits.engine import Engine
from mechinterp.circuits.graph import Graph

SHAPES = [("kv_group", False), ("kv_group", True), ("merged", False)]


def asked(of, task, logits):
    """`[batch]` logit difference at the last position."""
    rows = torch.arange(len(task))
    last = logits[:, -1]
    return last[rows, task.answers.answer[:, 0, 0]] - last[rows, task.answers.wrong[:, 0, 0]]


def by_name(graph, mask):
    """A mask as a function of names."""

    def kept(source, destination):
        return float(mask[graph.destination_index[destination], graph.source_index[source], 0])

    return kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("qkv", "padded"), SHAPES)
def test_masks_equal_the_formula(family, qkv, padded):
    """All kept is the clean run, none the corrupted one; a binary and a continuous mask are the formula."""
    of = model(family)
    task = pairs(of, padded)
    graph = Graph(of, qkv=qkv)
    engine = Engine(graph, task)
    draw = torch.Generator().manual_seed(1)
    masks = torch.rand(2, *graph.valid.shape, generator=draw)
    masks[0] = (masks[0] < 0.6).float()
    ones, zeros = torch.ones(1, *graph.valid.shape), torch.zeros(1, *graph.valid.shape)
    got = engine.values(torch.cat([ones, zeros, masks]))
    by_layer = not graph.heads_add_up
    ablated = source_outputs(of, task.corrupted, by_layer)
    want = [asked(of, task, full_logits(of, side, [])) for side in (task.clean, task.corrupted)]
    for mask in masks:
        logits = masked_logits(of, task.clean, ablated, by_name(graph, mask), merged=qkv == "merged")
        want.append(asked(of, task, logits))
    assert (got - torch.stack(want)).abs().max() < 1e-4
    assert (got[2] - got[0]).abs().max() > 0.1 and (got[2] - got[3]).abs().max() > 0.1  # the masks do something
