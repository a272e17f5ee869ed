"""The published edges are the true ones: every edge of every planted model, exchanged alone, by brute force."""

from functools import cache

import pytest
import torch

from mechinterp import evaluate, load
from mechinterp.models.planted import PLANTED, circuit
from mechinterp.tasks import induction
from mechinterp.tasks.planted import task_of
from tests.models.single_edges import contributions, destinations, effects, patched, sources

NAMES = tuple(PLANTED)
NOTHING = 1e-5  # of a logit difference of 8
N = 16


@cache
def model(name):
    return load(name, device="cpu")


@cache
def measured(name):
    """Effects by edge, noising and denoising, and the pairs."""
    of = model(name)
    pairs = task_of(name)(of, n=N, seed=7)
    return effects(of.bridge, pairs, "noise"), effects(of.bridge, pairs, "denoise"), pairs


def seen(effect):
    """Edges with an effect on every pair; an effect on some pairs and not on others is none of the types."""
    large = {edge for edge, by_prompt in effect.items() if by_prompt.abs().min() > 1}
    none = {edge for edge, by_prompt in effect.items() if by_prompt.abs().max() < NOTHING}
    assert large | none == set(effect), set(effect) - large - none
    return large


@pytest.mark.parametrize("name", NAMES)
def test_every_edge_has_its_type_on_every_pair(name):
    noise, denoise, _ = measured(name)
    true = circuit(name)
    assert seen(noise) == {*true.serial, *true.and_edges}
    assert seen(denoise) == {*true.serial, *true.or_edges}
    assert seen(noise) | seen(denoise) == set(true.edges)


@pytest.mark.parametrize("name", NAMES)
def test_an_effect_leads_away_from_the_answer_or_towards_it(name):
    noise, denoise, _ = measured(name)
    for edge in circuit(name).edges:
        assert noise[edge].max() < NOTHING and denoise[edge].min() > -NOTHING, edge


@pytest.mark.parametrize("name", NAMES)
def test_all_edges_that_could_be_are_tried(name):
    """As many as the graph has, the published ones among them, each once."""
    bridge, true = model(name).bridge, circuit(name)
    layers, heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    groups, mlps = bridge.cfg.n_key_value_heads or heads, 0 if bridge.cfg.attn_only else 1
    before = [1 + layer * (heads + mlps) for layer in range(layers + 1)]
    count = sum(n * (heads + 2 * groups) + mlps * (n + heads) for n in before[:-1]) + before[-1]
    noise, _, _ = measured(name)
    assert len(noise) == count
    every = [*true.edges, *true.constant_edges, *true.positional_edges]
    assert len(set(every)) == len(every) and set(every) <= set(noise)
    assert len(sources(bridge)) == before[-1] and len({d[0] for d in destinations(bridge)}) == len(
        list(destinations(bridge))
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_brute_force_is_right_where_the_answer_is_known(name):
    """All of a destination's edges exchanged: its value is that of the other run; at the logits, so is the metric."""
    of = model(name)
    _, _, pairs = measured(name)
    own, cache_ = contributions(of.bridge, pairs.clean.tokens)
    theirs, other = contributions(of.bridge, pairs.corrupted.tokens)
    for destination, at, where in destinations(of.bridge):
        before = [source for source, since in sources(of.bridge) if since < at]
        change = torch.stack([theirs[source] - own[source] for source in before]).sum(0)
        hooks = patched(of.bridge, cache_, where, change)
        kind, _, index = where
        got = {}

        def keep(activation, hook, got=got):
            got["value"] = activation

        hook_name = hooks[0][0]
        of.bridge.run_with_hooks(pairs.clean.tokens, fwd_hooks=[*hooks, (hook_name, keep)])
        want = other[hook_name]
        if kind in "qkv":
            got["value"], want = got["value"][:, :, index], want[:, :, index]
        torch.testing.assert_close(got["value"], want, atol=1e-4, rtol=0, msg=destination)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_does_its_task_on_one_side_only(name):
    _, _, pairs = measured(name)
    assert evaluate(model(name), pairs).min() > 3.9
    assert evaluate(model(name), pairs, side="corrupted").max() < -3.9
    assert evaluate(model(name), pairs, "prob").min() > 0.9


def test_pairs_of_swapped_predecessors_see_the_path_through_the_keys_only():
    """`tasks.induction` keeps the query and the values, so two true edges of planted-induction do not show."""
    of = model("planted-induction")
    pairs = induction(of, n=N)
    keys = {"embed->a0.h2<v>", "a0.h2->a1.h2<k>", "a1.h2->logits"}
    for direction in ("noise", "denoise"):
        assert seen(effects(of.bridge, pairs, direction)) == keys
    assert set(circuit("planted-induction").serial) - keys == {"embed->a1.h2<q>", "embed->a1.h2<v>"}


@pytest.mark.parametrize(
    "name, spare",
    [("planted-induction", [None]), ("planted-and", [None]), ("planted-or", [(1, 1), (1, 2)])],
)
def test_constant_and_positional_edges_matter_and_no_others(name, spare):
    """Without its source's contribution, each moves the metric (of a backup pair: where the other head is silent)."""
    of, true = model(name), circuit(name)
    _, _, pairs = measured(name)
    tokens, answers, rows = pairs.clean.tokens, pairs.answers, torch.arange(N)
    own, cache_ = contributions(of.bridge, tokens)
    found = set()
    for silent in spare:

        def silence(z, hook, silent=silent):
            z[:, :, silent[1]] = 0
            return z

        base = [] if silent is None else [(f"blocks.{silent[0]}.attn.hook_z", silence)]

        def metric(hooks, base=base):
            logits = of.bridge.run_with_hooks(tokens, fwd_hooks=[*base, *hooks])[rows, answers.pos[:, 0]]
            return logits[rows, answers.answer[:, 0, 0]] - logits[rows, answers.wrong[:, 0, 0]]

        whole = metric([])
        assert whole.min() > 3.9
        for destination, at, where in destinations(of.bridge):
            for source, since in sources(of.bridge):
                if since >= at or (silent and source == "a{}.h{}".format(*silent)):
                    continue
                change = metric(patched(of.bridge, cache_, where, -own[source])) - whole
                if change.abs().max() > 0.01:
                    found.add(f"{source}->{destination}")
    # The sink of planted-or only keeps its heads at rest where nothing matches, and the gate hides what it takes away.
    hidden = {"embed->a1.kv0<k>", "embed->a1.kv1<k>"} if name == "planted-or" else set()
    assert hidden <= set(true.positional_edges)
    assert found == {*true.edges, *true.constant_edges, *true.positional_edges} - hidden
