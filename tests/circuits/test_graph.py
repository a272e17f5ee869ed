"""Nodes, edges and their names, on models of every architecture."""

import pytest
import torch

import mechinterp as mi
from mechinterp import UserError
from mechinterp.circuits.graph import Graph
from tests.checks import checks_off
from tests.families import model, pairs


def test_counts():
    """GPT-2 small's shape has 32,491 edges and SmolLM2's 70,651; here the same sums on tiny shapes."""
    for family, parallel in (("gpt2", False), ("neox", True), ("llama", False)):
        of, graph = model(family), Graph(model(family))
        heads, inputs = of.n_heads, of.n_heads + 2 * of.n_kv_heads
        expected = 0
        for layer in range(of.n_layers):
            before = 1 + layer * (heads + 1)
            expected += inputs * before + before + (0 if parallel else heads)
        assert graph.parallel == parallel
        assert graph.n_edges == expected + 1 + of.n_layers * (heads + 1)
        assert len(graph.edges) == graph.n_edges == int(graph.valid.sum())


def test_names_go_both_ways():
    graph = Graph(model("llama"))
    names = [graph.edge_name(edge) for edge in range(graph.n_edges)]
    assert len(set(names)) == len(names)
    assert [graph.edge(name) for name in names] == list(range(graph.n_edges))
    for name in ("a0.h1->a2.h3<q>", "a1.h2->a2.kv1<k>", "embed->m0", "a2.h0->m2", "m2->logits"):
        assert name in names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a2.h0->a1.h0<q>", "cannot exist"),
        ("m1->a1.h0<q>", "cannot exist"),
        ("a9.h0->logits", "no source 'a9.h0'"),
        ("embed->a0.h9<q>", "no destination"),
        ("embed-logits", "source->destination"),
        ("embed->logits@END", "no place 'END'"),
    ],
)
def test_an_edge_that_cannot_exist_is_named(name, said):
    with pytest.raises(UserError, match=said):
        Graph(model("llama")).edge(name)


def test_parallel_mlps_do_not_see_their_own_heads():
    with pytest.raises(UserError, match="cannot exist"):
        Graph(model("neox")).edge("a1.h0->m1")
    assert Graph(model("gpt2")).edge("a1.h0->m1") >= 0


def test_post_norm_attention_is_one_source():
    graph = Graph(model("gemma2"))
    assert "a1" in graph.source_index and "a1.h0" not in graph.source_index
    assert graph.edge("a0->a1.h2<q>") >= 0
    with pytest.raises(UserError, match="neurons do not add up"):
        Graph(model("gemma2"), mlp="neuron")


def test_an_attention_only_model_has_no_mlps():
    graph = Graph(mi.load("planted-induction"))
    assert not graph.has_mlp and graph.n_edges == 81


def test_unknown_options():
    with checks_off(), pytest.raises(UserError, match="qkv='both'"):
        Graph(model("llama"), qkv="both")  # type: ignore[arg-type]


def test_places():
    of = model("llama")
    task = pairs(of, True)
    graph = Graph(of, positions="roles").at(task)
    assert graph.places == ("A", "B", "END", "rest")
    assert graph.n_edges == 4 * Graph(of).n_edges
    assert graph.edge_name(graph.edge("embed->m0@END")) == "embed->m0@END"
    place = graph.place_of(task)
    assert place[task.clean.at_role("B")].unique().tolist() == [1]
    with pytest.raises(UserError, match="one length"):
        Graph(of, positions="all").at(task)
    with pytest.raises(UserError, match="is laid on"):
        Graph(of, positions="all", places=("0", "1")).at(pairs(of, False))


def test_dead_edges_are_pruned():
    """An edge stays if it lies on a path from the embedding to the logits; any input of a head leads on."""
    graph = Graph(mi.load("planted-induction"))
    alive = ["embed->a0.h2<v>", "a0.h2->a1.h2<k>", "a1.h2->logits"]
    dead = ["embed->a0.h1<q>", "a0.h3->a1.h1<v>", "a0.h0->logits", "a1.h0->logits"]
    kept = graph.prune(graph.chosen(alive + dead))
    assert kept.nonzero().flatten().tolist() == sorted(graph.edge(name) for name in alive)
    assert not graph.prune(graph.chosen(dead)).any()
    assert torch.equal(graph.prune(torch.ones(graph.n_edges, dtype=torch.bool)), torch.ones(graph.n_edges).bool())
