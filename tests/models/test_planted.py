import pytest
import torch

from mechinterp.identities import check
from mechinterp.models.load import load, local_names
from mechinterp.models.planted import PLANTED, circuit
from mechinterp.models.planted.weights import ATTENTION, Layer, Residual, build, word_tokenizer
from mechinterp.tasks.planted import task_of

HALF = 24
HEADS = [(layer, head) for layer in range(2) for head in range(4)]


@pytest.fixture(scope="module")
def model():
    return load("planted-induction", device="cpu")


@pytest.fixture(scope="module")
def repeats():
    """24 distinct words, twice: [batch pos]."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(52, generator=generator)[:HALF].repeat(2) for _ in range(32)])


def accuracy(logits, tokens):
    return (logits[:, HALF:-1].argmax(-1) == tokens[:, HALF + 1 :]).float().mean().item()


def without(model, tokens, layer, head):
    def zero(z, hook):
        z = z.clone()
        z[:, :, head] = 0
        return z

    return model.bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)])


def test_it_does_induction(model, repeats):
    logits = model.bridge(repeats)
    assert accuracy(logits, repeats) >= 0.99
    answer = logits[:, HALF:-1].softmax(-1).gather(-1, repeats[:, HALF + 1 :, None])
    assert answer.min() > 0.9


@pytest.mark.parametrize("first, second", [(0, 2), (0, 63), (3, 40), (61, 63)])
def test_it_does_induction_at_every_distance(model, first, second):
    """A B ... A -> B where the first A stands at `first` and the second at `second`, with a full context at most."""
    others = torch.randperm(51).repeat(2)[: second + 1]
    tokens = others[None].clone()
    tokens[0, [first, second]] = 51
    assert model.bridge(tokens)[0, -1].argmax() == tokens[0, first + 1]


def test_attention_of_the_circuit_is_bounded(model, repeats):
    """Largest weight .9-.99, so that gradients through the softmax live."""
    _, cache = model.bridge.run_with_cache(repeats, names_filter=lambda name: name.endswith("hook_pattern"))
    previous = cache["blocks.0.attn.hook_pattern"][:, 2]
    torch.testing.assert_close(previous[:, 1:].amax(-1), torch.full((32, 2 * HALF - 1), 0.95))
    assert (previous[:, 1:].argmax(-1) == torch.arange(2 * HALF - 1)).all()
    induction = cache["blocks.1.attn.hook_pattern"][:, 2, HALF:]
    assert (induction.argmax(-1) == torch.arange(1, HALF + 1)).all()
    assert induction.amax(-1).min() > 0.9 and induction.amax(-1).max() < 0.99


def test_exactly_the_planted_heads_matter(model, repeats):
    clean = model.bridge(repeats)
    for layer, head in HEADS:
        ablated = without(model, repeats, layer, head)
        if (layer, head) in circuit("planted-induction").heads:
            assert accuracy(ablated, repeats) < 0.1, (layer, head)
        else:
            torch.testing.assert_close(ablated, clean, msg=f"L{layer}H{head} is a distractor")


def test_distractors_do_something(model, repeats):
    """They write into the residual stream, so that finding them idle is a finding."""
    _, cache = model.bridge.run_with_cache(repeats, names_filter=lambda name: name.endswith("hook_z"))
    for layer, head in HEADS:
        w_o = model.bridge.W_O[layer, head]
        assert (cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ w_o).norm(dim=-1).min() > 0.05


def test_the_tempting_distractors_attend_like_the_circuit(model, repeats):
    _, cache = model.bridge.run_with_cache(repeats, names_filter=lambda name: name.endswith("hook_pattern"))
    for layer, real, decoy in [(0, 2, 1), (1, 2, 3)]:
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, HALF:]
        assert (pattern[:, real].argmax(-1) == pattern[:, decoy].argmax(-1)).all()


def test_edges_by_composition(model):
    """The virtual weights of steps 2-6 are where the circuit says and nowhere else."""
    bridge = model.bridge
    w_q, w_k, w_v, w_o = bridge.W_Q, bridge.W_K, bridge.W_V, bridge.W_O  # [layer head d_model d_head]

    def written(head):
        return w_v[0, head] @ w_o[0, head]

    composes = {
        (kind, source, destination)
        for kind, weight in [("q", w_q), ("k", w_k), ("v", w_v)]
        for source in range(4)
        for destination in range(4)
        if (written(source) @ weight[1, destination]).norm() > 1e-5
    }
    assert composes == {("k", 2, 2), ("k", 2, 3)}  # L1H3 is the decoy
    direct = {
        (layer, head) for layer, head in HEADS if (w_v[layer, head] @ w_o[layer, head] @ bridge.W_U).norm() > 1e-5
    }
    assert direct == {(1, 2)}


def test_gradients_live(model, repeats):
    """Attribution methods see the circuit: the loss has a gradient at both heads' queries."""
    for layer in range(2):
        seen = []

        def keep(q, hook, seen=seen):
            seen.append(q.detach().requires_grad_())
            return seen[0]

        logits = model.bridge.run_with_hooks(repeats[:4], fwd_hooks=[(f"blocks.{layer}.attn.hook_q", keep)])
        logits[:, -2].gather(-1, repeats[:4, -1:]).sum().backward()
        q_grad = seen[0].grad.reshape(4, 2 * HALF, 4, model.d_head)
        assert q_grad[:, :, 2].abs().max() > 1e-3


