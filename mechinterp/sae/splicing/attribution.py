"""Which features of sparse autoencoders carry a behaviour: attribution patching of every feature at once.

1. Base and source run (clean and corrupted when noising) are recorded once; autoencoders are then spliced into the base
   run with their errors, which changes nothing, and gives the metric's gradient g at every written site.
2. What a feature writes is its activation times its decoder row, so the effect of giving it the value that it has in
   the source run is, to first order, Σ over positions of (f_source − f_base) · ⟨g, decoder row⟩. With several
   autoencoders g has passed through the features of the later ones alone: errors have no gradient.
3. What features do not write is one row more for each autoencoder: its *error* (with a transcoder's skip, and excluded
   positions). Features and error together are the first-order effect of the whole site, ⟨g, y_source − y_base⟩.
4. With `steps` the gradient is a mean along the straight line between the two runs, for one autoencoder at a time and
   without the others (integrated gradients): its effects then add up to the exact effect of patching its site.
5. Effects have intervals over prompts and a sign-flip threshold; beside the largest ones stands the exact effect, from
   a run in which that feature alone has its source values.

Marks et al. 2024, "Sparse Feature Circuits: Discovering and Editing Interpretable Causal Graphs in Language Models",
section 3.1; Sundararajan et al. 2017 on integrated gradients.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, require_behaviour, templates_of
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Positions
from mechinterp.metrics import Metric
from mechinterp.results import plain
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.splicing.effects import ERROR, FeatureEffects, rank_correlation
from mechinterp.sae.splicing.splice import Splice, columns
from mechinterp.sae.splicing.spliced_run import Part, SplicedRun, suffix_logits
from mechinterp.statistics import bootstrap_ratio, interval_scope, sign_flip_threshold
from mechinterp.tasks.pairs import PromptPairs

Direction = Literal["noise", "denoise"]
# Autoencoders and features `[row]`, and effects `[row prompt]`.
Table = tuple[np.ndarray, np.ndarray, np.ndarray]


def attribute(
    model: HookedModel,
    task: PromptPairs,
    sae: SparseAutoencoder | Sequence[SparseAutoencoder],
    metric: Metric | str | None = "logit-diff",
    positions: Positions = None,
    direction: Direction = "noise",
    *,
    steps: int = 1,
    exact: int = 10,
    seed: int = 0,
    force: bool = False,
) -> FeatureEffects:
    """Approximate the effect of patching every feature of one or several autoencoders, one at a time.

    Args:
        model: the hooked model; interventions in force stay in force.
        task: clean and corrupted prompts.
        sae: autoencoder or transcoder, or several, at different sites: all are spliced at once (with several steps,
            each alone).
        metric: a metric or its name.
        positions: where features change; everywhere by default (see `Prompts.select`).
        direction: "noise" gives features of the clean run their corrupted values, "denoise" the reverse.
        steps: 1 for the gradient at the base run, more for integrated gradients.
        exact: of how many features, the largest ones, the exact effect is run, too.
        seed: of the intervals and the threshold.
        force: go on although the model does not do the task.

    Raises:
        UserError: a metric without a gradient; autoencoders that do not fit the model, or two at one site; a model that
            does not do the task.
    """
    run = SplicedRun.of(model, task, sae, metric, positions, direction)
    if steps < 1 or exact < 0:
        raise UserError(f"steps must be at least 1 and exact at least 0; found {steps}, {exact}")
    if run.metric.needs_clean and direction == "noise" and steps == 1:
        raise UserError(
            f"{run.metric.name} has no gradient at the clean run, where it is smallest; valid: direction='denoise', or "
            "steps above 1"
        )
    entries = _Entries(len(run.pairs))
    for part in run.parts():
        for number in range(len(run.splices)):
            for block, tokens in part.tokens(number, steps):
                entries.add(number, block, *tokens)
    if not force:
        clean, corrupted = (run.ends.flip(0) if direction == "denoise" else run.ends).unbind(0)
        require_behaviour(run.metric, clean, corrupted)
    sae_of, feature, change = table = entries.table()
    checked = np.argsort(-np.abs(change.mean(1)), kind="stable")
    checked = checked[feature[checked] != ERROR][:exact]
    return _result(run, task, table, checked, _exact(run, sae_of[checked], feature[checked]), steps, seed)


class _Entries:
    """Effects by autoencoder, feature and prompt, of which only those that there are take room."""

    def __init__(self, n_prompts: int):
        self.n_prompts = n_prompts
        self._kept: list[tuple[np.ndarray, ...]] = []

    def add(self, number: int, prompt: Tensor, feature: Tensor, effect: Tensor) -> None:
        """Summed over equal pairs (prompt, feature)."""
        key, place = torch.unique(torch.stack([feature, prompt.to(feature)]), dim=1, return_inverse=True)
        total = effect.new_zeros(key.shape[1]).index_add_(0, place, effect)
        sae = np.full(key.shape[1], number)
        self._kept.append((sae, *key.cpu().numpy(), total.cpu().numpy()))

    def table(self) -> Table:
        """Autoencoders and features `[row]`, and effects `[row prompt]`; each autoencoder's error first."""
        sae, feature, prompt, effect = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        rows, row = np.unique(np.stack([sae, feature]), axis=1, return_inverse=True)
        size = rows.shape[1] * self.n_prompts
        table = np.bincount(row * self.n_prompts + prompt, effect, size).reshape(-1, self.n_prompts)
        return rows[0], rows[1], table


