"""The sparse step's parts against dense ones: products and their gradients, entries, and which pairs are chosen."""

import threading

import pytest
import torch
from torch import Tensor

from mechinterp.sae import kernels
from mechinterp.sae.kernels import GROUP, Entries, Everything

BATCH, FEATURES, D_IN, D_OUT = 7, 12, 5, 4


def some_entries(kept: Tensor) -> Entries:
    """The pairs of a bool `[batch feature]`."""
    return Entries.of_flat(kept.flatten().nonzero().flatten(), *kept.shape)


def scattered(batch: int = BATCH, n: int = FEATURES) -> Tensor:
    """Pairs of every kind: an empty row first, in the middle and last, a full one, a feature that is never chosen."""
    kept = torch.rand(batch, n) < 0.3
    kept[1] = True
    kept[[0, 3, batch - 1]] = False
    kept[:, 2] = False
    return kept


KEPT = {
    "scattered": scattered,
    "nothing": lambda: torch.zeros(BATCH, FEATURES, dtype=torch.bool),
    "all": lambda: torch.ones(BATCH, FEATURES, dtype=torch.bool),
    "one row": lambda: torch.rand(1, FEATURES) < 0.5,
    "one empty row": lambda: torch.zeros(1, FEATURES, dtype=torch.bool),
    "no rows": lambda: torch.zeros(0, FEATURES, dtype=torch.bool),
}


def weights(kept: Tensor, bias: bool = True, centre: bool = True):
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x = draw(len(kept), D_IN)
    return x, draw(D_IN) if centre else None, draw(FEATURES, D_IN), draw(FEATURES) if bias else None


# ---- entries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEPT)
def test_entries_say_where_they_are(kind):
    kept = KEPT[kind]()
    entries = some_entries(kept)
    rows, index = kept.nonzero(as_tuple=True)
    assert torch.equal(entries.rows, rows)
    assert torch.equal(entries.index, index)
    order, rows_then, starts = entries.by_feature
    assert torch.equal(rows_then, rows[order])
    assert torch.equal(index[order], index.sort().values)
    assert torch.equal(rows[order], kept.T.nonzero()[:, 1])
    counts = kept.sum(0)
    assert torch.equal(starts, counts.cumsum(0) - counts)


@pytest.mark.parametrize("kind", KEPT)
def test_entries_and_everything_hold_the_same(kind):
    kept = KEPT[kind]()
    entries = some_entries(kept)
    full = torch.randn(kept.shape, dtype=torch.float64) * kept
    full[full > 1.5] = 0  # chosen, but without a value
    values = full[kept]
    assert torch.equal(entries.dense(values), full)
    assert torch.equal(entries.fired(values), (full != 0).any(0))
    assert torch.equal(Everything().fired(full), (full != 0).any(0))
    torch.testing.assert_close(entries.count_by_feature(values), full.sum(0), rtol=1e-12, atol=1e-14)
    per_feature = torch.arange(FEATURES, dtype=torch.float64)
    assert torch.equal(entries.dense(values * entries.at(per_feature)), full * Everything().at(per_feature))
    for low, high in ((0, 0), (0, 3), (2, 3), (3, FEATURES), (0, FEATURES)):
        inside, part = entries.between(values, low, high)
        wide, everything = Everything().between(full, low, high)
        assert torch.equal(part.dense(inside), everything.dense(wide))
        assert torch.equal(wide, full[:, low:high])  # as a dictionary of their own
        assert part.n_features == high - low
        assert len(part.offsets) == len(kept)  # rows stay, empty or not


def test_entries_of_rows_keep_the_order_they_were_given_in():
    index = torch.tensor([[3, 1], [0, 2], [1, 3]])
    entries = Entries.of_rows(index, 4)
    assert torch.equal(entries.rows, torch.tensor([0, 0, 1, 1, 2, 2]))
    made = entries.dense(torch.tensor([1.0, 2, 3, 4, 5, 6]))
    assert made.tolist() == [[0, 2, 0, 1], [3, 0, 4, 0], [0, 5, 0, 6]]


