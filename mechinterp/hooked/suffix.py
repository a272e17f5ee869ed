"""The exact suffix run: repeat only what an edit can change.

An edit at layer l leaves everything before block l as it was, and under causal attention everything before its first
position p. So:
1. `record` runs the prompts once, keeps each block's input and arguments and the keys and values, and stops before
   the final norm;
2. `Recording.logits` replays blocks l, l+1, … on the positions from p on, with the recorded keys and values in front,
   for any choice of rows (many edits of one layer in one batch);
3. it unembeds only the positions that are read, and only the token columns that are read.

Each lever is tried on a model before it is used (`probe`): where one does not reproduce the full run, that model loses
the lever, not the answer.
"""

import inspect
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mechinterp.hooked.forward import Bound, Edit, Plan, call_bridge
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site

if TYPE_CHECKING:
    from mechinterp.hooked.model import HookedModel

# Names that transformers gives the arguments of a block whose axes hold positions, and which axis that is.
_POS_DIM = {"position_ids": -1, "cache_position": -1, "position_embeddings": 1}


@dataclass(frozen=True)
class Levers:
    """What holds on a model: replaying blocks, recorded keys and values of the prefix, unembedding single columns."""

    replay: bool
    prefix: bool
    columns: bool


@dataclass(frozen=True)
class Read:
    """Which logits are wanted.

    Attributes:
        positions: `[prompt target]` index into `pos`, padding counted; None for every position.
        columns: `[prompt target column]` token ids, or None for the whole vocabulary.
    """

    positions: Tensor | None = None
    columns: Tensor | None = None

    def of(self, index: Tensor) -> "Read":
        """The same for other rows: `index` `[batch]` of prompts."""
        positions = None if self.positions is None else self.positions[index.to(self.positions.device)]
        columns = None if self.columns is None else self.columns[index.to(self.columns.device)]
        return Read(positions, columns)

    def gather(self, logits: Tensor, start: int = 0) -> Tensor:
        """`[batch target column]` from logits `[batch pos d_vocab]` that begin at position `start`."""
        if self.positions is None:
            return logits
        picked = _at(logits, self.positions.to(logits.device) - start)
        return picked if self.columns is None else picked.gather(-1, self.columns.to(logits.device))


def _at(activation: Tensor, positions: Tensor) -> Tensor:
    """`[batch target d]` from `[batch pos d]` at `positions` `[batch target]`."""
    return activation.gather(1, positions[..., None].expand(-1, -1, activation.shape[-1]))


class _StopBeforeFinalNorm(Exception):
    pass


class _Prefix:
    """A stand-in for transformers' cache: keys and values of the prefix, never changed by a run."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Recorded keys and values `[batch kv_head pos d_head]` followed by the live ones."""
        return torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        """Positions in the prefix."""
        return self.keys.shape[2]


