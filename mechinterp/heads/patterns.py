"""Heads by what they attend to: previous-token, duplicate-token, induction heads, and any pattern given as a function.

1. Prompts are random tokens written down twice (tokens.py), or the user's own.
2. A head's score is the mean over queries of its attention to the key that the pattern asks for. Queries are all
   positions of the last copy for induction (key = query - period + 1) and duplicate tokens (key = query - period);
   all queries for the positional patterns. Position 0 is left out and reported apart (kinds.py).
3. Scores are taken inside the forward, a layer at a time: no pattern is kept.
4. Intervals over prompts. A null that could be as large: for induction and duplicate tokens the same queries and keys
   where the last copy holds fresh tokens, so that nothing repeats; for positional patterns (and the user's own) the
   larger of attention to the key before, to the key after, and uniform attention 1 / (query + 1).
5. A head passes if its interval lies above the null's by more than `MARGIN`.

Olsson et al. 2022.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance
from mechinterp.heads.kinds import CONTENT, POSITIONAL, Asked, Kind, shifted, uniform
from mechinterp.heads.reading import read
from mechinterp.heads.tokens import as_prompts, default_period, fresh, repeated_tokens
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope

Kinds = str | Mapping[str, Kind] | Sequence[str | Mapping[str, Kind]] | None
# A smaller difference of attention than this is no pattern, however certain it is.
MARGIN = 0.01
# Fresh prompts are a quarter of the others, at least four: they cost a forward too, and each has `period` queries.
FRESH_SHARE, FRESH_LEAST = 4, 4


@dataclass(frozen=True, repr=False)
class PatternResult(Result):
    """Scores of every head by kind of pattern.

    `data` holds over `kind layer head`: `score`, `ci_low`, `ci_high` (95%), `null`, `null_low`, `null_high`, `passes`;
    over `kind`: `uniform`, what uniform attention would score; `scores` with a further axis `prompt`.
    """

    @property
    def kinds(self) -> list[str]:
        """The kinds that were scored."""
        return [str(kind) for kind in self.data["kind"].values]

    def grid(self, kind: str, name: str = "score") -> np.ndarray:
        """`[layer head]` of one kind: the score, or another of the arrays. Raises UserError for an unknown kind."""
        if kind not in self.kinds:
            raise UserError(f"unknown kind {kind!r}; this result has: {', '.join(self.kinds)}")
        return self.data[name].sel(kind=kind).values

    def ranking(self, kind: str) -> list[tuple[int, int]]:
        """(layer, head), highest score first."""
        grid = self.grid(kind)
        order = np.argsort(-grid, axis=None, kind="stable")
        return [(int(at) // grid.shape[1], int(at) % grid.shape[1]) for at in order]

    def passing(self, kind: str) -> list[tuple[int, int]]:
        """(layer, head) of those that pass, highest score first."""
        passes = self.grid(kind, "passes")
        return [head for head in self.ranking(kind) if passes[head]]

    def top(self, kind: str | int | None = None, n: int = 10) -> pd.DataFrame:
        """The highest scores of a kind; without one, the heads that pass by their highest score over all kinds but
        `first_token`, which most heads of most models have."""
        if isinstance(kind, int):
            kind, n = None, kind
        if kind is not None:
            return pd.DataFrame([self._row(kind, head) for head in self.ranking(kind)[:n]])
        rows = [self._row(name, head) for name in self.kinds if name != "first_token" for head in self.passing(name)]
        return pd.DataFrame(sorted(rows, key=lambda row: -row["score"])[:n], columns=self._columns())

    def _columns(self) -> list[str]:
        return ["head", "kind", "score", "ci_low", "ci_high", "null", "null_high", "passes"]

    def _row(self, kind: str, head: tuple[int, int]) -> dict[str, Any]:
        numbers = {name: self.grid(kind, name)[head] for name in self._columns()[2:]}
        return {"head": f"L{head[0]}H{head[1]}", "kind": kind, **numbers}

    def to_json(self) -> dict[str, Any]:
        """Plain values: `[layer][head]` scores by kind, intervals, nulls, and what was run; undefined is None."""

        def grids(*names: str) -> dict[str, Any]:
            return {kind: {name: plain(self.grid(kind, name)) for name in names} for kind in self.kinds}

        return {
            **{kind: plain(self.grid(kind)) for kind in self.kinds},
            "n_sequences": int(self.data.sizes["prompt"]),
            "intervals": grids("ci_low", "ci_high"),
            "nulls": grids("null", "null_low", "null_high"),
            "uniform": {kind: float(self.data["uniform"].sel(kind=kind)) for kind in self.kinds},
            "passes": {kind: plain(self.grid(kind, "passes")) for kind in self.kinds},
            **plain(self.about),
        }

    def summary(self) -> str:
        """One line: the best head of each kind with its interval, and how many pass."""
        parts = []
        for kind in self.kinds:
            row = self._row(kind, self.ranking(kind)[0])
            interval = f" [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" if np.isfinite(row["ci_low"]) else ""
            passed = len(self.passing(kind))
            parts.append(f"{kind} {row['head']} {row['score']:.2f}{interval} against {row['null']:.2f}, {passed} pass")
        n = f"n={self.data.sizes['prompt']}, 95% {self.about['scope']}"
        return f"attention patterns: {'; '.join(parts)} ({n})"


def patterns(
    model: HookedModel,
    prompts: Input | None = None,
    *,
    period: int | None = None,
    n: int = 16,
    kinds: Kinds = None,
    seed: int = 0,
) -> PatternResult:
    """Score every head on every kind of pattern, under the interventions in force.

    Args:
        model: the hooked model.
        prompts: `repeated_tokens` by default; or texts, token ids (used as they are), or Prompts.
        period: of the random tokens (50 by default, less in a small model); of given sequences whose last `period`
            tokens repeat those before them. Given sequences without one are scored on positional kinds only.
        n: random prompts.
        kinds: names ("induction", "duplicate_token", "previous_token", "first_token", "self"), a mapping from any name
            to a function of Prompts (padded on the left) to keys `[prompt query]` (-1: none) or weights
            `[prompt query key]`, or a list of both. All of the named ones by default.
        seed: of tokens, null and intervals.

    Raises:
        UserError: an unknown kind, one that needs a period, a sequence that is too short, too long, outside the
            vocabulary or that does not repeat.
    """
    source = "random tokens" if prompts is None else "given sequences"
    if prompts is None:
        period = default_period(model) if period is None else period
        prompts = repeated_tokens(model, n, period, seed=seed)
    prompts, period = as_prompts(model, prompts, period)
    asked = [Asked.of(name, kind, content, prompts) for name, kind, content in _chosen(kinds, period)]
    found = _scores(model, prompts, prompts, asked)
    # Per prompt the largest of three, so that no head passes by luck with one of them.
    beside = np.maximum(np.maximum(found["before"], found["after"]), found["uniform"][:, None, None])
    nulls = dict(zip([kind.name for kind in asked], beside, strict=True))
    about = _about(model, prompts, period, source, seed)
    content = [i for i, kind in enumerate(asked) if kind.content]
    if content and period is not None:
        some = prompts.take(torch.arange(min(len(prompts), max(FRESH_LEAST, len(prompts) // FRESH_SHARE))))
        control, about["fresh_share"] = fresh(model, some, period, seed + 1)
        about["n_fresh"] = len(some)
        without = _scores(model, some, control, [asked[i] for i in content])["score"]
        nulls |= dict(zip([asked[i].name for i in content], without, strict=True))
    clusters = None if prompts.template is None else prompts.template.cpu().numpy()
    about["scope"] = interval_scope(clusters)
    return PatternResult(_dataset(found, nulls, clusters, seed), about)


def _chosen(kinds: Kinds, period: int | None) -> list[tuple[str, Kind, bool]]:
    """Name, function, and whether fresh tokens are its null."""
    if kinds is None:
        kinds = [*(CONTENT if period is not None else ()), *POSITIONAL]
    chosen: list[tuple[str, Kind, bool]] = []
    for item in [kinds] if isinstance(kinds, str | Mapping) else kinds:
        if isinstance(item, Mapping):
            chosen += [(name, function, False) for name, function in item.items()]
        elif item in CONTENT and period is None:
            raise UserError(
                f"pattern {item!r} needs the period of the sequences; valid without one: {list(POSITIONAL)}"
            )
        elif item in CONTENT:
            chosen.append((item, CONTENT[item](period or 0), True))
        elif item in POSITIONAL:
            chosen.append((item, POSITIONAL[item], False))
        else:
            valid = ", ".join([*CONTENT, *POSITIONAL])
            raise UserError(f"unknown pattern {item!r}; valid: {valid}, or a mapping from a name to a function")
    names = [name for name, _, _ in chosen]
    if not names or len(set(names)) < len(names):
        raise UserError(f"patterns need names, each once; found {names}")
    return chosen


def _scores(model: HookedModel, prompts: Prompts, run: Prompts, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
    """`score`, and attention `before` and `after` the key, `[kind layer head prompt]`; `uniform` `[kind prompt]`.

    Args:
        prompts: which the kinds were asked of.
        run: what is run, of the same lengths.
    """
    sites = [Site("pattern", layer) for layer in range(model.n_layers)]
    found = torch.zeros(len(asked), 3, len(sites), model.n_heads, len(prompts))
    spread = torch.zeros(len(asked), len(prompts))
    for index in chunks(model, len(prompts), prompts.n_pos, read_vocab=False):
        even = uniform(prompts.take(index))
        weights, lost = [], []
        for i, kind in enumerate(asked):
            own = kind.weights(index)
            spread[i, index] = (own * even).sum((1, 2))
            (before, lost_before), (after, lost_after) = shifted(own, even, -1), shifted(own, even, 1)
            weights += [own, before, after]
            lost += [torch.zeros(len(index)), lost_before, lost_after]
        columns = torch.stack(weights, -1).flatten(1, 2).to(model.device)  # [batch query·key columns]
        extra = torch.stack(lost).unflatten(0, (len(asked), 3))[:, :, None]

        def reduce(layer: int, pattern: Tensor, columns: Tensor = columns, extra: Tensor = extra, at: Tensor = index):
            scores = pattern.float().flatten(2) @ columns  # [batch head columns]
            found[:, :, layer, :, at] = scores.cpu().permute(2, 1, 0).unflatten(0, (len(asked), 3)) + extra

        read(model, run.take(index), sites, reduce, in_force=model.in_force)
    parts = found.double().numpy()
    return {**{name: parts[:, i] for i, name in enumerate(("score", "before", "after"))}, "uniform": spread.numpy()}


def _dataset(
    found: dict[str, np.ndarray], nulls: dict[str, np.ndarray], clusters: np.ndarray | None, seed: int
) -> xr.Dataset:
    own = bootstrap_ratio(found["score"], None, clusters, seed=seed)
    dims = ("kind", "layer", "head")
    arrays = {"score": own.estimate, "ci_low": own.low, "ci_high": own.high}
    members = {name: None if clusters is None else clusters[: values.shape[-1]] for name, values in nulls.items()}
    null = [bootstrap_ratio(values, None, members[name], seed=seed) for name, values in nulls.items()]
    for name, limit in (("null", "estimate"), ("null_low", "low"), ("null_high", "high")):
        arrays[name] = np.stack([getattr(one, limit) for one in null])
    arrays["passes"] = arrays["ci_low"] > arrays["null_high"] + MARGIN
    per_head = {name: (dims, values) for name, values in arrays.items()}
    others = {"scores": ((*dims, "prompt"), found["score"]), "uniform": ("kind", found["uniform"].mean(-1))}
    layers, heads = range(own.estimate.shape[1]), range(own.estimate.shape[2])
    return xr.Dataset({**per_head, **others}, coords={"kind": list(nulls), "layer": layers, "head": heads})


def _about(model: HookedModel, prompts: Prompts, period: int | None, source: str, seed: int) -> dict[str, Any]:
    return provenance(model) | {
        "source": source,
        "n_prompts": len(prompts),
        "period": period,
        "bos": bool(prompts.bos),
        "position_0": ("the BOS" if prompts.bos else "the first token, an attention sink")
        + ": no query or key of a score; see first_token",
        "control": "induction, duplicate_token: fresh tokens in the last copy at the same offsets; other kinds: the "
        "largest of the key before, the key after, and uniform attention",
        "margin": MARGIN,
        "seed": seed,
    }
