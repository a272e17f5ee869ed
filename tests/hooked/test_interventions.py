"""Every kind of intervention against a plain hook of the bridge, everywhere that it can act."""

import re

import pytest
import torch

from mechinterp import Apply, Mean, Noise, Patch, Resample, Site, Steer, UserError, Zero
from mechinterp.hooked import forward
from mechinterp.patching import sweep
from tests.families import FAMILIES, full_logits, model, pairs

EVEN = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [20, 3, 5, 7, 1, 2]]
PADDED = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [20, 3, 5, 7, 1]]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def seen(of, prompts, name):
    """The activation at a hook point, by TransformerLens's own hooks."""
    kept = {}
    full_logits(of, prompts, [(name, lambda x, hook: kept.update(x=x.clone()))])
    return kept["x"]


def by_hand(of, prompts, name, change, where=None, heads=None, head_dim=2):
    """Logits where `change(x)` replaces x at `where` [(prompt, pos), …] (all if None) and `heads`."""

    def hook(x, hook):
        new, out = change(x.clone()), x.clone()
        for i, j in where if where is not None else [(i, j) for i in range(x.shape[0]) for j in range(prompts.n_pos)]:
            for head in heads if heads is not None else [slice(None)]:
                at = (i, j, head) if head_dim == 2 else (i, head, j)
                out[at] = new[at]
        return out

    return full_logits(of, prompts, [(name, hook)])


def left_hooks(of):
    return [h for point in of.hook_points.values() for h in point.fwd_hooks if not h.is_permanent]


# Where


@pytest.mark.parametrize(
    "positions, where",
    [
        (2, [(0, 2), (1, 5), (2, 3)]),
        (-1, [(0, 5), (1, 5), (2, 5)]),
        (-3, [(0, 3), (1, 3), (2, 3)]),
        ([0, -1], [(0, 0), (1, 3), (2, 1), (0, 5), (1, 5), (2, 5)]),
        (torch.tensor([1, 0, -2]), [(0, 1), (1, 3), (2, 4)]),
        (torch.tensor([[0, 1], [0, -1], [3, 3]]), [(0, 0), (0, 1), (1, 3), (1, 5), (2, 4)]),
        ("S", [(0, 4), (2, 2)]),
        (["S", 0], [(0, 4), (2, 2), (0, 0), (1, 3), (2, 1)]),
    ],
    ids=["int", "last", "negative", "list", "per prompt", "several per prompt", "role", "role and int"],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_positions_count_tokens_and_not_padding(family, positions, where):
    """In [[6 tokens], [3], [5]] padded on the left, token 0 stands at 0, 3 and 1."""
    of = model(family)
    prompts = of.to_prompts(PADDED).with_roles({"S": torch.tensor([4, -1, 2])})
    for site, head_dim, heads in [
        (Site("resid_pre", 1), 2, None),
        (Site("z", 1, head=2), 2, [2]),
        (Site("z", 1, head=(0, 3)), 2, [0, 3]),
        (Site("attn_out", 1), 2, None),
        (Site("pattern", 1, head=1), 1, [1]),
        (Site("k", 1, head=1), 2, [1]),
    ]:
        if family == "opt" and site.name == "pattern":
            continue
        want = by_hand(of, prompts, site.hook_name, torch.zeros_like, where, heads, head_dim)
        close(of(prompts, [Zero(site, positions=positions)])[prompts.real], want[prompts.real])
        assert (want - of(prompts))[prompts.real].abs().max() > 1e-2


@pytest.mark.parametrize(
    "positions, says",
    [
        (6, "position 6 is outside prompt 0, of 6 tokens"),
        (4, "position 4 is outside prompt 1, of 3 tokens"),
        (-4, "position -4 is outside prompt 1, of 3 tokens"),
        ("IO", "unknown role 'IO'; roles of these prompts: S"),
        (torch.tensor([0, 1]), "positions are for 2 prompts, the run has 3"),
    ],
)
def test_positions_outside_a_prompt_raise(positions, says):
    prompts = model("gpt2").to_prompts(PADDED).with_roles({"S": torch.tensor([4, -1, 2])})
    with pytest.raises(UserError, match=re.escape(says)):
        model("gpt2")(prompts, [Zero(Site("z", 0), positions=positions)])


@pytest.mark.parametrize("name", ["k", "v", "rot_k"])
def test_key_value_heads_of_a_group(name):
    """Under grouped-query attention k and v have two heads for four queries; head 1 feeds query heads 2 and 3."""
    of = model("llama")
    prompts = of.to_prompts(EVEN)
    site = Site(name, 1, head=1)
    got, cache = of.run_with_cache(prompts, ["z"], [Zero(site)])
    want = by_hand(of, prompts, site.hook_name, torch.zeros_like, heads=[1], head_dim=site.kind.dim("kv_head"))
    close(got, want)
    moved = (cache["z", 1] - of.run_with_cache(prompts, ["z"])[1]["z", 1]).abs().amax((0, 1, 3))
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-3).all()


