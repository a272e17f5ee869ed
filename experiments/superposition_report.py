"""The page of the experiment `superposition`: what was found, in words, figures and tables."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import mechinterp as mi
from experiments import superposition_figures as draw
from experiments.expected import Comparison
from experiments.settings import command
from experiments.superposition_models import PentagonRow, Phases, Trained, per_feature
from experiments.superposition_sae import TakenApart
from experiments.superposition_shapes import NEAR, SHAPES, TOGETHER, Sets, ShapeRow
from mechinterp.sae.toys import toy_models as toy
from mechinterp.sae.toys.known_dictionary import Recovery
from mechinterp.statistics import Interval

if TYPE_CHECKING:
    from experiments.superposition import Config

SPARSE = 0.1  # densities up to this one are where a pentagon is asked for


@dataclass(frozen=True, eq=False)
class Found:
    """All that the experiment measured."""

    pentagon: Trained
    pentagon_rows: list[PentagonRow]
    phases: Phases
    uniform: Trained
    sets: Sets
    shapes: list[ShapeRow]
    apart: TakenApart
    recoveries: list[tuple[Recovery, Recovery]]

    @property
    def pentagons(self) -> tuple[int, int]:
        """Starts that end in a pentagon where features are sparse, and how many there were."""
        sparse = [row for row in self.pentagon_rows if row.density <= SPARSE]
        return sum(row.pentagons for row in sparse), sum(row.restarts for row in sparse)


def finding(found: Found) -> str:
    """The answer in a few sentences."""
    made, tried = found.pentagons
    yes = [f"{row.name}s (D = {row.fraction:.3g})" for row in found.shapes if row.found]
    no = [f"{row.name} ({row.fraction:.3g})" for row in found.shapes if not row.found]
    said = [
        f"Of five features in two dimensions, {said_interval(found.pentagon_rows[0].represented, 1)} are represented "
        f"when they are dense; when they are sparse (1 − S ≤ {SPARSE:g}), {made} of {tried} starts end in a pentagon.",
        f"Two features in one dimension are in the phase of the theory in {found.phases.agrees:.0%} of the cells "
        f"({found.phases.shuffled:.0%} by chance).",
        f"{found.uniform.W.shape[-1]} features that are all alike form exact {' and '.join(yes)}." if yes else "",
        f"Of the published shapes and their fractions these do not reproduce: {', '.join(no)}." if no else "",
        apart_text(found.apart, found.recoveries),
    ]
    return " ".join(one for one in said if one)


def said_interval(one: Interval, digits: int, percent: bool = False) -> str:
    """An estimate with its interval; without one where all restarts agree or there is a single one."""
    estimate, low, high = (float(x) for x in (one.estimate, one.low, one.high))
    shown = [f"{x:.0%}" if percent else f"{x:.{digits}f}" for x in (estimate, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if np.isfinite(low) and low < high else shown[0]


def report(found: Found, against: Comparison, answer: str, config: "Config", script: str) -> "mi.reporting.Report":
    """The page."""
    n, d = found.uniform.W.shape[-1], found.uniform.W.shape[-2]
    most = max(row.linear for row in found.pentagon_rows)
    return mi.reporting.Report(
        title="Toy models of superposition",
        question="Do models store more features than they have dimensions, and in which geometry?",
        answer=answer,
        header=f"x' = ReLU(WᵀWx + b) · 5 features in 2 dimensions, 2 in 1, {n} in {d} · "
        f"{config.steps} steps of Adam ({config.uniform.how.steps} for the last)",
        command=command(config, script),
        baseline=(
            ("features of 5 in 2 dimensions without ReLU", f"{most} at most"),
            ("superposition in the phase diagram without ReLU", f"{found.phases.linear:.0%} of the cells"),
            ("dimensions per feature without ReLU", f"{per_feature(found.uniform)[1][-1]:.2f}"),
        ),
        sections=(
            pentagon_section(found),
            phase_section(found, config),
            dimensions_section(found),
            shapes_section(found),
            apart_section(found),
            mi.reporting.Section("Against expected values", table=against.table()),
        ),
        caveats=(
            "S is the sparsity, the chance that a feature is 0; 1 − S is called its density here. A feature is "
            f"represented if its vector is at least {toy.REPRESENTED:g} long.",
            "Gradient descent does not always find the best arrangement: shares over starts tell how often it does. "
            "The phase diagram and the drawn directions are of the start with the lowest loss on fresh samples.",
            f"The densities of the uniform models and ±{NEAR:g} were fixed before models of these sizes were trained; "
            "all represented features at all densities count. To read shapes off sets was decided after a first run at "
            "the size of the paper, in which most features near 2/5 were in no pentagon.",
            "Which shapes appear depends on the sizes, the training and the densities; the paper's largest models have "
            "400 features in 30 dimensions (--preset paper).",
            "Nothing here says that real models represent features in this way.",
            against.verdict,
        ),
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


def phase_section(found: Found, config: "Config") -> "mi.reporting.Section":
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
    """Dimensions per feature, and what there is at every density."""
    ends, linear = per_feature(found.uniform)
    n, d = found.uniform.W.shape[-1], found.uniform.W.shape[-2]
    counts = [[found.sets.shape(name, exact).sum((1, 2)) for name in SHAPES] for exact in (True, False)]
    made = [[f"{exact} of {alike}" if alike else "" for exact, alike in zip(*row, strict=True)]
            for row in np.array(counts).transpose(2, 0, 1)]  # fmt: skip
    columns = ("1/(1 − S)", "represented", "dimensions each", "without ReLU", *("{} in {}".format(*one) for one in
               SHAPES.values()))  # fmt: skip
    rows = tuple(
        (f"{1 / p:.2f}", f"{kept:.0f}", f"{each:.3f}", f"{alone:.2f}", *shapes)
        for p, kept, each, alone, shapes in zip(
            found.uniform.density.tolist(), found.sets.kept.sum((1, 2)) / found.uniform.W.shape[1], ends.estimate,
            linear, made, strict=True,
        )
    )  # fmt: skip
    return mi.reporting.Section(
        "Many features that are all alike: dimensions per feature",
        "The vector of a feature that is represented is about 1 long, so ‖W‖² counts them, and m / ‖W‖² is what each "
        "has of the m dimensions. Dense features fill the dimensions as in PCA, without a choice: each is there a "
        f"little (√(m/n) = {(d / n) ** 0.5:.2f} long) and none is represented. Sparser ones are; the curve falls "
        "to a shelf at 1/2, where features come in antipodal pairs, and on to "
        f"{float(ends.estimate[-1]):.2f} at the sparse end. The models without a ReLU stay at 1.",
        figures=(draw.dimensions(found.uniform),),
        table=mi.reporting.Table(
            columns, rows,
            f"represented: mean over {found.uniform.W.shape[1]} starts. The last columns are of the next section, "
            "5 in 2 the pentagon: how many features are in exact shapes, of those in sets of as many features and "
            "dimensions; in all starts together.",
            max_rows=40,
        ),
    )  # fmt: skip


def shapes_section(found: Found) -> "mi.reporting.Section":
    """Whether features form the published shapes."""
    columns = ("shape", "fraction", "in such sets", "their D", "exact", "random directions", "D near the fraction",
               "of these in such sets")  # fmt: skip
    rows = tuple(
        ("{} ({} in {})".format(row.name, *SHAPES[row.name]), row.fraction, row.alike,
         f"{row.low:.2f} to {row.high:.2f}" if row.alike else "–", row.exact, row.random,
         row.near, row.near_alike)
        for row in found.shapes
    )  # fmt: skip
    return mi.reporting.Section(
        "Do features stick to the published shapes and fractions?",
        "D = ‖W_i‖² / Σ_j (Ŵ_i·W_j)² is the part of a dimension that a feature has. Features that form a regular shape "
        "in a space of their own have equal parts of it: 1/2 in an antipodal pair, 2/3 in a triangle, 2/5 in a "
        "pentagon. Each point is a represented feature; those of an exact shape are coloured.\n\n"
        f"Features belong to one set if the cosines between them are above {TOGETHER:g}, directly or through others. A "
        "set of 5 features that have 2 dimensions in sum could be a pentagon, and is one, exactly, if each has 2/5 to "
        f"±{NEAR:g}.\n\n"
        f"{shapes_text(found.shapes, found.uniform)}",
        figures=(draw.dimensionalities(found.uniform, found.sets, 0),),
        table=mi.reporting.Table(
            columns, rows,
            "Counts of features over all densities and starts. in such sets: of as many features and dimensions, "
            "rounded; exact: in such sets where every D is the fraction; random directions: in such sets, the most of "
            "any draw with the same lengths. The last two columns: how many features have the fraction, whatever they "
            "belong to, and how many of them are in such a set.",
        ),
    )  # fmt: skip


def said_densities(row: ShapeRow, trained: Trained) -> str:
    """Where a shape is found, as 1/(1 − S)."""
    if row.first is None or row.last is None:
        return "–"
    ends = [f"{1 / float(trained.density[one]):.1f}" for one in (row.first, row.last)]
    return ends[0] if row.first == row.last else f"{ends[0]} to {ends[1]}"


def shapes_text(rows: list[ShapeRow], trained: Trained) -> str:
    """Which shapes there are and which there are not, in sentences."""
    yes = [
        f"{row.exact} features in {row.name}s (1/(1 − S) = {said_densities(row, trained)})" for row in rows if row.found
    ]
    near = [f"{row.name} {row.low:.2f} to {row.high:.2f}" for row in rows if row.alike > row.random and not row.found]
    none = [row.name for row in rows if row.alike <= row.random]
    lone = [row for row in rows if row.near > 2 * row.near_alike]
    said = [
        f"Exact shapes: {', '.join(yes)}." if yes else "No exact shape is more frequent than in random directions.",
        f"Sets of the right size that overlap with features outside, so that their D differ: {', '.join(near)}."
        if near
        else "",
        f"Not found: {', '.join(none)}." if none else "",
        "A fraction alone proves no shape. "
        + " ".join(
            f"Of {row.near} features with D near {row.fraction:.3g}, {row.near_alike} are in a set like a {row.name}."
            for row in lone
        )
        + " The others are in other sets, such as pairs that overlap with other pairs."
        if lone
        else "",
    ]
    return " ".join(one for one in said if one)


def apart_section(found: Found) -> "mi.reporting.Section":
    """The autoencoders."""
    columns = ("density 1 − S", "represented", "k", "mean max cosine", "recovered", "on normal activations",
               "recovered there", "random directions")  # fmt: skip
    rows = tuple(
        (f"{float(p):.2g}", ours.n_true, int(k), said_interval(ours.mean_max_cosine, 3),
         said_interval(ours.recovered, 2, percent=True), said_interval(normal.mean_max_cosine, 3),
         said_interval(normal.recovered, 2, percent=True), ours.control)
        for p, k, (ours, normal) in zip(found.apart.density, found.apart.k, found.recoveries, strict=True)
    )  # fmt: skip
    n, d = found.apart.W.shape[-1], found.apart.W.shape[-2]
    return mi.reporting.Section(
        "Can a sparse autoencoder take the superposition apart?",
        f"Of each of {len(rows)} toy models ({n} features in {d} dimensions) the hidden activations Wx, {d} numbers a "
        "sample, are all that an autoencoder (TopK, two features for each feature of the toy model) gets to see. Its "
        "decoder is compared with the directions of the represented features.\n\n"
        "The control is the same autoencoder on normal activations with the same mean and covariance. They have the "
        "same shape as a whole, but are no sums of few directions: what it reaches, it reaches by placing many "
        "directions in few dimensions.\n\n"
        f"{apart_text(found.apart, found.recoveries)} The denser the features, the more of them are active at once "
        f"(k in the table) in {d} dimensions.",
        table=mi.reporting.Table(
            columns, rows,
            "Intervals are 95%, over the represented features. Recovered: cosine of at least 0.9. k: features a "
            "sample, as many as are active on average.",
        ),
    )  # fmt: skip


def apart_text(apart: TakenApart, recoveries: list[tuple[Recovery, Recovery]]) -> str:
    """What the autoencoders recover, in a sentence."""
    shares = [
        f"{ours.recovered.estimate:.0%} (1 − S = {p:.2g})"
        for p, (ours, _) in zip(apart.density.tolist(), recoveries, strict=True)
    ]
    most = max(float(normal.recovered.estimate) for _, normal in recoveries)
    return (
        "Of the represented features' directions, sparse autoencoders on the hidden activations recover "
        f"{', '.join(shares)}; on normal activations {most:.0%} at most."
    )
