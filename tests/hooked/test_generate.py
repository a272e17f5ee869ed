"""Generating is a full run at every step: every family, padded and not, with interventions in force."""

import pytest
import torch
import transformers as hf
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechinterp import Apply, Mean, Noise, Patch, Prompts, Resample, Site, Steer, UserError, Zero, load
from mechinterp.hooked import forward, generate
from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.models.planted import LETTERS, word_tokenizer
from tests.families import FAMILIES, full_logits, model, pairs

NEW = 6


def by_full_runs(of, prompts, hooks, new=NEW, forced=None):
    """Logits `[step prompt d_vocab]` and the tokens `[step prompt]`: everything is run again, by TransformerLens."""
    tokens, mask, logits = prompts.tokens, prompts.real.long(), []
    for step in range(new):
        attention = None if prompts.mask is None else mask
        run = of.bridge.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=attention, use_cache=False)
        logits.append(run[:, -1])
        chosen = run[:, -1].argmax(-1) if forced is None else forced[step]
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(chosen[:, None])], dim=1)
    return torch.stack(logits), tokens[:, prompts.n_pos :].T


def by_steps(of, prompts, chosen):
    """Logits `[step prompt d_vocab]` of `next_logits`, given the tokens `[step prompt]`."""
    steps = generate.next_logits(of, prompts)
    logits = [next(steps)]
    logits += [steps.send(one) for one in chosen[:-1]]
    steps.close()
    return torch.stack(logits)


def agree(of, task, interventions, hooks):
    """Logits of every step and the tokens of `generate` are those of full runs, and not those without interventions."""
    want, chosen = by_full_runs(of, task.clean, hooks)
    with of.intervene(*interventions):
        got = by_steps(of, task.clean, chosen)
        said = of.generate(task.clean, NEW)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert said.tokens == chosen.T.tolist()
    if interventions:
        plain, _ = by_full_runs(of, task.clean, [], forced=chosen)
        assert ((want - plain).abs().amax(-1) > 1e-3).all(), "an intervention that does nothing shows nothing"


def captured(of, prompts, site):
    kept = {}
    full_logits(of, prompts, [(site.hook_name, lambda x, hook: kept.__setitem__("it", x.clone()))])
    return kept["it"]


def edited(change):
    """A TransformerLens hook that changes a copy in place."""

    def hook(x, hook):
        x = x.clone()
        change(x)
        return x

    return hook


def writable_pattern(of, layer):
    return Site("pattern", layer) in of.site_list and of.writable(Site("pattern", layer))


CASES = [(family, padded) for family in FAMILIES for padded in (False, True)]
each_family = pytest.mark.parametrize(
    "family, padded", CASES, ids=[f"{f}-{'padded' if p else 'even'}" for f, p in CASES]
)


@each_family
def test_without_interventions(family, padded):
    of = model(family)
    assert of.keeps_cache
    agree(of, pairs(of, padded), [], [])


@each_family
def test_interventions_at_all_positions_act_on_generated_tokens(family, padded):
    of = model(family)
    task = pairs(of, padded)
    vector = torch.linspace(-1, 1, of.d_model)
    mlp = captured(of, task.corrupted, Site("mlp_out", 2))[task.corrupted.real].mean(0)
    interventions = [
        Steer(Site("resid_post", 1), vector, 1.5),
        Zero(Site("z", 1, head=2)),
        Zero(Site("v", 2, head=0)),
        Mean(Site("mlp_out", 2), task.corrupted),
    ]
    hooks = [
        ("blocks.1.hook_resid_post", lambda x, hook: x + 1.5 * vector),
        ("blocks.1.attn.hook_z", edited(lambda x: x[:, :, 2].zero_())),
        ("blocks.2.attn.hook_v", edited(lambda x: x[:, :, 0].zero_())),
        ("blocks.2.hook_mlp_out", lambda x, hook: mlp.expand_as(x)),
    ]
    agree(of, task, interventions, hooks)