def _exact(run: SplicedRun, saes: np.ndarray, features: np.ndarray) -> np.ndarray:
    """`[row prompt]` change of the metric when one feature takes its source values at the chosen positions."""
    change = np.zeros((len(features), len(run.pairs)))
    if not len(features):
        return change
    for part in run.parts():
        for number in np.unique(saes).tolist():
            here = np.flatnonzero(saes == number)
            values = _source_values(part, number, torch.as_tensor(features[here], device=run.model.device))
            for column, row in enumerate(here.tolist()):
                whole = values.new_zeros(run.base.tokens.shape)
                whole[part.base.index] = values[..., column]
                splice = Splice(run.splices[number].sae, set={int(features[row]): whole})
                bound = replace(run.bound[number], intervention=splice)
                with torch.no_grad():
                    logits = suffix_logits(part.base, [bound], run.read, {})
                    after = run.values(logits, part.index, part.clean)
                change[row, part.index.numpy()] = (after - run.ends[0, part.index]).double().numpy()
    return change


def _source_values(part: Part, number: int, features: Tensor) -> Tensor:
    """`[batch pos n]` activations of n features: the source run's where features change, else the base run's."""
    mask = part.mask(number)
    values = columns(part.codes(part.base, number, torch.ones_like(mask)), features).unflatten(0, mask.shape)
    values[mask] = columns(part.codes(part.source, number, mask), features)
    return values


def _result(
    run: SplicedRun, task: PromptPairs, table: Table, checked: np.ndarray, exact: np.ndarray, steps: int, seed: int
) -> FeatureEffects:
    """Effects as ratios of means, with intervals, and a threshold that none of null rows passes by chance."""
    sae_of, feature, change = table
    clusters = templates_of(run.pairs)
    base, source = run.ends.double().numpy()
    whole = source - base
    effect = bootstrap_ratio(change, whole, clusters, seed=seed)
    defined = bool(np.isfinite(effect.estimate).all())
    threshold = sign_flip_threshold(change, clusters, seed=seed) / abs(whole.mean()) if defined else float("nan")
    exact_change = np.full(len(change), np.nan)
    exact_change[checked] = exact.mean(1)
    arrays = {
        "sae": ("row", sae_of),
        "feature": ("row", feature),
        "effect": ("row", effect.estimate),
        "ci_low": ("row", effect.low),
        "ci_high": ("row", effect.high),
        "passes": ("row", np.abs(effect.estimate) > threshold),
        "exact": ("row", exact_change / (whole.mean() if defined else np.nan)),
        "mean_change": ("row", change.mean(1)),
        "exact_change": ("row", exact_change),
        "change": (("row", "prompt"), change),
        "base": ("prompt", base),
        "source": ("prompt", source),
    }
    about = provenance(run.model, task) | {
        "metric": run.metric.name,
        "direction": run.direction,
        "positions": "all" if run.positions is None else plain(_as_list(run.positions)),
        "steps": steps,
        "saes": [str(one.writes) for one in run.bound],
        "d_sae": [one.sae.config.d_sae for one in run.splices],
        "threshold": plain(threshold),
        "agreement": plain(rank_correlation(change[checked].mean(1), exact.mean(1))),
        "scope": interval_scope(clusters),
        "seed": seed,
    }
    return FeatureEffects(xr.Dataset(arrays, coords={"row": np.arange(len(change))}), about)


def _as_list(positions: Positions) -> Any:
    if isinstance(positions, Tensor):
        return positions.tolist()
    return list(positions) if isinstance(positions, Sequence) and not isinstance(positions, str) else positions
