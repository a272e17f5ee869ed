"""Identities that every analysis rests on, measured on any model (`mechinterp check MODEL`).

1. Parity: the logits are those of Hugging Face's own, unhooked model.
2. No-op: an activation replaced by itself changes nothing.
3. Sum: components add up to the residual stream.
4. Pattern: attention weights of a query sum to 1.
5. Suffix: a sweep by suffix runs equals the same sweep by full runs.
6. Padding: a prompt gives the same logits alone and padded in a batch.

All on random tokens; each value is a largest absolute difference, relative to the scale of what is compared.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.cache import Cache
from mechinterp.hooked.interventions import Patch
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.suffix import Levers
from mechinterp.models import pretrained
from mechinterp.models.catalog import CATALOG, folder_of
from mechinterp.patching import sweep
from mechinterp.tasks.pairs import PromptPairs, Target, assemble

LENGTH = 10  # tokens of a random prompt: longer than the sliding windows of test models, short enough for large ones
# Relative differences that the order of additions explains. Sums of hundreds of terms lose two to three digits.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Identity:
    """One identity on one model.

    Attributes:
        name: what should be equal.
        ok: whether it holds; None if it was skipped.
        value: largest absolute difference, relative to the scale of what is compared; None if nothing was measured.
        tolerance: what `value` may be.
        note: details, or why it was skipped.
    """

    name: str
    ok: bool | None
    value: float | None
    tolerance: float | None
    note: str


class _Skip(Exception):
    """An identity that says nothing about this model, and why."""


# An identity measures the relative difference on random prompts, and adds a note.
Measure = Callable[[HookedModel, Prompts], tuple[float, str]]


def check(model: HookedModel, n: int = 3, seed: int = 0) -> list[Identity]:
    """Measure every identity on `n` prompts of random tokens.

    Args:
        model: any hooked model, without interventions in force.
        n: prompts.
        seed: of the tokens.

    Returns:
        One `Identity` each, in the order of the module's docstring. An identity whose measurement fails with an error
        does not hold; the error is its note.

    Raises:
        UserError: interventions are in force, or `n` is below 1.
    """
    if model.in_force:
        raise UserError("check compares the model with itself and with Hugging Face's: leave the interventions first")
    if n < 1:
        raise UserError(f"n must be at least 1; found {n}")
    measures: dict[str, Measure] = {
        "logits = Hugging Face": _parity,
        "own activation patched in = nothing": _noop,
        "components add up to the residual": _sum,
        "pattern rows sum to 1": _pattern,
        "suffix run = full run": _suffix,
        "padded in a batch = alone": _padding,
    }
    prompts = random_prompts(model, n, seed)
    with torch.no_grad():
        return [_identity(model, prompts, name, measure) for name, measure in measures.items()]


def random_prompts(model: HookedModel, n: int, seed: int) -> Prompts:
    """`n` prompts of random tokens, all of one length."""
    draw = torch.Generator().manual_seed(seed)
    length = min(LENGTH, int(getattr(model.bridge.cfg, "n_ctx", None) or LENGTH))
    return Prompts(torch.randint(0, model.d_vocab, (n, length), generator=draw)).to(model.device)


def _identity(model: HookedModel, prompts: Prompts, name: str, measure: Measure) -> Identity:
    tolerance = TOLERANCES[model.dtype]
    try:
        value, note = measure(model, prompts)
    except _Skip as skip:
        return Identity(name, None, None, None, str(skip))
    except (UserError, RuntimeError, TypeError, KeyError, IndexError) as error:  # a model that is built in another way
        return Identity(name, False, None, tolerance, f"{type(error).__name__}: {pretrained.first_line(error)}")
    return Identity(name, value <= tolerance, value, tolerance, note)  # NaN is not below anything


def relative(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value wanted."""
    scale = float(want.abs().max()) or 1.0
    return float((got.double() - want.double()).abs().max()) / scale


