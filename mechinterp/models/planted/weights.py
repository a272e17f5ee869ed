"""Hand-made weights: a residual stream of named subspaces, heads and MLPs that move words between them.

1. The residual stream is a direct sum of orthogonal subspaces: `token` (one axis a word), `place` (one axis a
   position) and further word spaces that a model names. Embeddings are one-hot in `token` and `place`.
2. A head that looks k places back: its query at position p is the axis of place p-k, its key at j the axis of place j.
   The score is b_p at j = p-k and 0 at the p other keys, and b_p = log(p w / (1 - w)) makes the attention weight
   exactly w at every p >= k. Where nothing stands k places back it averages over the context.
3. A head that searches: its score is B at the key that matches and 0 at others, and at place 0, the sink, it is
   log(n_ctx - p). So all keys but the match add up to about n_ctx in the softmax at every p, and
   B = log(n_ctx w / (1 - w)) gives the match the weight w. Without a match every word has a weight of 1 / n_ctx.
4. A gate: one neuron a word, relu(sum of what the word's axes hold in some spaces - threshold), written to a space.
   No norm stands anywhere, so that a subspace that is not read changes nothing, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native
from transformers import PreTrainedTokenizerFast

ATTENTION = 0.95  # the largest weight of each circuit head: high enough to do the job, low enough for gradients
GAIN = 8.0  # of the unembedding


@dataclass(frozen=True)
class Head:
    """Hand-written weights of one head. q, k, v: [d_model d_head]; o: [d_head d_model]. Scores are q k, unscaled."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True)
class Mlp:
    """Hand-written weights of an MLP. read, write: [neuron d_model]; bias: [neuron]; constant: [d_model], its b_out."""

    read: Tensor
    bias: Tensor
    write: Tensor
    constant: Tensor

    def __add__(self, other: Mlp) -> Mlp:
        """The neurons of both."""
        return Mlp(
            torch.cat([self.read, other.read]),
            torch.cat([self.bias, other.bias]),
            torch.cat([self.write, other.write]),
            self.constant + other.constant,
        )

    def padded(self, d_mlp: int) -> Mlp:
        """With neurons that read and write nothing, up to this many."""
        spare = d_mlp - len(self.bias)
        d_model = len(self.constant)
        return self + Mlp(
            torch.zeros(spare, d_model), torch.zeros(spare), torch.zeros(spare, d_model), 0 * self.constant
        )


@dataclass(frozen=True)
class Layer:
    """Heads (those of one key/value group beside each other, with equal k and v) and, unless attention-only, an MLP."""

    heads: Sequence[Head]
    mlp: Mlp | None = None


