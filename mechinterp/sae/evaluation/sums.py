"""Sums over the tokens of each block that an evaluation of a sparse autoencoder is made of (evaluate.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.hooked.forward import Edit, Plan, call_bridge
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.hooked.suffix import Levers, Read, Recording
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.splicing.splice import PAIRS, Splice, frozen, kept_positions, require_model

OUTLIER = 10.0  # multiple of the median norm above which a token is counted as an outlier
ARMS = ("spliced", "zero", "mean")


@dataclass(frozen=True)
class Places:
    """Where an autoencoder reads and writes.

    Attributes:
        reads, writes: resolved sites; several of a crosscoder.
        sae: whose exclusion rule says which positions are kept.
    """

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    sae: SparseAutoencoder

    @classmethod
    def of(cls, model: HookedModel, sae: SparseAutoencoder) -> "Places":
        """From the metadata. Raises UserError unless they fit the model."""
        meta = sae.metadata
        if sae.config.n_sites == 1:
            splice = Splice(sae)
            splice.require(model)
            return cls((model.resolve(splice.reads),), (model.resolve(splice.writes, write=True),), sae)
        require_model(sae, model)
        reads = tuple(model.resolve(Site.from_hook(name)) for name in meta.reads)
        writes = tuple(model.resolve(Site.from_hook(name)) for name in meta.writes or meta.reads)
        for sites, width in ((reads, sae.config.d_in), (writes, sae.config.d_out)):
            found = sum(max(1, model.axis_size(site)) * model.width(site) for site in sites)
            if len(sites) != sae.config.n_sites or found != width:
                raise UserError(
                    f"the crosscoder has {sae.config.n_sites} sites of {width} dimensions together; those of "
                    f"{model.info.name} that it names are {len(sites)} of {found}"
                )
        return cls(reads, writes, sae)

    @property
    def spliceable(self) -> bool:
        """A crosscoder is not."""
        return len(self.writes) == 1

    @property
    def sites(self) -> list[Site]:
        """All, each once."""
        return list(dict.fromkeys([*self.reads, *self.writes]))

    def levers(self, model: HookedModel) -> Levers | None:
        """None for those that hold on the model; embeddings lie before the blocks that can be replayed."""
        return Levers(False, False, False) if self.writes[0].layer is None else None

    def kept(self, rows: Rows) -> Tensor:
        """`[batch pos]` bool."""
        return kept_positions(self.sae.metadata.exclusion, rows)

    def gather(self, activations: Mapping[str, Tensor], sites: Sequence[Site], kept: Tensor) -> Tensor:
        """`[token d]` of the sites side by side at the kept positions."""
        return torch.cat([activations[site.hook_name].flatten(2)[kept] for site in sites], -1).to(self.sae.W_dec)


class _Reached(Exception):
    pass


def _run_to(model: HookedModel, prompts: Prompts, sites: Sequence[Site], index: Tensor) -> dict[str, Tensor]:
    """Activations of some prompts by hook name; the model stops where it has the last of them."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Edit:
        def edit(activation: Tensor, rows: Rows) -> Tensor:
            kept[name] = activation
            if len(kept) == len(sites):
                raise _Reached
            return activation

        return edit

    rows = Rows(prompts, index.to(model.device))
    plan = Plan.of(model, model.in_force, edits={site.hook_name: keep(site.hook_name) for site in sites})
    try:
        with plan.installed(rows):
            call_bridge(model, prompts.take(rows.index))
    except _Reached:
        pass
    return kept


@dataclass(frozen=True, eq=False)
class Target:
    """What is known of the target over the whole text.

    Attributes:
        mean: `[d_out]` over kept tokens, float64.
        components: `[d_out d_out]` principal components in columns, the first ones first; None for a crosscoder.
        median: of the norms of what is read at kept tokens.
    """

    mean: Tensor
    components: Tensor | None
    median: float

    @classmethod
    def of(cls, model: HookedModel, prompts: Prompts, places: Places, index: Sequence[Tensor]) -> "Target":
        """One pass up to the site. Raises UserError if no token is kept."""
        d = places.sae.config.d_out
        total = torch.zeros(d, dtype=torch.float64, device=model.device)
        moment = torch.zeros(d, d, dtype=torch.float64, device=model.device) if places.spliceable else None
        n, norms, origin = 0, [], None
        for part in index:
            activations = _run_to(model, prompts, places.sites, part)
            kept = places.kept(Rows(prompts, part.to(model.device)))
            norms.append(places.gather(activations, places.reads, kept).norm(dim=-1))
            y = places.gather(activations, places.writes, kept)
            if not len(y):
                continue
            origin = y.mean(0) if origin is None else origin  # sums about it, which lose no digits to a large mean
            total += (y - origin).double().sum(0)
            if moment is not None:
                moment += ((y - origin).T @ (y - origin)).double()
            n += len(y)
        if origin is None:
            raise UserError(
                f"all {prompts.tokens.numel()} tokens of the text are excluded by {places.sae.metadata.exclusion}"
            )
        shift = total / n
        components = None
        if moment is not None:
            components = torch.linalg.eigh(moment / n - torch.outer(shift, shift)).eigenvectors.flip(1).float()
        return cls(origin.double() + shift, components, float(torch.cat(norms).median()))


