"""Which mean a position takes, what is refused, and that it is worked out once a run."""

import re

import pytest
import torch

from mechinterp import Mean, Resample, Site, UserError
from mechinterp.hooked import means
from tests.families import full_logits, model, pairs

PADDED = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [20, 3, 5, 7, 1], [2, 4, 6, 8, 10], [9, 8, 7]]
EVEN = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [20, 3, 5, 7, 1, 2]]
SITE = Site("mlp_out", 1)


def with_roles(of, ids, template=None, **roles):
    at = {name: torch.tensor(where) for name, where in roles.items()}
    return of.to_prompts(ids).with_roles(at, None if template is None else torch.tensor(template))


def value(of, prompts, mean):
    """What the site becomes."""
    return of.run_with_cache(prompts, [SITE], [mean])[1][SITE]


def seen(of, prompts):
    kept = {}
    full_logits(of, prompts, [(SITE.hook_name, lambda x, hook: kept.update(x=x.clone()))])
    return kept["x"]


def test_a_template_of_padded_prompts_counts_tokens_only():
    of = model("llama")
    over = with_roles(of, PADDED, [0, 1, 2, 2, 1])
    acts = seen(of, over)
    got = value(of, over, Mean(SITE, over, "template"))
    for members in ([0], [1, 4], [2, 3]):
        mean = acts[members].mean(0)
        for i in members:
            torch.testing.assert_close(got[i][over.real[i]], mean[over.real[i]])


@pytest.mark.parametrize(
    "by, over, run, says",
    [
        (
            "role",
            {"S": [2, 4, 2, 2, 4]},
            {"S": [2, 4, 2, 2, 4], "END": [5] * 5},
            "no prompt of `over` has 'END', which prompt 0 of the run has at token 5; roles with a mean: S",
        ),
        (
            "role",
            {"S": [2, 4, 2, 2, 4], "END": [-1] * 5},
            {"S": [2, 4, 2, 2, 4], "END": [-1, 5, 5, 5, 5]},
            "no prompt of `over` has 'END', which prompt 1 of the run has at token 2; roles with a mean: S",
        ),
    ],
)
def test_a_role_without_a_mean_is_an_error_where_it_is_set(by, over, run, says):
    of = model("gpt2")
    over, run = with_roles(of, PADDED, **over), with_roles(of, PADDED, **run)
    for positions in (None, "END", ["S", "END"]):
        with pytest.raises(UserError, match=re.escape(says)):
            of(run, [Mean(SITE, over, by, positions=positions)])
    of(run, [Mean(SITE, over, by, positions="S")])


def test_no_other_token_has_a_mean_where_every_token_has_a_role():
    of = model("gpt2")
    over = with_roles(of, [[1, 2], [3, 4]], A=[0, 0], B=[1, 1])
    run = with_roles(of, [[1, 2, 3], [3, 4, 5]], A=[0, 0], B=[2, 2])
    with pytest.raises(UserError, match="has a token without a role, which prompt 0 of the run has at token 1"):
        of(run, [Mean(SITE, over, "role")])
    got = value(of, run, Mean(SITE, over, "role", positions=["A", "B"]))
    torch.testing.assert_close(got[0, [0, 2]], seen(of, over).mean(0))


@pytest.mark.parametrize(
    "over, run, says",
    [
        ({"S": [2, 2, 3]}, {"S": [2, 2, 2]}, "roles at the same positions; S is at 2 and at 3. Valid: by='role'"),
        ({"S": [2, 2, 2]}, {"S": [2, 3, 2]}, "roles at the same positions; S is at 2 and at 3. Valid: by='role'"),
        ({"S": [2, 2, 2]}, {"T": [3, 4, 5]}, None),
        ({"S": [2, -1, 2]}, {"S": [-1, 2, 2]}, None),
    ],
)
def test_by_position_needs_roles_at_the_same_positions(over, run, says):
    of = model("gpt2")
    over, run = with_roles(of, EVEN, **over), with_roles(of, EVEN, **run)
    if says is None:
        of(run, [Mean(SITE, over, "position")])
        return
    with pytest.raises(UserError, match=re.escape(says)):
        of(run, [Mean(SITE, over, "position")])


