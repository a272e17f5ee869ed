"""Which heads do induction, and does the model need them? Attention scores, a causal check, and OV copying.

`A B … A` -> `B` (Olsson et al. 2022). On random tokens written down twice, the experiment

1. scores every head on induction, previous-token and duplicate-token attention, beside nulls;
2. knocks the top induction heads out, together and alone, beside random heads of the same layers: the loss on the
   second copy, by position;
3. asks what the heads write: eigenvalues of the OV circuit, and how often a token's own logit is among the largest;
4. compares with expected values (for GPT-2, with a published replication), and writes one run folder and one report.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mechinterp as mi
from experiments.expected import Comparison, compare
from experiments.settings import Settings, command_line, finished

if TYPE_CHECKING:
    from mechinterp.heads import CausalResult, CopyingResult, PatternResult

KINDS = ("induction", "previous_token", "duplicate_token")


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the run; the same settings always have the same run folder."""

    n: int = 32
    """Sequences for the attention scores."""
    n_causal: int = 12
    """Sequences for the knock-outs, drawn anew."""
    period: int = 50
    """Tokens that are repeated."""
    k: int = 5
    """Induction heads to knock out."""
    draws: int = 24
    """Random sets of heads of the control."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    from mechinterp.heads import CausalResult, CopyingResult, PatternResult

    model = config.load()
    inputs = {"model": model.weights_hash()}
    with mi.reporting.Run.open("induction_heads", config, root=config.root, inputs=inputs) as run:
        prompts = mi.heads.repeated_tokens(model, config.n, config.period, seed=config.seed)
        run.log(f"{len(prompts)} sequences of {prompts.n_pos} tokens, begun with: {shown(model, prompts)}")

        def part(name: str, kind: Any, make: Any) -> Any:
            return run.part(name, make, kind.load, lambda result, path: result.save(path))

        patterns: PatternResult = part(
            "patterns", PatternResult,
            lambda: mi.heads.patterns(model, prompts, period=config.period, seed=config.seed),
        )  # fmt: skip
        run.log(patterns.summary())
        losses = part("losses", Losses, lambda: Losses.of(model, prompts, config))
        causal: CausalResult = part(
            "causal", CausalResult,
            lambda: mi.heads.knock_out_top(
                model, patterns, config.k, n=config.n_causal, draws=config.draws, seed=config.seed
            ),
        )  # fmt: skip
        run.log(causal.summary())
        copying: CopyingResult = part("copying", CopyingResult, lambda: mi.heads.copying(model, seed=config.seed))
        against = compare("induction_heads", model.info.name, values(patterns, causal), settings(config, model))
        answer = finding(model, patterns, causal, copying)
        page = report(model, patterns, losses, causal, copying, against, answer, config)
        path = run.finish(page)
        run.log(f"\n{answer}\n\n{patterns.top('induction', 8).to_string(index=False)}\n\n{against.verdict}")
    finished(path)
    return path


@dataclass(frozen=True, repr=False)
class Losses(mi.results.Result):
    """Loss of every token of the sequences: `loss` `[prompt pos]`, nats, NaN at the first."""

    @classmethod
    def of(cls, model: mi.HookedModel, prompts: mi.Prompts, config: Config) -> "Losses":
        """Of the prompts, as the model is."""
        import xarray as xr

        losses = mi.evaluation.token_losses(model, prompts).double().numpy()
        return cls(xr.Dataset({"loss": (("prompt", "pos"), losses)}), {"period": config.period})

    @property
    def copies(self) -> tuple[float, float]:
        """Mean loss of the first and of the second copy, without the first token of each."""
        loss, period = self.data["loss"].values, self.about["period"]
        second = loss[:, -period + 1 :]
        return float(np.nanmean(loss[:, :-period])), float(second.mean())

    def summary(self) -> str:
        """What the repetition is worth."""
        first, second = self.copies
        return f"loss {first:.2f} nats on the first copy, {second:.2f} on the second"


def shown(model: mi.HookedModel, prompts: mi.Prompts) -> str:
    """The first tokens of the first sequence."""
    return "|".join(model.token_strings(prompts.tokens[0, :8]))


def values(patterns: "PatternResult", causal: "CausalResult") -> dict[str, float]:
    """What is compared with expected values: every head's scores, and the losses."""
    made = {
        f"{kind} L{layer}H{head}": float(score)
        for kind in KINDS
        for (layer, head), score in np.ndenumerate(patterns.grid(kind))
    }
    for name in ("base", "top", "random"):
        made[f"loss, {name}"] = float(causal.data[name].mean())
    return made


def settings(config: Config, model: mi.HookedModel) -> dict[str, Any]:
    """The settings that expected values belong to."""
    names = ("n", "n_causal", "period", "k", "seed")
    return {name: getattr(config, name) for name in names} | {"bos": model.info.bos}


def finding(model: mi.HookedModel, patterns: "PatternResult", causal: "CausalResult", copying: "CopyingResult") -> str:
    """The answer in a few sentences, with intervals."""
    best = patterns.top("induction", 4)
    heads = ", ".join(
        f"{row['head']} ({row['score']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}])"
        for row in best.to_dict("records")
    )
    copies = [bool(copying.data["copies"].sel(layer=layer, head=head)) for layer, head in causal.heads]
    null, summary = best["null"].max(), causal.summary()
    return (
        f"In {model.info.name} the strongest induction heads are {heads}; with fresh tokens in place of the repeated "
        f"ones none of them scores above {null:.2f}. {summary[0].upper()}{summary[1:]}. Of these {len(copies)} heads "
        f"{sum(copies)} copy by both definitions of OV copying."
    )


def report(
    model: mi.HookedModel,
    patterns: "PatternResult",
    losses: Losses,
    causal: "CausalResult",
    copying: "CopyingResult",
    against: Comparison,
    answer: str,
    config: Config,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.sections.heads import causal_section, copying_section, pattern_section

    loss = losses.data["loss"].values[:, 1:]
    mean, error = loss.mean(0), 1.96 * loss.std(0, ddof=1) / len(loss) ** 0.5
    name = "loss"
    figure = mi.reporting.curves(
        np.arange(1, loss.shape[1] + 1), {name: mean}, ci_low={name: mean - error}, ci_high={name: mean + error},
        x_title="position", y_title="loss (nats)", title="Loss by position: the second copy is foreseen",
        facts={"n": len(loss), "interval": "mean ± 1.96 standard errors"},
    )  # fmt: skip
    first, second = losses.copies
    sections = (
        pattern_section(patterns, KINDS),
        mi.reporting.Section("What the repetition is worth", losses.summary(), figures=(figure,)),
        causal_section(causal),
        copying_section(copying),
        mi.reporting.Section("Against expected values", table=against.table()),
    )
    return mi.reporting.Report(
        title="Which heads do induction?",
        question="Which heads attend to what followed the last occurrence of a token, and does the model need them?",
        answer=answer,
        header=f"{model.header()} · {config.n} sequences, period {config.period}",
        command=config.command(__file__),
        baseline=(("loss, first copy", f"{first:.2f}"), ("loss, second copy", f"{second:.2f}"), ("n", str(config.n))),
        sections=sections,
        caveats=(
            f"Position 0 is {patterns.about['position_0']}.",
            "Random tokens show what heads can do, not what they do in text.",
            "Knocked-out heads may be backed up by others: a small change does not mean that a head does nothing.",
            against.verdict,
        ),
    )


if __name__ == "__main__":
    command_line(main, Config, __doc__)
