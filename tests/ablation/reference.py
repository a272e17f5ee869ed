"""Knock-outs by hand: TransformerLens's own hooks on whole prompts, full logits, values by loops over prompts."""

from dataclasses import replace

import torch

from mechinterp.hooked.interventions import Resample
from mechinterp.hooked.sites import Site
from tests.families import full_logits, pairs


def templated(of, padded, n=6):
    """Random pairs with roles A, B, END, and with templates: prompts of one length share one (of even ones, thirds)."""
    task = pairs(of, padded, n=n)
    template = torch.arange(n) % 3
    sides = {name: getattr(task, name).with_roles(task.clean.roles, template) for name in ("clean", "corrupted")}
    return replace(task, **sides)


def seen(of, prompts, name):
    """The activation at a hook point."""
    kept = {}
    full_logits(of, prompts, [(name, lambda x, hook: kept.update(x=x.detach().clone()))])
    return kept["x"]


def role_at(prompts, i, j):
    """The last role that lies at position j of prompt i."""
    return next((name for name in reversed(list(prompts.roles)) if int(prompts.roles[name][i]) == j), None)


def mean_at(acts, over, prompts, by, i, j):
    """What position j of prompt i becomes: the mean of `acts` `[prompt pos …]` of `over` over what is alike."""
    alike = []
    for a in range(len(over)):
        for b in range(over.n_pos):
            same = {
                "all": True,
                "position": b == j,
                "role": role_at(over, a, b) == role_at(prompts, i, j),
                "template": b == j and over.template is not None and over.template[a] == prompts.template[i],
            }[by]
            if over.real[a, b] and same:
                alike.append(acts[a, b])
    return torch.stack(alike).mean(0)


def knocked(of, prompts, changes, where, value="mean", over=None, by="role", seed=0):
    """Logits with each of `changes` (a Site with heads or neurons) set at `where` [(prompt, pos), …]."""
    over = prompts if over is None else over
    hooks = []
    for site in changes:
        acts = seen(of, over, site.hook_name)
        donors = Resample(site, over, by=by, seed=seed).donors(prompts) if value == "resample" else None

        def put(x, hook, site=site, acts=acts, donors=donors):
            x = x.clone()
            for i, j in where:
                new = torch.zeros_like(x[i, j])
                if value == "mean":
                    new = mean_at(acts, over, prompts, by, i, j)
                elif value == "resample":
                    new = acts[donors[i], j]
                if site.heads is not None:
                    x[i, j, list(site.heads)] = new[list(site.heads)]
                elif site.neurons is not None:
                    x[i, j, list(site.neurons)] = new[list(site.neurons)]
                else:
                    x[i, j] = new
            return x

        hooks.append((site.hook_name, put))
    return full_logits(of, prompts, hooks)


def both(task, logits):
    """`[prompt]` logit difference and P(answer), of one answer and one wrong answer each."""
    rows, at = torch.arange(len(task)), task.answers.pos[:, 0]
    answer, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]
    last = logits[rows, at].double()
    return last[rows, answer] - last[rows, wrong], last.softmax(-1)[rows, answer]


def head(layer, *index):
    return Site("z", layer, head=index)


def at_role(prompts, *roles):
    """(prompt, pos) of some roles."""
    return [(i, int(prompts.roles[role][i])) for role in roles for i in range(len(prompts))]


def everywhere(prompts):
    """(prompt, pos) of every token."""
    return [tuple(one) for one in prompts.real.nonzero().tolist()]


def equals(of, task, result, logits, before=None):
    """The result's metrics are those of these logits, and not those of the run before."""
    for side, want in (("before", before), ("after", logits)):
        if want is None:
            want = full_logits(of, task.clean, [])
        for name, values in zip(("logit_diff", "prob"), both(task, want), strict=True):
            got = torch.tensor(result.data[f"{side}_{name}"].values)
            torch.testing.assert_close(got, values, atol=1e-4 if name == "logit_diff" else 1e-5, rtol=1e-4)
    moved = abs(result.data["after_logit_diff"] - result.data["before_logit_diff"])
    assert float(moved.max()) > 1e-2, "a comparison of nothing with nothing"
