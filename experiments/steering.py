"""Can a direction steer the model, and at what cost? Sentiment, from contrast prompts.

The mean difference of the residual stream between pleased and displeased sentences is added to other sentences (Turner
et al. 2023; Rimsky et al. 2024). The experiment

1. makes a vector at several layers and chooses the one of largest effect on one half of the probes;
2. sweeps its strength on the other half, beside random directions of the same norm, and measures what it does to
   unrelated text;
3. lets the model go on, steered at every step;
4. compares with expected values, and writes one run folder and one offline report.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mechinterp as mi
from experiments.expected import Comparison, compare
from experiments.settings import Settings, command_line, finished

if TYPE_CHECKING:
    from mechinterp.steering import SteeringResult

SUBJECTS = ("movie", "book", "song", "hotel", "meal", "game", "show", "trip", "concert", "museum", "teacher", "beach")
POSITIVE = "I loved the {}. It was wonderful, and I was so happy with it"
NEGATIVE = "I hated the {}. It was terrible, and I was so angry with it"
PROBES = (
    "I think the {} was",
    "My friends told me that the {} was",
    "In the end, the {} was really",
    "Everybody says the {} is",
)
THINGS = ("party", "weather", "lecture", "restaurant", "holiday", "play", "garden", "food")
GOOD = (" great", " wonderful", " amazing", " good", " beautiful", " excellent")
BAD = (" terrible", " horrible", " awful", " bad", " ugly", " poor")
CONTINUED = "We spent the weekend in a small town by the sea, and the weather was"


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the run; the same settings always have the same run folder."""

    layers: tuple[int, ...] = (6, 10, 14, 18, 22)
    """Layers to choose from (the residual stream behind them)."""
    strengths: tuple[float, ...] = (-1.5, -1.0, -0.5, 0.5, 1.0, 1.5)
    """Factors of the vector."""
    draws: int = 19
    """Random directions of the control."""
    new_tokens: int = 24
    """Tokens to generate."""


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    from mechinterp.steering import SteeringResult

    model = config.load()
    inputs = {"model": model.weights_hash()}
    with mi.reporting.Run.open("steering", config, root=config.root, inputs=inputs) as run:
        choosing, testing = (mi.steering.probes(model, texts, GOOD, BAD) for texts in probe_texts())
        tried = run.part("layers.json", lambda: try_layers(model, choosing, config), _read, _write)
        layer = int(max(tried, key=lambda one: one["change"])["layer"])
        run.log("\n".join(f"layer {one['layer']}: {one['change']:+.2f} logits at strength 1" for one in tried))
        vector = sentiment(model, layer)
        run.log(repr(vector))
        result: SteeringResult = run.part(
            "sweep",
            lambda: mi.steering.sweep(
                model, vector, testing, strengths=config.strengths, draws=config.draws, seed=config.seed
            ),
            SteeringResult.load,
            lambda made, path: made.save(path),
        )
        said = run.part("said.json", lambda: generations(model, vector, config), _read, _write)
        against = compare("steering", model.info.name, values(result, layer), settings(config, model))
        answer = finding(model, result, layer)
        path = run.finish(report(model, result, tried, said, layer, against, answer, config))
        lines = "\n".join(f"{strength:>6}  {CONTINUED}|{text}" for strength, text in said.items())
        run.log(f"\n{answer}\n\n{lines}\n\n{against.verdict}")
    finished(path)
    return path


