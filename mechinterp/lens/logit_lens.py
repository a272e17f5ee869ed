"""The logit lens: what each layer would say if the model ended there.

1. One run keeps the residual stream of every layer (streams.py). Row 0 is the embeddings, row n_layers the output.
2. Each row goes through the final norm, the unembedding and the final soft-cap at the positions that are read (with a
   tuned lens it is translated first). Rows are decoded from the last to the first, a slice of positions at a time, so
   that no more than a few blocks of logits `[batch spot d_vocab]` are ever held.
3. Of each block stay the first tokens, the entropy, the KL from the final distribution, and the answer's probability,
   rank and logit difference.
4. Over prompts every quantity has an interval and a control. For pairs it is the same reading of the corrupted prompts
   (for KL: the distance of the clean reading to the corrupted prompt's output): the answer must rise only where the
   prompt asks for it. For texts with several answers it is the answer of another text.

nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023 for the tuned lens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance, templates_of
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.hooked.prompts import Prompts
from mechinterp.lens.measure import Final, Values, answer_values, measure
from mechinterp.lens.reading import Answer, Reading, Where, answer_tokens, of_pairs, of_prompts
from mechinterp.lens.result import QUANTITIES, LensResult
from mechinterp.lens.streams import Streams, groups, slices
from mechinterp.lens.tuned_lens import TunedLens
from mechinterp.results import plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference, sign_flip_threshold
from mechinterp.tasks.pairs import PromptPairs


def logit_lens(
    model: HookedModel,
    text: Input | PromptPairs,
    answer: Answer | Sequence[Answer] | None = None,
    *,
    positions: Where = "last",
    top: int = 5,
    lens: TunedLens | None = None,
    seed: int = 0,
) -> LensResult:
    """Read every layer's residual stream as if the model ended there.

    Args:
        model: the hooked model; interventions in force stay in force.
        text: a text, texts, tokens or `Prompts`; or prompt pairs, which bring their answers.
        answer: the token whose rank and probability are followed, as text (" Paris") or as an id; one for each text or
            the same for all.
        positions: "last": the last token, of pairs the positions that the task asks at; "all" (or "each"): every
            position; "roles": every role; or role names ("END,S2"), or indices.
        top: tokens to keep of each reading.
        lens: a tuned lens of this model; its translators come before the final norm.
        seed: of the intervals.

    Returns:
        Readings by layer, position and prompt, with intervals and a control over prompts.

    Raises:
        UserError: an answer that is not one token or not in the vocabulary; another number of answers than texts;
            pairs together with an answer; unknown positions; a tuned lens of another model; a text beyond the context.
    """
    if not 1 <= top <= model.d_vocab:
        raise UserError(f"top must be 1 … {model.d_vocab}, the vocabulary; found {top}")
    if lens is not None:
        lens.require(model)
    if isinstance(text, PromptPairs):
        if answer is not None:
            raise UserError("prompt pairs bring their own answers; give no answer, or give the texts alone")
        sides, reading, clusters = [text.clean, text.corrupted], of_pairs(text, positions), templates_of(text)
        about = provenance(model, text) | {"answers": None}
    else:
        prompts = model.to_prompts(text)
        tokens = None if answer is None else answer_tokens(model, answer, len(prompts))
        clusters = None if prompts.template is None else prompts.template.cpu().numpy()
        sides, reading = [prompts], of_prompts(prompts, tokens, positions)
        named = None if tokens is None else model.token_strings(tokens)
        about = provenance(model) | {"answers": named, "n_prompts": len(prompts), "bos": bool(prompts.bos)}
    _require_context(model, sides[0])
    values = _collapsed(reading, _read(model, sides, reading, lens, top))
    arrays, over_prompts = _arrays(values, reading), _over_prompts(values, reading, clusters, seed)
    return LensResult(
        _dataset(model, arrays | over_prompts.arrays, reading, top),
        about
        | {
            "lens": "logit" if lens is None else "tuned",
            "tuned_lens": None if lens is None else lens.about,
            "positions": positions if isinstance(positions, str | int) else list(positions),
            "pos_labels": _pos_labels(model, sides[0], reading) if reading.axis == "pos" else None,
            "tokens": model.token_strings(sides[0].tokens[0]) if len(sides[0]) == 1 else None,
            "strings": _strings(model, arrays["top_token"]),
            "control": reading.control,
            "passes": over_prompts.leading,
            "threshold": plain(over_prompts.threshold if reading.axis else over_prompts.threshold.squeeze()),
            "scope": interval_scope(clusters),
            "seed": seed,
        },
    )


def _require_context(model: HookedModel, prompts: Prompts) -> None:
    context = getattr(model.bridge.cfg, "n_ctx", None)
    if context is not None and prompts.n_pos > int(context):
        raise UserError(f"the text has {prompts.n_pos} tokens; the context of {model.info.name} is {context}")


# Reading


def _read(model: HookedModel, sides: Sequence[Prompts], reading: Reading, lens: TunedLens | None, top: int) -> Values:
    """`[layer prompt spot]` of every quantity, on the CPU; those of the control are named `{quantity}_control`."""
    n, n_spots = reading.asked.pos.shape
    made: Values = {}
    for index in chunks(model, n, sides[0].n_pos, read_vocab=True, every_position=n_spots > 1):
        streams = [Streams.record(model, prompts, index) for prompts in sides]
        streams = streams if lens is None else [one.translated(lens) for one in streams]
        for spots in slices(model, len(index), n_spots):
            part = reading.take(index, spots).to(model.device)
            for layer, values in _read_layers(model, streams, part, top):
                for name, value in values.items():
                    if name not in made:
                        made[name] = value.new_zeros(model.n_layers + 1, n, n_spots, *value.shape[1:], device="cpu")
                    made[name][layer, index, spots] = value.unflatten(0, (len(index), -1)).cpu()
    return made


def _read_layers(
    model: HookedModel, streams: Sequence[Streams], reading: Reading, top: int
) -> Iterator[tuple[int, Values]]:
    """Layers from the last to the first, each with its values `[row]`, a row for each prompt and spot."""
    asked, others = reading.rows
    finals: list[Final] = []
    for layers in groups(model, reading.asked.pos.numel()):
        logits = [one.logits(layers, reading.asked.pos).flatten(1, 2) for one in streams]
        finals = finals or [Final.of(one[0]) for one in logits]
        for i, layer in enumerate(layers):
            values = measure(logits[0][i], finals[0], asked, top)
            log_total = values.pop("log_total")
            control: Values = {}
            if len(streams) == 2:
                control = measure(logits[1][i], finals[1], asked, top)
                control["kl"] = finals[1].kl(logits[0][i], log_total)
            elif others is not None:
                control = answer_values(logits[0][i], log_total, others)
            yield layer, values | {f"{name}_control": control[name] for name in QUANTITIES if name in control}


# Over targets and prompts


def _collapsed(reading: Reading, values: Values) -> Values:
    """The targets of a task, averaged, as one spot; of the first tokens those at the first target. Other spots stay."""
    if reading.axis is not None:
        return values
    weight = reading.asked.weight.double()
    made = {}
    for name, value in values.items():
        first = name.startswith("top_")
        made[name] = value[:, :, :1] if first else (value.double() * weight).sum(-1, keepdim=True)
    return made


def _arrays(values: Values, reading: Reading) -> dict[str, np.ndarray]:
    """`[layer spot prompt]` arrays, undefined where a prompt has no such position, and `settled` `[spot prompt]`."""
    absent = ~reading.present.T.numpy()
    made = {}
    for name, value in values.items():
        if name.endswith("_control"):
            continue
        array = value.transpose(1, 2).numpy().astype(np.int64 if name == "top_token" else np.float64)
        array[:, absent] = -1 if name == "top_token" else np.nan
        made[name] = array
    tokens = made["top_token"]
    first = made["answer_rank"] == 0 if reading.has_answer else tokens[..., 0] == tokens[-1, ..., 0]
    alone = made.pop("tie") == 0  # a layer that says nothing makes every token first
    return made | {"settled": np.where(absent, np.nan, _settled(first & alone))}


def _settled(first: np.ndarray) -> np.ndarray:
    """First layer from which `first` `[layer spot prompt]` holds up to the last; NaN where it does not hold there."""
    stays = np.logical_and.accumulate(first[::-1])
    return np.where(stays[0], len(first) - stays.sum(0), np.nan)


@dataclass(frozen=True, eq=False)
class OverPrompts:
    """Means, intervals and controls `[layer spot]` by name; what `passes` is about, and its threshold `[spot]`."""

    arrays: dict[str, np.ndarray]
    leading: str | None
    threshold: np.ndarray


def _over_prompts(values: Values, reading: Reading, clusters: np.ndarray | None, seed: int) -> OverPrompts:
    """Every quantity over the prompts that have the position, and its difference to the control."""
    by_name = {name: value.transpose(1, 2).double().numpy() for name, value in values.items()}
    own = [name for name in QUANTITIES if name in by_name]
    controlled = [name for name in own if f"{name}_control" in by_name]
    leading = next((name for name in ("logit_diff", "prob") if name in controlled), None)
    n_layers, n_spots, _ = by_name["kl"].shape
    own_ends = np.full((len(own), 3, n_layers, n_spots), np.nan)
    control_ends = np.full((len(controlled), 3, n_layers, n_spots), np.nan)
    passes, threshold = np.zeros((n_layers, n_spots), dtype=bool), np.full(n_spots, np.nan)
    for spot in range(n_spots):
        has = reading.present[:, spot].numpy()
        if not has.any():
            continue
        of = None if clusters is None else clusters[has]
        ours = {name: by_name[name][:, spot, has] for name in own}
        found = bootstrap_ratio(np.stack(list(ours.values())), clusters=of, seed=seed)
        own_ends[..., spot] = np.stack([found.estimate, found.low, found.high], 1)
        if leading is None:
            continue
        theirs = np.stack([by_name[f"{name}_control"][:, spot, has] for name in controlled])
        gap = paired_difference(np.stack([ours[name] for name in controlled]), theirs, of, seed=seed)
        control_ends[..., spot] = np.stack([theirs.mean(-1), gap.low, gap.high], 1)
        at = controlled.index(leading)
        # Layers are one family of tests, and positions share the level among them.
        threshold[spot] = sign_flip_threshold(ours[leading] - theirs[at], of, 0.05 / n_spots, seed=seed)
        passes[:, spot] = (gap.low[at] > 0) & (gap.estimate[at] > threshold[spot])
    arrays = _named(own, ("mean", "low", "high"), own_ends)
    if leading is None:
        return OverPrompts(arrays, None, threshold)
    arrays |= _named(controlled, ("control", "gap_low", "gap_high"), control_ends)
    return OverPrompts(arrays | {"passes": passes}, leading, threshold)


def _named(names: Sequence[str], ends: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """`{name}_{end}` for the first two axes of `values`."""
    return {f"{name}_{end}": values[i, j] for i, name in enumerate(names) for j, end in enumerate(ends)}


# Labels


def _dataset(model: HookedModel, arrays: Mapping[str, np.ndarray], reading: Reading, top: int) -> xr.Dataset:
    """Axes in order; a single spot has none."""
    spot = [reading.axis] if reading.axis else []
    made = {}
    for name, array in arrays.items():
        dims = [*([] if name == "settled" else ["layer"]), "spot", "prompt", "rank"][: array.ndim]
        array = array if spot else array.squeeze(dims.index("spot"))
        made[name] = ([dim for one in dims for dim in (spot if one == "spot" else [one])], array)
    coords = {"layer": list(range(model.n_layers + 1)), "rank": list(range(top))}
    return xr.Dataset(made, coords=coords | ({reading.axis: list(reading.labels)} if reading.axis else {}))


def _pos_labels(model: HookedModel, prompts: Prompts, reading: Reading) -> list[str]:
    """`Mary_3` where every prompt has that token there, else the position alone."""
    named = []
    for label, pos, has in zip(reading.labels, reading.asked.pos.T, reading.present.T, strict=True):
        ids = prompts.tokens[torch.arange(len(prompts)), pos][has]
        same = bool((ids == ids[0]).all())
        named.append(f"{model.token_strings(ids[:1])[0].strip()}_{label}" if same else str(label))
    return named


def _strings(model: HookedModel, tokens: np.ndarray) -> dict[str, Any]:
    """Texts of the tokens that were kept, by id."""
    ids = np.unique(tokens[tokens >= 0]).tolist()
    return dict(zip(map(str, ids), model.token_strings(ids), strict=True))
