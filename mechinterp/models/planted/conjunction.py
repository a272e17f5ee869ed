"""`planted-and`: says which word was said twice in a row, or `-` if none was. An MLP computes the AND.

`c d k k f g` -> `k`. The two facts are found by two heads of one layer; what heads add to the residual stream adds up,
and "both" is no sum. Its construction, in the words of `weights`:

1. Word spaces: `first` and `second` (the words one and two places back), `doubled`, `found`, `answer`, `unread`.
2. L0H1 looks one place back and copies the word into `first`; L0H2 looks two places back and copies it into `second`,
   both with a weight of .95.
3. The MLP of layer 0 is an AND gate: relu(first + second - 1.1) / .8 a word, into `doubled`. One word of weight .95 and
   what leaks of it into the other space (at most .05) stay below 1.1, so a single fact opens nothing, exactly; both
   give .95 + .95 - 1.1 = .8, or with leaks .85. At places 0 and 1 nothing stands two places back and the heads average
   over what there is: the gate reads these places as -1 and stays shut.
4. L1H3 finds the position where the gate opened. Query: a constant. Key: the sum of `doubled` over words. Its OV copies
   `doubled` into `found`. Where nothing was doubled it rests on place 0, and copies nothing.
5. The MLP of layer 1 reads out: relu(found - .1) / .85 a word, into `answer`. It takes away what attention leaks, so
   that the answer is there or exactly absent. Its b_out is the logit of `-`, half of a found word's.
6. Distractors, all of them writing into `unread`: L0H0 attends to the current token, L0H3 one place back, as L0H1 does;
   the first MLP has neurons for "this word and the one before are equal"; L1H0 finds duplicate tokens, L1H1 and L1H2
   attend as L1H3 does, L1H1 copying the words and L1H2 what was doubled; the second MLP has neurons on `found`.

Types of the edges, where the corrupted prompt has two other, different words in place of the doubled one
(`tasks.planted.doubled_word`), so that neither fact holds:

- AND: either fact alone leaves the gate shut. So `a0.h1->m0` and `a0.h2->m0`, and `embed->a0.h1<v>` and
  `embed->a0.h2<v>`, each of which feeds one fact only.
- AND: the key from the gate without its value moves zeros; the value without the key moves 1 / 32 of a word, which the
  readout takes away. So `m0->a1.h3<k>` and `m0->a1.h3<v>` (the node m0 as a whole would be serial).
- serial: what follows, `a1.h3->m1` and `m1->logits`.

What a gradient sees: in the clean run both gates are open and the softmax is not saturated, so every edge has one. In
the corrupted run both gates are shut, and only `m1->logits` has one. On the straight line of the embeddings between the
two, the gate of layer 0 opens after six tenths of the way and the readout after three quarters: integrated gradients
see the circuit from there on, one of five midpoint steps.
"""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from mechinterp.models.planted.circuit import PlantedCircuit
from mechinterp.models.planted.weights import ATTENTION, Layer, Residual, build, word_tokenizer

NONE = "-"
WORDS = (*"abcdefghijklmnopqrstuvwxyz", NONE)
N_CTX = 32
CIRCUIT = PlantedCircuit(
    heads=((0, 1), (0, 2), (1, 3)),
    serial=("a1.h3->m1", "m1->logits"),
    and_edges=(
        "embed->a0.h1<v>",
        "embed->a0.h2<v>",
        "a0.h1->m0",
        "a0.h2->m0",
        "m0->a1.h3<k>",
        "m0->a1.h3<v>",
    ),
    positional_edges=(
        "embed->a0.h1<q>",
        "embed->a0.h1<k>",
        "embed->a0.h2<q>",
        "embed->a0.h2<k>",
        "embed->m0",
        "embed->a1.h3<q>",
        "embed->a1.h3<k>",
    ),
)


def build_and() -> tuple[TransformerBridge, PreTrainedTokenizerFast]:
    """2 layers, 4 heads, MLPs, 26 letters and `-`, 32 positions; the module docstring derives the weights."""
    tokenizer = word_tokenizer(WORDS, N_CTX)
    w = Residual(len(tokenizer), N_CTX, ("first", "second", "doubled", "found", "answer", "unread"))
    both = w.gate(("first", "second"), 1.1, "doubled", 1 / 0.8, shut_before=2)
    readout = w.gate(("found",), 0.1, "answer", 1 / 0.85) + w.always(WORDS.index(NONE), "answer", 0.5)
    q = w.space["place"].sum(0)[:, None] @ w.word[:1]
    k = w.space["doubled"].sum(0)[:, None] @ w.word[:1]
    layers = [
        Layer(
            [
                w.current_token(5.0, "unread", 0.3),
                w.earlier_token(1, ATTENTION, "first"),
                w.earlier_token(2, ATTENTION, "second"),
                w.earlier_token(1, 0.9, "unread", 0.5),
            ],
            both + w.gate(("token", "first"), 1.1, "unread"),
        ),
        Layer(
            [
                w.duplicate_token(4.0, "unread", 0.5),
                w.search(q, k, w.copy("unread")),
                w.search(q, k, w.copy("unread", 0.5, source="doubled")),
                w.search(q, k, w.copy("found", source="doubled")),
            ],
            readout + w.gate(("found",), 0.1, "unread"),
        ),
    ]
    return build("planted-and", w, tokenizer, layers)
