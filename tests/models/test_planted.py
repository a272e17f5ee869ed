import pytest
import torch

from mechinterp.models.load import load
from mechinterp.models.planted import PLANTED, circuit

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


def test_processed_and_half_precision_still_do_it(repeats):
    for options in [{"process": True}, {"dtype": "bfloat16"}]:
        model = load("planted-induction", device="cpu", **options)
        assert accuracy(model.bridge(repeats), repeats) >= 0.99, options
    assert model.dtype == torch.bfloat16
