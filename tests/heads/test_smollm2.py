"""On SmolLM2: scores of two layers against plain hooks, known heads, and weights that agree with attention."""

import numpy as np
import pytest

from mechinterp.heads import composition, matching, patterns, repeated_tokens

pytestmark = pytest.mark.real_model
PERIOD = 20


@pytest.fixture(scope="module")
def scores(smollm2):
    return patterns(smollm2, repeated_tokens(smollm2, n=6, period=PERIOD))


def test_scores_are_means_of_attention(smollm2, scores):
    prompts, kept = repeated_tokens(smollm2, n=6, period=PERIOD), {}
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (16, 18)]
    keep = [(name, lambda x, hook, name=name: kept.__setitem__(name, x.double().numpy().copy())) for name in names]
    smollm2.bridge.run_with_hooks(prompts.tokens, fwd_hooks=keep, use_cache=False)
    second = range(PERIOD, 2 * PERIOD)
    for layer, name in zip((16, 18), names, strict=True):
        induction = np.mean([kept[name][:, :, q, q - PERIOD + 1] for q in second], 0).T
        previous = np.mean([kept[name][:, :, q, q - 1] for q in range(2, 2 * PERIOD)], 0).T
        np.testing.assert_allclose(scores.data["scores"].sel(kind="induction", layer=layer), induction, atol=1e-4)
        np.testing.assert_allclose(scores.data["scores"].sel(kind="previous_token", layer=layer), previous, atol=1e-4)


def test_the_heads_of_induction(scores):
    assert scores.ranking("induction")[0] == (18, 6) and scores.grid("induction")[18, 6] > 0.7
    assert scores.ranking("previous_token")[0] == (16, 0) and scores.grid("previous_token")[16, 0] > 0.7
    assert {(18, 6), (17, 3), (17, 4)} <= set(scores.passing("induction"))
    assert not set(scores.passing("induction")) & {(0, head) for head in range(9)}, "layer 0 knows no earlier layer"


def test_weights_agree_with_attention(smollm2, scores):
    """The heads that match what the previous-token head writes are the induction heads that it composes with."""
    found = matching(smollm2, [17, 18, 19], via=(16, 0), n_tokens=100, draws=20)
    best = {(int(row["layer"]), int(row["head"])) for row in found.top(4).to_dict("records")}
    assert best <= set(scores.ranking("induction")[:12])
    keys = composition(smollm2, "k", [16, 17, 18])
    pairs = list(zip(*keys.top(12)[["source", "destination"]].values.T, strict=True))
    assert ("L16H0", "L18H6") in pairs and ("L16H0", "L17H3") in pairs
