"""Head importance is the absolute slope where a node writes, as a share of its group's."""

import pytest
import torch

from mechinterp import load
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.find import find
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.head_importance import HeadImportance, groups
from mechinterp.errors import UserError
from mechinterp.models.planted import circuit
from mechinterp.tasks.planted import task_of
from tests.circuits.plain_nodes import attribution, differences, slopes
from tests.families import FAMILIES, model, pairs


def scores(engine):
    """`[prompt node]`."""
    return torch.cat([each for _, each in HeadImportance().scores(engine)])


def group_of(name):
    """Heads by layer; the embedding and the MLPs; attention as a whole."""
    if "." in name:
        return name.partition(".")[0]
    return "attention" if name[0] == "a" else "others"


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_absolute_slope_over_its_groups_norm(family):
    of, task = model(family), pairs(model(family), True)
    engine = Engine(Graph(of), task)
    deltas = differences(of, task, not engine.graph.heads_add_up)
    each = attribution(deltas, slopes(of, task, None)[0]).abs()
    mean, names = each.mean(0), list(deltas)
    for i, name in enumerate(names):
        norm = mean[[group_of(other) == group_of(name) for other in names]].square().sum().sqrt()
        each[:, i] /= norm
    assert (scores(engine) - each).abs().max() < 1e-4
    assert each.max() > 0.3


@pytest.mark.parametrize("options", [{}, {"mlp": "neuron"}, {"positions": "roles"}, {"qkv": "merged"}])
def test_the_mean_of_every_group_has_norm_one(options):
    """With neurons, places, and several parts of the prompts as well."""
    of = model("llama")
    engine = Engine(Graph(of, **options), pairs(of, True))
    engine.max_bytes = 2 * engine.bytes_per_prompt
    found, group = scores(engine).mean(0), groups(engine.graph)
    squares = torch.zeros(int(group.max()) + 1).index_add_(0, group, found.square())
    assert torch.allclose(squares, torch.ones_like(squares), atol=1e-4)
    assert (found >= 0).all() and len(squares) == of.n_layers * (2 if "mlp" in options else 1) + 1


@pytest.mark.parametrize("name", ["planted-induction", "planted-and"])
def test_planted_heads_lead_their_layers(name):
    of = load(name, device="cpu")
    made = find(Graph(of), task_of(name)(of, n=16, seed=7), "hisp", controls=False, progress=False)
    assert made.level == "node"
    true = {f"a{layer}.h{head}" for layer, head in circuit(name).heads}
    for node, score in enumerate(made.values.tolist()):
        label = made.graph.node_name(node)
        if ".h" in label:
            assert score > 0.5 if label in true else score < 1e-4


def test_kl_is_refused():
    of = model("gpt2")
    with pytest.raises(UserError, match="hisp takes the slope"):
        next(HeadImportance().scores(Engine(Graph(of), pairs(of, False), metric="kl")))
