"""How much faster than the usual loops a sweep is, on SmolLM2-135M, and how far from the least work that could do it.

    python scripts/bench/patching.py [--json FILE] [--cases resid-1pair heads-1pair ...] [--threads N]

1. *Naive side.* With one pair, TransformerLens's own `get_act_patch_*`; with 16 pairs, a hand-written loop of
   `run_with_hooks` over the whole batch, a cell at a time. Both compute full logits. The clean run that they patch from
   is not timed. One cell in five is run, those with (layer + column) divisible by 5, which meets every layer and every
   head, position or role equally often; the time is multiplied by cells / cells run.
2. *Our side.* One whole call of `patching.sweep`: baselines, recordings, intervals, the sign-flip threshold and, with
   16 pairs, the donor control of the ten largest cells, which the naive side does not have.
3. One process, the same model, prompts and metric. Both sides are warmed up; then half of the naive sample, our side,
   and the other half are run in turn, so that a machine that slows down slows both. By default torch has one thread and
   the seconds are CPU time, which other programs disturb little; with more threads they are wall time.
4. The metric of every sampled (cell, prompt) must agree to `TOLERANCE` logits.

*Floor.* Multiply-adds of the matmuls; norms, softmax and activations are left out on both sides. With d = d_model,
h query heads and g key/value heads of d_head, a token in a block costs B = 2·d·(h·d_head) + 2·d·(g·d_head) + 3·d·d_mlp,
attention 2·h·d_head for each (query, key), and unembedding d·V.
- naive, a row of P positions (padding included): L·(P·B + 2·h·d_head·P²) + P·d·V.
- floor, a row patched at layer l whose first changed position is p, of n real tokens: (L − l) blocks over positions
  p … n − 1, each query with the keys up to its own, then two columns at the last position: 2·d. A head's output is
  patched behind its block's attention: there the block costs no more than W_O and the MLP. Rows whose two sources are
  identical cost nothing. Two full runs a prompt, without unembedding, are added: the base and the source.
`floor_ratio` is naive / floor: no exact method that works by rows, layers and prefixes can be faster in FLOPs.
"""

import os

os.environ["TQDM_DISABLE"] = "1"

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch
from measure import arguments, load_smollm2, timed, write
from torch import Tensor
from transformer_lens import patching as lens

import mechinterp as mi
from mechinterp.hooked.prompts import Prompts
from mechinterp.patching.cells import spots
from mechinterp.tasks.pairs import PromptPairs, Target, assemble

TOLERANCE = 1e-3  # logits; sums in another order differ by a few 1e-5
SAMPLE = 5  # one cell in so many is run on the naive side
# 15 tokens: three other names differ from the second token on; another subject from the second mention on.
CLEAN = "When Mary and John walked into the store, then John handed a drink to"
CORRUPTED = {
    "new-names": "When Tom and Anna walked into the store, then Paul handed a drink to",
    "swapped-subject": "When Mary and John walked into the store, then Mary handed a drink to",
}

Cells = list[tuple[int, int]]  # (layer, column): the column is a head, a position or a role
Naive = Callable[[Cells], Tensor]  # metric `[cell prompt]`


@dataclass(frozen=True)
class Case:
    """What is swept, on which pairs, and how many times faster it must be (None: shown, not required)."""

    name: str
    n_pairs: int
    site: str
    positions: str
    required: float | None
    corruption: str = "new-names"


CASES = (
    Case("resid-1pair", 1, "resid_pre", "each", 10),
    Case("heads-1pair", 1, "z", "all", 9),
    Case("resid-1pair-swapped", 1, "resid_pre", "each", None, "swapped-subject"),
    Case("heads-1pair-swapped", 1, "z", "all", None, "swapped-subject"),
    Case("heads-16pairs", 16, "z", "all", 2.4),
    Case("resid-16pairs", 16, "resid_pre", "each", 4),  # of one length, so that positions can be numbered
    Case("resid-roles-16pairs", 16, "resid_pre", "roles", None),
    Case("heads-end-16pairs", 16, "z", "END", 12),
)


@dataclass(frozen=True)
class Outcome:
    """A case as measured. Seconds of the naive side are extrapolated from the share of its cells that was run."""

    name: str
    ratio: float
    required: float | None
    floor_ratio: float
    max_abs_diff: float
    ours_seconds: float
    naive_seconds: float
    naive_share: float
    cells: int
    prompts: int

    @property
    def ok(self) -> bool:
        """Fast enough, and equal."""
        return self.max_abs_diff <= TOLERANCE and (self.required is None or self.ratio >= self.required)


