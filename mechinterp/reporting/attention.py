"""Attention patterns: where chosen heads look, prompt by prompt.

A pattern is read from the run itself (TransformerLens's `hook_pattern`, after the softmax), without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.reporting.cells import visible
from mechinterp.reporting.report import AttentionView, Report, Section, Table

Head = tuple[int, int]  # (layer, head)
MAX_BYTES = 6_000_000  # of patterns in one page, which then stays below 10 MB


def patterns(model: HookedModel, prompts: Input, heads: Sequence[Head]) -> list[tuple[list[str], NDArray[np.float32]]]:
    """Tokens and attention patterns of chosen heads, for each prompt, padding left out.

    Args:
        prompts: texts, or what else the model takes.
        heads: (layer, head) pairs.

    Returns:
        For each prompt its tokens (blanks as they are) and `[head query key]`, each row adding up to 1.

    Raises:
        UserError: no head, or a layer or head that the model does not have.
    """
    places = _resolved(model, heads)
    layers = [Site("pattern", layer) for layer in sorted({layer for layer, _ in places})]
    batch = model.to_prompts(prompts)
    made = []
    for i, padding in enumerate(batch.padding.tolist()):
        one = Prompts(batch.tokens[i : i + 1, padding:], bos=batch.bos)
        _, cache = model.run_with_cache(one, layers)
        weights = torch.stack([cache["pattern", layer][0, head] for layer, head in places])
        made.append((model.token_strings(one.tokens[0]), weights.float().cpu().numpy()))
    return made


def _resolved(model: HookedModel, heads: Sequence[Head]) -> list[Head]:
    """The heads with layers counted from 0. Raises UserError for none, or one that the model does not have."""
    if not heads:
        raise UserError("attention: no heads; give (layer, head) pairs")
    for layer, head in heads:
        model.resolve(Site("pattern", layer, head=head))
    return [(layer % model.n_layers, head) for layer, head in heads]


def attention_view(model: HookedModel, prompts: Prompts, heads: Mapping[str, str]) -> AttentionView:
    """Attention patterns on the first prompt, of heads such as "L9H6", each with a note."""
    places = [tuple(int(part) for part in head.removeprefix("L").split("H")) for head in heads]
    ((tokens, weights),) = patterns(model, prompts.take(torch.tensor([0])), [(layer, head) for layer, head in places])
    caption = "Attention on the first clean prompt."
    return AttentionView(tuple(tokens), tuple(heads), weights, tuple(heads.values()), caption)


def attention_report(
    model: HookedModel, prompts: Input, heads: Sequence[Head], notes: Sequence[str] = (), command: str = ""
) -> Report:
    """One page of attention patterns: a section a prompt, with each head's pattern and where it looks on average.

    Args:
        prompts: texts, or what else the model takes.
        heads: (layer, head) pairs, in the order in which they are shown.
        notes: one a head, such as "previous-token head"; may be left out.
        command: what makes the page again.

    Raises:
        UserError: heads that the model does not have, notes that do not fit, or patterns too large for one page.
    """
    names = [f"L{layer}H{head}" for layer, head in _resolved(model, heads)]
    batch = model.to_prompts(prompts)
    lengths = batch.real.sum(-1)
    size = len(heads) * int((lengths**2).sum())
    if size > MAX_BYTES:
        raise UserError(
            f"attention: {len(heads)} heads on {len(batch)} prompts of up to {int(lengths.max())} tokens make "
            f"{size / 1e6:.0f} MB; a page holds {MAX_BYTES / 1e6:.0f} MB: choose fewer heads or a shorter prompt"
        )
    read = patterns(model, batch, heads)
    sections = []
    for i, (tokens, weights) in enumerate(read):
        view = AttentionView(
            tuple(tokens), tuple(names), weights, tuple(notes), "Query down, key across; hover for weights."
        )
        heading = "Attention patterns" if len(read) == 1 else f"Prompt {i + 1}: {''.join(tokens).strip()[:60]}"
        sections.append(Section(heading, table=_where(names, tokens, weights), attention=view))
    return Report(
        title=f"attention · {model.info.name}",
        question=f"Where {'does' if len(names) == 1 else 'do'} {_listed(names)} of {model.info.name} look?",
        answer=("The" if len(read) == 1 else "In the first prompt, the") + _finding(names, *read[0]),
        header=f"{model.header()} · n = {len(read)}",
        command=command,
        sections=tuple(sections),
        caveats=(
            "A pattern says where a head looks, not what it moves, and not that the answer needs it: patch or ablate "
            "the head for that.",
            "Weight on the first token is often rest: a head with nothing to do has to look somewhere.",
            f"{len(read)} {'prompt' if len(read) == 1 else 'prompts'}: an illustration, not a statistic.",
        ),
    )  # fmt: skip


def _finding(names: Sequence[str], tokens: Sequence[str], weights: NDArray[np.float32]) -> str:
    """Where the last token of a prompt looks most, by the first heads: the end of a sentence."""
    parts = []
    for name, row in zip(names[:4], weights[:4, -1], strict=True):
        at = int(row.argmax())
        parts.append(f"“{visible(tokens[at])}” (position {at}) in {name}, weight {row[at]:.2f}")
    more = f"; {len(names) - 4} more heads below" if len(names) > 4 else ""
    return f" last token, “{visible(tokens[-1])}”, attends most to {'; '.join(parts)}{more}."


def _where(names: Sequence[str], tokens: Sequence[str], weights: NDArray[np.float32]) -> Table:
    """Of each head, the mean weight on three places over the queries after the first; the last one's favourite."""
    rows = []
    for name, pattern in zip(names, weights, strict=True):
        on = (pattern[1:, 0], np.diagonal(pattern, -1), np.diagonal(pattern)[1:])  # the first query sees only itself
        best = int(pattern[-1].argmax())
        means = [float(values.mean()) if len(values) else None for values in on]
        rows.append((name, *means, _place(tokens, best), float(pattern[-1, best])))
    columns = ("head", "on the first token", "on the previous", "on itself", "the last looks most at", "with weight")
    return Table(columns, tuple(rows), "Mean attention weight over the queries after the first.", max_rows=len(rows))


def _place(tokens: Sequence[str], at: int) -> str:
    return f"“{visible(tokens[at])}” ({at})"


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:4]) + ([f"{len(names) - 4} other heads"] if len(names) > 4 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
