"""The logit lens equals a model that ends at each layer: every family, padded and not, raw and processed weights."""

import copy
import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp import Apply, Patch, Prompts, Site, UserError, Zero, load
from mechinterp.hooked import suffix
from mechinterp.hooked.suffix import Levers
from mechinterp.lens import LensResult, logit_lens, measure, streams
from mechinterp.lens.result import spans
from mechinterp.statistics import bootstrap_ratio
from mechinterp.tasks import induction
from mechinterp.tasks.pairs import Target, assemble
from tests.checks import checks_off
from tests.families import FAMILIES, full_logits, model, module, pairs

logit_lens_module = importlib.import_module("mechinterp.lens.logit_lens")  # the name in the package is the function

BLOCKS = {"gpt2": "transformer.h", "neox": "gpt_neox.layers", "opt": "model.decoder.layers"}  # else model.layers
ATOL = 2e-5  # of probabilities and nats


def ended(of, prompts, layer, hooks=()):
    """Logits of a run whose last residual stream is what block `layer` reads, by TransformerLens's own hooks."""
    if layer == of.n_layers:
        return full_logits(of, prompts, [*hooks])
    kept = {}

    def keep(resid, hook):
        kept["resid"] = resid.clone()

    def put(resid, hook):
        return kept["resid"]

    at, end = f"blocks.{layer}.hook_resid_pre", f"blocks.{of.n_layers - 1}.hook_resid_post"
    return full_logits(of, prompts, [*hooks, (at, keep), (end, put)])


def plain(logits, final, answer=None, wrong=None):
    """The lens's numbers for one vector of logits `[d_vocab]`, with loops and the textbook's formulas."""
    logits, final = logits.double(), final.double()
    p, q = final.softmax(-1).tolist(), logits.softmax(-1).tolist()
    made = {
        "kl": sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0),
        "entropy": -sum(b * math.log(b) for b in q if b > 0),
        "top": sorted(range(len(q)), key=lambda token: -q[token])[:5],
    }
    if answer is not None:
        made["prob"] = q[answer]
        made["answer_rank"] = sum(float(x) > float(logits[answer]) for x in logits)
        made["log_rank"] = math.log(1 + made["answer_rank"])
    if wrong is not None:
        made["logit_diff"] = float(logits[answer] - logits[wrong])
    return made


