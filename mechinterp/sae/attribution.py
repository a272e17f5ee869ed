"""Which features of sparse autoencoders carry a behaviour: attribution patching of every feature at once.

1. Base and source run (clean and corrupted when noising) are recorded once; autoencoders are then spliced into the base
   run with their errors, which changes nothing, and gives the metric's gradient g at every written site.
2. What a feature writes is its activation times its decoder row, so the effect of giving it the value that it has in
   the source run is, to first order, Σ over positions of (f_source − f_base) · ⟨g, decoder row⟩. With several
   autoencoders g has passed through the features of the later ones alone: errors have no gradient.
3. What features do not write is one row more for each autoencoder: its *error* (with a transcoder's skip, and excluded
   positions). Features and error together are the first-order effect of the whole site, ⟨g, y_source − y_base⟩.
4. With `steps` the gradient is a mean along the straight line between the two runs, for one autoencoder at a time
   (integrated gradients): the effects of one autoencoder then add up to the exact effect of patching its site.
5. Effects have intervals over prompts and a sign-flip threshold; beside the largest ones stands the exact effect, from
   a run in which that feature alone has its source values.

Marks et al. 2024, "Sparse Feature Circuits: Discovering and Editing Interpretable Causal Graphs in Language Models",
section 3.1; Sundararajan et al. 2017 on integrated gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, require_behaviour, templates_of
from mechinterp.hooked import forward, schedule, suffix
from mechinterp.hooked.forward import Bound
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Positions, Prompts
from mechinterp.hooked.suffix import Levers, Read, Recording
from mechinterp.metrics import Metric, as_metric
from mechinterp.results import plain
from mechinterp.sae.autoencoder import Codes, SparseAutoencoder
from mechinterp.sae.feature_effects import ERROR, FeatureEffects, rank_correlation
from mechinterp.sae.kernels import Entries
from mechinterp.sae.splice import Splice, columns, frozen, kept_positions
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
        sae: autoencoder or transcoder, or several, at different sites: all are spliced at once.
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
    run = _Run.of(model, task, sae, metric, positions, direction)
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
        clean, corrupted = (run.ends[::-1] if direction == "denoise" else run.ends).unbind(0)
        require_behaviour(run.metric, clean, corrupted)
    sae_of, feature, change = table = entries.table()
    checked = np.argsort(-np.abs(change.mean(1)), kind="stable")
    checked = checked[feature[checked] != ERROR][:exact]
    return _result(run, task, table, checked, _exact(run, sae_of[checked], feature[checked]), steps, seed)


# ---- runs ---------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What is attributed, and how.

    Attributes:
        base, source: prompts of the run that is changed, and of the run that values come from.
        splices: of every autoencoder, with its error; `bound` to the model.
        chosen: `[prompt pos]` bool, where features change.
        ends: `[2 prompt]` metric of the base and the source run, filled as parts are recorded.
    """

    model: HookedModel
    pairs: PromptPairs
    metric: Metric
    read: Read
    base: Prompts
    source: Prompts
    splices: list[Splice]
    bound: list[Bound]
    chosen: Tensor
    direction: str
    positions: Positions
    ends: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ends = torch.full((2, len(self.pairs)), torch.nan)

    @classmethod
    def of(
        cls,
        model: HookedModel,
        task: PromptPairs,
        sae: SparseAutoencoder | Sequence[SparseAutoencoder],
        metric: Metric | str | None,
        positions: Positions,
        direction: str,
    ) -> "_Run":
        """Checked. Raises UserError; see `attribute`."""
        if direction not in ("noise", "denoise"):
            raise UserError(f"unknown direction {direction!r}; valid: 'noise', 'denoise'")
        saes = [sae] if isinstance(sae, SparseAutoencoder) else list(sae)
        metric = as_metric(metric)
        pairs = metric.prepare(task)
        read = metric.read(pairs)
        if read.positions is None or metric.name == "rank":
            raise UserError(f"attribution needs a metric of the task's positions with a gradient; found {metric.name}")
        if not all(one.intervention.folds for one in model.in_force):
            raise UserError("a function of the whole batch is in force; attribution runs some prompts at a time")
        splices = [Splice(one) for one in saes]
        bound = forward.bind(model, splices)
        written = [one.writes.hook_name for one in bound]
        if not saes or len(set(written)) < len(written):
            raise UserError(
                f"autoencoders at different sites are needed, at least one; found: {', '.join(written) or 'none'}"
            )
        base, source = (side.to(model.device) for side in (pairs.clean, pairs.corrupted))
        if direction == "denoise":
            base, source = source, base
        chosen = _chosen(pairs, positions).to(model.device) & base.real
        return cls(model, pairs, metric, read, base, source, splices, bound, chosen, direction, positions)

    @property
    def levers(self) -> Levers | None:
        """Embeddings lie before the blocks that can be replayed."""
        inside = all(site.layer is not None for one in self.bound for site in (one.reads, one.writes))
        return None if inside else Levers(False, False, False)

    def parts(self) -> Iterator["_Part"]:
        """All prompts, some at a time, recorded; their ends are known afterwards."""
        for index in torch.arange(len(self.pairs)).split(self._rows_per_call):
            yield _Part(self, index)

    @property
    def _rows_per_call(self) -> int:
        """Prompts of which a forward and backward fit into a quarter of the free memory."""
        model, n_pos = self.model, self.base.n_pos
        config = model.bridge.cfg
        layer = 20 * model.d_model + 6 * (getattr(config, "d_mlp", None) or 0) + 3 * model.n_heads * n_pos
        vocab = 0 if self.read.columns is not None else 4 * model.d_vocab // n_pos
        wide = 2 * 4 * max(one.sae.config.d_sae for one in self.splices)
        per_prompt = n_pos * (model.dtype.itemsize * (model.n_layers * layer + vocab) + wide)
        best = schedule.max_tokens(model, n_pos, self.read.columns is None) // n_pos
        return max(1, min(best, schedule.free_bytes(model) // 4 // per_prompt))

    def values(self, logits: Tensor, index: Tensor, clean: Tensor | None) -> Tensor:
        """`[batch]` metric, on the CPU."""
        return self.metric(logits.cpu(), self.pairs.answers.take(index), clean)


def _chosen(pairs: PromptPairs, positions: Positions) -> Tensor:
    """`[prompt pos]` bool; of an answer that teacher forcing appended nothing is chosen."""
    chosen = pairs.clean.select(positions)
    if pairs.appended is None:
        return chosen
    if positions is not None and not isinstance(positions, str):
        raise UserError("positions of prompts with answers of several tokens must be roles, or None for all")
    return chosen & (torch.arange(pairs.clean.n_pos) < (pairs.clean.n_pos - pairs.appended)[:, None])


class _Part:
    """Some prompts of a run, recorded on both sides without splices."""

    def __init__(self, run: _Run, index: Tensor):
        self.run, self.index = run, index
        sites = list(dict.fromkeys(site for one in run.bound for site in (one.reads, one.writes)))
        with torch.no_grad():
            self.base, self.source = (
                suffix.record(run.model, prompts, sites, index, run.levers) for prompts in (run.base, run.source)
            )
            logits = [one.base_logits(run.read).cpu() for one in (self.base, self.source)]
        self.clean = logits[0 if run.direction == "noise" else 1] if run.metric.needs_clean else None
        for number, one in enumerate(logits):
            run.ends[number, index] = run.values(one, index, self.clean).float()
        self.chosen = run.chosen[self.base.index]
        self._grads: dict[int, Tensor] | None = None

    def _rows(self, recording: Recording) -> Rows:
        return Rows(recording.prompts, recording.index)

    def mask(self, number: int) -> Tensor:
        """`[batch pos]` bool: chosen positions that are spliced in both runs."""
        exclusion = self.run.splices[number].exclusion
        kept = [kept_positions(exclusion, self._rows(one)) for one in (self.base, self.source)]
        return self.chosen & kept[0] & kept[1]

    def written(self, recording: Recording, number: int) -> Tensor:
        """`[batch pos d_out]` activation of the written site, heads side by side."""
        return recording.activations[self.run.bound[number].writes.hook_name].flatten(2)

    def codes(self, recording: Recording, number: int, mask: Tensor) -> Codes:
        """Features at the positions of a mask `[batch pos]`, `[token feature]`."""
        x = recording.activations[self.run.bound[number].reads.hook_name].flatten(2)[mask]
        with torch.no_grad():
            sae = self.run.splices[number].sae
            return frozen(sae, x.to(sae.W_enc)).codes

    def tokens(self, number: int, steps: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Of the source and the base run, and of the error: prompts `[entry]`, and features and effects `[entry]`."""
        sae = self.run.splices[number].sae
        weight, mask = sae.W_dec.detach(), self.mask(number)
        g = self.gradient(number, steps).flatten(2).to(weight)
        block = self.base.index[:, None].expand_as(mask)[mask]
        rest = (self.written(self.source, number) - self.written(self.base, number)).to(weight)
        for recording, sign in ((self.source, 1.0), (self.base, -1.0)):
            codes = self.codes(recording, number, mask)
            with torch.no_grad():
                rest[mask] -= sign * codes.selection.decode(codes.values, weight)
            values, feature, row = codes.sparse()
            pairs = Entries.of_flat(row * sae.config.d_sae + feature, len(block), sae.config.d_sae)
            slope = pairs.products(weight, g[mask]).double()
            yield block[row], (feature, sign * values.double() * slope)
        missed = ((g.double() * rest.double()).sum(-1) * self.chosen).sum(-1)
        yield self.base.index, (torch.full_like(self.base.index, ERROR), missed)

    def gradient(self, number: int, steps: int) -> Tensor:
        """Of the metric at a written site: at the base run, or on average on the way to the source run."""
        if steps == 1:
            if self._grads is None:
                self._grads = self._taps(range(len(self.run.bound)), None)
            return self._grads[number]
        hook = self.run.bound[number].writes.hook_name
        whole = self.source.activations[hook] - self.base.activations[hook]
        whole = whole * self.chosen.reshape(*self.chosen.shape, *[1] * (whole.ndim - 2))
        shares = [(step + 0.5) / steps for step in range(steps)]
        return torch.stack([self._taps([number], share * whole)[number] for share in shares]).mean(0)

    def _taps(self, numbers: Sequence[int], move: Tensor | None) -> dict[int, Tensor]:
        """Gradients at written sites by number, all splices in force; `move` is added to the one site first."""
        run = self.run
        hooks = {number: run.bound[number].writes.hook_name for number in numbers}
        leaves = {number: torch.zeros_like(self.base.activations[hook]) for number, hook in hooks.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        edits = {hook: partial(_tap, leaves[number], move) for number, hook in hooks.items()}
        with torch.enable_grad():
            logits = _logits(self.base, run.bound, run.read, edits)
            value = run.values(logits, self.index, self.clean).sum()
            grads = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))


def _tap(leaf: Tensor, move: Tensor | None, activation: Tensor, rows: Rows) -> Tensor:
    return activation + leaf if move is None else activation + move.to(activation) + leaf


def _logits(recording: Recording, bound: Sequence[Bound], read: Read, edits: Mapping[str, forward.Edit]) -> Tensor:
    """Of the recorded run with more interventions in force, from the first site that they read."""
    more = replace(recording, bound=[*recording.bound, *bound])
    first = min((one.reads.layer or 0 for one in bound), default=0)
    return more.logits(first, Rows(recording.prompts, recording.index), read, edits)


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


# ---- the exact effect ---------------------------------------------------------------------------------------------


def _exact(run: _Run, saes: np.ndarray, features: np.ndarray) -> np.ndarray:
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
                    logits = _logits(part.base, [bound], run.read, {})
                    after = run.values(logits, part.index, part.clean)
                change[row, part.index.numpy()] = (after - run.ends[0, part.index]).double().numpy()
    return change


def _source_values(part: _Part, number: int, features: Tensor) -> Tensor:
    """`[batch pos n]` activations of n features: the source run's where features change, else the base run's."""
    mask = part.mask(number)
    values = columns(part.codes(part.base, number, torch.ones_like(mask)), features).unflatten(0, mask.shape)
    values[mask] = columns(part.codes(part.source, number, mask), features)
    return values


# ---- numbers ------------------------------------------------------------------------------------------------------


def _result(
    run: _Run, task: PromptPairs, table: Table, checked: np.ndarray, exact: np.ndarray, steps: int, seed: int
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