def _largest(gaps: Sequence[float]) -> float:
    """The maximum, NaN if one of them is NaN (which Python's max may pass over)."""
    return float(torch.tensor(gaps, dtype=torch.float64).max())


# The identities


def _parity(model: HookedModel, prompts: Prompts) -> tuple[float, str]:
    """Against a second copy that was never hooked, with eager attention, from the same place."""
    with pretrained.quiet():
        own = _unhooked(model)
        own.eval().to(model.device)
        want = own(prompts.tokens, use_cache=False).logits
    got = model(prompts)
    if not model.info.processed:
        return relative(got, want), "raw weights, logits"
    # Centring the unembedding moves all logits of a position together.
    scale = float(want.abs().max()) or 1.0
    gap = (got.double().log_softmax(-1) - want.double().log_softmax(-1)).abs().max()
    return float(gap) / scale, "processed weights, log-probabilities"


def _unhooked(model: HookedModel) -> torch.nn.Module:
    """Hugging Face's own model from where the hooked one came from; `_Skip` where there is none."""
    info = model.info
    if info.source == "planted":
        raise _Skip("a native model with hand-set weights: Hugging Face has none")
    if info.source == "module":
        raise _Skip("made from a module in memory: there is no second copy to load")
    if info.source == "gguf":
        own = pretrained.read_gguf(Path(info.name).expanduser())[0]
        for parameter in own.parameters():  # not the buffers: load keeps rotary frequencies in float32
            parameter.data = parameter.data.to(model.dtype)
        return own
    if info.source == "embedded":
        return pretrained.read(folder_of(CATALOG[info.name]), model.dtype, local=True)[0]
    if info.source == "folder":
        return pretrained.read(Path(info.name).expanduser(), model.dtype, local=True)[0]
    revision = info.description.removeprefix("revision ") or None
    local = pretrained.in_hub_cache(info.name, revision)
    return pretrained.read(info.name, model.dtype, local=local, revision=revision)[0]


def _noop(model: HookedModel, prompts: Prompts) -> tuple[float, str]:
    """Each site at the first, a middle and the last layer, one patch a run: the next one would hide what it did."""
    base = model(prompts)
    layers = {None, *_sample_layers(model)}
    sites = [site for site in model.site_list if site.layer in layers and model.writable(site)]
    names = list(dict.fromkeys(site.name for site in sites))
    gaps = []
    for name in names:
        same = [site for site in sites if site.name == name]
        own = model.run_with_cache(prompts, same)[1]
        gaps += [relative(model(prompts, [Patch(site, own[site], noop_ok=True)]), base) for site in same]
    worst = _largest(gaps)
    where = "all exactly equal" if worst == 0 else f"largest at {sites[int(torch.tensor(gaps).argmax())]}"
    return worst, f"{len(names)} sites, {len(sites)} patches, {where}"


