"""The harvest against the model's own cache: values, positions, how far it runs, what it does without memory."""

from functools import partial

import pytest
import torch

from mechinterp import Site, Zero, load
from mechinterp.errors import UserError
from mechinterp.models.planted import LETTERS, word_tokenizer
from mechinterp.sae.activations import harvest as harvest_module
from mechinterp.sae.activations.chunks import Chunks
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.activations.harvest import Counts, Harvest
from mechinterp.sae.activations.tokens import TokenBlocks
from tests.families import FAMILIES, model, module

TEXTS = [" ".join(LETTERS[(7 * i + j * j) % 40] for j in range(9 + i % 5)) for i in range(30)]


class Fixed:
    """Random tokens, finite: a source for models without tokenizer."""

    def __init__(self, d_vocab, n=7, length=6):
        self.blocks = torch.randint(0, d_vocab, (n, length), generator=torch.Generator().manual_seed(5))
        self.at = 0

    def take(self, n):
        self.at += n
        return self.blocks[self.at - n : self.at]

    def fresh(self, shard=None):
        made = Fixed.__new__(Fixed)
        made.blocks, made.at = self.blocks, 0
        return made

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    module("llama").save_pretrained(path)
    tokenizer = word_tokenizer((*LETTERS, "</s>"))
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(path)
    return load(path, device="cpu")


def stream(of, **settings):
    return TokenBlocks(of, TEXTS, 8, **settings)


def cached(of, sites, tokens, kept):
    """Rows of the kept positions, by the model's own cache."""
    _, cache = of.run_with_cache(tokens, [site.whole for site in sites])
    return {site.hook_name: cache[site].flatten(0, 1).flatten(1)[kept.flatten()] for site in sites}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_caches_at_every_site(family):
    of = model(family)
    sites = [site for site in of.site_list if site.kind.axes[:2] == ("batch", "pos") and site.layer in (None, 1)]
    rule = Exclusion(tokens=(3, 5, 7, 11, 20, 30))
    source = Fixed(of.d_vocab)
    kept = rule.mask(source.blocks, torch.ones_like(source.blocks, dtype=torch.bool))
    want = cached(of, sites, source.blocks[:4], kept[:4])
    alone = {}
    for site in sites:  # each site by itself stops the run somewhere else
        alone |= Harvest(of, [site], source.fresh(), rule, 4).chunk()
    harvest = Harvest(of, sites, source, rule, 4)
    together = harvest.chunk()
    assert list(together) == [site.hook_name for site in sites] and 0 < kept[:4].sum() < kept[:4].numel()
    for name, rows in want.items():
        assert together[name].shape == (int(kept[:4].sum()), harvest.widths[name])
        assert torch.equal(together[name], rows), name
        assert torch.equal(alone[name], rows), name
    assert {"blocks.1.hook_mlp_in", "blocks.1.mlp.hook_in", "blocks.1.hook_q_input"} <= set(want)


def hooks_on(of):
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in of.hook_points.values())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("name", ["resid_pre", "mlp_in", "z", "resid_post"])
def test_what_comes_after_the_last_site_is_not_run(family, name):
    of = model(family)
    before, n_hooks = of(torch.tensor([[1, 2, 3]])), hooks_on(of)  # TransformerLens has hooks of its own on OPT
    harvest = Harvest(of, [Site("resid_pre", 0), Site(name, 1)], Fixed(of.d_vocab), Exclusion(), 4)
    entered, finished = [], []
    handles = [
        b.register_forward_pre_hook(partial(lambda i, *_: entered.append(i), i)) for i, b in enumerate(of.bridge.blocks)
    ]
    handles += [
        b.register_forward_hook(partial(lambda i, *_: finished.append(i), i)) for i, b in enumerate(of.bridge.blocks)
    ]
    handles.append(of.bridge.ln_final.register_forward_pre_hook(lambda *_: entered.append("norm")))
    try:
        harvest.chunk()
    finally:
        for handle in handles:
            handle.remove()
    assert entered == [0, 1] and finished == [0]
    assert hooks_on(of) == n_hooks
    assert torch.equal(of(torch.tensor([[1, 2, 3]])), before)  # the model is as it was


