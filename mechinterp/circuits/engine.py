"""One forward for every circuit: the model with any edge mask, and the gradient at every input.

1. A part of the prompts is recorded once (hooked/suffix.py): the base run (clean when noising, corrupted when
   denoising), what every source writes in it, and the ablation values. Positions before the first one at which the two
   differ are never run again.
2. `Part.logits(mask)` replays the blocks with every destination's input mixed by the mask (masked_run.py). Rows of a
   call are circuits × prompts, so many circuits share a call. A mask may be binary or continuous, one for all prompts
   or one a prompt; a pinned node writes a given output instead of its live one.
3. `Part.gradients` taps every input for the metric's gradient there: since −∂m/∂mask_vu = ⟨a_u − s_u, ∂m/∂x_v⟩, this
   is all that gradient methods need.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mechinterp.circuits.ablations import Ablated, Ablation, Direction
from mechinterp.circuits.graph import Graph
from mechinterp.circuits.masked_run import MaskedRun
from mechinterp.circuits.mixing import Mixer, Store
from mechinterp.circuits.outputs import outputs, site_of, sites
from mechinterp.errors import UserError
from mechinterp.evaluation import read_logits
from mechinterp.hooked import schedule, suffix
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import Site
from mechinterp.hooked.weights import mlp_out
from mechinterp.metrics import Metric, as_metric
from mechinterp.tasks.pairs import PromptPairs


class Engine:
    """Runs circuits of a graph on prompt pairs.

    Attributes:
        graph: laid on the pairs.
        pairs: as the metric wants them.
        metric: of every prompt.
        base, other: prompts of the run that is ablated, and of the run that values come from.
        place: `[prompt pos]` number of the place of each position.
    """

    def __init__(
        self,
        graph: Graph,
        pairs: PromptPairs,
        ablation: Ablation | str = "resample",
        direction: Direction = "noise",
        metric: Metric | str | None = None,
        max_bytes: int | None = None,
        progress: bool = False,
        read: suffix.Read | None = None,
    ):
        """Prepare; nothing but means is run yet.

        Args:
            graph: of the model.
            pairs: clean and corrupted prompts.
            ablation: values along cut edges.
            direction: "noise" ablates the clean run with the corrupted one's values, "denoise" the reverse.
            metric: as elsewhere; the logit difference by default.
            max_bytes: memory of a call; by default a quarter of what is free.
            progress: show progress bars.
            read: which logits a run gives; by default those of the metric.

        Raises:
            UserError: see `Ablation.prepare` and `Graph.at`; less memory than one prompt needs.
        """
        _refuse_in_force(graph.model)
        self.metric, self.progress = as_metric(metric), progress
        self.pairs = self.metric.prepare(pairs)
        self.graph = graph.at(self.pairs)
        self.model = graph.model
        self.read = self.metric.read(self.pairs) if read is None else read
        if read is None and self.read.positions is None:
            raise UserError("circuits need a metric of the task's positions; a plain function reads all logits")
        sides = (self.pairs.clean, self.pairs.corrupted)
        self.base, self.other = (
            side.to(self.model.device) for side in (sides if direction == "noise" else sides[::-1])
        )
        self.ablation = Ablation.of(ablation)
        self.direction: Direction = direction
        self.place = self.graph.place_of(self.pairs)
        self.ablated: Ablated = self.ablation.prepare(self.graph, self.pairs, direction)
        free = schedule.free_bytes(self.model)
        if max_bytes is not None and max_bytes > free:
            raise UserError(f"max_bytes={max_bytes:,} was asked for, but {free:,} bytes are free")
        self.max_bytes = free // 4 if max_bytes is None else max_bytes
        if self.bytes_per_prompt > self.max_bytes:
            raise UserError(
                f"one prompt of {self.base.n_pos} tokens needs about {self.bytes_per_prompt:,} bytes on "
                f"{self.graph!r}; {self.max_bytes:,} may be used. Shorten prompts or raise max_bytes"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def bytes_per_prompt(self) -> int:
        """What a prompt takes at most, in vectors of d_model at each position: of each source its live output, ablation
        value, their difference, a run's difference and its gradient; of each destination its gradient, and what the
        backward of its norm and projection keeps; of each layer what is recorded."""
        model, graph = self.model, self.graph
        sources = sum(source.kind != "neuron" for source in graph.sources)
        vectors = 5 * sources + 5 * len(graph.destinations) + 8 * model.n_layers
        if graph.mlp == "neuron":
            vectors += (4 * model.n_layers + len(graph.destinations)) * graph.n_neurons // model.d_model
        return model.dtype.itemsize * self.base.n_pos * model.d_model * vectors

    @property
    def rows_per_call(self) -> int:
        """Circuits × prompts of a call."""
        fits = self.max_bytes // self.bytes_per_prompt
        best = schedule.max_tokens(self.model, self.base.n_pos, self.read.columns is None) // self.base.n_pos
        return max(1, min(fits, best))

    def parts(self) -> Iterator["Part"]:
        """The prompts, a call's at a time; recorded once where the budget holds all of them."""
        if self._parts_kept is None:
            yield from self._record()
        else:
            yield from self._parts_kept

    def _record(self) -> Iterator["Part"]:
        for index in torch.arange(len(self)).split(self.rows_per_call):
            yield Part(self, index)

    @cached_property
    def _parts_kept(self) -> list["Part"] | None:
        """All parts, where the budget holds them: many circuits are then run on the same recordings."""
        if len(self) * self.bytes_per_prompt > self.max_bytes:
            return None
        return list(self._record())

    def logits(self, masks: Tensor) -> Tensor:
        """`[circuit prompt target column]` of circuits, on the CPU.

        Args:
            masks: `[circuit destination source place]`, the same for every prompt, or
                `[circuit prompt destination source place]`.
        """
        per_prompt = masks.ndim == 5
        made = []
        for part in self.parts():
            n = max(1, self.rows_per_call // len(part))
            ours = masks[:, part.index] if per_prompt else masks
            made.append(torch.cat([part.logits(chunk).detach().cpu() for chunk in ours.split(n)]))
        return torch.cat(made, 1)

    def values(self, masks: Tensor) -> Tensor:
        """`[circuit prompt]` metric of circuits; see `logits`."""
        return self.of_logits(self.logits(masks))

    def of_logits(self, logits: Tensor) -> Tensor:
        """`[circuit prompt]` metric of logits `[circuit prompt target column]`."""
        clean = self.clean_logits if self.metric.needs_clean else None
        return torch.stack([self.metric(one, self.pairs.answers, clean) for one in logits])

    @cached_property
    def clean_logits(self) -> Tensor:
        """`[prompt target column]` of the clean run."""
        side = self.base if self.direction == "noise" else self.other
        return read_logits(self.model, side, self.read)

    @cached_property
    def full(self) -> Tensor:
        """`[prompt]` metric with every edge kept: the base run."""
        return self.values(torch.ones(1, *self.graph.valid.shape))[0]

    @cached_property
    def empty(self) -> Tensor:
        """`[prompt]` metric with every edge cut."""
        return self.values(torch.zeros(1, *self.graph.valid.shape))[0]


def _refuse_in_force(model: HookedModel) -> None:
    """Raise UserError for interventions that a masked forward would overrule: it makes the inputs of heads and MLPs
    itself, and runs prompts apart from each other."""
    for bound in model.in_force:
        name = bound.writes.name
        if name in ("q", "k", "v") or bound.writes.kind.virtual or name.endswith("_scale"):
            raise UserError(
                f"an intervention at {bound.writes} is in force, but a circuit's forward makes the inputs of heads and "
                "MLPs itself. Valid in force: residual streams, z, attn_out, mlp_out, mlp_post, pattern"
            )
        if not bound.intervention.folds:
            raise UserError(
                f"a function of the whole batch is in force at {bound.writes}; circuits run some prompts at a time"
            )


@dataclass(eq=False)
class Part:
    """Some of an engine's prompts, recorded.

    Attributes:
        engine: whose prompts these are.
        index: `[batch]` consecutive prompts.
    """

    engine: Engine
    index: Tensor
    _stores: dict[tuple[int, ...], Store] = field(default_factory=dict)

    def __post_init__(self) -> None:
        engine = self.engine
        self.graph, self.model = engine.graph, engine.model
        self.recording = suffix.record(self.model, engine.base, self._sites, self.index)
        self.start = self._first_change()
        self.live = outputs(self.graph, self.recording.activations, self.start)
        self.ablated = engine.ablated.of(self.index, self.live, self.start)

    def _first_change(self) -> int:
        """The first position at which base run and ablation values can differ: under causal attention that of the first
        token that does, where values come from the other run of the pair."""
        engine, read = self.engine, self.engine.read.positions
        if engine.ablation.kind != "resample" or not self.model.levers.prefix or read is None or self.model.in_force:
            return 0
        index = self.index.to(engine.base.tokens.device)
        differs = (engine.base.tokens != engine.other.tokens)[index] & engine.base.real[index]
        first = torch.where(differs.any(-1), differs.int().argmax(-1), engine.base.n_pos)
        return min(int(first.min()), int(read[self.index].min()))

    @property
    def _sites(self) -> list[Site]:
        """What is recorded: outputs of the sources, and what MLPs and the logits read."""
        graph = self.graph
        read = [Site("mlp_in", layer) for layer in range(self.model.n_layers)] if graph.has_mlp else []
        return [*sites(graph), *read, Site("resid_post", self.model.n_layers - 1)]

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def differences(self) -> Tensor:
        """`[source batch pos d_model]` a_u − s_u of the recorded runs."""
        return self.ablated.vectors - self.live.vectors

    @property
    def squared_differences(self) -> Tensor:
        """`[source batch pos]` ‖a_u − s_u‖² of every source, neurons among them."""
        of_vectors = self.differences.square().sum(-1)
        if self.graph.mlp == "layer":
            return of_vectors
        made = of_vectors.new_zeros(len(self.graph.sources), *of_vectors.shape[1:])
        made[self.graph.vector_row >= 0] = of_vectors
        for layer, live in self.live.neurons.items():
            first, norms = self.graph.source_index[f"m{layer}.n0"], mlp_out(self.model, layer)[0].norm(dim=-1)
            delta = (self.ablated.neurons[layer] - live) * norms.to(live)
            made[first : first + len(norms)] = delta.square().movedim(-1, 0)
        return made

    @property
    def n_pos(self) -> int:
        """Positions that are run."""
        return self.engine.base.n_pos - self.start

    def logits(self, mask: Tensor | None, pins: Mapping[str, Tensor] | None = None) -> Tensor:
        """`[circuit batch target column]` under masks.

        Args:
            mask: `[circuit destination source place]`, or `[circuit batch destination source place]`, one for each
                prompt; None keeps every edge of one circuit.
            pins: source -> what it writes instead of its live output, `[batch pos …]` as its site has it (a head's z,
                an MLP's output, the embedding); what it holds before `start` must be what the run has there.
        """
        self._check_pins(pins or {})
        circuits = 1 if mask is None else len(mask)
        run = MaskedRun(self.graph, self.start, circuits, None if mask is None else self._mixer(mask), pins or {})
        return self._replay(run, circuits)

    def _check_pins(self, pins: Mapping[str, Tensor]) -> None:
        """Raise UserError for a pin that cannot be put in."""
        for name, value in pins.items():
            if name not in self.graph.source_index:
                raise UserError(f"pins: this graph has no source {name!r}")
            site = site_of(self.graph, self.graph.source_index[name])
            if site.name == "mlp_post":
                raise UserError(f"pins: {name} is a neuron; heads, whole MLPs and the embedding can be pinned")
            run = self.recording.activations[site.hook_name]
            run = run if site.head is None else run[:, :, site.head]
            if value.shape != run.shape:
                raise UserError(f"pins: {name} writes {list(run.shape)}; found {list(value.shape)}")
            if not torch.equal(value[:, : self.start].to(run), run[:, : self.start]):
                raise UserError(
                    f"pins: {name} differs before position {self.start}, the first at which the two runs differ: "
                    "positions before it are not run again"
                )

    def metric(self, mask: Tensor | None, pins: Mapping[str, Tensor] | None = None) -> Tensor:
        """`[circuit batch]` metric under masks; see `logits`. Differentiable."""
        return self._metric(self.logits(mask, pins))

    def _metric(self, logits: Tensor) -> Tensor:
        engine = self.engine
        answers = engine.pairs.answers.take(self.index).to(logits.device)
        clean = engine.clean_logits[self.index].to(logits.device) if engine.metric.needs_clean else None
        return torch.stack([engine.metric(one, answers, clean) for one in logits])

    def gradients(
        self,
        pins: Mapping[str, Tensor] | None = None,
        layer: int = 0,
        mask: Tensor | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The metric's gradient at the input of every destination, with all edges kept or under one mask.

        Args:
            pins: see `logits`.
            layer: first block that is run; destinations before it get zeros.
            mask: `[1 destination source place]`, or None.
            into: add to this tensor, of an earlier call.

        Returns:
            `[destination batch pos d_model]`, positions from `start` on, and `[batch]` metric.
        """
        like = self.live.vectors
        if into is None:
            into = like.new_zeros(len(self.graph.destinations), len(self), self.n_pos, self.model.d_model)
        anchor = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        run = MaskedRun(
            self.graph, self.start, 1, None if mask is None else self._mixer(mask), pins or {}, layer, into, anchor
        )
        with torch.enable_grad():
            values = self._metric(self._replay(run, 1))[0]
            torch.autograd.grad(values.sum(), [anchor])
        return into, values.detach()

    def _replay(self, run: MaskedRun, circuits: int) -> Tensor:
        copies = run.copies
        index = self.index.to(self.model.device).repeat(copies * circuits)
        rows = Rows(self.engine.base, index, self.start)
        made = self.recording.logits(run.layer, rows, self.engine.read, run.edits())
        return made.unflatten(0, (copies, circuits, len(self)))[0]

    def _mixer(self, mask: Tensor) -> Mixer:
        """A mask of circuits, or of circuits × prompts, which are then circuits of one prompt each."""
        like = self.live.vectors
        per_prompt = mask.ndim == 5
        mask = mask.to(like)
        circuits = len(mask)
        values = self.ablated.vectors
        rows = len(self) * self.n_pos
        if per_prompt:
            mask, rows = mask.flatten(0, 1), self.n_pos
            ablated = values.transpose(0, 1).repeat(circuits, 1, 1, 1)
        else:
            ablated = values.flatten(1, 2)[None]
        shape = (len(mask), len(values), rows, self.model.d_model)
        if torch.is_grad_enabled() and (mask.requires_grad or values.requires_grad):
            store = Store(*shape, like)  # of its own: a later run must not write over what a backward will read
            return self._mixer_of(mask, ablated, store, per_prompt, circuits)
        store = self._stores.get(shape)
        if store is None:
            self._stores.clear()
            store = self._stores[shape] = Store(*shape, like)
        return self._mixer_of(mask, ablated, store, per_prompt, circuits)

    def _mixer_of(self, mask: Tensor, ablated: Tensor, store: Store, per_prompt: bool, circuits: int) -> Mixer:
        graph, like = self.graph, self.live.vectors
        neurons = {}
        for layer, silent in self.ablated.neurons.items():
            first = next(
                i for i, source in enumerate(graph.sources) if source.layer == layer and source.kind == "neuron"
            )
            of_rows = silent.repeat(circuits, 1, 1) if per_prompt else silent.flatten(0, 1)[None]
            neurons[layer] = (first, of_rows, mlp_out(self.model, layer)[0].to(like))
        return Mixer(
            mask, ablated, (graph.vector_row >= 0).nonzero().flatten(), store, self._places(per_prompt), neurons
        )

    def _places(self, per_prompt: bool) -> list[Tensor] | None:
        """Rows of each place; None where there is one."""
        graph = self.graph
        if not graph.positions:
            return None
        place = self.engine.place[self.index][:, self.start :]
        if per_prompt and bool((place != place[:1]).any()):
            raise UserError("masks for each prompt need places at the same positions in all of them")
        flat = place[0] if per_prompt else place.flatten()
        device = self.live.vectors.device
        return [(flat == number).nonzero().flatten().to(device) for number in range(len(graph.places))]
