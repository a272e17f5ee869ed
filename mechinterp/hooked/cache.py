"""The cache: recorded activations by site, with an estimate of its size before it is made."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.files import replacing
from mechinterp.hooked.sites import KINDS, Site

NamesFilter = str | Site | tuple[str, int] | Sequence[str | Site | tuple[str, int]] | Callable[[str], bool] | None


class Cache(Mapping[str, Tensor]):
    """Activations by hook name: `cache["pattern", 5]`, `cache["resid_post", -1]`, `cache[Site("z", 9, head=6)]`.

    Iteration gives TransformerLens's hook names. Tensors are clones that later hooks cannot change.
    """

    def __init__(self, tensors: Mapping[str, Tensor], n_layers: int):
        self._tensors = dict(tensors)
        self.n_layers = n_layers

    def __getitem__(self, key: str | tuple[str, int] | Site) -> Tensor:
        site = (key if isinstance(key, Site) else self._site(key)).counted(self.n_layers)
        if site.hook_name not in self._tensors:
            have = ", ".join(sorted({Site.from_hook(name).name for name in self._tensors})) or "nothing"
            raise UserError(f"{site} is not in this cache, which holds: {have}")
        tensor = self._tensors[site.hook_name]
        if site.neurons is not None:
            tensor = tensor[..., site.neuron if isinstance(site.neuron, int) else list(site.neurons)]
        if site.basis is not None:
            tensor = tensor @ torch.linalg.pinv(site.basis.float()).to(tensor)  # coordinates in the basis
        if site.heads is None or site.kind.head_axis is None:
            return tensor
        dim = site.kind.dim(site.kind.head_axis)
        if max(site.heads) >= tensor.shape[dim]:
            raise UserError(f"{site}: heads are 0 … {tensor.shape[dim] - 1} at this site")
        index = torch.tensor(site.heads, device=tensor.device)
        return tensor.select(dim, site.head) if isinstance(site.head, int) else tensor.index_select(dim, index)

    @staticmethod
    def _site(key: str | tuple[str, int]) -> Site:
        if isinstance(key, tuple):
            return Site(key[0], layer=key[1])
        return Site.from_hook(key) if "hook_" in key else Site(key)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (UserError, TypeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def __repr__(self) -> str:
        names = sorted({Site.from_hook(name).name for name in self._tensors}, key=list(KINDS).index)
        return f"Cache({len(self)} activations, {self.nbytes / 1e6:.1f} MB: {', '.join(names)})"

    def save(self, path: str | Path) -> None:
        """Write as safetensors; the file appears whole or not at all."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self._tensors.items()}
        with replacing(path) as partial:
            save_file(tensors, partial, metadata={"mechinterp_cache": json.dumps({"n_layers": self.n_layers})})

    @classmethod
    def load(cls, path: str | Path) -> "Cache":
        """Read what `save` wrote. Raises UserError if the file is missing, damaged or no cache."""
        try:
            with safe_open(path, framework="pt") as file:
                note = (file.metadata() or {}).get("mechinterp_cache")
                if note is None:
                    raise UserError(f"{path} is a safetensors file, but no cache that `Cache.save` wrote")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read a cache from {path}: {error}") from error
        return cls(tensors, json.loads(note)["n_layers"])


def select(names_filter: NamesFilter, available: Sequence[Site], n_layers: int) -> list[Site]:
    """The sites that a filter asks for.

    Args:
        names_filter: None for every site that is a hook point; a site name (all layers), hook name, `Site`,
            `(name, layer)`, a list of these, or a predicate on hook names.
        available: the sites of the model.
        n_layers: of the model, for negative layers.

    Raises:
        UserError: something asked for matches no site of the model.
    """
    if names_filter is None:
        return [site for site in available if not site.kind.virtual]
    if callable(names_filter):
        chosen = [site for site in available if names_filter(site.hook_name)]
        if not chosen:
            raise UserError("names_filter matched no site; hook names look like " + available[-1].hook_name)
        return chosen
    one = isinstance(names_filter, str | Site) or (len(names_filter) == 2 and isinstance(names_filter[1], int))
    wanted: list[Any] = [names_filter] if one else list(names_filter)  # type: ignore[arg-type]
    chosen: list[Site] = []
    for want in wanted:
        site = (want if isinstance(want, Site) else Cache._site(want)).counted(n_layers)
        same = [s for s in available if s.name == site.name and (site.layer is None or s.layer == site.layer)]
        if not same:
            names = ", ".join(dict.fromkeys(s.name for s in available))
            raise UserError(f"this model has no site {site} ({n_layers} layers); it has: {names}")
        chosen += [s for s in same if s not in chosen]
    return chosen


def refuse_if_large(nbytes: int, device: torch.device, max_bytes: int | None) -> None:
    """Raise UserError, with advice, when a cache of `nbytes` would not fit into what is free (or into `max_bytes`)."""
    if max_bytes is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        max_bytes = int(0.8 * free)
    if nbytes > max_bytes:
        raise UserError(
            f"this cache would take {nbytes / 1e9:.2f} GB, of {max_bytes / 1e9:.2f} GB allowed; ask for fewer sites "
            "with names_filter=[…], fewer prompts at a time, device='cpu', or raise max_bytes="
        )
