"""Composition through thin factors equals that of whole matrices; its null equals sampling; its memory is bounded."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mechinterp import UserError
from mechinterp.heads import CompositionResult, composition
from mechinterp.heads.composition import random_composition
from mechinterp.heads.scores import score_forms
from tests.checks import checks_off
from tests.families import FAMILIES, model
from tests.heads import plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_a_pair_composes_as_its_whole_matrices(family, kind):
    of = model(family)
    offset = None if kind == "v" else [1, 3]
    result = composition(of, kind, offset=offset)
    forms = {} if kind == "v" else score_forms(of, range(of.n_layers), offset)
    for layer in range(of.n_layers):
        for head in range(of.n_heads):
            if kind == "v":
                read = plain.ov(of, layer, head)
            else:
                read = plain.qk(of, layer, head, forms[layer].matrix)
                read = read if kind == "q" else read.T
            for below in range(of.n_layers):
                for other in range(of.n_heads):
                    got = float(
                        result.data["composition"].sel(source=f"L{below}H{other}", destination=f"L{layer}H{head}")
                    )
                    if below >= layer:
                        assert np.isnan(got)
                        continue
                    write = plain.ov(of, below, other)
                    want = (write @ read).norm() / (write.norm() * read.norm())
                    assert got == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_compose_the_same(family, variant):
    for kind in ("q", "k", "v"):
        raw, processed = (composition(variant(family, one), kind) for one in (False, True))
        for name in ("composition", "null", "null_sd"):
            np.testing.assert_allclose(raw.data[name], processed.data[name], atol=2e-4)
        assert float(raw.data["composition"].max()) > 0.1


@pytest.mark.parametrize(
    ("d", "first", "second", "near"),
    [
        (96, (1 / torch.arange(1.0, 17)).tolist(), torch.linspace(3, 0.2, 16).tolist(), 0.03),
        (24, [1.0] * 6, [1.0] * 6, 0.03),
        (40, [1.0], [1.0], 0.03),
        (40, [4, 1], [1] * 10, 0.03),
        (24, [5, 2, 1, 0.3], [3, 1, 0.1, 0.1], 0.1),
    ],
    ids=["heads", "flat", "rank one", "unequal", "steep"],
)
def test_the_null_is_what_sampling_finds(d, first, second, near):
    """Two matrices of these singular values in random directions, 20,000 times. The moments of the square are exact;
    those of its root are a gamma variable's, which is near: to a tenth for spectra far steeper than those of heads."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.tensor(values).double() for values in (first, second))
    frames = torch.linalg.qr(torch.randn(20_000, d, len(a), generator=draw, dtype=torch.float64))[0]
    # Turning one of the two is turning both: what the source writes meets axes 0 … of the destination.
    product = a[None, :, None] * frames[:, : len(b)].transpose(1, 2) * b
    sampled = product.flatten(1).norm(dim=1) / (a.norm() * b.norm())
    spreads = [np.array([float(x.pow(4).sum() / x.square().sum() ** 2)]) for x in (a, b)]
    mean, sd = random_composition(*spreads, d)
    assert float(mean[0] ** 2 + sd[0] ** 2) == pytest.approx(1 / d, rel=1e-6)
    assert float((sampled**2).mean()) == pytest.approx(1 / d, rel=0.02)
    assert float(mean[0]) == pytest.approx(float(sampled.mean()), abs=0.05 * float(sampled.std()))
    assert float(sd[0]) == pytest.approx(float(sampled.std()), rel=near)


def test_random_weights_compose_as_the_null_says():
    """Models of random weights: z is about standard normal, over all pairs of all families."""
    z = np.concatenate([composition(model(family), "v").data["z"].values.ravel() for family in FAMILIES])
    z = z[np.isfinite(z)]
    assert len(z) > 300 and abs(z.mean()) < 0.25 and 0.7 < z.std() < 1.4


def test_planted_k_composition(planted):
    result = composition(planted, "k")
    positive = result.data["excess"].values > 0.01
    labels = result.data["source"].values
    pairs = {(labels[i], labels[j]) for i, j in zip(*positive.nonzero(), strict=True)}
    # The induction heads (the decoy's keys read the same) read what the previous-token head writes, and nothing else.
    assert pairs == {("L0H2", "L1H2"), ("L0H2", "L1H3")}
    assert (
        not (composition(planted, "q").data["excess"] > 0).any()
        and not (composition(planted, "v").data["excess"] > 0).any()
    )
    assert result.top(1)["source"][0] == "L0H2" and "L0H2 → L1H" in result.summary()


def test_some_layers_what_is_kept_and_what_is_refused(tmp_path):
    of = model("gemma2")
    every, some = composition(of, "k", offset=2), composition(of, "k", [1, 3], 2)
    assert some.data["source"].values.tolist() == [f"L{layer}H{head}" for layer in (1, 3) for head in range(4)]
    picked = every.data.sel(source=some.data["source"], destination=some.data["destination"])
    np.testing.assert_allclose(some.data["composition"], picked["composition"], atol=1e-6)
    assert every.about["offset"] == "at offset 2" and every.about["peak_bytes"] > 0
    assert composition(of, "q").about["offsets"]["0"] == [1, 2, 3], "layer 0 has a window of 4"
    made = some.to_json()
    assert made["excess"][0][0] is None and made["excess"][0][4] == pytest.approx(
        float(some.data["excess"][0, 4]), abs=1e-5
    )
    some.save(tmp_path / "composition.safetensors")
    assert CompositionResult.load(tmp_path / "composition.safetensors").to_json() == made
    assert "no head reads" in composition(of, "v", [2]).summary() and not len(composition(of, "v", [2]).top())
    for asked, says in (
        ({"kind": "o"}, "unknown composition 'o'; valid: q, k, v"),
        ({"kind": "v", "offset": 3}, "values do not depend on an offset"),
        ({"kind": "q", "layers": [0, 2], "offset": 6}, "layer 0 sees no key 6 positions"),
        ({"kind": "q", "layers": [9]}, "gemma2 has 0 … 3"),
    ):
        with checks_off(), pytest.raises(UserError, match=says):
            composition(of, **asked)


def test_all_pairs_at_once_are_never_formed():
    """SmolLM2's shapes: 270 heads of 64 dimensions in 576. The estimate is far below 3 GB."""
    from types import SimpleNamespace

    from mechinterp.heads.composition import peak_bytes

    of = SimpleNamespace(n_heads=9, d_head=64, d_model=576)
    with checks_off():
        stated = peak_bytes(of, 30)
    products = 4 * 17280 * 576  # of a layer's heads with all sources, in float32
    assert 4 * 17280 * 576 + products < stated < 0.1e9  # the sources themselves as well


MEASURE = """
import mechinterp as mi
from mechinterp.heads import composition
from mechinterp.manifest import peak_memory_bytes as peak
model = mi.load("smollm2-135m")
model([[1, 2]])  # the weights are read from the disk when they are first used
before = peak()
results = [composition(model, kind) for kind in "qkv"]
assert all(result.data["composition"].shape == (270, 270) for result in results)
print(peak(), peak() - before, results[0].about["peak_bytes"])
"""


@pytest.mark.real_model
def test_memory_on_smollm2():
    """Of the whole process, model included, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    whole, more, stated = map(int, done.stdout.split()[-3:])
    assert whole < 3e9
    assert stated < 0.1e9 and more < 0.5e9