def probe_texts() -> tuple[list[str], list[str]]:
    """Probes to choose the layer on, and those to report: other things, in the same templates."""
    halves = THINGS[: len(THINGS) // 2], THINGS[len(THINGS) // 2 :]
    choosing, testing = ([probe.format(thing) for thing in half for probe in PROBES] for half in halves)
    return choosing, testing


def sentiment(model: mi.HookedModel, layer: int) -> "mi.steering.SteeringVector":
    """Pleased less displeased, at the last token, behind a layer."""
    sides = [[text.format(subject) for subject in SUBJECTS] for text in (POSITIVE, NEGATIVE)]
    return mi.steering.vector(model, sides[0], sides[1], ("resid_post", layer))


def try_layers(model: mi.HookedModel, task: Any, config: Config) -> list[dict[str, float]]:
    """The change of the logit difference at strength 1, by layer; layers that the model lacks are left out."""
    before, made = mi.evaluate(model, task), []
    for layer in config.layers:
        if layer < model.n_layers:
            with model.intervene(sentiment(model, layer).at(1.0)):
                made.append({"layer": layer, "change": float((mi.evaluate(model, task) - before).mean())})
    if not made:
        raise mi.UserError(f"none of the layers {config.layers} is in {model.info.name}, which has {model.n_layers}")
    return made


def generations(model: mi.HookedModel, vector: "mi.steering.SteeringVector", config: Config) -> dict[str, str]:
    """What the model says at each strength, steered at every step."""
    made = {}
    for strength in sorted({*config.strengths, 0.0}):
        steered = model.generate(CONTINUED, config.new_tokens, interventions=[vector.at(strength)])
        made[f"{strength:g}"] = steered.texts[0]
    return made


def values(result: "SteeringResult", layer: int) -> dict[str, float]:
    """What is compared with expected values."""
    made = {"layer": float(layer)}
    for strength in result.data["strength"].values:
        at = result.data.sel(strength=strength)
        made |= {
            f"strength {strength:g}: logit difference": float(at["mean"]),
            f"strength {strength:g}: KL": float(at["kl"]),
        }
    return made


def settings(config: Config, model: mi.HookedModel) -> dict[str, Any]:
    """The settings that expected values belong to."""
    return {"layers": list(config.layers), "strengths": list(config.strengths), "bos": model.info.bos}


def finding(model: mi.HookedModel, result: "SteeringResult", layer: int) -> str:
    """The answer in a few sentences, with intervals."""
    passes = [f"{s:g}" for s in result.data["strength"].values if bool(result.data["passes"].sel(strength=s))]
    beyond = f"beyond every random direction at strengths {', '.join(passes)}" if passes else "never beyond random ones"
    return f"A sentiment direction of {model.info.name}, added behind layer {layer}, is {beyond}: {result.summary()}."


def report(
    model: mi.HookedModel,
    result: "SteeringResult",
    tried: list[dict[str, float]],
    said: dict[str, str],
    layer: int,
    against: Comparison,
    answer: str,
    config: Config,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.sections.steering import steering_section

    rows = tuple((one["layer"], one["change"]) for one in tried)
    chosen = mi.reporting.Section(
        "Which layer",
        f"Change of the logit difference at strength 1 on the probes that the layer was chosen on; {layer} was chosen. "
        "All numbers above are of other probes.",
        table=mi.reporting.Table(("layer", "change"), rows, "Logits, mean over probes."),
    )
    prompts = tuple(
        mi.reporting.Prompt(tuple(model.split(text)), label=label)
        for label, text in (("positive", POSITIVE.format(SUBJECTS[0])), ("negative", NEGATIVE.format(SUBJECTS[0])),
                            ("probe", probe_texts()[1][0]), ("continued", CONTINUED))
    )  # fmt: skip
    return mi.reporting.Report(
        title="Can a direction steer the model?",
        question="Does the difference of pleased and displeased sentences steer what the model says, and at what cost?",
        answer=answer,
        header=f"{model.header()} · {result.about['n_prompts']} probes, {len(SUBJECTS)} contrast pairs",
        command=config.command(__file__),
        prompts=prompts,
        sections=(
            steering_section(result, {float(strength): text for strength, text in said.items()}),
            chosen,
            mi.reporting.Section("Against expected values", table=against.table()),
        ),
        caveats=(
            f"The metric is the mean logit of {', '.join(GOOD)} less that of {', '.join(BAD)}.",
            "One continuation a strength is an illustration; the numbers are of the probes.",
            "Strong steering breaks the model before it convinces it: see the KL on unrelated text.",
            against.verdict,
        ),
    )


def _read(path: Path) -> Any:
    return json.loads(Path(path).read_text())


def _write(value: Any, path: Path) -> None:
    Path(path).write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