def word_tokenizer(words: tuple[str, ...], n_ctx: int = 64) -> PreTrainedTokenizerFast:
    """One token a word, words split at white space, no BOS; `<pad>` and `<unk>` come after the words."""
    vocabulary = {word: index for index, word in enumerate([*words, "<pad>", "<unk>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left", model_max_length=n_ctx
    )


class Residual:
    """The residual stream's subspaces, and the heads and neurons that move words between them (module docstring)."""

    def __init__(self, n_words: int, n_ctx: int, spaces: tuple[str, ...]):
        self.n_words, self.n_ctx = n_words, n_ctx
        widths = {"token": n_words, "place": n_ctx, **dict.fromkeys(spaces, n_words)}
        self.d_model = sum(widths.values())
        self.d_head = n_words + n_ctx  # room for a word and a place
        axes = torch.split(torch.eye(self.d_model), list(widths.values()))  # each [n d_model]
        self.space = dict(zip(widths, axes, strict=True))
        head_axes = torch.eye(self.d_head)
        self.word, self.here = head_axes[:n_words], head_axes[n_words:]  # [n_words d_head], [n_ctx d_head]
        self.position = torch.arange(n_ctx, dtype=torch.float32)

    # What a head reads and writes

    def words_from(self, space: str) -> Tensor:
        """[d_model d_head]: read a word subspace."""
        return self.space[space].T @ self.word

    def places(self, scale: Tensor, shift: int = 0) -> Tensor:
        """[d_model d_head]: read place p as `scale[p]` times the axis of place p - shift."""
        rows = torch.diag(scale).roll(-shift, dims=1)
        return self.space["place"].T @ rows @ self.here

    def copy(self, space: str, gain: float = 1.0, source: str = "token") -> tuple[Tensor, Tensor]:
        """OV that copies the attended word from one subspace into another: v [d_model d_head], o [d_head d_model]."""
        return self.words_from(source), gain * self.word.T @ self.space[space]

    # Heads

    def earlier_token(self, back: int, weight: float, space: str, gain: float = 1.0) -> Head:
        """Attends `back` places before its own position with this weight, copies the word there."""
        scale = torch.log(self.position.clamp(min=1) * weight / (1 - weight))
        scale[:back] = 0  # nothing stands so far before these positions
        return Head(self.places(scale, shift=back), self.places(torch.ones(self.n_ctx)), *self.copy(space, gain))

    def current_token(self, score: float, space: str, gain: float) -> Head:
        """Attends to its own position; a score of 0 averages over the context."""
        ones = torch.ones(self.n_ctx)
        return Head(self.places(score * ones), self.places(ones), *self.copy(space, gain))

    def duplicate_token(self, score: float, space: str, gain: float) -> Head:
        """Attends to equal words."""
        read = self.words_from("token")
        return Head(score * read, read, *self.copy(space, gain))

    def search(self, q: Tensor, k: Tensor, ov: tuple[Tensor, Tensor], weight: float = ATTENTION) -> Head:
        """Attends where `q` and `k` [d_model d_head] have a product of 1, else rests on place 0; copies by `ov`."""
        match = math.log(self.n_ctx * weight / (1 - weight))
        rest = torch.log(self.n_ctx - self.position)[:, None]
        sink = self.here[:1]
        return Head(
            match * q + self.space["place"].T @ rest @ sink,
            k + self.space["place"][:1].T @ sink,
            *ov,
        )

    # Neurons

    def gate(
        self, reads: tuple[str, ...], threshold: float, write: str, gain: float = 1.0, shut_before: int = 0
    ) -> Mlp:
        """A neuron a word: relu(what its axes in `reads` hold together - threshold), into `write`; 1 less at the first
        `shut_before` places."""
        read = torch.stack([self.space[name] for name in reads]).sum(0) - self.space["place"][:shut_before].sum(0)
        bias = torch.full((self.n_words,), -threshold)
        return Mlp(read, bias, gain * self.space[write], torch.zeros(self.d_model))

    def always(self, word: int, space: str, value: float) -> Mlp:
        """No neuron: an output bias that writes `value` on one word's axis."""
        none = torch.zeros(0, self.d_model)
        return Mlp(none, torch.zeros(0), none, value * self.space[space][word])


def build(
    name: str, w: Residual, tokenizer: PreTrainedTokenizerFast, layers: Sequence[Layer], n_kv_heads: int | None = None
) -> tuple[TransformerBridge, PreTrainedTokenizerFast]:
    """A native model without norms whose unembedding reads the subspace `answer`, with these layers.

    `n_kv_heads` None gives every head keys and values of its own.
    """
    mlp = layers[0].mlp
    config = {
        "n_layers": len(layers),
        "n_heads": len(layers[0].heads),
        "d_model": w.d_model,
        "d_head": w.d_head,
        "d_vocab": w.n_words,
        "n_ctx": w.n_ctx,
        "attn_only": mlp is None,
        "normalization_type": None,
        "act_fn": "relu",
        "seed": 0,
    }
    if mlp is not None:
        config["d_mlp"] = max(len(layer.mlp.bias) for layer in layers if layer.mlp is not None)
    if n_kv_heads is not None:
        config["n_key_value_heads"] = n_kv_heads
    bridge = boot_native(config, model_name=name)
    write_weights(bridge, w.space["token"], w.space["place"], GAIN * w.space["answer"], layers)
    return bridge, tokenizer


@torch.no_grad()
def write_weights(bridge: TransformerBridge, embed: Tensor, place: Tensor, unembed: Tensor, layers: Sequence[Layer]):
    """Write hand-made weights into a native model; what is not given becomes zero.

    Args:
        embed: [d_vocab d_model]; place: [pos d_model]; unembed: [d_vocab d_model]; layers: all of them.
    """
    made = {"tok_embed.weight": embed, "pos.weight": place, "head.weight": unembed}
    groups = int(getattr(bridge.cfg, "n_key_value_heads", None) or bridge.cfg.n_heads)
    for i, layer in enumerate(layers):
        parts = _attention(layer.heads, groups)
        if layer.mlp is not None:
            mlp = layer.mlp.padded(int(bridge.cfg.d_mlp or 0))
            parts |= {"mlp.in.weight": mlp.read, "mlp.in.bias": mlp.bias}
            parts |= {"mlp.out.weight": mlp.write.T, "mlp.out.bias": mlp.constant}
        made |= {f"layers.{i}.{name}": weight for name, weight in parts.items()}
    module = bridge.original_model
    # The bridge lists a weight under several names; each gets it, so that the order of loading does not matter.
    state = {name: made.get(_plain(name), torch.zeros_like(old)) for name, old in module.state_dict().items()}
    module.load_state_dict(state)


def _plain(name: str) -> str:
    """A weight's name without the bridge's wrappers."""
    plain = name.replace("._original_component", "")
    return plain.replace("mlp.fc_in.", "mlp.in.").replace("mlp.fc_out.", "mlp.out.")


def _attention(heads: Sequence[Head], groups: int) -> dict[str, Tensor]:
    size = len(heads) // groups
    first = heads[::size]
    for i, head in enumerate(heads):
        shared = first[i // size]
        assert torch.equal(head.k, shared.k) and torch.equal(head.v, shared.v), f"head {i} differs from its group"
    scale = math.sqrt(heads[0].q.shape[1])  # the model divides scores by this
    return {
        "attn.q.weight": torch.cat([head.q.T * scale for head in heads]),
        "attn.k.weight": torch.cat([head.k.T for head in first]),
        "attn.v.weight": torch.cat([head.v.T for head in first]),
        "attn.o.weight": torch.cat([head.o for head in heads]).T,
    }