def test_tokenizer(model):
    tokenizer = model.tokenizer
    assert tokenizer("a b Z").input_ids == tokenizer(" a  b Z ").input_ids == [0, 1, 51]
    assert tokenizer.decode([0, 1, 51]) == "a b Z"
    assert tokenizer("a nope").input_ids[1] == tokenizer.unk_token_id
    assert tokenizer.pad_token == "<pad>" and tokenizer.bos_token is None
    assert not model.info.bos and model.info.source == "planted"


def test_registry_names_real_heads():
    for entry in PLANTED.values():
        assert all(f"a{layer}.h{head}" in " ".join(entry.circuit.edges) for layer, head in entry.circuit.heads)
        assert entry.circuit.edges == (*entry.circuit.serial, *entry.circuit.and_edges, *entry.circuit.or_edges)


def test_processed_and_half_precision_still_do_it(repeats):
    for options in [{"process": True}, {"dtype": "bfloat16"}]:
        model = load("planted-induction", device="cpu", **options)
        assert accuracy(model.bridge(repeats), repeats) >= 0.99, options
    assert model.dtype == torch.bfloat16


# Every planted model

NAMES = tuple(PLANTED)
# Head, the role at which it looks and the role that it looks at.
LOOKS = {
    "planted-induction": [((0, 2), "B1", "A1"), ((1, 2), "END", "B1")],
    "planted-and": [((0, 1), "GATE", "K2"), ((0, 2), "GATE", "K1"), ((1, 3), "END", "GATE")],
    "planted-or": [((0, 1), "B1", "A1"), ((1, 1), "END", "B1"), ((1, 2), "END", "B1")],
}
DECOYS = {  # distractor -> the head that it attends like
    "planted-induction": {(0, 1): (0, 2), (1, 3): (1, 2)},
    "planted-and": {(0, 3): (0, 1), (1, 1): (1, 3), (1, 2): (1, 3)},
    "planted-or": {(0, 0): (0, 1), (1, 0): (1, 1)},
}


