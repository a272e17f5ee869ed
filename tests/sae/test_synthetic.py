"""A known dictionary has the statistics it promises, its chunks resume, and recovery tells found from not found."""

import itertools

import pytest
import torch

import mechinterp as mi
from mechinterp.sae.toys.known_dictionary import (
    KnownDictionary,
    cosine_matrix,
    greedy_matching,
    recovery,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_activations_are_codes_times_unit_directions():
    known = KnownDictionary(n_features=40, d=16, density=0.1)
    activations, codes = known.sample(500, generator())
    assert activations.shape == (500, 16) and codes.shape == (500, 40)
    assert torch.allclose(known.directions().norm(dim=1), torch.ones(40), atol=1e-6)
    assert torch.allclose(activations, codes @ known.directions(), atol=1e-5)
    fired = codes[codes != 0]
    assert fired.min() >= known.low and fired.max() <= known.high
    assert torch.equal(known.directions(), KnownDictionary(n_features=40, d=16).directions())
    assert not torch.equal(known.directions(), KnownDictionary(n_features=40, d=16, seed=1).directions())


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_features_fire_as_often_as_they_should(correlation):
    """Also where they fire together: correlation moves no feature's own probability."""
    known = KnownDictionary(n_features=10, d=4, density=0.1, zipf=0.7, correlation=correlation)
    want = known.probabilities()
    assert want.mean() == pytest.approx(0.1, abs=1e-6) and want[0] > 2 * want[-1]
    found = (known.codes(40_000, generator()) != 0).float().mean(0)
    assert ((found - want).abs() < 5 * (want * (1 - want) / 40_000).sqrt()).all()


def test_correlation_joins_the_features_of_a_group_only():
    together = KnownDictionary(n_features=6, d=4, density=0.1, correlation=0.9, group=3)
    fires = (together.codes(20_000, generator()) != 0).float()
    both = (fires.T @ fires) / len(fires)
    assert both[0, 1] > 0.04 and both[1, 2] > 0.04 and both[3, 5] > 0.04, "one factor a group"
    assert both[0, 3] < 0.02 and both[2, 4] < 0.02, "0.01 by chance"


def test_noise_is_of_its_size():
    noisy = KnownDictionary(n_features=40, d=16, density=0.1, noise=0.3)
    activations, codes = noisy.sample(2000, generator())
    assert (activations - codes @ noisy.directions()).std() == pytest.approx(0.3, abs=0.01)


def test_chunks_resume_bit_for_bit():
    known = KnownDictionary(n_features=40, d=16, density=0.1, noise=0.1)
    source = known.chunks(tokens=32, seed=3)
    before = [source.chunk()["toy"] for _ in range(3)]
    state = source.state_dict()
    after = [source.chunk()["toy"] for _ in range(3)]
    again = known.chunks(tokens=32, seed=3)
    again.load_state_dict(state)
    assert all(torch.equal(one, again.chunk()["toy"]) for one in after)
    chunks = [*before, *after]
    assert chunks[0].shape == (32, 16)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(chunks, 2))
    assert not torch.equal(known.chunks(tokens=32, seed=4).chunk()["toy"], before[0])


@pytest.mark.parametrize(
    ("other", "tokens", "seed"),
    [(KnownDictionary(41, 16), 32, 3), (KnownDictionary(40, 16), 33, 3), (KnownDictionary(40, 16), 32, 4)],
    ids=["dictionary", "tokens", "seed"],
)
def test_a_state_of_another_source_is_refused(other, tokens, seed):
    state = KnownDictionary(40, 16).chunks(tokens=32, seed=3).state_dict()
    with pytest.raises(mi.UserError, match="not of this source"):
        other.chunks(tokens, seed).load_state_dict(state)


def test_recovery_of_a_known_part():
    """Half of the features found, in any order and length; the other half replaced by their opposites."""
    truth = KnownDictionary(n_features=20, d=64).directions()
    learned = torch.cat([3 * truth[:10], -truth[10:], torch.zeros(4, 64)])[torch.randperm(24)]
    found = recovery(truth, learned)
    assert found.n_true == 20 and found.n_learned == 20, "directions of length 0 do not count"
    assert found.recovered.estimate == pytest.approx(0.5) and found.unique.estimate == pytest.approx(0.5)
    assert found.recovered.low < 0.5 < found.recovered.high
    want = (10 + float(cosine_matrix(truth[10:], learned[learned.norm(dim=1) > 0]).amax(1).sum())) / 20
    assert found.mean_max_cosine.estimate == pytest.approx(want, abs=1e-6)
    assert found.control < 0.4 and found.control_recovered == 0
    assert "50.0%" in found.summary() and "20 true features" in found.summary()


def test_no_other_draw_with_the_same_seed_holds_the_answer():
    """Neither the control nor weights that start from torch's own generator."""
    truth = KnownDictionary(n_features=20, d=64, seed=5).directions()
    start = torch.randn(20, 64, generator=generator(5))
    assert recovery(truth, start, seed=5).mean_max_cosine.estimate < 0.5
    assert recovery(truth, truth, seed=5).control < 0.5


def test_what_is_made_up_lowers_the_reverse_only():
    truth = KnownDictionary(n_features=20, d=64).directions()
    found = recovery(truth, torch.cat([truth, KnownDictionary(n_features=60, d=64, seed=9).directions()]))
    assert found.mean_max_cosine.estimate == pytest.approx(1, abs=1e-5)
    assert found.reverse.estimate < 0.6


def test_one_learned_feature_stands_for_one_true_feature():
    truth = torch.nn.functional.normalize(torch.tensor([[1.0, 0.05], [1.0, -0.05]]), dim=1)
    found = recovery(truth, torch.tensor([[1.0, 0.04], [-1.0, 0.0]]))
    assert found.recovered.estimate == 1 and found.unique.estimate == 0.5
    assert found.matched.estimate == pytest.approx(0, abs=0.01), "the second is left with the opposite"


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5)], ids=["square", "wide", "tall"])
def test_rounds_of_mutual_choices_are_the_greedy_matching(shape):
    cosines = torch.rand(shape) * 2 - 1
    left, want = cosines.clone(), torch.zeros(shape[0])
    for _ in range(min(shape)):
        row, column = divmod(int(left.argmax()), shape[1])
        want[row] = cosines[row, column]
        left[row], left[:, column] = -9, -9
    assert torch.equal(greedy_matching(cosines), want)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"n_features": 0}, "n_features, d and group must be at least 1"),
        ({"density": 0.0}, "density must lie in"),
        ({"correlation": 1.5}, "correlation in"),
        ({"low": 2.0}, "low not above high"),
        ({"density": 0.5, "zipf": 1.0}, "fire with probability"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_one_line(settings, found):
    with pytest.raises(mi.UserError, match=found):
        KnownDictionary(**{"n_features": 10, "d": 4} | settings)


def test_bad_comparisons_are_one_line():
    truth = KnownDictionary(10, 4).directions()
    with pytest.raises(mi.UserError, match="rows of one length"):
        recovery(truth, torch.rand(3, 5))
    with pytest.raises(mi.UserError, match="0 are not 0"):
        recovery(truth, torch.zeros(3, 4))
    with pytest.raises(mi.UserError, match="at least 1 token"):
        KnownDictionary(10, 4).chunks(tokens=0)
