"""Which attention heads carry the indirect object? Activation patching of a real language model, end to end.

"When Mary and John went to the store, John gave a drink to" -> " Mary" (Wang et al. 2023). The experiment

1. draws prompt pairs with two corruptions: the subject swapped, and three new names;
2. patches every head, in both directions and with both corruptions, at END and at all positions;
3. patches the residual stream, attention and MLP outputs by role (with new names: with a swapped subject everything
   before S2 is identical);
4. names the heads that pass both controls by what they attend to and what they write;
5. compares with a reference: values from plain transformers hooks for SmolLM2, the published classes for GPT-2;
6. writes one run folder and one offline report. Running again skips what is done.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mechinterp as mi
from experiments.expected import REFERENCE
from experiments.settings import Settings, command_line, finished

if TYPE_CHECKING:
    from mechinterp.patching import SweepResult
    from mechinterp.tasks import PromptPairs

CORRUPTIONS = ("swapped-subject", "new-names")
# Attention that names a head: query role, key role.
LOOKS = (
    ("END", "IO"), ("END", "S2"), ("END", "S1"), ("END", "END"), ("S2", "S1"), ("S2", "S1+1"), ("S1+1", "S1"),
)  # fmt: skip
# Of heads that write next to nothing themselves: they act on other heads.
MOVERS_OF_OTHERS = {
    ("END", "S2"): "S-inhibition",
    ("S2", "S1"): "duplicate token",
    ("S2", "S1+1"): "induction",
    ("S1+1", "S1"): "previous token",
}
LOOKS_AT_LEAST = 0.1  # mean attention weight
WRITES_AT_LEAST = 0.05  # share of the clean logit difference


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the run; the same settings always have the same run folder."""

    n: int = 64
    """Pairs for heads at END, and for residual stream, attention and MLP outputs by role."""
    n_heads: int = 16
    """Pairs for heads at all positions."""
    minutes: float = field(default=4.8, metadata={"in_id": False})
    """Attention and MLP outputs are dropped (never prompts) when they would not be done by then."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    model = config.load()
    began = time.monotonic()
    pairs = {name: mi.tasks.ioi(model, config.n, config.seed, corruption=name) for name in CORRUPTIONS}
    few = {name: mi.tasks.ioi(model, config.n_heads, config.seed, corruption=name) for name in CORRUPTIONS}
    inputs = {"model": model.weights_hash(), "pairs": pairs["new-names"].hash()}
    with mi.reporting.Run.open("ioi_patching", config, root=config.root, inputs=inputs) as run:
        print(pairs["swapped-subject"].preview(model, 2), flush=True)
        baselines = {name: mi.baseline(model, pairs[name], seed=config.seed) for name in CORRUPTIONS}
        for name, baseline in baselines.items():
            run.log(f"{name}: {baseline}")
        sweeps, dropped = _sweeps(model, pairs, few, run, config, began)
        found = found_heads(sweeps)
        named = run.part("heads_named.json", lambda: name_heads(model, pairs["swapped-subject"], found), _read, _write)
        against = compare(model, pairs, sweeps, named)
        answer = finding(model, sweeps, named, config)
        report = _report(model, pairs, baselines, sweeps, named, against, answer, dropped, config)
        for name, sweep in sweeps.items():
            run.figure(name, sweep.figure())
        path = run.finish(report)
        run.log(f"\n{answer}\n\n{_table_text(named)}\n\n{against}")
        if dropped:
            run.log(f"dropped for time: {', '.join(dropped)}")
    finished(path)
    return path


def _sweeps(
    model: mi.HookedModel,
    pairs: "dict[str, PromptPairs]",
    few: "dict[str, PromptPairs]",
    run: "mi.reporting.Run",
    config: Config,
    began: float,
) -> "tuple[dict[str, SweepResult], list[str]]":
    """Every sweep by name, the most telling first; and those dropped because time ran short."""
    plan: list[tuple[str, PromptPairs, str, str, str]] = []
    for corruption in CORRUPTIONS:
        for direction in ("denoise", "noise"):
            plan.append((f"heads_end-{direction}-{corruption}", pairs[corruption], "z", "END", direction))
            plan.append((f"heads_all-{direction}-{corruption}", few[corruption], "z", "all", direction))
    by_role = [
        (f"{site}-roles", pairs["new-names"], site, "roles", "denoise") for site in ("resid_pre", "attn_out", "mlp_out")
    ]
    done, dropped = {}, []
    for name, task, site, positions, direction in [*plan, *by_role]:
        done_before = (run.path / "results" / name).exists()
        spent = time.monotonic() - began
        # As many rows as the residual stream had, so about as long.
        expected = run.manifest["parts"].get("resid_pre-roles", {}).get("seconds", 0)
        if site in ("attn_out", "mlp_out") and not done_before and spent + expected > 60 * config.minutes:
            dropped.append(name)
            continue

        def make(task: Any = task, site: str = site, at: str = positions, way: Any = direction) -> Any:
            return mi.patching.sweep(model, task, site, at, way, seed=config.seed)

        done[name] = run.part(name, make, mi.patching.SweepResult.load, lambda result, path: result.save(path))
    return done, dropped


def found_heads(sweeps: "dict[str, SweepResult]", n: int = 10) -> list[tuple[int, int]]:
    """The heads that pass both controls in a denoising sweep, largest |effect| first."""
    best: dict[tuple[int, int], float] = {}
    for name, sweep in sweeps.items():
        if name.startswith("heads") and "denoise" in name:
            for row in sweep.top(10).to_dict("records"):
                if row["passes"]:
                    head = (row["layer"], row["head"])
                    best[head] = max(best.get(head, 0.0), abs(row["effect"]))
    return sorted(best, key=lambda head: -best[head])[:n]


def name_heads(model: mi.HookedModel, pairs: "PromptPairs", heads: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What each head attends to and writes, on the clean prompts, and the name that follows (`head_name`).

    `attention` is the mean weight from one role's position to another's. `to_io` and `to_s` are what is lost of the
    two names' logits (less the mean logit) when the head's write at END is taken out of the final residual stream and
    nothing between is changed.
    """
    layers = sorted({layer for layer, _ in heads})
    sites = [mi.Site(kind, layer) for layer in layers for kind in ("pattern", "z")]
    _, cache = model.run_with_cache(pairs.clean, [*sites, mi.Site("resid_post", model.n_layers - 1)])
    clean = float(mi.evaluate(model, pairs).mean())
    rows, named = range(len(pairs)), []
    for layer, head in heads:
        pattern = cache["pattern", layer][:, head]
        attention = [
            float(pattern[rows, pairs.clean.roles[query], pairs.clean.roles[key]].mean()) for query, key in LOOKS
        ]
        to_io, to_s = _direct(model, pairs, cache, layer, head)
        name = head_name(attention, (to_io - to_s) / clean)
        named.append({"head": f"L{layer}H{head}", "name": name, "attention": attention, "to_io": to_io, "to_s": to_s})
    return named


