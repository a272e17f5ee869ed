"""Files of scores and circuits: what is written is read back, explains itself, and is checked against the model."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as hf
from transformer_lens.model_bridge.sources import build_bridge_from_module

import mechinterp as mi
from mechinterp.circuit_file import read_header, rows
from mechinterp.circuits import files
from mechinterp.circuits.circuit import Circuit
from mechinterp.circuits.find import find
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.scores import Scores
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.tasks.planted import other_tokens
from tests.families import FAMILIES, model

PLACES = {"positions": "roles", "places": ("A", "END", "rest")}
CASES = [(family, {}) for family in FAMILIES] + [
    (family, shape) for family in ("llama", "gemma2") for shape in ({"qkv": "ungrouped"}, {"qkv": "merged"}, PLACES)
]


def random_scores(graph, level="edge", draws=7):
    """Scores of all sizes, with draws about them and a control."""
    draw = torch.Generator().manual_seed(2)
    n = graph.n_edges if level == "edge" else graph.n_nodes
    values = torch.randn(n, generator=draw) * 10.0 ** torch.randint(-6, 3, (n,), generator=draw)
    near = values + 0.3 * values.abs() * torch.randn(draws, n, generator=draw)
    rankings = {"swapped labels": torch.randn(n, generator=draw)}
    about = {"task": "random", "method": "eap", "direction": "noise", "seed": 3, "settings": {"steps": 5}, "bos": False}
    return Scores(graph, values, level, near, rankings, about)


def selections(scores):
    ways = [{"edges": 0.6}, {"edges": 17, "by": "signed", "prune": False}]
    ways += [{"edges": 0.2, "ranking": "swapped labels", "prune": False}]
    ways += [{"edges": 9, "connect": "greedy"}] if scores.level == "edge" else []
    return torch.stack([scores.select(**way).kept for way in ways])


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_scores_read_back_select_the_same_circuits(family, shape, tmp_path):
    of = model(family)
    for level in ("edge", "node"):
        scores = random_scores(Graph(of, **shape), level)
        files.save(tmp_path / "scores.json", scores)
        again = files.load(tmp_path / "scores.json", of)
        assert isinstance(again, Scores) and again.level == level and vars(again.graph).items() >= shape.items()
        assert torch.equal(again.values, scores.values)  # every bit
        assert torch.equal(again.rankings["swapped labels"], scores.rankings["swapped labels"])
        assert torch.equal(selections(again), selections(scores)) and selections(scores).sum() > 20


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_circuits_are_read_back(family, shape, tmp_path):
    of = model(family)
    circuit = random_scores(Graph(of, **shape)).select(edges=20, prune=False)
    files.save(tmp_path / "circuit.json", circuit)
    again = files.load(tmp_path / "circuit.json", of)
    assert isinstance(again, Circuit) and again.edges == circuit.edges and len(again) > 3
    assert again.to_frame().equals(circuit.to_frame())
    assert again.scores is not None and again.scores[~again.kept].isnan().all()  # not written, so not known
    assert again.about["selection"] == circuit.about["selection"]


def test_what_was_done_is_read_back(tmp_path):
    """On a real search: all that `about` says, and the file's top says it too."""
    of = mi.load("planted-induction")
    scores = find(Graph(of), other_tokens(of, n=8), "eap", draws=20, progress=False)
    files.save(tmp_path / "scores.json", scores)
    again = files.load(tmp_path / "scores.json", of)
    assert again.about == json.loads(json.dumps(scores.about))
    top = json.loads((tmp_path / "scores.json").read_text())
    asked = {name: top[name] for name in ("task", "method", "ablation", "direction", "metric", "seed", "n_prompts")}
    assert asked == {name: scores.about[name] for name in asked} and asked["metric"] == "logit-diff"
    assert top["model"]["weights_sha256"] == of.weights_hash() and top["model"]["n_heads"] == of.n_heads
    assert top["tokenizer_sha256"] == of.tokenizer_hash() and len(top["tokenizer_sha256"]) == 64
    files.save(tmp_path / "again.json", again)  # less the draws, from which inclusion is counted
    resaved = json.loads((tmp_path / "again.json").read_text())
    inclusion = top["edges"].pop("inclusion")
    assert len(inclusion) == scores.graph.n_edges and top["edges"] == resaved["edges"]
    assert {**top, "reading": None} == {**resaved, "reading": None}


