"""How fast edges are scored and circuits evaluated, beside the peers that do the same, and how near the least work.

    python scripts/bench/circuits.py [--json FILE] [--cases eap-ig grid exact eap] [--threads N] [--quick]

1. *eap-ig*: EAP-IG over inputs, 5 steps, all edges, beside EAP-IG's own code. At least 2 times as fast.
2. *grid*: circuits over MIB's grid, 10 sizes by absolute and by signed score, beside EAP-IG's own `evaluate_graph`.
   Ours is one whole call of `circuits.evaluate`, which adds KL, accuracy and intervals. A circuit that both selections
   have is run once on either side. At least 3 times as fast.
3. *exact*: exact effects of single edges, one in so many of them, beside auto-circuit's ACDC, which restarts the model
   at the edge's layer. Milliseconds an edge. At least 10 times as fast.
4. *eap*: EAP over all edges of SmolLM2 for 16 IOI prompts with new names, beside one plain forward and backward of the
   clean prompts (full prompts, all logits, the last position's logit difference, gradient of the embeddings alone). At
   most 4 times its time. *eap-swapped*: the same with the subject swapped, where prompts differ later; shown only.

Cases 1 to 3 run on GPT-2 small with random weights (seed 0) and random tokens: 15 of them, of which the 2nd, 4th and
11th differ between the sides, as in IOI with new names. 16 pairs; for *exact* one. Peers run in processes and an
environment of their own (`peers/`), on the same weights, tokens and metric; half of their work is done before ours and
half after. By default torch has one thread and seconds are CPU time of the measured calls, after a warm-up. What
the peer needs and lacks is printed, and its cases are left out.

*Checked*: scores, metrics and effects must agree to `TOLERANCE` of the largest; for *eap* each prompt's scores of the
embedding's edges must add up to the plain gradient times what its embeddings differ by.
*Memory*: how much the process grew at its peak; ours may use `MAX_BYTES`, and must keep to it.
*Floor*: multiply-adds of matmuls alone (circuit_floors.py). `floor_ratio` is the other side's over the least (for *eap*
the least over the other's). A side may lose more time than its multiply-adds say, on copies and on rows too few to fill
a matmul, so the ratio can exceed it; `floor` is the least at the rate of a large matmul, and *of it* is that over ours.
"""

import os

os.environ["TQDM_DISABLE"] = "1"

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers as hf
from circuit_floors import Work, rate
from measure import arguments, load_smollm2, write
from peer import PEERS, Missing, Peer, measured, serving
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

import mechinterp as mi
from mechinterp.circuits.engine import Engine
from mechinterp.circuits.evaluation import GRID, SELECTIONS, evaluate
from mechinterp.circuits.exact import edge_changes
from mechinterp.circuits.find import average
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.methods import EAP, EAPIG
from mechinterp.circuits.scores import Scores
from mechinterp.hooked.model import HookedModel, ModelInfo
from mechinterp.hooked.sites import Site
from mechinterp.tasks.pairs import PromptPairs, Target, assemble

TOLERANCE = 1e-3  # of the largest value; both sides are float32
MAX_BYTES = 1_000_000_000
STEPS = 5
N_POS, DIFFER = 15, (1, 3, 10)
EAP_IG = Path(os.environ.get("EAP_IG", PEERS / "eap-ig/src"))


@dataclass(frozen=True)
class Size:
    """How large the cases are: layers of GPT-2, pairs, and how many edges are sampled."""

    layers: int = 12
    pairs: int = 16
    edges: int = 512


QUICK = Size(3, 4, 96)


@dataclass(frozen=True)
class Outcome:
    """A case as measured. `ratio` is other / ours where `at_least` is set, else ours / other; `floor_ratio` is the same
    of multiply-adds, with the least that could do it in our place, and `floor` the unit's time of that least."""

    name: str
    beside: str
    ratio: float
    at_least: float | None
    at_most: float | None
    floor_ratio: float
    floor: float
    ours: float
    other: float
    unit: str
    max_rel_diff: float
    ours_peak_bytes: int
    other_peak_bytes: int
    what: str

    @property
    def ok(self) -> bool:
        """Fast enough, equal, and within its memory."""
        fast = self.at_least is None or self.ratio >= self.at_least
        lean = self.at_most is None or self.ratio <= self.at_most
        return fast and lean and self.max_rel_diff <= TOLERANCE and self.ours_peak_bytes <= MAX_BYTES