def test_interventions_in_force_are_honoured(of):
    sites = [Site("resid_mid", 1), Site("mlp_in", 1), Site("resid_post", 1)]
    plain = Harvest(of, sites, stream(of), Exclusion(), 3).chunk()
    for edited in (Site("z", 1, head=0), Site("mlp_in", 1), Site("resid_mid", 1)):
        with of.intervene(Zero(edited)):
            got = Harvest(of, sites, stream(of), Exclusion(), 3).chunk()
            tokens = stream(of).take(3)
            want = cached(of, sites, tokens, Exclusion().mask(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert any(not torch.equal(got[name], plain[name]) for name in want)
    with pytest.raises(UserError, match="never fired"), of.intervene(Zero(Site("z", 2))):
        Harvest(of, sites, stream(of), Exclusion(), 3).chunk()


def test_rows_can_train_other_modules(of):
    with torch.inference_mode():
        rows = Harvest(of, [Site("resid_post", 1)], stream(of), Exclusion(), 3).chunk()["blocks.1.hook_resid_post"]
    layer = torch.nn.Linear(of.d_model, 2)
    layer(rows).square().sum().backward()
    assert layer.weight.grad is not None and not rows.is_inference() and not rows.requires_grad
    assert rows.is_contiguous()
    half = Harvest(of, [Site("resid_post", 1)], stream(of), Exclusion(), 3, torch.bfloat16).chunk()
    assert torch.equal(half["blocks.1.hook_resid_post"], rows.bfloat16())


def test_counts_and_outliers(of):
    """The rule of harvest.py, step 3, worked out by hand over three chunks."""
    site = Site("resid_post", 0)
    rule, tokens = Exclusion(tokens=(52,)), stream(of).take(9)
    kept = rule.mask(tokens, torch.ones_like(tokens, dtype=torch.bool))
    rows = [cached(of, [site], tokens[i : i + 3], kept[i : i + 3])[site.hook_name] for i in (0, 3, 6)]
    median, want, inside = torch.tensor(0.0), 0, []
    for n, part in enumerate(rows, 1):
        norms = part.norm(dim=-1)
        median = median + (norms.median() - median) / n
        want += int((norms > 1.2 * median).sum())
        inside.append(part[norms <= 1.2 * median])
    assert want > 3
    dropping = Harvest(of, [site], stream(of), Exclusion(tokens=(52,), outlier=1.2), 3)
    for part in inside:
        assert torch.equal(dropping.chunk()[site.hook_name], part)
    excluded = int((~kept).sum())
    assert dropping.counts == Counts(tokens.numel(), excluded, want) and excluded > 9  # more than first positions
    assert dropping.median_norm == pytest.approx(float(median))


def test_outliers_are_counted_where_none_are_dropped(of, monkeypatch):
    monkeypatch.setattr(harvest_module, "COUNTED_OUTLIER", 1.2)
    counting = Harvest(of, [Site("resid_post", 0)], stream(of), Exclusion(), 3)
    rows = counting.chunk()["blocks.0.hook_resid_post"]
    assert (
        len(rows) == 3 * 7
        and counting.counts.outliers == int((rows.norm(dim=-1) > 1.2 * counting.median_norm).sum()) > 0
    )


def memory_for(of, n, monkeypatch, error):
    """The model runs out of memory with more than n blocks."""
    real, tried = harvest_module.call_bridge, []

    def limited(each, prompts):
        tried.append(len(prompts))
        if len(prompts) > n:
            raise error
        return real(each, prompts)

    monkeypatch.setattr(harvest_module, "call_bridge", limited)
    return tried


ERRORS = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "linux": RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_without_memory_the_batch_is_halved_and_no_block_is_lost(kind, of, monkeypatch, capsys):
    sites = [Site("resid_post", 1)]
    want = Harvest(of, sites, stream(of), Exclusion(), 1)
    want = torch.cat([want.chunk()["blocks.1.hook_resid_post"] for _ in range(21)])
    tried = memory_for(of, 2, monkeypatch, ERRORS[kind])
    harvest = Harvest(of, sites, stream(of), Exclusion(), 7)
    got = [harvest.chunk() for _ in range(3)]
    assert tried == [7, 3, 1, 1, 1] and harvest.batch_blocks == 1
    assert capsys.readouterr().out.splitlines() == [
        "out of memory with 7 blocks at a time; going on with 3",
        "out of memory with 3 blocks at a time; going on with 1",
    ]
    other = Harvest(of, sites, stream(of), Exclusion(), 7)  # resumed in the midst of the blocks that failed
    other.load_state_dict(harvest.state_dict())
    got += [other.chunk() for _ in range(18)]
    torch.testing.assert_close(torch.cat([one["blocks.1.hook_resid_post"] for one in got]), want)
    assert other.counts.tokens == 21 * 8


def test_other_errors_and_a_block_that_is_too_large_are_raised(of, monkeypatch):
    memory_for(of, 0, monkeypatch, ERRORS["cuda"])
    with pytest.raises(UserError, match="out of memory with one block of 8 tokens at a time: CUDA out of memory"):
        Harvest(of, [Site("resid_post", 1)], stream(of), Exclusion(), 4).chunk()
    memory_for(of, 0, monkeypatch, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Harvest(of, [Site("resid_post", 1)], stream(of), Exclusion(), 4).chunk()


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_resumed_harvest_is_bit_identical(cut, of):
    sites = [Site("z", 0), Site("resid_post", 1)]
    make = lambda: Harvest(of, sites, stream(of, seed=4), Exclusion(outlier=1.3), 5)  # noqa: E731
    whole = make()
    want = [whole.chunk() for _ in range(8)]
    first = make()
    for _ in range(cut):
        first.chunk()
    state = first.state_dict()
    first.chunk()
    assert all(isinstance(one, torch.Tensor | str | int | list | dict | None) for one in state.values())
    second = make()
    second.load_state_dict(state)
    for chunk in want[cut:]:
        got = second.chunk()
        assert all(torch.equal(got[name], rows) for name, rows in chunk.items())
    assert second.counts == whole.counts and second.median_norm == whole.median_norm
    assert isinstance(second, Chunks)
    with pytest.raises(
        UserError, match=r"has sites \['blocks.0.attn.hook_z', 'blocks.1.hook_resid_post'\]; this one has"
    ):
        Harvest(of, sites[:1], stream(of, seed=4), Exclusion(outlier=1.3), 5).load_state_dict(state)
    with pytest.raises(UserError, match="has exclusion"):
        Harvest(of, sites, stream(of, seed=4), Exclusion(), 5).load_state_dict(state)


def test_a_finite_source_ends(of):
    chunks = list(Harvest(of, [Site("resid_pre", 1)], Fixed(of.d_vocab, n=7, length=6), Exclusion(), 3))
    assert [len(chunk["blocks.1.hook_resid_pre"]) for chunk in chunks] == [15, 15, 5]


def test_bad_harvests(of):
    make = lambda *sites, **more: Harvest(of, sites, stream(of), Exclusion(), **more)  # noqa: E731
    for wrong, says in [
        (lambda: make(), "at least one site, each once; found: none"),
        (lambda: make(Site("z", 1), Site("z", -2)), "each once; found: blocks.1.attn.hook_z, blocks.1.attn.hook_z"),
        (lambda: make(Site("z", 1, head=0)), "only whole sites can be harvested; asked for L1H0, valid: z layer 1"),
        (lambda: make(Site("pattern", 1)), "pattern layer 1 has axes batch head query key: no vector at each position"),
        (lambda: make(Site("resid_pre", 3)), "this model has layers 0 … 2"),
        (lambda: make(Site("resid_pre", 1), batch_blocks=0), "batch_blocks must be at least 1; found 0"),
    ]:
        with pytest.raises(UserError, match=says):
            wrong()
    nothing = Harvest(of, [Site("resid_pre", 1)], stream(of), Exclusion(tokens=tuple(range(60))), 4)
    assert nothing.chunk()["blocks.1.hook_resid_pre"].shape == (0, of.d_model)
