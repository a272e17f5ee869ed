"""The architectures: standard, gated, TopK, BatchTopK, JumpReLU and Matryoshka BatchTopK.

They differ in which features they keep, and in the losses that they are trained by. An architecture chooses pairs
(row, feature) and computes on their values alone (kernels.py); with `dense=True` the same lines run on every pair,
which is the reference that the tests compare with.

A loss term is a sum over the rows at hand, divided by the number of rows (or the variance) of the whole batch over all
processes, so that the gradients of processes add up.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from mechinterp.sae import kernels
from mechinterp.sae.autoencoder import Codes, Objective, SAEConfig, SparseAutoencoder, squared_error
from mechinterp.sae.kernels import Encoded, Entries
from mechinterp.sae.metadata import Metadata
from mechinterp.sae.straight_through import JumpReLUFunction, StepFunction


class Standard(SparseAutoencoder):
    """ReLU with an L1 penalty, weighted by decoder norms, which are free.

    Bricken et al. 2023, "Towards Monosemanticity"; the weights by norm from Conerly et al. 2024, "Update on how we
    train SAEs".
    """

    decoder_norm = 0.1
    unit_norm = False

    def choose(self, pre: Tensor, objective: Objective | None) -> Entries | None:
        return kernels.above(pre, pre.new_zeros(()))

    def activate(self, encoded: Encoded, objective: Objective | None) -> Tensor:
        return encoded.values.relu()

    def penalties(
        self, x: Tensor, y: Tensor, encoded: Encoded, codes: Codes, objective: Objective
    ) -> dict[str, Tensor]:
        weighted = codes.values * codes.selection.at(self.decoder_norms())
        return {"l1": objective.sparsity * weighted.sum() / objective.n}


class Gated(SparseAutoencoder):
    """A gate says which features are on, a magnitude how much; both share W_enc.

    gate = pre + b_gate, f = 1[gate > 0] · ReLU(exp(r_mag) · pre + b_mag). The penalty is on ReLU(gate), which must
    also reconstruct by itself (`aux`, with the decoder held still), for the gate gets no gradient from f.

    Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders", equations 3 to 8.
    """

    has_b_enc = False

    def __init__(self, config: SAEConfig, metadata: Metadata | None = None, seed: int = 0):
        super().__init__(config, metadata, seed)
        self.b_gate = nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def choose(self, pre: Tensor, objective: Objective | None) -> Entries | None:
        return kernels.above(pre, -self.b_gate)

    def gate(self, encoded: Encoded) -> Tensor:
        """Values before the step that opens the gate."""
        return encoded.values + encoded.selection.at(self.b_gate)

    def activate(self, encoded: Encoded, objective: Objective | None) -> Tensor:
        at = encoded.selection.at
        magnitude = (at(self.r_mag).exp() * encoded.values + at(self.b_mag)).relu()
        return magnitude * (self.gate(encoded) > 0)

    def penalties(
        self, x: Tensor, y: Tensor, encoded: Encoded, codes: Codes, objective: Objective
    ) -> dict[str, Tensor]:
        gate = self.gate(encoded).relu()
        norms = encoded.selection.at(self.decoder_norms().detach())
        alone = encoded.selection.decode(gate, self.W_dec.detach()) + self.b_dec.detach()
        if self.W_skip is not None:
            alone = alone + x @ self.W_skip.detach().T
        return {
            "l1": objective.sparsity * (gate * norms).sum() / objective.n,
            "aux": squared_error(y, alone) / objective.n,
        }

    def scale_features(self, factor: Tensor) -> None:
        self.b_gate.mul_(factor)
        self.b_mag.mul_(factor)


class TopK(SparseAutoencoder):
    """The k largest pre-activations of each token; no penalty. The squared error is relative to the variance.

    Dead features are revived by `auxk`: the k_aux largest of them reconstruct what the others missed.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders". The encoder begins shorter than there (as it does in
    sparsify): with rows of norm 1 the first reconstructions overshoot, and after a million tokens of SmolLM2 the FVU on
    held-out text is .217, not .205 (norms .15 to .6 are alike).
    """

    encoder_scale = 3**-0.5

    def choose(self, pre: Tensor, objective: Objective | None) -> Entries | None:
        assert self.config.k is not None
        return kernels.top_k(pre, self.config.k)

    def encode_pairs(self, x: Tensor, objective: Objective | None, dense: bool) -> Encoded:
        encoded = super().encode_pairs(x, objective, dense)
        if not dense:
            return encoded
        # The dense reference keeps every pair, at 0 where it was not chosen.
        chosen = self.choose(encoded.pre, objective)
        assert chosen is not None
        kept = chosen.dense(torch.ones(len(chosen.index), device=x.device, dtype=x.dtype))
        return encoded._replace(values=encoded.values * kept)

    def activate(self, encoded: Encoded, objective: Objective | None) -> Tensor:
        return encoded.values.relu()

    def watched(self, objective: Objective | None) -> Tensor | None:
        if objective is None or objective.dead is None or not len(objective.dead) or not objective.k_aux:
            return None
        return objective.dead

    def train_on(
        self, x: Tensor, y: Tensor, encoded: Encoded, codes: Codes, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if encoded.also is None:
            made = self.decode(codes, x)
            return made, {"fvu": squared_error(y, made) / objective.variance}
        assert objective.dead is not None
        dead = _largest(encoded.also, objective.k_aux)
        made, revived = codes.selection.decode_with(codes.values, self.W_dec, objective.dead, dead)
        made = self.with_biases(made, x)
        losses = {"fvu": squared_error(y, made) / objective.variance}
        return made, losses | {"auxk": _auxk(y - made.detach(), revived, objective)}


def _auxk(missed: Tensor, revived: Tensor, objective: Objective) -> Tensor:
    """The loss of what dead features make `[batch d_out]` of what the others missed."""
    return objective.aux * squared_error(missed, revived) / objective.variance


class BatchTopK(TopK):
    """The k · batch largest pre-activations of a batch; a threshold where there is no batch to choose from.

    The threshold is the smallest value that was chosen, averaged over steps: a plain mean at first, so that short runs
    have one, then an exponential one.

    Bussmann et al. 2024, "BatchTopK Sparse Autoencoders".
    """

    threshold: Tensor
    n_updates: Tensor
    DECAY = 0.99

    def __init__(self, config: SAEConfig, metadata: Metadata | None = None, seed: int = 0):
        super().__init__(config, metadata, seed)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.long))

    def choose(self, pre: Tensor, objective: Objective | None) -> Entries | None:
        if objective is None:
            return kernels.all_above(pre, self.threshold.detach())
        assert self.config.k is not None
        entries, smallest = kernels.batch_top_k(
            pre, self.config.k * objective.n, float(self.threshold), objective.gather
        )
        self.n_updates += 1
        share = max(1 / int(self.n_updates), 1 - self.DECAY)
        self.threshold += share * (smallest - self.threshold)
        return entries

    def scale_features(self, factor: Tensor) -> None:
        super().scale_features(factor)
        self.threshold.mul_(factor)


class Matryoshka(BatchTopK):
    """BatchTopK whose first features must reconstruct without the later ones, at every prefix; the mean over them.

    Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders".
    """

    def train_on(
        self, x: Tensor, y: Tensor, encoded: Encoded, codes: Codes, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        spans = [0, *self.config.prefixes]
        # One split, for its gradient is one table; a slice for each prefix would make as many tables of full size.
        parts = self.W_dec.split([high - low for low, high in pairwise(spans)])
        made, errors = self.with_biases(torch.zeros_like(y), x), []
        for rows, (low, high) in zip(parts, pairwise(spans), strict=True):
            values, selection = codes.selection.between(codes.values, low, high)
            made = made + selection.decode(values, rows)
            errors.append(squared_error(y, made) / objective.variance)
        losses = {"fvu": torch.stack(errors).mean()}
        if encoded.also is not None and objective.dead is not None:
            revived = _largest(encoded.also, objective.k_aux) @ self.W_dec.index_select(0, objective.dead)
            losses["auxk"] = _auxk(y - made.detach(), revived, objective)
        return made, losses


class JumpReLU(SparseAutoencoder):
    """A threshold a feature, learnt through a straight-through gradient.

    With the penalty "l0" (Rajamanoharan et al. 2024, "Jumping Ahead", equations 9 to 12): sparsity · L0. With "tanh"
    (Conerly et al. 2025, "Dictionary Learning Optimization Techniques"): sparsity · Σ tanh(4 f ‖d‖), and
    pre_activation · Σ ReLU(θ − pre) ‖d‖, which reaches every feature that is off, so this one is always dense.
    """

    TANH = 4.0

    def __init__(self, config: SAEConfig, metadata: Metadata | None = None, seed: int = 0, threshold: float = 0.001):
        super().__init__(config, metadata, seed)
        self.threshold = nn.Parameter(torch.full((config.d_sae,), float(threshold)))

    def choose(self, pre: Tensor, objective: Objective | None) -> Entries | None:
        if objective is None:
            return kernels.all_above(pre, self.threshold.detach())
        if objective.penalty == "tanh":
            return None
        # Below the threshold a pair still has a gradient within the window, and below 0 none.
        return kernels.above(pre, (self.threshold.detach() - objective.bandwidth / 2).clamp_min(0))

    def activate(self, encoded: Encoded, objective: Objective | None) -> Tensor:
        threshold = encoded.selection.at(self.threshold)
        bandwidth, positive = (1.0, True) if objective is None else (objective.bandwidth, objective.penalty == "l0")
        return JumpReLUFunction.apply(encoded.values, threshold, bandwidth, positive)  # type: ignore[no-any-return]

    def penalties(
        self, x: Tensor, y: Tensor, encoded: Encoded, codes: Codes, objective: Objective
    ) -> dict[str, Tensor]:
        at, n = encoded.selection.at, objective.n
        if objective.penalty == "l0":
            on = StepFunction.apply(encoded.values, at(self.threshold), objective.bandwidth)
            return {"l0": objective.sparsity * on.sum() / n}  # type: ignore[union-attr]
        norms = at(self.decoder_norms())
        below = (at(self.threshold) - encoded.values).relu() * norms
        return {
            "tanh": objective.sparsity * (self.TANH * codes.values * norms).tanh().sum() / n,
            "pre_activation": objective.pre_activation * below.sum() / n,
        }

    def scale_features(self, factor: Tensor) -> None:
        super().scale_features(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def renormalise(self) -> None:
        super().renormalise()
        self.threshold.clamp_(min=0)


ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    "standard": Standard,
    "gated": Gated,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
}


def make(
    config: SAEConfig, metadata: Metadata | None = None, seed: int = 0, threshold: float | None = None
) -> SparseAutoencoder:
    """A fresh autoencoder of the config's architecture; the same seed gives the same weights.

    `threshold` is JumpReLU's at the start.
    """
    if config.architecture == "jumprelu" and threshold is not None:
        return JumpReLU(config, metadata, seed, threshold)
    return ARCHITECTURES[config.architecture](config, metadata, seed)


def _largest(pre: Tensor, k: int) -> Tensor:
    """`[batch n]` pre-activations with all but the k largest positive ones of each row at 0."""
    kept = pre.detach() > 0
    crowded = (torch.count_nonzero(kept, dim=1) > k).nonzero().flatten()
    if len(crowded):
        top = pre.detach()[crowded].topk(k, sorted=False).indices
        kept[crowded] = torch.zeros_like(kept[crowded]).scatter_(1, top, True)
    return pre * kept
