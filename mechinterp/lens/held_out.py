"""A tuned lens on text that it was not trained on, beside the logit lens and a control.

1. In every block positions are drawn, position 0 left out; KL(final ‖ lens) there is exact, over the whole vocabulary.
2. Intervals resample documents; the difference to the logit lens is paired by block.
3. The control is the mean output distribution of the training text, which reads nothing. A lens that only learnt which
   tokens are frequent beats the logit lens at early layers, too; it does not beat this. A layer passes if its
   translator beats both.

Even so, what a translator finds at a layer is what can be decoded there linearly, not what the model does with it: at
row 0 it is a model of bigrams.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance
from mechinterp.hooked.model import HookedModel
from mechinterp.lens.measure import Final
from mechinterp.lens.streams import Streams, slices
from mechinterp.lens.tuned_lens import TunedLens
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope, paired_difference
from mechinterp.text import Blocks

UNIFORM = 1e-3  # share of the uniform distribution in the control, so that no token is impossible


@dataclass(frozen=True, repr=False)
class TunedLensResult(Result):
    """A tuned lens on held-out text beside the logit lens and a lens that reads nothing.

    `data` holds over `layer` (0 … n_layers − 1; the last row is exact in either lens) the mean KL from the model's own
    output, in nats: `tuned` and `logit` with `_low` and `_high` (95%), `control`, that of the mean output of the
    training text; `gain` = logit − tuned and `over_control` = control − tuned, with limits; `passes`: both limits
    exclude 0. Over `layer` and `prompt` (a block of text): `tuned_kl`, `logit_kl`; over `prompt`: `control_kl`.
    """

    def top(self, n: int = 10) -> pd.DataFrame:
        """At most `n` layers, evenly spaced with both ends."""
        names = ["tuned", "tuned_low", "tuned_high", "logit", "control", "gain_low", "gain_high", "passes"]
        layers = self.data["layer"].values
        chosen = np.unique(np.linspace(0, len(layers) - 1, max(1, min(n, len(layers)))).round().astype(int))
        return self.to_frame()[["layer", *names]].iloc[chosen].reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values by layer, and where they come from. Undefined is None."""
        cells = [name for name, array in self.data.data_vars.items() if "prompt" not in array.dims]
        made = {str(name): plain(self.data[name]) for name in cells}
        return {"layers": self.data["layer"].values.tolist(), **made, "about": plain(self.about)}

    def summary(self) -> str:
        """Mean KL over layers of both lenses and the control, and the layers that pass."""
        means = {name: float(self.data[name].mean()) for name in ("tuned", "logit", "control")}
        passed, n = int(self.data["passes"].sum()), self.data.sizes["layer"]
        return (
            f"tuned lens of {self.about['model']}: mean KL over layers {means['tuned']:.2f} nats, logit lens "
            f"{means['logit']:.2f}, reading nothing {means['control']:.2f}; {passed} of {n} layers beat both "
            f"(n={self.data.sizes['prompt']} blocks, 95% {self.about['scope']})"
        )


def evaluate_tuned_lens(
    model: HookedModel, lens: TunedLens, text: Blocks, *, positions: int = 8, seed: int = 0
) -> TunedLensResult:
    """KL of the tuned and the logit lens from the model's own output, on text that the lens has not seen.

    Args:
        model: the hooked model, as the lens was trained on it.
        lens: of this model.
        text: held-out blocks: the second side of `text.blocks(...).split(0.9)`.
        positions: drawn in every block, position 0 left out.
        seed: of the draw and the intervals.

    Raises:
        UserError: a lens of another model, blocks of documents that it was trained on, or too short for `positions`.
    """
    lens.require(model)
    seen = set(text.document.tolist()) & set(lens.origin["documents"])
    if text.source == lens.origin["text"] and seen:
        raise UserError(f"{len(seen)} documents of {text.source} were trained on: evaluate on the other side of .split")
    n, n_pos = text.prompts.tokens.shape
    if not 1 <= positions < n_pos or text.prompts.mask is not None:
        raise UserError(f"positions must be 1 … {n_pos - 1} in unpadded blocks of {n_pos} tokens; found {positions}")
    draw = torch.Generator().manual_seed(seed)
    spots = torch.stack([torch.randperm(n_pos - 1, generator=draw)[:positions] + 1 for _ in range(n)])
    constant = (lens.mean_output * (1 - UNIFORM) + UNIFORM / model.d_vocab).log()
    kl = torch.zeros(2, model.n_layers, n, positions)
    control = torch.zeros(n, positions)
    for index in chunks(model, n, n_pos, read_vocab=True, every_position=True):
        plain_streams = Streams.record(model, text.prompts, index)
        lenses = [plain_streams.translated(lens), plain_streams]
        for part in slices(model, len(index), positions):
            at = spots[index, part]
            final = Final.of(plain_streams.logits([model.n_layers], at)[0].flatten(0, 1))
            reading_nothing = final.kl(constant.expand_as(final.prob), torch.zeros_like(final.entropy))
            control[index, part] = reading_nothing.unflatten(0, at.shape).cpu()
            for which, streams in enumerate(lenses):
                for layer in range(model.n_layers):
                    logits = streams.logits([layer], at)[0].flatten(0, 1)
                    kl[which, layer, index, part] = final.kl(logits, logits.logsumexp(-1)).unflatten(0, at.shape).cpu()
    return _evaluated(model, lens, text, kl.mean(-1).double().numpy(), control.mean(-1).double().numpy(), seed)


def _evaluated(
    model: HookedModel, lens: TunedLens, text: Blocks, kl: np.ndarray, control: np.ndarray, seed: int
) -> TunedLensResult:
    """Intervals over documents of `kl` `[lens layer prompt]` and `control` `[prompt]`."""
    documents = text.document.numpy()
    arrays: dict[str, Any] = {}
    for name, values in (("tuned", kl[0]), ("logit", kl[1])):
        found = bootstrap_ratio(values, clusters=documents, seed=seed)
        arrays |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
    for name, values in (("gain", kl[1]), ("over_control", np.broadcast_to(control, kl[0].shape))):
        gap = paired_difference(values, kl[0], documents, seed=seed)
        arrays |= {name: gap.estimate, f"{name}_low": gap.low, f"{name}_high": gap.high}
    arrays["control"] = np.full(len(kl[0]), control.mean())
    arrays["passes"] = (arrays["gain_low"] > 0) & (arrays["over_control_low"] > 0)
    by_block = {"tuned_kl": (("layer", "prompt"), kl[0]), "logit_kl": (("layer", "prompt"), kl[1])}
    data = xr.Dataset(
        {**{name: ("layer", value) for name, value in arrays.items()}, **by_block, "control_kl": ("prompt", control)},
        coords={"layer": list(range(model.n_layers))},
    )
    scope = interval_scope(documents).replace("prompts", "blocks").replace("templates", "documents")
    about = provenance(model) | {
        "text": text.source,
        "documents": len(np.unique(documents)),
        "control": "the mean output distribution of the training text, which reads nothing",
        "tuned_lens": lens.about,
        "scope": scope.replace("this template", "this document"),
        "seed": seed,
    }
    return TunedLensResult(data, about)
