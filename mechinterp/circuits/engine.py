"""One forward for every circuit: the model with any edge mask, and the gradient at every input.

1. A part of the prompts is recorded once (hooked/suffix.py): the base run (clean when noising, corrupted when
   denoising), what every source writes in it, and the ablation values. Positions before the first one at which the two
   differ are never run again.
2. `Part.logits(mask)` replays the blocks. Where a layer reads the residual stream, the inputs of all of its
   destinations are mixed at once (mixing.py), pass the model's own norm, unfrozen, and its projections, and are
   written to q, k, v and the MLP's input; where a source writes, its live output goes to the store. The attention,
   the MLPs and the final norm are the model's own.
3. Rows of a call are circuits × prompts, so many circuits share a call. A mask may be binary or continuous, one for
   all prompts or one a prompt; a pinned node writes a given output instead of its live one.
4. Separate key and value inputs for each query head, which grouped-query attention does not have, are run as copies of
   the row, one for each head of a group; every copy then takes each head from its own copy.
5. `Part.gradients` adds zeros to every input and asks for the metric's gradient there: since
   −∂m/∂mask_vu = ⟨a_u − s_u, ∂m/∂x_v⟩, this is all that gradient methods need.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import psutil
import torch
from torch import Tensor

from mechinterp.circuits.ablations import Ablated, Ablation, Direction
from mechinterp.circuits.graph import Destination, Graph
from mechinterp.circuits.mixing import Mixer, Store
from mechinterp.circuits.outputs import Outputs, outputs, sites, written
from mechinterp.errors import UserError
from mechinterp.hooked import schedule, suffix
from mechinterp.hooked.forward import Edit
from mechinterp.hooked.interventions import Rows
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
        free = psutil.virtual_memory().available
        if self.model.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.model.device)[0]
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
        """What a prompt takes in a call at most: ablation values, live outputs, differences and their gradients, and
        the inputs of one layer's destinations."""
        model, graph = self.model, self.graph
        widest = sum(one.layer == 0 for one in graph.destinations) * 4
        vectors = sum(source.kind != "neuron" for source in graph.sources) * 4 + widest
        if graph.mlp == "neuron":
            vectors += widest * graph.n_neurons // model.d_model
        return model.dtype.itemsize * self.base.n_pos * model.d_model * vectors

    @property
    def rows_per_call(self) -> int:
        """Circuits × prompts of a call."""
        fits = self.max_bytes // self.bytes_per_prompt
        best = schedule.max_tokens(self.model, self.base.n_pos, self.read.columns is None) // self.base.n_pos
        return max(1, min(fits, best))

    def parts(self) -> Iterator["Part"]:
        """The prompts, a call's at a time."""
        for index in torch.arange(len(self)).split(self.rows_per_call):
            yield Part(self, index)

    @cached_property
    def _parts_kept(self) -> list["Part"] | None:
        """All parts, where a quarter of the budget holds them: many circuits are then run on the same recordings."""
        if len(self) * self.bytes_per_prompt > self.max_bytes:
            return None
        return list(self.parts())

    def logits(self, masks: Tensor) -> Tensor:
        """`[circuit prompt target column]` of circuits, on the CPU.

        Args:
            masks: `[circuit destination source place]`, the same for every prompt, or
                `[circuit prompt destination source place]`.
        """
        per_prompt = masks.ndim == 5
        made = []
        for part in self._parts_kept or self.parts():
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
        parts = torch.arange(len(self)).split(self.rows_per_call)
        return torch.cat([suffix.record(self.model, side, (), part).base_logits(self.read).cpu() for part in parts])

    @cached_property
    def full(self) -> Tensor:
        """`[prompt]` metric with every edge kept: the base run."""
        return self.values(torch.ones(1, *self.graph.valid.shape))[0]

    @cached_property
    def empty(self) -> Tensor:
        """`[prompt]` metric with every edge cut."""
        return self.values(torch.zeros(1, *self.graph.valid.shape))[0]


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
        engine, graph = self.engine, self.engine.graph
        self.graph, self.model = graph, engine.model
        self.recording = suffix.record(self.model, engine.base, self._sites, self.index)
        self.start = 0
        whole = outputs(graph, self.recording.activations)
        ablated = engine.ablated.of(self.index, whole, 0)
        differs = (ablated.vectors != whole.vectors).flatten(3).any(-1).any(0)
        for layer, neurons in ablated.neurons.items():
            differs |= (neurons != whole.neurons[layer]).any(-1)
        # A padded position may hold anything: nothing reads it.
        differs &= engine.base.real[self.index.to(differs.device)]
        if self.model.levers.prefix and engine.read.positions is not None:
            changed = torch.where(differs.any(-1), differs.int().argmax(-1), differs.shape[1])
            read = engine.read.positions[self.index].amin()
            self.start = int(min(changed.min().item(), int(read)))
        self.live, self.ablated = _cut(whole, self.start), _cut(ablated, self.start)

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
                an MLP's output, the embedding), at all positions.
        """
        circuits = 1 if mask is None else len(mask)
        run = _Run(self, circuits, None if mask is None else self._mixer(mask), pins or {})
        return self._replay(run, circuits)

    def metric(self, mask: Tensor | None, pins: Mapping[str, Tensor] | None = None) -> Tensor:
        """`[circuit batch]` metric under masks; see `logits`. Differentiable."""
        return self._metric(self.logits(mask, pins))

    def _metric(self, logits: Tensor) -> Tensor:
        engine = self.engine
        answers = engine.pairs.answers.take(self.index).to(logits.device)
        clean = engine.clean_logits[self.index].to(logits.device) if engine.metric.needs_clean else None
        return torch.stack([engine.metric(one, answers, clean) for one in logits])

    def gradients(
        self, pins: Mapping[str, Tensor] | None = None, layer: int = 0, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The metric's gradient at the input of every destination, with all edges kept or under one mask.

        Args:
            pins: see `logits`.
            layer: first block that is run; destinations before it get zeros.
            mask: `[1 destination source place]`, or None.

        Returns:
            `[destination batch pos d_model]`, positions from `start` on, and `[batch]` metric.
        """
        shape = (len(self), self.n_pos, self.model.d_model)
        like = self.live.vectors
        run = _Run(self, 1, None if mask is None else self._mixer(mask), pins or {}, layer)
        groups = [one for one in run.reads if one.layer >= layer]
        run.probes = {
            one: torch.zeros(one.stop - one.start, *shape, dtype=like.dtype, device=like.device, requires_grad=True)
            for one in groups
        }
        with torch.enable_grad():
            values = self._metric(self._replay(run, 1))[0]
            found = torch.autograd.grad(values.sum(), list(run.probes.values()), allow_unused=True)
        made = like.new_zeros(len(self.graph.destinations), *shape)
        for group, grad in zip(groups, found, strict=True):
            if grad is not None:
                made[group.start : group.stop] = grad
        return made, values.detach()

    def _replay(self, run: "_Run", circuits: int) -> Tensor:
        copies = run.copies
        index = self.index.to(self.model.device).repeat(copies * circuits)
        rows = Rows(self.engine.base, index, self.start)
        made = self.recording.logits(run.layer, rows, self.engine.read, run.edits())
        return made.unflatten(0, (copies, circuits, len(self)))[0]

    def _mixer(self, mask: Tensor) -> Mixer:
        """A mask of circuits, or of circuits × prompts, which are then circuits of one prompt each."""
        like, graph = self.live.vectors, self.graph
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
        store = self._stores.get(shape)
        if store is None:
            self._stores.clear()
            store = self._stores[shape] = Store(*shape, like)
        store.grad = None
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


