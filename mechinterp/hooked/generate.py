"""Text from a model, with the interventions in force acting at every step.

1. The prompts are run once, padded on the left and masked, and their keys and values are kept (the *prefill*).
2. Each step runs the newest tokens alone, behind the kept keys and values.
3. Where an intervention acts, is settled by the prompts: its positions are counted there (negative ones from the end of
   the prompt) and never move, so it acts in the prefill, and later through the keys and values that it changed. Without
   positions it acts everywhere, on every token that is generated too; then its value must exist there (`_require`).
4. Everything is run again at every step where that is the only right way: a plain function that must see the whole run,
   an edit along keys, which may let a token see later ones, or a model without a key/value cache (`probe`).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mechinterp.errors import UserError
from mechinterp.hooked import suffix
from mechinterp.hooked.forward import Bound, Plan, call_bridge
from mechinterp.hooked.interventions import Intervention, Mean, Noise, Patch, Resample, Rows, Steer
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site

if TYPE_CHECKING:
    from mechinterp.hooked.model import HookedModel


@dataclass(frozen=True, eq=False)
class Generation:
    """What a model said.

    Attributes:
        prompts: what it was given.
        tokens: of each prompt, the ids that were generated, an end of text included.
        texts: of each prompt, the same as text, without an end of text.
        logprobs: of each prompt, the natural log-probability of every generated token (at temperature 1).
    """

    prompts: Prompts
    tokens: list[list[int]]
    texts: list[str]
    logprobs: list[list[float]]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.texts))


def generate(
    model: "HookedModel",
    prompts: Prompts,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    interventions: Sequence[Intervention] = (),
) -> Generation:
    """Continue prompts; see `HookedModel.generate`."""
    _require(max_new_tokens >= 1, f"max_new_tokens must be at least 1; found {max_new_tokens}")
    _require(
        0 <= temperature < float("inf"), f"temperature must be 0 (the likeliest token) or above; found {temperature}"
    )
    context = getattr(model.bridge.cfg, "n_ctx", None)
    _require(
        context is None or prompts.n_pos + max_new_tokens <= context,
        f"{prompts.n_pos} tokens and {max_new_tokens} new ones are more than the context of {context} tokens",
    )
    end = getattr(model.tokenizer, "eos_token_id", None) if stop_at_eos else None
    draw = torch.Generator().manual_seed(seed)
    tokens: list[list[int]] = [[] for _ in range(len(prompts))]
    logprobs: list[list[float]] = [[] for _ in range(len(prompts))]
    with model.intervene(*interventions):
        steps = next_logits(model, prompts)
        logits = next(steps)
        for step in range(max_new_tokens):
            chosen = _choose(logits, temperature, draw)
            scores = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
            for row, (token, score) in enumerate(zip(chosen.tolist(), scores.tolist(), strict=True)):
                if end is None or end not in tokens[row][-1:]:
                    tokens[row].append(token)
                    logprobs[row].append(score)
            if step + 1 == max_new_tokens or all(row[-1] == end for row in tokens):
                break
            logits = steps.send(chosen)
        steps.close()
    texts = [_text(model, row[:-1] if row[-1] == end else row) for row in tokens]
    return Generation(prompts, tokens, texts, logprobs)


def next_logits(model: "HookedModel", prompts: Prompts) -> Generator[Tensor, Tensor, None]:
    """Logits `[batch d_vocab]` of the token after the prompts, on the CPU; sent the tokens `[batch]` that were chosen,
    those of the token after these, and so on. Under the interventions in force.

    Raises:
        UserError: an intervention in force at all positions whose values are those of a prompt's positions.
    """
    for bound in model.in_force:
        _require_beyond_prompt(bound)
    prompts = prompts.to(model.device)
    whole = not model.keeps_cache or any(_needs_all(bound) for bound in model.in_force)
    cache = None if whole else DynamicCache()
    so_far, start = prompts, 0
    while True:
        rows = replace(Rows.all(so_far), start=start)
        acting = [_InPrompt.of(bound, prompts) for bound in model.in_force if start == 0 or _everywhere(bound)]
        with Plan.of(model, acting).installed(rows):
            # The mask spans the kept positions too.
            logits = call_bridge(model, replace(so_far, tokens=so_far.tokens[:, start:]), cache)
        chosen = yield logits[:, -1].float().cpu()
        so_far = _longer(so_far, chosen)
        start = 0 if cache is None else so_far.n_pos - 1


def _longer(prompts: Prompts, chosen: Tensor) -> Prompts:
    """The prompts with a token more; roles stay where they are."""
    mask, tokens = prompts.mask, prompts.tokens
    chosen = chosen[:, None].to(tokens)
    mask = None if mask is None else torch.cat([mask, torch.ones_like(chosen, dtype=torch.bool)], dim=1)
    return replace(prompts, tokens=torch.cat([tokens, chosen], dim=1), mask=mask)


def _everywhere(bound: Bound) -> bool:
    return bound.intervention.positions is None


def _needs_all(bound: Bound) -> bool:
    """Whether what it does to a token depends on tokens that come later."""
    return _everywhere(bound) and (not bound.intervention.folds or "key" in bound.writes.kind.axes)


def _require_beyond_prompt(bound: Bound) -> None:
    """Raise UserError if the intervention acts on generated tokens but has no value there."""
    one = bound.intervention
    if not _everywhere(bound):
        return
    of_positions = isinstance(one, Patch | Resample | Noise)
    if isinstance(one, Mean):
        of_positions = one.by in ("position", "template")
    if isinstance(one, Steer):
        axes = one.reads.kind.axes
        from_end = len(axes) - one.reads.kind.dim(one.reads.kind.pos_axis)
        of_positions = one.vector.ndim >= from_end and one.vector.shape[-from_end] > 1
    _require(
        not of_positions,
        f"{type(one).__name__} at {bound.writes} has values for the positions of a prompt, and none for generated "
        "tokens; give it positions=…, which are counted in the prompt",
    )


class _InPrompt(Bound):
    """An intervention at positions of the prompt, in a run that may hold later tokens: it sees the prompt alone."""

    def __init__(self, bound: Bound, prompts: Prompts):
        super().__init__(bound.intervention, bound.reads, bound.writes, bound.state)
        self._bound, self._rows = bound, Rows.all(prompts)

    @classmethod
    def of(cls, bound: Bound, prompts: Prompts) -> Bound:
        """The intervention itself where it acts everywhere."""
        return bound if _everywhere(bound) else cls(bound, prompts)

    def read(self, activation: Tensor, rows: Rows) -> Tensor:
        self._bound.read(activation[self._part(self.reads)], self._rows)
        return activation

    def edit(self, activation: Tensor, rows: Rows) -> Tensor:
        part = self._part(self.writes)
        new = activation.clone()
        new[part] = self._bound.edit(activation[part], self._rows)
        return new

    def _part(self, site: Site) -> tuple[slice, ...]:
        """The prompt's positions of an activation, along queries and keys too."""
        n_pos = self._rows.prompts.n_pos
        return tuple(slice(n_pos if axis in ("pos", "query", "key") else None) for axis in site.kind.axes)


def _choose(logits: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """`[batch]` the likeliest token, or one drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)[:, 0]


def _text(model: "HookedModel", ids: Sequence[int]) -> str:
    if model.tokenizer is None:
        return " ".join(model.token_strings(ids))
    return str(model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def probe(model: "HookedModel") -> bool:
    """Whether steps behind kept keys and values give what the full run gives, on a few random tokens, padded."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.d_vocab, (2, 7), generator=draw).tolist()
    prompts = Prompts.from_lists([ids[0], ids[1][:5]], model.pad_token).to(model.device)
    in_force, model.in_force = model.in_force, []
    try:
        full, cache = call_bridge(model, prompts), DynamicCache()
        for start, stop in ((0, 5), (5, 6), (6, 7)):
            part = replace(prompts, tokens=prompts.tokens[:, start:stop], mask=prompts.real[:, :stop])
            got = call_bridge(model, part, cache)[:, -1]
            if not (got - full[:, stop - 1]).abs().max() <= suffix._tolerance(model) * full.abs().max():
                return False
        return cache.get_seq_length() == 7
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # an architecture that is built in another way
    finally:
        model.in_force = in_force


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise UserError(otherwise)