@each_family
def test_positions_are_those_of_the_prompt_and_never_move(family, padded):
    of = model(family)
    task = pairs(of, padded)
    n_pos, rows = task.clean.n_pos, torch.arange(len(task))
    vector = torch.linspace(-1, 1, of.d_model)
    first, role = task.clean.padding, task.clean.roles["A"]
    other, keys = captured(of, task.corrupted, Site("resid_post", 1)), captured(of, task.corrupted, Site("k", 2))
    interventions = [
        Steer(Site("resid_pre", 1), vector, positions=-1),
        Steer(Site("mlp_out", 0), vector, 2.0, positions=[0]),
        Patch(Site("resid_post", 1), task.corrupted, positions="A"),
        Patch(Site("k", 2), task.corrupted, positions=["A", "END"]),
        Noise(Site("attn_out", 2), 0.5, seed=3, positions="END"),
    ]
    with of.intervene(interventions[-1]):
        noised = of.run_with_cache(task.clean, ("attn_out", 2))[1]["attn_out", 2]
    noise = (noised - captured(of, task.clean, Site("attn_out", 2)))[:, n_pos - 1]

    def patch_keys(x):
        x[:, n_pos - 1] = keys[:, n_pos - 1]
        x[rows, role] = keys[rows, role]

    hooks = [
        ("blocks.1.hook_resid_pre", edited(lambda x: x[:, n_pos - 1].add_(vector))),
        ("blocks.0.hook_mlp_out", edited(lambda x: x.index_put_((rows, first), 2 * vector, accumulate=True))),
        ("blocks.1.hook_resid_post", edited(lambda x: x.index_put_((rows, role), other[rows, role]))),
        ("blocks.2.attn.hook_k", edited(patch_keys)),
        ("blocks.2.hook_attn_out", edited(lambda x: x[:, n_pos - 1].add_(noise))),
    ]
    agree(of, task, interventions, hooks)


@each_family
def test_patterns(family, padded):
    """Edits along keys: at positions of the prompt in the prefill alone, everywhere with a full run at every step."""
    of = model(family)
    if not writable_pattern(of, 1):
        pytest.skip("its attention is computed inside the wrapped module")
    task = pairs(of, padded)
    n_pos = task.clean.n_pos
    other = captured(of, task.corrupted, Site("pattern", 1))
    where = (slice(None), slice(None), n_pos - 1, slice(n_pos))
    prompt_only = Patch(Site("pattern", 1), task.corrupted, positions="END")
    patching = ("blocks.1.attn.hook_pattern", edited(lambda x: x[where].copy_(other[where])))
    agree(of, task, [prompt_only], [patching])
    zeroing = ("blocks.2.attn.hook_pattern", edited(lambda x: x[:, 1].zero_()))
    agree(of, task, [prompt_only, Zero(Site("pattern", 2, head=1))], [patching, zeroing])


@each_family
def test_a_plain_function_sees_the_whole_run_at_every_step(family, padded):
    of = model(family)
    task = pairs(of, padded)
    n_pos, rows, role = task.clean.n_pos, torch.arange(len(task)), task.clean.roles["B"]
    other = captured(of, task.corrupted, Site("resid_post", 0))
    seen = []

    def function(x, site):
        seen.append(x.shape[1])
        return x + 0.3 * x.mean(0, keepdim=True)

    patch = Patch(Site("resid_post", 0), task.corrupted, positions="B", noop_ok=True)
    steer = Steer(Site("resid_post", 0), torch.ones(of.d_model), positions=-1)
    hooks = [
        ("blocks.1.hook_resid_post", lambda x, hook: x + 0.3 * x.mean(0, keepdim=True)),
        ("blocks.0.hook_resid_post", edited(lambda x: x.index_put_((rows, role), other[rows, role]))),
        ("blocks.0.hook_resid_post", edited(lambda x: x[:, n_pos - 1].add_(1))),
    ]
    agree(of, task, [Apply(Site("resid_post", 1), function), patch, steer], hooks)
    assert seen == [n_pos + step for step in range(NEW)] * 2
    at_prompt = Apply(Site("resid_post", 1), function, positions=-1)
    where = (slice(None), n_pos - 1)
    change = ("blocks.1.hook_resid_post", edited(lambda x: x[where].add_(0.3 * x[where].mean(0, keepdim=True))))
    seen.clear()
    agree(of, task, [at_prompt], [change])
    assert seen == [n_pos] * 2, "at positions of the prompt it acts in the prefill alone"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_with_kept_keys_and_without(family, monkeypatch):
    """What is kept makes no difference, at any site that can be changed."""
    of = model(family)
    task = pairs(of, True)
    chosen = torch.randint(0, of.d_vocab, (3, len(task)), generator=torch.Generator().manual_seed(2))
    plain = by_steps(of, task.clean, chosen)
    tried = 0
    for site in of.site_list:
        elsewhere = site.layer not in (None, 1) or "key" in site.kind.axes or site.name == "pos_embed"
        if elsewhere or not of.writable(site):
            continue
        for positions in (None, ["A", -1]):
            change = Steer(site, torch.linspace(0.3, 0.6, of.width(site)), positions=positions)
            if site.name in ("k", "rot_k"):  # the same vector on all keys is lost in the softmax
                change = Zero(site, positions=positions)
            with of.intervene(change):
                kept = by_steps(of, task.clean, chosen)
            monkeypatch.setitem(of.__dict__, "keeps_cache", False)
            with of.intervene(change):
                again = by_steps(of, task.clean, chosen)
            monkeypatch.setitem(of.__dict__, "keeps_cache", True)
            torch.testing.assert_close(kept, again, atol=1e-4, rtol=1e-4, msg=f"{site} at {positions}")
            assert (kept - plain).abs().max() > 1e-4, f"{site} at {positions}"
            tried += 1
    assert tried > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_says_what_each_prompt_says_alone(family):
    of = model(family)
    task = pairs(of, True)
    together = of.generate(task.clean, 8)
    for i in range(len(task)):
        alone = of.generate(task.clean.tokens[i][task.clean.real[i]], 8)
        assert alone.tokens[0] == together.tokens[i]
        torch.testing.assert_close(
            torch.tensor(alone.logprobs[0]), torch.tensor(together.logprobs[i]), atol=1e-4, rtol=0
        )


