"""Do models store more features than they have dimensions, and in which geometry? The toy model of superposition.

Elhage et al. 2022, "Toy Models of Superposition": x' = ReLU(WᵀWx + b) on sparse features, trained from several starts.

1. Five features in two dimensions: dense ones are dropped but for two, sparse ones form a pentagon.
2. Two features in one dimension, over sparsity and importance: which of three phases, beside the theory.
3. Many features that are all alike: dimensions per feature, and whether the dimensionality of each lies on one of the
   published fractions, beside what lies next to the fractions and beside random directions.
4. Sparse autoencoders on hidden activations, at several densities: do they find the feature directions again?
5. Everywhere a control: models without a ReLU, random directions, activations without sparse features.
6. Compare with values measured before; write one run folder and one offline report.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

import mechinterp as mi
from experiments import superposition_figures as draw
from experiments.expected import Comparison, compare
from experiments.settings import command, finished
from experiments.superposition_models import (
    NEAR,
    FractionRow,
    PentagonRow,
    Phases,
    Trained,
    Training,
    fraction_rows,
    geometric,
    grid,
    pentagon_rows,
    per_feature,
    read_phases,
    train_family,
)
from experiments.superposition_sae import TakenApart, take_apart
from mechinterp.sae import toy_models as toy
from mechinterp.sae.synthetic import Recovery
from mechinterp.statistics import Interval

PENTAGON = (5, 2)  # features, dimensions
DENSITIES = (1.0, 0.5, 0.3, 0.1, 0.05, 0.02)
SPARSE = 0.1  # densities up to this one are where a pentagon is asked for
IMPORTANCES = (0.1, 10.0)
LEAST_DENSITY = 0.02  # of the phase diagram
MOST_SPARSE = 1 / 6  # density of the sparsest uniform models
SAE_DENSITIES = (0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Config:
    """Settings of the run; the same settings always have the same run folder."""

    steps: int = 3000
    """Training steps of every model."""
    batch: int = 256
    """Samples of a step."""
    learning_rate: float = 1e-2
    """Largest step of Adam; it falls to 0 along a cosine."""
    restarts: int = 16
    """Starts of each of the models with five features."""
    n_importances: int = 10
    """Rows of the phase diagram; an even number leaves out 1, where two phases are alike."""
    n_densities: int = 12
    """Columns of the phase diagram."""
    phase_restarts: int = 6
    """Starts of each of its cells."""
    n_features: int = 40
    """Features of the uniform models."""
    d_hidden: int = 10
    """Dimensions of the uniform models."""
    uniform_densities: int = 14
    """Densities of the uniform models, from 1 to 1/6."""
    uniform_restarts: int = 4
    """Starts of each of them."""
    uniform_steps: int = 6000
    """Training steps of the uniform models, which take longer to settle."""
    sae_tokens: int = 200_000
    """Activations that an autoencoder is trained on."""
    seed: int = 0
    """Of starting weights, samples and controls."""
    root: str = field(default="runs", metadata={"in_id": False})
    """Folder of all runs."""

    def __post_init__(self) -> None:
        least = {"restarts": 2, "n_importances": 2, "n_densities": 2, "phase_restarts": 1, "uniform_densities": 2,
                 "uniform_restarts": 2, "d_hidden": 1}  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise mi.UserError(f"{name} must be at least {smallest}; found {getattr(self, name)}")
        if self.n_features <= self.d_hidden:
            raise mi.UserError(
                f"superposition needs more features than dimensions; found {self.n_features} and {self.d_hidden}"
            )

    @property
    def training(self) -> Training:
        """How all models are trained."""
        return Training(self.steps, self.batch, self.learning_rate, self.seed)

    def phase_grid(self) -> tuple[list[float], list[float]]:
        """Importances of the second feature and densities."""
        return geometric(*IMPORTANCES, self.n_importances), geometric(LEAST_DENSITY, 1.0, self.n_densities)


@dataclass(frozen=True, eq=False)
class Found:
    """All that the experiment measured."""

    pentagon: Trained
    pentagon_rows: list[PentagonRow]
    phases: Phases
    uniform: Trained
    fractions: list[FractionRow]
    apart: TakenApart
    recoveries: list[tuple[Recovery, Recovery]]


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    print(f"{config}\n", flush=True)
    with mi.reporting.Run.open("superposition", config, root=config.root) as run:
        found = measure(run, config)
        against = compare("superposition", "toy", values(found), settings(config))
        answer = finding(found)
        path = run.finish(report(found, against, answer, config))
        run.log(f"\n{answer}\n\n{against.verdict}")
    finished(path)
    return path


def measure(run: mi.reporting.Run, config: Config) -> Found:
    """Train what no earlier run has trained, and measure."""
    how = config.training
    importances, densities = config.phase_grid()
    cells, weights = grid(importances, densities)
    # Geometric steps of 1/(1 − S); the falling importances of five features are those of the paper's first figures.
    uniform = geometric(1.0, MOST_SPARSE, config.uniform_densities)
    alike = torch.ones(len(uniform), config.n_features)
    falling = (0.9 ** torch.arange(PENTAGON[0])).repeat(len(DENSITIES), 1)
    families = {
        "pentagon.safetensors": partial(train_family, PENTAGON[1], DENSITIES, falling, config.restarts, how),
        "phases.safetensors": partial(train_family, 1, cells, weights, config.phase_restarts, how),
        "uniform.safetensors": partial(
            train_family, config.d_hidden, uniform, alike, config.uniform_restarts,
            replace(how, steps=config.uniform_steps),
        ),
    }  # fmt: skip
    trained = [
        run.part(name, make, Trained.load, lambda made, path: made.save(path)) for name, make in families.items()
    ]
    apart = run.part(
        "autoencoders.safetensors",
        lambda: take_apart(SAE_DENSITIES, config.n_features, config.d_hidden, config.sae_tokens, 1, how),
        TakenApart.load,
        lambda made, path: made.save(path),
    )
    return Found(
        pentagon=trained[0],
        pentagon_rows=pentagon_rows(trained[0], config.seed),
        phases=read_phases(trained[1], importances, densities),
        uniform=trained[2],
        fractions=fraction_rows(trained[2], config.seed),
        apart=apart,
        recoveries=apart.recoveries(config.seed),
    )


# ---- in words ------------------------------------------------------------------------------------------------------


def finding(found: Found) -> str:
    """The answer in a few sentences."""
    dense, sparse = found.pentagon_rows[0], [row for row in found.pentagon_rows if row.density <= SPARSE]
    made, tried = sum(row.pentagons for row in sparse), sum(row.restarts for row in sparse)
    clusters = [row.name for row in found.fractions if row.clusters]
    absent = [row.name for row in found.fractions if not row.clusters]
    half = found.fractions[list(toy.STICKY_FRACTIONS).index("antipodal pair")]
    said = [
        f"Of five features in two dimensions, {said_interval(dense.represented, 1)} are represented when they are "
        f"dense; when they are sparse (1 − S ≤ {SPARSE:g}), {made} of {tried} starts end in a pentagon.",
        f"The phases of two features in one dimension are those of the theory in {found.phases.agrees:.0%} of the "
        f"cells ({found.phases.shuffled:.0%} by chance).",
        f"With {found.uniform.W.shape[-1]} features that are all alike, {said_interval(half.share, 2, percent=True)} "
        f"of the represented ones have half a dimension each.",
    ]
    if clusters:
        said.append(f"Dimensionalities cluster at the fractions of: {', '.join(clusters)}.")
    if absent:
        said.append(f"No cluster that passes its controls at those of: {', '.join(absent)}.")
    found_again, normal = (one.mean_max_cosine for one in found.recoveries[-1])
    said.append(
        f"A sparse autoencoder on the hidden activations finds the directions again with a mean max cosine of "
        f"{said_interval(found_again, 2)} at the sparsest ({said_interval(normal, 2)} on normal activations)."
    )
    return " ".join(said)


def said_interval(one: Interval, digits: int, percent: bool = False) -> str:
    """An estimate with its interval; without one where all restarts agree or there is a single one."""
    estimate, low, high = (float(x) for x in (one.estimate, one.low, one.high))
    shown = [f"{x:.0%}" if percent else f"{x:.{digits}f}" for x in (estimate, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if np.isfinite(low) and low < high else shown[0]


def values(found: Found) -> dict[str, float]:
    """What is compared with expected values."""
    sparse = [row for row in found.pentagon_rows if row.density <= SPARSE]
    ends, linear = per_feature(found.uniform)
    made = {
        "dense: features represented": float(found.pentagon_rows[0].represented.estimate),
        "sparse: share of pentagons": sum(row.pentagons for row in sparse) / sum(row.restarts for row in sparse),
        "without ReLU: most features represented": float(max(row.linear for row in found.pentagon_rows)),
        "phases: agreement with theory": found.phases.agrees,
        "dimensions per feature, dense": float(ends.estimate[0]),
        "dimensions per feature, sparse": float(ends.estimate[-1]),
        "dimensions per feature without ReLU, sparse": float(linear[-1]),
    }
    for density, (ours, normal) in zip(SAE_DENSITIES, found.recoveries, strict=True):
        made[f"autoencoder, density {density:g}: mean max cosine"] = float(ours.mean_max_cosine.estimate)
        made[f"on normal activations, density {density:g}"] = float(normal.mean_max_cosine.estimate)
    return made | {f"share near {row.name}": float(row.share.estimate) for row in found.fractions}


def settings(config: Config) -> dict[str, float]:
    """The settings that expected values belong to."""
    free = ("seed", "root")
    return {name: value for name, value in vars(config).items() if name not in free}


# ---- the page ------------------------------------------------------------------------------------------------------


def report(found: Found, against: Comparison, answer: str, config: Config) -> "mi.reporting.Report":
    """The page."""
    n, d = config.n_features, config.d_hidden
    return mi.reporting.Report(
        title="Toy models of superposition",
        question="Do models store more features than they have dimensions, and in which geometry?",
        answer=answer,
        header=f"x' = ReLU(WᵀWx + b) · 5 features in 2 dimensions, 2 in 1, {n} in {d} · "
        f"{config.steps} steps of Adam ({config.uniform_steps} for the last), {config.batch} samples each",
        command=command(config, __file__),
        baseline=baseline(found),
        sections=(
            pentagon_section(found),
            phase_section(found, config),
            dimensions_section(found),
            fractions_section(found),
            apart_section(found, config),
            mi.reporting.Section("Against expected values", table=against.table()),
        ),
        caveats=(
            "S is the sparsity, the chance that a feature is 0; 1 − S is called its density here. A feature is "
            f"represented if its vector is at least {toy.REPRESENTED:g} long.",
            "Gradient descent does not always find the best arrangement: shares over starts tell how often it does. "
            "The phase diagram and the drawn directions are of the start with the lowest loss on fresh samples.",
            f"Windows around the fractions reach ±{NEAR:g}. A fraction counts as a cluster if the share "
            "in its window is above both controls; the intervals are over models, which share the code and the data's "
            "distribution, and not over architectures.",
            f"The published models are larger (400 features in 30 dimensions). With {n} in {d}, few shapes fit, and "
            "which fractions appear depends on these sizes.",
            "Nothing here says that real models represent features in this way.",
            against.verdict,
        ),
    )


def baseline(found: Found) -> tuple[tuple[str, str], ...]:
    """The tiles: what holds without superposition."""
    most = max(row.linear for row in found.pentagon_rows)
    return (
        ("features of 5 in 2 dimensions without ReLU", f"{most} at most"),
        ("superposition in the phase diagram without ReLU", f"{found.phases.linear:.0%} of the cells"),
        ("dimensions per feature without ReLU", f"{per_feature(found.uniform)[1][-1]:.2f}"),
    )


def pentagon_section(found: Found) -> "mi.reporting.Section":
    """Directions and counts."""
    columns = ("density 1 − S", "represented", "without ReLU", "pentagons", "deviation from 72°", "random directions")
    rows = tuple(
        (f"{row.density:g}", said_interval(row.represented, 1), row.linear, f"{row.pentagons} of {row.restarts}",
         "–" if row.deviation is None else f"{said_interval(row.deviation, 1)}°",
         "–" if row.random is None else f"{row.random:.0f}°")
        for row in found.pentagon_rows
    )  # fmt: skip
    return mi.reporting.Section(
        "Five features in two dimensions",
        "Each feature is a little less important than the one before (factor 0.9). Is there room for all of them?\n\n"
        "Dense features would disturb each other all the time: the two most important ones get a dimension each, as "
        "in PCA, and the rest are dropped. The sparser the features are, the rarer two of them meet, and the more of "
        "them share the plane: first as two antipodal pairs, then all five as a pentagon. A pentagon counts if every "
        "angle between neighbours is within 5° of 72°.",
        figures=(draw.directions(found.pentagon),),
        table=mi.reporting.Table(
            columns, rows,
            "Means and 95% intervals over starts. The deviation is the largest one of a model, where all five "
            "features are represented; beside it that of the same lengths in random directions.",
        ),
    )  # fmt: skip


def phase_section(found: Found, config: Config) -> "mi.reporting.Section":
    """The phase diagram."""
    phases = found.phases
    return mi.reporting.Section(
        "Two features in one dimension: a phase change",
        "Feature 1 has importance 1, feature 2 more or less than that. Three solutions suggest themselves: leave "
        "feature 2 out, give it the dimension alone, or put the two at opposite ends of it. Their losses are known "
        "exactly: I·(p/3 − p²/4) for a feature of importance I that is left out, and (1 + I)·p²/6 for opposite ends, "
        "p the density. The theory takes the least.\n\n"
        f"Trained models fall into the phase of the theory in {phases.agrees:.0%} of {phases.found.numel()} cells, "
        f"taking the best of {config.phase_restarts} starts, and in {phases.single:.0%} with single starts; two maps "
        f"with these shares in random order agree in {phases.shuffled:.0%}. Without a ReLU, {phases.linear:.0%} of the "
        f"cells are in superposition. {differences_text(phases)}",
        figures=(draw.phase_maps(phases), draw.boundary(phases)),
    )


def differences_text(phases: Phases) -> str:
    """Which way the trained models differ from the theory."""
    differ = phases.found != phases.theory
    shared = int((differ & (phases.found == toy.PHASES.index("superposition"))).sum())
    total = int(differ.sum())
    if not total:
        return ""
    why = "there trained models beat the plain solution, whose lengths and bias are not fitted" if shared else ""
    return f"Of the {total} cells that differ, {shared} are in superposition against the theory{'; ' * bool(why)}{why}."


def dimensions_section(found: Found) -> "mi.reporting.Section":
    """Dimensions per feature."""
    ends = per_feature(found.uniform)[0]
    return mi.reporting.Section(
        "Many features that are all alike: dimensions per feature",
        "‖W‖² counts the features that are represented, as their vectors are about 1 long. With dense features there "
        "are as many as dimensions; then the curve falls to a shelf at 1/2, where features come in antipodal pairs, "
        f"and on to {float(ends.estimate[-1]):.2f} at the sparse end. The models without a ReLU stay at 1.",
        figures=(draw.dimensions(found.uniform),),
    )


def fractions_section(found: Found) -> "mi.reporting.Section":
    """Whether dimensionalities stick to fractions."""
    columns = ("shape", "fraction", "share", "interval", "beside", "random", "share − beside", "cluster")
    rows = tuple(
        (row.name, row.fraction, float(row.share.estimate), f"[{row.share.low:.3f}, {row.share.high:.3f}]", row.beside,
         row.random, said_interval(row.excess, 3), "yes" if row.clusters else "no")
        for row in found.fractions
    )  # fmt: skip
    return mi.reporting.Section(
        "Do dimensionalities stick to fractions?",
        "D = ‖W_i‖² / Σ_j (Ŵ_i·W_j)² is the part of a dimension that a feature has. Features that form a regular shape "
        "in a space of their own have equal parts of it: 1/2 in an antipodal pair, 2/3 in a triangle, 2/5 in a "
        "pentagon. Each point is a represented feature; a shape shows as many points on one line.\n\n"
        f"{fractions_text(found.fractions)}",
        figures=(draw.dimensionalities(found.uniform, 0), draw.fraction_bars(found.fractions)),
        table=mi.reporting.Table(
            columns, rows,
            "Shares of the represented features of all uniform models within ±0.01 of a fraction, 95% intervals over "
            "models. beside: what the values up to 0.05 away let expect in the window; random: the same lengths in "
            "random directions.",
        ),
    )  # fmt: skip


def fractions_text(rows: list[FractionRow]) -> str:
    """Where there are clusters and where there are none, in sentences."""
    yes = [f"{row.name} ({row.fraction:.3g}: {row.share.estimate:.1%})" for row in rows if row.clusters]
    no = [row for row in rows if not row.clusters]
    said = [
        f"More features than either control expects lie at: {', '.join(yes)}." if yes else "No fraction stands out."
    ]
    for row in no:
        expected = max(row.beside, row.random)
        how = "no more than" if row.share.estimate <= expected else "not reliably more than"
        said.append(
            f"At {row.name} ({row.fraction:.3g}) lie {row.share.estimate:.1%}, {how} the {expected:.1%} of the "
            "controls."
        )
    return " ".join(said)


def apart_section(found: Found, config: Config) -> "mi.reporting.Section":
    """The autoencoders."""
    columns = ("density 1 − S", "represented", "k", "mean max cosine", "recovered", "on normal activations",
               "recovered there", "random directions")  # fmt: skip
    rows = tuple(
        (f"{float(p):.2g}", ours.n_true, int(k), said_interval(ours.mean_max_cosine, 3),
         said_interval(ours.recovered, 2, percent=True), said_interval(normal.mean_max_cosine, 3),
         said_interval(normal.recovered, 2, percent=True), ours.control)
        for p, k, (ours, normal) in zip(found.apart.density, found.apart.k, found.recoveries, strict=True)
    )  # fmt: skip
    return mi.reporting.Section(
        "Can a sparse autoencoder take the superposition apart?",
        f"Of each of {len(rows)} toy models the hidden activations Wx, {config.d_hidden} numbers a sample, are all "
        "that an autoencoder (TopK, two features for each feature of the toy model) gets to see. Its decoder is "
        "compared with the directions of the represented features.\n\n"
        "The control is the same autoencoder on normal activations with the same mean and covariance. They have the "
        "same shape as a whole, but are no sums of few directions: what it reaches, it reaches by placing many "
        "directions in few dimensions.\n\n"
        f"{apart_text(found.apart, found.recoveries)}",
        table=mi.reporting.Table(
            columns, rows,
            "Intervals are 95%, over the represented features. Recovered: cosine of at least 0.9. k: features a "
            "sample, as many as are active on average.",
        ),
    )  # fmt: skip


def apart_text(apart: TakenApart, recoveries: list[tuple[Recovery, Recovery]]) -> str:
    """Where the autoencoder finds more than its control, in a sentence each."""
    said = []
    for density, (ours, normal) in zip(apart.density.tolist(), recoveries, strict=True):
        one, other = ours.mean_max_cosine, normal.mean_max_cosine
        how = (
            "more than"
            if one.low > other.high
            else "no more than"
            if one.estimate <= other.estimate
            else "hardly more than"
        )
        said.append(
            f"At density {density:.2g} the mean max cosine is {one.estimate:.2f}, {how} the control's "
            f"{other.estimate:.2f}."
        )
    return " ".join(said)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except mi.UserError as error:
        raise SystemExit(f"error: {error}") from None
