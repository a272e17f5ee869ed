"""The residual stream of every layer, read through the model's own end: final norm, unembedding, final soft-cap.

1. One run, under the interventions in force, keeps the input of every block and the output of the last one, as the
   interventions leave them. Row l is what block l reads; row n_layers is what the final norm reads.
2. A row goes through the final norm (with what is in force there), the unembedding and the soft-cap at the positions
   that are asked for, and nowhere else: the last row is the model's own output on every family.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked import suffix, weights
from mechinterp.hooked.forward import Plan
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Read, Recording
from mechinterp.lens.tuned_lens import TunedLens

BYTES = {"cpu": 64_000_000, "cuda": 1_000_000_000}  # of logits that are held at once, of one side


@dataclass(eq=False)
class Streams:
    """Residual streams of one run.

    Attributes:
        recording: of the run.
        resid: by layer 0 … n_layers, `[batch pos d_model]`.
    """

    recording: Recording
    resid: list[Tensor]
    _room: Tensor | None = field(default=None, repr=False)

    @classmethod
    def record(cls, model: HookedModel, prompts: Prompts, index: Tensor | None = None) -> "Streams":
        """Run the prompts at `index` (consecutive; all by default).

        Raises:
            UserError: the model's output is no unembedding of its last residual stream, or something in force carries
                a value from an earlier site to the scale of the final norm.
        """
        carried = [b for b in model.in_force if b.writes.name == "ln_final_scale" and b.reads != b.writes]
        if carried:
            raise UserError(f"a lens cannot decode while {carried[0].reads} is written to {carried[0].writes}")
        last = Site("resid_post", model.n_layers - 1)
        sites = [*(Site("resid_pre", layer) for layer in range(model.n_layers)), last]
        recording = suffix.record(model, prompts, sites, index)
        made = cls(recording, [recording.activations[site.hook_name] for site in sites])
        if not recording.levers.replay:
            made._require_own_output(prompts)
        return made

    def translated(self, lens: TunedLens) -> "Streams":
        """The same run, every row but the last brought to the basis of the last."""
        resid = [lens.translate(layer, resid) for layer, resid in enumerate(self.resid)]
        return Streams(self.recording, resid)

    def logits(self, layers: Sequence[int], positions: Tensor) -> Tensor:
        """`[layer batch spot d_vocab]`, float32, of some rows at `positions` `[batch spot]`, padding counted.

        They lie in memory that the next call of these streams writes to.
        """
        recording, model = self.recording, self.recording.model
        at = positions.to(self.resid[0].device)[..., None].expand(-1, -1, model.d_model)
        with Plan.of(model, model.in_force).within("ln_final.").installed(Rows(recording.prompts, recording.index)):
            normed = torch.stack([model.bridge.ln_final(self.resid[layer]).gather(1, at) for layer in layers])
        matrix, bias = weights.unembedding(model)
        rows = normed.flatten(0, -2)
        if self._room is None or len(self._room) < len(rows):
            # Memory that is asked for anew each time costs more than the passes over it (measured on SmolLM2-135M).
            self._room = rows.new_empty(len(rows), model.d_vocab)
        logits = torch.addmm(bias, rows, matrix, out=self._room[: len(rows)])
        return suffix._soft_cap(model, logits).float().unflatten(0, normed.shape[:-1])

    def _require_own_output(self, prompts: Prompts) -> None:
        """Where no replay was tried on the model, nothing has shown yet that its output is what the lens computes."""
        recording = self.recording
        ends = torch.full((len(prompts), 1), prompts.n_pos - 1)
        own = recording.base_logits(Read(ends)).float()
        ours = self.logits([recording.model.n_layers], ends[recording.index.cpu()])[0]
        gap = float((ours - own).abs().max()) / max(1.0, float(own.abs().max()))
        if not gap <= suffix._tolerance(recording.model):
            raise UserError(
                f"{recording.model.info.name} has no logit lens: norm and unembedding of its last residual stream miss "
                f"its output by {gap:.1e} of its size"
            )


def unembedded(model: HookedModel, resid: Tensor, columns: Tensor | None = None) -> Tensor:
    """`[row column]`, float32, of residual streams `[row d_model]` of no run: final norm, unembedding, soft-cap.

    `columns` are the token ids that are wanted; all by default. Gradients pass.
    """
    matrix, bias = weights.unembedding(model)
    normed = model.bridge.ln_final(resid[None].to(model.dtype))[0]
    if columns is not None:
        matrix, bias = matrix.T[columns].T, bias[columns]
    return suffix._soft_cap(model, torch.addmm(bias, normed, matrix)).float()


def rows_at_once(model: HookedModel) -> int:
    """Rows of logits that take `BYTES`."""
    return max(1, BYTES.get(model.device.type, BYTES["cuda"]) // (4 * model.d_vocab))


def slices(model: HookedModel, batch: int, n_spots: int) -> Iterator[slice]:
    """Spots to decode at once, in equal parts: as many as `rows_at_once` allows for `batch` prompts, one at least."""
    n_parts = -(-n_spots // max(1, rows_at_once(model) // batch))
    width = -(-n_spots // n_parts)
    yield from (slice(start, start + width) for start in range(0, n_spots, width))


def groups(model: HookedModel, n_rows: int) -> Iterator[list[int]]:
    """Layers to decode at once, from the last to the first: one where each has many rows, many where each has few.

    The unembedding is read from memory once a call: for a few rows that is most of the work.
    """
    size = max(1, rows_at_once(model) // n_rows)
    layers = list(range(model.n_layers, -1, -1))
    yield from (layers[start : start + size] for start in range(0, len(layers), size))
