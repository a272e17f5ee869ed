"""What the analyses cost on SmolLM2-135M, beside the loop that one would write or the least that they need.

    python scripts/bench/analyses.py [--json FILE] [--cases scan lens patterns composition] [--threads N]

- *scan*: every head mean-ablated at END over 64 prompts (logit difference and P(answer), intervals, threshold), beside
  a hook loop: the whole batch once a head, full logits; one head in fifteen of it is run. Floor: the FLOPs of
  the loop over those of rows that run only END, from behind their layer's attention on, and unembed the whole
  vocabulary there, since P(answer) needs it; one full run of the prompts is added.
- *lens*: the logit lens over all layers and positions of 4 texts of 64 tokens (first tokens, entropy, KL), beside one
  forward and 30 more times norm and unembedding of what it keeps. Limit: 1.3 times that.
- *patterns*: positional patterns of every head, with their nulls, on 16 sequences of 100 random tokens, beside one
  forward that records attention. Limit: 1.2 times that. (Induction and duplicate tokens add a quarter of a forward for
  their null, on fresh tokens.)
- *composition*: K-composition between all 270 heads, in a process of its own: its largest resident size. Limit: 3 GB.

Both sides of a case run in one process, half of the slow side before and half after ours; both give the same numbers
to `TOLERANCE`.
"""

import os

os.environ["TQDM_DISABLE"] = "1"

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from measure import arguments, load_smollm2, timed, write
from torch import Tensor

import mechinterp as mi
from mechinterp.hooked import forward, weights
from mechinterp.hooked.prompts import Prompts
from mechinterp.tasks.pairs import PromptPairs

TOLERANCE = 1e-3
SAMPLE = 15


@dataclass(frozen=True)
class Outcome:
    """A case as measured: `ratio` is slow / ours where `at_least` is set, ours / least needed where `at_most` is."""

    name: str
    ratio: float
    at_least: float | None
    at_most: float | None
    floor_ratio: float | None
    ours: float
    beside: float
    unit: str
    max_abs_diff: float | None

    @property
    def ok(self) -> bool:
        """Within its limit, and equal."""
        fast = self.at_least is None or self.ratio >= self.at_least
        lean = self.at_most is None or self.ratio <= self.at_most
        return fast and lean and (self.max_abs_diff is None or self.max_abs_diff <= TOLERANCE)


def in_turn(slow: Sequence[Callable[[], object]], ours: Callable[[], object]) -> tuple[float, list, float, object]:
    """Seconds and results of both sides: the first half of the slow calls, ours, the other half."""
    half = len(slow) // 2
    before = [timed(one) for one in slow[:half]]
    own = timed(ours)
    after = [timed(one) for one in slow[half:]]
    return sum(t for t, _ in before + after), [made for _, made in before + after], own[0], own[1]


def scan(model: mi.HookedModel) -> Outcome:
    """Every head knocked out at END, over 64 prompts."""
    task = mi.tasks.ioi(model, 64, seed=0)
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    picked = [head for head in heads if sum(head) % SAMPLE == 0]
    means = head_means(model, task)
    loop = [lambda head=head: knocked_out(model, task, head, means[head[0]][head[1]]) for head in picked]
    loop[0]()
    mi.ablation.scan(model, task, positions="END", layers=[model.n_layers - 1], progress=False)
    slow, values, ours, result = in_turn(loop, lambda: mi.ablation.scan(model, task, positions="END", progress=False))
    gap = max(
        float((torch.tensor(result.data[f"after_{name}"].sel(layer=layer, head=head).values) - got[i]).abs().max())
        for (layer, head), got in zip(picked, values, strict=True)
        for i, name in enumerate(("logit_diff", "prob"))
    )
    slow *= len(heads) / len(picked)
    return Outcome("scan", slow / ours, 10, None, scan_floor(model, task), ours, slow, "s", gap)


def head_means(model: mi.HookedModel, task: PromptPairs) -> list[Tensor]:
    """`[head d_head]` by layer: each head's mean output at END over the clean prompts."""
    kept = {}
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
    hooks = [(name, lambda z, hook, name=name: kept.__setitem__(name, z[:, -1].mean(0))) for name in names]
    model.bridge.run_with_hooks(task.clean.tokens, attention_mask=mask_of(task.clean), fwd_hooks=hooks)
    return [kept[name] for name in names]


def knocked_out(model: mi.HookedModel, task: PromptPairs, head: tuple[int, int], mean: Tensor) -> tuple[Tensor, Tensor]:
    """Logit difference and P(answer) `[prompt]` by a plain hook on the whole batch."""

    def put(z: Tensor, hook: object) -> Tensor:
        z[:, -1, head[1]] = mean
        return z

    logits = model.bridge.run_with_hooks(
        task.clean.tokens, attention_mask=mask_of(task.clean), fwd_hooks=[(f"blocks.{head[0]}.attn.hook_z", put)]
    )[:, -1]
    rows, answer, wrong = torch.arange(len(task)), task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]
    return logits[rows, answer] - logits[rows, wrong], logits.softmax(-1)[rows, answer]


def mask_of(prompts: Prompts) -> Tensor | None:
    """What the bridge takes."""
    return None if prompts.mask is None else prompts.mask.long()


