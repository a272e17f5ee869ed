"""What every way of scoring edges has in common, and the gradient methods.

A score is what a unit (an edge, or a node) does for the behaviour, in the metric's unit: noising, how far the metric
falls when it alone is ablated; denoising, how far it rises when it alone is restored. Positive helps the behaviour.

With Δ_u = a_u − s_u and G_v the metric's gradient at the input of v, the change of the metric along one edge is
⟨Δ_u, G_v⟩ to first order. The methods differ in where G is taken:

- *eap*: at the base run (Nanda 2023; Syed et al. 2023, "Attribution patching outperforms automated circuit discovery").
- *eap-ig*: averaged along the line from the other run's embeddings to the base run's (Hanna et al. 2024, "Have faith in
  faithfulness"). The scores of the embedding's edges then add up to the whole change, but for the rule's error.
- *eap-ig-activations*: for each layer's heads (and each MLP) averaged along the line between its own two outputs,
  everything before it clean, counted for its own edges only.
- *clean-corrupted*: the mean of the gradients at both ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.engine import Engine, Part
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.outputs import site_of, sites
from mechinterp.errors import UserError
from mechinterp.hooked import suffix
from mechinterp.hooked.sites import Site
from mechinterp.hooked.weights import mlp_out

Rule = Literal["midpoint", "left", "right"]


@dataclass(frozen=True)
class Method:
    """A way to score units. Subclasses are small values: their fields are the method's settings.

    Attributes:
        name: what the CLI calls it.
        level: "edge", or "node": then a unit is a source at a place.
        per_prompt: whether it scores prompts apart from each other, so that they can be resampled.
        at_base: whether all it knows is the metric's slope at the base run.
        slope: whether it needs the metric's slope anywhere.
    """

    name: ClassVar[str] = ""
    level: ClassVar[Literal["edge", "node"]] = "edge"
    per_prompt: ClassVar[bool] = True
    at_base: ClassVar[bool] = False
    slope: ClassVar[bool] = False

    @property
    def reads_labels(self) -> bool:
        """Whether scores change when answer and wrong answer change places in some prompts."""
        return True

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `[batch]` prompts and their scores `[batch unit]`; all prompts and `[1 unit]` if not `per_prompt`."""
        raise NotImplementedError

    def check(self, engine: Engine) -> None:
        """Raise UserError for an engine that the method cannot work with."""
        if self.at_base:
            self.refuse_flat(engine)
        if self.slope and engine.metric.name == "rank":
            raise UserError("rank has no gradient: it changes in steps. Valid: logit-diff, prob, logprob")

    def refuse_flat(self, engine: Engine) -> None:
        """Raise UserError where the metric has no slope at the base run."""
        if engine.metric.name == "kl" and engine.direction == "noise":
            raise UserError(
                f"{self.name} takes the slope of the metric at the clean run, and that of KL(clean ‖ circuit) is zero "
                "there: it has its minimum where the two agree. Valid: --metric logit-diff, or a method that looks "
                "away from the clean run: eap-ig, exact"
            )


@dataclass(frozen=True)
class Gradient(Method):
    """Base of the methods whose edge scores are ⟨Δ_u, G_v⟩ with one G for all sources."""

    slope: ClassVar[bool] = True

    def check(self, engine: Engine) -> None:
        super().check(engine)
        if set(self.weights()) == {1.0}:
            self.refuse_flat(engine)

    def weights(self) -> list[float]:
        """Shares of the base run in the embeddings at which the gradient is taken, equally weighted."""
        return [1.0]

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        self.check(engine)
        for part in engine.parts():
            base, other = ends(part)
            total, weights = None, self.weights()
            for weight in weights:
                pins = {} if weight == 1 else {"embed": torch.lerp(other, base, weight)}
                total, _ = part.gradients(pins, into=total)
            assert total is not None
            yield part.index, helps(engine, along_edges(part, total / len(weights)))


@dataclass(frozen=True)
class EAP(Gradient):
    """Edge attribution patching: one forward and one backward."""

    name: ClassVar[str] = "eap"


@dataclass(frozen=True)
class EAPIG(Gradient):
    """EAP with gradients integrated over the embeddings.

    Attributes:
        steps: points on the line.
        rule: where they lie in their steps; "left" and "right" as published code has them, counted from the other run.
    """

    name: ClassVar[str] = "eap-ig"
    steps: int = 5
    rule: Rule = "midpoint"

    def weights(self) -> list[float]:
        return points(self.steps, self.rule)


@dataclass(frozen=True)
class CleanCorrupted(Gradient):
    """The mean of the gradients at the clean and at the corrupted embeddings."""

    name: ClassVar[str] = "clean-corrupted"

    def weights(self) -> list[float]:
        return [1.0, 0.0]


