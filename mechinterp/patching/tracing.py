"""Causal tracing: where does a model keep what it knows about a subject?

1. Run every fact clean, and keep the site in every layer.
2. Run it noised: Gaussian noise is added to the embeddings of the subject's tokens, `noise` standard deviations of
   those embeddings strong, so that the fact is lost. Several draws; every prompt has noise of its own in each.
3. Run it noised with the clean activation put back at one token, from the subject on, and in one window of layers
   (restore.py). That is a cell.
4. *Total effect*: metric clean − noised. *Indirect effect* of a cell: restored − noised. Both in the metric's units.
   Draws are averaged within a prompt, and so are tokens of the same role, each restored by itself.
5. *Intervals* are over prompts (relations first, where they are enough): a prompt's mean holds the luck of its own
   draws, independent of other prompts', so the spread between prompts holds both sources of variation. With one prompt
   the interval is over its draws.
6. *Controls*: a sign-flip threshold over all cells; and for the largest, the same restoration from the other side of
   the pair: another subject in the same words, at the same positions. What passes is neither "less noise helps" nor
   "the words around the subject came back".

Meng et al. 2022, section 2; their windows of 10 of 48 layers for attention and MLP are scaled to the model's depth.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance, templates_of
from mechinterp.hooked import suffix
from mechinterp.hooked.interventions import Noise
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import Site
from mechinterp.metrics import Metric, as_metric
from mechinterp.patching.restore import Restorer
from mechinterp.patching.subjects import Tokens, subject_of, tokens_of
from mechinterp.patching.trace_result import TraceResult
from mechinterp.results import plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference, sign_flip_threshold
from mechinterp.tasks.pairs import PromptPairs

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
# The largest cells get the control of the other subject: a table of ten is what a reader takes in.
CONTROLLED = 10
OTHER = "the same states of the other side of the pair: another subject in the same words"


def trace(
    model: HookedModel,
    facts: PromptPairs,
    subject: str | tuple[str, str] = ("subject_first", "subject_last"),
    site: str = "resid_post",
    window: int | None = None,
    noise: float = 3.0,
    draws: int = 4,
    metric: Metric | str | Callable[[Tensor], Tensor] | None = "prob",
    *,
    positions: str = "roles",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
    max_tokens: int | None = None,
) -> TraceResult:
    """Noise the subject, restore one state at a time, and measure how much of the answer comes back.

    Args:
        model: the hooked model; interventions in force stay in force in every run.
        facts: prompts that the model completes with their answers, such as `mi.tasks.facts(model)`. The corrupted side,
            another subject in the same words, is the control.
        subject: the role of its token, or the roles of its first and its last.
        site: resid_pre, resid_mid, resid_post, attn_out or mlp_out.
        window: layers that are restored together, around each layer; by default 1 for the residual stream and 10 in 48
            for attention and MLP. Windows end at the first and the last layer.
        noise: strength, in standard deviations of the entries of the subjects' token embeddings.
        draws: of the noise.
        metric: a metric, its name, or a function of logits `[batch pos d_vocab]` to `[batch]`.
        positions: "roles" averages tokens by role: a subject of one token, or the first, middle ones and last of a
            longer one, the next one, further ones, and the last of the prompt; "each" keeps positions apart (prompts
            of one length).
        layers: middles of the windows; all by default.
        seed: of the noise, the intervals and the threshold.
        force: go on although noise takes nothing away.
        progress: show a progress bar.
        max_tokens: rows × positions of a call; by default from the free memory.

    Returns:
        Total and indirect effects with intervals and controls, and the metric of every run.

    Raises:
        UserError: unknown site or role, a subject that a prompt lacks or that comes after the answer is read, settings
            out of range, or noise that takes nothing away.
    """
    metric = as_metric(metric)
    given, facts = facts, metric.prepare(facts)
    windows = _windows(model, site, window, layers)
    tokens = tokens_of(facts, *subject_of(facts, subject), positions)
    noises, std = _noises(model, facts, tokens, noise, draws, seed)
    runner = Restorer(model, facts, metric, site, noises, max_tokens)
    clean, noised = runner.metric_of(facts.clean).double().numpy(), runner.noised().double().numpy().T
    if not force:
        _require_loss(metric, clean, noised)
    spans = [(span, None) for _, span in windows]
    made = runner.run(tokens.cells(spans), facts.clean, f"trace {site}" if progress else None)
    restored = tokens.average(made, len(spans))
    other = tokens.other_subject(facts)

    def from_other(cells: Sequence[tuple[int, int]]) -> np.ndarray:
        """`[cell prompt draw]` the metric with the other subject's states put back."""
        assert other is not None
        made = runner.run(tokens.cells([(windows[at][1], one) for at, one in cells]), other)
        by_label = tokens.average(made, len(cells))
        return np.stack([by_label[cell, one] for cell, (_, one) in enumerate(cells)])

    clusters = templates_of(facts)
    arrays, threshold = _statistics(restored, noised, None if other is None else from_other, clusters, seed)
    about = provenance(model, given) | {
        "site": site,
        "subject": subject if isinstance(subject, str) else list(subject),
        "window": _width(model, site, window),
        "noise": noise,
        "noise_std": noise * std,
        "draws": draws,
        "metric": metric.name,
        "positions": positions,
        "seed": seed,
        "total_effect": _total(clean, noised, clusters, seed),
        "baseline": {
            "clean": float(clean.mean()),
            "noised": float(noised.mean()),
            "other_subject": None if other is None else float(runner.metric_of(other).mean()),
        },
        "threshold": plain(threshold),
        "control": "none: the two sides of a pair have the same subject" if other is None else OTHER,
        "scope": interval_scope(clusters) if len(facts) > 1 else "over draws of the noise, for this prompt",
    }
    return TraceResult(_dataset(arrays, [middle for middle, _ in windows], tokens, restored, noised, clean), about)