# ---- encode and decode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("centre", [True, False], ids=["centred", "raw"])
def test_encode_equals_the_dense_product_and_its_gradients(kind, bias, centre):
    kept = KEPT[kind]()
    given = weights(kept, bias, centre)
    leaves = [one for one in given if one is not None]
    encoded = kernels.encode(*given, lambda pre: some_entries(kept))
    reference = kernels.encode(*given, lambda pre: None)
    assert not encoded.pre.requires_grad
    assert torch.equal(encoded.values, reference.values[kept])
    up = torch.randn_like(encoded.values)
    made = torch.autograd.grad((encoded.values * up).sum(), leaves)
    wanted = torch.autograd.grad((reference.values[kept] * up).sum(), leaves)
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KEPT)
def test_decode_equals_the_dense_product_and_its_gradients(kind):
    kept = KEPT[kind]()
    entries = some_entries(kept)
    values = torch.randn(int(kept.sum()), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(FEATURES, D_OUT, dtype=torch.float64, requires_grad=True)
    made, wanted = entries.decode(values, weight), entries.dense(values) @ weight
    torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)
    up = torch.randn_like(made)
    ours = torch.autograd.grad((made * up).sum(), (values, weight))
    plain = torch.autograd.grad((wanted * up).sum(), (values, weight))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["scattered", "one row", "nothing"])
