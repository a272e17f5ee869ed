"""A sweep equals brute-force hooks: every family, every site, both directions, padded and not.

The mutation tests break one part of the machinery each and require that the same comparison fails.
"""

from dataclasses import replace

import pytest
import torch

from mechinterp.hooked import forward, interventions, suffix
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Levers
from mechinterp.metrics import KL, LogitDiff, Prob
from mechinterp.patching import sweep
from mechinterp.patching.cells import CellRunner, spots
from tests.families import FAMILIES, full_logits, model, pairs

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "mlp_post")
MORE = (
    "attn_scores", "rot_q", "rot_k", "mlp_pre", "mlp_pre_linear",
    "ln1_scale", "ln1_post_scale", "ln2_scale", "ln2_post_scale",
)  # fmt: skip


def brute_force(of, task, site_name, positions, direction, metric):
    """Every cell by TransformerLens's own hooks on the whole prompts, full logits. Effects `[cell]`, in cell order."""
    base, source = (task.corrupted, task.clean) if direction == "denoise" else (task.clean, task.corrupted)
    clean = metric.read(task).gather(full_logits(of, task.clean, []))

    def measure(prompts, hooks):
        logits = metric.read(task).gather(full_logits(of, prompts, hooks))
        return metric(logits, task.answers, clean).mean()

    sites = [site for site in of.site_list if site.name == site_name]

    def keep(prompts):
        kept = {}
        full_logits(of, prompts, [(s.hook_name, lambda x, hook: kept.__setitem__(hook.name, x.clone())) for s in sites])
        return kept

    kept, was = keep(source), keep(base)
    start, end = measure(base, []), measure(source, [])
    effects = []
    for site in sites:
        site_hook = of.hook_points[site.hook_name].name
        other = kept[site_hook]
        heads = of.axis_size(site)
        for head in range(heads) if heads else [None]:
            for spot in spots(task, positions)[1]:

                def put(x, hook, other=other, mine=was[site_hook], head=head, spot=spot, kind=site.kind):
                    x = x.clone()
                    if kind.hook.endswith("resid_mid"):  # TransformerLens's own is only what the second norm reads
                        return x + (other - mine) * spot.mask[..., None]
                    for prompt, pos in spot.mask.nonzero().tolist():
                        if head is None:
                            x[prompt, pos] = other[prompt, pos]
                        elif kind.dim(kind.head_axis) == 1:
                            x[prompt, head, pos] = other[prompt, head, pos]
                        else:
                            x[prompt, pos, head] = other[prompt, pos, head]
                    return x

                at = f"blocks.{site.layer}.hook_attn_out" if site_name == "resid_mid" else site.hook_name
                effects.append((measure(base, [(at, put)]) - start) / (end - start))
    return torch.stack(effects).double()


