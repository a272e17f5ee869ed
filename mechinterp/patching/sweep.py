"""Exact activation patching over every cell of a site, with an interval and two controls for each effect.

1. Record the base run (the corrupted one when denoising, the clean one when noising) and the site of the source run.
2. A cell is a layer, a head where the site has heads, and a set of positions. Where base and source are identical the
   effect is exactly 0 and nothing is run; elsewhere the cell's row begins at the first position that differs.
3. Rows of one layer are batched and replayed from that layer on (cells.py, hooked/suffix.py).
4. The effect of a cell is a ratio of means over prompts: (patched − base) / (source run − base): 0 is the base run, 1
   the run that the activation comes from.
5. Controls: a sign-flip threshold over all cells, and, for the largest, a patch from a donor prompt (`_donor`).

Vig et al. 2020; Meng et al. 2022; Heimersheim & Nanda 2024 on directions and normalisation.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, require_behaviour, templates_of
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import KINDS, Site
from mechinterp.metrics import Metric, as_metric
from mechinterp.patching.cells import Cell, CellRunner, Recordings, Spot, Where, spots
from mechinterp.patching.result import SweepResult
from mechinterp.results import plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference, sign_flip_threshold
from mechinterp.tasks.pairs import PromptPairs

Direction = Literal["denoise", "noise"]
# The largest cells get the donor control: a table of ten is what a reader takes in.
CONTROLLED = 10


def sweep(
    model: HookedModel,
    pairs: PromptPairs,
    site: str = "z",
    positions: Where = "all",
    direction: Direction = "denoise",
    metric: Metric | str | Callable[[Tensor], Tensor] | None = None,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
    max_tokens: int | None = None,
) -> SweepResult:
    """Patch every cell of a site, one at a time, and measure how far the output moves.

    Args:
        model: the hooked model; interventions in force stay in force, in the baselines too.
        pairs: clean and corrupted prompts.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern, mlp_post, … (`model.site_list`).
        positions: "all" patches the whole activation at once; "each" one position at a time (prompts of one length);
            "last" the final one; "roles" each role in turn; or role names ("END,S2"), or indices, each in turn.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
        metric: a metric, its name, or a function of logits `[batch pos d_vocab]` to `[batch]`; the logit difference.
        layers: which to sweep; all by default.
        seed: of the intervals and the controls.
        force: sweep although the model does not do the task.
        progress: show a progress bar.
        max_tokens: rows × positions of a call; by default from the free memory.

    Returns:
        Effects, intervals and controls by cell, and the metric of every prompt.

    Raises:
        UserError: unknown site, positions or direction; a site that the model does not have; a model that does not do
            the task; a source activation that holds NaN.
    """
    if direction not in ("denoise", "noise"):
        raise UserError(f"unknown direction {direction!r}; valid: 'denoise', 'noise'")
    metric = as_metric(metric)
    given, pairs = pairs, metric.prepare(pairs)
    sites = _sites(model, site, layers)
    axis, chosen = spots(pairs, positions)
    read = metric.read(pairs)
    # A plain function, in force or as the metric, must see every prompt, in order, from the first position.
    folds = all(bound.intervention.folds for bound in model.in_force) and read.positions is not None
    recordings = Recordings(model, sites, folds)
    clean, corrupted = (recordings.logits(side, read) for side in (pairs.clean, pairs.corrupted))
    ends = metric(clean, pairs.answers, clean), metric(corrupted, pairs.answers, clean)
    if not force:
        require_behaviour(metric, *ends)
    # The base run, and the run that activations come from.
    (base, end), prompts, source = (ends[::-1], pairs.corrupted, pairs.clean)
    if direction == "noise":
        (base, end), prompts, source = (ends, pairs.clean, pairs.corrupted)
    reference = clean if metric.needs_clean else None
    runner = CellRunner(model, pairs, metric, prompts, recordings, chosen, base, reference, max_tokens)
    heads = range(model.axis_size(sites[0])) if sites[0].kind.head_axis else [None]
    cells = [Cell(s.layer or 0, head, spot) for s in sites for head in heads for spot in range(len(chosen))]
    patched = runner.run(cells, source, f"{site} {direction}" if progress else None).double().numpy()
    donor, control = _donor(pairs, direction)
    arrays, threshold = _statistics(runner, cells, patched, end, donor, templates_of(pairs), seed)
    labels = _labels(model, sites, axis, chosen)
    about = _about(model, given, metric, site, direction, positions, seed) | {
        "baseline": {"clean": float(ends[0].mean()), "corrupted": float(ends[1].mean())},
        "threshold": plain(threshold),
        "control": control,
        "scope": interval_scope(templates_of(pairs)),
        "rows_run": runner.rows_run,
        "rows_identical": runner.rows_identical,
        "pos_labels": _pos_labels(model, pairs, chosen) if axis == "pos" else None,
    }
    return SweepResult(_dataset(arrays, labels, base, end), about)


def _sites(model: HookedModel, name: str, layers: Sequence[int] | None) -> list[Site]:
    """The site in every layer asked for; UserError if the model lacks it or nothing can be written there."""
    kind = Site(name).kind
    if not kind.layered or ("pos" not in kind.axes and "query" not in kind.axes):
        swept = ", ".join(name for name, kind in KINDS.items() if kind.layered)
        raise UserError(f"site {name!r} cannot be swept: it is not in a layer; valid: {swept}")
    present = [s.layer for s in model.site_list if s.name == name]
    wanted = (present or [0]) if layers is None else layers
    return [model.resolve(Site(name, layer), write=True) for layer in wanted]


def _donor(pairs: PromptPairs, direction: Direction) -> tuple[Prompts | None, str]:
    """The prompts that the control patches from, and what they are.

    Denoising claims that a cell brings *this* answer: a prompt with another answer must not do it. Noising claims that
    what differs between the pair matters there: a prompt with the same answer in other words must not hurt.
    """
    if direction == "noise" and pairs.same_answer is not None:
        return pairs.same_answer, "a prompt with the same answer, in other words"
    if pairs.donor is not None:
        return pairs.donor, "a prompt with other words and another answer"
    others = pairs.other_prompts()
    return others, "another pair's clean prompt" if others is not None else "none: no other pair has the same length"


def _statistics(
    runner: CellRunner,
    cells: Sequence[Cell],
    patched: np.ndarray,
    end: Tensor,
    donor: Prompts | None,
    clusters: np.ndarray | None,
    seed: int,
) -> tuple[dict[str, np.ndarray], float]:
    """Arrays by cell, in the order of `cells`, and the threshold that an effect must exceed."""
    base = runner.base.double().numpy()
    whole = end.double().numpy() - base
    change = patched - base
    effect = bootstrap_ratio(change, whole, clusters, seed=seed)
    defined = bool(np.isfinite(effect.estimate).all())
    threshold = sign_flip_threshold(change, clusters, seed=seed) / abs(whole.mean()) if defined else float("nan")
    control, passes = np.full(len(cells), np.nan), np.zeros(len(cells), dtype=bool)
    if donor is not None and defined:
        top = np.argsort(-np.abs(effect.estimate), kind="stable")[:CONTROLLED]
        top = top[effect.estimate[top] != 0]
        donated = runner.run([cells[i] for i in top], donor).double().numpy()
        control[top] = (donated - base).mean(1) / whole.mean()
        beyond = np.sign(change[top].mean(1, keepdims=True)) * (patched[top] - donated)
        specific = paired_difference(beyond, np.zeros_like(beyond), clusters, seed=seed).low > 0
        passes[top] = specific & (np.abs(effect.estimate[top]) > threshold)
    arrays = {"effect": effect.estimate, "ci_low": effect.low, "ci_high": effect.high}
    return {**arrays, "control": control, "passes": passes, "patched": patched}, float(threshold)


def _labels(
    model: HookedModel, sites: Sequence[Site], axis: str | None, chosen: Sequence[Spot]
) -> dict[str, list[Any]]:
    """Dimensions of the grid in order, with the labels along each."""
    labels: dict[str, list[Any]] = {"layer": [site.layer for site in sites]}
    if sites[0].kind.head_axis:
        labels[sites[0].kind.head_axis] = list(range(model.axis_size(sites[0])))
    if axis:
        labels[axis] = [spot.label for spot in chosen]
    return labels


def _pos_labels(model: HookedModel, pairs: PromptPairs, chosen: Sequence[Spot]) -> list[str]:
    """`Mary_3` where every clean prompt has that token there, else the position alone."""
    named = []
    for spot in chosen:
        ids = pairs.clean.tokens[spot.mask]
        same = bool((ids == ids[0]).all())
        named.append(f"{model.token_strings(ids[:1])[0].strip()}_{spot.label}" if same else str(spot.label))
    return named


def _dataset(arrays: dict[str, np.ndarray], labels: dict[str, list[Any]], base: Tensor, end: Tensor) -> xr.Dataset:
    dims = list(labels)
    shape = [len(along) for along in labels.values()]
    grids = {
        name: ([*dims, "prompt"][: len(dims) + values.ndim - 1], values.reshape(*shape, *values.shape[1:]))
        for name, values in arrays.items()
    }
    runs = {"base": ("prompt", base.double().numpy()), "source": ("prompt", end.double().numpy())}
    return xr.Dataset({**grids, **runs}, coords=labels)


def _about(
    model: HookedModel, pairs: PromptPairs, metric: Metric, site: str, direction: str, positions: Where, seed: int
) -> dict[str, Any]:
    """What the result was made from, as plain values."""
    return provenance(model, pairs) | {
        "site": site,
        "direction": direction,
        "metric": metric.name,
        "positions": positions if isinstance(positions, str | int) else list(positions),
        "seed": seed,
    }
