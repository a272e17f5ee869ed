"""What a planted model publishes: its true circuit, edge by edge and by type.

The effect of an edge is that of a patch of one source's contribution to one destination's input, at all positions,
everything behind it live; the metric is the logit difference of answer and wrong answer. *Noising* puts the corrupted
run's contribution into the clean run, *denoising* the clean one into the corrupted run. On every pair of the model's
task (`mechinterp.tasks.planted`):

1. a serial edge has an effect in both directions: it is needed, and it carries all that differs;
2. an AND edge has one when noising and none when denoising: it is needed, and so is another edge beside it;
3. an OR edge has one when denoising and none when noising: it suffices, and so does another edge beside it;
4. every other edge has none in either direction.

An edge has the type that its own patch shows: what lies upstream of one input of an AND (OR) gate only is AND (OR) too;
what lies upstream of all inputs of a gate, or behind it, is serial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PlantedCircuit:
    """The true circuit of a planted model.

    Edges are `source->destination<input>`. Heads are `a{layer}.h{head}`, MLPs `m{layer}`, the ends `embed` and
    `logits`. A head's inputs are `<q>`, `<k>`, `<v>`; under grouped-query attention keys and values belong to the
    group: `a{layer}.kv{group}<k>`. MLPs and logits have one input and no name for it.

    Attributes:
        heads: (layer, head) of every head that the answer needs or may come from.
        serial, and_edges, or_edges: the edges that carry what differs between the prompts of a pair, by type.
        constant_edges: edges that carry words which are the same in both prompts. They are needed, but patching between
            the prompts cannot see them; taking their contribution out can.
        positional_edges: edges that carry only positions, likewise the same in both: they say where to look, or where
            to rest if nothing is found.
    """

    heads: tuple[tuple[int, int], ...]
    serial: tuple[str, ...] = ()
    and_edges: tuple[str, ...] = ()
    or_edges: tuple[str, ...] = ()
    constant_edges: tuple[str, ...] = ()
    positional_edges: tuple[str, ...] = ()

    @property
    def edges(self) -> tuple[str, ...]:
        """All that patching between the prompts of a pair can find: serial, AND and OR."""
        return (*self.serial, *self.and_edges, *self.or_edges)


@dataclass(frozen=True)
class Planted:
    """An entry of the registry: one line of description, how to build the model, and its true circuit."""

    description: str
    build: Callable[[], tuple[TransformerBridge, PreTrainedTokenizerFast]]
    circuit: PlantedCircuit