def head_name(attention: list[float], direct: float) -> str:
    """A head's name from its `LOOKS` and its direct share of the logit difference."""
    if abs(direct) >= WRITES_AT_LEAST:
        weight, key = max(
            (weight, key) for weight, (query, key) in zip(attention, LOOKS, strict=True) if query == "END"
        )
        if weight < LOOKS_AT_LEAST or key == "END":
            where = "looks elsewhere" if weight < LOOKS_AT_LEAST else "looks at END"
            return f"writer, {where}" if direct > 0 else f"negative writer, {where}"
        if key == "IO":
            return "name mover" if direct > 0 else "negative name mover"
        return "subject suppressor" if direct > 0 else "subject mover"
    looks = {look: weight for look, weight in zip(LOOKS, attention, strict=True) if look in MOVERS_OF_OTHERS}
    best = ("END", "S2") if looks["END", "S2"] >= LOOKS_AT_LEAST else max(looks, key=lambda look: looks[look])
    return MOVERS_OF_OTHERS[best] if looks[best] >= LOOKS_AT_LEAST else "unnamed"


def _direct(model: mi.HookedModel, pairs: "PromptPairs", cache: mi.Cache, layer: int, head: int) -> tuple[float, float]:
    """Mean loss of the two names' centred logits when the head's write at END leaves the final residual stream."""
    final = cache["resid_post", -1][:, -1]
    write = cache["z", layer][:, -1, head] @ model.bridge.blocks[layer].attn.W_O[head]
    norm, unembed = model.bridge.ln_final.original_component, model.bridge.unembed.original_component
    lost = unembed(norm(final)) - unembed(norm(final - write))
    lost = lost - lost.mean(-1, keepdim=True)
    io, s = (ids[:, 0, :1].to(lost.device) for ids in (pairs.answers.answer, pairs.answers.wrong))
    return float(lost.gather(1, io).mean()), float(lost.gather(1, s).mean())