@dataclass
class Tally:
    """Sums over the tokens of each block, float64, and where each feature fired.

    Attributes:
        n, d_sae: blocks and features.
        sums: name -> `[prompt …]`.
    """

    n: int
    d_sae: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    _pairs: list[Tensor] = field(default_factory=list)
    _counts: list[Tensor] = field(default_factory=list)

    def add(self, name: str, index: Tensor, values: Tensor) -> None:
        """Sums `[batch …]` of the blocks at `index`."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(self.n, *values.shape[1:], dtype=torch.float64)
        self.sums[name][index] = values.double().cpu()

    def fire(self, block: Tensor, feature: Tensor) -> None:
        """A feature was on at a token of a block, `[entry]` each."""
        pairs, counts = torch.unique(block * self.d_sae + feature, return_counts=True)
        self._pairs.append(pairs.cpu())
        self._counts.append(counts.cpu())

    @property
    def firings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Blocks, features and numbers of tokens, of all (block, feature) that fired."""
        pairs, place = np.unique(torch.cat(self._pairs).numpy(), return_inverse=True)
        counts = np.bincount(place, torch.cat(self._counts).numpy()).astype(int)  # of the slices that a block came in
        return pairs // self.d_sae, pairs % self.d_sae, counts

    def numpy(self, name: str) -> np.ndarray:
        """`[… prompt]`."""
        return self.sums[name].movedim(0, -1).numpy()


def reconstruct(
    sae: SparseAutoencoder, places: Places, target: Target, recording: Recording, rows: Rows, tally: Tally
) -> None:
    """What needs no further run. The reconstruction `[token d_out]` is left in the recording for the spliced arm."""
    kept = places.kept(rows)
    x, y = (places.gather(recording.activations, sites, kept) for sites in (places.reads, places.writes))
    block = torch.arange(len(kept), device=kept.device)[:, None].expand_as(kept)[kept]
    index = rows.index.cpu()

    def add(name: str, values: Tensor) -> None:
        sums = torch.zeros(len(kept), *values.shape[1:], dtype=torch.float64, device=kept.device)
        tally.add(name, index, sums.index_add_(0, block, values.double()))

    add("n_tokens", torch.ones(len(block), device=kept.device))
    parts = [torch.zeros_like(y[:0])]
    l0, l1 = (torch.zeros(len(block), device=kept.device) for _ in range(2))
    at_once = max(1, PAIRS // sae.config.d_sae)
    for first in range(0, len(block), at_once):
        output = frozen(sae, x[first : first + at_once])
        parts.append(output.reconstruction)
        values, feature, row = output.codes.sparse()
        row = row + first
        tally.fire(index.to(kept.device)[block[row]], feature)
        l0 += torch.bincount(row, minlength=len(block))
        l1.index_add_(0, row, values)
    made = recording.activations["reconstruction"] = torch.cat(parts)
    add("l0", l0)
    add("l1", l1)
    n_sites = len(places.writes)
    by_site = lambda z: z.unflatten(-1, (n_sites, -1))  # noqa: E731
    centred = (y.double() - target.mean).to(y.dtype)
    add("error", by_site(y - made).square().sum(-1, dtype=torch.float64))
    add("variance", by_site(centred).square().sum(-1, dtype=torch.float64))
    for name, a, b in (("", y, made), ("_by_site", by_site(y), by_site(made))):
        norms = a.norm(dim=-1), b.norm(dim=-1)
        add(f"cosine{name}", (a * b).sum(-1) / (norms[0] * norms[1]).clamp_min(1e-12))
        add(f"relative_norm{name}", norms[1] / norms[0].clamp_min(1e-12))
    add("norm", y.norm(dim=-1))
    add("norm_reconstructed", made.norm(dim=-1))
    if target.components is not None:
        add("energy", (centred @ target.components).square())
    far = x.norm(dim=-1) > (sae.metadata.exclusion.outlier or OUTLIER) * target.median
    add("outliers", far)
    for name, of in (("error_inside", y - made), ("variance_inside", centred)):
        add(name, of.square().sum(-1, dtype=torch.float64) * ~far)


def run_arms(places: Places, target: Target, recording: Recording, rows: Rows, tally: Tally) -> None:
    """Cross-entropy of every arm, and KL from the clean one."""
    site, made = places.writes[0], recording.activations["reconstruction"]
    kept = places.kept(rows)
    prompts, index = rows.prompts.take(rows.index), rows.index.cpu()
    wanted = prompts.real[:, 1:] & prompts.real[:, :-1]
    tally.add("n_predicted", index, wanted.sum(1))
    tokens = prompts.tokens[:, 1:]
    clean = recording.base_logits(Read())[:, :-1].float().log_softmax(-1)
    prob = clean.exp()

    def add(name: str, values: Tensor) -> None:
        tally.add(name, index, (values.double() * wanted).sum(1))

    add("ce_clean", -clean.gather(-1, tokens[..., None])[..., 0])
    entropy = -(prob * clean).sum(-1)
    del clean
    for arm, value in zip(ARMS, (made, torch.zeros_like(made[:1]), target.mean[None]), strict=True):
        edit = _put(kept, value)
        logits = recording.logits(site.layer or 0, rows, Read(), {site.hook_name: edit})[:, :-1].float()
        total = logits.logsumexp(-1)
        add(f"ce_{arm}", total - logits.gather(-1, tokens[..., None])[..., 0])
        # Σ p (log p − log q) = Σ p · (−log q) − H(p): one product over the vocabulary an arm.
        add(f"kl_{arm}", total - torch.linalg.vecdot(prob, logits) - entropy)


def _put(kept: Tensor, value: Tensor) -> Edit:
    """Puts values `[token d]` (or one for all) at the kept positions `[batch pos]`."""

    def edit(activation: Tensor, rows: Rows) -> Tensor:
        new = activation.flatten(2).clone()
        new[kept] = value.to(new).expand(int(kept.sum()), -1)
        return new.reshape(activation.shape)

    return edit
