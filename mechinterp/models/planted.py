"""Planted models: transformers whose weights are written by hand, so that the true circuit is known edge by edge.

`planted-induction` is a two-layer attention-only transformer without norms that continues `A B ... A` with `B`
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context Learning and
Induction Heads"). Its construction:

1. The residual stream is a direct sum of orthogonal subspaces: `token` (one axis a word), `place` (one axis a
   position), `previous` (the word before this one), `answer` (what the unembedding reads) and `unread`, which neither
   a circuit head nor the unembedding ever reads. Embeddings are one-hot in `token` and `place`.
2. L0H2, the previous-token head. Query at position p: the axis of place p-1. Key at j: the axis of place j. So the
   score is b_p at j = p-1 and 0 at the p other keys, and b_p = log(p w / (1 - w)) makes the attention weight exactly
   w = .95 at every p >= 1. Its OV copies `token` into `previous`.
3. L1H2, the induction head. Query: the current word, from `token`. Key at j: the word before j, from `previous`. This
   is K-composition with L0H2. The score is B where the word before j is the current word. Its OV copies `token` at j,
   which is B of `A B ... A`, into `answer`.
4. Position 0 has no position before it, so L0H2 attends to itself there and would claim that the first word follows
   itself. W_K of L1H2 therefore reads place 0 as -1 on every word: the score at key 0 is never above 0.
5. The weight of L1H2 is kept constant as well: at position p it scores its own key log(n_ctx + 1 - p), so that all keys
   but the match add up to about n_ctx in the softmax, and B = log(n_ctx w / (1 - w)). Hence its largest weight lies in
   .9-.99 wherever the current word occurred once before, and gradients through both softmaxes live.
6. The unembedding reads `answer`, with a gain of 8: the answer's logit leads by about 7.
7. Distractors, two of them tempting: L0H1 attends to the previous token as L0H2 does, and L1H3 attends as L1H2 does
   (it composes with L0H2, too), but both write into `unread`. L0H0 and L1H1 attend to the current token, L0H3
   averages over the context, L1H0 is a duplicate-token head, all writing into `unread`. Patching any of them changes
   nothing, whatever its pattern looks like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native
from transformers import PreTrainedTokenizerFast

LETTERS = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
N_CTX = 64
ATTENTION = 0.95  # the largest weight of each circuit head: high enough to do the job, low enough for gradients
GAIN = 8.0


@dataclass(frozen=True)
class PlantedCircuit:
    """The true circuit of a planted model.

    Attributes:
        heads: (layer, head) of every head that the answer needs.
        edges: the edges that carry words, as `source->destination<input>`: heads are `a{layer}.h{head}`, their inputs
            `<q>`, `<k>`, `<v>`; the ends are `embed` and `logits`.
        positional_edges: the edges that carry only positions. They are needed, but the same in every prompt, so
            patching between prompts cannot see them; ablating the embedding with zeros can.
    """

    heads: tuple[tuple[int, int], ...]
    edges: tuple[str, ...]
    positional_edges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planted:
    """An entry of the registry: one line of description, how to build the model, and its true circuit."""

    description: str
    build: Callable[[], tuple[TransformerBridge, PreTrainedTokenizerFast]]
    circuit: PlantedCircuit


@dataclass(frozen=True)
class Head:
    """Hand-written weights of one head. q, k, v: [d_model d_head]; o: [d_head d_model]. Scores are q k, unscaled."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def word_tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """One token a word, words split at white space, no BOS; `<pad>` and `<unk>` come after the words."""
    vocabulary = {word: index for index, word in enumerate([*words, "<pad>", "<unk>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left", model_max_length=N_CTX
    )


@torch.no_grad()
def write_weights(bridge: TransformerBridge, embed: Tensor, place: Tensor, unembed: Tensor, layers: list[list[Head]]):
    """Write hand-made weights into a native model.

    Args:
        embed: [d_vocab d_model]; place: [pos d_model]; unembed: [d_vocab d_model]; layers: heads of every layer.
    """
    state = {name: torch.zeros_like(tensor) for name, tensor in bridge.original_model.state_dict().items()}
    rename = {name.replace("._original_component", ""): name for name in state}
    state[rename["tok_embed.weight"]] = embed
    state[rename["pos.weight"]] = place
    state[rename["head.weight"]] = unembed
    for layer, heads in enumerate(layers):
        scale = math.sqrt(heads[0].q.shape[1])  # the model divides scores by this
        prefix = f"layers.{layer}.attn."
        state[rename[prefix + "q.weight"]] = torch.cat([head.q.T * scale for head in heads])
        state[rename[prefix + "k.weight"]] = torch.cat([head.k.T for head in heads])
        state[rename[prefix + "v.weight"]] = torch.cat([head.v.T for head in heads])
        state[rename[prefix + "o.weight"]] = torch.cat([head.o for head in heads]).T
    bridge.original_model.load_state_dict(state)


class InductionWeights:
    """The heads of `planted-induction`: subspaces of the residual stream (step 1), and heads that move between them."""

    def __init__(self, n_words: int, n_ctx: int):
        self.n_words, self.n_ctx = n_words, n_ctx
        widths = {"token": n_words, "place": n_ctx, "previous": n_words, "answer": n_words, "unread": n_words}
        self.d_model = sum(widths.values())
        self.d_head = n_words + n_ctx  # room for a word and a place
        axes = torch.split(torch.eye(self.d_model), list(widths.values()))  # each [n d_model]
        self.space = dict(zip(widths, axes, strict=True))
        head_axes = torch.eye(self.d_head)
        self.word, self.here = head_axes[:n_words], head_axes[n_words:]  # [n_words d_head], [n_ctx d_head]

    def words_from(self, space: str) -> Tensor:
        """[d_model d_head]: read a word subspace."""
        return self.space[space].T @ self.word

    def places(self, scale: Tensor, shift: int = 0) -> Tensor:
        """[d_model d_head]: read place p as `scale[p]` times the axis of place p - shift."""
        rows = torch.diag(scale).roll(-shift, dims=1)
        return self.space["place"].T @ rows @ self.here

    def copy(self, space: str, gain: float = 1.0) -> tuple[Tensor, Tensor]:
        """OV that copies the attended word into a subspace: v [d_model d_head], o [d_head d_model]."""
        return self.words_from("token"), gain * self.word.T @ self.space[space]

    def previous_token(self, weight: float, space: str, gain: float = 1.0) -> Head:
        """Step 2: attends to position p-1 with this weight, copies the word there."""
        position = torch.arange(self.n_ctx, dtype=torch.float32)
        scale = torch.log(position.clamp(min=1) * weight / (1 - weight))
        scale[0] = 0  # nothing stands before position 0
        return Head(self.places(scale, shift=1), self.places(torch.ones(self.n_ctx)), *self.copy(space, gain))

    def induction(self, weight: float, space: str, gain: float = 1.0) -> Head:
        """Steps 3-5: attends to where the word before is the current word, rests on its own position."""
        position = torch.arange(self.n_ctx, dtype=torch.float32)
        match = math.log(self.n_ctx * weight / (1 - weight))
        rest = torch.log(self.n_ctx + 1 - position)
        first = self.space["place"][:1].T @ self.word.sum(0, keepdim=True)
        q = match * self.words_from("token") + self.places(rest)
        k = self.words_from("previous") - first + self.places(torch.ones(self.n_ctx))
        return Head(q, k, *self.copy(space, gain))

    def duplicate_token(self, score: float, space: str, gain: float) -> Head:
        """Attends to equal words."""
        read = self.words_from("token")
        return Head(score * read, read, *self.copy(space, gain))

    def current_token(self, score: float, space: str, gain: float) -> Head:
        """Attends to its own position; a score of 0 averages over the context."""
        ones = torch.ones(self.n_ctx)
        return Head(self.places(score * ones), self.places(ones), *self.copy(space, gain))


def build_induction() -> tuple[TransformerBridge, PreTrainedTokenizerFast]:
    """`planted-induction`: 2 layers, 4 heads, 52 letters, 64 positions; the module docstring derives the weights."""
    tokenizer = word_tokenizer(LETTERS)
    w = InductionWeights(len(tokenizer), N_CTX)
    layers = [
        [
            w.current_token(5.0, "unread", 0.3),
            w.previous_token(0.9, "unread", 0.5),
            w.previous_token(ATTENTION, "previous"),
            w.current_token(0.0, "unread", 0.3),
        ],
        [
            w.duplicate_token(4.0, "unread", 0.5),
            w.current_token(3.0, "unread", 0.3),
            w.induction(ATTENTION, "answer"),
            w.induction(ATTENTION, "unread", 0.5),
        ],
    ]
    config = {
        "n_layers": 2,
        "n_heads": 4,
        "d_model": w.d_model,
        "d_head": w.d_head,
        "d_vocab": w.n_words,
        "n_ctx": N_CTX,
        "attn_only": True,
        "normalization_type": None,
        "act_fn": "relu",
        "seed": 0,
    }
    bridge = boot_native(config, model_name="planted-induction")
    write_weights(bridge, w.space["token"], w.space["place"], GAIN * w.space["answer"], layers)
    return bridge, tokenizer


PLANTED: dict[str, Planted] = {
    "planted-induction": Planted(
        "two-layer attention-only transformer with hand-written weights: an induction circuit and six distractor heads",
        build_induction,
        PlantedCircuit(
            heads=((0, 2), (1, 2)),
            edges=(
                "embed->a0.h2<v>",
                "embed->a1.h2<q>",
                "a0.h2->a1.h2<k>",
                "embed->a1.h2<v>",
                "a1.h2->logits",
            ),
            positional_edges=("embed->a0.h2<q>", "embed->a0.h2<k>", "embed->a1.h2<k>"),
        ),
    ),
}


def circuit(name: str) -> PlantedCircuit:
    """The true circuit of a planted model, for example `circuit("planted-induction").heads`."""
    return PLANTED[name].circuit