@dataclass(frozen=True)
class EAPIGActivations(Method):
    """EAP with gradients integrated over each layer's own outputs.

    Attributes:
        steps, rule: see `EAPIG`.
    """

    name: ClassVar[str] = "eap-ig-activations"
    slope: ClassVar[bool] = True
    steps: int = 5
    rule: Rule = "midpoint"

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        self.check(engine)
        graph = engine.graph
        if graph.mlp == "neuron" or engine.ablation.kind != "resample":
            raise UserError(
                "eap-ig-activations integrates between a layer's outputs in two runs. Valid: ablation='resample', "
                "Graph(mlp='layer'); or the method eap-ig"
            )
        weights = points(self.steps, self.rule)
        for part in engine.parts():
            other = suffix.record(engine.model, engine.other, sites(graph), part.index).activations
            scores = torch.zeros(len(part), graph.n_edges)
            for site in tqdm(sites(graph), desc=self.name, disable=not engine.progress, leave=False):
                own = [i for i in range(len(graph.sources)) if site_of(graph, i).whole == site]
                base, total = part.recording.activations[site.hook_name], None
                for weight in weights:
                    between = torch.lerp(other[site.hook_name], base, weight)
                    pins = {graph.sources[i].name: between[:, :, at] for at, i in enumerate(own)}
                    if site.name != "z":
                        pins = {graph.sources[own[0]].name: between}
                    total, _ = part.gradients(pins, layer=site.layer or 0, into=total)
                assert total is not None
                scores += along_edges(part, total / len(weights), own).cpu()
            yield part.index, helps(engine, scores)


def points(steps: int, rule: Rule) -> list[float]:
    """Where a rule with so many steps looks between 0, the other run, and 1, the base run.

    Raises:
        UserError: no steps, or an unknown rule.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1; found {steps}")
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
    if rule not in shift:
        raise UserError(f"unknown rule {rule!r}; valid: 'midpoint', 'left', 'right'")
    return [(k + shift[rule]) / steps for k in range(steps)]


def ends(part: Part) -> tuple[Tensor, Tensor]:
    """`[batch pos d_model]` embeddings of the base run and what they are ablated to, at all positions."""
    base = part.recording.activations[Site("resid_pre", 0).hook_name]
    other = base.clone()
    other[:, part.start :] = part.ablated.vectors[0]
    return base, other


def helps(engine: Engine, change: Tensor) -> Tensor:
    """Scores from changes of the metric; see the module. A metric that is better when lower is turned round."""
    sign = -1.0 if engine.direction == "noise" else 1.0
    return change * (sign if engine.metric.higher_is_better else -sign)


def along_edges(part: Part, grads: Tensor, sources: list[int] | None = None) -> Tensor:
    """`[batch edge]` ⟨Δ_u, G_v⟩ of every edge, from gradients `[destination batch pos d_model]`.

    `sources` narrows what is worked out to edges of these sources (of consecutive numbers); others are 0.
    """
    graph = part.graph
    place = part.engine.place[part.index][:, part.start :]
    spans = [(p, p + 1) for p in range(part.n_pos)] if graph.positions else [(0, part.n_pos)]
    made = grads.new_zeros(len(part), *graph.valid.shape)
    batch = torch.arange(len(part))
    columns = (graph.vector_row >= 0).nonzero().flatten()
    for first, last in spans:
        number = place[:, first] if graph.positions else torch.zeros(len(part), dtype=torch.long)
        here = part.differences[:, :, first:last].flatten(2).transpose(0, 1)  # [batch source pos·d_model]
        slope = grads[:, :, first:last].flatten(2).transpose(0, 1)
        for start, stop, n_sources in _together(graph):
            low, high = 0, int((columns < n_sources).sum())
            if sources is not None:
                low, high = min(sources), min(high, max(sources) + 1)
            if high > low:
                each = torch.bmm(slope[:, start:stop], here[:, low:high].mT)
                rows = torch.arange(start, stop)[:, None]
                made[batch[:, None, None], rows, columns[low:high], number[:, None, None]] += each
        if graph.mlp == "neuron":
            _along_neurons(part, grads, made, number, first, last)
    return graph.gather(made)


def _together(graph: Graph) -> list[tuple[int, int, int]]:
    """Runs of destinations that read the same sources: first, last + 1, how many sources."""
    made: list[tuple[int, int, int]] = []
    for i, one in enumerate(graph.destinations):
        if made and made[-1][2] == one.n_sources:
            made[-1] = (made[-1][0], i + 1, one.n_sources)
        else:
            made.append((i, i + 1, one.n_sources))
    return made


def _along_neurons(part: Part, grads: Tensor, made: Tensor, number: Tensor, first: int, last: int) -> None:
    """Add the edges out of neurons: their differences times the gradient behind W_out."""
    graph, batch = part.graph, torch.arange(len(part))
    for layer, live in part.live.neurons.items():
        delta = (part.ablated.neurons[layer] - live)[:, first:last]
        weight = mlp_out(graph.model, layer)[0].to(grads)
        columns = [i for i, source in enumerate(graph.sources) if source.layer == layer and source.kind == "neuron"]
        for v, destination in enumerate(graph.destinations):
            if destination.n_sources > columns[0]:
                each = ((grads[v][:, first:last] @ weight.T) * delta).sum(1)
                made[batch[:, None], v, torch.tensor(columns), number[:, None]] += each