@pytest.mark.parametrize(
    "by, over, run, says",
    [
        ("position", EVEN, [[1, 2, 3, 4, 5, 6], [1, 2]], "is over 6 positions, the run has prompts of several lengths"),
        ("template", PADDED, PADDED[1:], "needs a run over the same templates and positions"),
    ],
)
def test_runs_of_other_positions(by, over, run, says):
    of = model("gpt2")
    template = list(range(len(over)))
    with pytest.raises(UserError, match=says):
        of(with_roles(of, run, template[: len(run)]), [Mean(SITE, with_roles(of, over, template), by)])


def test_templates_of_several_lengths():
    of = model("gpt2")
    with pytest.raises(UserError, match="one length in a template; template 0 has several"):
        of(PADDED, [Mean(SITE, with_roles(of, PADDED, [0] * 5), "template")])
    over, run = with_roles(of, PADDED[:3], [0, 1, 2]), with_roles(of, PADDED[:3], [0, 2, 1])
    with pytest.raises(UserError, match="template 1 has 3 tokens in `over` and another number in the run"):
        of(run, [Mean(SITE, over, "template")])


def test_what_each_position_takes_is_worked_out_once_a_run(monkeypatch):
    """A sweep runs rows of one recording many times."""
    from mechinterp.patching import sweep

    of = model("llama")
    task = pairs(of, True)
    of.levers  # noqa: B018 (tried once)
    asked = []
    groups = means.groups
    monkeypatch.setattr(means, "groups", lambda over, prompts, by: asked.append(prompts) or groups(over, prompts, by))
    with of.intervene(Mean(Site("z", 2, head=0), task.clean, "role")):
        asked.clear()
        sweep(of, task, "z", "roles", progress=False, force=True)
    assert len(asked) <= 6, "once for each set of prompts that is run, not for each call"


def test_donors_with_the_roles_at_the_same_positions_or_of_the_same_template():
    of = model("gpt2")
    ids = [[i + j for j in range(6)] for i in range(8)]
    run = with_roles(of, ids, [0, 0, 1, 1, 2, 2, 0, 1], S=[2, 3, 2, 3, 2, 3, 2, 3], END=[5] * 8)
    for seed in range(5):
        donors = Resample(SITE, run, by="role", seed=seed).donors(run)
        assert (donors % 2 == torch.arange(8) % 2).all() and (donors != torch.arange(8)).all()
        donors = Resample(SITE, run, by="template", seed=seed).donors(run)
        assert (run.template[donors] == run.template).all() and (donors != torch.arange(8)).all()
    last = torch.cat([Resample(SITE, run, by="role", seed=s, positions="END").donors(run) for s in range(9)])
    assert (last % 2 != torch.arange(8).repeat(9) % 2).any(), "only the roles that are set must lie alike"


@pytest.mark.parametrize(
    "by, says",
    [
        ("role", "no other prompt has the length of prompt 1 and its roles at the same positions"),
        ("template", "no other prompt has the length of prompt 2 and its template"),
    ],
)
def test_prompts_without_a_donor(by, says):
    of = model("gpt2")
    run = with_roles(of, EVEN, [0, 0, 1], S=[2, 3, 2])
    with pytest.raises(UserError, match=says):
        of(run, [Resample(SITE, run, by=by)])
    bare = of.to_prompts(EVEN)
    with pytest.raises(UserError, match=f"Resample\\(by='{by}'\\) needs prompts with {by}s; found none"):
        of(bare, [Resample(SITE, bare, by=by)])
    if by == "role":
        with pytest.raises(UserError, match="found no role 'S' in `over`"):
            of(run, [Resample(SITE, with_roles(of, EVEN, T=[0, 0, 0]), by=by)])
