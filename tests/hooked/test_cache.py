"""The cache: what was asked for, as it was, and no more."""

import re

import pytest
import torch

from mechinterp import Apply, Cache, Noise, Site, Steer, UserError, Zero
from tests.families import FAMILIES, model

TOKENS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
PADDED = [[1, 2, 3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    "names_filter, kept",
    [
        ("pattern", ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern", "blocks.2.attn.hook_pattern"]),
        (("pattern", 1), ["blocks.1.attn.hook_pattern"]),
        (("pattern", -1), ["blocks.2.attn.hook_pattern"]),
        (Site("z", 1, head=2), ["blocks.1.attn.hook_z"]),
        (Site("z", -2), ["blocks.1.attn.hook_z"]),
        ("blocks.1.hook_out", ["blocks.1.hook_resid_post"]),
        ("embed", ["hook_embed"]),
        (
            ["embed", ("k", 0), Site("v", 1), "blocks.2.attn.hook_q"],
            ["hook_embed", "blocks.0.attn.hook_k", "blocks.1.attn.hook_v", "blocks.2.attn.hook_q"],
        ),
        (["z", ("z", 0)], ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]),
        (lambda name: name.endswith("hook_rot_k"), [f"blocks.{i}.attn.hook_rot_k" for i in range(3)]),
        ([], []),
    ],
    ids=lambda value: "a function" if callable(value) else str(value),
)
def test_only_what_is_asked_for_is_kept(names_filter, kept):
    _, cache = model("llama").run_with_cache(TOKENS, names_filter)
    assert sorted(cache) == sorted(kept)


def test_none_keeps_every_hook_point():
    of = model("llama")
    _, cache = of.run_with_cache(TOKENS)
    assert sorted(cache) == sorted(site.hook_name for site in of.site_list if not site.kind.virtual)


@pytest.mark.parametrize(
    "names_filter, says",
    [
        ("patern", "did you mean 'pattern'"),
        ("rot_q", "no site rot_q (3 layers); it has: embed"),
        (["z", ("z", 3)], "no site z layer 3"),
        ([("z", -4)], "this model has no site"),
        ("blocks.0.attn.hook_zz", "unknown hook name"),
        ("blocks.7.attn.hook_z", "no site z layer 7"),
        (lambda name: "nothing" in name, "names_filter matched no site"),
    ],
    ids=lambda value: "a function" if callable(value) else str(value),
)
def test_what_matches_nothing_raises(names_filter, says):
    with pytest.raises(UserError, match=re.escape(says)):
        model("gpt2").run_with_cache(TOKENS, names_filter)


def test_keys_of_the_cache():
    _, cache = model("llama").run_with_cache(TOKENS, ["z", "k", "mlp_post"])
    z = cache["z", 1]
    assert torch.equal(cache["blocks.1.attn.hook_z"], z) and torch.equal(cache[Site("z", 1)], z)
    assert torch.equal(cache[Site("z", 1, head=3)], z[:, :, 3])
    assert torch.equal(cache[Site("z", 1, head=(3, 0))], z[:, :, [3, 0]])
    assert torch.equal(cache[Site("mlp_post", 0, neuron=5)], cache["mlp_post", 0][..., 5])
    assert torch.equal(cache[Site("mlp_post", 0, neuron=(5, 1))], cache["mlp_post", 0][..., [5, 1]])
    assert ("z", 1) in cache and ("q", 1) not in cache and "typo" not in cache and 3 not in cache
    assert len(cache) == 9
    for key, says in [
        (("q", 0), "q layer 0 is not in this cache, which holds: k, mlp_post, z"),
        (("z", 9), "z layer 9 is not in this cache"),
        ("z", "needs a layer"),
        (Site("k", 0, head=2), "heads are 0 … 1 at this site"),
    ]:
        with pytest.raises(UserError, match=re.escape(says)):
            cache[key]


def test_later_hooks_cannot_change_what_is_kept():
    """TransformerLens caches views: an in-place edit of a later hook shows in them. Ours are clones."""
    of = model("gpt2")
    sites = [site for site in of.site_list if site.name in ("resid_pre", "resid_mid", "resid_post", "z", "attn_out")]
    untouched = of.run_with_cache(TOKENS, sites)[1]
    wiped = []

    def wipe(x, hook):
        wiped.append(hook.name)
        x.zero_()

    points = {of.hook_points[site.hook_name] for site in sites}
    handles = []

    def after_ours(*_):  # hooks that are added once ours stand run after ours
        handles.extend((point, point.add_hook(wipe)) for point in points)

    starter = of.bridge.register_forward_pre_hook(after_ours)
    try:
        _, cache = of.run_with_cache(TOKENS, sites)
    finally:
        starter.remove()
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)
    assert wiped, "the test wiped nothing"
    assert torch.equal(cache["resid_pre", 0], untouched["resid_pre", 0])
    assert cache["z", 0].abs().max() > 0


def test_two_names_of_one_tensor_are_two_tensors():
    _, cache = model("gpt2").run_with_cache(TOKENS, ["resid_post", "resid_pre"])
    assert torch.equal(cache["resid_post", 0], cache["resid_pre", 1])
    cache["resid_post", 0].zero_()
    assert cache["resid_pre", 1].abs().max() > 0


