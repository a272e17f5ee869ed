"""Path patching: what a sender does to the metric through chosen receivers alone (Wang et al. 2023, appendix B).

1. In the base run the sender writes what it writes in the other run; every other head writes what it writes in the base
   run (pinned); MLPs are live. The inputs of the receivers are recorded.
2. A second run of the base prompts has the receivers' inputs replaced by those recorded; everything else is live.

So of all paths from the sender those count that reach a receiver through MLPs and the residual stream, and from there
whatever follows. Senders and prompts are rows of the same calls, each joining at its sender's layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.engine import Engine, Part
from mechinterp.circuits.exact import Target, reads
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.outputs import site_of, sites
from mechinterp.errors import UserError
from mechinterp.evaluation import provenance, require_behaviour, templates_of
from mechinterp.hooked import suffix
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.metrics import Metric
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, sign_flip_threshold
from mechinterp.tasks.pairs import PromptPairs


@dataclass(frozen=True, repr=False)
class PathPatches(Result):
    """Effects by sender.

    `data` holds, over `source`: `effect` (0 the base run, 1 the other run), `ci_low`, `ci_high` (95%), `passes` (beyond
    the sign-flip threshold over all senders), and `patched` with a further axis `prompt`; over `prompt` alone `base`
    and `other`.
    """

    def top(self, n: int = 10):
        """The senders of largest |effect|."""
        frame = self.to_frame()
        return frame.iloc[np.argsort(-np.abs(frame["effect"].to_numpy()), kind="stable")[:n]].reset_index(drop=True)

    def summary(self) -> str:
        """One line: the receivers, and the largest sender with its interval."""
        best, about = self.top(1).iloc[0], self.about
        return (
            f"paths into {', '.join(about['receivers'])} ({about['direction']}, {about['metric']}): largest "
            f"{best['source']} {best['effect']:.2f} [{best['ci_low']:.2f}, {best['ci_high']:.2f}]; "
            f"{int(self.data['passes'].sum())} of {self.data.sizes['source']} senders pass "
            f"(n={about['n_prompts']}, 95% {about['scope']})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        names = ("effect", "ci_low", "ci_high", "passes")
        return {
            **self.about,
            "source": self.data["source"].values.tolist(),
            **{name: plain(self.data[name]) for name in names},
        }


def path_patch(
    graph: Graph,
    pairs: PromptPairs,
    receivers: Sequence[str],
    senders: Sequence[str] | None = None,
    *,
    direction: str = "noise",
    metric: Metric | str | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> PathPatches:
    """Effects of senders through receivers.

    Args:
        graph: of the model; its destinations are the receivers, its sources the senders. No places.
        pairs: clean and corrupted prompts.
        receivers: such as ["logits"] or ["a9.h6<q>", "a10.h0<q>"].
        senders: such as ["a5.h5", "m3"]; by default every head that writes before the last receiver reads.
        direction: "noise" puts the corrupted run's output of the sender into the clean run, "denoise" the reverse.
        metric: as elsewhere.
        seed: of intervals and thresholds.
        force: go on although the model does not do the task.
        progress: show a progress bar.

    Raises:
        UserError: a graph with places or inputs that the model does not have, an unknown or missing receiver or sender,
            a sender that writes after every receiver has read.
    """
    if graph.positions or graph.qkv == "ungrouped" or not graph.heads_add_up:
        raise UserError(f"path patching has no places, and pins single heads; found {graph!r}. Valid: Graph(model)")
    engine = Engine(graph, pairs, "resample", direction, metric)  # type: ignore[arg-type]
    targets = _receivers(graph, receivers)
    chosen = _senders(graph, receivers, senders)
    if not force:
        ends = (engine.full, engine.empty) if direction == "noise" else (engine.empty, engine.full)
        require_behaviour(engine.metric, *ends)
    patched = torch.zeros(len(chosen), len(pairs))
    with tqdm(total=patched.numel(), desc="path patching", unit="run", disable=not progress) as bar:
        for part in engine.parts():
            patched[:, part.index] = _run(part, [graph.source_index[name] for name in chosen], targets, bar)
    return _result(engine, chosen, receivers, patched.double().numpy(), seed)


def _receivers(graph: Graph, names: Sequence[str]) -> list[Target]:
    """Where the receivers read; UserError if one is unknown."""
    if not names:
        raise UserError("path patching needs receivers, such as ['logits'] or ['a9.h6<q>']; found none")
    for name in names:
        if name not in graph.destination_index:
            raise UserError(f"unknown receiver {name!r}; destinations of {graph.model.info.name} are like "
                            f"{', '.join(one.name for one in graph.destinations[:3])}, …, logits")  # fmt: skip
    found = [target for name in names for target in reads(graph, graph.destinations[graph.destination_index[name]])]
    return list(dict.fromkeys(found))


def _senders(graph: Graph, receivers: Sequence[str], names: Sequence[str] | None) -> list[str]:
    last = max(graph.destinations[graph.destination_index[name]].n_sources for name in receivers)
    if names is None:
        return [source.name for source in graph.sources[:last] if source.kind == "head"]
    for name in names:
        if name not in graph.source_index:
            raise UserError(f"unknown sender {name!r}; sources are like a0.h0, m0, embed")
        if graph.source_index[name] >= last:
            raise UserError(f"sender {name} writes after every receiver ({', '.join(receivers)}) has read")
    return list(names)


def _run(part: Part, senders: list[int], targets: list[Target], bar: tqdm) -> Tensor:
    """`[sender batch]` metric of the second run."""
    engine, graph, index = part.engine, part.graph, part.index
    other = suffix.record(part.model, engine.other, sites(graph), index).activations
    layers = torch.tensor([max(graph.sources[u].layer, 0) for u in senders])
    changed = (part.differences[senders] != 0).any(-1).cpu()  # [sender batch pos]
    starts = torch.where(changed.any(-1), changed.int().argmax(-1) + part.start, engine.base.n_pos)
    base = part.metric(None)[0].cpu()
    made = base.expand(len(senders), -1).clone()
    seen: dict[str, Any] = {}

    def first_run(cases: Tensor) -> Mapping[str, Edit]:
        seen.clear()
        return _pinned(part, other, [senders[i] for i in cases.tolist()]) | _recorders(targets, seen)

    clean = engine.clean_logits if engine.metric.needs_clean else None
    bar.update(int((starts >= engine.base.n_pos).sum()))
    for cases, prompts, _ in replay(part.recording, engine.read, layers, starts, first_run):
        rows = Rows(engine.base, prompts.to(part.model.device), seen["start"])
        join = min(site.layer if site.layer is not None else 0 for site, _ in targets)
        logits = part.recording.logits(int(join), rows, engine.read, _replacers(targets, seen)).cpu()
        answers = engine.pairs.answers.take(prompts)
        made[cases, prompts - index[0]] = engine.metric(logits, answers, None if clean is None else clean[prompts])
        bar.update(len(cases))
    return made


def _pinned(part: Part, other: Mapping[str, Tensor], senders: list[int]) -> dict[str, Edit]:
    """First run: the sender of each row as in the other run, all other heads as in the base run."""
    graph, base = part.graph, part.recording.activations
    sent = [site_of(graph, u) for u in senders]
    made: dict[str, Edit] = {}
    for site in sites(graph):
        rows = torch.tensor([i for i, one in enumerate(sent) if one.whole == site], dtype=torch.long)
        heads = [sent[i].head for i in rows.tolist()]
        if site.name == "z" or len(rows):
            made[site.hook_name] = _pin(part, base[site.hook_name], other[site.hook_name], rows, heads, site.name)
    return made


def _pin(part: Part, base: Tensor, other: Tensor, senders: Tensor, heads: list[Any], name: str) -> Edit:
    def edit(activation: Tensor, rows: Rows) -> Tensor:
        local = part.recording.local(rows)
        made = local.of(base, 1).clone() if name == "z" else activation.clone()
        given = replace(local, index=local.index[senders]).of(other, 1)
        if name == "z":
            made[senders, :, heads] = given[torch.arange(len(senders)), :, heads]
        else:
            made[senders] = given
        return made.to(activation)

    return edit


def _recorders(targets: list[Target], seen: dict[str, Any]) -> dict[str, Edit]:
    """Keep what receivers read, of the rows that have joined, which come first."""

    def keep(name: str) -> Edit:
        def edit(activation: Tensor, rows: Rows) -> Tensor:
            seen[name], seen["start"] = activation.clone(), rows.start
            return activation

        return edit

    return {site.hook_name: keep(site.hook_name) for site, _ in targets}


def _replacers(targets: list[Target], seen: dict[str, Any]) -> dict[str, Edit]:
    """Second run: receivers read what was recorded; rows that had not joined there had nothing new to read."""

    def put(site: Site, heads: list[int | None]) -> Edit:
        def edit(activation: Tensor, rows: Rows) -> Tensor:
            recorded, made = seen.get(site.hook_name), activation.clone()
            if recorded is not None and heads[0] is None:
                made[: len(recorded)] = recorded
            elif recorded is not None:
                made[: len(recorded), :, heads] = recorded[:, :, heads]
            return made

        return edit

    by_site: dict[Site, list[int | None]] = {}
    for site, head in targets:
        by_site.setdefault(site, []).append(head)
    return {site.hook_name: put(site, heads) for site, heads in by_site.items()}


def _result(
    engine: Engine, senders: Sequence[str], receivers: Sequence[str], patched: np.ndarray, seed: int
) -> PathPatches:
    base, other = engine.full.double().numpy(), engine.empty.double().numpy()
    clusters, change, whole = templates_of(engine.pairs), patched - base, other - base
    effect = bootstrap_ratio(change, whole, clusters, seed=seed)
    threshold = sign_flip_threshold(change, clusters, seed=seed) / abs(whole.mean())
    arrays = {
        "effect": ("source", effect.estimate),
        "ci_low": ("source", effect.low),
        "ci_high": ("source", effect.high),
        "passes": ("source", np.abs(effect.estimate) > threshold),
        "patched": (("source", "prompt"), patched),
        "base": ("prompt", base),
        "other": ("prompt", other),
    }
    about = provenance(engine.model, engine.pairs) | {
        "receivers": list(receivers),
        "direction": engine.direction,
        "metric": engine.metric.name,
        "seed": seed,
        "threshold": plain(float(threshold)),
        "scope": interval_scope(clusters),
        "baseline": {"base": float(base.mean()), "other": float(other.mean())},
    }
    return PathPatches(xr.Dataset(arrays, coords={"source": list(senders)}), about)