def test_neurons_and_elements_of_the_last_axis():
    of = model("llama")
    prompts = of.to_prompts(EVEN)
    for site, index in [(Site("mlp_post", 1, neuron=7), [7]), (Site("resid_pre", 2, neuron=(0, 23)), [0, 23])]:

        def wipe(x, index=index):
            x[..., index] = 0
            return x

        close(of(prompts, [Zero(site)]), by_hand(of, prompts, site.hook_name, wipe))
    only = Site("z", 1, head=2, neuron=3)  # one coordinate of one head

    def wipe_one(x):
        x[:, :, 2, 3] = 0
        return x

    close(of(prompts, [Zero(only)]), by_hand(of, prompts, only.hook_name, wipe_one))


# What


def random_like(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_from_prompts_and_from_a_tensor(family):
    of = model(family)
    task = pairs(of, True)
    for name, head in [("resid_post", None), ("z", 1), ("k", 0), ("mlp_out", None), ("q", 3)]:
        site = Site(name, 1, head=head)
        other = seen(of, task.clean, site.hook_name)
        want = by_hand(of, task.corrupted, site.hook_name, lambda x, o=other: o, heads=None if head is None else [head])
        for source in (task.clean, other):
            close(of(task.corrupted, [Patch(site, source)])[task.clean.real], want[task.clean.real])


def test_a_patch_of_everything_is_the_other_run():
    for family in FAMILIES:
        of = model(family)
        task = pairs(of, True)
        for name in ("resid_pre", "resid_mid", "resid_post"):
            if Site(name, 1) in of.site_list:
                got = of(task.corrupted, [Patch(Site(name, 1), task.clean)])
                close(got[task.clean.real], of(task.clean)[task.clean.real], 1e-4)


def test_a_patch_keeps_the_interventions_in_force():
    """The source run of a patch inside a knocked-out model is a run of that model."""
    of = model("llama")
    task = pairs(of, False)
    out = Zero(Site("z", 0, head=1))
    with of.intervene(out):
        _, cache = of.run_with_cache(task.clean, ["resid_post"])
        got = of(task.corrupted, [Patch(Site("resid_post", 1), task.clean)])
        close(got, of(task.corrupted, [Patch(Site("resid_post", 1), cache["resid_post", 1])]))
        close(got, of(task.clean), 1e-4)


@pytest.mark.parametrize(
    "source, says",
    [
        (torch.full((3, 6, 4, 6), torch.nan), "the source of a patch at z layer 1 holds NaN"),
        (torch.zeros(2, 6, 4, 6), "has shape (2, 6, 4, 6); the run has 3 prompts of 6 positions"),
        (torch.zeros(3, 5, 4, 6), "has shape (3, 5, 4, 6)"),
        (torch.zeros(3, 6, 1, 6), "has shape (3, 6, 1, 6)"),  # would broadcast
        (torch.zeros(3, 6, 4, 1), "has shape (3, 6, 4, 1)"),
        (torch.zeros(3, 6, 2, 6), "has shape (3, 6, 2, 6)"),
        (torch.zeros(3, 6, 24), "has shape (3, 6, 24)"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_a_patch_that_does_not_fit(source, says):
    of = model("llama")
    with pytest.raises(UserError, match=re.escape(says)):
        of(EVEN, [Patch(Site("z", 1), source)])
    assert not left_hooks(of) and not of.in_force


def test_padding_is_never_put_in_the_place_of_tokens():
    of = model("llama")
    other_way = of.to_prompts([[7, 8, 9], [1, 2, 3, 4, 5, 6], [1, 2]])
    with pytest.raises(UserError, match="has 3 tokens for prompt 0, which has 6"):
        of(PADDED, [Patch(Site("z", 1), other_way)])
    donors = Resample(Site("z", 1), over=of.to_prompts(PADDED + PADDED)).donors(of.to_prompts(PADDED))
    lengths = [len(row) for row in PADDED + PADDED]
    assert [lengths[i] for i in donors] == [len(row) for row in PADDED]
    with pytest.raises(UserError, match="no other prompt has the length of prompt 0"):
        of(PADDED, [Resample(Site("z", 1), of.to_prompts(PADDED))])


def test_mean_over_all_positions():
    of = model("llama")
    over = of.to_prompts(PADDED)
    site = Site("z", 1, head=2)
    mean = seen(of, over, site.hook_name)[over.real].mean(0)  # padding is no part of it
    want = by_hand(of, of.to_prompts(EVEN), site.hook_name, lambda x: mean.expand_as(x), heads=[2])
    close(of(EVEN, [Mean(site, over)]), want)


def test_mean_by_position():
    of = model("gpt2")
    over = of.to_prompts([[9, 8, 7, 6, 5, 4], [4, 4, 1, 1, 2, 2]])
    mean = seen(of, over, "blocks.1.hook_attn_out").mean(0)
    want = by_hand(of, of.to_prompts(EVEN), "blocks.1.hook_attn_out", lambda x: mean.expand_as(x))
    close(of(EVEN, [Mean(Site("attn_out", 1), over, by="position")]), want)
    pattern = seen(of, over, "blocks.1.attn.hook_pattern").mean(0)  # each query its own row
    got = of(EVEN, [Mean(Site("pattern", 1), over, by="position")])
    close(
        got, by_hand(of, of.to_prompts(EVEN), "blocks.1.attn.hook_pattern", lambda x: pattern.expand_as(x), head_dim=1)
    )


def test_mean_by_role():
    of = model("llama")
    over = of.to_prompts(PADDED).with_roles({"S": torch.tensor([2, 4, -1]), "END": torch.tensor([5, 5, 5])})
    run = of.to_prompts(PADDED[::-1]).with_roles({"S": torch.tensor([3, 5, 4]), "END": torch.tensor([5, 4, 5])})
    values = seen(of, over, "blocks.1.hook_mlp_out")
    s, end = (values[0, 2] + values[1, 4]) / 2, values[:, 5].mean(0)
    taken = {(0, 2), (1, 4), (0, 5), (1, 5), (2, 5)}
    rest = torch.stack([values[i, j] for i, j in over.real.nonzero().tolist() if (i, j) not in taken]).mean(0)

    def change(x):
        new = rest.expand_as(x).clone()
        for i in range(3):
            new[i, [3, 5, 4][i]] = s
            new[i, [5, 4, 5][i]] = end  # a later role wins where two share a position
        return new

    want = by_hand(of, run, "blocks.1.hook_mlp_out", change)
    close(of(run, [Mean(Site("mlp_out", 1), over, by="role")])[run.real], want[run.real])


def test_mean_by_template():
    of = model("llama")
    template = torch.tensor([4, 1, 4])
    over = of.to_prompts(EVEN).with_roles({}, template)
    run = of.to_prompts(EVEN[:2]).with_roles({}, torch.tensor([1, 4]))
    values = seen(of, over, "blocks.1.attn.hook_z")
    mine = torch.stack([values[1], (values[0] + values[2]) / 2])
    close(of(run, [Mean(Site("z", 1), over, by="template")]), by_hand(of, run, "blocks.1.attn.hook_z", lambda x: mine))
    with pytest.raises(UserError, match="template 3 of the run is not in `over`"):
        of(of.to_prompts(EVEN[:2]).with_roles({}, torch.tensor([1, 3])), [Mean(Site("z", 1), over, by="template")])


@pytest.mark.parametrize(
    "by, over, says",
    [
        ("position", PADDED, "needs prompts of one length"),
        ("position", [[1, 2, 3], [4, 5, 6]], "is over 3 positions, the run has 6"),
        ("role", EVEN, "needs prompts with roles; found none"),
        ("template", EVEN, "needs prompts with templates; found none"),
    ],
)
def test_a_mean_that_cannot_be_taken(by, over, says):
    of = model("gpt2")
    with pytest.raises(UserError, match=re.escape(says)):
        of(EVEN, [Mean(Site("z", 1), of.to_prompts(over), by=by)])


def test_resample_takes_another_prompt_and_the_same_one_again():
    of = model("gpt2")
    over = of.to_prompts([[i + j for j in range(6)] for i in range(5)])
    values = seen(of, over, "blocks.1.attn.hook_z")
    for seed in range(3):
        resample = Resample(Site("z", 1), over, seed=seed)
        donors = resample.donors(of.to_prompts(EVEN))
        assert (donors != torch.arange(3)).all()
        got = of(EVEN, [resample])
        close(got, by_hand(of, of.to_prompts(EVEN), "blocks.1.attn.hook_z", lambda x, d=donors: values[d]))
        assert torch.equal(got, of(EVEN, [Resample(Site("z", 1), over, seed=seed)]))
    with pytest.raises(UserError, match="no other prompt has the length of prompt 0"):
        of(EVEN, [Resample(Site("z", 1), of.to_prompts(EVEN[:1]))])
    with pytest.raises(UserError, match="is over 3 positions, the run has 6"):
        of(EVEN, [Resample(Site("z", 1), of.to_prompts([[1, 2, 3], [4, 5, 6]]))])


@pytest.mark.parametrize("shape", [(24,), (1, 1, 24), (6, 24), (3, 1, 24), (3, 6, 24), (3, 6, 1)], ids=str)
def test_steer_by_anything_that_broadcasts(shape):
    of = model("gpt2")
    vector = torch.randn(shape)
    prompts = of.to_prompts(EVEN)
    want = by_hand(of, prompts, "blocks.1.hook_resid_pre", lambda x: x - 1.5 * vector)
    close(of(EVEN, [Steer(Site("resid_pre", 1), vector, strength=-1.5)]), want)


def test_a_vector_that_does_not_fit():
    of = model("gpt2")
    with pytest.raises(
        UserError, match=re.escape("a vector of shape (23,) does not fit resid_pre layer 1: (3, 6, 24)")
    ):
        of(EVEN, [Steer(Site("resid_pre", 1), torch.ones(23))])
    with pytest.raises(UserError, match="is not finite"):
        of(EVEN, [Steer(Site("resid_pre", 1), torch.tensor([torch.inf]))])


def test_a_vector_for_each_prompt_stays_with_its_prompt_in_a_sweep():
    """Rows of a sweep are sorted by their first position; values by prompt and position must follow them."""
    of = model("llama")
    task = pairs(of, True)
    vector = random_like(torch.zeros(len(task), task.clean.n_pos, of.d_model))
    results = []
    for one in (Steer(Site("resid_pre", 2), vector), Apply(Site("resid_pre", 2), lambda x, site: x + vector)):
        with of.intervene(one):
            results.append(sweep(of, task, "z", "roles", progress=False, force=True).data["patched"])
    assert abs(results[0] - results[1]).max() < 1e-4


def test_noise_is_drawn_from_its_seed():
    of = model("gpt2")
    site = Site("resid_pre", 1)
    prompts = of.to_prompts(EVEN)
    draws = [of.run_with_cache(prompts, [site], [Noise(site, 0.5, seed=s)])[1][site] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    noise = draws[0] - of.run_with_cache(prompts, [site])[1][site]
    assert abs(noise.std() - 0.5) < 0.05 and abs(noise.mean()) < 0.08
    assert not torch.allclose(noise[0], noise[1]), "one draw for all prompts"
    close(of(prompts, [Noise(site, 0.5, seed=1)]), by_hand(of, prompts, site.hook_name, lambda x: x + noise), 1e-4)


def test_apply_sees_the_site_and_all_of_the_activation():
    of = model("llama")
    asked = []

    def halve(x, site):
        asked.append((tuple(x.shape), site))
        return x * 0.5

    site = Site("z", -1, head=1)
    got = of(EVEN, [Apply(site, halve, positions=-1)])
    want = by_hand(of, of.to_prompts(EVEN), "blocks.2.attn.hook_z", lambda x: x * 0.5, [(i, 5) for i in range(3)], [1])
    close(got, want)
    assert asked == [((3, 6, 4, 6), site)]


def test_apply_to_another_site():
    """What a transcoder does: read before the MLP, write its output."""
    of = model("llama")
    prompts = of.to_prompts(PADDED)
    for reads, writes in [(Site("resid_mid", 1), Site("mlp_out", 1)), (Site("embed"), Site("resid_post", 2))]:
        value = seen(of, prompts, reads.hook_name) * 0.3
        got = of(prompts, [Apply(reads, lambda x, site: x * 0.3, to=writes, positions=[-1, -2])])
        want = by_hand(of, prompts, writes.hook_name, lambda x, v=value: v, [(i, j) for i in range(3) for j in (4, 5)])
        close(got[prompts.real], want[prompts.real])


@pytest.mark.parametrize(
    "reads, writes",
    [
        (Site("mlp_out", 2), Site("mlp_out", 0)),
        (Site("z", 1), Site("q", 1)),
        (Site("resid_post", 0), Site("embed")),
        (Site("mlp_out", 1), Site("attn_out", 1)),
    ],
    ids=str,
)
def test_nothing_can_be_written_before_it_is_read(reads, writes):
    of = model("gpt2")
    back = Apply(reads, lambda x, site: x * 0.5, to=writes)
    for _ in range(2):  # the second run must not find what the first one left
        with pytest.raises(UserError, match=r"nothing can be written to .*, which it is from, comes later"):
            of(EVEN, [back])


@pytest.mark.parametrize("reads", ["embed", "resid_pre"])
def test_from_early_to_the_final_norm_in_a_sweep(reads):
    """A suffix run that begins after the site that is read would write what an earlier run left."""
    of = model("llama")
    task = pairs(of, False)
    site = Site(reads, None if reads == "embed" else 0)
    far = Apply(site, lambda x, site: 1 + x.abs().mean(-1, keepdim=True), to=Site("ln_final_scale"))
    with of.intervene(far):
        got = sweep(of, task, "z", "last", progress=False, force=True, layers=[2])
        _, cache = of.run_with_cache(task.clean, ["z"])
        logits = of(task.corrupted, [Patch(Site("z", 2, head=1), cache["z", 2], positions=-1)])
    rows = torch.arange(len(task))
    want = logits[rows, -1, task.answers.answer[:, 0, 0]] - logits[rows, -1, task.answers.wrong[:, 0, 0]]
    close(torch.tensor(got.data["patched"].sel(layer=2, head=1).values).float(), want, 1e-4)


# In a basis


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_direction_is_all_that_changes(family):
    of = model(family)
    task = pairs(of, False)
    site = Site("resid_pre", 1)
    direction = random_like(torch.zeros(1, of.d_model)) * 3  # not of unit length
    unit = direction[0] / direction[0].norm()
    clean, corrupted = (of.run_with_cache(side, [site])[1][site] for side in (task.clean, task.corrupted))
    _, cache = of.run_with_cache(task.corrupted, [site], [Patch(Site("resid_pre", 1, basis=direction), task.clean)])
    close(cache[site] @ unit, clean @ unit, 1e-4)
    across = torch.eye(of.d_model) - torch.outer(unit, unit)
    close(cache[site] @ across, corrupted @ across, 1e-4)
    assert (clean - corrupted).abs().max() > 0.1


def test_a_basis_need_not_be_orthonormal_nor_independent():
    of = model("gpt2")
    rows = torch.randn(3, of.d_model, dtype=torch.float64)
    same_span = torch.stack([rows[0] * 5, rows[1] + 2 * rows[0], rows[2] - rows[1], rows.sum(0)])
    want = None
    for basis in (torch.linalg.qr(rows.T).Q.T, rows, same_span):
        _, cache = of.run_with_cache(EVEN, "resid_post", [Zero(Site("resid_post", 1, basis=basis.float()))])
        got = cache["resid_post", 1]
        want = got if want is None else want
        close(got, want, 1e-4)
        assert (got @ rows.float().T).abs().max() < 1e-4
    overcomplete = torch.randn(40, of.d_model)  # more rows than dimensions: all of it
    _, cache = of.run_with_cache(EVEN, "resid_post", [Zero(Site("resid_post", 1, basis=overcomplete))])
    assert cache["resid_post", 1].abs().max() < 1e-3


def test_a_basis_of_a_head_leaves_the_other_heads_alone():
    of = model("llama")
    _, plain = of.run_with_cache(EVEN, "z")
    _, cache = of.run_with_cache(EVEN, "z", [Zero(Site("z", 1, head=2, basis=torch.eye(6)[:2]), positions=-1)])
    changed = (cache["z", 1] != plain["z", 1]).nonzero()
    assert {tuple(row) for row in changed[:, 1:].tolist()} <= {(5, 2, 0), (5, 2, 1)} and len(changed) == 6


# Several


def test_order_at_one_site_and_several_at_once():
    of = model("gpt2")
    site, other = Site("attn_out", 1), Site("mlp_out", 0)
    vector = torch.linspace(-1, 1, of.d_model)
    double = Apply(site, lambda x, s: 2 * x)
    push = Steer(site, vector)
    prompts = of.to_prompts(EVEN)
    close(of(EVEN, [double, push]), by_hand(of, prompts, site.hook_name, lambda x: 2 * x + vector))
    close(of(EVEN, [push, double]), by_hand(of, prompts, site.hook_name, lambda x: 2 * (x + vector)))
    both = full_logits(
        of, prompts, [(site.hook_name, lambda x, hook: 2 * x), (other.hook_name, lambda x, hook: torch.zeros_like(x))]
    )
    close(of(EVEN, [double, Zero(other)]), both)
    with of.intervene(double), of.intervene(push):
        close(of(EVEN), by_hand(of, prompts, site.hook_name, lambda x: 2 * x + vector))
        close(of(EVEN, [Zero(other)]), of(EVEN, [Zero(other)]))
    with of.intervene(push), of.intervene(double):
        close(of(EVEN), by_hand(of, prompts, site.hook_name, lambda x: 2 * (x + vector)))


def test_nesting_gives_back_what_was_in_force():
    of = model("llama")
    plain, a, b = of(EVEN), Zero(Site("z", 1, head=0)), Zero(Site("z", 2, head=1))
    with of.intervene(a):
        only = of(EVEN)
        with of.intervene(b):
            assert not torch.equal(of(EVEN), only)
        assert torch.equal(of(EVEN), only)
    assert torch.equal(of(EVEN), plain) and not of.in_force


def test_the_same_intervention_twice_is_two():
    of = model("llama")
    push = Steer(Site("resid_pre", 1), torch.ones(of.d_model))
    with of.intervene(push):
        once = of(EVEN)
        with of.intervene(push):
            close(of(EVEN), of(EVEN))
            assert not torch.equal(of(EVEN), once)
        assert torch.equal(of(EVEN), once), "leaving the inner context took the outer one with it"
    mean = Mean(Site("z", 1), of.to_prompts(EVEN), noop_ok=True)
    with of.intervene(mean), of.intervene(mean):
        of(EVEN)
    assert not of.in_force


# Hooks are removed, and nothing fails in silence


class OurError(Exception):
    pass


def test_hooks_go_whatever_happens():
    of = model("gpt2")
    plain = of(EVEN)

    def fails(x, site):
        raise OurError

    with pytest.raises(OurError):
        of(EVEN, [Zero(Site("z", 0)), Apply(Site("z", 1), fails)])
    with pytest.raises(OurError), of.intervene(Zero(Site("z", 0))):
        of(EVEN)
        assert of.in_force
        raise OurError
    with pytest.raises(OurError), of.intervene(Apply(Site("z", 1), fails)):
        sweep(of, pairs(of, False), progress=False, force=True)
    with pytest.raises(UserError, match="no site rot_q"), of.intervene(Zero(Site("z", 0)), Zero(Site("rot_q", 0))):
        pass
    assert not left_hooks(of) and not of.in_force
    assert torch.equal(of(EVEN), plain)


def test_a_body_that_raises_is_not_hidden_by_the_verdict():
    of = model("gpt2")
    with pytest.raises(OurError), of.intervene(Zero(Site("z", 0))):  # it never fired, but that is not what went wrong
        raise OurError


def test_what_never_fired_raises():
    of = model("gpt2")
    with pytest.raises(UserError, match="Zero at L1H0 never fired"), of.intervene(Zero(Site("z", 1, head=0))):
        pass
    with pytest.raises(UserError, match="never fired"), of.intervene(Zero(Site("z", 1), noop_ok=True)):
        pass
    with (
        pytest.raises(UserError, match="never fired"),
        of.intervene(Zero(Site("z", 1))),
        of.intervene(Zero(Site("z", 2))),
    ):
        pass
    assert not of.in_force


def test_what_changed_nothing_raises_unless_that_was_declared():
    of = model("gpt2")
    same = Apply(Site("z", 1), lambda x, site: x)
    with pytest.raises(UserError, match=r"Apply at z layer 1 changed no element.*noop_ok=True"):
        of(EVEN, [same])
    with pytest.raises(UserError, match="changed no element"), of.intervene(same):
        of(EVEN)
    with pytest.raises(UserError, match="changed no element"):
        of(EVEN, [Zero(Site("z", 1)), Zero(Site("z", 1))])
    with pytest.raises(UserError, match="changed no element"):
        of(EVEN, [Patch(Site("resid_pre", 0), of.to_prompts(EVEN))])
    with pytest.raises(UserError, match="changed no element"):
        of(EVEN, [Steer(Site("q_input", 1), torch.zeros(of.d_model))])
    plain = of(EVEN)
    assert torch.equal(of(EVEN, [Patch(Site("resid_pre", 0), of.to_prompts(EVEN), noop_ok=True)]), plain)
    assert torch.equal(of(EVEN, [Steer(Site("z", 1), torch.ones(6), strength=0)]), plain)
    assert torch.equal(of(EVEN, [Apply(Site("z", 1), lambda x, site: x, noop_ok=True)]), plain)


def test_a_change_in_place_counts_as_a_change():
    of = model("gpt2")
    close(of(EVEN, [Apply(Site("z", 1), lambda x, site: x.zero_())]), of(EVEN, [Zero(Site("z", 1))]))


def test_one_run_that_changed_something_is_enough():
    of = model("gpt2")
    with of.intervene(Zero(Site("resid_pre", 0, head=None), positions=0)) as inside:
        assert inside is of
        of(EVEN)
        of(EVEN)


# Meaning: what a site is said to feed is all that its consumer reads


CHAINS = (
    (("q", "k", "v"), "z"),
    (("rot_q", "rot_k", "v"), "z"),
    (("attn_scores", "v"), "z"),
    (("pattern", "v"), "z"),
    (("attn_scores",), "pattern"),
    (("q",), "rot_q"),
    (("k",), "rot_k"),
    (("z",), "attn_out"),
    (("q_input",), "q"),
    (("k_input",), "k"),
    (("v_input",), "v"),
    (("resid_pre", "attn_out"), "resid_mid"),
    (("resid_mid",), "mlp_out"),
    (("resid_mid",), "resid_post"),
    (("resid_mid", "mlp_out"), "resid_post"),
    (("mlp_in",), "mlp_out"),
    (("mlp_pre", "mlp_pre_linear"), "mlp_post"),
    (("mlp_post",), "mlp_out"),
    (("resid_pre", "attn_out", "mlp_out"), "resid_post"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_mean_what_they_say(family):
    """Set everything that a site is computed from to another run's values: it takes that run's value, everywhere."""
    of = model(family)
    task = pairs(of, False)
    names = {site.name for site in of.site_list}
    tried = 0
    for causes, effect in CHAINS:
        causes = tuple(c for c in causes if c != "mlp_pre_linear" or c in names)
        if not {*causes, effect} <= names or (family == "opt" and {"pattern", "attn_scores"} & set(causes)):
            continue
        site = Site(effect, 1)
        _, theirs = of.run_with_cache(task.clean, [site])
        _, before = of.run_with_cache(task.corrupted, [site])
        patches = [Patch(Site(cause, 1), task.clean, noop_ok=True) for cause in causes]
        _, after = of.run_with_cache(task.corrupted, [site], patches)
        assert (theirs[site] - before[site]).abs().max() > 1e-2, f"{effect}: the two runs are alike"
        torch.testing.assert_close(after[site], theirs[site], atol=1e-4, rtol=1e-4, msg=f"{causes} -> {effect}")
        tried += 1
    assert tried >= 10


# The inputs of heads and of MLPs


def shift(of):
    return torch.linspace(-2, 2, of.d_model)


@pytest.mark.parametrize("tokens", [EVEN, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_inputs_together_are_the_input_of_the_norm(family, tokens):
    of = model(family)
    prompts = of.to_prompts(tokens)
    sites = ["q_input", "k_input", "v_input"] + ["mlp_in"] * (family == "phi")  # Phi's MLP reads the same norm
    got = of(prompts, [Steer(Site(name, 1), shift(of)) for name in sites])
    want = full_logits(of, prompts, [("blocks.1.ln1.hook_in", lambda x, hook: x + shift(of))])
    close(got[prompts.real], want[prompts.real], 1e-4)
    assert (want - of(prompts))[prompts.real].abs().max() > 0.1


@pytest.mark.parametrize("tokens", [EVEN, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "phi"])
def test_the_input_of_the_mlp_is_the_input_of_its_norm(family, tokens):
    of = model(family)
    prompts = of.to_prompts(tokens)
    got = of(prompts, [Steer(Site("mlp_in", 1), shift(of))])
    want = full_logits(of, prompts, [("blocks.1.ln2.hook_in", lambda x, hook: x + shift(of))])
    close(got[prompts.real], want[prompts.real], 1e-4)


@pytest.mark.parametrize("letter, head", [("q", 1), ("k", 0), ("v", 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_input_of_one_head_is_transformerlens_own(family, letter, head):
    """Its flag for split inputs is right on these families (Llama: grouped queries)."""
    of = model(family)
    prompts = of.to_prompts(EVEN)

    def push(x, hook):
        x = x.clone()
        x[:, :, head] += shift(of)
        return x

    of.bridge.set_use_split_qkv_input(True)
    try:
        want = full_logits(of, prompts, [(f"blocks.1.attn.hook_{letter}_input", push)])
    except (KeyError, ValueError):
        want = full_logits(of, prompts, [(f"blocks.1.hook_{letter}_input", push)])
    finally:
        of.bridge.set_use_split_qkv_input(False)
    close(of(prompts, [Steer(Site(f"{letter}_input", 1, head=head), shift(of))]), want, 1e-4)
    assert (want - of(prompts)).abs().max() > 1e-2


def test_an_input_and_the_residual_it_is_read_from():
    """The residual is edited first: the head reads the edited stream."""
    of = model("llama")
    push, more = shift(of), torch.cos(torch.arange(of.d_model).float())
    for inputs, resid, norm in [
        (("q_input", "k_input", "v_input"), "resid_pre", "ln1"),
        (("mlp_in",), "resid_mid", "ln2"),
    ]:
        edits = [Steer(Site(name, 1), push) for name in inputs]
        for order in ([*edits, Steer(Site(resid, 1), more)], [Steer(Site(resid, 1), more), *edits]):
            got = of(EVEN, order)
            with of.intervene(Steer(Site(resid, 1), more)):
                want = of(EVEN, edits)
            close(got, want)
            hooked = [(f"blocks.1.{norm}.hook_in", lambda x, hook: x + push)]
            skip = "blocks.1.hook_resid_pre" if resid == "resid_pre" else "blocks.1.hook_attn_out"
            close(got, full_logits(of, of.to_prompts(EVEN), [(skip, lambda x, hook: x + more), *hooked]), 1e-4)


def test_an_input_and_the_scale_of_its_norm_cannot_both_be_changed():
    of = model("llama")
    scale = Apply(Site("ln1_scale", 1), lambda x, site: 2 * x)
    push = Steer(Site("q_input", 1), shift(of))
    with pytest.raises(UserError, match="q_input layer 1 and the scale of its norm cannot be changed in one run"):
        of(EVEN, [scale, push])
    with of.intervene(scale), pytest.raises(UserError, match="cannot be changed in one run"):
        sweep(of, pairs(of, False), "q_input", progress=False, force=True)
    assert not left_hooks(of)
    of(EVEN, [Apply(Site("ln1_scale", 2), lambda x, site: 2 * x), push])  # another layer's


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_one_input_reaches_that_head_only(family):
    of = model(family)
    for letter in "qkv":
        site = Site(f"{letter}_input", 1, head=1)
        _, plain = of.run_with_cache(EVEN, [letter])
        _, cache = of.run_with_cache(EVEN, [letter], [Steer(site, shift(of), positions=2)])
        moved = (cache[letter, 1] != plain[letter, 1]).nonzero()[:, 1:3]
        assert {tuple(row) for row in moved.tolist()} == {(2, 1)}, letter


# Autograd


def finite_difference(of, make, at, direction, eps=1e-2):
    with torch.no_grad():
        up, down = (of(EVEN, [make(at + sign * eps * direction)])[:, -1].square().mean() for sign in (1, -1))
    return (up - down) / (2 * eps)


@pytest.mark.parametrize(
    "site",
    [
        Site("resid_pre", 1),
        Site("q_input", 1, head=1),
        Site("k_input", 1),
        Site("v_input", 1, head=0),
        Site("mlp_in", 1),
        Site("attn_out", 0),
        Site("embed"),
        Site("resid_mid", 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0.0, 0.3], ids=["at zero", "elsewhere"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_of_a_steering_vector(family, site, start):
    of = model(family)
    direction = random_like(torch.zeros(of.d_model))
    vector = (start * torch.ones(of.d_model)).requires_grad_()
    # Keys that all move alike leave the softmax as it was: move one.
    make = lambda v: Steer(site, v, positions=2 if site.name == "k_input" else None, noop_ok=True)  # noqa: E731
    of(EVEN, [make(vector)])[:, -1].square().mean().backward()
    expected = finite_difference(of, make, vector.detach(), direction, eps=2e-3)
    assert expected.abs() > 1e-2
    assert (vector.grad @ direction - expected).abs() < 0.03 * expected.abs() + 0.02


def test_the_gradient_of_a_patch():
    of = model("llama")
    site = Site("z", 1, head=2)
    source = of.run_with_cache(EVEN[::-1], ["z"])[1]["z", 1].requires_grad_()
    of(EVEN, [Patch(site, source)])[:, -1].square().mean().backward()
    direction = random_like(source)
    expected = finite_difference(of, lambda v: Patch(site, v), source.detach(), direction, eps=2e-3)
    assert (source.grad.flatten() @ direction.flatten() - expected).abs() < 0.02 * expected.abs() + 1e-2
    assert source.grad[:, :, [0, 1, 3]].abs().max() == 0, "other heads were not patched"


def test_the_gradient_of_an_embedding_flows_through_edited_inputs():
    """Through the heads whose input was edited, too."""
    of = model("llama")
    edit = Apply(Site("q_input", 1, head=0), lambda x, site: 1.1 * x)
    grads = []
    vector = torch.zeros(of.d_model, requires_grad=True)
    of(EVEN, [Steer(Site("embed"), vector, noop_ok=True), edit])[:, -1].square().mean().backward()
    grads.append(vector.grad)
    with of.intervene(edit):
        direction = random_like(vector)
        expected = finite_difference(of, lambda v: Steer(Site("embed"), v), vector.detach(), direction, eps=2e-3)
    assert (grads[0] @ direction - expected).abs() < 0.02 * expected.abs() + 1e-2


def test_parameters_have_no_gradient():
    of = model("llama")
    assert not any(p.requires_grad for p in of.bridge.parameters())
    assert not of(EVEN).requires_grad


def test_half_precision_bases():
    """There is no inverse in half precision; the projector is computed in single."""
    bound = forward.Bound(
        Zero(Site("resid_pre", 0)), Site("resid_pre", 0), Site("resid_pre", 0, basis=torch.eye(4)[:1].bfloat16()), None
    )
    prompts = model("gpt2").to_prompts([[1, 2]])
    activation = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    new = bound.edit(activation, forward.Rows.all(prompts))
    assert new.dtype == torch.bfloat16 and new.tolist() == [[[0, 1, 1, 1]] * 2]
