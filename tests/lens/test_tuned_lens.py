"""The tuned lens: what it computes, how it is trained and saved, and that it beats what it should beat."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp import Prompts, Site, UserError, Zero, load
from mechinterp.lens import (
    LensResult,
    TunedLens,
    TunedLensConfig,
    TunedLensResult,
    evaluate_tuned_lens,
    logit_lens,
    streams,
    train_tuned_lens,
    tuning,
)
from mechinterp.lens import tuned_lens as saving
from mechinterp.statistics import bootstrap_ratio, paired_difference
from mechinterp.text import Blocks, blocks
from tests.families import FAMILIES, full_logits, model, module, pairs

QUICK = TunedLensConfig(steps=40, blocks_per_step=8, positions=64, columns=61, start_blocks=64, learning_rate=0.05)


def chain(n=96, length=12, documents=12, seed=0):
    """Blocks of a random walk over 61 tokens: most steps go to one of three successors of a token."""
    draw = torch.Generator().manual_seed(seed)
    follow = torch.randint(0, 61, (61, 3), generator=torch.Generator().manual_seed(9))
    rows = torch.randint(0, 61, (n, length), generator=draw)
    for pos in range(1, length):
        likely = follow[rows[:, pos - 1], torch.randint(0, 3, (n,), generator=draw)]
        rows[:, pos] = torch.where(torch.rand(n, generator=draw) < 0.9, likely, rows[:, pos])
    return Blocks(Prompts(rows), torch.arange(n) * documents // n, "a random walk")


def random_lens(of, scale=0.3):
    """A lens with random translators, as if it had been trained on the model."""
    draw = torch.Generator().manual_seed(1)
    weight = scale * torch.randn(of.n_layers, of.d_model, of.d_model, generator=draw) / of.d_model**0.5
    bias = scale * torch.randn(of.n_layers, of.d_model, generator=draw)
    origin = {
        "model": of.info.name, "weights_hash": of.weights_hash(), "d_model": of.d_model, "n_layers": of.n_layers,
        "text": "none", "documents": [], "block_length": 12, "losses": [],
    }  # fmt: skip
    return TunedLens(weight, bias, torch.full((of.d_vocab,), 1 / of.d_vocab), TunedLensConfig(), origin)


def decoded(of, prompts, layer, lens):
    """Logits of a run whose last residual stream is the translated one of `layer`, by TransformerLens's own hooks."""
    kept = {}

    def keep(resid, hook):
        kept["resid"] = resid.clone()

    def put(resid, hook):
        x = kept["resid"]
        return x + torch.einsum("bpd,ed->bpe", x, lens.weight[layer]) + lens.bias[layer]

    at, end = f"blocks.{layer}.hook_resid_pre", f"blocks.{of.n_layers - 1}.hook_resid_post"
    return full_logits(of, prompts, [(at, keep), (end, put)])


