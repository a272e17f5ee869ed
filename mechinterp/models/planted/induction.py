"""`planted-induction`: two layers of attention that continue `A B ... A` with `B`; all of its edges are serial.

After Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and Olsson et al. 2022, "In-context
Learning and Induction Heads". Its construction:

1. Word spaces: `previous` (the word before this one), `answer` (what the unembedding reads) and `unread`, which neither
   a circuit head nor the unembedding ever reads.
2. L0H2, the previous-token head, looks one place back with a weight of exactly .95 at every position but the first. Its
   OV copies `token` into `previous`.
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

Types of the edges. A head's output is there if query, key and value are. Between prompts of other words
(`tasks.planted.other_tokens`) all three differ, and the wrong answer is the corrupted prompt's own: either run loses
its answer when a single one of the five edges is exchanged, so that all are serial. `tasks.induction` keeps the last
word, and the words at B and D: there only the path through the keys differs, and `embed->a1.h2<q>` and
`embed->a1.h2<v>` have no effect.
"""

from __future__ import annotations

import math

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from mechinterp.models.planted.circuit import PlantedCircuit
from mechinterp.models.planted.weights import ATTENTION, Head, Layer, Residual, build, word_tokenizer

LETTERS = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
N_CTX = 64
CIRCUIT = PlantedCircuit(
    heads=((0, 2), (1, 2)),
    serial=(
        "embed->a0.h2<v>",
        "embed->a1.h2<q>",
        "a0.h2->a1.h2<k>",
        "embed->a1.h2<v>",
        "a1.h2->logits",
    ),
    positional_edges=("embed->a0.h2<q>", "embed->a0.h2<k>", "embed->a1.h2<k>"),
)


def build_induction() -> tuple[TransformerBridge, PreTrainedTokenizerFast]:
    """2 layers, 4 heads, 52 letters, 64 positions; the module docstring derives the weights."""
    tokenizer = word_tokenizer(LETTERS, N_CTX)
    w = Residual(len(tokenizer), N_CTX, ("previous", "answer", "unread"))
    layers = [
        Layer(
            [
                w.current_token(5.0, "unread", 0.3),
                w.earlier_token(1, 0.9, "unread", 0.5),
                w.earlier_token(1, ATTENTION, "previous"),
                w.current_token(0.0, "unread", 0.3),
            ]
        ),
        Layer(
            [
                w.duplicate_token(4.0, "unread", 0.5),
                w.current_token(3.0, "unread", 0.3),
                induction(w, "answer"),
                induction(w, "unread", 0.5),
            ]
        ),
    ]
    return build("planted-induction", w, tokenizer, layers)


def induction(w: Residual, space: str, gain: float = 1.0) -> Head:
    """Steps 3-5: attends to where the word before is the current word, rests on its own position."""
    match = math.log(w.n_ctx * ATTENTION / (1 - ATTENTION))
    rest = torch.log(w.n_ctx + 1 - w.position)
    first = w.space["place"][:1].T @ w.word.sum(0, keepdim=True)
    q = match * w.words_from("token") + w.places(rest)
    k = w.words_from("previous") - first + w.places(torch.ones(w.n_ctx))
    return Head(q, k, *w.copy(space, gain))