def test_columns_can_be_read_with_json_alone(tmp_path):
    """As the file's own words say; the interval and the inclusion are those of the draws."""
    graph = Graph(model("llama"), positions="roles", places=("A", "rest"))
    scores = random_scores(graph, draws=40)
    files.save(tmp_path / "scores.json", scores)
    found = json.loads((tmp_path / "scores.json").read_text())
    columns = found["edges"]
    for i in range(0, graph.n_edges, 37):
        name = f"{found['sources'][columns['source'][i]]}->{found['destinations'][columns['destination'][i]]}"
        edge = graph.edge(f"{name}@{found['graph']['places'][columns['place'][i]]}")
        assert columns["score"][i] == pytest.approx(float(scores.values[edge]), rel=1e-6)
        low, high = scores.draws[:, edge].double().quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
        assert (columns["ci_low"][i], columns["ci_high"][i]) == pytest.approx((float(low), float(high)), rel=1e-3)
    n = int(0.02 * graph.n_edges)
    ranks = scores.draws.abs().argsort(dim=1, descending=True)[:, :n]
    share = torch.bincount(ranks.flatten(), minlength=graph.n_edges) / 40
    assert torch.tensor(columns["inclusion"]).allclose(share, atol=1e-3) and f"the {n} of" in str(found["reading"])
    listed = list(rows(found))
    assert len(listed) == graph.n_edges and set(listed[0]) == {*columns} and listed[-1]["place"] == "rest"


