"""The runs of attribution to features (attribution.py): both sides recorded, features, gradients at written sites."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked import forward, schedule, suffix
from mechinterp.hooked.forward import Bound
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Positions, Prompts
from mechinterp.hooked.suffix import Levers, Read, Recording
from mechinterp.metrics import Metric, as_metric
from mechinterp.sae.autoencoder import Codes, SparseAutoencoder
from mechinterp.sae.kernels import Entries
from mechinterp.sae.splicing.effects import ERROR
from mechinterp.sae.splicing.splice import Splice, frozen, kept_positions
from mechinterp.tasks.pairs import PromptPairs


@dataclass
class SplicedRun:
    """What is attributed, and how.

    Attributes:
        base, source: prompts of the run that is changed, and of the run that values come from.
        splices: of every autoencoder, with its error; `bound` to the model.
        chosen: `[prompt pos]` bool, where features change.
        ends: `[2 prompt]` metric of the base and the source run, filled as parts are recorded.
    """

    model: HookedModel
    pairs: PromptPairs
    metric: Metric
    read: Read
    base: Prompts
    source: Prompts
    splices: list[Splice]
    bound: list[Bound]
    chosen: Tensor
    direction: str
    positions: Positions
    ends: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ends = torch.full((2, len(self.pairs)), torch.nan)

    @classmethod
    def of(
        cls,
        model: HookedModel,
        task: PromptPairs,
        sae: SparseAutoencoder | Sequence[SparseAutoencoder],
        metric: Metric | str | None,
        positions: Positions,
        direction: str,
    ) -> "SplicedRun":
        """Checked. Raises UserError; see `attribute`."""
        if direction not in ("noise", "denoise"):
            raise UserError(f"unknown direction {direction!r}; valid: 'noise', 'denoise'")
        saes = [sae] if isinstance(sae, SparseAutoencoder) else list(sae)
        metric = as_metric(metric)
        pairs = metric.prepare(task)
        read = metric.read(pairs)
        if read.positions is None or metric.name == "rank":
            raise UserError(f"attribution needs a metric of the task's positions with a gradient; found {metric.name}")
        if not all(one.intervention.folds for one in model.in_force):
            raise UserError("a function of the whole batch is in force; attribution runs some prompts at a time")
        splices = [Splice(one) for one in saes]
        bound = forward.bind(model, splices)
        written = [one.writes.hook_name for one in bound]
        if not saes or len(set(written)) < len(written):
            raise UserError(
                f"autoencoders at different sites are needed, at least one; found: {', '.join(written) or 'none'}"
            )
        base, source = (side.to(model.device) for side in (pairs.clean, pairs.corrupted))
        if direction == "denoise":
            base, source = source, base
        chosen = _chosen(pairs, positions).to(model.device) & base.real
        return cls(model, pairs, metric, read, base, source, splices, bound, chosen, direction, positions)

    @property
    def levers(self) -> Levers | None:
        """Embeddings lie before the blocks that can be replayed."""
        inside = all(site.layer is not None for one in self.bound for site in (one.reads, one.writes))
        return None if inside else Levers(False, False, False)

    def parts(self) -> Iterator["Part"]:
        """All prompts, some at a time, recorded; their ends are known afterwards."""
        for index in torch.arange(len(self.pairs)).split(self._rows_per_call):
            yield Part(self, index)

    @property
    def _rows_per_call(self) -> int:
        """Prompts of which a forward and backward fit into a quarter of the free memory."""
        model, n_pos = self.model, self.base.n_pos
        config = model.bridge.cfg
        layer = 20 * model.d_model + 6 * (getattr(config, "d_mlp", None) or 0) + 3 * model.n_heads * n_pos
        vocab = 0 if self.read.columns is not None else 4 * model.d_vocab // n_pos
        wide = 2 * 4 * max(one.sae.config.d_sae for one in self.splices)
        per_prompt = n_pos * (model.dtype.itemsize * (model.n_layers * layer + vocab) + wide)
        best = schedule.max_tokens(model, n_pos, self.read.columns is None) // n_pos
        return max(1, min(best, schedule.free_bytes(model) // 4 // per_prompt))

    def values(self, logits: Tensor, index: Tensor, clean: Tensor | None) -> Tensor:
        """`[batch]` metric, on the CPU."""
        return self.metric(logits.cpu(), self.pairs.answers.take(index), clean)


def _chosen(pairs: PromptPairs, positions: Positions) -> Tensor:
    """`[prompt pos]` bool; of an answer that teacher forcing appended nothing is chosen."""
    chosen = pairs.clean.select(positions)
    if pairs.appended is None:
        return chosen
    if positions is not None and not isinstance(positions, str):
        raise UserError("positions of prompts with answers of several tokens must be roles, or None for all")
    return chosen & (torch.arange(pairs.clean.n_pos) < (pairs.clean.n_pos - pairs.appended)[:, None])


class Part:
    """Some prompts of a run, recorded on both sides without splices."""

    def __init__(self, run: SplicedRun, index: Tensor):
        self.run, self.index = run, index
        sites = list(dict.fromkeys(site for one in run.bound for site in (one.reads, one.writes)))
        with torch.no_grad():
            self.base, self.source = (
                suffix.record(run.model, prompts, sites, index, run.levers) for prompts in (run.base, run.source)
            )
            logits = [one.base_logits(run.read).cpu() for one in (self.base, self.source)]
        self.clean = logits[0 if run.direction == "noise" else 1] if run.metric.needs_clean else None
        for number, one in enumerate(logits):
            run.ends[number, index] = run.values(one, index, self.clean).float()
        self.chosen = run.chosen[self.base.index]
        self._grads: dict[int, Tensor] | None = None

    def _rows(self, recording: Recording) -> Rows:
        return Rows(recording.prompts, recording.index)

    def mask(self, number: int) -> Tensor:
        """`[batch pos]` bool: chosen positions that are spliced in both runs."""
        exclusion = self.run.splices[number].exclusion
        kept = [kept_positions(exclusion, self._rows(one)) for one in (self.base, self.source)]
        return self.chosen & kept[0] & kept[1]

    def written(self, recording: Recording, number: int) -> Tensor:
        """`[batch pos d_out]` activation of the written site, heads side by side."""
        return recording.activations[self.run.bound[number].writes.hook_name].flatten(2)

    def codes(self, recording: Recording, number: int, mask: Tensor) -> Codes:
        """Features at the positions of a mask `[batch pos]`, `[token feature]`."""
        x = recording.activations[self.run.bound[number].reads.hook_name].flatten(2)[mask]
        with torch.no_grad():
            sae = self.run.splices[number].sae
            return frozen(sae, x.to(sae.W_enc)).codes

    def tokens(self, number: int, steps: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Of the source and the base run, and of the error: prompts `[entry]`, and features and effects `[entry]`."""
        sae = self.run.splices[number].sae
        weight, mask = sae.W_dec.detach(), self.mask(number)
        g = self.gradient(number, steps).flatten(2).to(weight)
        block = self.base.index[:, None].expand_as(mask)[mask]
        rest = (self.written(self.source, number) - self.written(self.base, number)).to(weight)
        for recording, sign in ((self.source, 1.0), (self.base, -1.0)):
            codes = self.codes(recording, number, mask)
            with torch.no_grad():
                rest[mask] -= sign * codes.selection.decode(codes.values, weight)
            values, feature, row = codes.sparse()
            pairs = Entries.of_flat(row * sae.config.d_sae + feature, len(block), sae.config.d_sae)
            slope = pairs.products(weight, g[mask]).double()
            yield block[row], (feature, sign * values.double() * slope)
        missed = ((g.double() * rest.double()).sum(-1) * self.chosen).sum(-1)
        yield self.base.index, (torch.full_like(self.base.index, ERROR), missed)

    def gradient(self, number: int, steps: int) -> Tensor:
        """Of the metric at a written site: at the base run, or on average on the way to the source run."""
        if steps == 1:
            if self._grads is None:
                self._grads = self._taps(range(len(self.run.bound)))
            return self._grads[number]
        hook = self.run.bound[number].writes.hook_name
        whole = self.source.activations[hook] - self.base.activations[hook]
        whole = whole * self.chosen.reshape(*self.chosen.shape, *[1] * (whole.ndim - 2))
        shares = [(step + 0.5) / steps for step in range(steps)]
        return torch.stack([self._taps([number], share * whole)[number] for share in shares]).mean(0)

    def _taps(self, numbers: Sequence[int], move: Tensor | None = None) -> dict[int, Tensor]:
        """Gradients at written sites by number, these splices in force; `move` is added to the one site first."""
        run = self.run
        hooks = {number: run.bound[number].writes.hook_name for number in numbers}
        leaves = {number: torch.zeros_like(self.base.activations[hook]) for number, hook in hooks.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        edits = {hook: partial(_tap, leaves[number], move) for number, hook in hooks.items()}
        with torch.enable_grad():
            logits = suffix_logits(self.base, [run.bound[number] for number in numbers], run.read, edits)
            value = run.values(logits, self.index, self.clean).sum()
            grads = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))


def _tap(leaf: Tensor, move: Tensor | None, activation: Tensor, rows: Rows) -> Tensor:
    return activation + leaf if move is None else activation + move.to(activation) + leaf


def suffix_logits(
    recording: Recording, bound: Sequence[Bound], read: Read, edits: Mapping[str, forward.Edit]
) -> Tensor:
    """Of the recorded run with more interventions in force, from the first site that they read."""
    more = replace(recording, bound=[*recording.bound, *bound])
    first = min((one.reads.layer or 0 for one in bound), default=0)
    return more.logits(first, Rows(recording.prompts, recording.index), read, edits)