def pairs_of(model: mi.HookedModel, case: Case) -> PromptPairs:
    """The pairs of a case: one of 15 tokens, or the task's own."""
    if case.n_pairs > 1 and case.positions != "each":
        return mi.tasks.ioi(model, case.n_pairs, seed=0, corruption=case.corruption)
    if case.n_pairs > 1:
        return one_length(mi.tasks.ioi(model, 8 * case.n_pairs, seed=0, corruption=case.corruption), case.n_pairs)
    clean, corrupted = (model.encode(text, bos=False) for text in (CLEAN, CORRUPTED[case.corruption]))
    assert len(clean) == 15
    answer, wrong = (model.encode(name, bos=False)[0] for name in (" Mary", " John"))
    target = Target(len(clean) - 1, {answer: 1.0}, {wrong: 1.0})
    return assemble(model, "ioi", case.corruption, [clean], [corrupted], [{}], [[target]], bos=False)


def one_length(pairs: PromptPairs, n: int) -> PromptPairs:
    """The first `n` pairs of the commonest length, without padding."""
    padding = pairs.clean.padding
    cut = int(padding.mode().values)
    pairs = pairs.take((padding == cut).nonzero().flatten()[:n])
    assert len(pairs) == n

    def trimmed(prompts: Prompts) -> Prompts:
        roles = {name: at - cut for name, at in prompts.roles.items()}
        return replace(prompts, tokens=prompts.tokens[:, cut:], mask=None, roles=roles)

    sides = {name: trimmed(getattr(pairs, name)) for name in ("clean", "corrupted", "donor")}
    return replace(pairs, answers=replace(pairs.answers, pos=pairs.answers.pos - cut), same_answer=None, **sides)


def logit_diff(pairs: PromptPairs, logits: Tensor) -> Tensor:
    """`[prompt]` from full logits: prompts are padded on the left, the last position is every prompt's own."""
    rows = torch.arange(len(pairs))
    return logits[rows, -1, pairs.answers.answer[:, 0, 0]] - logits[rows, -1, pairs.answers.wrong[:, 0, 0]]


def lens_side(model: mi.HookedModel, pairs: PromptPairs, case: Case) -> Naive:
    """TransformerLens's own sweep of the cells it is given."""
    hooks = [mi.Site(case.site, layer).hook_name for layer in range(model.n_layers)]
    _, cache = model.bridge.run_with_cache(pairs.clean.tokens, names_filter=hooks)
    column, patch = "pos", lens.get_act_patch_resid_pre
    if case.site == "z":
        column, patch = "head", lens.get_act_patch_attn_head_out_all_pos

    def run(cells: Cells) -> Tensor:
        index = pd.DataFrame(cells, columns=["layer", column])
        values = patch(
            model.bridge, pairs.corrupted.tokens, cache, lambda logits: logit_diff(pairs, logits)[0],
            index_axis_names=None, index_df=index,
        )  # fmt: skip
        return values[:, None]

    return run


def loop_side(model: mi.HookedModel, pairs: PromptPairs, case: Case) -> Naive:
    """The loop that one writes by hand: the whole batch once a cell, full logits."""
    hooks = [mi.Site(case.site, layer).hook_name for layer in range(model.n_layers)]
    mask = None if pairs.clean.mask is None else pairs.clean.mask.long()
    kept: dict[str, Tensor] = {}
    keep = [(name, lambda x, hook, name=name: kept.__setitem__(name, x.clone())) for name in hooks]
    model.bridge.run_with_hooks(pairs.clean.tokens, attention_mask=mask, fwd_hooks=keep)
    chosen = [spot.mask.float().argmax(-1) for spot in spots(pairs, case.positions)[1]]
    rows = torch.arange(len(pairs))

    def run(cells: Cells) -> Tensor:
        values = []
        for layer, column in cells:

            def put(x: Tensor, hook: object, source: Tensor = kept[hooks[layer]], column: int = column) -> Tensor:
                if case.site == "resid_pre":
                    x[rows, chosen[column]] = source[rows, chosen[column]]
                elif case.positions == "END":
                    x[:, -1, column] = source[:, -1, column]
                else:
                    x[:, :, column] = source[:, :, column]
                return x

            logits = model.bridge.run_with_hooks(
                pairs.corrupted.tokens, attention_mask=mask, fwd_hooks=[(hooks[layer], put)]
            )
            values.append(logit_diff(pairs, logits))
        return torch.stack(values)

    return run