def compare(of, site, direction, padded, positions="roles", metric=None):
    """Raise AssertionError unless the sweep equals brute force to 1e-4 and to 1e-3 of the largest effect."""
    metric = metric or LogitDiff()
    task = pairs(of, padded)
    result = sweep(of, task, site, positions, direction, metric, force=True, progress=False)
    change = (result.data["patched"] - result.data["base"]).mean("prompt") / (
        result.data["source"] - result.data["base"]
    ).mean()
    got = torch.tensor(change.values.flatten())
    want = brute_force(of, task, site, positions, direction, metric)
    assert want.abs().max() > 1e-3, "a comparison of nothing with nothing"
    gap = (got - want).abs().max()
    assert gap <= 1e-4 * max(1.0, float(want.abs().max())), f"{site}: off by {gap}"
    assert gap <= 1e-3 * want.abs().max(), f"{site}: off by {gap} of {want.abs().max()}"


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sweep_is_brute_force(family, direction, padded):
    of = model(family)
    present = {site.name for site in of.site_list}
    for site in SITES:
        if site in present and not (family == "opt" and site == "pattern"):
            compare(of, site, direction, padded)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_positions_sites_and_metrics(family):
    of = model(family)
    compare(of, "resid_pre", "denoise", False, positions="each")
    compare(of, "z", "denoise", True, positions="all")
    compare(of, "k", "noise", True, positions=[0, 2, -1] if family != "gemma2" else [2, -1])
    compare(of, "mlp_out", "denoise", True, positions="END,B", metric=Prob())
    compare(of, "v", "noise", False, metric=KL())


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_heads_are_swept(family):
    """Their cells equal single runs with a Patch, and are not all zero (an edit of a point that never fires is)."""
    of = model(family)
    task = pairs(of, True)
    rows = torch.arange(len(task))
    for name in ("q_input", "k_input", "v_input", "mlp_in"):
        result = sweep(of, task, name, "roles", layers=[1], force=True, progress=False)
        for head in list(range(of.axis_size(Site(name, 1)))) or [None]:
            for role in task.roles:
                logits = of(
                    task.corrupted,
                    [interventions.Patch(Site(name, 1, head=head), task.clean, positions=role, noop_ok=True)],
                )
                gap = logits[rows, -1, task.answers.answer[:, 0, 0]] - logits[rows, -1, task.answers.wrong[:, 0, 0]]
                at = {"layer": 1, "role": role} | ({} if head is None else {result.dims[1]: head})
                assert torch.allclose(torch.tensor(result.data["patched"].sel(at).values).float(), gap, atol=1e-4)
        assert abs(result.data["patched"] - result.data["base"]).max() > 1e-2


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")  # of the reference's own hooks
@pytest.mark.parametrize("family", FAMILIES)
def test_rarer_sites(family):
    of = model(family)
    present = {site.name for site in of.site_list}
    for site in MORE:
        # OPT flattens prompts and positions before its second norm, which the plain reference does not undo.
        if site in present and (family, site) != ("opt", "ln2_scale"):
            compare(of, site, "denoise", True)
            compare(of, site, "noise", False)


# Mutations: each of these must make the comparison, or the check of the levers, fail.


@pytest.fixture
def trusting(monkeypatch):
    """A model that believes in its levers, so that a broken one is used."""

    def trust(family):
        monkeypatch.setitem(model(family).__dict__, "levers", Levers(True, True, True))
        return model(family)

    return trust


def test_mutation_prefix_off_by_one(trusting, monkeypatch):
    short = suffix.Recording._prefix

    def off_by_one(self, layer, rows):
        whole = short(self, layer, rows)
        late = [0, *range(rows.start - 1)]  # the last position of the prefix is lost
        return suffix._Prefix(whole.keys[:, :, late], whole.values[:, :, late])

    monkeypatch.setattr(suffix.Recording, "_prefix", off_by_one)
    assert not suffix.probe(model("llama")).prefix
    with pytest.raises(AssertionError):
        compare(trusting("llama"), "z", "denoise", False)


def test_mutation_start_off_by_one(trusting, monkeypatch):
    narrow = suffix._narrow
    monkeypatch.setattr(
        suffix,
        "_narrow",
        lambda value, name, rows, n: narrow(
            value.roll(1, 1) if name == "position_embeddings" and rows.start else value, name, rows, n
        ),
    )
    with pytest.raises(AssertionError):
        compare(trusting("qwen3"), "z", "denoise", False)


def test_mutation_missing_soft_cap(trusting, monkeypatch):
    monkeypatch.setattr(suffix, "_soft_cap", lambda of, logits: logits)
    with pytest.raises(AssertionError):
        compare(trusting("gemma2"), "z", "denoise", False)


