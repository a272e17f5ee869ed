"""AtP*: attribution patching of nodes that looks through saturated attention and cancelling paths.

Kramár, Lieberum, Shah & Nanda 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to
components".

1. Attribution patching gives a node u the sum over what reads it of ⟨Δ_u, G_v⟩, with Δ_u = a_u − s_u and G_v the
   metric's gradient at the input of v. It misses two kinds of nodes.
2. *Saturated attention.* A softmax near 0 or 1 has no slope, so a change that would turn a head's attention seems to
   do nothing. The query-key fix takes that part exactly: Δ_u is added to what the queries and keys of a layer read, and
   the norm, the scores and the softmax are run. With the base run's values V, the change ΔA of a head's attention
   weights counts ⟨ΔA V, ∂m/∂z⟩, which is ⟨ΔA, ∂m/∂A⟩ with the base run's gradient. This takes the place of ⟨Δ_u, G_v⟩
   at queries and keys; values and MLPs stay as they are. The paper patches nodes that are queries or keys; a node of
   ours feeds both, so both move together, as they do when the node is patched.
3. *Cancelling paths.* A direct and an indirect effect of opposite sign leave almost nothing, and their rest is at the
   mercy of the approximation. Gradient drop runs one backward for each layer, in which no gradient passes through that
   layer's attention and MLP, and one in which all passes, and averages the absolute values of what they give. (The
   paper's average is over the layers but a node's own. A path through every layer is lost in each of those: in a
   model of two layers that is every circuit.)
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.circuits.engine import Engine, Part
from mechinterp.circuits.head_importance import by_node
from mechinterp.circuits.methods import Method, along_edges, helps
from mechinterp.errors import UserError
from mechinterp.hooked.forward import Edit, Plan
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.sites import Site


@dataclass(frozen=True)
class AtPStar(Method):
    """AtP* scores of nodes.

    With `grad_drop` scores are magnitudes, 0 and up: whether a node helps the behaviour or hinders it is not told.
    Without either option this is attribution patching, the sum of the EAP scores of a node's edges.

    Costs of a prompt: one forward and backward, and with `grad_drop` another for each layer; with `qk_fix` besides, for
    every layer and every node before it, that layer's queries, keys and attention: this grows with the square of the
    layers, and with the places of the graph. Memory beside the engine's: gradients of all heads' outputs from every
    backward. Limits: MLPs and values are linear still, and so is all that lies behind a head's attention.

    Attributes:
        qk_fix: work out changes of attention weights exactly.
        grad_drop: average over backwards that leave out a layer each, and one that leaves out none.
    """

    name: ClassVar[str] = "atp-star"
    level: ClassVar[Literal["edge", "node"]] = "node"
    at_base: ClassVar[bool] = True
    qk_fix: bool = True
    grad_drop: bool = True

    def check(self, engine: Engine) -> None:
        super().check(engine)
        graph = engine.graph
        if self.qk_fix and (graph.mlp == "neuron" or graph.qkv == "merged"):
            found = "mlp='neuron'" if graph.mlp == "neuron" else "qkv='merged'"
            raise UserError(
                f"atp-star's query-key fix runs a layer's attention once for each node and tells values from queries "
                f"and keys; found Graph({found}). Valid: mlp='layer' and qkv='kv_group', or qk_fix=False"
            )

    @property
    def reads_labels(self) -> bool:
        return not self.grad_drop  # which takes magnitudes, prompt by prompt

    def scores(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        self.check(engine)
        drops = [None, *range(engine.model.n_layers)] if self.grad_drop else [None]
        layers = range(engine.model.n_layers if self.qk_fix else 0)
        exact = [i for i, v in enumerate(engine.graph.destinations) if self.qk_fix and v.input in ("q", "k")]
        for part in engine.parts():
            made, slopes = [], []
            for drop in tqdm(drops, desc=self.name, unit="backward", disable=not engine.progress, leave=False):
                grads, of_heads = gradients(part, drop, layers)
                grads[exact] = 0
                made.append(by_node(engine.graph, along_edges(part, grads)))
                slopes.append(of_heads)
            changes = torch.stack(made)
            if self.qk_fix:
                changes += through_attention(part, slopes)
            yield part.index, changes.abs().mean(0) if self.grad_drop else helps(engine, changes[0])


def gradients(part: Part, drop: int | None, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The metric's gradient at every input `[destination batch pos d_model]`, and at what heads mix.

    Args:
        part: prompts of an engine.
        drop: a layer whose attention and MLP pass no gradient on, or None.
        layers: whose heads are asked for, `[batch pos head d_head]` each: the gradient at z.
    """
    model, slopes = part.model, {}

    def keep(layer: int) -> Edit:
        def edit(z: Tensor, rows: Rows) -> Tensor:
            slopes[layer] = torch.zeros_like(z)  # where no gradient comes by, it is zero
            passed = z.view_as(z)  # a hook point may show a view that the model does not go on with unless it is new
            passed.register_hook(lambda gradient: slopes.update({layer: gradient}))
            return passed

        return edit

    edits: dict[str, list[Edit]] = {Site("z", layer).hook_name: [keep(layer)] for layer in layers}
    for name in ("attn_out", "mlp_out"):
        if drop is not None and Site(name, drop) in model.site_list:
            edits[Site(name, drop).hook_name] = [lambda out, rows: out.detach()]
    with Plan(model, edits).installed(Rows(part.engine.base, part.index, part.start)):
        grads, _ = part.gradients()
    # Where query heads have keys of their own, a prompt is run in copies, and each head counts in one of them.
    return grads, [slopes[layer].unflatten(0, (-1, len(part))).sum(0) for layer in layers]