def scan_floor(model: mi.HookedModel, task: PromptPairs) -> float:
    """FLOPs of the hook loop over the least of an exact method (see the module's docstring)."""
    config, width, n = model.bridge.cfg, task.clean.n_pos, len(task)
    d, heads, layers = model.d_model, model.n_heads * model.d_head, model.n_layers
    mlp, out, vocab = 3 * d * int(config.d_mlp), d * heads, d * model.d_vocab
    block = 2 * d * heads + 2 * d * model.n_kv_heads * model.d_head + mlp
    naive = layers * model.n_heads * n * (layers * (width * block + 2 * heads * width**2) + width * vocab)
    least = n * layers * (width * block + heads * width**2)
    for layer in range(layers):
        least += model.n_heads * n * ((layers - layer - 1) * (block + 2 * heads * width) + out + mlp + vocab)
    return naive / least


def lens(model: mi.HookedModel) -> Outcome:
    """The logit lens beside one forward and the unembeddings that it needs."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.d_vocab, (4, 64), generator=draw)
    prompts = Prompts(tokens)
    norm, (columns, _) = model.bridge.ln_final.original_component, weights.unembedding(model)
    sites = [mi.Site("resid_pre", layer) for layer in range(model.n_layers)]
    best = {}

    def needed() -> None:
        kept: dict[str, Tensor] = {}
        best[model.n_layers] = forward.run(model, prompts, record=sites, into=kept).argmax(-1)
        for layer, site in enumerate(sites):
            best[layer] = (norm(kept[site.hook_name]) @ columns).argmax(-1)

    def ours() -> object:
        return mi.lens.logit_lens(model, tokens, positions="all")

    needed(), ours()
    least, _, own, result = in_turn([needed] * 4, ours)
    _, _, again, _ = in_turn([], ours)
    found = torch.tensor(result.data["top_token"].isel(rank=0).transpose("layer", "prompt", "pos").values)
    agree = torch.stack([best[layer] for layer in range(model.n_layers + 1)]) == found
    return Outcome(
        "lens", (own + again) / 2 / (least / 4), None, 1.3, None, own, least / 4, "s", float((~agree).float().mean())
    )


def patterns(model: mi.HookedModel) -> Outcome:
    """Pattern scores beside one forward that records attention."""
    prompts = mi.heads.repeated_tokens(model, n=16, period=50)
    kinds = ["previous_token", "first_token", "self"]
    kept = {}

    def needed() -> None:
        kept["cache"] = model.run_with_cache(prompts, ["pattern"])[1]

    def ours() -> object:
        return mi.heads.patterns(model, prompts, period=50, kinds=kinds)

    needed(), ours()
    least, _, own, result = in_turn([needed] * 4, ours)
    _, _, again, _ = in_turn([], ours)
    gaps = []
    for layer in range(model.n_layers):
        pattern = kept["cache"]["pattern", layer]
        want = torch.diagonal(pattern, -1, dim1=-2, dim2=-1)[..., 1:].mean((0, -1))
        got = torch.tensor(result.grid("previous_token")[layer])
        gaps.append(float((got - want).abs().max()))
    ratio = (own + again) / 2 / (least / 4)
    return Outcome("patterns", ratio, None, 1.2, None, (own + again) / 2, least / 4, "s", max(gaps))


COMPOSITION = """
import torch
torch.set_num_threads({threads})
import mechinterp as mi
from mechinterp.manifest import peak_memory_bytes
model = mi.load("smollm2-135m", device="cpu", bos=False)
before = peak_memory_bytes()
mi.heads.composition(model, "k")
print(before, peak_memory_bytes())
"""


def composition(model: mi.HookedModel) -> Outcome:
    """The largest resident size of a process that scores all pairs of heads."""
    program = COMPOSITION.format(threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, peak = (int(part) / 1e9 for part in done.stdout.split()[-2:])
    return Outcome("composition", peak / 3, None, 1.0, None, peak, before, "GB", None)


CASES = {"scan": scan, "lens": lens, "patterns": patterns, "composition": composition}


def row(one: Outcome) -> str:
    """A line of the table."""
    limit = f"≥ {one.at_least:g}" if one.at_least else f"≤ {one.at_most:g}"
    floor = "–" if one.floor_ratio is None else f"{one.floor_ratio:.1f}x"
    gap = "–" if one.max_abs_diff is None else f"{one.max_abs_diff:.1e}"
    return (
        f"{one.name:<12}{one.beside:>9.2f}{one.ours:>9.2f} {one.unit:<3}{one.ratio:>7.2f}x{limit:>8}{floor:>8}{gap:>10}"
        f"  {'ok' if one.ok else 'MISSED'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON. Returns the exit code."""
    args = arguments(str(__doc__), list(CASES), argv)
    model = load_smollm2()
    print(f"{'case':<12}{'beside':>9}{'ours':>9} {'':<3}{'ratio':>8}{'limit':>8}{'floor':>8}{'max diff':>10}")
    outcomes = []
    for name in args.cases:
        outcomes.append(CASES[name](model))
        print(row(outcomes[-1]), flush=True)
    ok = all(one.ok for one in outcomes)
    return write(args.json, [asdict(one) for one in outcomes], ok, tolerance=TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