def test_a_file_is_shown_without_torch(tmp_path):
    circuit = random_scores(Graph(model("llama"))).select(edges=12, prune=False)
    files.save(tmp_path / "circuit.json", circuit)
    script = (
        "import sys; from mechinterp.circuit_file import read_header, read, rows; path = sys.argv[1]; "
        "print(read_header(path)['method'], [row['source'] for row in rows(read(path))], 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script, tmp_path / "circuit.json"], capture_output=True, text=True)
    assert shown.stdout.strip() == f"eap {[name.partition('->')[0] for name in circuit.edges]} False"
    header = read_header(tmp_path / "circuit.json")
    assert header["n_listed"] == len(circuit) and "edges" not in header and header["graph"]["n_edges"] == 190


def test_scores_of_a_model_of_smollm2s_shape_stay_below_10_mb(tmp_path):
    """All that a file can hold: intervals, inclusion, and three control rankings over 70,651 edges."""
    config = hf.LlamaConfig(
        vocab_size=61, hidden_size=18, intermediate_size=8, num_hidden_layers=30, num_attention_heads=9, head_dim=2,
        num_key_value_heads=3,
    )  # fmt: skip
    made = hf.AutoModelForCausalLM.from_config(config).eval()
    bridge = build_bridge_from_module(made, type(made).__name__, hf_config=config, tokenizer=None)
    of = HookedModel(bridge, None, ModelInfo("deep", "tiny", "module", False, False))
    one = random_scores(Graph(of), draws=2)
    assert one.graph.n_edges == 70_651
    rankings = {name: one.values.roll(shift) for shift, name in enumerate("abc", 1)}
    files.save(tmp_path / "scores.json", Scores(one.graph, one.values, "edge", one.draws, rankings, one.about))
    assert 1e6 < (tmp_path / "scores.json").stat().st_size < 10e6
    assert torch.equal(files.load(tmp_path / "scores.json", of).values, one.values)


def test_edges_in_another_order_are_the_same_scores(tmp_path):
    scores = random_scores(Graph(model("gpt2")))
    files.save(tmp_path / "scores.json", scores)
    change(tmp_path / "scores.json", lambda f: [column.reverse() for column in [*f["edges"].values()]])
    change(tmp_path / "scores.json", lambda f: f["rankings"]["swapped labels"].reverse())
    again = files.load(tmp_path / "scores.json", model("gpt2"))
    assert torch.equal(again.values, scores.values)
    assert torch.equal(again.rankings["swapped labels"], scores.rankings["swapped labels"])


# ---- bad input -----------------------------------------------------------------------------------------------------


def change(path, edit):
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def refused(path, of, **how):
    with pytest.raises(UserError) as caught:
        files.load(path, of, **how)
    text = str(caught.value)
    assert "\n" not in text and (str(path) in text or "edge '" in text)
    return text


BAD_FILES = [
    (lambda f: f.update(format="other"), "is no circuit file"),
    (lambda f: f.update(version=2), "of version 2; this mechinterp reads up to 1: install a newer mechinterp"),
    (lambda f: f.update(version="new"), "of version new"),
    (lambda f: f.update(kind="mask"), "holds kind 'mask'"),
    (lambda f: f.pop("graph"), "'graph' must be a JSON object"),
    (lambda f: f["graph"].pop("qkv"), "'graph' does not say 'qkv'"),
    (lambda f: f["model"].update(n_heads=8), "another model, llama: its n_heads is 8, llama has 4"),
    (lambda f: f["graph"].update(n_edges=9), "a graph of 9 edges"),
    (lambda f: f.update(tokenizer_sha256="0" * 64), "another tokenizer (vocabulary 000000000000; llama has none)"),
    (lambda f: f["model"].update(weights_sha256="0" * 64), "other weights of llama"),
]
BAD_SCORES = [
    (lambda f: [column.pop() for column in f["edges"].values()], "scores 189 edges"),
    (lambda f: f["edges"]["score"].pop(), "of several lengths"),
    (lambda f: f["edges"].pop("score"), "edges have no column 'score'"),
    (lambda f: f["edges"]["score"].__setitem__(3, float("nan")), "a score is nan; a finite number"),
    (lambda f: f["edges"]["score"].__setitem__(3, None), "a score is None; a finite number"),
    (lambda f: f["edges"]["score"].__setitem__(3, 1e60), "a score is 1e+60; a finite number"),
    (lambda f: f["rankings"].update(short=[1.0]), "ranking 'short' is not a list of 190 numbers"),
    (lambda f: f["edges"]["source"].__setitem__(0, 99), "source is a number 0 … 15 of its list; found 99"),
    (lambda f: f["edges"]["source"].__setitem__(0, 15), "'m2->a0.h0<q>' cannot exist: m2 writes after"),
    (lambda f: f["edges"]["source"].__setitem__(20, f["edges"]["source"][21]), "twice"),
]
BAD_CIRCUITS = [
    (lambda f: f["edges"][0].update(source="m2"), "cannot exist"),
    (lambda f: f["edges"][0].update(source="a9.h0"), "no source 'a9.h0'"),
    (lambda f: f["edges"].append(f["edges"][0]), "twice"),
    (lambda f: f["edges"][1].update(score=None), "the score of an edge is None"),
    (lambda f: f["edges"][1].pop("score"), "edge 2 must have source and destination"),
    (lambda f: f["edges"][1].update(weight=1), "edge 2 must have source and destination"),
    (lambda f: [edge.update(place="END") for edge in f["edges"]], "its edges have places"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_FILES + BAD_SCORES)
def test_damaged_scores_are_refused(edit, message, tmp_path):
    path = tmp_path / "scores.json"
    files.save(path, random_scores(Graph(model("llama"))))
    change(path, edit)
    assert message in refused(path, model("llama"))


@pytest.mark.parametrize(("edit", "message"), BAD_FILES + BAD_CIRCUITS)
def test_damaged_circuits_are_refused(edit, message, tmp_path):
    path = tmp_path / "circuit.json"
    files.save(path, random_scores(Graph(model("llama"))).select(edges=20, prune=False))
    change(path, edit)
    assert message in refused(path, model("llama"))


def test_no_json_and_no_file(tmp_path):
    assert "no such circuit file" in refused(tmp_path / "none.json", model("llama"))
    (tmp_path / "text.json").write_text("{not")
    assert "is not JSON" in refused(tmp_path / "text.json", model("llama"))
    (tmp_path / "mib.json").write_text('{"cfg": {}, "nodes": {}, "edges": {}}')
    assert "read it with circuits.mib" in refused(tmp_path / "mib.json", model("llama"))


def test_other_weights_only_if_asked_for(tmp_path):
    """qwen3 has the shape of llama here, and other weights: the same edges, if that is meant."""
    scores = random_scores(Graph(model("llama")))
    files.save(tmp_path / "scores.json", scores)
    assert "any_weights=True" in refused(tmp_path / "scores.json", model("qwen3"))
    again = files.load(tmp_path / "scores.json", model("qwen3"), any_weights=True)
    assert torch.equal(again.values, scores.values) and again.graph.model is model("qwen3")
    assert again.about["weights_sha256"] == model("llama").weights_hash()
    assert "another model" in refused(tmp_path / "scores.json", model("gemma2"), any_weights=True)


def test_another_tokenizer(tmp_path):
    of, other = mi.load("planted-and"), mi.load("planted-or")
    assert of.tokenizer_hash() == mi.load("planted-and").tokenizer_hash()
    bare = HookedModel(of.bridge, None, of.info)
    assert bare.tokenizer_hash() is None
    swapped = HookedModel(of.bridge, mi.load("planted-induction").tokenizer, of.info)
    assert len({of.tokenizer_hash(), bare.tokenizer_hash(), swapped.tokenizer_hash()}) == 3
    files.save(tmp_path / "scores.json", random_scores(Graph(of)))
    for wrong in (bare, swapped):
        assert "another tokenizer" in refused(tmp_path / "scores.json", wrong, any_weights=True)
    assert "another model" in refused(tmp_path / "scores.json", other)


def test_nothing_is_written_of_numbers_that_are_not_finite(tmp_path):
    circuit = random_scores(Graph(model("gpt2"))).select(edges=20, prune=False)
    broken = Circuit(circuit.graph, circuit.kept, circuit.scores * torch.inf)
    with pytest.raises(UserError, match="'score' are not finite: nothing was written"):
        files.save(tmp_path / "circuit.json", broken)
    assert list(tmp_path.iterdir()) == []