def test_mutation_wrong_kv_group(monkeypatch):
    touched, edit = CellRunner._touched, CellRunner._edit

    def regroup(cell):
        return type(cell)(cell.layer, cell.head // 2, cell.spot)

    monkeypatch.setattr(CellRunner, "_touched", lambda self, c, cell, i: touched(self, c, regroup(cell), i))
    monkeypatch.setattr(CellRunner, "_edit", lambda self, s, k, cells, r: edit(self, s, k, [*map(regroup, cells)], r))
    with pytest.raises(AssertionError):
        compare(model("llama"), "k", "denoise", False)


def test_mutation_dropped_mask(monkeypatch):
    call = forward.call_bridge
    for place in (forward, suffix):
        monkeypatch.setattr(
            place,
            "call_bridge",
            lambda of, prompts, cache=None: call(of, type(prompts)(prompts.tokens, roles=prompts.roles), cache),
        )
    with pytest.raises(AssertionError):
        compare(model("llama"), "resid_pre", "denoise", True)


def test_mutation_dropped_mask_in_the_suffix(trusting, monkeypatch):
    narrow = suffix._narrow
    monkeypatch.setattr(
        suffix,
        "_narrow",
        lambda value, name, rows, n: None if name == "attention_mask" else narrow(value, name, rows, n),
    )
    with pytest.raises(AssertionError):
        compare(trusting("llama"), "z", "denoise", True)


# In force


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_a_sweep_in_a_knocked_out_model_is_the_sweep_of_that_model(family):
    of = model(family)
    task = pairs(of, True)
    out = interventions.Zero(Site("z", 1, head=2), positions=[-1, -2])
    want = []
    for side in (task.clean, task.corrupted):
        want.append(of(side, [out])[:, -1])
    with of.intervene(out):
        result = sweep(of, task, "z", "roles", progress=False, force=True)
    answers, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]
    for side, name in zip(want, ("source", "base"), strict=True):
        rows = torch.arange(len(task))
        expected = side[rows, answers] - side[rows, wrong]
        assert torch.allclose(torch.tensor(result.data[name].values).float(), expected, atol=1e-4)
    cells = result.data["patched"].sel(layer=1, head=2, role="END").values
    assert (cells == result.data["base"].values).all(), "a head that is knocked out cannot be patched"
    assert result.about["in_force"] == ["Zero at L1H2"]


@pytest.mark.parametrize("kind", ["function", "crossing", "virtual", "mean", "noise"])
def test_interventions_in_force_agree_with_one_cell_at_a_time(kind):
    of = model("llama")
    task = pairs(of, True)
    made = {
        "function": interventions.Apply(Site("mlp_out", 1), lambda x, site: x * 0.5 + x.mean(0, keepdim=True)),
        "crossing": interventions.Apply(Site("resid_mid", 0), lambda x, site: x * 0.7, to=Site("mlp_out", 2)),
        "virtual": interventions.Noise(Site("q_input", 1, head=1), 0.3),
        "mean": interventions.Mean(Site("z", 2, head=0), over=task.clean, by="role"),
        "noise": interventions.Noise(Site("resid_pre", 2), 0.5, positions=-1),
    }[kind]
    with of.intervene(made):
        fast = sweep(of, task, "z", "roles", progress=False, force=True)
        slow_model_levers, of.__dict__["levers"] = of.levers, Levers(False, False, False)
        try:
            slow = sweep(of, task, "z", "roles", progress=False, force=True)
        finally:
            of.__dict__["levers"] = slow_model_levers
    gap = abs(fast.data["patched"] - slow.data["patched"]).max()
    assert float(gap) < 1e-4 * float(abs(slow.data["patched"]).max())


@pytest.mark.parametrize("kind", ["in force", "metric"])
def test_a_function_sees_every_prompt_where_only_some_are_patched(kind):
    """One prompt lacks the role, so that its cell is the base run: what a function of the whole batch gives must not
    depend on whether that prompt was left out."""
    of = model("llama")
    task = pairs(of, False)
    roles = {**task.clean.roles, "A": task.clean.roles["A"].where(torch.arange(4) != 1, -1)}
    task = replace(task, clean=task.clean.with_roles(roles), corrupted=task.corrupted.with_roles(roles))
    answers, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]

    def gap(logits):
        return logits[torch.arange(len(logits)), -1, answers] - logits[torch.arange(len(logits)), -1, wrong]

    mixed = interventions.Apply(Site("mlp_out", 1), lambda x, site: 0.5 * x + x.mean(0, keepdim=True))
    with of.intervene(*([mixed] if kind == "in force" else [])):
        result = sweep(of, task, "z", "A", metric=gap if kind == "metric" else None, force=True, progress=False)
        for layer, head in [(0, 1), (1, 3), (2, 0)]:
            patch = interventions.Patch(Site("z", layer, head=head), task.clean, positions="A", noop_ok=True)
            want = gap(of(task.corrupted, [patch]))
            got = torch.tensor(result.data["patched"].sel(layer=layer, head=head, role="A").values).float()
            assert torch.allclose(got, want, atol=1e-4)


def test_identical_sources_are_exactly_zero_and_not_run():
    of = model("llama")
    task = pairs(of, False)
    result = sweep(of, task, "resid_pre", [0, 1], progress=False, force=True)
    assert (result.data["patched"] == result.data["base"]).all()
    assert result.about["rows_run"] == 0