def through_attention(part: Part, slopes: Sequence[Sequence[Tensor]]) -> Tensor:
    """`[backward batch node]` ⟨ΔA V, ∂m/∂z⟩ over the heads of all layers, for the gradients of each backward.

    Args:
        part: prompts of an engine.
        slopes: of every backward, by layer, `[batch pos head d_head]` gradients at z.
    """
    graph = part.graph
    made = part.differences.new_zeros(len(slopes), len(part), graph.n_nodes)
    before = {v.layer: v.n_sources * len(graph.places) for v in graph.destinations if v.input == "q"}
    n = max(1, part.engine.rows_per_call // len(part))
    with tqdm(total=sum(before.values()), desc="query-key fix", disable=not part.engine.progress, leave=False) as bar:
        for layer, n_nodes in before.items():
            slope = torch.stack([one[layer] for one in slopes])
            z, v = mixed(part, layer)
            for nodes in torch.arange(n_nodes).split(n):
                change = mixed(part, layer, difference(part, nodes), v)[0] - z
                made[:, :, nodes] += torch.einsum("nbphd,sbphd->sbn", change, slope)
                bar.update(len(nodes))
    return made


def difference(part: Part, nodes: Tensor) -> Tensor:
    """`[node batch pos d_model]` a_u − s_u of nodes, each at its place."""
    n_places = len(part.graph.places)
    sources, places = nodes // n_places, nodes % n_places
    here = part.engine.place[part.index][:, part.start :] == places[:, None, None]
    delta = part.differences[sources.to(part.differences.device)]
    return delta * here[..., None].to(delta)


class _Shown(Exception):
    """Stops a run at what was asked for."""


@torch.no_grad()
def mixed(part: Part, layer: int, delta: Tensor | None = None, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z `[node batch pos head d_head]`, what a layer's heads mix, and the values that they mix
    `[batch pos kv_head d_head]`.

    Args:
        part: prompts of an engine.
        layer: of the heads.
        delta: `[node batch pos d_model]` added to what queries and keys read; None for the base run, of one node.
        values: of the base run, which are mixed whatever is added.
    """
    nodes, shown = 1 if delta is None else len(delta), {}

    def add(resid: Tensor, rows: Rows) -> Tensor:
        return resid if delta is None else resid + delta.flatten(0, 1)

    def give(v: Tensor, rows: Rows) -> Tensor:
        shown["v"] = v if values is None else values
        return v if values is None else values.repeat(nodes, 1, 1, 1)

    def show(z: Tensor, rows: Rows) -> Tensor:
        shown["z"] = z
        raise _Shown

    rows = Rows(part.engine.base, part.index.to(part.model.device).repeat(nodes), part.start)
    edits = {Site(name, layer).hook_name: edit for name, edit in (("resid_pre", add), ("v", give), ("z", show))}
    with suppress(_Shown):
        part.recording.logits(layer, rows, part.engine.read, edits)
    return shown["z"].unflatten(0, (nodes, len(part))), shown["v"]
