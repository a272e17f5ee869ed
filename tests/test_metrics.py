"""Each metric against its formula by hand, and a plain function in the place of one."""

import math

import pytest
import torch

from mechinterp import UserError, evaluate
from mechinterp.metrics import KL, METRICS, Function, LogitDiff, LogProb, Prob, Rank, SeqLogProb, as_metric
from mechinterp.patching import sweep
from mechinterp.tasks.pairs import Answers, Target
from tests.families import full_logits, model, pairs

VOCABULARY = 9
# Two prompts; the second asks at two positions, with weighted answers.
TARGETS = [
    [Target(4, {3: 1.0}, {5: 1.0})],
    [Target(2, {1: 3.0, 2: 1.0}, {7: 1.0}), Target(4, {0: 1.0}, {8: 1.0, 4: 4.0})],
]


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(0)
    logits, clean = (3 * torch.randn(2, 5, VOCABULARY, generator=draw) for _ in range(2))
    return Answers.build(TARGETS), logits, clean


def at(logits, i, target):
    return logits[i, target.pos].double()


def by_hand(formula, logits, combine=lambda values: sum(values) / len(values)):
    return [combine([formula(at(logits, i, t), t) for t in row]) for i, row in enumerate(TARGETS)]


def share(tokens):
    return {token: weight / sum(tokens.values()) for token, weight in tokens.items()}


def probability(row, token):
    return math.exp(float(row[token])) / sum(math.exp(float(x)) for x in row)


FORMULAS = {
    LogitDiff(): lambda row, t: (
        sum(w * float(row[a]) for a, w in share(t.answer).items())
        - sum(w * float(row[a]) for a, w in share(t.wrong).items())
    ),
    Prob(): lambda row, t: sum(probability(row, a) for a in t.answer),
    LogProb(): lambda row, t: sum(w * math.log(probability(row, a)) for a, w in share(t.answer).items()),
    Rank(): lambda row, t: float(sum(float(x) > max(float(row[a]) for a in t.answer) for x in row)),
}


def read(metric, answers, logits):
    columns = metric.columns(answers)
    picked = torch.stack([logits[i, answers.pos[i]] for i in range(2)])
    return picked if columns is None else picked.gather(-1, columns)


@pytest.mark.parametrize("metric", FORMULAS, ids=lambda metric: metric.name)
def test_a_metric_is_its_formula(metric, case):
    answers, logits, _ = case
    got = metric(read(metric, answers, logits), answers)
    assert got.tolist() == pytest.approx(by_hand(FORMULAS[metric], logits), rel=1e-5)


def test_seq_logprob_is_the_sum_over_its_tokens(case):
    answers, logits, _ = case
    got = SeqLogProb()(read(SeqLogProb(), answers, logits), answers)
    assert got.tolist() == pytest.approx(by_hand(FORMULAS[LogProb()], logits, sum), rel=1e-5)


def test_kl_is_its_formula_and_nothing_from_itself(case):
    answers, logits, clean = case

    def divergence(i, t):
        p, q = at(clean, i, t), at(logits, i, t)
        return sum(
            probability(p, k) * (math.log(probability(p, k)) - math.log(probability(q, k))) for k in range(VOCABULARY)
        )

    want = [sum(divergence(i, t) for t in row) / len(row) for i, row in enumerate(TARGETS)]
    ours, theirs = read(KL(), answers, logits), read(KL(), answers, clean)
    assert KL()(ours, answers, theirs).tolist() == pytest.approx(want, rel=1e-4)
    assert min(want) > 0.1 and KL()(ours, answers, ours).tolist() == [0, 0]


def test_kl_of_the_clean_run_is_nothing():
    of = model("llama")
    task = pairs(of, True)
    assert (evaluate(of, task, "kl") == 0).all()
    assert (evaluate(of, task, "kl", side="corrupted") > 1e-3).all()


def test_a_likelier_answer_is_a_better_one():
    """`higher_is_better` says in which direction."""
    answers = Answers.build([[Target(0, {1: 1.0}, {2: 1.0})]])
    worse, better = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 5, 0, 0]]])
    worse[0, 0, 3] = 1.0
    for name, made in METRICS.items():
        metric = made()
        columns = metric.columns(answers)
        low, high = (x if columns is None else x.gather(-1, columns) for x in (worse, better))
        gain = float(metric(high, answers, better) - metric(low, answers, better))
        assert (gain > 0) == metric.higher_is_better, name


@pytest.mark.parametrize("name", ["prob", "logprob", "rank", "kl"])
def test_pairs_without_a_wrong_answer(name):
    of = model("gpt2")
    task = pairs(of, False)
    alone = type(task)(**{**vars(task), "answers": Answers.build([[Target(7, {3: 1.0}, {})]] * 4)})
    assert evaluate(of, alone, name).isfinite().all()
    with pytest.raises(UserError, match="logit-diff needs a wrong answer for every pair"):
        evaluate(of, alone)


def test_names():
    assert as_metric(None) == LogitDiff() and as_metric("prob") == Prob() and as_metric(Rank()) == Rank()
    with pytest.raises(UserError, match="unknown metric 'logitdiff'; valid: logit-diff, prob"):
        as_metric("logitdiff")


def plain_logit_diff(task):
    """A function as a user writes it: it knows each prompt's answer by its number."""
    answer, wrong = task.answers.answer[:, 0, 0], task.answers.wrong[:, 0, 0]

    def metric(logits):
        rows = torch.arange(len(logits))
        return logits[rows, -1, answer] - logits[rows, -1, wrong]

    return metric


@pytest.mark.parametrize("side", ["clean", "corrupted"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_a_plain_function_is_evaluated_on_all_logits(side, padded):
    of = model("llama")
    task = pairs(of, padded)
    got = evaluate(of, task, plain_logit_diff(task), side)
    assert torch.allclose(got, evaluate(of, task, side=side), atol=1e-4)
    prompts = task.clean if side == "clean" else task.corrupted
    assert torch.allclose(got, plain_logit_diff(task)(full_logits(of, prompts, [])), atol=1e-4)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("positions", ["roles", "all"])
def test_a_sweep_with_a_plain_function_is_that_with_the_metric(direction, positions):
    of = model("llama")
    task = pairs(of, True, n=5)
    ours, theirs = (
        sweep(of, task, "z", positions, direction, metric, force=True, progress=False).data
        for metric in (plain_logit_diff(task), LogitDiff())
    )
    assert abs(ours["patched"] - theirs["patched"]).max() < 1e-4
    assert abs(theirs["patched"] - theirs["base"]).max() > 0.1


def test_a_function_of_the_wrong_shape():
    of = model("gpt2")
    with pytest.raises(UserError, match=r"a metric gives \[batch\], here \(4,\); found \(4, 8\)"):
        evaluate(of, pairs(of, False), lambda logits: logits[..., 0])
    assert Function(lambda logits: logits[:, -1, 0]).name == "function"


def test_an_unknown_side():
    with pytest.raises(UserError, match="unknown side 'dirty'"):
        evaluate(model("gpt2"), pairs(model("gpt2"), False), side="dirty")