def agree(of, result, prompts, answer=None, wrong=None, hooks=(), spots=None):
    """Every number of `result` beside the reference. `spots` `[prompt]` positions; the last one by default."""
    final = full_logits(of, prompts, [*hooks])
    for layer in range(of.n_layers + 1):
        logits = ended(of, prompts, layer, hooks)
        for i in range(len(prompts)):
            at = -1 if spots is None else int(spots[i])
            asked = [None if tokens is None else int(tokens[i]) for tokens in (answer, wrong)]
            want = plain(logits[i, at], final[i, at], *asked)
            got = result.data.sel(layer=layer).isel(prompt=i)
            assert got["top_token"].values.tolist() == want.pop("top"), (layer, i)
            for name, value in want.items():
                assert float(got[name]) == pytest.approx(value, abs=ATOL, rel=1e-4), (name, layer, i)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_the_model_that_ends_there(family, padded):
    of = model(family)
    task = pairs(of, padded)
    answer, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]
    result = logit_lens(of, task)
    agree(of, result, task.clean, answer, wrong)
    kl = result.data["kl"].values
    assert kl[0].min() > 0.01 and kl[-1].max() < 1e-5, "rows that differ from the output, and the output"
    gaps = np.abs(np.diff(result.data["logit_diff"].values, axis=0)).max(1)
    assert (gaps > 0.1).all(), "every layer should move the answer"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_the_transformers_model_with_its_later_blocks_cut_off(family):
    """Nothing of TransformerLens in the reference: norm, unembedding and soft-cap are the model's own."""
    tokens = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(5))
    result = logit_lens(model(family), tokens, positions="all")
    made = module(family)
    final = made(tokens, use_cache=False).logits.double().log_softmax(-1)
    for layer in range(model(family).n_layers + 1):
        short = copy.deepcopy(made)
        holder, _, name = BLOCKS.get(family, "model.layers").rpartition(".")
        setattr(short.get_submodule(holder), name, short.get_submodule(f"{holder}.{name}")[:layer])
        short.config.num_hidden_layers = layer
        logits = short(tokens, use_cache=False).logits.double().log_softmax(-1)
        got = result.data.sel(layer=layer)
        kl = (final.exp() * (final - logits)).sum(-1)
        np.testing.assert_allclose(got["kl"].values.T, kl.detach(), atol=ATOL, rtol=1e-4)
        best = logits.topk(5)
        assert (got["top_token"].transpose("prompt", "pos", "rank").values == best.indices.numpy()).all()
        np.testing.assert_allclose(
            got["top_prob"].transpose("prompt", "pos", "rank"), best.values.exp().detach(), atol=ATOL, rtol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_processed_weights_say_the_same(family, tmp_path):
    """Folded and centred weights write other residual streams, but every layer says what it said."""
    module(family).save_pretrained(tmp_path)
    of, raw = load(tmp_path, process=True, device="cpu"), model(family)
    task = pairs(raw, True)
    result, want = logit_lens(of, task), logit_lens(raw, task)
    agree(of, result, task.clean, task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0])
    for name in ("prob", "kl", "entropy", "log_rank"):
        np.testing.assert_allclose(result.data[name], want.data[name], atol=1e-4, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_row_is_the_model_s_own_output(family):
    """To float noise, at every position, padded: Gemma-2's soft-cap is in it."""
    of = model(family)
    prompts = pairs(of, True).clean
    result = logit_lens(of, prompts, positions="all", top=of.d_vocab)
    own = full_logits(of, prompts, []).softmax(-1)
    last = result.data.sel(layer=of.n_layers)
    for i, pos in prompts.real.nonzero().tolist():
        one = last.isel(prompt=i, pos=pos)
        got = torch.zeros(of.d_vocab).scatter_(
            0, torch.tensor(one["top_token"].values), torch.tensor(one["top_prob"].values).float()
        )
        torch.testing.assert_close(got, own[i, pos], atol=1e-6, rtol=1e-4)


def test_mutation_missing_soft_cap(monkeypatch):
    of = model("gemma2")
    task = pairs(of, False)
    assert of.levers.replay  # found out before the cap goes, and kept
    monkeypatch.setattr(suffix, "_soft_cap", lambda of, logits: logits)
    with pytest.raises(AssertionError):
        agree(of, logit_lens(of, task), task.clean, task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0])


# What is in force


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_interventions_in_force_are_in_every_row(family):
    of = model(family)
    task = pairs(of, True)

    def halve(x, hook):
        return 0.5 * x

    def zero(x, hook):
        x = x.clone()
        x[:, :, 2] = 0
        return x

    hooks = [("blocks.0.hook_resid_pre", halve), ("blocks.1.attn.hook_z", zero), ("blocks.1.hook_resid_post", halve)]
    ones = [Apply(Site("resid_pre", 0), lambda x, site: 0.5 * x), Zero(Site("z", 1, head=2))]
    ones += [Apply(Site("resid_post", 1), lambda x, site: 0.5 * x)]
    with of.intervene(*ones):
        result = logit_lens(of, task)
    agree(of, result, task.clean, task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0], hooks)
    assert len(result.about["in_force"]) == 3
    assert float(abs(result.data["prob"] - logit_lens(of, task).data["prob"]).max()) > 1e-3


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")  # of the reference's own hooks
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_frozen_final_norm_is_frozen_in_every_row(family):
    of = model(family)
    task = pairs(of, True)
    kept = {}
    hook = "ln_final.hook_scale"
    full_logits(of, task.corrupted, [(hook, lambda x, hook: kept.__setitem__("scale", x.clone()))])
    with of.intervene(Patch(Site("ln_final_scale"), task.corrupted)):
        result = logit_lens(of, task.clean, answer=task.answers.answer[:, 0, 0].tolist())
    agree(of, result, task.clean, task.answers.answer[:, 0, 0], hooks=[(hook, lambda x, hook: kept["scale"])])


def test_a_scale_that_is_read_elsewhere_is_refused():
    of = model("gpt2")
    with of.intervene(
        Apply(Site("ln1_scale", 0), lambda x, site: 2 * x, to=Site("ln_final_scale"), noop_ok=True)
    ) as held:
        with pytest.raises(
            UserError, match="a lens cannot decode while ln1_scale layer 0 is written to ln_final_scale"
        ):
            logit_lens(held, [[1, 2, 3]])
        held([[1, 2, 3]])