# What it computes


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_translated_row_is_the_model_with_that_residual_stream(family, padded):
    of = model(family)
    task, lens = pairs(of, padded), random_lens(of)
    result = logit_lens(of, task, lens=lens)
    assert result.about["lens"] == "tuned" and result.summary().startswith("tuned lens")
    answer = task.answers.answer[:, 0, 0]
    for layer in range(of.n_layers):
        want = decoded(of, task.clean, layer, lens)[:, -1].double().softmax(-1)
        got = result.data.sel(layer=layer)
        np.testing.assert_allclose(got["prob"], want.gather(1, answer[:, None])[:, 0], atol=2e-5, rtol=1e-4)
        np.testing.assert_array_equal(got["top_token"].values, want.topk(5).indices)
    plain = logit_lens(of, task)
    np.testing.assert_allclose(result.data["prob"][-1], plain.data["prob"][-1], atol=1e-6)
    assert float(abs(result.data["logit_diff"] - plain.data["logit_diff"])[:-1].max()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_translators_of_zero_are_the_logit_lens(family):
    of = model(family)
    lens = random_lens(of, scale=0.0)
    want = logit_lens(of, pairs(of, True), positions="all").data
    got = logit_lens(of, pairs(of, True), positions="all", lens=lens).data
    for name in ("prob", "kl", "entropy", "logit_diff"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


def test_processed_weights_have_a_lens_of_their_own(tmp_path):
    """Folding moves the residual stream to another basis: the lens of the raw weights is refused."""
    module("llama").save_pretrained(tmp_path)
    raw, processed = load(tmp_path, device="cpu"), load(tmp_path, process=True, device="cpu")
    logit_lens(raw, [[1, 2, 3]], lens=random_lens(raw))
    with pytest.raises(UserError, match="other weights"):
        logit_lens(processed, [[1, 2, 3]], lens=random_lens(raw))
    held = chain(24, documents=4)
    trained = train_tuned_lens(processed, chain(), QUICK, progress=False)
    result = evaluate_tuned_lens(processed, trained, replace(held, source="another walk"))
    assert (result.data["tuned"] < result.data["logit"]).all()


# How it is trained


def test_the_start_is_least_squares():
    draw = torch.Generator().manual_seed(0)
    x = 50 + torch.randn(400, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    y = x @ torch.randn(24, 24, generator=draw) / 5 + torch.randn(400, 24, generator=draw) - 30
    moments = tuning._Moments(model("llama"))
    for rows in torch.arange(400).split(90):
        moments.add(x[rows], y[rows])
    translator = tuning._Translator(moments, ridge=1e-9)
    ones = torch.cat([x, torch.ones(400, 1)], 1).double()
    want = ones @ torch.linalg.lstsq(ones, y.double()).solution
    torch.testing.assert_close(translator(x).double(), want, atol=1e-3, rtol=1e-4)


def test_the_folded_map_is_the_trained_one():
    of = model("llama")
    draw = torch.Generator().manual_seed(0)
    moments = tuning._Moments(of)
    moments.add(*(20 * torch.randn(2, 200, 24, generator=draw) + 5))
    translator = tuning._Translator(moments, ridge=1e-3)
    with torch.no_grad():
        for parameter in translator.parameters:
            parameter += torch.randn(parameter.shape, generator=draw)
    weight, bias = translator.folded()
    x = torch.randn(7, 24, generator=draw)
    lens = replace(random_lens(of), weight=weight.expand(3, -1, -1), bias=bias.expand(3, -1))
    torch.testing.assert_close(lens.translate(1, x), translator(x).detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(lens.translate(3, x), x), "the last row needs no translator"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_kl(family):
    """The gradient that a step hands back is autograd's of KL(final ‖ lens), through norm, unembedding and soft-cap."""
    of = model(family)
    draw = torch.Generator().manual_seed(4)
    resid = 3 * torch.randn(5, of.d_model, generator=draw)
    final = (2 * torch.randn(5, 61, generator=draw)).softmax(-1)
    ours, theirs = resid.clone().requires_grad_(), resid.clone().requires_grad_()
    kl = tuning._Columns.of(final, 61, draw).descend(of, ours)
    normed = of.bridge.ln_final(theirs[None])
    cap = getattr(of.bridge.cfg, "output_logits_soft_cap", 0) or 0
    logits = of.bridge.unembed(normed)[0]
    logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
    want = torch.nn.functional.kl_div(logits.log_softmax(-1), final, reduction="batchmean")
    want.backward()
    torch.testing.assert_close(kl, want.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)
    assert float(theirs.grad.abs().max()) > 1e-3


def test_drawn_columns_stand_for_the_whole_vocabulary():
    """The sum that the softmax divides by, and the cross-entropy, have the right mean over draws."""
    of = model("llama")
    draw = torch.Generator().manual_seed(0)
    final = (2 * torch.randn(6, 61, generator=draw)).softmax(-1)
    logits = torch.randn(6, 61, generator=draw).double()
    totals, crosses = [], []
    for _ in range(3000):
        part = tuning._Columns.of(final, 20, draw)
        assert len(part.tokens.unique()) == 20
        assert set(final.mean(0).topk(10).indices.tolist()) <= set(part.tokens.tolist()), "the likeliest are always in"
        totals.append((logits[:, part.tokens] + part.log_weight).exp().sum(-1))
        crosses.append((part.final * logits[:, part.tokens]).sum(-1))
    for estimates, want in ((totals, logits.exp().sum(-1)), (crosses, (final * logits).sum(-1))):
        spread, mean = torch.std_mean(torch.stack(estimates).double(), 0)
        assert ((mean - want).abs() < 4 * spread / 3000**0.5).all()
        assert (spread > 1e-3).any(), "a part of the vocabulary, not all of it"
    kl = tuning._Columns.of(final, 20, draw).descend(of, torch.randn(6, 24, requires_grad=True))
    assert torch.isfinite(kl)


@pytest.fixture(scope="module")
def trained():
    of = model("llama")
    train, held = chain().split(0.75)
    return of, train_tuned_lens(of, train, QUICK, progress=False), held


def test_steps_go_down(trained):
    losses = trained[1].origin["losses"]
    assert len(losses) == QUICK.steps and np.mean(losses[-3:]) < 0.95 * losses[0]


def test_the_steps_improve_on_the_start(trained):
    of, lens, held = trained
    start = train_tuned_lens(of, chain().split(0.75)[0], replace(QUICK, steps=1, learning_rate=1e-9), progress=False)
    after, before = (evaluate_tuned_lens(of, one, held).data["tuned"] for one in (lens, start))
    assert (after < before).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_on_held_out_text_it_beats_the_logit_lens_and_a_lens_that_reads_nothing(family):
    """The latter at the last layer at least: the embeddings of a random model know little of what it will say."""
    of = model(family)
    train, held = chain().split(0.75)
    lens = train_tuned_lens(of, train, QUICK, progress=False)
    result = evaluate_tuned_lens(of, lens, held)
    data = result.data
    assert (data["gain_low"] > 0).all() and bool(data["passes"][-1]), result
    assert f"{int(data['passes'].sum())} of {of.n_layers} layers beat both" in result.summary()
    np.testing.assert_array_equal(data["passes"], (data["gain_low"] > 0) & (data["over_control_low"] > 0))


def test_a_lens_that_only_learnt_frequencies_does_not_pass(trained):
    """Translators that throw the residual stream away and answer with a constant: the control must stop them."""
    of, lens, held = trained
    weight = -torch.eye(of.d_model).expand(of.n_layers, -1, -1)
    resid = torch.zeros(of.d_model, requires_grad=True)
    optimizer = torch.optim.Adam([resid], lr=0.1)
    part = tuning._Columns.of(lens.mean_output[None], 61, torch.Generator())
    for _ in range(200):
        optimizer.zero_grad()
        part.descend(of, resid[None])
        optimizer.step()
    constant = replace(lens, weight=weight, bias=resid.detach().expand(of.n_layers, -1))
    result = evaluate_tuned_lens(of, constant, held)
    assert (result.data["tuned"] < result.data["logit"]).any(), "it does beat the logit lens"
    assert not result.data["passes"].any()


def test_the_seed_makes_the_lens():
    of, text = model("gpt2"), chain(32)
    config = replace(QUICK, steps=3, columns=20)
    first, again, other = (train_tuned_lens(of, text, replace(config, seed=seed), progress=False) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)
    assert first.origin == again.origin and first.origin["losses"] != other.origin["losses"]


def test_the_first_position_is_left_out(monkeypatch):
    """Whatever its residual stream holds, the lens is the same, bit for bit."""
    of, text, config = model("llama"), chain(24), replace(QUICK, steps=3)
    want = train_tuned_lens(of, text, config, progress=False)
    record = streams.Streams.record

    def spoilt(*args):
        made = record(*args)
        for resid in made.resid:
            resid[:, 0] = torch.nan
        return made

    monkeypatch.setattr(streams.Streams, "record", spoilt)
    assert torch.equal(train_tuned_lens(of, text, config, progress=False).weight, want.weight)


# On held-out text


def test_an_evaluation_is_what_loops_give(trained):
    of, lens, held = trained
    held = held.take(torch.arange(12))
    positions = held.prompts.n_pos - 1  # all of them, in whatever order
    result = evaluate_tuned_lens(of, lens, held, positions=positions, seed=2)
    final = full_logits(of, held.prompts, [])[:, 1:].double().log_softmax(-1)

    def kl(logits):
        return (final.exp() * (final - logits[:, 1:].double().log_softmax(-1))).sum(-1).mean(-1)

    zero = random_lens(of, 0.0)
    for layer in range(of.n_layers):
        for name, one in (("tuned_kl", lens), ("logit_kl", zero)):
            want = kl(decoded(of, held.prompts, layer, one))
            np.testing.assert_allclose(result.data[name].sel(layer=layer), want, atol=2e-5, rtol=1e-4)
    flat = (0.999 * lens.mean_output + 0.001 / 61).log().expand(12, 12, 61)
    np.testing.assert_allclose(result.data["control_kl"], kl(flat), atol=2e-5, rtol=1e-4)
    data, documents = result.data, held.document.numpy()
    found = bootstrap_ratio(data["tuned_kl"].values, clusters=documents, seed=2)
    gap = paired_difference(data["logit_kl"].values, data["tuned_kl"].values, documents, seed=2)
    for name, value in (
        ("tuned", found.estimate), ("tuned_low", found.low), ("tuned_high", found.high),
        ("gain", gap.estimate), ("gain_low", gap.low), ("gain_high", gap.high),
    ):  # fmt: skip
        np.testing.assert_allclose(data[name], value, atol=1e-12)
    assert result.about["scope"] == "over blocks, conditional on these 2 documents"


def test_an_evaluation_in_json_on_disk_and_as_a_table(trained, tmp_path):
    result = evaluate_tuned_lens(*trained)
    made = result.to_json()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["layers"] == [0, 1, 2] and len(made["tuned"]) == len(made["gain_low"]) == 3
    assert list(result.top(2)["layer"]) == [0, 2] and "tuned" in repr(result)
    result.save(tmp_path / "evaluation")
    again = TunedLensResult.load(tmp_path / "evaluation")
    assert again.data.identical(result.data) and again.summary() == result.summary()


def test_documents_that_were_trained_on_are_refused(trained):
    of, lens, _ = trained
    train, _ = chain().split(0.75)
    with pytest.raises(UserError, match="9 documents of a random walk were trained on"):
        evaluate_tuned_lens(of, lens, train)
    evaluate_tuned_lens(of, lens, replace(train, source="another text"))


# On disk


def test_it_is_the_same_from_disk(trained, tmp_path):
    of, lens, _ = trained
    lens.save(tmp_path / "lens")
    assert sorted(path.name for path in (tmp_path / "lens").iterdir()) == ["config.json", "params.safetensors"]
    again = TunedLens.load(tmp_path / "lens", of)
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias)
    assert again.config == lens.config and dict(again.origin) == dict(lens.origin)
    task = pairs(of, True)
    assert logit_lens(of, task, lens=again).data.identical(logit_lens(of, task, lens=lens).data)
    note = json.loads((tmp_path / "lens" / "config.json").read_text())
    assert note["model"] == "llama" and note["weights_hash"] == of.weights_hash()
    assert note["d_model"] == 24 and note["n_layers"] == 3 and note["text"] == "a random walk"
    assert note["training"]["steps"] == QUICK.steps
    lens.save(tmp_path / "lens")  # again, over itself
    result = logit_lens(of, task, lens=again)
    result.save(tmp_path / "result")
    assert LensResult.load(tmp_path / "result").about["tuned_lens"]["model"] == "llama"


@pytest.fixture
def folder(tmp_path):
    random_lens(model("llama")).save(tmp_path)
    return tmp_path


def test_a_lens_of_another_model_is_refused(folder):
    with pytest.raises(UserError, match=r"trained on llama, which has n_layers 3, not 4; the model here is gemma2"):
        TunedLens.load(folder, model("gemma2"))
    with pytest.raises(UserError, match=r"trained on llama, which has other weights .*the model here is qwen3"):
        TunedLens.load(folder, model("qwen3"))
    with pytest.raises(UserError, match="train a lens of its own"):
        logit_lens(model("qwen3"), [[1, 2, 3]], lens=random_lens(model("llama")))
    with pytest.raises(UserError, match="train a lens of its own"):
        evaluate_tuned_lens(model("qwen3"), random_lens(model("llama")), chain(8))


def edited(folder, **changes):
    note = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in note.items() if v is not None}))


