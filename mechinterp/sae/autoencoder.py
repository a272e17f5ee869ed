"""The frame of every sparse autoencoder: its shape, its weights, what it makes of a batch, how scales are folded in.

Each is `x̂ = f(x) W_dec + b_dec` and comes in three shapes, which the code need not tell apart:

- an *autoencoder* reads and reconstructs one site;
- a *transcoder* reads one site and predicts another (`d_out`), optionally with a linear `skip`;
- a *crosscoder* reads and reconstructs several layers at once: they stand side by side in `d_in`, and decoder norms are
  added up over `n_sites`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mechinterp.errors import UserError
from mechinterp.sae import kernels
from mechinterp.sae.config import TOP_K
from mechinterp.sae.kernels import Encoded, Entries, Selection
from mechinterp.sae.metadata import Metadata

NAMES = ("standard", "gated", "jumprelu", *TOP_K)


@dataclass(frozen=True)
class SAEConfig:
    """Shape and kind of an autoencoder.

    Attributes:
        architecture: one of `NAMES`.
        d_in, d_out: width of what is read and reconstructed, over all sites; `d_out` is `d_in` by default.
        d_sae: features.
        k: features a token, of the TopK family.
        skip: a linear map from what is read to what is predicted, beside the features.
        centred: `b_dec` is taken off what is read.
        n_sites: layers of a crosscoder; 1 for the others.
        prefixes: of Matryoshka: numbers of features that reconstruct alone, ascending; the last is `d_sae`.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int | None = None
    d_out: int = 0
    skip: bool = False
    centred: bool = True
    n_sites: int = 1
    prefixes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.d_out:
            object.__setattr__(self, "d_out", self.d_in)
        if self.architecture not in NAMES:
            raise UserError(f"unknown architecture {self.architecture!r}; valid: {', '.join(NAMES)}")
        if min(self.d_in, self.d_sae, self.d_out, self.n_sites) < 1:
            raise UserError(f"sizes of an autoencoder must be at least 1; found {self}")
        family = self.architecture in TOP_K
        if family and (self.k is None or not 1 <= self.k <= self.d_sae):
            raise UserError(f"k must be 1 … d_sae = {self.d_sae} for {self.architecture}; found {self.k}")
        if not family and self.k is not None:
            raise UserError(f"k is for the TopK family; {self.architecture} has a sparsity penalty instead")
        if self.d_in % self.n_sites or self.d_out % self.n_sites:
            raise UserError(f"d_in {self.d_in} and d_out {self.d_out} must be divisible by n_sites {self.n_sites}")
        if self.centred and self.d_in != self.d_out:
            raise UserError(f"b_dec (of {self.d_out}) cannot be taken off an input of {self.d_in}: centred=False")
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        matryoshka = self.architecture == "matryoshka"
        if matryoshka != bool(self.prefixes):
            raise UserError(f"prefixes are for matryoshka, which needs them; found {self.prefixes}")
        if matryoshka and (
            list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[0] < 1 or self.prefixes[-1] != self.d_sae
        ):
            raise UserError(f"prefixes must ascend from at least 1 to d_sae = {self.d_sae}; found {self.prefixes}")