def test_it_lies_on_the_device_asked_for():
    _, cache = model("gpt2").run_with_cache(TOKENS, ["z"], device="meta")
    assert {cache[name].device.type for name in cache} == {"meta"}


@pytest.mark.parametrize("tokens", [TOKENS, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_what_it_takes(family, tokens):
    of = model(family)
    for wanted in (None, lambda name: True, ["pattern", "z"], ["q_input", "k_input", "mlp_in"]):
        _, cache = of.run_with_cache(tokens, wanted)
        assert of.estimate_cache(tokens, wanted) == cache.nbytes
        by_site = {
            site.name: of.estimate_cache(tokens, [site]) - cache[site].nbytes for site in of.site_list if site in cache
        }
        assert not any(by_site.values()), by_site


def test_a_large_cache_is_refused_before_the_run(monkeypatch):
    of = model("gpt2")
    need = of.estimate_cache(TOKENS, "z")
    of.run_with_cache(TOKENS, "z", max_bytes=need)
    monkeypatch.setattr(type(of.bridge), "forward", None)  # a run would fail
    with pytest.raises(UserError, match=r"ask for fewer sites with names_filter=\[…\]"):
        of.run_with_cache(TOKENS, "z", max_bytes=need - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": need}))
    with pytest.raises(UserError, match="would take"):
        of.run_with_cache(TOKENS, "z")


def test_save_and_load(tmp_path):
    _, cache = model("llama").run_with_cache(PADDED, ["pattern", "z"])
    cache.save(tmp_path / "cache.safetensors")
    again = Cache.load(tmp_path / "cache.safetensors")
    assert sorted(again) == sorted(cache) and again.n_layers == 3
    assert all(torch.equal(again[name], cache[name]) for name in cache)
    assert torch.equal(again["z", -1], cache["z", 2])
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    _, cache = model("llama").run_with_cache(TOKENS, ["z"])
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cannot read a cache from .*cache.safetensors"):
        Cache.load(path)


def test_a_file_that_is_no_cache(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"no cache that `Cache.save` wrote"):
        Cache.load(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="cannot read a cache"):
        Cache.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds_values_after_interventions(family):
    """At every site: zero it, and the cache holds zeros there."""
    of = model(family)
    for site in of.site_list:
        if site.layer not in (None, 1) or "scale" in site.name or (family == "opt" and site.name == "pattern"):
            continue
        _, cache = of.run_with_cache(TOKENS, [site], [Zero(site)])
        assert cache[site].abs().max() == 0, site


def test_inputs_of_heads_show_in_what_is_made_of_them():
    """The queries that are cached are those that the edited input makes, and edits of the queries come after."""
    of = model("llama")
    _, plain = of.run_with_cache(TOKENS, ["q"])
    push = Steer(Site("q_input", 1, head=2), torch.linspace(-2, 2, of.d_model))
    _, moved = of.run_with_cache(TOKENS, ["q"], [push])
    assert (moved["q", 1] - plain["q", 1])[:, :, 2].abs().max() > 0.1
    assert torch.equal(moved["q", 1][:, :, [0, 1, 3]], plain["q", 1][:, :, [0, 1, 3]])
    for both in ([Zero(Site("q", 1, head=2)), push], [push, Zero(Site("q", 1, head=2))]):
        logits, cache = of.run_with_cache(TOKENS, ["q"], both)
        assert cache["q", 1][:, :, 2].abs().max() == 0
        assert torch.equal(logits, of(TOKENS, [Zero(Site("q", 1, head=2))]))


def test_records_of_an_input_and_of_its_norm_go_together():
    of = model("llama")
    logits, cache = of.run_with_cache(TOKENS, ["q_input", "ln1_scale", "mlp_in", "ln2_scale"])
    assert torch.equal(logits, of(TOKENS))
    rms = (cache["q_input", 1][:, :, 0].pow(2).mean(-1) + of.bridge.cfg.eps).sqrt()
    assert torch.allclose(cache["ln1_scale", 1][..., 0], rms, atol=1e-5)


def test_what_is_recorded_is_no_part_of_a_graph():
    of = model("gpt2")
    vector = torch.ones(of.d_model, requires_grad=True)
    logits, cache = of.run_with_cache(TOKENS, ["resid_post"], [Steer(Site("resid_pre", 1), vector)])
    assert logits.requires_grad and not any(cache[name].requires_grad for name in cache)


def test_functions_that_edit_in_place_do_not_reach_the_cache_of_other_sites():
    of = model("gpt2")
    _, plain = of.run_with_cache(TOKENS, ["resid_post"])
    wipe = Apply(Site("resid_pre", 1), lambda x, site: x.zero_())
    _, cache = of.run_with_cache(TOKENS, ["resid_post", "resid_pre"], [wipe, Noise(Site("resid_mid", 1), 0.1)])
    assert torch.equal(cache["resid_post", 0], plain["resid_post", 0])
    assert cache["resid_pre", 1].abs().max() == 0