@pytest.mark.parametrize("kind", ["no lever", "read at the embeddings"])
def test_without_levers_the_rows_are_the_same(kind, monkeypatch):
    of = model("llama")
    task = pairs(of, True)
    ones = [Apply(Site("embed"), lambda x, site: 0.1 * x, to=Site("mlp_out", 1))] if kind != "no lever" else []
    with of.intervene(*ones):
        if kind == "no lever":
            want = logit_lens(of, task)
            monkeypatch.setitem(of.__dict__, "levers", Levers(False, False, False))
            got = logit_lens(of, task)
            np.testing.assert_allclose(got.data["kl"], want.data["kl"], atol=ATOL)
        own = of(task.clean)[:, -1].softmax(-1)
        last = logit_lens(of, task).data["prob"].sel(layer=of.n_layers)
    np.testing.assert_allclose(last, own.gather(1, task.answers.answer[:, 0])[:, 0], atol=1e-6)


def test_a_model_whose_output_is_something_else_is_refused(monkeypatch):
    of = model("llama")
    monkeypatch.setitem(of.__dict__, "levers", Levers(False, False, False))
    call = of.bridge.forward
    monkeypatch.setattr(of.bridge, "forward", lambda *args, **rest: call(*args, **rest) * 1.5)
    with pytest.raises(UserError, match="llama has no logit lens"):
        logit_lens(of, [[1, 2, 3]])


# Positions


def test_positions_are_those_that_were_asked_for():
    of = model("llama")
    task = pairs(of, True)
    answer, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]
    by_role = logit_lens(of, task, positions="roles")
    assert by_role.axis == "role" and list(by_role.data["role"].values) == ["A", "B", "END"]
    for role in task.roles:
        one = LensResult(by_role.data.sel(role=role), by_role.about)
        agree(of, one, task.clean, answer, wrong, spots=task.clean.roles[role])
    some = logit_lens(of, task, positions=[1, -2])
    for label, spots in ((1, task.clean.padding + 1), (-2, torch.full((4,), task.clean.n_pos - 2))):
        agree(of, LensResult(some.data.sel(pos=label), some.about), task.clean, answer, wrong, spots=spots)
    two = logit_lens(of, task, positions="END,B").data
    assert two.drop_vars("passes").identical(by_role.data.sel(role=["END", "B"])[[*two.drop_vars("passes")]])
    last = logit_lens(of, task)
    np.testing.assert_array_equal(by_role.data["kl"].sel(role="END"), last.data["kl"])


def test_all_positions_leave_padding_undefined():
    of = model("gpt2")
    prompts = pairs(of, True).clean
    result = logit_lens(of, prompts, answer=3, positions="all")
    assert result.data["kl"].dims == ("layer", "pos", "prompt") and result.data.sizes["pos"] == prompts.n_pos
    real = prompts.real.T.numpy()
    for name in ("kl", "entropy", "prob", "answer_rank"):
        assert (np.isfinite(result.data[name].values) == real).all(), name
    assert ((result.data["top_token"].values >= 0) == real[..., None]).all()
    assert np.isfinite(result.data["kl_mean"]).all(), "means are over the prompts that have the position"
    alone = logit_lens(of, [prompts.tokens[1, 1:].tolist()], answer=3, positions="all")
    np.testing.assert_allclose(alone.data["prob"].values[..., 0], result.data["prob"].values[:, 1:, 1], atol=1e-6)
    assert logit_lens(of, prompts, answer=3, positions="each").data.identical(result.data)


def test_several_targets_are_averaged():
    of = model("llama")
    rows = torch.randint(0, 61, (4, 8), generator=torch.Generator().manual_seed(2)).tolist()
    asked = [(3, 5, 9), (7, 11, 2)]
    task = assemble(
        of, "two", "none", rows, rows[::-1], [{}] * 4, [[Target(p, {a: 1.0}, {w: 1.0}) for p, a, w in asked]] * 4
    )
    result = logit_lens(of, task)
    single = [
        logit_lens(of, assemble(of, "one", "none", rows, rows, [{}] * 4, [[Target(p, {a: 1.0}, {w: 1.0})]] * 4))
        for p, a, w in asked
    ]
    for name in ("prob", "kl", "logit_diff", "log_rank", "entropy"):
        want = sum(one.data[name] for one in single) / 2
        np.testing.assert_allclose(result.data[name], want, atol=1e-6)
    with pytest.raises(UserError, match="ask at several positions each; valid for them: 'last'"):
        logit_lens(of, task, positions="all")


