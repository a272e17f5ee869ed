"""`planted-or`: induction with a backup head, under grouped-query attention; either of two heads suffices.

`- ... A B ... A` -> `B`, or `-` if the last word is new. Prompts begin with `-`. 4 heads share 2 key/value heads: L*H0
and L*H1 read group 0, L*H2 and L*H3 group 1. Its construction, in the words of `weights`:

1. Word spaces: `previous` (the word before this one), `found`, `answer`, `unread`.
2. L0H1 looks one place back with a weight of .95 and copies the word into `previous`.
3. L1H1 and L1H2, in different groups, are induction heads both. Query: the current word. Key at j: the word before j,
   from `previous`. Both copy `token` at j into `found`. Without a match they rest on place 0, whose word is `-`; values
   leave `-` out. (Place 0 has no word before it and claims to follow itself; so a second `-` rests there, too.)
4. The MLP of layer 1 is an OR gate: 2 relu(found - .25) - 2 relu(found - .75) a word, into `answer`. It is 0 up to .25
   and 1 from .75 on, without rounding, as its numbers are sums of powers of two. One head gives .95, both give 1.9:
   either way the gate is full. Words that attention leaks, at most 2 / 32 each, do not open it. Its b_out is the logit
   of `-`, half of a found word's.
5. Distractors, all of them writing into `unread`: L0H0 looks one place back as L0H1 does, L0H2 attends to the current
   token, L0H3 averages over the context; the first MLP reads `token` and `previous`; L1H0 attends as L1H1 does, with
   its keys and values; L1H3, in the group of L1H2, averages over the context; the second MLP has neurons on `found`.

Types of the edges, where the corrupted prompt has a word that occurs nowhere else in place of the first A
(`tasks.planted.backup`), so that the last word is new:

- serial: `embed->a0.kv0<v>`, which both heads depend on, and `m1->logits`, behind the gate.
- OR: `a0.h1->a1.kv0<k>` and `a0.h1->a1.kv1<k>`, each of which serves one of the two heads; `a1.h1->m1` and `a1.h2->m1`.
- Queries and values of both heads carry words, but the same ones in both prompts: they are constant edges.

What a gradient sees: the gate is flat in the clean run (1.9) and in the corrupted one (0), so that at either end only
`m1->logits` has a gradient: attribution patching misses the rest, the serial edge into the gate included. On the
straight line of the embeddings between the two the gate rises where the two heads together give .25 to .75, a quarter
to a half of the way, and integrated gradients see every edge there: one of five midpoint steps.
"""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from mechinterp.models.planted.circuit import PlantedCircuit
from mechinterp.models.planted.conjunction import N_CTX, NONE, WORDS
from mechinterp.models.planted.weights import ATTENTION, Head, Layer, Residual, build, word_tokenizer

CIRCUIT = PlantedCircuit(
    heads=((0, 1), (1, 1), (1, 2)),
    serial=("embed->a0.kv0<v>", "m1->logits"),
    or_edges=("a0.h1->a1.kv0<k>", "a0.h1->a1.kv1<k>", "a1.h1->m1", "a1.h2->m1"),
    constant_edges=("embed->a1.h1<q>", "embed->a1.h2<q>", "embed->a1.kv0<v>", "embed->a1.kv1<v>"),
    positional_edges=("embed->a0.h1<q>", "embed->a0.kv0<k>", "embed->a1.kv0<k>", "embed->a1.kv1<k>"),
)


def build_or() -> tuple[TransformerBridge, PreTrainedTokenizerFast]:
    """2 layers, 4 heads in 2 groups, MLPs, 26 letters and `-`, 32 positions; the module docstring derives them."""
    tokenizer = word_tokenizer(WORDS, N_CTX)
    w = Residual(len(tokenizer), N_CTX, ("previous", "found", "answer", "unread"))
    saturating = w.gate(("found",), 0.25, "answer", 2.0) + w.gate(("found",), 0.75, "answer", -2.0)
    none = w.always(WORDS.index(NONE), "answer", 0.5)
    backup = induction(w, "found")
    layers = [
        Layer(
            [
                w.earlier_token(1, 0.9, "unread", 0.5),
                w.earlier_token(1, ATTENTION, "previous"),
                w.current_token(5.0, "unread", 0.3),
                w.current_token(0.0, "unread", 0.3),
            ],
            w.gate(("token", "previous"), 0.5, "unread"),
        ),
        Layer(
            [
                induction(w, "unread", 0.5),
                induction(w, "found"),
                backup,
                Head(torch.zeros_like(backup.q), backup.k, backup.v, induction(w, "unread", 0.3).o),
            ],
            saturating + none + w.gate(("found",), 0.25, "unread"),
        ),
    ]
    return build("planted-or", w, tokenizer, layers, n_kv_heads=2)


def induction(w: Residual, space: str, gain: float = 1.0) -> Head:
    """Step 3: attends to where the word before is the current word, rests on place 0, copies any word but `-`."""
    v, o = w.copy(space, gain)
    none = WORDS.index(NONE)
    v = v - torch.outer(w.space["token"][none], w.word[none])
    return w.search(w.words_from("token"), w.words_from("previous"), (v, o))