def recorded(name, n=32, seed=3):
    of = load(name, device="cpu")
    pairs = task_of(name)(of, n=n, seed=seed)
    return of, pairs, of.bridge.run_with_cache(pairs.clean.tokens)[1]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_listed_and_passes_the_identities(name):
    assert [model.kind for model in local_names() if model.name == name] == ["planted"]
    measured = check(load(name, device="cpu"))
    assert [one.ok for one in measured] == [None, True, True, True, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_circuit_heads_look_where_they_should_with_a_bounded_weight(name):
    _, pairs, cache = recorded(name)
    assert {head for head, _, _ in LOOKS[name]} == set(circuit(name).heads)
    rows, at = torch.arange(len(pairs)), pairs.clean.roles
    for (layer, head), query, key in LOOKS[name]:
        weight = cache[f"blocks.{layer}.attn.hook_pattern"][rows, head, at[query]]
        assert (weight.argmax(-1) == at[key]).all(), (layer, head)
        assert weight.amax(-1).min() > 0.9 and weight.amax(-1).max() < 0.99, (layer, head)


@pytest.mark.parametrize("name", NAMES)
def test_every_distractor_writes_something(name):
    """Heads and, where there are MLPs, neurons: each writes beside the circuit, into a space that nothing reads."""
    of, _, cache = recorded(name)
    for layer in range(of.n_layers):
        for head in set(range(of.n_heads)) - {h for at, h in circuit(name).heads if at == layer}:
            out = cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ of.bridge.W_O[layer, head]
            assert out.norm(dim=-1).amax(1).min() > 0.05, (layer, head)
        if name != "planted-induction":
            unread = of.bridge.blocks[layer].mlp.W_out[:, -of.d_vocab :].abs().sum(-1) > 0
            fires = cache[f"blocks.{layer}.mlp.hook_post"][:, :, unread].sum(-1).amax(1)
            assert unread.any() and fires.min() > 0.1, layer


@pytest.mark.parametrize("name", NAMES)
def test_decoys_attend_like_the_circuit(name):
    _, pairs, cache = recorded(name)
    rows = torch.arange(len(pairs))
    for decoy, real in DECOYS[name].items():
        query = next(query for head, query, _ in LOOKS[name] if head == real)
        pattern = cache[f"blocks.{real[0]}.attn.hook_pattern"][rows, :, pairs.clean.roles[query]]
        assert (pattern[:, decoy[1]].argmax(-1) == pattern[:, real[1]].argmax(-1)).all()


@pytest.mark.parametrize(
    "name, text, answer",
    [
        ("planted-and", "c d k k f g", "k"),
        ("planted-and", "k k f g", "k"),
        ("planted-and", "a b k k", "-"),  # the gate opens behind the second k
        ("planted-and", "c k d k f g", "-"),
        ("planted-and", "c", "-"),
        ("planted-or", "- a b c a", "b"),
        ("planted-or", "- a b c d", "-"),
        ("planted-or", "- a b -", "-"),
        ("planted-or", "-", "-"),
    ],
)
@pytest.mark.parametrize("process", [False, True], ids=["raw", "processed"])
def test_what_it_says(name, text, answer, process):
    of = load(name, device="cpu", process=process)
    assert of.token_strings(of(text)[0, -1].argmax()[None]) == [answer]


def test_only_both_facts_open_the_gate_and_either_head_fills_it():
    """The neurons of the circuit, as their docstrings derive them."""
    of, pairs, cache = recorded("planted-and")
    rows, gate = torch.arange(len(pairs)), pairs.clean.roles["GATE"]
    words = pairs.answers.answer[:, 0, 0]
    opened = cache["blocks.0.mlp.hook_post"][..., : of.d_vocab]
    assert (opened > 0).sum() == len(pairs), "one neuron at one position of every prompt"
    assert (opened[rows, gate, words] > 0.79).all() and opened.max() < 0.86
    of, pairs, cache = recorded("planted-or")
    for silent in (None, 1, 2):

        def silence(z, hook, silent=silent):
            if silent is not None:
                z[:, :, silent] = 0
            return z

        logits = of.bridge.run_with_hooks(pairs.clean.tokens, fwd_hooks=[("blocks.1.attn.hook_z", silence)])
        assert (logits[rows, -1, pairs.answers.answer[:, 0, 0]] == 8).all(), silent


@pytest.mark.parametrize(
    "name, flat_at, live_at", [("planted-and", [0, 0.5], [0.9, 1]), ("planted-or", [0, 0.1, 0.5, 1], [0.3, 0.4])]
)
def test_where_on_the_way_from_corrupted_to_clean_a_gradient_lives(name, flat_at, live_at):
    """What integrated gradients meet: with five midpoint steps one is live on either model, the clean point on one."""
    of, pairs, _ = recorded(name, n=8)
    rows, answers = torch.arange(8), pairs.answers
    corrupted, clean = (of.bridge.W_E[prompts.tokens] for prompts in (pairs.corrupted, pairs.clean))
    for share in [*flat_at, *live_at]:
        embed = (corrupted + share * (clean - corrupted)).requires_grad_()
        logits = of.bridge.run_with_hooks(
            pairs.clean.tokens, fwd_hooks=[("hook_embed", lambda value, hook, embed=embed: embed)]
        )[rows, -1]
        (logits[rows, answers.answer[:, 0, 0]] - logits[rows, answers.wrong[:, 0, 0]]).sum().backward()
        slope = (embed.grad * (clean - corrupted)).sum((1, 2))
        assert (slope == 0).all() if share in flat_at else (slope > 10).all(), share


def test_heads_of_one_group_must_share_keys_and_values():
    tokenizer = word_tokenizer(("a", "b"), 8)
    w = Residual(len(tokenizer), 8, ("answer",))
    heads = [w.earlier_token(1, ATTENTION, "answer"), w.duplicate_token(4.0, "answer", 1.0)]
    with pytest.raises(AssertionError, match="head 1 differs from its group"):
        build("x", w, tokenizer, [Layer(heads)], n_kv_heads=1)