def test_several_answers_count_together():
    of = model("llama")
    row = [4, 8, 15, 16]
    task = assemble(of, "many", "none", [row], [row], [{}], [[Target(3, {5: 1.0, 9: 3.0}, {2: 1.0, 7: 1.0})]])
    result = logit_lens(of, task).data.isel(prompt=0)
    for layer in range(4):
        logits = ended(of, Prompts(torch.tensor([row])), layer)[0, -1].double()
        p = logits.softmax(-1)
        at = result.sel(layer=layer)
        assert float(at["prob"]) == pytest.approx(float(p[5] + p[9]), abs=1e-6)
        assert int(at["answer_rank"]) == int((p > max(p[5], p[9])).sum())
        gap = 0.25 * logits[5] + 0.75 * logits[9] - 0.5 * logits[2] - 0.5 * logits[7]
        assert float(at["logit_diff"]) == pytest.approx(float(gap), abs=1e-4)


# Memory


@pytest.mark.parametrize("bytes_", [4 * 61, 4 * 61 * 7], ids=["one row", "seven rows"])
def test_few_logits_are_held_and_the_numbers_do_not_depend_on_it(bytes_, monkeypatch):
    of = model("gemma2")
    task = pairs(of, True)
    want = [logit_lens(of, task, positions=where).data for where in ("all", "last")]
    seen, inner = [], streams.Streams.logits

    def count(self, layers, positions):
        logits = inner(self, layers, positions)
        seen.append(logits.shape[:3].numel())
        return logits

    monkeypatch.setitem(streams.BYTES, "cpu", bytes_)
    monkeypatch.setitem(measure.BLOCK, "cpu", bytes_ // 3)
    monkeypatch.setattr(streams.Streams, "logits", count)
    monkeypatch.setattr(logit_lens_module, "chunks", lambda *args, **rest: torch.arange(4).split(1))
    for where, expected in zip(("all", "last"), want, strict=True):
        got = logit_lens(of, task, positions=where).data
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=2e-5, rtol=1e-4, err_msg=str(name))
    assert max(seen) <= bytes_ // (4 * 61), "rows of the largest block of logits"


# Over prompts


@pytest.fixture(scope="module")
def planted():
    return load("planted-induction", device="cpu")


def test_the_planted_circuit_speaks_in_its_last_layer_only(planted):
    """The induction head of layer 1 writes the answer: rows 0 and 1 cannot know it, the output does."""
    result = logit_lens(planted, induction(planted, n=24))
    data = result.data
    assert data["passes"].values.tolist() == [False, False, True]
    assert (data["settled"] == 2).all() and (data["answer_rank"].sel(layer=2) == 0).all()
    assert float(data["prob_mean"].sel(layer=2)) > 0.5 > 10 * float(data["prob_control"].sel(layer=2))
    np.testing.assert_allclose(data["prob"].sel(layer=[0, 1]), 1 / planted.d_vocab, atol=1e-6)
    assert "first at the output in 24 of 24 prompts, half of them from layer 2 of 2 on" in result.summary()
    assert "passes at layers 2" in result.summary() and "n=24" in result.summary()


def test_an_answer_that_both_sides_give_passes_nowhere(planted):
    task = induction(planted, n=24)
    same = replace(task, corrupted=task.clean)
    result = logit_lens(planted, same)
    assert not result.data["passes"].any() and "passes at no layer" in result.summary()
    assert float(result.data["prob_mean"].sel(layer=2)) > 0.5, "though the model gives it"


def test_the_control_is_the_corrupted_side():
    of = model("llama")
    task = pairs(of, True)
    result, other = logit_lens(of, task).data, logit_lens(of, replace(task, clean=task.corrupted)).data
    for name in ("prob", "logit_diff", "log_rank", "entropy"):
        np.testing.assert_allclose(result[f"{name}_control"], other[f"{name}_mean"], atol=1e-6)
        estimate = (result[name] - other[name]).mean("prompt")
        assert (result[f"{name}_gap_low"] <= estimate + 1e-9).all() and (
            estimate <= result[f"{name}_gap_high"] + 1e-9
        ).all()
    # For KL: from the output of the corrupted prompts to the reading of the clean ones.
    final = full_logits(of, task.corrupted, [])[:, -1].double().log_softmax(-1)
    for layer in range(of.n_layers + 1):
        ours = ended(of, task.clean, layer)[:, -1].double().log_softmax(-1)
        want = (final.exp() * (final - ours)).sum(-1).mean()
        assert float(result["kl_control"].sel(layer=layer)) == pytest.approx(float(want), abs=1e-4)