def test_a_mean_by_role_pools_generated_tokens_with_the_rest():
    of = model("llama")
    task = pairs(of, True)
    site, names = Site("mlp_out", 1), list(task.roles)
    value = captured(of, task.corrupted, site)
    at = {name: task.corrupted.at_role(name) for name in names}
    rest = value[task.corrupted.real & ~torch.stack(list(at.values())).any(0)].mean(0)

    def hook(x, hook):
        new = rest.expand_as(x).clone()
        for name in names:
            new[torch.arange(len(task)), task.clean.roles[name]] = value[at[name]].mean(0)
        return new

    agree(of, task, [Mean(site, task.corrupted, by="role")], [(site.hook_name, hook)])


def test_a_model_without_a_cache_runs_everything_again():
    of = load("planted-induction", device="cpu")
    assert not of.keeps_cache
    said = of.generate("a b c d a", 5)
    assert said.texts == ["b c d a b"]
    with of.intervene(Zero(Site("z", 1, head=2))):
        assert of.generate("a b c d a", 5).texts != said.texts


def test_a_cache_that_lies_is_not_used(monkeypatch):
    of = model("gpt2")
    monkeypatch.delitem(of.__dict__, "keeps_cache", raising=False)
    call = of.bridge.forward

    def forgetful(tokens, **rest):
        if rest.get("past_key_values") is not None and rest["past_key_values"].get_seq_length():
            tokens = tokens * 0
        return call(tokens, **rest)

    monkeypatch.setattr(of.bridge, "forward", forgetful)
    assert generate.probe(of) is False
    monkeypatch.setattr(of.bridge, "forward", call)
    assert generate.probe(of) is True
    monkeypatch.delitem(of.__dict__, "keeps_cache", raising=False)


def test_log_probabilities_are_those_of_the_text_read():
    of = model("qwen3")
    task = pairs(of, False)
    for temperature in (0, 1.7):
        said = of.generate(task.clean, 5, temperature=temperature, seed=4)
        whole = torch.cat([task.clean.tokens, torch.tensor(said.tokens)], dim=1)
        read = full_logits(of, Prompts(whole), [])[:, task.clean.n_pos - 1 : -1].log_softmax(-1)
        want = read.gather(-1, torch.tensor(said.tokens)[..., None])[..., 0]
        torch.testing.assert_close(torch.tensor(said.logprobs), want, atol=1e-4, rtol=0)


def test_drawing():
    of = model("llama")
    task = pairs(of, False)
    first, again, other = (of.generate(task.clean, 8, temperature=1.0, seed=s).tokens for s in (0, 0, 1))
    assert first == again != other
    assert of.generate(task.clean, 8, temperature=1e-4).tokens == of.generate(task.clean, 8).tokens
    # Of many draws of one step each token has its share.
    same = Prompts(task.clean.tokens[:1].expand(4000, -1))
    drawn = torch.tensor([row[0] for row in of.generate(same, 1, temperature=2.0).tokens])
    share = torch.bincount(drawn, minlength=of.d_vocab) / 4000
    want = (full_logits(of, Prompts(task.clean.tokens[:1]), [])[0, -1] / 2).softmax(-1)
    assert (share - want).abs().max() < 0.035


