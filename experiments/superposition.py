"""Do models store more features than they have dimensions, and in which geometry? The toy model of superposition.

Elhage et al. 2022, "Toy Models of Superposition": x' = ReLU(WᵀWx + b) on sparse features, trained from several starts.

1. Five features in two dimensions: dense ones are dropped but for two, sparse ones form a pentagon.
2. Two features in one dimension, over sparsity and importance: which of three phases, beside the theory.
3. Many features that are all alike: dimensions per feature, and which of the published shapes they form, each with its
   fraction of dimensions per feature, beside random directions.
4. Sparse autoencoders on hidden activations, at several densities: do they find the feature directions again?
5. Everywhere a control: models without a ReLU, random directions, activations without sparse features.
6. Compare with values measured before; write one run folder and one offline report.

`--preset paper` trains the uniform models at the size of the paper.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import mechinterp as mi
from experiments.expected import compare
from experiments.settings import command_line, finished
from experiments.superposition_models import (
    Trained,
    Training,
    Uniform,
    geometric,
    grid,
    pentagon_rows,
    per_feature,
    read_phases,
    train_family,
)
from experiments.superposition_report import Found, finding, report
from experiments.superposition_sae import BATCH, TakenApart, take_apart
from experiments.superposition_shapes import sets, shape_rows

PENTAGON = (5, 2)  # features, dimensions
DENSITIES = (1.0, 0.5, 0.3, 0.1, 0.05, 0.02)
IMPORTANCES = (0.1, 10.0)
LEAST_DENSITY = 0.02  # of the phase diagram
APART = (40, 10)  # features and dimensions of the toy models that autoencoders read
SAE_DENSITIES = (0.1, 0.03, 0.01)
#: Densities of the uniform models are those of the paper's notebook, 1/(1 − S) from 1 to 20 in equal ratios.
PRESETS = {
    "tiny": Uniform(12, 4, densities=3, restarts=2, how=Training(50, 64, 2e-2)),
    "quick": Uniform(200, 20, densities=20, restarts=2, how=Training(4000, 256, 5e-3)),
    "paper": Uniform(400, 30, densities=20, restarts=1, how=Training(8000, 512, 5e-3)),
}


@dataclass(frozen=True)
class Config:
    """Settings of the run; the same settings always have the same run folder."""

    preset: Literal["tiny", "quick", "paper"] = "quick"
    """Sizes of the uniform models; tiny is for tests."""
    steps: int = 3000
    """Training steps of all other models."""
    batch: int = 256
    """Their samples of a step."""
    learning_rate: float = 1e-2
    """Their largest step of Adam; it falls to 0 along a cosine."""
    restarts: int = 16
    """Starts of each of the models with five features."""
    n_importances: int = 10
    """Rows of the phase diagram; an even number leaves out 1, where two phases are alike."""
    n_densities: int = 12
    """Columns of the phase diagram."""
    phase_restarts: int = 6
    """Starts of each of its cells."""
    sae_tokens: int = 200_000
    """Activations that an autoencoder is trained on."""
    seed: int = 0
    """Of starting weights, samples and controls."""
    root: str = field(default="runs", metadata={"in_id": False})
    """Folder of all runs."""

    def check(self) -> None:
        """Raise UserError for settings that cannot be."""
        least_of = {"restarts": 2, "n_importances": 2, "n_densities": 2, "phase_restarts": 1, "sae_tokens": BATCH}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise mi.UserError(f"{name} must be at least {least}; found {getattr(self, name)}")

    @property
    def training(self) -> Training:
        """How all but the uniform models are trained."""
        return Training(self.steps, self.batch, self.learning_rate, self.seed)

    @property
    def uniform(self) -> Uniform:
        """The uniform models."""
        one = PRESETS[self.preset]
        return replace(one, how=replace(one.how, seed=self.seed))


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    config.check()
    print(f"{config}\n", flush=True)
    with mi.reporting.Run.open("superposition", config, root=config.root) as run:
        found = measure(run, config)
        name = "toy" if config.preset == "quick" else f"toy_{config.preset}"
        against = compare("superposition", name, values(found), settings(config))
        answer = finding(found)
        path = run.finish(report(found, against, answer, config, __file__))
        run.log(f"\n{answer}\n\n{against.verdict}")
    finished(path)
    return path


def measure(run: mi.reporting.Run, config: Config) -> Found:
    """Train what no earlier run has trained, and measure."""

    def part(name: str, kind: Any, make: Any) -> Any:
        return run.part(name, make, kind.load, lambda made, path: made.save(path))

    how = config.training
    # The falling importances of five features are those of the paper's first figures.
    falling = (0.9 ** torch.arange(PENTAGON[0])).repeat(len(DENSITIES), 1)
    importances = geometric(*IMPORTANCES, config.n_importances)
    densities = geometric(LEAST_DENSITY, 1.0, config.n_densities)
    cells, weights = grid(importances, densities)
    pentagon = part(
        "pentagon.safetensors",
        Trained,
        partial(train_family, PENTAGON[1], DENSITIES, falling, config.restarts, how),
    )
    phases = part("phases.safetensors", Trained, partial(train_family, 1, cells, weights, config.phase_restarts, how))
    uniform = part("uniform.safetensors", Trained, config.uniform.train)
    apart = part(
        "autoencoders.safetensors", TakenApart, partial(take_apart, SAE_DENSITIES, *APART, config.sae_tokens, 1, how)
    )
    return Found(
        pentagon=pentagon,
        pentagon_rows=pentagon_rows(pentagon, config.seed),
        phases=read_phases(phases, importances, densities),
        uniform=uniform,
        sets=sets(uniform.W),
        shapes=shape_rows(uniform, config.seed),
        apart=apart,
        recoveries=apart.recoveries(config.seed),
    )


def values(found: Found) -> dict[str, float]:
    """What is compared with expected values."""
    ends, linear = per_feature(found.uniform)
    made = {
        "dense: features represented": float(found.pentagon_rows[0].represented.estimate),
        "sparse: share of pentagons": found.pentagons[0] / found.pentagons[1],
        "without ReLU: most features represented": float(max(row.linear for row in found.pentagon_rows)),
        "phases: agreement with theory": found.phases.agrees,
        "dimensions per feature, sparse": float(ends.estimate[-1]),
        "dimensions per feature without ReLU, sparse": float(linear[-1]),
    }
    for density, (ours, normal) in zip(SAE_DENSITIES, found.recoveries, strict=True):
        made[f"autoencoder, density {density:g}: mean max cosine"] = float(ours.mean_max_cosine.estimate)
        made[f"on normal activations, density {density:g}"] = float(normal.mean_max_cosine.estimate)
    for row in found.shapes:
        made[f"{row.name}: features in exact ones"] = float(row.exact)
        made[f"{row.name}: features in sets of its size"] = float(row.alike)
    return made


def settings(config: Config) -> dict[str, Any]:
    """The settings that expected values belong to."""
    free = ("seed", "root", "preset")
    return {name: value for name, value in vars(config).items() if name not in free}


if __name__ == "__main__":
    command_line(main, Config, __doc__)