class Setting:
    """GPT-2 with random weights, random pairs, and the folder that peers read both from."""

    def __init__(self, size: Size, folder: Path):
        torch.manual_seed(0)
        module = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=size.layers)).eval()
        module.config._attn_implementation = "eager"
        module.save_pretrained(folder / "model")
        bridge = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=module.config, tokenizer=None)
        self.size, self.folder = size, folder
        self.model = HookedModel(bridge, None, ModelInfo("gpt2-random", "random weights", "module", False, False))
        self.graph = Graph(self.model)

    def pairs(self, n: int) -> PromptPairs:
        """Random pairs; the peers get the same."""
        draw = torch.Generator().manual_seed(0)
        clean = torch.randint(0, self.model.d_vocab, (n, N_POS), generator=draw)
        corrupted, at = clean.clone(), torch.tensor(DIFFER)
        corrupted[:, at] = torch.randint(0, self.model.d_vocab, (n, len(DIFFER)), generator=draw)
        answer, wrong = torch.randint(0, self.model.d_vocab, (2, n), generator=draw).tolist()
        given = {"clean": clean.tolist(), "corrupted": corrupted.tolist(), "answer": answer, "wrong": wrong}
        (self.folder / "model/prompts.json").write_text(json.dumps(given))
        targets = [[Target(N_POS - 1, {a: 1.0}, {b: 1.0})] for a, b in zip(answer, wrong, strict=True)]
        return assemble(
            self.model, "random", "three-tokens", clean.tolist(), corrupted.tolist(), [{}] * n, targets, bos=False
        )

    def give(self, **tensors: Tensor) -> str:
        """Write tensors where a peer finds them."""
        path = self.folder / f"{'-'.join(tensors)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return str(path)

    @contextmanager
    def eap_ig(self) -> Iterator[Peer]:
        """EAP-IG's own code."""
        if not (EAP_IG / "eap").is_dir():
            raise Missing(f"no EAP-IG at {EAP_IG}: copy the src folder of github.com/hannamw/EAP-IG there (EAP_IG=…)")
        with serving("env", "setup.sh", "eap_ig.py", self.folder / "model", EAP_IG, torch.get_num_threads()) as peer:
            yield peer


def gap(ours: Tensor, others: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours.double() - others.double()).abs().max() / (others if scale is None else scale).abs().max())


def floor(work: tuple[int, int], scale: float = 1.0) -> tuple[float, float]:
    """Other over least, and the seconds (times `scale`) of the least."""
    other, least = work
    return other / least, scale * least / rate()


def eap_ig(setting: Setting) -> Outcome:
    """All edges by EAP-IG over inputs."""
    pairs, graph = setting.pairs(setting.size.pairs), setting.graph

    def ours(steps: int = STEPS) -> Tensor:
        engine = Engine(graph, pairs, max_bytes=MAX_BYTES)
        return average(engine, EAPIG(steps, "left"), 0, 0)[0]

    with setting.eap_ig() as peer:
        peer("scores", steps=1)
        ours(1)
        before, theirs_bytes, made = peer("scores", steps=STEPS)
        spent, peak, scores = measured(ours)
        after, *_ = peer("scores", steps=STEPS)
    assert torch.equal(made["real"].T, graph.valid[..., 0]), "the graphs differ"
    other = (before + after) / 2
    work = Work(graph, pairs)
    return Outcome(
        "eap-ig", "EAP-IG's own code", other / spent, 2, None, *floor(work.eap_ig(STEPS)), spent, other, "s",
        gap(scores, graph.gather(made["scores"].T[..., None])), peak, theirs_bytes,
        f"{graph.n_edges} edges, {len(pairs)} pairs, {STEPS} steps, rule left",
    )  # fmt: skip