def compare(
    model: mi.HookedModel,
    pairs: "dict[str, PromptPairs]",
    sweeps: "dict[str, SweepResult]",
    named: list[dict[str, Any]],
) -> str:
    """A sentence on how the numbers compare with the reference of this model."""
    if model.info.name == "gpt2":
        published = _read(REFERENCE / "ioi_gpt2.json")
        classes = {head: name for name, heads in published["classes"].items() for head in heads}
        lines = [f"{h['head']} ({h['name']}; published: {classes.get(h['head'], 'not in the circuit')})" for h in named]
        bos = "" if model.info.bos else " The published heads were measured with a BOS: run again with --bos."
        return f"Against {published['source']}: {'; '.join(lines)}.{bos}"
    reference = REFERENCE / "ioi_smollm2.json"
    if model.info.name != "smollm2-135m" or model.info.bos or not reference.is_file():
        return "No reference values for this model."
    listed = _read(REFERENCE / "ioi_smollm2_pairs.json")["pairs"]
    if not all(begins_with(pairs[name], listed[name]) for name in CORRUPTIONS):
        return "No comparison: the reference values were made from other prompts (seed 0, the first 16 pairs)."
    gaps = reference_gaps(sweeps, _read(reference))
    worst = max(gaps.values())
    verdict = "agree" if worst < 1e-3 else "DO NOT agree"
    return (
        f"Reference values from plain transformers hooks {verdict} with ours: largest difference {worst:.1e} over "
        f"{len(gaps)} sweeps of all heads."
    )


def begins_with(pairs: "PromptPairs", listed: list[dict[str, Any]]) -> bool:
    """Whether the first pairs are those listed, token by token."""
    if len(pairs) < len(listed):
        return False
    sides = [(name, getattr(pairs, name)) for name in ("clean", "corrupted")]
    return all(
        prompts.tokens[i][prompts.real[i]].tolist() == one[name]
        for i, one in enumerate(listed)
        for name, prompts in sides
    )


def reference_gaps(sweeps: "dict[str, SweepResult]", reference: dict[str, Any]) -> dict[str, float]:
    """Largest difference of an effect, by sweep, on the prompts that the reference was made from."""
    gaps = {}
    for corruption, values in reference["corruptions"].items():
        for kind in ("heads_end", "heads_all"):
            sweep, n = sweeps.get(f"{kind}-denoise-{corruption}"), values["n"]
            if sweep is None or kind not in values or sweep.about["n_prompts"] < n:
                continue
            first = sweep.data.isel(prompt=slice(0, n))
            whole = (first["source"] - first["base"]).mean("prompt")
            effect = (first["patched"] - first["base"]).mean("prompt") / whole
            gaps[f"{kind} {corruption}"] = float(abs(effect.squeeze().values - values[kind]).max())
    return gaps


def finding(
    model: mi.HookedModel, sweeps: "dict[str, SweepResult]", named: list[dict[str, Any]], config: Config
) -> str:
    """The answer in one or two sentences, with n and intervals."""
    end = sweeps["heads_end-denoise-swapped-subject"]
    name_of = {head["head"]: head["name"] for head in named}
    parts = []
    for row in end.top(10).to_dict("records"):
        if row["passes"] and len(parts) < 4:
            head = f"L{row['layer']}H{row['head']}"
            look = name_of.get(head, "unnamed")
            parts.append(f"{head} ({look}, {row['effect']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}])")
    if not parts:
        return f"In {model.info.name} no head passes both controls at END (n={config.n})."
    return (
        f"In {model.info.name} the indirect-object answer reaches the last position through {', '.join(parts)}: "
        f"share of the logit difference that each head's clean output restores at END when the subject is swapped "
        f"(n={config.n}, 95% intervals {end.about['scope']}); heads at all positions: n={config.n_heads}."
    )


