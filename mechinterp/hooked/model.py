"""The hooked model that a user holds: a thin face over TransformerLens's bridge, the sites and the one forward."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

from mechinterp.errors import UserError
from mechinterp.hooked import cache as caching
from mechinterp.hooked import forward, suffix
from mechinterp.hooked import generate as generation
from mechinterp.hooked.cache import Cache, NamesFilter
from mechinterp.hooked.interventions import Intervention
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import KINDS, Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

Input = str | Sequence[str] | Sequence[Sequence[int]] | Tensor | Prompts


@dataclass(frozen=True)
class ModelInfo:
    """What a header says of a model, besides what can be read off it.

    Attributes:
        name: as asked for.
        description: one line, such as "SmolLM2-135M-Instruct, dequantised Q4_1, no chat template"; may be empty.
        source: "embedded", "planted", "folder", "gguf", "hub" or "module".
        processed: weights folded and centred (TransformerLens's compatibility mode), or raw.
        bos: whether a BOS is prepended to text.
    """

    name: str
    description: str
    source: str
    processed: bool
    bos: bool


class HookedModel:
    """A causal language model with named sites, caching and interventions.

    Made by `mechinterp.load`. Input may be text, texts, token lists (of different lengths: padded on the left and
    masked), a token tensor `[batch pos]`, or `Prompts`. Tokens that are given as numbers are used as they are; text
    gets a BOS where `info.bos` says so.
    """

    def __init__(self, bridge: "TransformerBridge", tokenizer: "PreTrainedTokenizerBase | None", info: ModelInfo):
        bridge.eval()
        for parameter in [*bridge.parameters(), *bridge.original_model.parameters()]:
            parameter.requires_grad_(False)
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.info = info
        self.hook_points = dict(bridge.hook_dict)
        self.in_force: list[forward.Bound] = []
        config = bridge.cfg
        self.n_layers: int = int(config.n_layers)
        self.n_heads: int = int(config.n_heads)
        self.n_kv_heads: int = int(getattr(config, "n_key_value_heads", None) or config.n_heads)
        self.d_model: int = int(config.d_model)
        self.d_head: int = int(config.d_head)
        self.d_vocab: int = int(config.d_vocab)

    # What it is

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.bridge.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.bridge.parameters()).dtype

    @cached_property
    def n_parameters(self) -> int:
        """Weights, tied ones counted once, and so are q, k, v where the bridge keeps them apart and joined."""
        named = self.bridge.original_model.named_parameters()
        return sum(parameter.numel() for name, parameter in named if ".qkv." not in name)

    def header(self) -> str:
        """One line that every command prints: name, what it is, size, device, dtype, BOS, weights."""
        size = self.n_parameters
        shown = f"{size / 1e6:.0f}M" if size >= 1e6 else f"{size / 1e3:.0f}k"
        parts = [
            self.info.name,
            self.info.description,
            f"{shown} parameters",
            str(self.device),
            str(self.dtype).removeprefix("torch."),
            "BOS prepended" if self.info.bos else "no BOS",
            "processed weights (folded, centred)" if self.info.processed else "raw weights",
        ]
        return " · ".join(part for part in parts if part)

    def __repr__(self) -> str:
        return f"HookedModel({self.header()})"

    def weights_hash(self) -> str:
        """sha256 over all weights, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.bridge.original_model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def tokenizer_hash(self) -> str | None:
        """sha256 over the vocabulary, tokens with their ids; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()

    @cached_property
    def levers(self) -> suffix.Levers:
        """Which parts of the exact suffix run hold on this model; tried once."""
        return suffix.probe(self)

    @cached_property
    def keeps_cache(self) -> bool:
        """Whether generating behind kept keys and values is exact on this model; tried once."""
        return generation.probe(self)

    # Tokens

    def to_prompts(self, text: Input) -> Prompts:
        """Tokenize, or wrap tokens. Raises UserError for text without a tokenizer and tokens outside the vocabulary."""
        if isinstance(text, Prompts):
            return text
        if isinstance(text, Tensor):
            tokens = text[None] if text.ndim == 1 else text
            prompts = Prompts(tokens.long())
        elif isinstance(text, str) or (len(text) > 0 and isinstance(text[0], str)):
            texts = [text] if isinstance(text, str) else [str(t) for t in text]
            prompts = Prompts.from_lists([self.encode(t) for t in texts], self.pad_token, bos=self.info.bos)
        else:
            prompts = Prompts.from_lists([[int(i) for i in row] for row in text], self.pad_token)  # type: ignore[union-attr]
        if prompts.tokens.numel() == 0:
            raise UserError(f"a prompt needs at least one token; found a tensor of shape {tuple(prompts.tokens.shape)}")
        for extreme in (int(prompts.tokens.min()), int(prompts.tokens.max())):
            if not 0 <= extreme < self.d_vocab:
                raise UserError(f"token id {extreme} is outside the vocabulary of {self.d_vocab} tokens")
        return prompts

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids of a text; a BOS in front as `info.bos` says, or as given."""
        if self.tokenizer is None:
            raise UserError(f"{self.info.name} has no tokenizer: give token ids instead of text")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.bos_token, *ids] if (self.info.bos if bos is None else bos) else list(ids)

    def split(self, text: str) -> list[str]:
        """The text of each token, without a BOS."""
        return self.token_strings(self.encode(text, bos=False))

    def token_strings(self, ids: Sequence[int] | Tensor) -> list[str]:
        """The text of each token id."""
        ids = [int(i) for i in ids]
        return [str(i) for i in ids] if self.tokenizer is None else [str(self.tokenizer.decode([i])) for i in ids]

    @property
    def bos_token(self) -> int:
        """Id of the BOS. Raises UserError if the tokenizer has none."""
        token = getattr(self.tokenizer, "bos_token_id", None)
        if not isinstance(token, int):
            raise UserError(f"the tokenizer of {self.info.name} has no BOS to prepend")
        return token

    @property
    def pad_token(self) -> int:
        """Id that padding positions hold; masked, so it is never seen."""
        return int(getattr(self.tokenizer, "pad_token_id", None) or 0)

    # Sites

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every hook point that fires on a run of one prompt of two tokens, by hook name."""
        seen: dict[str, tuple[int, ...]] = {}
        handles = []

        def note(name: str) -> Callable[..., None]:
            def hook(activation: Any, hook: Any) -> None:
                if isinstance(activation, Tensor):
                    seen[name] = tuple(activation.shape)

            return hook

        try:
            for name, point in self.hook_points.items():
                handles.append((point, point.add_hook(note(name))))
            forward.call_bridge(self, Prompts(torch.zeros(1, 2, dtype=torch.long, device=self.device)))
        finally:
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)
        return seen

    @cached_property
    def site_list(self) -> list[Site]:
        """Every site of this model, in the order of the forward pass."""
        listed = []
        for name, kind in KINDS.items():
            for layer in range(self.n_layers) if kind.layered else [None]:
                site = Site(name, layer)
                fires = self._virtual_fires(site) if kind.virtual else site.hook_name in self.shapes
                if fires and not (name == "attn_scores" and self._delegates_attention(site)):
                    listed.append(site)
        return listed

    def _virtual_fires(self, site: Site) -> bool:
        wanted = "mlp.hook_in" if site.name == "mlp_in" else f"attn.hook_{site.name[0]}"
        return f"blocks.{site.layer}.{wanted}" in self.shapes

    def _delegates_attention(self, site: Site) -> bool:
        """Whether the wrapped module computes attention itself, so that scores are not seen and patterns only read."""
        attention = self.bridge.blocks[site.layer].attn
        return type(attention).forward is AttentionBridge.forward

    def resolve(self, site: Site, write: bool = False) -> Site:
        """The site with its layer counted from 0.

        Raises:
            UserError: this model has no such site, layer, head or neuron, or it cannot be written.
        """
        if site.kind.layered and site.layer is None:
            raise UserError(f"site {site.name!r} needs a layer, 0 … {self.n_layers - 1}")
        if site.layer is not None:
            if not -self.n_layers <= site.layer < self.n_layers:
                raise UserError(f"{site}: this model has layers 0 … {self.n_layers - 1}, or −{self.n_layers} … −1")
            site = site.counted(self.n_layers)
        if site.whole not in self.site_list:
            names = ", ".join(dict.fromkeys(s.name for s in self.site_list if s.layer in (None, site.layer)))
            raise UserError(f"{self.info.name} has no site {site.whole}; it has: {names}")
        size = self.axis_size(site)
        for index, axis, n in ((site.heads, site.kind.head_axis, size), (site.neurons, "neuron", self.width(site))):
            if index is not None and not all(0 <= i < n for i in index):
                raise UserError(f"{site}: {axis} is 0 … {n - 1} at this site")
        if site.basis is not None and site.basis.shape[1] != self.width(site):
            raise UserError(f"{site}: the basis has width {site.basis.shape[1]}, the site {self.width(site)}")
        if write and not self.writable(site):
            raise UserError(
                f"{site} can be read but not changed in {self.info.name}: its attention is computed inside the "
                "wrapped module; change z, q, k or v instead"
            )
        return site

    def writable(self, site: Site) -> bool:
        """Whether an edit of a site of this model reaches its output. Some patterns are shown after they were used."""
        if site.name != "pattern" or not self._delegates_attention(site):
            return True
        return bool(getattr(self.bridge.blocks[site.layer].attn.original_component, "accepts_pattern_fn", False))

    def axis_size(self, site: Site) -> int:
        """Heads (or key/value heads) of a site; 0 where it has none."""
        return {"head": self.n_heads, "kv_head": self.n_kv_heads, None: 0}[site.kind.head_axis]

    def width(self, site: Site) -> int:
        """Size of a site's last axis."""
        return self.d_model if site.kind.virtual else self.shapes[site.hook_name][-1]

    # What the inputs of heads and MLPs are computed from (forward.py)

    def resid_read_by(self, site: Site) -> str:
        """Hook name of the residual stream that `q_input` … `mlp_in` of this layer read."""
        before_mlp = f"blocks.{site.layer}.ln2.hook_in"
        if site.name == "mlp_in" and before_mlp in self.shapes:
            return before_mlp
        return Site("resid_pre", site.layer).hook_name

    def norm(self, site: Site) -> Callable[[Tensor], Tensor]:
        """The norm between the residual stream and the heads (or the MLP), without its hooks."""
        block = self.bridge.blocks[site.layer]
        second = site.name == "mlp_in" and f"blocks.{site.layer}.ln2.hook_in" in self.shapes
        return (block.ln2 if second else block.ln1).original_component

    def projection(self, site: Site) -> tuple[Tensor, Tensor]:
        """W `[head d_model d_head]` and b `[head d_head]` that make q, k or v of a head's input."""
        attention, letter = self.bridge.blocks[site.layer].attn, site.name[0].upper()
        weight = getattr(attention, f"W_{letter}")
        bias = getattr(attention, f"b_{letter}")
        return weight, weight.new_zeros(weight.shape[0], weight.shape[2]) if bias is None else bias

    # Running

    def __call__(self, text: Input, interventions: Sequence[Intervention] = ()) -> Tensor:
        """Logits `[batch pos d_vocab]`, under the interventions in force and those given."""
        return forward.run(self, self.to_prompts(text), interventions)

    def run_with_cache(
        self,
        text: Input,
        names_filter: NamesFilter = None,
        interventions: Sequence[Intervention] = (),
        device: torch.device | str | None = None,
        max_bytes: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """Logits `[batch pos d_vocab]`, and the activations asked for.

        Args:
            text: what to run.
            names_filter: sites to keep: "resid_post", ("pattern", 5), a `Site`, a hook name, a list of these, or a
                predicate on hook names. None keeps every hook point: see `estimate_cache` first.
            interventions: for this run; the cache holds values after them.
            device: where to keep them; the model's by default.
            max_bytes: refuse a larger cache; by default four fifths of the free memory.

        Raises:
            UserError: a filter that matches nothing, or a cache that is too large.
        """
        prompts = self.to_prompts(text)
        sites = caching.select(names_filter, self.site_list, self.n_layers)
        keep_on = torch.device(device) if device is not None else self.device
        caching.refuse_if_large(self._cache_bytes(prompts, sites), keep_on, max_bytes)
        kept: dict[str, Tensor] = _OnDevice(keep_on)
        logits = forward.run(self, prompts, interventions, record=sites, into=kept)
        missing = [site for site in sites if site.hook_name not in kept]
        if missing:
            raise UserError(f"{missing[0]} did not fire in this run")
        return logits, Cache(kept, self.n_layers)

    def generate(
        self,
        text: Input,
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        interventions: Sequence[Intervention] = (),
    ) -> generation.Generation:
        """Continue text, under the interventions in force and those given, at every step.

        Args:
            text: prompts, of one length or several.
            max_new_tokens: of each prompt.
            temperature: 0 takes the likeliest token, above 0 draws from the logits divided by it.
            seed: of the draws.
            stop_at_eos: end a prompt's text at the tokenizer's end of text.
            interventions: for these runs. Positions are those of the prompts (negative ones count from their ends) and
                never move; without positions an intervention acts on the generated tokens too.

        Raises:
            UserError: settings out of range, text beyond the context, an intervention without positions whose values
                are those of a prompt's positions, or one that never fires or changes nothing.
        """
        return generation.generate(
            self, self.to_prompts(text), max_new_tokens, temperature, seed, stop_at_eos, interventions
        )

    def estimate_cache(self, text: Input, names_filter: NamesFilter = None) -> int:
        """Bytes that `run_with_cache` would keep."""
        sites = caching.select(names_filter, self.site_list, self.n_layers)
        return self._cache_bytes(self.to_prompts(text), sites)

    def _cache_bytes(self, prompts: Prompts, sites: Sequence[Site]) -> int:
        batch, pos = len(prompts), prompts.n_pos
        total = 0
        for site in sites:
            sizes = {"batch": batch, "pos": pos, "query": pos, "key": pos, "one": 1}
            sizes |= {"head": self.n_heads, "kv_head": self.n_kv_heads}
            entries = 1
            for axis in site.kind.axes:
                entries *= sizes.get(axis, 0) or self.width(site)
            total += entries * self.dtype.itemsize
        return total

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator["HookedModel"]:
        """Interventions in force for every run of this model inside the context, after those already in force.

        Raises:
            UserError: on entering, a site that the model does not have; on leaving, one that never fired, or that
                changed no element without `noop_ok`.
        """
        bound = forward.bind(self, interventions)
        self.in_force = [*self.in_force, *bound]
        try:
            yield self
        finally:
            self.in_force = [one for one in self.in_force if one not in bound]
        for one in bound:
            one.verdict()


class _OnDevice(dict[str, Tensor]):
    """A dict that moves what is put into it to a device at once."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor.to(self.device))