def ending(bos=False):
    """A tiny model with words, and with an end of text that its second layer can be steered to."""
    tokenizer = word_tokenizer(LETTERS)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=24, n_layer=2, n_head=4)
    made = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    bridge = build_bridge_from_module(made, "GPT2LMHeadModel", hf_config=config, tokenizer=None)
    return HookedModel(bridge, tokenizer, ModelInfo("words", "tiny random", "module", False, bos))


def test_a_text_ends_at_its_end(monkeypatch):
    of = ending()
    texts = ["a b c", "d e", "f g h i"]
    free = of.generate(texts, 8, stop_at_eos=False)
    assert [len(row) for row in free.tokens] == [8, 8, 8]
    end = free.tokens[0][2]  # call what the first prompt says third its end
    assert end not in free.tokens[0][:2]
    monkeypatch.setattr(type(of.tokenizer), "eos_token_id", end, raising=False)
    said = of.generate(texts, 8)
    for ours, whole, text in zip(said.tokens, free.tokens, said.texts, strict=True):
        stop = whole.index(end) + 1 if end in whole else 8
        assert ours == whole[:stop]
        assert text == of.tokenizer.decode(ours[:-1] if end in ours else ours)
    assert len(said.tokens[0]) == 3 and said.logprobs[0] == pytest.approx(free.logprobs[0][:3], abs=1e-5)
    assert repr(said.texts[0]) in repr(said)


def test_interventions_are_judged():
    of = model("llama")
    task = pairs(of, False)
    with pytest.raises(UserError, match="Patch at resid_post layer 1 changed no element"):
        of.generate(task.clean, 2, interventions=[Patch(Site("resid_post", 1), task.clean, positions=-1)])
    said = of.generate(task.clean, 2, interventions=[Steer(Site("resid_post", 1), torch.ones(of.d_model), 0.0)])
    assert said.tokens == of.generate(task.clean, 2).tokens
    assert not of.in_force


def test_an_intervention_that_never_fires(monkeypatch):
    of = model("llama")
    add = forward.Plan.add

    def deaf(self, hook_name, edit):
        if hook_name != "blocks.1.attn.hook_z":
            add(self, hook_name, edit)

    monkeypatch.setattr(forward.Plan, "add", deaf)
    with pytest.raises(UserError, match="Zero at L1H0 never fired"):
        of.generate(pairs(of, False).clean, 2, interventions=[Zero(Site("z", 1, head=0))])


@pytest.mark.parametrize("made, says", [
    (lambda t, d: Patch(Site("resid_post", 1), t.corrupted), "Patch at resid_post layer 1 has values"),
    (lambda t, d: Resample(Site("z", 1), t.corrupted), "Resample at z layer 1 has values"),
    (lambda t, d: Noise(Site("embed"), 1.0), "Noise at embed has values"),
    (lambda t, d: Mean(Site("z", 1), t.corrupted, by="position"), "give it positions"),
    (lambda t, d: Steer(Site("resid_post", 0), torch.ones(t.clean.n_pos, d)), "Steer at resid_post layer 0 has values"),
])  # fmt: skip
def test_values_of_the_prompts_positions_need_positions(made, says):
    of = model("llama")
    task = pairs(of, False)
    task = task.take(torch.arange(4))
    one = made(task, of.d_model)
    if isinstance(one, Mean):
        one = Mean(one.site, Prompts(task.corrupted.tokens), by="position")
    with pytest.raises(UserError, match=says) as raised:
        of.generate(task.clean, 2, interventions=[one])
    assert "\n" not in str(raised.value) and "positions=…" in str(raised.value)
    assert not of.in_force


@pytest.mark.parametrize("settings, says", [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; found 0"),
    ({"max_new_tokens": 30}, "8 tokens and 30 new ones are more than the context of 32"),
    ({"temperature": -1.0}, r"temperature must be 0 \(the likeliest token\) or above; found -1"),
    ({"temperature": float("nan")}, "temperature must be 0"),
])  # fmt: skip
def test_bad_settings(settings, says):
    of = model("llama")
    with pytest.raises(UserError, match=says):
        of.generate(pairs(of, False).clean, **settings)


def test_the_model_is_left_as_it_was():
    of = model("gemma2")
    task = pairs(of, True)
    before = of(task.clean)
    steps = generate.next_logits(of, task.clean)
    next(steps)
    assert torch.equal(of(task.clean), before), "between steps nothing is in force"
    steps.close()
    assert not [hook for point in of.hook_points.values() for hook in point.fwd_hooks if not hook.is_permanent]
