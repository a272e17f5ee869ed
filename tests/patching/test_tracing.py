"""A causal trace equals brute-force hooks: every family, every site, windows, padded and not."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp import Noise, Site, UserError, Zero, load
from mechinterp.patching import TraceResult, trace, tracing
from mechinterp.patching.subjects import ROLES, subject_of, tokens_of
from mechinterp.tasks import induction
from mechinterp.tasks.pairs import Answers, Target, assemble
from tests.families import FAMILIES, full_logits, model

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def facts(of, padded, n=4, length=8, bos=False):
    """Random prompts whose subjects have one to three tokens, and whose answers are the model's own predictions."""
    draw = torch.Generator().manual_seed(5)
    clean, corrupted, roles, targets = [], [], [], []
    for i in range(n):
        size = length - (i % 3 if padded else 0)
        row = torch.randint(0, of.d_vocab, (size,), generator=draw).tolist()
        first, last = 1 + i % 2, 1 + i % 2 + i % 3
        other = [(token + 7) % of.d_vocab if first <= at <= last else token for at, token in enumerate(row)]
        clean.append(row)
        corrupted.append(other)
        roles.append({"subject_first": first, "subject_last": last})
        targets.append([Target(size - 1, {int(of([row])[0, -1].argmax()): 1.0}, {int(i): 1.0})])
    return assemble(of, "random facts", "other-subject", clean, corrupted, roles, targets, bos=bos)


def captured(of, prompts, hooks, names):
    kept = {}
    keep = [(name, lambda x, hook, name=name: kept.__setitem__(name, x.clone())) for name in names]
    full_logits(of, prompts, [*hooks, *keep])
    return kept


def answer_prob(of, task, hooks):
    logits = full_logits(of, task.clean, hooks)[torch.arange(len(task)), task.answers.pos[:, 0]]
    return logits.softmax(-1)[torch.arange(len(task)), task.answers.answer[:, 0, 0]].double()


def noised_embeddings(of, task, noise, draws, seed):
    """`[prompt pos d_model]` of every draw: the noise of the intervention at the subject's tokens and nowhere else."""
    first, last = task.clean.roles["subject_first"], task.clean.roles["subject_last"]
    embed = captured(of, task.clean, [], ["hook_embed"])["hook_embed"]
    std = torch.cat([embed[i, first[i] : last[i] + 1].flatten() for i in range(len(task))]).std()
    made = []
    for one in np.random.SeedSequence(seed).generate_state(draws).tolist():
        _, everywhere = of.run_with_cache(task.clean, "embed", [Noise(Site("embed"), float(noise * std), one)])
        made.append(embed.clone())
        for i in range(len(task)):
            made[-1][i, first[i] : last[i] + 1] = everywhere["embed"][i, first[i] : last[i] + 1]
    return made