def test_intervals_are_those_of_the_statistics():
    of = model("gpt2")
    task = pairs(of, False, n=20)
    template = torch.arange(20) % 10
    task = replace(task, clean=task.clean.with_roles(task.clean.roles, template))
    result = logit_lens(of, task, seed=3)
    for name in ("prob", "kl", "log_rank", "logit_diff", "entropy"):
        want = bootstrap_ratio(result.data[name].values, clusters=template.numpy(), seed=3)
        for end, value in (("mean", want.estimate), ("low", want.low), ("high", want.high)):
            np.testing.assert_allclose(result.data[f"{name}_{end}"], value, atol=1e-6)
    assert result.about["scope"] == "over prompts and templates"


def test_texts_with_their_own_answers_have_each_other_s_as_control(planted):
    texts, answers = ["a b c d a", "e f g h e", "k l m n o k"], ["b", "f", "l"]
    result = logit_lens(planted, texts, answers)
    assert result.about["control"] == "another prompt's answer" and "passes" in result.data
    swapped = logit_lens(planted, texts, ["f", "l", "b"])
    np.testing.assert_allclose(result.data["prob_control"], swapped.data["prob_mean"], atol=1e-7)
    assert float(result.data["prob_mean"].sel(layer=2)) > 0.5 > 10 * float(result.data["prob_control"].sel(layer=2))
    one = logit_lens(planted, texts, "b")
    assert one.about["control"] == "none, one answer for all prompts" and "passes" not in one.data


# What a user sees


def test_one_text_in_json(planted):
    result = logit_lens(planted, "a b c d a", answer="b", top=3)
    made = result.to_json()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["layers"] == [0, 1, 2] and made["rank"][2] == 0 and made["settled"] == 2
    assert made["rank"][:2] == [0, 0], "all tokens share the first place in layers that say nothing"
    assert all(isinstance(rank, int) for rank in made["rank"])
    assert made["prob"] == result.data["prob"].values[:, 0].tolist() and made["prob"][2] > 0.5
    assert made["top"][2][0] == "b" and [len(row) for row in made["top"]] == [3, 3, 3]
    assert len(made["entropy"]) == len(made["kl"]) == 3 and "positions" not in made
    assert made["mean"]["prob"]["mean"] == made["prob"] and made["mean"]["prob"]["low"] == [None] * 3
    assert made["about"]["answers"] == ["b"] and made["about"]["tokens"] == ["a", "b", "c", "d", "a"]
    assert result.summary().startswith("logit lens: 'b' is first from layer 2 of 2 on, P = 0.")
    assert "one prompt: no interval" in result.summary()


def test_json_without_an_answer_and_of_all_positions(planted):
    made = logit_lens(planted, "a b c d a", positions="all").to_json()
    assert made["rank"] is None and made["prob"] is None and made["passes"] is None
    assert [one["label"] for one in made["positions"]] == ["a_0", "b_1", "c_2", "d_3", "a_4"]
    assert made["positions"][-1]["top"] == made["top"] and made["top"][2][0] == "b"
    many = logit_lens(planted, ["a b c d a", "e f g e"], ["b", "f"]).to_json()
    assert [one["rank"][2] for one in many["prompts"]] == [0, 0] and "rank" not in many
    assert np.shape(many["mean"]["prob"]["low"]) == (3,)
    json.dumps(many, allow_nan=False)


def test_tables(planted):
    one = logit_lens(planted, "a b c d a", answer="b")
    assert list(one.top(2)["layer"]) == [0, 2] and one.top(10)["first tokens"].iloc[-1].startswith("'b'")
    assert list(one.top(10)["answer_rank"])[-1] == 0 and "answer_rank" in repr(one)
    grid = logit_lens(planted, "a b c d a", positions="all").top()
    assert list(grid.columns) == ["layer", "a_0", "b_1", "c_2", "d_3", "a_4"] and grid["a_4"].iloc[-1] == "'b'"
    task = induction(planted, n=8)
    means = logit_lens(planted, task).top()
    assert {"layer", "prob", "logit_diff", "low", "high", "control", "kl", "passes"} <= set(means.columns)
    by_role = logit_lens(planted, task, positions="roles")
    assert list(by_role.top().columns) == ["layer", *task.roles]
    np.testing.assert_array_equal(by_role.top()["END"], by_role.data["logit_diff_mean"].sel(role="END"))
    assert "<td>" in by_role._repr_html_()


