"""A sparse autoencoder on a middle layer of SmolLM2: how much of the model's behaviour goes through it?

1. Train on text (files given by --text, or the built-in docstrings) with the trainer of `mechinterp sae train`.
2. Measure it on text that it was not trained on, alone and spliced into the model, beside zero and mean ablation and as
   many principal components, with intervals over documents.
3. Describe features, and write a dashboard.
4. Compare with expected values where there are any.

`--preset cpu` takes about ten minutes on two cores; `--preset gpu` is for a GPU and a hub data set (--dataset).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import mechinterp as mi
from experiments.expected import Comparison, compare
from experiments.settings import Settings, command_line, finished

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"d_sae": 512, "k": 16, "n_tokens": 16_384, "batch": 1024, "buffer": 8_192},
    "cpu": {"d_sae": 4608, "k": 32, "n_tokens": 1_000_000, "batch": 2048, "buffer": 131_072},
    "gpu": {"d_sae": 36_864, "k": 64, "n_tokens": 500_000_000, "batch": 8192, "buffer": 1_048_576, "autocast": True,
            "harvest_blocks": 128, "context": 256},
}  # fmt: skip


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the run; the same settings always have the same run folder."""

    preset: Literal["quick", "cpu", "gpu"] = "cpu"
    """Sizes."""
    text: tuple[Path, ...] = ()
    """Files to train on; the docstrings of installed packages without."""
    dataset: str | None = None
    """Or a hub data set."""
    held_out: tuple[Path, ...] = ()
    """Files to measure on; without, the documents that training leaves out."""
    layer: int = 9
    """Whose output is read."""
    architecture: Literal["standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"] = "topk"
    """Of the autoencoder."""
    blocks: int = 128
    """Blocks of text to measure on, four of a document at most."""
    features: int = 100
    """Features of the dashboard."""

    def training(self, folder: Path) -> "mi.sae.TrainConfig":
        """The trainer's settings."""
        sizes = dict(PRESETS[self.preset])
        if self.architecture not in ("topk", "batchtopk", "matryoshka"):
            sizes.pop("k")
        return mi.sae.TrainConfig(
            model=self.model, text=self.text, dataset=self.dataset, layer=(self.layer,), seed=self.seed,
            architecture=self.architecture, device=self.device, dtype=self.dtype, out=folder, **sizes,  # type: ignore[arg-type]
        )  # fmt: skip


def main(config: Config) -> Path:
    """Run the experiment and return the path of the report."""
    from mechinterp.reporting.features import write_features

    model = config.load()
    with mi.reporting.Run.open("sae_smollm2", config, config.root, {"model": model.weights_hash()}) as run:
        folder = run.path / "training"
        sae = trained(config, model, folder)
        text = held_out(config, model, sae)
        run.log(f"measured on {len(text)} blocks of {len(text.document.unique())} documents of {text.source}")

        def part(name: str, kind: Any, make: Any) -> Any:
            return run.part(name, make, kind.load, lambda result, path: result.save(path))

        result = part("evaluation", mi.sae.SAEEvaluation, lambda: mi.sae.evaluate(model, sae, text, seed=config.seed))
        run.log(result.summary())
        n = min(config.features, sae.config.d_sae)
        described = part("features", mi.sae.Features, lambda: mi.sae.describe(model, sae, text, n, seed=config.seed))
        write_features(described, run.path / "features.html", config.command(__file__))
        against = compare("sae_smollm2", model.info.name, values(result), settings(config))
        page = report(config, model, folder, result, described, against)
        path = run.finish(page)
        run.log(f"\n{page.answer}\n{against.verdict}\nfeatures: {run.path / 'features.html'}")
    finished(path)
    return path


def trained(config: Config, model: mi.HookedModel, folder: Path) -> "mi.sae.SparseAutoencoder":
    """Loaded if it is there, else trained, or trained on from the newest checkpoint."""
    if not (folder / "sae" / "cfg.json").is_file():
        mi.sae.train(config.training(folder), model=model, resume=True)
    return mi.sae.load(folder, device=str(model.device))


def held_out(config: Config, model: mi.HookedModel, sae: "mi.sae.SparseAutoencoder") -> mi.text.Blocks:
    """What it was not trained on."""
    length = sae.metadata.context or 128
    if config.held_out:
        return mi.text.blocks(model, config.held_out, length, config.blocks, per_document=4)
    source = config.dataset or config.text or mi.text.DOCSTRINGS
    return mi.sae.held_out_blocks(model, source, length, config.blocks, per_document=4)


def values(result: "mi.sae.SAEEvaluation") -> dict[str, float]:
    """What is compared with expected values."""
    return {name: result[name] for name in ("l0", "fvu", "ce_recovered_mean", "kl", "dead_fraction")}


def settings(config: Config) -> dict[str, Any]:
    """What expected values belong to."""
    plain = {one.name: getattr(config, one.name) for one in fields(config)}
    names = ("preset", "layer", "architecture", "blocks", "seed")
    return {name: plain[name] for name in names} | {
        name: [path.name for path in plain[name]] for name in ("text", "held_out")
    }


def report(
    config: Config,
    model: mi.HookedModel,
    folder: Path,
    result: "mi.sae.SAEEvaluation",
    described: "mi.sae.Features",
    against: Comparison,
) -> "mi.reporting.Report":
    """The page."""
    from mechinterp.reporting.sections.sae import evaluation_section, features_section, training_section

    low, high = (float(result.data[end].sel(row="ce_recovered_mean")) for end in ("low", "high"))
    answer = (
        f"With {result['l0']:.0f} of {result.data.sizes['feature']} features a token, the autoencoder misses "
        f"{result['fvu']:.1%} of the variance (as many principal components of the very text: "
        f"{result['fvu_control']:.1%}) and keeps {result['ce_recovered_mean']:.1%} [{low:.1%}, {high:.1%}] of the loss "
        f"that replacing the layer by its mean costs; {result['dead_fraction']:.1%} of the features are on nowhere in "
        "the held-out text."
    )
    names = {"L0": "l0", "FVU": "fvu", "loss, clean": "ce_clean", "loss, spliced": "ce_spliced", "KL": "kl"}
    return mi.reporting.Report(
        title=f"A sparse autoencoder on layer {config.layer}",
        question="How much of what the model does goes through the features of a sparse autoencoder?",
        answer=answer,
        header=f"{model.header()} · {config.architecture}, preset {config.preset}",
        command=config.command(__file__),
        baseline=tuple((shown, f"{result[name]:.3f}") for shown, name in names.items()),
        sections=(
            training_section(folder / "log.jsonl"),
            evaluation_section(result),
            features_section(described, "features.html"),
            mi.reporting.Section("Against expected values", table=against.table()),
        ),
        caveats=(
            "Position 0 and special tokens are neither trained on, nor measured, nor spliced.",
            "Features that are on nowhere in the held-out text need not be dead: a longer text may show them.",
            "Published autoencoders are trained on hundreds of times as many tokens.",
            against.verdict,
        ),
    )


if __name__ == "__main__":
    command_line(main, Config, __doc__)