def _cut(whole: Outputs, start: int) -> Outputs:
    """From position `start` on."""
    return Outputs(
        whole.vectors[:, :, start:].contiguous(), {layer: one[:, start:] for layer, one in whole.neurons.items()}
    )


@dataclass(frozen=True)
class _Read:
    """Destinations that read the residual stream together: a layer's attention, an MLP, or the logits."""

    layer: int
    start: int
    stop: int
    n_sources: int


@dataclass(eq=False)
class _Run:
    """The edits of one call: what is read, written and projected where."""

    part: Part
    circuits: int
    mixer: Mixer | None
    pins: Mapping[str, Tensor]
    layer: int = 0
    probes: dict[_Read, Tensor] = field(default_factory=dict)
    _held: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph, self.model = self.part.graph, self.part.model
        grouped = self.graph.qkv == "ungrouped"
        self.copies = self.model.n_heads // self.model.n_kv_heads if grouped else 1
        self.reads = _reads(self.graph)
        unknown = [name for name in self.pins if name not in self.graph.source_index]
        if unknown:
            raise UserError(f"pins: this graph has no source {unknown[0]!r}")

    def edits(self) -> dict[str, Edit]:
        """By hook name, for every layer that is run."""
        made: dict[str, Edit] = {}
        attention = {one.layer: one for one in self.reads if self.graph.destinations[one.start].input not in _LATE}
        mlps = {one.layer: one for one in self.reads if self.graph.destinations[one.start].input == "mlp"}
        for layer in range(self.layer, self.model.n_layers):
            split = self.mixer is not None or bool(self.probes)
            before = Site("resid_pre", layer).hook_name
            self._chain(made, before, self._embed if layer == 0 else None)
            self._chain(made, before, self._read_attention(attention[layer]) if split else None)
            if split:
                for name in "qkv":
                    made[Site(name, layer).hook_name] = self._give(f"{name}{layer}")
            z = Site("z", layer).hook_name
            self._chain(made, z, self._own_copy if self.copies > 1 else None)
            if self.graph.heads_add_up:
                self._chain(made, z, self._wrote_heads(layer))
            else:
                self._chain(made, Site("attn_out", layer).hook_name, self._wrote(Site("attn_out", layer), f"a{layer}"))
            if self.graph.has_mlp:
                if split:
                    made[Site("mlp_in", layer).hook_name] = self._read_late(mlps[layer])
                site = Site("mlp_post" if self.graph.mlp == "neuron" else "mlp_out", layer)
                self._chain(made, site.hook_name, self._wrote(site, f"m{layer}"))
        if self.mixer is not None or self.probes:
            self._chain(made, Site("resid_post", self.model.n_layers - 1).hook_name, self._read_late(self.reads[-1]))
        return made

    @staticmethod
    def _chain(made: dict[str, Edit], name: str, edit: Edit | None) -> None:
        """Add an edit behind those at a hook point."""
        first = made.get(name)
        if edit is None:
            return
        made[name] = edit if first is None else lambda activation, rows: edit(first(activation, rows), rows)

    # Shapes: rows of a call are [copy circuit batch]; the mixer wants [circuit row d_model], row = batch·pos (or, with
    # one mask a prompt, circuits × prompts of one row of positions each), of one copy.

    def _to_mixer(self, activation: Tensor) -> Tensor:
        """`[circuit row …]` from rows of a call `[copy·circuit·batch pos …]`."""
        one = activation.unflatten(0, (self.copies, -1))[0]
        n = len(self.mixer.mask) if self.mixer is not None else self.circuits
        return one.unflatten(0, (n, -1)).flatten(1, 2)

    def _to_rows(self, mixed: Tensor) -> Tensor:
        """`[circuit·batch pos …]` from `[circuit row …]`."""
        return mixed.flatten(0, 1).unflatten(0, (-1, self.part.n_pos))

    def _mixed(self, resid: Tensor, read: _Read) -> Tensor:
        """`[destination circuit·batch pos d_model]`: the inputs of destinations that read `resid` together."""
        one = resid.unflatten(0, (self.copies, -1))[0]
        if self.mixer is not None:
            mixed = self.mixer.mix(self._to_mixer(resid), slice(read.start, read.stop), read.n_sources)
            made = mixed.transpose(0, 1).reshape(read.stop - read.start, *one.shape)
        else:
            made = one.expand(read.stop - read.start, *one.shape)
        return made + self.probes[read] if read in self.probes else made

    def _embed(self, resid: Tensor, rows: Rows) -> Tensor:
        pinned = self._pin("embed", resid, rows)
        if self.mixer is not None:
            self.mixer.write(self._to_mixer(pinned)[:, None])
        return pinned

    def _pin(self, name: str, live: Tensor, rows: Rows) -> Tensor:
        """A source's given output, for the rows of a call, or its live one."""
        if name not in self.pins:
            return live
        pinned = self.pins[name][:, self.part.start :].to(live)
        return pinned.repeat(len(live) // len(pinned), *[1] * (pinned.ndim - 1))

    def _read_attention(self, read: _Read) -> Edit:
        model, graph, layer = self.model, self.graph, read.layer
        norm = model.norm(Site("q_input", layer))
        inputs = [graph.destinations[i].input for i in range(read.start, read.stop)]

        def edit(resid: Tensor, rows: Rows) -> Tensor:
            normed = norm(self._mixed(resid, read))
            for name in "qkv":
                weight, bias = model.projection(Site(f"{name}_input", layer))
                if graph.qkv == "merged":
                    given = normed.repeat_interleave(len(weight) // len(normed), 0)
                else:
                    first = inputs.index(name)
                    given = normed[first : first + inputs.count(name)]
                    weight, bias = (one.repeat_interleave(len(given) // len(one), 0) for one in (weight, bias))
                made = torch.einsum("vbpd,vde->bpve", given, weight) + bias
                self._held[f"{name}{layer}"] = self._to_copies(made, name)
            return resid

        return edit

    def _to_copies(self, made: Tensor, name: str) -> Tensor:
        """`[copy·batch pos head d_head]`: every copy of a row has the queries of all heads, and of each group the key
        and value of its own head."""
        if self.copies == 1:
            return made
        if name == "q":
            return made.repeat(self.copies, 1, 1, 1)
        return made.unflatten(2, (-1, self.copies)).movedim(3, 0).flatten(0, 1)

    def _give(self, name: str) -> Edit:
        def edit(activation: Tensor, rows: Rows) -> Tensor:
            return self._held.pop(name)

        return edit

    def _own_copy(self, z: Tensor, rows: Rows) -> Tensor:
        """Every copy of a row takes each head from the copy that had this head's key and value."""
        by_copy = z.unflatten(0, (self.copies, -1)).unflatten(3, (-1, self.copies))
        own = torch.diagonal(by_copy, dim1=0, dim2=4).movedim(-1, 3)  # [batch pos kv_head copy d_head]
        return own.flatten(2, 3).repeat(self.copies, 1, 1, 1)

    def _wrote_heads(self, layer: int) -> Edit:
        """The heads of a layer have written: pin, and keep what they write."""
        names = [f"a{layer}.h{head}" for head in range(self.model.n_heads)]
        pinned = any(name in self.pins for name in names)

        def edit(z: Tensor, rows: Rows) -> Tensor:
            if pinned:
                z = torch.stack([self._pin(name, z[:, :, i], rows) for i, name in enumerate(names)], 2)
            self._keep(Site("z", layer), z)
            return z

        return edit

    def _wrote(self, site: Site, name: str) -> Edit:
        """A layer's attention, or its MLP, has written."""

        def edit(activation: Tensor, rows: Rows) -> Tensor:
            activation = self._pin(name, activation, rows)
            self._keep(site, activation)
            return activation

        return edit

    def _keep(self, site: Site, activation: Tensor) -> None:
        if self.mixer is None:
            return
        if site.name == "mlp_post":
            self.mixer.write_neurons(int(site.layer or 0), self._to_mixer(activation))
            return
        one = activation.unflatten(0, (self.copies, -1))[0]
        made = written(self.graph, site, one)  # [circuit·batch source pos d_model]
        n = len(self.mixer.mask)
        self.mixer.write(made.unflatten(0, (n, -1)).transpose(1, 2).flatten(2, 3))

    def _read_late(self, read: _Read) -> Edit:
        """What an MLP, or the final norm, reads."""

        def edit(resid: Tensor, rows: Rows) -> Tensor:
            made = self._mixed(resid, read)[0]
            return made.repeat(self.copies, 1, 1) if self.copies > 1 else made

        return edit


_LATE = ("mlp", "logits")


def _reads(graph: Graph) -> list[_Read]:
    """Destinations grouped by where they read: consecutive ones of a layer's attention together."""
    made: list[_Read] = []

    def kind(one: Destination) -> tuple[int, bool]:
        return one.layer, one.input in _LATE

    for i, one in enumerate(graph.destinations):
        if made and i and kind(graph.destinations[i - 1]) == kind(one):
            made[-1] = _Read(one.layer, made[-1].start, i + 1, one.n_sources)
        else:
            made.append(_Read(one.layer, i, i + 1, one.n_sources))
    return made
