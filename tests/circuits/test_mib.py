"""MIB's JSON: the names, signs and groups of its graph, against the rules of its own code written out again here."""

import json

import pytest
import torch

import mechinterp as mi
from mechinterp.circuits import mib
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.exact import Exact
from mechinterp.circuits.find import find
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.methods import EAP
from mechinterp.circuits.scores import Scores
from mechinterp.errors import UserError
from tests.circuits.test_files import change, random_scores
from tests.families import FAMILIES, model, pairs

HELD = tuple(family for family in FAMILIES if family != "gemma2")  # heads that add up
GROUPED = ("llama", "qwen3")


def their_edges(n_layers, n_heads, parallel):
    """Names of all edges of EAP-IG's graph of a model: heads and MLPs as its residual stream grows."""
    writers, names = ["input"], set()
    for layer in range(n_layers):
        heads = [f"a{layer}.h{head}" for head in range(n_heads)]
        names |= {f"{writer}->{head}<{letter}>" for writer in writers for head in heads for letter in "qkv"}
        before_mlp = writers if parallel else [*writers, *heads]
        names |= {f"{writer}->m{layer}" for writer in before_mlp}
        writers = [*writers, *heads, f"m{layer}"]
    return names | {f"{writer}->logits" for writer in writers}


@pytest.mark.parametrize("family", HELD)
def test_a_file_has_the_nodes_and_edges_that_their_code_expects(family, tmp_path):
    of = model(family)
    circuit = random_scores(Graph(of)).select(edges=0.3)
    mib.save(tmp_path / "mib.json", circuit)
    found = json.loads((tmp_path / "mib.json").read_text())
    parallel = family in ("neox", "phi")
    assert found["cfg"] == {
        "n_layers": of.n_layers, "n_heads": of.n_heads, "parallel_attn_mlp": parallel, "d_model": of.d_model,
    }  # fmt: skip
    assert set(found["edges"]) == their_edges(of.n_layers, of.n_heads, parallel)
    heads = {f"a{layer}.h{head}" for layer in range(of.n_layers) for head in range(of.n_heads)}
    assert set(found["nodes"]) == {"input", "logits", *heads, *(f"m{layer}" for layer in range(of.n_layers))}
    used = {name for name, node in found["nodes"].items() if node["in_graph"]}
    assert used == {"input" if name == "embed" else name for name in circuit.nodes} and len(used) > 4


@pytest.mark.parametrize("family", HELD)
@pytest.mark.parametrize("qkv", ["kv_group", "ungrouped"])
def test_what_is_written_is_read_back(family, qkv, tmp_path):
    graph = Graph(model(family), qkv=qkv)
    scores = random_scores(graph)
    circuit = scores.select(edges=0.3)
    mib.save(tmp_path / "circuit.json", circuit)
    again = mib.load_circuit(tmp_path / "circuit.json", graph)
    assert again.edges == circuit.edges and len(again) > 10
    assert again.scores.allclose(scores.values, rtol=1e-6)
    mib.save(tmp_path / "scores.json", scores)
    assert mib.load_scores(tmp_path / "scores.json", graph).values.allclose(scores.values, rtol=1e-6)
    assert not mib.load_circuit(tmp_path / "scores.json", graph).kept.any()


@pytest.mark.parametrize("family", GROUPED)
def test_eap_of_their_ungrouped_graph_adds_up_to_the_groups(family, tmp_path):
    """EAP is linear in the gradient at each input, so that heads of a group add up to the group exactly."""
    of = model(family)
    task = pairs(of, True)
    by_head, by_group = (
        find(Graph(of, qkv=qkv), task, "eap", draws=0, progress=False, force=True) for qkv in ("ungrouped", "kv_group")
    )
    mib.save(tmp_path / "mib.json", by_head)
    read = mib.load_scores(tmp_path / "mib.json", Graph(of))
    assert (read.values - by_group.values).abs().max() < 1e-5 * by_group.values.abs().max()
    mib.save(tmp_path / "back.json", read)
    edges = json.loads((tmp_path / "back.json").read_text())["edges"]
    name = "a0.h3->a2.kv1<v>"  # two heads share it
    shares = [edges[f"a0.h3->a2.h{head}<v>"]["score"] for head in (2, 3)]
    assert shares == pytest.approx([float(by_group.values[by_group.graph.edge(name)]) / 2] * 2, rel=1e-4)


def test_scores_have_the_sign_of_theirs():
    """They score the change of a loss, minus the logit difference, when an edge is cut: (corrupted - clean) times its
    gradient for EAP, its value without the edge less its value with all for exact scores."""
    of = model("gpt2")
    engine = Engine(Graph(of), pairs(of, False))
    (part,) = engine.parts()
    edge = engine.graph.edge("a0.h1->m1")
    cut = engine.graph.mask(1 - torch.eye(engine.graph.n_edges)[edge : edge + 1])
    loss_without, loss_with = -engine.values(cut)[0], -engine.full
    ((_, exact),) = Exact().scores(engine)
    assert torch.allclose(exact[:, edge], loss_without - loss_with, atol=1e-4) and exact[:, edge].abs().max() > 0.05
    ((_, eap),) = EAP().scores(engine)
    source, destination = engine.graph.source_index["a0.h1"], engine.graph.destination_index["m1"]
    gradient_of_loss = -part.gradients()[0][destination]
    theirs = (part.differences[source] * gradient_of_loss).flatten(1).sum(1)  # differences: corrupted less clean
    assert torch.allclose(eap[:, edge], theirs, rtol=1e-3, atol=1e-5)