def grid(model: mi.HookedModel, pairs: PromptPairs, case: Case) -> Cells:
    """Every cell of a case, in the order of a sweep's result."""
    columns = model.n_heads if case.site == "z" else len(spots(pairs, case.positions)[1])
    return [(layer, column) for layer in range(model.n_layers) for column in range(columns)]


def flops(model: mi.HookedModel, pairs: PromptPairs, case: Case) -> tuple[float, float]:
    """Naive and least FLOPs of all cells (see the module's docstring)."""
    config = model.bridge.cfg
    d, heads, layers, width = model.d_model, model.n_heads * model.d_head, model.n_layers, pairs.clean.n_pos
    output, mlp = d * heads, 3 * d * int(config.d_mlp)
    block = 2 * d * heads + 2 * d * model.n_kv_heads * model.d_head + mlp
    cells = grid(model, pairs, case)
    naive = len(cells) * len(pairs) * (layers * (width * block + 2 * heads * width**2) + width * d * model.d_vocab)
    floor = 0
    chosen = [spot.mask for spot in spots(pairs, case.positions)[1]]
    for prompt in range(len(pairs)):
        pad = int(pairs.clean.padding[prompt])
        length = width - pad
        differs = (pairs.clean.tokens[prompt] != pairs.corrupted.tokens[prompt]).tolist()[pad:]
        first = differs.index(True)

        def blocks(n: int, start: int, length: int = length) -> int:
            keys = sum(query + 1 for query in range(start, length))
            return n * ((length - start) * block + 2 * heads * keys)

        floor += 2 * blocks(layers, 0)
        for layer, column in cells:
            spot = chosen[0 if case.site == "z" else column][prompt].tolist()[pad:]
            changed = differs if layer == 0 and case.site == "resid_pre" else [at >= first for at in range(length)]
            touched = [at for at in range(length) if spot[at] and changed[at]]
            if not touched:
                continue
            inside = (length - touched[0]) * (output + mlp) if case.site == "z" else 0
            floor += blocks(layers - layer - (case.site == "z"), touched[0]) + inside + 2 * d
    return 2.0 * naive, 2.0 * floor


def measure(model: mi.HookedModel, case: Case) -> Outcome:
    """Run both sides of a case in turn and compare them."""
    pairs = pairs_of(model, case)
    cells = grid(model, pairs, case)
    picked = [i for i, (layer, column) in enumerate(cells) if (layer + column) % SAMPLE == 0]
    naive = (lens_side if case.n_pairs == 1 else loop_side)(model, pairs, case)
    naive([cells[picked[0]]])  # warm-up
    mi.patching.sweep(model, pairs, case.site, case.positions, layers=[model.n_layers - 1], progress=False, force=True)
    halves = picked[::2], picked[1::2]
    before, first = timed(lambda: naive([cells[i] for i in halves[0]]))
    ours, result = timed(lambda: mi.patching.sweep(model, pairs, case.site, case.positions, progress=False))
    after, second = timed(lambda: naive([cells[i] for i in halves[1]]))
    patched = torch.tensor(result.data["patched"].values).reshape(len(cells), len(pairs))
    gaps = [(patched[list(half)] - got.double()).abs().max() for half, got in zip(halves, (first, second), strict=True)]
    share = len(picked) / len(cells)
    least = flops(model, pairs, case)
    return Outcome(
        case.name, (before + after) / share / ours, case.required, least[0] / least[1], float(max(gaps)),
        ours, (before + after) / share, share, len(cells), len(pairs),
    )  # fmt: skip


HEADER = "case                 cells prompts  naive s  ours s   ratio required   floor  of it  max diff"


def row(one: Outcome) -> str:
    """A line of the table."""
    required = "–" if one.required is None else f"{one.required:g}x"
    return (
        f"{one.name:<20}{one.cells:>6}{one.prompts:>8}{one.naive_seconds:>9.1f}{one.ours_seconds:>8.1f}"
        f"{one.ratio:>7.1f}x{required:>9}{one.floor_ratio:>7.1f}x{one.ratio / one.floor_ratio:>7.0%}"
        f"{one.max_abs_diff:>10.1e}  {'ok' if one.ok else 'MISSED'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON. Returns the exit code."""
    args = arguments(str(__doc__), [case.name for case in CASES], argv)
    model = load_smollm2()
    print(f"naive side: one cell in {SAMPLE}, extrapolated\n{HEADER}")
    outcomes = []
    for case in CASES:
        if case.name in args.cases:
            outcomes.append(measure(model, case))
            print(row(outcomes[-1]), flush=True)
    ok = all(one.ok for one in outcomes)
    return write(args.json, [asdict(one) for one in outcomes], ok, tolerance=TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