def test_damaged_files_are_one_clear_line(folder, tmp_path):
    of, config = model("llama"), (folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"cannot read a tuned lens from .*missing"):
        TunedLens.load(tmp_path / "missing", of)
    edited(folder, colour="blue")
    with pytest.raises(UserError, match=r"unknown or missing keys \['colour'\]"):
        TunedLens.load(folder, of)
    (folder / "config.json").write_text(config)
    edited(folder, text=None)
    with pytest.raises(UserError, match=r"unknown or missing keys \['text'\]"):
        TunedLens.load(folder, of)
    (folder / "config.json").write_text(config)
    edited(folder, training={"steps": 3})
    with pytest.raises(UserError, match=r"settings of a tuned lens must be .*unknown or missing"):
        TunedLens.load(folder, of)
    (folder / "config.json").write_text(config[:-9])
    with pytest.raises(UserError, match="cannot read a tuned lens"):
        TunedLens.load(folder, of)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no tuned lens of ours"):
        TunedLens.load(folder, of)
    (folder / "config.json").write_text(config)
    random_lens(of, 0.1).save(tmp_path / "other")
    (folder / "params.safetensors").write_bytes((tmp_path / "other" / "params.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"is not the file that config.json beside it was written for"):
        TunedLens.load(folder, of)
    (folder / "params.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot read a tuned lens"):
        TunedLens.load(folder, of)


def test_a_save_that_fails_leaves_the_old_lens(folder, monkeypatch):
    of = model("llama")
    before = TunedLens.load(folder, of)

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        random_lens(of, 0.1).save(folder)
    assert torch.equal(TunedLens.load(folder, of).weight, before.weight)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "params.safetensors"]


# Bad input


def test_text_that_cannot_be_trained_on(tmp_path):
    of = load("planted-induction", device="cpu")
    (tmp_path / "short.txt").write_text("a b c d e")
    with pytest.raises(UserError, match=r"no document of short.txt has 16 tokens; the longest has 5"):
        blocks(of, tmp_path / "short.txt", length=16)
    with pytest.raises(UserError, match="blocks of 65 tokens were asked for; valid: 2 … 64"):
        blocks(of, ["a " * 100], length=65)
    with pytest.raises(UserError, match="need two documents; found 1"):
        blocks(of, ["a b c d " * 20], length=16).split(0.9)


def test_a_model_that_is_changed_is_not_trained_on():
    of = model("llama")
    with of.intervene(Zero(Site("z", 0))) as changed:
        with pytest.raises(UserError, match="leave the interventions first"):
            train_tuned_lens(changed, chain(8), QUICK, progress=False)
        changed([[1, 2]])


def test_padded_blocks_and_impossible_positions():
    of = model("llama")
    padded = Blocks(pairs(of, True).clean, torch.arange(4), "padded")
    with pytest.raises(UserError, match="found padded prompts"):
        train_tuned_lens(of, padded, QUICK, progress=False)
    lens = random_lens(of)
    with pytest.raises(UserError, match=r"positions must be 1 … 7"):
        evaluate_tuned_lens(of, lens, padded)
    for positions in (0, 12):
        with pytest.raises(UserError, match=r"positions must be 1 … 11 in unpadded blocks of 12 tokens"):
            evaluate_tuned_lens(of, lens, chain(8), positions=positions)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"columns": 1}, {"ridge": 0.0}, {"learning_rate": -1.0}])
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}"):
        TunedLensConfig(**wrong)


def test_the_progress_bar_can_be_switched_off(capsys):
    of, config = model("gpt2"), replace(QUICK, steps=1)
    train_tuned_lens(of, chain(8), config, progress=False)
    assert capsys.readouterr().err == ""
    train_tuned_lens(of, chain(8), config)
    assert "tuned lens" in capsys.readouterr().err


# The real model


@pytest.mark.real_model
def test_a_small_lens_of_smollm2(smollm2):
    train, held = blocks(smollm2, length=64, n=40, per_document=4).split(0.8)
    config = TunedLensConfig(steps=2, blocks_per_step=1, positions=32, columns=1024, start_blocks=24)
    lens = train_tuned_lens(smollm2, train, config, progress=False)
    result = evaluate_tuned_lens(smollm2, lens, held, positions=2)
    gain = result.data["gain"].values
    assert gain[15] > 8 and gain[0] > 20 and (gain > 0).all()