def test_a_group_of_which_half_is_in_is_refused(tmp_path):
    graph = Graph(model("llama"))
    mib.save(tmp_path / "mib.json", Circuit.of(graph, ["embed->a1.kv0<k>", "a1.h0->logits"]))
    change(tmp_path / "mib.json", lambda f: f["edges"]["input->a1.h0<k>"].update(in_graph=False))
    with pytest.raises(UserError, match=r"of the 2 heads that share embed->a1.kv0<k>, 1 are in .*qkv='ungrouped'"):
        mib.load_circuit(tmp_path / "mib.json", graph)
    apart = mib.load_circuit(tmp_path / "mib.json", Graph(model("llama"), qkv="ungrouped"))
    assert apart.edges == ["embed->a1.h1<k>", "a1.h0->logits"]


def test_scores_of_nodes_are_theirs_of_nodes(tmp_path):
    scores = random_scores(Graph(model("gpt2")), "node")
    mib.save(tmp_path / "mib.json", scores)
    found = json.loads((tmp_path / "mib.json").read_text())
    by_name = {("embed" if name == "input" else name): node.get("score") for name, node in found["nodes"].items()}
    assert by_name.pop("logits") is None
    assert list(by_name.values()) == pytest.approx(scores.values.tolist())
    assert list(by_name) == [source.name for source in scores.graph.sources]


def test_edges_that_are_not_listed_are_out(tmp_path):
    graph = Graph(model("gpt2"))
    mib.save(tmp_path / "mib.json", Circuit.of(graph, ["embed->m0", "m0->logits"]))
    change(tmp_path / "mib.json", lambda f: f["edges"].pop("input->m0"))
    assert mib.load_circuit(tmp_path / "mib.json", graph).edges == ["m0->logits"]


@pytest.mark.parametrize(
    ("of", "shape", "message"),
    [
        ("llama", {"positions": "roles", "places": ("A", "rest")}, "positions='roles'; valid: positions=False"),
        ("llama", {"mlp": "neuron"}, "neurons; valid: mlp='layer'"),
        ("llama", {"qkv": "merged"}, "merged inputs; valid"),
        ("gemma2", {}, "attention layers as single sources"),
        ("planted-induction", {}, "no MLPs"),
    ],
)
def test_graphs_that_their_format_cannot_hold(of, shape, message, tmp_path):
    graph = Graph(mi.load(of) if of.startswith("planted") else model(of), **shape)
    with pytest.raises(UserError, match="MIB's format cannot hold this graph") as caught:
        mib.save(tmp_path / "mib.json", Scores(graph, torch.ones(graph.n_edges), "edge", torch.zeros(0, 1)))
    assert message in str(caught.value) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="MIB's format cannot hold this graph"):
        mib.load_circuit(tmp_path / "mib.json", graph)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.pop("cfg"), "is no circuit in MIB's format"),
        (lambda f: f["cfg"].update(n_layers=12), "its n_layers is 12, gpt2 has 3"),
        (lambda f: f["cfg"].update(parallel_attn_mlp=True), "its parallel_attn_mlp is True, gpt2 has False"),
        (lambda f: f["edges"].update({"m2->m1": {"score": 1.0, "in_graph": True}}), "'m2->m1' cannot exist"),
        (lambda f: f["edges"].update({"embed->m1": {"score": 1.0, "in_graph": True}}), "whose embedding is 'input'"),
        (lambda f: f["edges"].update({"m0->a1.h9<q>": {"score": 1.0, "in_graph": True}}), "no destination 'a1.h9<q>'"),
        (lambda f: f["edges"]["input->m0"].pop("score"), "edge 'input->m0' needs a score"),
        (lambda f: f["edges"]["input->m0"].update(in_graph=1), "edge 'input->m0' needs a score and in_graph"),
        (lambda f: f["edges"]["input->m0"].update(score=float("nan")), "1 scores are not finite"),
        (lambda f: f["nodes"]["m0"].update(neurons=[True]), "keeps or cuts neurons"),
    ],
)
def test_bad_files_are_refused(edit, message, tmp_path):
    mib.save(tmp_path / "mib.json", random_scores(Graph(model("gpt2"))))
    change(tmp_path / "mib.json", edit)
    with pytest.raises(UserError) as caught:
        mib.load_scores(tmp_path / "mib.json", Graph(model("gpt2")))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="no such circuit file"):
        mib.load_circuit(tmp_path / "none.json", Graph(model("gpt2")))
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(UserError, match="cannot read a circuit"):
        mib.load_circuit(tmp_path / "text.json", Graph(model("gpt2")))
