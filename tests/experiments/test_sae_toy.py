"""The known dictionary in small: autoencoders find it, the report says so honestly, an interrupted run continues."""

import json

import numpy as np
import pytest
import torch

import mechinterp as mi
from experiments.sae_toy import Config, Found, finding, main, reaches, values
from experiments.sae_toy_training import NORMAL, RECIPES, Learned, Score, Sizes, best_codes, score
from mechinterp.statistics import Interval

# Sizes at which a second or two is enough for a dictionary of 24 features in 12 dimensions.
SMALL = {
    "n_features": 24, "d": 12, "density": 0.05, "d_sae": 36, "k": 2, "n_tokens": 40_000, "batch": 256,
    "test_tokens": 2048, "n_seeds": 2,
}  # fmt: skip


def test_it_runs_reports_and_continues(tmp_path, capsys):
    config = Config(root=str(tmp_path), architectures=("topk", "batchtopk"), **SMALL)
    page = main(config)
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1] == str(page) and "No comparison" in said
    report = json.loads(page.with_name("report.json").read_text())
    assert "NaN" not in page.read_text().split("<script>")[0] and "nan" not in report["answer"]
    assert [len(section["figures"]) for section in report["sections"]] == [1, 1, 0, 0, 0]
    rows = {row[0]: row for row in report["sections"][0]["table"]["rows"]}
    assert set(rows) == {"topk", "batchtopk", NORMAL}
    cosine = {name: float(row[1].split()[0]) for name, row in rows.items()}
    assert cosine["topk"] > 0.9 and cosine["topk"] > cosine[NORMAL] + 0.15, cosine
    assert cosine["batchtopk"] > cosine[NORMAL] + 0.1 and float(report["baseline"][1][1]) < 0.8, cosine
    assert report["command"].startswith("python experiments/sae_toy.py --n-features 24 --d 12")
    assert "--architectures topk batchtopk" in report["command"] and "mean max cosine" in report["answer"]
    assert main(config) == page
    assert capsys.readouterr().out.count("done before, loaded") == 3


def perfect(sizes: Sizes) -> Learned:
    """Decoders that are the dictionaries, each row twice as long, the last features copies of the first."""
    truth = torch.stack([sizes.dictionary(seed).directions() for seed in sizes.seeds])
    decoder = 2 * torch.cat([truth, truth[:, : sizes.d_sae - sizes.n_features]], 1)
    noise = torch.randn(decoder.shape, generator=torch.Generator().manual_seed(1))
    return Learned(decoder, noise, torch.tensor([0.1, 0.2]), torch.tensor([2.0, 3.0]))


def test_scores_of_decoders_that_are_known():
    sizes = Sizes(**SMALL)
    whole = score("topk", perfect(sizes), sizes)
    assert float(whole.cosine.estimate) == pytest.approx(1, abs=1e-5) and reaches(whole)
    assert float(whole.unique.estimate) == float(whole.recovered.estimate) == 1
    assert whole.reverse == pytest.approx(1, abs=1e-5) and abs(whole.random - whole.untrained) < 0.1
    # One true feature has no decoder row: found by nothing, and no other row may stand for it.
    lost = perfect(sizes)
    lost.decoder[:, 3] = lost.decoder[:, 4]
    lost.decoder[:, sizes.n_features + 3] = lost.decoder[:, 4]
    one = score("topk", lost, sizes)
    assert float(one.recovered.estimate) == pytest.approx(23 / 24) == pytest.approx(float(one.unique.estimate))
    # Directions with the wrong sign are not the features.
    lost.decoder.neg_()
    assert float(score("topk", lost, sizes).recovered.estimate) == 0


def test_the_target_is_told_as_it_is():
    def named(name: str, cosine: float, low: float, worst: float) -> Score:
        number = Interval(np.array(cosine), np.array(low), np.array(1.0))
        return Score(name, number, (worst, 1.0), number, number, 0.8, 0.3, 0.3, np.ones(2), np.ones(2), np.ones((2, 4)))

    good, wide = named("topk", 0.98, 0.96, 0.97), named("jumprelu", 0.96, 0.94, 0.96)
    uneven = named("batchtopk", 0.97, 0.96, 0.94)
    assert [reaches(one) for one in (good, wide, uneven)] == [True, False, False]
    found = Found([good, wide, uneven], named(NORMAL, 0.4, 0.3, 0.4), 0.1)
    said = finding(found, Config(**SMALL))
    assert "is reached by topk (0.980 [0.960, 1.000])" in said
    assert "is NOT reached by jumprelu (0.960 [0.940, 1.000]), batchtopk" in said and "For information" not in said
    assert values(found)["jumprelu: mean max cosine"] == 0.96


def test_the_truth_leaves_what_k_cuts_off():
    sizes = Sizes(**SMALL)
    assert best_codes(sizes, sizes.n_features) == pytest.approx(0, abs=1e-6)
    assert 0.01 < best_codes(sizes, 2) < best_codes(sizes, 1) < 1


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"architectures": ("topk", "lista")}, "architectures must be some of topk, .*; found lista"),
        ({"architectures": ()}, "found none"),
        ({"d": 200}, "more features than dimensions; found 128 and 200"),
        ({"n_seeds": 0}, "n_seeds and test_tokens must be at least 1; found 0"),
        ({"density": 2.0}, "density must lie in"),
        ({"k": 1000}, "k must be 1 … d_sae = 192; found 1000"),
        ({"n_tokens": 10}, "n_tokens must be at least a batch"),
        ({"d_sae": 130}, "d_sae 130 cannot be divided"),
    ],
    ids=["architecture", "none", "dimensions", "seeds", "density", "k", "tokens", "prefixes"],
)
def test_bad_settings_are_one_line(settings, found):
    with pytest.raises(mi.UserError, match=found):
        main(Config(**settings))


def test_every_architecture_has_a_recipe():
    from mechinterp.sae.architectures import ARCHITECTURES

    assert set(RECIPES) == set(ARCHITECTURES)