@dataclass(frozen=True, eq=False)
class Codes:
    """Feature activations: values at chosen pairs.

    Attributes:
        values: `[entry]` at `Entries`, or `[batch feature]` at `Everything`.
        selection: which pairs.
    """

    values: Tensor
    selection: Selection

    def dense(self) -> Tensor:
        """`[batch feature]`."""
        return self.selection.dense(self.values)

    def sparse(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, features and rows `[entry]` of what is not 0, in the order of rows."""
        if isinstance(self.selection, Entries):
            on = (self.values != 0).nonzero().flatten()
            return self.values[on], self.selection.index[on], self.selection.rows[on]
        rows, index = self.values.nonzero(as_tuple=True)
        return self.values[rows, index], index, rows

    def l0(self) -> Tensor:
        """Features that are not 0, in all rows together."""
        return (self.values != 0).sum()

    def fired(self) -> Tensor:
        """`[feature]` bool: not 0 in some row."""
        return self.selection.fired(self.values)


@dataclass(frozen=True, eq=False)
class Output:
    """What an autoencoder makes of a batch.

    Attributes:
        reconstruction: `[... d_out]`.
        codes: feature activations of all rows, leading axes flattened.
        shape: the leading axes.
        losses: in training, each term by name; the loss is their sum.
    """

    reconstruction: Tensor
    codes: Codes
    shape: tuple[int, ...]
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def features(self) -> Tensor:
        """`[... feature]`, dense."""
        codes = self.codes.dense()
        return codes.reshape(*self.shape, codes.shape[1])

    @property
    def loss(self) -> Tensor:
        """Sum of the terms."""
        return torch.stack(list(self.losses.values())).sum()


@dataclass(frozen=True, eq=False)
class Objective:
    """What the losses of a step need besides the activations.

    Attributes:
        n: rows of the whole batch, over all processes.
        variance: Σ over the whole batch of ‖y − ȳ‖².
        sparsity: coefficient of the sparsity penalty, as it stands at this step.
        bandwidth: of JumpReLU's straight-through gradient.
        penalty: of JumpReLU: "l0" or "tanh".
        pre_activation: coefficient of JumpReLU's loss of features below their thresholds, with "tanh".
        dead: `[feature]` numbers of dead features; None where they are not revived.
        k_aux: dead features that a token is reconstructed from.
        aux: coefficient of that reconstruction's loss.
        gather: values of this process -> of all; None for one process.
    """

    n: int
    variance: Tensor
    sparsity: float = 0.0
    bandwidth: float = 0.001
    penalty: str = "l0"
    pre_activation: float = 0.0
    dead: Tensor | None = None
    k_aux: int = 0
    aux: float = 0.0
    gather: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, y: Tensor, **more: Any) -> "Objective":
        """Of one process's batch `[batch d_out]`."""
        return cls(n=len(y), variance=(y - y.mean(0)).square().sum(), **more)


class SparseAutoencoder(nn.Module):
    """The frame of every architecture: weights, encoding, decoding.

    `sae(x)` on `[... d_in]` gives an `Output`; with an `objective` its losses, too. Parameters are W_enc
    `[feature d_in]`, b_enc `[feature]`, W_dec `[feature d_out]`, b_dec `[d_out]`, and with `skip` W_skip
    `[d_out d_in]`. (SAELens's W_enc is the transpose of ours, whose rows are what a feature reads.)

    Attributes:
        config: shape and kind.
        metadata: where it belongs.
        decoder_norm: of every decoder row at the start.
        encoder_scale: of encoder rows at the start, which are decoder rows times this.
        unit_norm: whether training holds decoder rows at norm 1.
    """

    decoder_norm: ClassVar[float] = 1.0
    encoder_scale: ClassVar[float] = 1.0
    unit_norm: bool = True
    has_b_enc: ClassVar[bool] = True

    def __init__(self, config: SAEConfig, metadata: Metadata | None = None, seed: int = 0):
        """Decoder rows of random directions, encoder rows along them. A transcoder's decoder begins at 0."""
        super().__init__()
        self.config = config
        self.metadata = metadata or Metadata()
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(config.d_sae, config.d_out, generator=draw)
        rows *= self.decoder_norm / rows.norm(dim=1, keepdim=True)
        if self.transcodes:
            read = torch.randn(config.d_sae, config.d_in, generator=draw)
            self.W_enc = nn.Parameter(read / read.norm(dim=1, keepdim=True))
            self.W_dec = nn.Parameter(torch.zeros_like(rows))
        else:
            self.W_enc = nn.Parameter(self.encoder_scale * rows)
            self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae)) if self.has_b_enc else None
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        self.W_skip = nn.Parameter(torch.zeros(config.d_out, config.d_in)) if config.skip else None

    @property
    def transcodes(self) -> bool:
        """Whether it predicts another site than it reads."""
        return not self.config.centred

    # What it does

    def forward(
        self, x: Tensor, target: Tensor | None = None, objective: Objective | None = None, dense: bool = False
    ) -> Output:
        """Reconstruction and features, and with an objective the losses.

        Args:
            x: `[... d_in]` raw activations.
            target: `[... d_out]` what is to be reconstructed; `x` by default.
            objective: of a training step.
            dense: compute on every pair.

        Raises:
            UserError: activations of another width.
        """
        rows = _rows(x, self.config.d_in, "reads")
        encoded = self.encode_pairs(rows, objective, dense)
        codes = Codes(self.activate(encoded, objective), encoded.selection)
        losses: dict[str, Tensor] = {}
        if objective is None:
            made = self.decode(codes, rows)
        else:
            y = rows if target is None else _rows(target, self.config.d_out, "writes")
            made, losses = self.train_on(rows, y, encoded, codes, objective)
        leading = tuple(x.shape[:-1])
        return Output(made.reshape(*leading, self.config.d_out), codes, leading, losses)

    def encode(self, x: Tensor, dense: bool = False) -> Codes:
        """Feature activations of `[... d_in]`, leading axes flattened."""
        encoded = self.encode_pairs(_rows(x, self.config.d_in, "reads"), None, dense)
        return Codes(self.activate(encoded, None), encoded.selection)

    def decode(self, codes: Codes, x: Tensor) -> Tensor:
        """`[batch d_out]` from features, and from `x` `[batch d_in]` where there is a skip."""
        return self.with_biases(codes.selection.decode(codes.values, self.W_dec), x)

    def with_biases(self, made: Tensor, x: Tensor) -> Tensor:
        """Sums of decoder rows `[batch d_out]` with what is added to them whatever is on: `b_dec`, and the skip."""
        made = made + self.b_dec
        return made if self.W_skip is None else made + x @ self.W_skip.T

    def encode_pairs(self, x: Tensor, objective: Objective | None, dense: bool) -> Encoded:
        """Pre-activations at the pairs that the architecture chooses."""
        centre = self.b_dec if self.config.centred else None
        choose = _all_pairs if dense else lambda pre: self.choose(pre, objective)
        return kernels.encode(x, centre, self.W_enc, self.b_enc, choose, self.watched(objective))

    def watched(self, objective: Objective | None) -> Tensor | None:
        """Features whose pre-activations are wanted for every row; None for none."""
        return None

    def choose(self, pre: Tensor, objective: Objective | None) -> Entries | None:
        """The pairs that may have a value or a gradient; None for all."""
        raise NotImplementedError

    def activate(self, encoded: Encoded, objective: Objective | None) -> Tensor:
        """Feature activations from pre-activations, at the same pairs."""
        raise NotImplementedError

    # How it is trained

    def train_on(
        self, x: Tensor, y: Tensor, encoded: Encoded, codes: Codes, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction and the loss terms by name; the squared error is `mse`, summed over the width."""
        made = self.decode(codes, x)
        losses = {"mse": squared_error(y, made) / objective.n}
        return made, losses | self.penalties(x, y, encoded, codes, objective)

    def penalties(
        self, x: Tensor, y: Tensor, encoded: Encoded, codes: Codes, objective: Objective
    ) -> dict[str, Tensor]:
        """Loss terms besides the squared error."""
        raise NotImplementedError

    def decoder_norms(self) -> Tensor:
        """`[feature]` norm of each decoder row; of a crosscoder added up over its sites (Lindsey et al. 2024)."""
        return self.W_dec.view(self.config.d_sae, self.config.n_sites, -1).norm(dim=-1).sum(-1)

    @torch.no_grad()
    def start_at(self, y: Tensor) -> None:
        """Begin `b_dec` at the geometric median of a sample `[token d_out]`."""
        self.b_dec.copy_(geometric_median(y))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take off the decoder's gradient what would only lengthen its rows."""
        if self.unit_norm and not self.transcodes and self.W_dec.grad is not None:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring decoder rows back to norm 1, where this architecture holds them there."""
        if self.unit_norm and not self.transcodes:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))

    # Scales

    @torch.no_grad()
    def unscaled(self, scale_in: Tensor, scale_out: Tensor) -> None:
        """Fold scales in: what was trained on activations times these factors then reads and writes raw ones.

        Args:
            scale_in, scale_out: `[site]` factors of what is read and of what is reconstructed.

        Features come in the units of what is reconstructed, so that decoder rows keep their norm (a crosscoder's do so
        where its sites share a scale).

        Raises:
            UserError: two scales for an autoencoder that takes `b_dec` off what it reads.
        """
        if self.config.centred and not torch.equal(scale_in, scale_out):
            raise UserError(
                f"a centred autoencoder has one scale a site; found {scale_in.tolist()}, {scale_out.tolist()}"
            )
        unit = scale_out.mean()
        for weight, scale in ((self.W_enc, scale_in / unit), (self.W_skip, scale_in)):
            if weight is not None:
                weight.mul_(scale.repeat_interleave(self.config.d_in // len(scale)))
        wide = scale_out.repeat_interleave(self.config.d_out // len(scale_out))
        self.W_dec.mul_(unit / wide)
        self.b_dec.div_(wide)
        if self.W_skip is not None:
            self.W_skip.div_(wide[:, None])
        self.scale_features(1 / unit)

    def scale_features(self, factor: Tensor) -> None:
        """Multiply what is added to or compared with pre-activations, whose weights were multiplied already."""
        if self.b_enc is not None:
            self.b_enc.mul_(factor)


def _rows(x: Tensor, width: int, does: str) -> Tensor:
    """`[batch d]` of `[... d]`."""
    if x.shape[-1:] != (width,):
        raise UserError(f"the autoencoder {does} {width} dimensions; found activations of shape {tuple(x.shape)}")
    return x.reshape(-1, width)


def squared_error(y: Tensor, made: Tensor) -> Tensor:
    """Σ (y − ŷ)² over all entries, in one pass."""
    return torch.nn.functional.mse_loss(made, y, reduction="sum")


def geometric_median(points: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """`[d]` point of the least mean distance to `[token d]`.

    Weiszfeld's iteration, which would stop at any token that it meets; the step that leaves a token which is not the
    median is Vardi and Zhang's (2000, "The multivariate L1-median and associated data depth").
    """
    at = points.mean(0)
    for _ in range(steps):
        distance = (points - at).norm(dim=1)
        here = distance <= tolerance * distance.mean()
        if here.all():
            break
        weights = (1 / distance).masked_fill(here, 0)
        goal = (weights @ points) / weights.sum()
        pull = (weights.sum() * (goal - at).norm()).clamp_min(torch.finfo(points.dtype).tiny)
        before, at = at, goal + (here.sum() / pull).clamp_max(1) * (at - goal)
        if (at - before).norm() <= tolerance * at.norm():
            break
    return at


def _all_pairs(pre: Tensor) -> None:
    """The dense reference's choice."""
    return None