def grid(setting: Setting) -> Outcome:
    """Circuits over MIB's grid."""
    pairs, graph = setting.pairs(setting.size.pairs), setting.graph
    found = average(Engine(graph, pairs, max_bytes=MAX_BYTES), EAP(), 0, 0)[0]
    about = {"ablation": "resample", "direction": "noise", "metric": "logit-diff"}
    scores = Scores(graph, found, "edge", torch.zeros(0, graph.n_edges), {}, about)
    chosen = [scores.select(k, by=by).kept for by in SELECTIONS for k in GRID]
    kept, which = torch.stack(chosen).unique(dim=0, return_inverse=True)
    masks = torch.zeros(len(kept), *graph.valid.shape[:2])
    masks[:, graph.valid[..., 0]] = kept.float()
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))  # large and small in both halves
    halves = [order[::2], order[1::2]]

    def ours() -> Tensor:
        made = evaluate(scores, pairs, control_sizes=(), progress=False, max_bytes=MAX_BYTES)
        return torch.tensor(made.data["metric"].values).flatten(0, 1)

    def theirs(which: Tensor) -> tuple[float, int, dict[str, Tensor]]:
        return peer("evaluate", masks=setting.give(kept=masks[which].mT))

    with setting.eap_ig() as peer:
        theirs(halves[0][:1])
        evaluate(scores, pairs, sizes=(0.1,), control_sizes=(), progress=False, max_bytes=MAX_BYTES)
        before, theirs_bytes, first = theirs(halves[0])
        spent, peak, values = measured(ours)
        after, _, second = theirs(halves[1])
    made = torch.zeros(len(kept), len(pairs))
    made[halves[0]], made[halves[1]] = first["values"], second["values"]
    edges = torch.zeros(len(kept), dtype=torch.long)
    edges[halves[0]], edges[halves[1]] = first["edges"], second["edges"]
    assert torch.equal(edges, kept.sum(1)), "it prunes otherwise"
    return Outcome(
        "grid", "EAP-IG's own code", (before + after) / spent, 3, None, *floor(Work(graph, pairs).grid(kept)), spent,
        before + after, "s", gap(values, made[which]), peak, theirs_bytes,
        f"{len(chosen)} circuits, {len(kept)} of them distinct, {len(pairs)} pairs",
    )  # fmt: skip


def exact(setting: Setting) -> Outcome:
    """Exact effects of a sample of edges, evenly spread."""
    pairs, graph = setting.pairs(1), setting.graph
    edges = torch.linspace(0, graph.n_edges - 1, setting.size.edges).long()
    halves = [edges[::2], edges[1::2]]

    def ours(edges: Tensor = edges) -> Tensor:
        engine = Engine(graph, pairs, max_bytes=MAX_BYTES)
        return torch.cat([edge_changes(part, edges) for part in engine.parts()], 1)

    def theirs(edges: Tensor) -> tuple[float, int, dict[str, Tensor]]:
        return peer("edges", edges=setting.give(edges=graph.edges[edges, :2]))

    with serving("env", "setup.sh", "acdc.py", setting.folder / "model", torch.get_num_threads()) as peer:
        theirs(edges[:2])
        ours(edges[:8])
        before, theirs_bytes, first = theirs(halves[0])
        spent, peak, changes = measured(ours)
        after, _, second = theirs(halves[1])
    made = torch.zeros(len(edges), 1)
    made[::2], made[1::2] = first["values"], second["values"]
    other, each = 500 * (before + after), 1000 * spent / len(edges)
    most, least = floor(Work(graph, pairs).exact(edges), 1000 / len(edges))
    return Outcome(
        "exact", "auto-circuit's ACDC", other / each, 10, None, most, least, each, other, "ms/edge",
        gap(changes, made - Engine(graph, pairs).full[:, None], changes), peak, theirs_bytes,
        f"{len(edges)} of {graph.n_edges} edges, {len(pairs)} pair",
    )  # fmt: skip


