"""Steering vectors: a direction at a site, from prompts that differ in what they show.

The direction is the mean activation over positive prompts less that over negative ones. Every prompt counts once,
whatever its length. How far two halves of the prompts agree on the direction is kept beside it: it is 0 by chance.

Turner et al. 2023 (activation addition); Rimsky et al. 2024 (contrast over many prompts).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.evaluation import chunks, provenance
from mechinterp.files import replacing
from mechinterp.hooked import suffix
from mechinterp.hooked.interventions import Steer
from mechinterp.hooked.model import HookedModel, Input
from mechinterp.hooked.prompts import Positions, Prompts
from mechinterp.hooked.sites import Site
from mechinterp.results import plain
from mechinterp.tasks.pairs import PromptPairs, Target, assemble


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
        return SteeringVector(
            self.site, draw * (self.norm / draw.norm()), {"control": "random direction", "seed": seed}
        )

    def __repr__(self) -> str:
        n_positive, n_negative = self.about.get("n_positive"), self.about.get("n_negative")
        made = "" if n_positive is None else f", from {n_positive} and {n_negative} prompts"
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
        head = tuple(note["head"]) if isinstance(note["head"], list) else note["head"]
        return cls(Site(note["site"], note["layer"], head), direction, note["about"])


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
    site = steerable(model, site if isinstance(site, Site) else Site(site[0], layer=site[1]))
    sides = [_means(model, model.to_prompts(side), site, positions) for side in (positive, negative)]
    direction = (sides[0].mean(0) - sides[1].mean(0)) * _in_heads(site, sides[0][0])
    if not direction.any():
        raise UserError(
            f"the positive and the negative prompts have the same mean at {site}: there is nothing to steer with"
        )
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


def steerable(model: HookedModel, site: Site) -> Site:
    """The site with its layer counted from 0. Raises UserError where a vector cannot be added or has no meaning."""
    site = model.resolve(site, write=True)
    kind = site.kind
    if (
        site.layer is None
        or "key" in kind.axes
        or "one" in kind.axes
        or site.neurons is not None
        or site.basis is not None
    ):
        raise UserError(
            f"nothing can be steered at {site}; valid: a whole site in a layer, or its heads, that has a vector"
        )
    return site


def _in_heads(site: Site, like: Tensor) -> Tensor:
    """1 in the site's heads and 0 in others, of the shape of a direction."""
    inside = torch.ones_like(like)
    if site.heads is not None:
        inside[[head for head in range(len(like)) if head not in site.heads]] = 0
    return inside


def _means(model: HookedModel, prompts: Prompts, site: Site, positions: Positions) -> Tensor:
    """`[prompt …]` mean activation of every prompt over the chosen positions, on the CPU."""
    chosen = _chosen(prompts, positions)
    means = []
    for index in chunks(model, len(prompts), prompts.n_pos, read_vocab=False):
        activation = suffix.record(model, prompts, [site.whole], index).activations[site.hook_name].float().cpu()
        weight = chosen[index].float() / chosen[index].sum(1, keepdim=True)
        means.append(torch.einsum("bp,bp...->b...", weight, activation))
    return torch.cat(means)


def _chosen(prompts: Prompts, positions: Positions) -> Tensor:
    """`[prompt pos]` bool, on the CPU. Raises UserError where a prompt has none of the positions."""
    if positions == "last":
        positions = -1
    if isinstance(positions, str) and positions == "all":
        chosen = prompts.real.cpu().clone()
        first = prompts.padding.cpu()
        longer = first < prompts.n_pos - 1  # of a prompt of one token that one is taken
        chosen[torch.arange(len(prompts))[longer], first[longer]] = False
    else:
        chosen = prompts.select(positions).cpu() & prompts.real.cpu()
    if not chosen.any(1).all():
        raise UserError(f"prompt {int((~chosen.any(1)).nonzero()[0])} has no token at positions {positions!r}")
    return chosen


def _halves_cosine(sides: Sequence[Tensor]) -> float | None:
    """Cosine between the directions of the even and of the odd prompts; None with fewer than two on a side."""
    if min(map(len, sides)) < 2:
        return None
    even, odd = (sides[0][half::2].mean(0) - sides[1][half::2].mean(0) for half in (0, 1))
    return float(torch.nn.functional.cosine_similarity(even.flatten(), odd.flatten(), dim=0))
