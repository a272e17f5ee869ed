"""Steering: add a direction to an activation, and measure what it does to the behaviour and to everything else.

1. `vector`: the mean activation of a site over positive prompts less that over negative ones.
2. `sweep`: `strength` times the vector is added at that site, in prompts that ask for the behaviour, and the metric of
   every prompt is read. The prompts are run once; each strength is a suffix run from the vector's layer on
   (hooked/replays.py). Strength 0 is the unsteered run itself.
3. *Control*: random directions of the same norm at the same strengths. A vector passes where it moves the metric by
   more than every one of them, and the interval of its change excludes 0.
4. *Side effect*: KL(unsteered ‖ steered) of the next token at every position of unrelated text, steered everywhere,
   for the vector and for some of the random directions. A behaviour that is bought with as much KL as a broken model
   has is no finding.

Turner et al. 2023 (activation addition); Rimsky et al. 2024 (contrast over many prompts).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance, templates_of
from mechinterp.files import replacing
from mechinterp.hooked import schedule, suffix
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows, Steer
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.hooked.prompts import Positions, Prompts
from mechinterp.hooked.replays import replay
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Read
from mechinterp.metrics import Function, Metric, as_metric
from mechinterp.results import Result, plain
from mechinterp.statistics import bootstrap_ratio, interval_scope
from mechinterp.tasks.pairs import Answers, PromptPairs, Target, assemble
from mechinterp.text import Blocks, blocks

# KL needs the whole vocabulary at every position: a few of the random directions are enough to compare with.
KL_DRAWS = 4


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction at a site.

    Attributes:
        site: where it is added.
        direction: of the site's shape without batch and pos, float32, on the CPU; 0 outside the site's heads.
        about: what it was made from, as plain values.
    """

    site: Site
    direction: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Euclidean length."""
        return float(self.direction.norm())

    def at(self, strength: float = 1.0, positions: Positions = None) -> Steer:
        """The intervention that adds it, `strength` times, everywhere or at positions."""
        return Steer(self.site, self.direction, strength, positions=positions)

    def random(self, seed: int) -> "SteeringVector":
        """A random direction of the same norm, in the same heads."""
        draw = torch.randn(self.direction.shape, generator=torch.Generator().manual_seed(seed))
        draw = draw * _in_heads(self.site, self.direction)
        return SteeringVector(self.site, draw * (self.norm / draw.norm()), {"control": "random direction", "seed": seed})

    def __repr__(self) -> str:
        made = f" from {self.about['n_positive']} and {self.about['n_negative']} prompts" if "n_positive" in self.about else ""
        return f"SteeringVector({self.site}, norm {self.norm:.3g}{made})"

    def save(self, path: str | Path) -> None:
        """Write as safetensors; the file appears whole or not at all."""
        note = {"site": self.site.name, "layer": self.site.layer, "head": self.site.head, "about": dict(self.about)}
        with replacing(path) as partial:
            metadata = {"mechinterp_steering": json.dumps(plain(note), allow_nan=False)}
            save_file({"direction": self.direction.contiguous()}, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote. Raises UserError if the file is missing, damaged or no steering vector."""
        try:
            with safe_open(path, framework="pt") as file:
                note = json.loads((file.metadata() or {}).get("mechinterp_steering", "null"))
                if note is None:
                    raise UserError(f"{path} is a safetensors file, but no vector that `SteeringVector.save` wrote")
                direction = file.get_tensor("direction")
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read a steering vector from {path}: {error}") from error
        return cls(Site(note["site"], note["layer"], note["head"]), direction, note["about"])


def vector(
    model: HookedModel,
    positive: Input,
    negative: Input,
    site: Site | tuple[str, int],
    positions: Positions = "last",
) -> SteeringVector:
    """The difference of mean activations between two sets of prompts, under the interventions in force.

    Args:
        model: the hooked model.
        positive, negative: texts, tokens or `Prompts`, such as the two sides of pairs.
        site: a site in a layer, or its name and layer, such as ("resid_post", 12); of its heads only those named.
        positions: "last" takes the last token of every prompt; "all" every token but the first, whose activation is
            that of an attention sink; or what `Prompts.select` takes. Every prompt counts once.

    Raises:
        UserError: a site that has no direction (patterns, scales, single neurons), or two sets that do not differ.
    """
    site = _steerable(model, site if isinstance(site, Site) else Site(site[0], layer=site[1]))
    sides = [_means(model, model.to_prompts(side), site, positions) for side in (positive, negative)]
    direction = (sides[0].mean(0) - sides[1].mean(0)) * _in_heads(site, sides[0][0])
    if not direction.any():
        raise UserError(f"the positive and the negative prompts have the same mean at {site}: there is nothing to steer with")
    about = provenance(model) | {
        "site": str(site),
        "positions": positions if isinstance(positions, str | int) else str(positions),
        "n_positive": len(sides[0]),
        "n_negative": len(sides[1]),
        "norm": float(direction.norm()),
        "mean_norm": float(torch.cat(sides).flatten(1).norm(dim=1).mean()),
        "halves_cosine": _halves_cosine(sides),
    }
    return SteeringVector(site, direction, plain(about))


