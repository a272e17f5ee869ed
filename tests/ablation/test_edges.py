"""A cut edge is −inf in the scores, on every family where attention can be changed, and refused elsewhere."""

import numpy as np
import pytest
import torch

from mechinterp import UserError, load
from mechinterp.ablation import knock_out
from mechinterp.hooked.sites import Site
from mechinterp.tasks import induction
from tests.ablation.reference import equals
from tests.families import FAMILIES, full_logits, model, pairs

PADDED = pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])


def cut(of, task, name, ends, heads):
    """Logits with the entries (prompt, query, key) of some heads' scores at −inf, or of their pattern at 0, scaled."""

    def put(x, hook):
        x = x.clone()
        for i, query, key in ends:
            for one in heads:
                x[i, one, query, key] = -torch.inf if name == "attn_scores" else 0
                if name == "pattern":
                    x[i, one, query] /= x[i, one, query].sum()
        return x

    return full_logits(of, task.clean, [(Site(name, 1).hook_name, put)])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
@PADDED
def test_a_cut_edge_is_minus_infinity_in_the_scores(family, padded):
    of = model(family)
    task = pairs(of, padded)
    roles = task.clean.roles
    ends = [(i, int(roles["END"][i]), int(roles["B"][i])) for i in range(len(task))]
    result = knock_out(of, task, edges=[((1, 2), "END", "B"), ((1, 0), "END", "B")], draws=0, force=True)
    for name in ("attn_scores", "pattern"):
        equals(of, task, result, cut(of, task, name, ends, [0, 2]))
    result = knock_out(of, task, edges=[(None, -1, "B")], draws=0, force=True)
    with of.intervene():
        assert abs(result.data["after_logit_diff"] - result.data["before_logit_diff"]).max() > 1e-2
    assert result.about["value"] == "cut" and result.about["components"] == "all heads -1→B"


def test_an_edge_that_was_all_there_was_leaves_nothing():
    """The first token sees itself only: the head moves nothing there, as with a value of zero."""
    of = model("llama")
    task = pairs(of, False)
    got = knock_out(of, task, edges=[((1, 2), 0, 0)], draws=0, force=True)
    want = knock_out(of, task, heads=[(1, 2)], value="zero", positions=0, draws=0, force=True)
    np.testing.assert_allclose(got.data["after_logit_diff"], want.data["after_logit_diff"], atol=1e-4)


def test_edges_are_refused_where_attention_cannot_be_changed():
    of = model("opt")
    with pytest.raises(UserError, match="pattern layer 1 head 2 can be read but not changed in opt"):
        knock_out(of, pairs(of, False), edges=[((1, 2), "END", "B")], force=True)


@pytest.fixture(scope="module")
def planted():
    of = load("planted-induction", device="cpu")
    return of, induction(of, n=24)


def test_the_planted_edges_are_needed_and_no_others(planted):
    """The induction head reads B1 from END; the previous-token head writes A1's word to B1."""
    of, task = planted
    for edge, needed in [
        (((1, 2), "END", "B1"), True),
        (((0, 2), "B1", "A1"), True),
        (((1, 2), "END", "D1"), False),
        (((1, 3), "END", "B1"), False),
        (((0, 1), "B1", "A1"), False),
    ]:
        row = knock_out(of, task, edges=[edge], draws=3).about["table"]["logit_diff"]
        if needed:
            assert row["after"] < 0.1 * row["before"] and abs(row["control"]) < 0.1 * row["before"], (edge, row)
        else:
            assert abs(row["change"]) < 0.02 * row["before"], (edge, row)