def test_gradcheck(kind):
    kept = KEPT[kind]()
    entries = some_entries(kept)

    def encode(x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.encode(x, centre, weight, bias, lambda pre: some_entries(kept)).values

    assert torch.autograd.gradcheck(encode, weights(kept))
    values = torch.randn(int(kept.sum()), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(FEATURES, D_OUT, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: entries.decode(v, w), (values, weight))


def test_gradients_that_come_from_an_expanded_number():
    """`sum().backward()` hands down a gradient of stride 0."""
    kept = scattered()
    given = weights(kept)
    encoded = kernels.encode(*given, lambda pre: some_entries(kept))
    weight = torch.randn(FEATURES, D_OUT, dtype=torch.float64, requires_grad=True)
    encoded.selection.decode(encoded.values, weight).sum().backward()
    assert given[2].grad is not None and bool((given[2].grad[2] == 0).all())
    torch.testing.assert_close(weight.grad, encoded.selection.dense(encoded.values).sum(0)[:, None].expand(-1, D_OUT))


# ---- the k largest of a row ----------------------------------------------------------------------------------------

SHAPES = [(8 * GROUP, 4), (8 * GROUP, 3), (8 * GROUP, 5), (8 * GROUP, 8), (8 * GROUP + 3, 4), (GROUP, 1), (40, 40),
          (2 * GROUP, 1), (2 * GROUP, 2 * GROUP), (64 * GROUP, 32), (5, 1)]  # fmt: skip


@pytest.mark.parametrize(("n", "k"), SHAPES, ids=[f"{k} of {n}" for n, k in SHAPES])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "in one group", "negative"])
def test_top_k_is_exact(n, k, kind):
    pre = torch.randn(9, n)
    if kind == "ties":
        pre = (pre * 2).round()
    if kind == "equal":
        pre = torch.zeros(9, n)
    if kind == "in one group" and n % GROUP == 0:  # the largest are all members of group 0
        pre[:, :: n // GROUP] += 100
    if kind == "negative":
        pre = -pre.abs() - 1
    entries = kernels.top_k(pre, k)
    index = entries.index.view(9, k)
    assert all(len(set(row)) == k for row in index.tolist())  # no pair twice
    found = pre.gather(1, index).sort(descending=True).values
    assert torch.equal(found, pre.sort(descending=True).values[:, :k])
    assert torch.equal(entries.offsets, torch.arange(9) * k)


def test_the_quick_top_k_is_the_one_that_is_tested(monkeypatch):
    """Two calls of topk on fewer numbers, or one on all: where groups would not pay, there are none."""
    asked = []
    plain = Tensor.topk

    def count(self, *args, **more):
        asked.append(self.shape[1])
        return plain(self, *args, **more)

    monkeypatch.setattr(Tensor, "topk", count)
    kernels.top_k(torch.randn(3, 8 * GROUP), 4)
    assert asked == [8, 4 * GROUP]
    asked.clear()
    kernels.top_k(torch.randn(3, 8 * GROUP), 5)
    kernels.top_k(torch.randn(3, 8 * GROUP + 1), 4)
    assert asked == [8 * GROUP, 8 * GROUP + 1]


# ---- above a bound -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_feature", [True, False])
def test_above(per_feature, monkeypatch):
    pre = torch.randn(30, 20)
    bound = torch.linspace(1, 3, 20) if per_feature else torch.tensor(2.0)
    entries = kernels.above(pre, bound)
    assert entries is not None
    assert torch.equal(entries.dense(torch.ones(len(entries.index))).bool(), pre > bound)


@pytest.mark.parametrize(("n", "sparse"), [(0, True), (5, True), (6, False), (100, False)])
def test_above_turns_dense_past_its_share(n, sparse):
    pre = torch.zeros(10, 10)
    pre.view(-1)[torch.randperm(100)[:n]] = 1
    chosen = kernels.above(pre, torch.tensor(0.0))
    assert (chosen is not None) == sparse  # DENSE is .05
    if chosen is not None:
        assert len(chosen.index) == n


def test_a_value_at_the_bound_is_not_above_it():
    pre = torch.tensor([[0.0, 1.0, -1.0] + [-1.0] * 40])
    chosen = kernels.above(pre, torch.tensor(1.0))
    assert chosen is not None and len(chosen.index) == 0


# ---- the n largest of a batch --------------------------------------------------------------------------------------


def true_values(pre: Tensor, n: int) -> Tensor:
    """The n largest positive values, ascending."""
    flat = pre.flatten()
    return flat[flat > 0].sort(descending=True).values[:n].flip(0)


@pytest.mark.parametrize("n", [1, 7, 60, 200, 1000])
@pytest.mark.parametrize("last", [0.0, 0.01, 1.0, 1.5, 50.0], ids=["none", "low", "good", "high", "far too high"])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_batch_top_k_is_exact(n, last, kind):
    pre = torch.randn(20, 40)  # about 400 positive
    if kind == "ties":
        pre = (pre * 3).round() / 3
    entries, smallest = kernels.batch_top_k(pre, n, last)
    found = pre[entries.rows, entries.index]
    wanted = true_values(pre, n)
    assert torch.equal(found.sort().values, wanted)
    assert len(set(zip(entries.rows.tolist(), entries.index.tolist(), strict=True))) == len(wanted)
    assert smallest == float(wanted[0])
    assert bool((entries.rows.diff() >= 0).all())


def test_batch_top_k_of_nothing_positive():
    entries, smallest = kernels.batch_top_k(-torch.rand(4, 6), 5, 0.7)
    assert (len(entries.index), smallest) == (0, 0.0)
    assert len(entries.offsets) == 4


def together(parts: list[Tensor], n: int, last: float) -> list[tuple[Entries, float]]:
    """What processes choose that wait for each other's values: threads at a barrier."""
    held: list[Tensor] = [torch.empty(0)] * len(parts)
    barrier = threading.Barrier(len(parts), timeout=20)
    made: list = [None] * len(parts)

    def work(rank: int) -> None:
        def gather(values: Tensor) -> Tensor:
            held[rank] = values
            barrier.wait()
            everyone = torch.cat(held)
            barrier.wait()
            return everyone

        made[rank] = kernels.batch_top_k(parts[rank], n, last, gather)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return made


@pytest.mark.parametrize("last", [0.0, 0.8, 50.0])
@pytest.mark.parametrize("n", [1, 40, 100, 2000])
@pytest.mark.parametrize("kind", ["alike", "one has all", "nothing"])
def test_processes_choose_what_one_would(n, last, kind):
    pre = torch.randn(24, 30)
    if kind == "one has all":
        pre[:12] -= 20
    if kind == "nothing":
        pre = -pre.abs()
    alone, smallest = kernels.batch_top_k(pre, n, last)
    first, second = together([pre[:12], pre[12:]], n, last)
    assert first[1] == second[1] == smallest
    assert torch.equal(torch.cat([first[0].rows, second[0].rows + 12]), alone.rows)
    assert torch.equal(torch.cat([first[0].index, second[0].index]), alone.index)


def test_processes_keep_all_equal_values_at_the_threshold():
    pre = torch.ones(4, 5)
    first, second = together([pre[:2], pre[2:]], 3, 0.0)
    assert len(first[0].index) == len(second[0].index) == 10
    assert first[1] == second[1] == 1.0