def probes(model: HookedModel, texts: Sequence[str], positive: Sequence[str], negative: Sequence[str]) -> PromptPairs:
    """Prompts that ask for a behaviour, with the words that show it and those that show the opposite.

    The logit difference is the mean logit of `positive` less that of `negative` as the next token. Words need their
    leading space and must be single tokens; both sides of a pair are the same. Raises UserError if they are not.
    """
    ids = {word: model.encode(word, bos=False) for word in (*positive, *negative)}
    longer = [word for word, tokens in ids.items() if len(tokens) != 1]
    if longer or not positive or not negative or not texts:
        split = f"; {longer[0]!r} is {' | '.join(map(repr, model.token_strings(ids[longer[0]])))}" if longer else ""
        raise UserError(f"probes need texts, and words of one token on both sides{split}")
    rows = [model.encode(text, bos=False) for text in texts]
    sides = [{ids[word][0]: 1.0 for word in words} for words in (positive, negative)]
    targets = [[Target(len(row) - 1, *sides)] for row in rows]
    source = {"task": "probes", "positive": " |".join(positive), "negative": " |".join(negative)}
    return assemble(model, "probes", "none", rows, rows, [{} for _ in rows], targets, source=source)


@dataclass(frozen=True, repr=False)
class SteeringResult(Result):
    """What a vector does at each strength.

    `data` holds, over `strength`: `metric` with `ci_low` and `ci_high` (95%, over prompts); `change`, the same less the
    unsteered run, with `change_low` and `change_high`; `control`, `control_low`, `control_high`: mean, smallest and
    largest change that random directions of the same norm make; `passes`; `kl` with `kl_low` and `kl_high` (nats a
    token of unrelated text) and `kl_control`, of random directions. `steered` `[strength prompt]` and `random`
    `[draw strength prompt]` are the metric of every prompt.
    """

    @property
    def best(self) -> float:
        """The strength of the largest change that passes; of the largest change if none does."""
        data = self.data
        size = np.abs(data["change"].values) + 1e9 * data["passes"].values
        return float(data["strength"].values[int(np.argmax(size))])

    def summary(self) -> str:
        """One line: what the best strength does, against random directions, at what cost."""
        at, about = self.data.sel(strength=self.best), self.about
        base = float(self.data["metric"].sel(strength=0.0))
        verdict = "passes" if bool(at["passes"]) else "does not pass"
        return (
            f"{about['site']}: strength {self.best:g} moves {about['metric']} from {base:.2f} to "
            f"{float(at['metric']):.2f} [{float(at['ci_low']):.2f}, {float(at['ci_high']):.2f}]; random directions by "
            f"{float(at['control_low']):.2f} … {float(at['control_high']):.2f} ({verdict}); KL on unrelated text "
            f"{float(at['kl']):.3f} nats, random {float(at['kl_control']):.3f} (n={about['n_prompts']}, 95% "
            f"{about['scope']}, {about['draws']} random directions)"
        )

    def top(self, n: int = 10) -> Any:
        """The strengths in order."""
        return self.to_frame().head(max(n, len(self.data["strength"])))

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        grids = [name for name, array in self.data.data_vars.items() if array.dims == ("strength",)]
        return {
            **plain(dict(self.about)),
            "strengths": self.data["strength"].values.tolist(),
            **{str(name): plain(self.data[name]) for name in (*grids, "steered")},
        }


def sweep(
    model: HookedModel,
    steering: SteeringVector,
    prompts: PromptPairs | Input,
    metric: Metric | str | Callable[[Tensor], Tensor] | None = None,
    strengths: Sequence[float] = (-4, -2, -1, 1, 2, 4),
    *,
    draws: int = 19,
    positions: Positions = None,
    unrelated: Blocks | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SteeringResult:
    """Steer with a range of strengths, and with random directions.

    Args:
        model: the hooked model; interventions in force stay in force.
        steering: what to add.
        prompts: pairs, whose clean side is run (see `probes`), or plain prompts for a metric that is a function.
        metric: a metric, its name, or a function of logits `[batch pos d_vocab]` to `[batch]`; the logit difference.
        strengths: factors of the vector; 0 is always among them.
        draws: random directions. By luck alone the vector beats them all in 1 of `draws` + 1 cases.
        positions: of the prompts; everywhere by default.
        unrelated: text for the side effect, always steered everywhere; by default 8 blocks of 32 tokens of the
            built-in text, for a model with a tokenizer.
        seed: of the random directions and the intervals.
        progress: show a progress bar.

    Returns:
        The metric, its change, controls and side effects by strength.

    Raises:
        UserError: no strengths, draws below 1, a metric that cannot score the prompts.
    """
    ...