def eap(model: HookedModel, size: Size, corruption: str) -> Outcome:
    """EAP over all edges beside a plain forward and backward."""
    pairs = mi.tasks.ioi(model, size.pairs, seed=0, corruption=corruption)  # type: ignore[arg-type]
    graph, kept = Graph(model), dict[str, Tensor]()
    site = Site("resid_pre", 0).hook_name
    sides = {"clean": pairs.clean, "corrupted": pairs.corrupted}

    def run(side: str) -> Tensor:
        """`[prompt]` metric; keeps the embeddings."""

        def keep(activation: Tensor, hook: object) -> Tensor:
            kept[side] = activation.detach().requires_grad_()
            return kept[side]

        prompts = sides[side]
        mask = None if prompts.mask is None else prompts.mask.long()
        logits = model.bridge.run_with_hooks(
            prompts.tokens, fwd_hooks=[(site, keep)], attention_mask=mask, use_cache=False
        )[:, -1]
        rows = torch.arange(len(pairs))
        return logits[rows, pairs.answers.answer[:, 0, 0]] - logits[rows, pairs.answers.wrong[:, 0, 0]]

    def plain() -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(run("clean").sum(), kept["clean"])[0]

    def ours() -> Tensor:
        return average(Engine(graph, pairs, max_bytes=MAX_BYTES), EAP(), 0, 0)[0]

    ours()
    apart = torch.cat([one for _, one in EAP().scores(Engine(graph, pairs, max_bytes=MAX_BYTES))])  # [prompt edge]
    slope = plain()
    run("corrupted")
    step = (kept["corrupted"] - kept["clean"]).detach() * pairs.clean.real[..., None]
    change = (step * slope).sum((1, 2))  # [prompt]
    before, plain_bytes, _ = measured(lambda: [plain(), plain()])
    spent, peak, scores = measured(ours)
    after, *_ = measured(lambda: [plain(), plain()])
    again, *_ = measured(ours)
    other, spent = (before + after) / 4, (spent + again) / 2
    most, least = floor(Work(graph, pairs).eap())
    from_embed = apart[:, graph.edges[:, 1] == 0].sum(1)
    return Outcome(
        "eap" if corruption == "new-names" else "eap-swapped", "forward + backward", spent / other, None,
        4 if corruption == "new-names" else None, 1 / most, least, spent, other, "s",
        max(gap(-from_embed, change), gap(scores, apart.mean(0))), peak, plain_bytes,
        f"{graph.n_edges} edges, {len(pairs)} pairs",
    )  # fmt: skip


CASES: dict[str, Callable[[Setting], Outcome]] = {"eap-ig": eap_ig, "grid": grid, "exact": exact}
PLAIN = {"eap": "new-names", "eap-swapped": "swapped-subject"}
HEADER = "case           beside     ours            ratio limit   floor of it max diff  peak MB: other  ours"


def row(one: Outcome) -> str:
    """A line of the table."""
    limit = f"≥ {one.at_least:g}" if one.at_least else "–" if one.at_most is None else f"≤ {one.at_most:g}"
    return (
        f"{one.name:<12}{one.other:>9.2f}{one.ours:>9.2f} {one.unit:<8}{one.ratio:>7.2f}x{limit:>6}"
        f"{one.floor:>8.2f}{one.floor / one.ours:>6.0%}{one.max_rel_diff:>9.0e}{one.other_peak_bytes / 1e6:>16.0f}"
        f"{one.ours_peak_bytes / 1e6:>6.0f}  {'ok' if one.ok else 'MISSED'}  {one.beside}; {one.what}"
    )


def outcomes(names: Sequence[str], size: Size, skipped: dict[str, str]) -> Iterator[Outcome]:
    """Each case as it is done; those whose peer is missing go to `skipped`, with the reason."""
    if set(names) & set(CASES):
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(size, Path(folder))
            print(f"{setting.graph!r}, {torch.get_num_threads()} thread(s)")
            for name in (name for name in names if name in CASES):
                try:
                    yield CASES[name](setting)
                except Missing as error:
                    skipped[name] = str(error)
    if set(names) & set(PLAIN):
        model = load_smollm2()
        for name in (name for name in names if name in PLAIN):
            yield eap(model, size, PLAIN[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    quick = "--quick" in given  # small models, to try the program out: its ratios are nobody's claim
    args = arguments(str(__doc__), [*CASES, *PLAIN], [one for one in given if one != "--quick"])
    print(HEADER)
    skipped: dict[str, str] = {}
    made = []
    for one in outcomes(args.cases, QUICK if quick else Size(), skipped):
        made.append(one)
        print(row(one), flush=True)
    for name, reason in skipped.items():
        print(f"{name:<12}skipped: {reason}")
    ok = all(one.ok for one in made)
    cases = [{**asdict(one), "ok": one.ok} for one in made]
    return write(args.json, cases, ok, tolerance=TOLERANCE, max_bytes=MAX_BYTES, skipped=skipped, quick=quick)


if __name__ == "__main__":
    sys.exit(main())
