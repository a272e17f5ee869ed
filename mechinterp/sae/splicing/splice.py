"""A sparse autoencoder inside the model: a site's activation becomes its reconstruction, and features can be edited.

1. The activation at the site that is read is encoded, chosen features are edited, and the result is decoded. A site
   with heads is read with its heads side by side.
2. With `error=True` what the autoencoder misses is added back, without a gradient: y + (ŷ_edited − ŷ). Where no feature
   is edited nothing changes, bit for bit, and gradients flow through the features alone (Marks et al. 2024).
3. A transcoder reads one site and writes another: what it misses is taken at the site that is written.
4. Excluded positions (exclusion.py) keep their activation, bit for bit: the autoencoder never saw their like. Outliers
   by norm are spliced like all others, for a single run has no median to judge them by.

Marks et al. 2024, "Sparse Feature Circuits: Discovering and Editing Interpretable Causal Graphs in Language Models".
"""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.func import functional_call

from mechinterp.errors import UserError
from mechinterp.hooked.interventions import Intervention, Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Positions
from mechinterp.hooked.sites import Site
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.autoencoder import Codes, Output, SparseAutoencoder
from mechinterp.sae.kernels import Entries

ALIASES = {"gpt2-small": "gpt2"}  # what TransformerLens and SAELens call models whose own name is another
PAIRS = 2**26  # (token, feature) pairs that are encoded at once: 256 MB in single precision
Values = Mapping[int, float | Tensor]


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """A feature becomes `factor` times its own activation plus `shift`: a number, or `[prompt pos]` of them."""

    feature: int
    factor: float
    shift: float | Tensor