def brute_force(of, task, site, window, noise=3.0, draws=2, seed=0, also=(), source=None):
    """P(answer) `[draw layer pos prompt]` with each position of each window put back, by raw hooks; and noised.

    All positions of a layer are one batch: prompt by prompt at position 0, then at position 1, …
    """
    names = [one.hook_name for one in of.site_list if one.name == site]
    n, n_pos = len(task), task.clean.n_pos
    each = task.take(torch.arange(n).repeat(n_pos))
    rows, at = torch.arange(n * n_pos), torch.arange(n_pos).repeat_interleave(n)
    clean = captured(of, (source or task.clean).take(torch.arange(n).repeat(n_pos)), also, names)
    restored, noised = torch.empty(draws, len(names), n_pos, n).double(), []
    for draw, embed in enumerate(noised_embeddings(of, task, noise, draws, seed)):
        noising = ("hook_embed", lambda x, hook, embed=embed: embed.repeat(len(x) // n, 1, 1))
        was = captured(of, each.clean, [noising, *also], names)
        noised.append(answer_prob(of, task, [noising, *also]))
        for middle in range(len(names)):
            span = range(max(0, middle - window // 2), min(len(names), middle - (-window // 2)))
            putting = []
            for layer in span:

                def put(x, hook, to=clean[names[layer]], old=was[names[layer]]):
                    x = x.clone()
                    # TransformerLens's resid_mid is only what the second norm reads: there the change goes to attn_out.
                    x[rows, at] = x[rows, at] + (to - old)[rows, at] if site == "resid_mid" else to[rows, at]
                    return x

                putting.append((f"blocks.{layer}.hook_attn_out" if site == "resid_mid" else names[layer], put))
            restored[draw, middle] = answer_prob(of, each, [noising, *also, *putting]).reshape(n_pos, n)
    return restored, torch.stack(noised)


def by_role(task, values):
    """`[layer role prompt draw]` from `[draw layer pos prompt]`, token by token."""
    out = np.full((values.shape[1], len(ROLES), len(task), values.shape[0]), np.nan)
    for i in range(len(task)):
        first, last = (int(task.clean.roles[f"subject_{end}"][i]) for end in ("first", "last"))
        end = task.clean.n_pos - 1
        places = {
            "subject_only": [first] if last == first else [],
            "subject_first": [first] if last > first else [],
            "subject_middle": range(first + 1, last),
            "subject_last": [last] if last > first else [],
            "next": [last + 1],
            "further": range(last + 2, end),
            "last": [end],
        }
        for number, role in enumerate(ROLES):
            if len(places[role]):
                out[:, number, i] = values[:, :, list(places[role]), i].mean(2).T
    return out


@pytest.fixture
def few_controls(monkeypatch):
    """Less to run where the control is not what is tested."""
    monkeypatch.setattr(tracing, "CONTROLLED", 1)


def compare(of, task, site, window=None, also=()):
    result = trace(of, task, site=site, window=window, draws=2, seed=3, force=True, progress=False)
    want, noised = brute_force(of, task, site, window or 1, seed=3, also=also)
    want = by_role(task, want)[:, [ROLES.index(role) for role in result.data["role"].values]]
    np.testing.assert_allclose(result.data["restored"], want, atol=1e-5, rtol=1e-4, err_msg=str((site, window)))
    np.testing.assert_allclose(result.data["noised"], noised.numpy().T, atol=1e-5)
    assert np.nanmax(abs(want - noised.numpy().T)) > 1e-2, "a comparison of nothing with nothing"
    return result


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_brute_force(family, padded, few_controls):
    of = model(family)
    task = facts(of, padded)
    present = {site.name for site in of.site_list}
    for site in SITES:
        if site in present:
            result = compare(of, task, site)
            np.testing.assert_allclose(result.data["clean"], answer_prob(of, task, []), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_brute_force(family, few_controls):
    of = model(family)
    compare(of, facts(of, True), "attn_out", 2)
    compare(of, facts(of, False), "mlp_out", 3)
    compare(of, facts(of, True), "resid_post", 2)


def test_interventions_in_force_are_in_every_run(few_controls):
    of = model("llama")
    task = facts(of, True)
    with of.intervene(Zero(Site("mlp_out", 1))):
        answers = of(task.clean)[:, -1].argmax(-1)
        made = [[Target(task.clean.n_pos - 1, {int(answer): 1.0}, {})] for answer in answers]
        task = replace(task, answers=Answers.build(made))
        result = compare(of, task, "resid_post", also=[("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)])
    assert result.about["in_force"] == ["Zero at mlp_out layer 1"]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_control_is_the_other_subject_put_back(family):
    of = model(family)
    task = facts(of, True)
    result = trace(of, task, site="mlp_out", window=2, draws=2, seed=3, force=True, progress=False)
    other, noised = brute_force(of, task, "mlp_out", 2, seed=3, source=task.corrupted)
    want = np.nanmean(by_role(task, other) - noised.numpy().T, axis=(2, 3))
    roles = [ROLES.index(role) for role in result.data["role"].values]
    control = result.data["control"].values
    chosen = np.isfinite(control)
    assert chosen.sum() == tracing.CONTROLLED
    np.testing.assert_allclose(control[chosen], want[:, roles][chosen], atol=1e-5)
    assert result.about["baseline"]["other_subject"] == pytest.approx(
        float(answer_prob(of, replace(task, clean=task.corrupted), []).mean()), abs=1e-5
    )
    assert np.abs(result.data["indirect"].values[chosen]).min() >= np.abs(result.data["indirect"].values[~chosen]).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_identities(family, few_controls):
    """All comes back with the last state of the last layer, and with the first state of a subject of one token."""
    of = model(family)
    for padded in (False, True):
        task = facts(of, padded)
        late = trace(of, task, layers=[-1], draws=2, force=True, progress=False)
        assert list(late.data["layer"].values) == [of.n_layers - 1]
        total = late.data["clean"] - late.data["noised"].mean("draw")
        np.testing.assert_allclose(late.per_prompt.sel(role="last")[0], total, atol=1e-5)
        assert float(late.data["indirect"].sel(role="last")[0]) == pytest.approx(
            late.total_effect["estimate"], abs=1e-5
        )
        early = trace(of, task, site="resid_pre", layers=[0], draws=2, force=True, progress=False)
        single = (task.clean.roles["subject_first"] == task.clean.roles["subject_last"]).numpy()
        assert single.any() and not single.all()
        np.testing.assert_allclose(early.per_prompt.sel(role="subject_only")[0, single], total[single], atol=1e-5)
        after = early.data["indirect"].sel(role=["next", "further", "last"])
        np.testing.assert_allclose(after, 0, atol=1e-5)  # no block has run: nothing moved there yet


def test_each_position():
    of = model("llama")
    task = facts(of, False)
    result = trace(of, task, positions="each", draws=2, seed=3, force=True, progress=False)
    want, _ = brute_force(of, task, "resid_post", 1, seed=3)
    assert result.axis == "pos" and list(result.data["pos"].values) == list(range(8))
    np.testing.assert_allclose(result.data["restored"], want.numpy().transpose(1, 2, 3, 0), atol=1e-5)
    assert (result.data["indirect"].sel(pos=0) == 0).all() and (result.data["n"] == 4).all()
    with pytest.raises(UserError, match="'each' needs prompts of one length"):
        trace(of, facts(of, True), positions="each", force=True)


def test_a_plain_function_and_small_calls_give_the_same(few_controls):
    of = model("qwen3")
    task = facts(of, True)
    rows, answer = torch.arange(len(task)), task.answers.answer[:, 0, 0]
    named = trace(of, task, site="attn_out", window=2, draws=2, force=True, progress=False)

    def function(logits):
        assert logits.shape == (len(task), task.clean.n_pos, of.d_vocab), "it sees every prompt and position"
        return logits[rows, -1].softmax(-1)[rows, answer]

    for other in ({"metric": function}, {"max_tokens": 8}):
        again = trace(of, task, site="attn_out", window=2, draws=2, force=True, progress=False, **other)
        np.testing.assert_allclose(again.data["restored"], named.data["restored"], atol=1e-5)


def test_metrics_differ_in_their_unit_alone(few_controls):
    of = model("neox")
    task = facts(of, True)
    prob, log = (trace(of, task, draws=2, metric=name, force=True, progress=False).data for name in ("prob", "logprob"))
    one = [
        "subject_first",
        "subject_middle",
        "subject_last",
        "next",
        "last",
    ]  # a mean over tokens is not the mean's log
    np.testing.assert_allclose(np.log(prob["restored"].sel(role=one)), log["restored"].sel(role=one), atol=1e-3)
    kl = trace(of, task, draws=2, metric="kl", force=True, progress=False)
    np.testing.assert_allclose(kl.data["clean"], 0, atol=1e-6)
    assert (kl.data["noised"] > 0).all() and kl.total_effect["estimate"] < 0
    assert float(kl.data["indirect"].sel(role="last")[-1]) == pytest.approx(kl.total_effect["estimate"], abs=1e-5)


def test_the_noise():
    """Of the strength asked for, at the subject's tokens alone, another in every draw and prompt."""
    of = model("gpt2")
    task = facts(of, True, n=12)
    tokens = tokens_of(task, *subject_of(task, ("subject_first", "subject_last")), "roles")
    noises, std = tracing._noises(of, task, tokens, 3.0, 40, 0)
    embed = captured(of, task.clean, [], ["hook_embed"])["hook_embed"]
    inside = torch.zeros_like(task.clean.tokens, dtype=torch.bool)
    for i in range(len(task)):
        inside[i, task.clean.roles["subject_first"][i] : task.clean.roles["subject_last"][i] + 1] = True
    assert std == pytest.approx(float(embed[inside].std()), rel=1e-6)
    added = torch.stack([of.run_with_cache(task.clean, "embed", [one])[1]["embed"] - embed for one in noises])
    assert (added[:, ~inside] == 0).all() and (added[:, inside].abs().amax(-1) > 0).all()
    assert float(added[:, inside].std()) == pytest.approx(3 * std, rel=0.02)
    flat = added[:4, inside].flatten(0, 1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.85, "tokens, prompts and draws have noise of their own"  # of 24 numbers each


def test_a_seed_is_a_trace(few_controls):
    of = model("llama")
    task = facts(of, True)
    first, again, other = (trace(of, task, draws=2, seed=s, force=True, progress=False).data for s in (1, 1, 2))
    assert first.identical(again)
    assert abs(first["noised"] - other["noised"]).max() > 1e-3
    more = trace(of, task, draws=4, seed=1, force=True, progress=False).data
    np.testing.assert_allclose(more["noised"][:, :2], first["noised"], atol=1e-6)  # draws are added, not replaced


# Statistics


def simulated(n=24, draws=4, effect=0.3, between=0.0, within=0.0, seed=0):
    """`restored` `[layer role prompt draw]` of one real and one null cell, and `noised` `[prompt draw]`."""
    rng = np.random.default_rng(seed)
    noised = rng.uniform(0, 0.1, (n, draws))
    spread = between * rng.normal(size=(2, 1, n, 1)) + within * rng.normal(size=(2, 1, n, draws))
    return noised + np.array([effect, 0.0])[:, None, None, None] + spread, noised


@pytest.mark.parametrize("between, within, draws", [(0.1, 0.0, 4), (0.0, 0.1, 1), (0.0, 0.1, 4), (0.1, 0.1, 4)])
def test_intervals_hold_prompts_and_draws(between, within, draws):
    """Their half width is 1.96 standard errors of a mean over prompts whose variance has both parts."""
    widths = []
    for seed in range(40):
        restored, noised = simulated(draws=draws, between=between, within=within, seed=seed)
        arrays, _ = tracing._statistics(restored, noised, None, None, seed)
        widths.append((arrays["ci_high"] - arrays["ci_low"])[0, 0] / 2)
    assert np.mean(widths) == pytest.approx(1.96 * np.sqrt((between**2 + within**2 / draws) / 24), rel=0.1)


def test_one_prompt_has_an_interval_over_its_draws():
    of = model("llama")
    task = facts(of, False).take(torch.tensor([1]))
    result = trace(of, task, draws=6, force=True, progress=False)
    assert "over draws" in result.about["scope"] and np.isfinite(result.data["ci_low"]).all()
    spread = (result.data["restored"] - result.data["noised"]).std("draw")
    wide = result.data["ci_high"] - result.data["ci_low"]
    assert (wide > 0).sel(role="next").all() and float(spread.max()) > 1e-3
    assert trace(of, task, draws=1, force=True, progress=False).total_effect["ci_low"] is None


def test_roles_are_averaged_over_the_prompts_that_have_them():
    restored, noised = simulated(n=10)
    restored = np.concatenate([restored, restored], axis=1)
    restored[:, 1, :6] = np.nan
    arrays, _ = tracing._statistics(restored, noised, None, None, 0)
    np.testing.assert_allclose(arrays["indirect"], [[0.3, 0.3], [0, 0]], atol=1e-9)


def test_what_the_other_subject_brings_back_as_well_does_not_pass():
    restored, noised = simulated(between=0.05, within=0.05)

    def from_other(share):
        return lambda cells: np.stack([noised + share * (restored[0, 0] - noised) for _ in cells])

    for share, passes in ((0.0, True), (0.5, True), (1.0, False), (1.3, False)):
        arrays, threshold = tracing._statistics(restored, noised, from_other(share), None, 0)
        assert bool(arrays["passes"][0, 0]) is passes, share
        assert arrays["control"][0, 0] == pytest.approx(share * arrays["indirect"][0, 0])
        assert not arrays["passes"][1, 0] and 0 < threshold < 0.3


# A known circuit


def test_on_a_planted_model_the_trace_finds_the_way_of_the_answer():
    """B's token is read by the induction head at B's position, and written by it at the end; nowhere else."""
    of = load("planted-induction", device="cpu")
    task = induction(of, n=24)
    assert task.donor is not None
    task = replace(task, corrupted=task.donor)  # other words at every position
    residual = trace(of, task, subject="B1", draws=2, noise=6.0, progress=False)
    total = residual.total_effect["estimate"]
    assert total > 0.5
    effect = residual.data["indirect"]
    assert float(effect.sel(layer=0, role="subject_only")) == pytest.approx(total, rel=0.05)
    assert float(effect.sel(layer=1, role="last")) == pytest.approx(total, abs=1e-5)
    assert float(abs(effect.sel(layer=1, role="subject_only"))) < 1e-6
    assert float(abs(effect.sel(role=["next", "further"])).max()) < 0.02
    passed = residual.data["passes"]
    assert bool(passed.sel(layer=0, role="subject_only")) and bool(passed.sel(layer=1, role="last"))
    assert int(passed.sum()) == 2
    attention = trace(of, task, subject="B1", site="attn_out", window=1, draws=2, noise=6.0, progress=False).data[
        "indirect"
    ]
    assert float(attention.sel(layer=1, role="last")) == pytest.approx(total, rel=0.05)


# What comes back, and what is refused


def test_the_result(tmp_path):
    of = model("llama")
    task = facts(of, True, n=9)
    result = trace(of, task, site="attn_out", draws=3, noise=2.5, force=True, progress=False)
    data, about = result.data, result.about
    assert data["indirect"].dims == ("layer", "role") and data["restored"].shape[2:] == (9, 3)
    assert list(data["role"].values) == [r for r in ROLES if r in data["role"].values]
    assert data["n"].sel(role="subject_only") == 3 and data["n"].sel(role="subject_first") == 6
    assert about["window"] == 1 and about["noise"] == 2.5 and about["draws"] == 3 and about["n_prompts"] == 9
    assert about["noise_std"] > 0 and about["metric"] == "prob" and about["site"] == "attn_out"
    share = float((data["clean"] - data["noised"].mean("draw")).mean())
    assert result.total_effect["estimate"] == pytest.approx(share)
    assert result.total_effect["ci_low"] <= share <= result.total_effect["ci_high"]
    assert (data["ci_low"] <= data["indirect"]).all() and (data["indirect"] <= data["ci_high"]).all()
    assert "attn_out: prob falls by" in result.summary() and "n=9, 3 draws" in result.summary()
    top = result.top(3)
    assert list(top.columns[:3]) == ["layer", "role", "indirect"] and len(top) == 3
    assert abs(top["indirect"]).is_monotonic_decreasing
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["control_prompts"].startswith("the same states of the other side")
    assert plain["dims"] == ["layer", "role"] and len(plain["per_prompt"]) == 3
    assert None in [value for row in plain["per_prompt"][0] for value in row], "a subject of one token has no first"
    result.save(tmp_path / "trace.safetensors")
    assert TraceResult.load(tmp_path / "trace.safetensors").data.identical(data)


@pytest.mark.parametrize("layers, width, spans", [
    (12, 1, [(0, 0), (5, 5), (11, 11)]),
    (12, 2, [(0, 0), (4, 5), (10, 11)]),
    (12, 3, [(0, 1), (4, 6), (10, 11)]),
    (12, 10, [(0, 4), (0, 9), (6, 11)]),
])  # fmt: skip
def test_windows(layers, width, spans, monkeypatch):
    """As in the authors' code: from middle - width // 2 to middle + ceil(width / 2) - 1."""
    of = model("llama")
    monkeypatch.setattr(of, "n_layers", layers)
    monkeypatch.setattr(type(of), "resolve", lambda self, site, write=False: site.counted(layers))
    assert [span for _, span in tracing._windows(of, "mlp_out", width, [0, 5, -1])] == spans


def test_default_windows(monkeypatch):
    of = model("llama")
    for layers, width in ((48, 10), (30, 6), (3, 1), (1, 1)):
        monkeypatch.setattr(of, "n_layers", layers)
        assert tracing._width(of, "resid_post", None) == 1
        assert tracing._width(of, "mlp_out", None) == tracing._width(of, "attn_out", None) == width


def test_a_subject_at_position_0():
    of = model("llama")
    task = facts(of, False)
    early = replace(task, clean=task.clean.with_roles({"subject": torch.zeros(4, dtype=torch.long)}))
    with pytest.warns(UserWarning, match="subject of 4 of 4 prompts holds position 0 and there is no BOS"):
        trace(of, early, subject="subject", draws=1, force=True, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(of, task, subject="subject_first", draws=1, force=True, progress=False)


@pytest.mark.parametrize("settings, says", [
    ({"site": "z"}, "site 'z' cannot be traced; valid: resid_pre"),
    ({"window": 0}, "window must be 1 … 3 layers; found 0"),
    ({"window": 9}, "window must be 1 … 3 layers; found 9"),
    ({"layers": []}, "no layers given"),
    ({"layers": [7]}, "layers 0 … 2"),
    ({"draws": 0}, "draws must be at least 1; found 0"),
    ({"noise": 0.0}, "noise must be above 0"),
    ({"noise": float("nan")}, "noise must be above 0"),
    ({"subject": "S1"}, "unknown role 'S1' of the subject; roles here: subject_first, subject_last"),
    ({"subject": ("subject_last", "subject_first")}, "'subject_last' comes after 'subject_first' in prompt 1"),
    ({"positions": "last"}, "unknown positions 'last'; valid for a trace: roles, each"),
    ({"metric": "perplexity"}, "unknown metric"),
])  # fmt: skip
def test_bad_input(settings, says):
    of = model("llama")
    with pytest.raises(UserError, match=says) as raised:
        trace(of, facts(of, True), progress=False, **settings)
    assert "\n" not in str(raised.value)


def test_subjects_that_cannot_be_traced():
    of = model("llama")
    task = facts(of, False)
    lacking = task.clean.with_roles({"subject": torch.tensor([2, -1, 2, 2])})
    with pytest.raises(UserError, match="prompt 1 has no token in the role 'subject'"):
        trace(of, replace(task, clean=lacking), subject="subject")
    before = replace(task.answers, pos=torch.tensor([[7], [7], [0], [7]]))
    with pytest.raises(UserError, match="answer of prompt 2 is read before its subject begins"):
        trace(of, replace(task, answers=before))


def test_noise_that_takes_nothing_away():
    of = model("llama")
    task = facts(of, False)
    worst = of(task.clean)[:, -1].argmin(-1)
    unknown = replace(task, answers=Answers.build([[Target(7, {int(token): 1.0}, {})] for token in worst]))
    with pytest.raises(UserError, match=r"noise takes nothing away: mean prob is 0.000 .*mi\.tasks\.known"):
        trace(of, unknown, progress=False)


def test_pairs_without_another_subject_have_no_control():
    of = model("llama")
    task = facts(of, True)
    result = trace(of, replace(task, corrupted=task.clean), draws=1, force=True, progress=False)
    assert result.about["control"].startswith("none") and not result.data["passes"].any()
    assert result.data["control"].isnull().all() and result.about["baseline"]["other_subject"] is None
