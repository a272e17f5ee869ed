"""Ablation values: what a source is taken to write along an edge that is cut.

- *resample*: what it writes in the other run of the pair (the corrupted one when noising, the clean one when
  denoising), prompt by prompt and position by position.
- *zero*: nothing, or its output bias.
- *mean*: its mean over prompts, kept apart by position, by role, by the positions of a template, or over all tokens.
- *learned*: one vector a source, trained so that its ablation hurts least (Li & Janson 2024, "Optimal ablation for
  interpretability"); see learned_ablation.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mechinterp.circuits.graph import Graph
from mechinterp.circuits.outputs import Outputs, constants, outputs, sites
from mechinterp.errors import UserError
from mechinterp.evaluation import chunks
from mechinterp.hooked import means, suffix
from mechinterp.hooked.prompts import Prompts
from mechinterp.tasks.pairs import PromptPairs

Kind = Literal["resample", "zero", "mean", "learned"]
Direction = Literal["noise", "denoise"]


def as_direction(direction: str) -> Direction:
    """Itself. Raises UserError if it is none."""
    if direction not in ("noise", "denoise"):
        raise UserError(f"unknown direction {direction!r}; valid: 'noise', 'denoise'")
    return direction  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Ablation:
    """How sources are ablated.

    Attributes:
        kind: "resample", "zero", "mean" or "learned".
        over: prompts of a mean: "clean", "corrupted", or others.
        by: what shares a mean: "all", "position", "role" or "template"; None: roles where the pairs have them.
        vectors: `[source d_model]` of a learned ablation.
    """

    kind: Kind = "resample"
    over: Literal["clean", "corrupted"] | Prompts = "corrupted"
    by: means.By | None = None
    vectors: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("resample", "zero", "mean", "learned"):
            raise UserError(f"unknown ablation {self.kind!r}; valid: 'resample', 'zero', 'mean', 'learned'")

    @classmethod
    def of(cls, asked: "Ablation | str") -> "Ablation":
        """From itself or a name.

        Raises:
            UserError: an unknown name, or a learned ablation without its vectors.
        """
        made = asked if isinstance(asked, Ablation) else cls(asked)  # type: ignore[arg-type]
        if made.kind == "learned" and made.vectors is None:
            raise UserError("ablation 'learned' needs its vectors: give circuits.learn_ablation(graph, pairs)")
        return made

    @classmethod
    def described(cls, about: Mapping[str, Any], asked: "Ablation | str | None" = None) -> "Ablation":
        """What is asked for, or else what `about` of scores or a circuit says that it was made with.

        Raises:
            UserError: see `of`; means over other prompts than the pairs' own, which `about` cannot hold.
        """
        if asked is not None:
            return cls.of(asked)
        over = about.get("ablation_over", "corrupted")
        if over not in ("clean", "corrupted"):
            raise UserError("this circuit's means are over prompts that it does not carry: give the ablation again")
        return cls.of(cls(about.get("ablation", "resample"), over, about.get("ablation_by")))

    def about(self) -> dict[str, str | None]:
        """As plain values, under names of their own."""
        made: dict[str, str | None] = {"ablation": self.kind}
        if self.kind == "mean":
            made |= {"ablation_over": self.over if isinstance(self.over, str) else "other", "ablation_by": self.by}
        return made

    def __str__(self) -> str:
        return self.kind

    def prepare(self, graph: Graph, pairs: PromptPairs, direction: Direction) -> "Ablated":
        """The values for these pairs.

        Raises:
            UserError: an unknown direction, denoising with anything but the pair's own clean run, a mean that these
                prompts do not have.
        """
        if as_direction(direction) == "denoise" and self.kind != "resample":
            raise UserError(
                f"direction 'denoise' puts the clean run's activations into the corrupted run, so ablation "
                f"{self.kind!r} has no meaning there. Valid: 'resample', or direction 'noise'"
            )
        if self.kind == "learned" and self.vectors is not None:
            n = sum(source.kind != "neuron" for source in graph.sources)
            if tuple(self.vectors.shape) != (n, graph.model.d_model) or graph.mlp == "neuron":
                raise UserError(
                    f"learned vectors are {list(self.vectors.shape)}; {graph!r} needs [{n} {graph.model.d_model}]"
                )
        other = pairs.corrupted if direction == "noise" else pairs.clean
        tables = self._means(graph, pairs) if self.kind == "mean" else {}
        return Ablated(graph, self, other, tables)

    def _means(self, graph: Graph, pairs: PromptPairs) -> dict[str, means.Means]:
        """By hook name, the means of every site."""
        over = self.over if isinstance(self.over, Prompts) else getattr(pairs, self.over)
        by: means.By = self.by or ("role" if over.roles else "all")
        means.require_groups(over, by)
        over = over.to(graph.model.device)
        n_groups = means.n_groups(over, by)
        group = means.groups(over, over, by).masked_fill(~over.real, n_groups)
        sums: dict[str, Tensor] = {}
        for index in chunks(graph.model, len(over), over.n_pos, read_vocab=False):
            kept = suffix.record(graph.model, over, sites(graph), index).activations
            for name, activation in kept.items():
                flat = activation.flatten(0, 1)
                total = sums.setdefault(name, flat.new_zeros(n_groups + 1, *flat.shape[1:]))
                total.index_add_(0, group[index.to(group.device)].flatten(), flat)
        count = torch.bincount(group.flatten(), minlength=n_groups + 1)[: n_groups + 1]
        count[-1] = 0
        found = count.cpu() > 0
        made = {}
        for name, total in sums.items():
            total[-1] = 0
            shape = [-1] + [1] * (total.ndim - 1)
            made[name] = means.Means(over, by, total / count.clamp(min=1).reshape(shape), found)
        return made


@dataclass(frozen=True, eq=False)
class Ablated:
    """Ablation values of given prompts; `other` are the prompts of the pair's other side."""

    graph: Graph
    ablation: Ablation
    other: Prompts
    tables: dict[str, means.Means]

    def of(self, index: Tensor, live: Outputs, start: int) -> Outputs:
        """`[source batch pos d_model]` for the prompts at `index` from position `start` on; shaped like `live`."""
        kind = self.ablation.kind
        if kind == "resample":
            recording = suffix.record(self.graph.model, self.other, sites(self.graph), index)
            return outputs(self.graph, recording.activations, start)
        if kind == "zero":
            silent = constants(self.graph, live).expand_as(live.vectors)
            return Outputs(silent, {layer: torch.zeros_like(one) for layer, one in live.neurons.items()})
        if kind == "learned":
            assert self.ablation.vectors is not None
            vectors = self.ablation.vectors.to(live.vectors)
            return Outputs(vectors[:, None, None].expand_as(live.vectors))
        first = next(iter(self.tables.values()))
        rows = first.rows(self.other, None)[index.cpu()].to(live.vectors.device)
        return outputs(self.graph, {name: table.table[rows] for name, table in self.tables.items()}, start)