@dataclass(frozen=True, eq=False, init=False)
class Splice(Intervention):
    """A site's activation, reconstructed by a sparse autoencoder from its (edited) features.

    The autoencoder's weights get no gradient, so that a splice in force costs no graph; activations do.

    Attributes:
        sae: the autoencoder (or transcoder).
        error: what it misses is added back.
        edits: of features.
        exclusion: positions that keep their activation.
    """

    sae: SparseAutoencoder
    error: bool
    edits: tuple[FeatureEdit, ...]
    exclusion: Exclusion

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        error: bool = True,
        site: Site | None = None,
        writes: Site | None = None,
        ablate: SupportsIndex | Iterable[SupportsIndex] = (),
        set: Values | None = None,
        scale: Mapping[int, float] | None = None,
        add: Values | None = None,
        exclusion: Exclusion | None = None,
        positions: Positions = None,
        noop_ok: bool = False,
    ):
        """Say where, and what becomes of features.

        Args:
            sae: the autoencoder.
            error: add back what it misses; without feature edits this changes nothing (`noop_ok` is implied).
            site: that is read; by default the one in the metadata, and then the model must be the one there, too.
            writes: that is written; by default the one in the metadata, or `site`.
            ablate: features that are set to 0.
            set: feature -> its value, or `[prompt pos]` of them for the prompts of the run.
            scale: feature -> factor.
            add: feature -> what is added to it, also where it is off: steering along its decoder row.
            exclusion: positions that are not spliced; by default those of the metadata.
            positions: where in the sequence; see `Prompts.select`.
            noop_ok: do not raise when no element changed, as when none of the edited features is on.

        Raises:
            UserError: a crosscoder; no site; a feature that does not exist or is edited twice; a value not finite.
        """
        if sae.config.n_sites > 1 or len(sae.metadata.reads) > 1:
            raise UserError(
                f"a crosscoder of {max(sae.config.n_sites, len(sae.metadata.reads))} sites cannot be spliced: its "
                "reconstruction of one layer reads later ones. Valid: autoencoders and transcoders, of one site each"
            )
        reads, written = _sites(sae, site, writes)
        made = {
            "site": reads,
            "positions": positions,
            "sae": sae,
            "error": error,
            "edits": _edits(sae.config.d_sae, ablate, set or {}, scale or {}, add or {}),
            "exclusion": sae.metadata.exclusion if exclusion is None else exclusion,
            "_written": written,
            "_elsewhere": site is not None,
        }
        made["noop_ok"] = noop_ok or (error and not made["edits"])
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def writes(self) -> Site:
        return self._written  # type: ignore[attr-defined]

    def require(self, model: HookedModel) -> None:
        """Raise UserError for another model than the metadata's (unless the site was given), or sites of another
        width."""
        if not self._elsewhere:  # type: ignore[attr-defined]
            require_model(self.sae, model)
        for site, width, does in (
            (self.site, self.sae.config.d_in, "reads"),
            (self.writes, self.sae.config.d_out, "writes"),
        ):
            found = max(1, model.axis_size(site)) * model.width(model.resolve(site))
            if found != width:
                raise UserError(
                    f"the autoencoder {does} {width} dimensions, but {site} of {model.info.name} has {found}"
                )

    def new_value(self, activation: Tensor, state: object, rows: Rows) -> Tensor:
        """`[batch pos d_out]` the reconstruction; with the error term, how far edits move it."""
        x = activation.flatten(2)
        flat = x.reshape(-1, x.shape[-1]).to(self.sae.W_enc)
        shifts = torch.stack([self._shift(edit, rows, flat) for edit in self.edits], 1) if self.edits else flat[:, :0]
        n = max(1, PAIRS // self.sae.config.d_sae)
        parts = [self._value(*part) for part in zip(flat.split(n), shifts.split(n), strict=True)]
        return torch.cat(parts).unflatten(0, x.shape[:2])

    def at_write(self, value: Tensor, activation: Tensor, rows: Rows) -> Tensor:
        """With what is missed, and the live activation where positions are excluded."""
        value = value.reshape(activation.shape)
        if self.error:
            value = activation.detach() + value  # in the wider of the two types
        kept = kept_positions(self.exclusion, rows).to(activation.device)
        shape = (*kept.shape, *[1] * (activation.ndim - 2))
        return torch.where(kept.reshape(shape), value.to(activation), activation)

    def _value(self, x: Tensor, shifts: Tensor) -> Tensor:
        """`[token d_out]` from `[token d_in]` and the edits' shifts `[token edit]`."""
        output = frozen(self.sae, x)
        made = edited = output.reconstruction
        if self.edits:
            features = torch.tensor([edit.feature for edit in self.edits], device=x.device)
            factors = torch.tensor([edit.factor for edit in self.edits], device=x.device, dtype=x.dtype)
            old = columns(output.codes, features)
            edited = made + (old * factors + shifts - old) @ self.sae.W_dec.detach()[features]
        # The difference is exactly 0 where nothing was edited, and has the gradient of the features all the same.
        return edited - made.detach() if self.error else edited

    def _shift(self, edit: FeatureEdit, rows: Rows, like: Tensor) -> Tensor:
        """`[token]`."""
        if not isinstance(edit.shift, Tensor):
            return like.new_full((len(like),), edit.shift)
        expected = tuple(rows.prompts.tokens.shape)
        if tuple(edit.shift.shape) != expected:
            raise UserError(
                f"values of feature {edit.feature} have shape {tuple(edit.shift.shape)}; the run needs {expected}, "
                "axes prompt pos"
            )
        return rows.of(edit.shift, 1).flatten().to(like)


def frozen(sae: SparseAutoencoder, x: Tensor) -> Output:
    """`sae(x)` without a gradient for its weights; `x` has one where it needs it."""
    weights = {name: weight.detach() for name, weight in sae.named_parameters()}
    return functional_call(sae, weights, (x,))  # type: ignore[no-any-return]


def columns(codes: Codes, features: Tensor) -> Tensor:
    """`[batch n]` activations of n features, of which nothing `[batch feature]` is made where codes are sparse."""
    selection = codes.selection
    if not isinstance(selection, Entries):
        return codes.values.index_select(1, features)
    place = torch.full((selection.n_features,), -1, device=features.device)
    place[features] = torch.arange(len(features), device=features.device)
    found = place[selection.index]
    here = (found >= 0).nonzero().flatten()
    made = codes.values.new_zeros(len(selection.offsets), len(features))
    return made.index_put((selection.rows[here], found[here]), codes.values[here])


def kept_positions(exclusion: Exclusion, rows: Rows) -> Tensor:
    """`[batch pos]` bool: which positions of a forward pass are not excluded."""
    prompts = rows.prompts.take(rows.index.to(rows.prompts.tokens.device))
    return exclusion.mask(prompts.tokens, prompts.real)[:, rows.start :]


def require_model(sae: SparseAutoencoder, model: HookedModel) -> None:
    """Raise UserError if the metadata name another model, and its weights are not this one's either.

    Names are compared without their owner, for the same weights go by a hub name and by a folder's; weights in another
    dtype are another hash, so a name that fits is enough.
    """
    meta = sae.metadata
    ours, theirs = (_plain_name(name) for name in (model.info.name, meta.model))
    if not theirs or ours == theirs or (meta.weights_hash and meta.weights_hash == model.weights_hash()):
        return
    raise UserError(
        f"the autoencoder was trained on {meta.model}; the model here is {model.info.name}. Valid: that model, "
        "or in Python a Splice that says where, with site=Site(…)"
    )


def _plain_name(model: str) -> str:
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return ALIASES.get(name, name)


def _sites(sae: SparseAutoencoder, site: Site | None, writes: Site | None) -> tuple[Site, Site]:
    """The sites that are read and written."""
    meta = sae.metadata
    apart = bool(meta.writes) and meta.writes != meta.reads
    if site is None:
        reads = meta.site()
        written = writes or (meta.site(writes=True) if apart else reads)
    elif writes is None and (apart or sae.config.d_in != sae.config.d_out):
        raise UserError(f"a transcoder reads one site and writes another: site={site} was given without writes=")
    else:
        reads, written = site, writes or site
    for one in (reads, written):
        if one.kind.axes[:2] != ("batch", "pos") or one.kind.axes[-1] == "one":
            raise UserError(
                f"nothing can be spliced at {one}, of axes {' '.join(one.kind.axes)}: batch pos … d are needed"
            )
        if one != one.whole or one.basis is not None:
            raise UserError(f"an autoencoder is spliced at all of a site: {one.whole} instead of {one}")
    return reads, written


def _edits(
    d_sae: int, ablate: SupportsIndex | Iterable[SupportsIndex], set: Values, scale: Mapping[int, float], add: Values
) -> tuple[FeatureEdit, ...]:
    """All edits as factor and shift, in the order of their features."""
    ablated = ablate if isinstance(ablate, Iterable) else [ablate]
    edits = [FeatureEdit(operator.index(feature), 0.0, 0.0) for feature in ablated]
    edits += [FeatureEdit(operator.index(feature), 0.0, value) for feature, value in set.items()]
    edits += [FeatureEdit(operator.index(feature), factor, 0.0) for feature, factor in scale.items()]
    edits += [FeatureEdit(operator.index(feature), 1.0, value) for feature, value in add.items()]
    seen: dict[int, FeatureEdit] = {}
    for edit in edits:
        if not 0 <= edit.feature < d_sae:
            raise UserError(f"feature {edit.feature} was to be edited; features are 0 … {d_sae - 1}")
        if edit.feature in seen:
            raise UserError(f"feature {edit.feature} is edited twice; give it to one of ablate, set, scale and add")
        shift = edit.shift
        finite = bool(shift.isfinite().all()) if isinstance(shift, Tensor) else math.isfinite(shift)
        if not (finite and math.isfinite(edit.factor)):
            raise UserError(f"the edit of feature {edit.feature} is not finite")
        seen[edit.feature] = edit
    return tuple(seen[feature] for feature in sorted(seen))