def _dataset(
    arrays: dict[str, np.ndarray],
    layers: Sequence[int],
    tokens: Tokens,
    restored: np.ndarray,
    noised: np.ndarray,
    clean: np.ndarray,
) -> xr.Dataset:
    dims = ("layer", tokens.axis)
    variables = {name: (dims, values) for name, values in arrays.items()} | {
        "n": (tokens.axis, tokens.counts()),
        "restored": ((*dims, "prompt", "draw"), restored),
        "noised": (("prompt", "draw"), noised),
        "clean": ("prompt", clean),
    }
    return xr.Dataset(variables, coords={"layer": list(layers), tokens.axis: tokens.labels})


def _width(model: HookedModel, site: str, window: int | None) -> int:
    if site not in SITES:
        raise UserError(f"site {site!r} cannot be traced; valid: {', '.join(SITES)}")
    if window is None:
        return 1 if site.startswith("resid") else max(1, round(model.n_layers * 10 / 48))
    if not 1 <= window <= model.n_layers:
        raise UserError(f"window must be 1 … {model.n_layers} layers; found {window}")
    return window


def _windows(
    model: HookedModel, site: str, window: int | None, layers: Sequence[int] | None
) -> list[tuple[int, tuple[int, int]]]:
    """Of each middle layer the first and the last layer of its window; an even window has one more below."""
    width = _width(model, site, window)
    wanted = range(model.n_layers) if layers is None else layers
    middles = [model.resolve(Site(site, layer), write=True).layer or 0 for layer in wanted]
    if not middles:
        raise UserError(f"no layers given; valid: 0 … {model.n_layers - 1}")
    last = model.n_layers - 1
    return [(at, (max(0, at - width // 2), min(last, at + (width + 1) // 2 - 1))) for at in middles]


def _noises(
    model: HookedModel, pairs: PromptPairs, tokens: Tokens, noise: float, draws: int, seed: int
) -> tuple[list[Noise], float]:
    """The draws of the noise, and the standard deviation of the entries of the subjects' embeddings."""
    if draws < 1:
        raise UserError(f"draws must be at least 1; found {draws}")
    if not 0 < noise < math.inf:
        raise UserError(f"noise must be above 0 standard deviations of the embedding; found {noise}")
    site, prompts = model.resolve(Site("embed"), write=True), pairs.clean
    embedded = [
        suffix.record(model, prompts, [site], index).activations[site.hook_name][tokens.subject[index]]
        for index in chunks(model, len(prompts), prompts.n_pos, read_vocab=False)
    ]
    std = float(torch.cat(embedded).float().std())
    # `[prompt k]` without padding; those of a short subject are repeated.
    inside = [row.nonzero().flatten() for row in tokens.subject]
    width = max(map(len, inside))
    at = torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in inside])
    seeds = np.random.SeedSequence(seed).generate_state(draws).tolist()
    return [Noise(site, noise * std, one, positions=at - prompts.padding.cpu()[:, None]) for one in seeds], std


def _require_loss(metric: Metric, clean: np.ndarray, noised: np.ndarray) -> None:
    """Raise UserError if noise takes nothing away."""
    change = clean.mean() - noised.mean()
    if (change if metric.higher_is_better else -change) <= 0:
        raise UserError(
            f"noise takes nothing away: mean {metric.name} is {clean.mean():.3f} on the clean prompts and "
            f"{noised.mean():.3f} with noise (n={len(clean)}). Trace facts that the model knows (mi.tasks.known), or "
            "go on with force=True"
        )


def _total(clean: np.ndarray, noised: np.ndarray, clusters: np.ndarray | None, seed: int) -> dict[str, float | None]:
    """The total effect with its interval."""
    units, clusters = _units(clean[:, None] - noised, clusters)
    found = bootstrap_ratio(units, None, clusters, seed=seed)
    return plain({"estimate": float(found.estimate), "ci_low": float(found.low), "ci_high": float(found.high)})


def _units(values: np.ndarray, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """What is resampled, `[… unit]` from `[… prompt draw]`: prompts, or the draws of a single one."""
    return (values[..., 0, :], None) if values.shape[-2] == 1 else (values.mean(-1), clusters)


def _statistics(
    restored: np.ndarray,
    noised: np.ndarray,
    from_other: Callable[[Sequence[tuple[int, int]]], np.ndarray] | None,
    clusters: np.ndarray | None,
    seed: int,
) -> tuple[dict[str, np.ndarray], float]:
    """Arrays `[layer label]`, and the threshold that an effect must exceed.

    Args:
        restored: `[layer label prompt draw]`; noised: `[prompt draw]`.
        from_other: from the layer and the label of cells to `[cell prompt draw]` with the other subject's states.
        clusters: `[prompt]`.
        seed: of intervals and threshold.
    """
    effects, clusters = _units(restored - noised, clusters)
    arrays = {name: np.full(effects.shape[:2], np.nan) for name in ("indirect", "ci_low", "ci_high", "control")}
    passes = np.zeros(effects.shape[:2], dtype=bool)
    has = np.isfinite(effects[0])
    for one, mine in enumerate(has):
        of = None if clusters is None else clusters[mine]
        found = bootstrap_ratio(effects[:, one, mine], None, of, seed=seed)
        arrays["indirect"][:, one], arrays["ci_low"][:, one], arrays["ci_high"][:, one] = vars(found).values()
    # A role's mean over the prompts that have it is a mean over all, with zeros for the others, weighted up.
    weighted = np.nan_to_num(effects) * (has.shape[1] / has.sum(1))[:, None]
    threshold = sign_flip_threshold(weighted, clusters, seed=seed)
    if from_other is not None:
        size = np.abs(arrays["indirect"])
        order = np.argsort(-size, axis=None, kind="stable")[:CONTROLLED]
        top = [divmod(int(cell), size.shape[1]) for cell in order if size.flat[cell] > 0]
        donated, _ = _units(from_other(top) - noised, None)
        for (layer, one), theirs in zip(top, donated, strict=True):
            mine, sign = has[one], np.sign(arrays["indirect"][layer, one])
            of = None if clusters is None else clusters[mine]
            arrays["control"][layer, one] = theirs[mine].mean()
            gap = paired_difference(sign * effects[layer, one, mine], sign * theirs[mine], of, seed=seed)
            passes[layer, one] = float(gap.low) > 0 and size[layer, one] > threshold
    return {**arrays, "passes": passes}, float(threshold)