def test_it_is_the_same_from_disk(planted, tmp_path):
    result = logit_lens(planted, induction(planted, n=8), positions="roles")
    result.save(tmp_path / "lens.safetensors")
    again = LensResult.load(tmp_path / "lens.safetensors")
    assert again.data.identical(result.data) and again.to_json() == result.to_json()
    assert again.summary() == result.summary() and again.top(5).equals(result.top(5))


def test_an_answer_that_is_lost_again_is_not_settled(planted):
    result = logit_lens(planted, "a b c d a", answer="b")
    data = result.data.copy(deep=True)
    first = np.array([0, 3, 0, 0, 1, 0, 0])
    settled = logit_lens_module._settled(first[:, None, None] == 0)
    assert settled.item() == 5
    assert np.isnan(logit_lens_module._settled(np.array([True, False])[:, None, None])).all()
    lost = LensResult(data.assign(settled=data["settled"] * np.nan), result.about)
    assert "is not first at the output: rank 0" in lost.summary() and lost.to_json()["settled"] is None


def test_spans():
    assert spans([3, 5, 6, 7, 9]) == "3, 5–7, 9" and spans([]) == "" and spans([2]) == "2"


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"answer": "b c"}, r"must be one token; 'b c' is 2: 'b' \| 'c'"),
        ({"answer": ""}, "'' is not in the vocabulary"),
        ({"answer": "Paris"}, "'Paris' is not in the vocabulary"),
        ({"answer": 54}, "answer 54 is outside the vocabulary of 54 tokens"),
        ({"answer": ["a", "b"]}, "2 answers were given for 1 prompts; valid: one, or one for each"),
        ({"top": 0}, "top must be 1 … 54"),
        ({"top": 55}, "top must be 1 … 54"),
        ({"positions": "END"}, "unknown positions 'END'; valid: last, all, roles, role names, indices; roles of these"),
        ({"positions": "roles"}, "needs prompts with roles"),
        ({"positions": []}, "no positions given"),
        ({"positions": [0, 9]}, "position 9 is outside prompt 0, of 3 tokens"),
        ({"text": "a " * 65}, "the text has 65 tokens; the context of planted-induction is 64"),
        ({"text": []}, "at least one token"),
    ],
)
def test_bad_input_is_one_clear_line(planted, arguments, message):
    with checks_off(), pytest.raises(UserError, match=message) as error:
        logit_lens(planted, arguments.pop("text", "a b c"), **arguments)
    assert "\n" not in str(error.value)


def test_answers_that_do_not_go_with_pairs(planted):
    task = induction(planted, n=4)
    with pytest.raises(UserError, match="bring their own answers"):
        logit_lens(planted, task, answer="b")
    with pytest.raises(UserError, match="one token, but 'a b' of line 1"):
        logit_lens(planted, replace(task, continuations=[[0, 1]] * 4, long_answer="'a b' of line 1 is 2 tokens"))


def test_a_word_without_its_space_is_hinted_at(smollm2_tokens):
    with pytest.raises(UserError, match=r"'Xyzzy' is \d: .* \(a word within a text begins with a space: ' Xyzzy'\)"):
        logit_lens(smollm2_tokens, [[1, 2]], "Xyzzy")


@pytest.fixture
def smollm2_tokens(tmp_path):
    """A model whose tokenizer splits words: one of single letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate("Xyz ab")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(letters, [])), pad_token=" ")
    return load(module("llama"), tokenizer=tokenizer)


# The real model


@pytest.mark.real_model
def test_the_capital_of_france(smollm2):
    result = logit_lens(smollm2, "The capital of France is", answer=" Paris")
    data = result.data.isel(prompt=0)
    assert int(data["answer_rank"][-1]) == 0 and float(data["kl"][-1]) < 1e-4
    assert float(data["settled"]) == 30 and int(data["answer_rank"][28]) < 100 < int(data["answer_rank"][10])
    own = smollm2("The capital of France is")[0, -1].softmax(-1)
    assert float(data["prob"][-1]) == pytest.approx(float(own[smollm2.encode(" Paris")[0]]), abs=1e-5)
    assert result.to_json()["top"][30][0] == " Paris"