def _report(
    model: mi.HookedModel,
    pairs: "dict[str, PromptPairs]",
    baselines: "dict[str, Any]",
    sweeps: "dict[str, SweepResult]",
    named: list[dict[str, Any]],
    against: str,
    answer: str,
    dropped: list[str],
    config: Config,
) -> "mi.reporting.Report":
    from mechinterp.reporting.attention import attention_view
    from mechinterp.reporting.sweeps import baseline_rows, prompt_preview, sweep_section

    groups = {
        "Heads at END": [n for n in sweeps if n.startswith("heads_end")],
        "Heads at all positions": [n for n in sweeps if n.startswith("heads_all")],
        "Residual stream, attention and MLP outputs by role": [n for n in sweeps if n.endswith("roles")],
    }
    texts = {
        "Heads at END": "Each head's output z at the last token, patched alone.",
        "Heads at all positions": "Each head's output at all tokens at once: heads that act before END show only here.",
        "Residual stream, attention and MLP outputs by role": "New names, denoised: where the answer's information is, "
        "by token role.",
    }
    sections = [
        sweep_section(heading, texts[heading], [sweeps[name] for name in names])
        for heading, names in groups.items()
        if names
    ]
    view = (
        attention_view(model, pairs["swapped-subject"].clean, {h["head"]: h["name"] for h in named}) if named else None
    )
    heads = mi.reporting.Section(
        "The heads that were found", "What each head attends to and writes, on the clean prompts.",
        table=_table(named), attention=view,
    )  # fmt: skip
    caveats = [
        "An effect is a ratio of means over prompts: 0 is the base run, 1 the run that the activation comes from.",
        "A dot marks cells that pass both controls: beyond the sign-flip threshold over all cells of that sweep "
        "(family-wise 5%), and different from a patch out of a donor prompt. Denoising: a donor of other names in "
        "another order. Noising: the same names in the same order, in other words. Only the ten largest cells of a "
        "sweep have the donor control.",
        "Single-head effects do not add up: backup heads take over, and heads share what they move.",
        "A head's name follows from where it looks and what it writes directly: a label, not a proof of its part.",
        against,
        *([f"Dropped because the time was over: {', '.join(dropped)}."] if dropped else []),
    ]
    rows = [(f"{name}, {key}", value) for name, b in baselines.items() for key, value in baseline_rows(b)]
    return mi.reporting.Report(
        title="Which heads carry the indirect object?",
        question="Which attention heads carry the answer to an indirect-object prompt, and what do they do?",
        answer=answer,
        header=f"{model.header()} · IOI, {len(pairs['new-names'])} pairs",
        command=config.command(__file__),
        baseline=tuple(rows),
        prompts=prompt_preview(model, pairs["swapped-subject"], 2) + prompt_preview(model, pairs["new-names"], 1),
        sections=(heads, *sections),
        caveats=tuple(caveats),
    )


def _table(named: list[dict[str, Any]]) -> "mi.reporting.Table":
    columns = ("head", "name", *(f"{query}→{key}" for query, key in LOOKS), "writes IO", "writes S")
    rows = tuple((h["head"], h["name"], *h["attention"], h["to_io"], h["to_s"]) for h in named)
    return mi.reporting.Table(
        columns, rows, "Mean attention weight from role to role; direct effect on the two names' logits."
    )


def _table_text(named: list[dict[str, Any]]) -> str:
    looks = "".join(f"{query + '→' + key:>9}" for query, key in LOOKS)
    lines = [f"{'head':<8}{'name':<26}{looks}{'IO':>8}{'S':>8}"]
    for head in named:
        weights = "".join(f"{weight:>9.2f}" for weight in head["attention"])
        lines.append(f"{head['head']:<8}{head['name']:<26}{weights}{head['to_io']:>8.2f}{head['to_s']:>8.2f}")
    return "\n".join(lines)


def _read(path: Path) -> Any:
    return json.loads(Path(path).read_text())


def _write(value: Any, path: Path) -> None:
    Path(path).write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