@dataclass
class Recording:
    """A run of some of `prompts` under `bound` interventions, from which suffixes are replayed.

    Attributes:
        index: `[batch]` the prompts that were run, consecutive. Recorded tensors have `batch` for `prompt`.
        arguments: by layer, the block's arguments by name, without the residual stream.
        resid: by layer, `[prompt pos d_model]` input of the block (before interventions there, which are replayed).
        cache: keys and values of all layers; empty where the model keeps none, None without the replay lever.
        activations: the sites that were recorded, by hook name.
    """

    model: "HookedModel"
    prompts: Prompts
    index: Tensor
    bound: Sequence[Bound]
    levers: Levers
    arguments: list[dict[str, Any]]
    resid: list[Tensor]
    cache: DynamicCache | None
    activations: dict[str, Tensor]

    def logits(self, layer: int | Tensor, rows: Rows, read: Read, edits: Mapping[str, Edit]) -> Tensor:
        """Logits of the recorded run with edits at layers ≥ `layer` and positions ≥ `rows.start`.

        Args:
            layer: first block that is run again; or `[batch]` one for each row, ascending: a row joins the run there,
                and an edit sees the rows that have joined.
            rows: which prompts, from which position; needs the `prefix` lever if that is not 0.
            read: what to return, for all prompts; its positions must be ≥ `rows.start`.
            edits: hook name -> function of (activation, rows), applied after the interventions of the recording.

        Returns:
            `[batch target column]`, or `[batch pos d_vocab]` when everything is read.
        """
        plan = Plan.of(self.model, self.bound, edits=edits)
        wanted = read.of(rows.index)
        if not self.levers.replay:
            with plan.installed(rows):
                return wanted.gather(call_bridge(self.model, self.prompts.take(rows.index)))
        joins = [self._restart(int(at)) for at in layer] if isinstance(layer, Tensor) else [self._restart(layer)]
        joins = joins if len(joins) == len(rows.index) else joins * len(rows.index)
        resid = self.resid[joins[0]][:0, rows.start :]
        for block in range(joins[0], self.model.n_layers):
            live = replace(rows, index=rows.index[: bisect_right(joins, block)])
            if len(live.index) > len(resid):
                new = replace(rows, index=live.index[len(resid) :])
                resid = torch.cat([resid, self.local(new).of(self.resid[block], 1)])
            with plan.within(f"blocks.{block}.").installed(live):
                out = self.model.bridge.blocks[block](resid, **self._arguments(block, live))
            resid = out[0] if isinstance(out, tuple) else out
        with plan.installed(rows):
            return self._unembed(resid, wanted, rows.start)

    def _restart(self, layer: int) -> int:
        """Earlier than `layer` where an intervention in force reads earlier what it writes there."""
        end = self.model.n_layers  # the final norm, in no layer, comes after all of them
        crossing = [
            b.reads.layer
            for b in self.bound
            if (b.reads.layer or 0) < layer <= (end if b.writes.layer is None else b.writes.layer)
        ]
        first = min([layer, *[read for read in crossing if read is not None]])
        return first if first == layer else self._restart(first)  # which another one may cross

    def base_logits(self, read: Read, index: Tensor | None = None) -> Tensor:
        """`logits` of the recorded run itself, of the prompts at `index` or all that were recorded: the last block is
        replayed. `read` is for all prompts."""
        rows = self.index if index is None else index.to(self.index.device)
        return self.logits(self.model.n_layers - 1, Rows(self.prompts, rows), read, {})

    def local(self, rows: Rows) -> Rows:
        """The rows counted within what was recorded."""
        return replace(rows, index=rows.index - self.index[0])

    def _arguments(self, layer: int, rows: Rows) -> dict[str, Any]:
        """The block's arguments for these rows and positions."""
        rows, n_recorded, start = self.local(rows), len(self.index), rows.start
        made: dict[str, Any] = {}
        for name, value in self.arguments[layer].items():
            if isinstance(value, DynamicCache):
                made[name] = self._prefix(layer, rows) if start else None
            elif isinstance(value, tuple):
                made[name] = tuple(_narrow(v, name, rows, n_recorded) for v in value)
            else:
                made[name] = _narrow(value, name, rows, n_recorded)
        return made

    def _prefix(self, layer: int, rows: Rows) -> _Prefix:
        assert self.cache is not None
        kept: Any = self.cache.layers[layer]
        keys, values = kept.keys[:, :, : rows.start], kept.values[:, :, : rows.start]
        return _Prefix(keys[rows.index], values[rows.index])

    def _unembed(self, resid: Tensor, read: Read, start: int) -> Tensor:
        bridge = self.model.bridge
        resid = bridge.ln_final(resid)
        if read.positions is not None:
            resid = _at(resid, read.positions.to(resid.device) - start)
        if read.columns is None or not self.levers.columns:
            logits = _soft_cap(self.model, bridge.unembed(resid))
            return logits if read.columns is None else logits.gather(-1, read.columns.to(logits.device))
        head = bridge.unembed.original_component
        columns = read.columns.to(resid.device)
        logits = torch.einsum("btd,btcd->btc", resid, head.weight[columns])
        return _soft_cap(self.model, logits if head.bias is None else logits + head.bias[columns])