def _sum(model: HookedModel, prompts: Prompts) -> tuple[float, str]:
    """Sequential, parallel or attention-only, layer by layer; and one block's output is the next one's input."""
    names = {site.name for site in model.site_list}
    parts = [name for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post") if name in names]
    if not {"resid_pre", "resid_post"} <= set(parts):
        raise _Skip("this model has no hook points on the residual stream")
    cache = model.run_with_cache(prompts, parts)[1]
    gaps = [gap for layer in range(model.n_layers) for gap in _sums_of_layer(cache, layer)]
    kind = "sequential" if "resid_mid" in names else "parallel" if "mlp_out" in names else "attention-only"
    return _largest(gaps), f"{kind} blocks, {model.n_layers} layers"


def _sums_of_layer(cache: Cache, layer: int) -> Iterator[float]:
    def at(name: str) -> Tensor:
        return cache[name, layer]

    total = at("resid_pre")
    if layer > 0:
        yield relative(total, cache["resid_post", layer - 1])
    for part, whole in (("attn_out", "resid_mid"), ("mlp_out", "resid_post")):
        if (part, layer) in cache:
            total = total + at(part)
        if (whole, layer) in cache:
            yield relative(total, at(whole))
            total = at(whole)


def _pattern(model: HookedModel, prompts: Prompts) -> tuple[float, str]:
    """On padded prompts, at the queries that are tokens."""
    if not any(site.name == "pattern" for site in model.site_list):
        raise _Skip("this model has no hook point on its attention weights")
    padded = _ragged(model, prompts)
    cache = model.run_with_cache(padded, ["pattern"])[1]
    real = padded.real
    gaps = [float((cache[name].double().sum(-1).transpose(1, 2)[real] - 1).abs().max()) for name in cache]
    return _largest(gaps), f"{len(gaps)} layers, padded prompts"


def _suffix(model: HookedModel, prompts: Prompts) -> tuple[float, str]:
    """Head outputs (or the residual stream) at two roles of random pairs, by the levers that hold and by none."""
    held = [field.name for field in fields(Levers) if getattr(model.levers, field.name)]
    note = f"levers: {', '.join(held) or 'none hold, so every run is a full one'}"
    pairs = random_pairs(model, prompts)
    site = "z" if any(site.name == "z" for site in model.site_list) else "resid_pre"
    patched = []
    for levers in (model.levers, Levers(False, False, False)):
        with _using(model, levers):
            result = sweep(model, pairs, site, "roles", layers=_sample_layers(model), force=True, progress=False)
        patched.append(torch.tensor(result.data["patched"].values))
    scale = float(model(pairs.clean)[pairs.clean.real].abs().max()) or 1.0
    return float((patched[0] - patched[1]).abs().max()) / scale, f"{patched[0].numel()} patches of {site}; {note}"


def _padding(model: HookedModel, prompts: Prompts) -> tuple[float, str]:
    padded = _ragged(model, prompts)
    together = model(padded)
    gaps = []
    for i in range(len(padded)):
        real = padded.real[i]
        gaps.append(relative(together[i][real], model(padded.tokens[i][real][None])[0]))
    return _largest(gaps), f"up to {int(padded.padding.max())} padding tokens on the left"


# What they are measured on


def random_pairs(model: HookedModel, prompts: Prompts) -> PromptPairs:
    """Pairs whose sides differ in one token near the start, padded, with that token and the last one as roles."""
    clean = [row[: len(row) - i % 3].tolist() for i, row in enumerate(prompts.tokens)]
    corrupted = [list(row) for row in clean]
    for row in corrupted:
        row[min(2, len(row) - 1)] = (row[min(2, len(row) - 1)] + 7) % model.d_vocab
    roles = [{"changed": min(2, len(row) - 1), "END": len(row) - 1} for row in clean]
    targets = [[Target(len(row) - 1, {row[0]: 1.0}, {(row[0] + 1) % model.d_vocab: 1.0})] for row in clean]
    return assemble(model, "random", "one-token", clean, corrupted, roles, targets, bos=False)


def _ragged(model: HookedModel, prompts: Prompts) -> Prompts:
    """The same prompts cut to different lengths; the first one whole, and a short one in every batch."""
    rows = [row[: max(1, len(row) - 3 * (i % 3))].tolist() for i, row in enumerate(prompts.tokens)]
    rows.append(rows[0][: max(1, len(rows[0]) // 2)])
    return Prompts.from_lists(rows, model.pad_token).to(model.device)


def _sample_layers(model: HookedModel) -> list[int]:
    return sorted({0, model.n_layers // 2, model.n_layers - 1})


@contextmanager
def _using(model: HookedModel, levers: Levers) -> Iterator[None]:
    """Suffix runs with these levers; what was found out about the model is put back."""
    known = model.levers
    model.__dict__["levers"] = levers  # a cached property keeps its value there
    try:
        yield
    finally:
        model.__dict__["levers"] = known