def _narrow(value: Any, name: str, rows: Rows, n_recorded: int) -> Any:
    """A block's argument for the rows and positions of a suffix run."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim > 0 and value.shape[0] == n_recorded and name != "cache_position":
        value = value[rows.index]
    if rows.start == 0:
        return value
    if name == "attention_mask" and value.ndim == 4:  # queries are axis −2; keys keep the prefix
        return value[:, :, rows.start :]
    if name in _POS_DIM:
        dim = _POS_DIM[name] % value.ndim
        return value.narrow(dim, rows.start, value.shape[dim] - rows.start)
    return value


def _soft_cap(model: "HookedModel", logits: Tensor) -> Tensor:
    """Gemma-2's final soft-cap, cap · tanh(logits / cap), where the model has one."""
    cap = float(getattr(model.bridge.cfg, "output_logits_soft_cap", 0) or 0)
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def record(
    model: "HookedModel",
    prompts: Prompts,
    sites: Sequence[Site] = (),
    index: Tensor | None = None,
    levers: Levers | None = None,
) -> Recording:
    """Run prompts once under the interventions in force and keep what suffix runs need, and `sites`.

    Args:
        model: the hooked model.
        prompts: all prompts of the analysis.
        sites: resolved sites to keep besides.
        index: `[batch]` consecutive prompts to run now; all by default.
        levers: to use; those that hold on the model by default.
    """
    levers = levers or model.levers
    if any(b.reads.layer is None and b.reads.hook_name != b.writes.hook_name for b in model.in_force):
        levers = Levers(False, False, False)  # what is read at the embeddings must be read again in every run
    prompts = prompts.to(model.device)
    rows = Rows.all(prompts) if index is None else Rows(prompts, index.to(model.device))
    resid: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def keep(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(inspect.signature(block.original_component.forward).bind(*args, **kwargs).arguments)  # type: ignore[union-attr]
        named |= named.pop("kwargs", {})
        resid.append(named.pop("hidden_states"))
        arguments.append(named)

    def stop(*_: Any) -> None:
        raise _StopBeforeFinalNorm

    cache = DynamicCache() if levers.replay else None
    kept: dict[str, Tensor] = {}
    plan = Plan.of(model, model.in_force, sites, kept)
    handles = []
    try:
        if levers.replay:
            handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in model.bridge.blocks]
            handles.append(model.bridge.ln_final.register_forward_pre_hook(stop))
        with plan.installed(rows):
            call_bridge(model, prompts.take(rows.index), cache)
    except _StopBeforeFinalNorm:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return Recording(model, prompts, rows.index, model.in_force, levers, arguments, resid, cache, kept)


def probe(model: "HookedModel") -> Levers:
    """Try each lever against the full run on a few random tokens, padded, and keep those that reproduce it."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.d_vocab, (2, 7), generator=draw).tolist()
    prompts = Prompts.from_lists([ids[0], ids[1][:5]], model.pad_token).to(model.device)
    in_force, model.in_force = model.in_force, []
    try:
        full = call_bridge(model, prompts)
        last = Read(torch.full((2, 1), prompts.n_pos - 1))
        expected = last.gather(full)
        columns = torch.randint(0, model.d_vocab, (2, 1, 3), generator=draw)

        def holds(levers: Levers, start: int, read: Read) -> bool:
            try:
                recording = record(model, prompts, levers=levers)
                rows = replace(Rows.all(prompts), start=start)
                got = recording.logits(model.n_layers // 2, rows, read, {})
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return False  # an architecture that is built in another way: no lever
            want = expected if read.columns is None else expected.gather(-1, columns.to(expected.device))
            scale = float(full.abs().max()) or 1.0
            return got.shape == want.shape and bool((got - want).abs().max() <= _tolerance(model) * scale)

        replay = holds(Levers(True, False, False), 0, last)
        return Levers(
            replay=replay,
            prefix=replay and holds(Levers(True, True, False), 3, last),
            columns=replay and holds(Levers(True, False, True), 0, Read(last.positions, columns)),
        )
    finally:
        model.in_force = in_force


def _tolerance(model: "HookedModel") -> float:
    """Relative difference that only the order of additions explains."""
    return 1e-4 if model.dtype == torch.float32 else 3e-2
