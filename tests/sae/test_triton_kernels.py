"""The Triton kernels against sums in float64: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen by an environment variable before Triton is imported, hence in a process of its own
(`test_in_the_interpreter`). It shows that the kernels compute the right sums, not that they are fast, nor that a GPU
gives the same bits twice.
"""

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mechinterp.sae import kernels

WITH_TRITON, WITH_CUDA = find_spec("triton") is not None, torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if WITH_CUDA and not INTERPRETED else "cpu"
NO_TRITON = "the kernels need Triton, which is not installed (pip install triton, on Linux)"

needs_triton = pytest.mark.skipif(not WITH_TRITON, reason=NO_TRITON)
kernel_test = pytest.mark.skipif(
    not WITH_TRITON or not (WITH_CUDA or INTERPRETED),
    reason="without a GPU, test_in_the_interpreter runs these tests" if WITH_TRITON else NO_TRITON,
)
not_again = pytest.mark.skipif(INTERPRETED, reason="the process that started this one runs it")
SIZES = pytest.mark.parametrize(
    ("d", "integers"),
    [(1, torch.int32), (10, torch.int64), (10, torch.int32), (576, torch.int64), (768, torch.int32)],
    ids=["1-int32", "10-int64", "10-int32", "576-int64", "768-int32"],
)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Empty bags at both ends and in between, chunks that are just full, and one bag of many chunks.
LENGTHS = (0, 1, 3, 0, 128, 129, 391, 2, 0, 0, 256, 40, 0)


def triton_kernels():
    from mechinterp.sae import triton_kernels

    return triton_kernels


def offsets_of(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)[:-1].to(DEVICE)


def bags(lengths=LENGTHS, rows: int = 50, d: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = sum(lengths)
    index = torch.randint(rows, (n,), device=DEVICE)
    return torch.randn(rows, d, device=DEVICE), index, offsets_of(lengths), torch.randn(n, device=DEVICE)


def exact_bag(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(index)])])
    owner = torch.repeat_interleave(torch.arange(len(offsets), device=table.device), ends - offsets)
    terms = table.double()[index.long()] * weights.double()[:, None]
    return terms.new_zeros(len(offsets), table.shape[1]).index_add_(0, owner, terms)


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max())


@kernel_test
@SIZES
def test_bag_is_the_weighted_sum(d, integers) -> None:
    table, index, offsets, weights = bags(d=d)
    found = triton_kernels().bag(table, index.to(integers), offsets.to(integers), weights)
    assert found.shape == (len(LENGTHS), d) and found.dtype == torch.float32
    assert distance(found, exact_bag(table, index, offsets, weights)) < 2e-6
    assert not found[torch.tensor(LENGTHS, device=DEVICE) == 0].any()


@kernel_test
@pytest.mark.parametrize("seed", range(2))
def test_every_entry_counts_once_however_bags_lie_in_chunks(monkeypatch, seed) -> None:
    """Small chunks, so that all the ways occur in which bags and windows can lie; whole numbers are summed exactly."""
    monkeypatch.setattr(triton_kernels(), "CHUNK", 4)
    monkeypatch.setattr(triton_kernels(), "TILE", 2)
    generator = random.Random(seed)
    for longest in (1, 4, 5, 9, 40):
        lengths = [generator.randint(0, longest) for _ in range(12)]
        _, index, offsets, _ = bags(lengths)
        table = torch.randint(-9, 10, (50, 3), device=DEVICE).float()
        weights = torch.randint(-9, 10, (len(index),), device=DEVICE).float()
        found = triton_kernels().bag(table, index, offsets, weights)
        assert torch.equal(found.double(), exact_bag(table, index, offsets, weights)), lengths


@kernel_test
def test_bag_gives_the_same_bits_whatever_is_beside_it() -> None:
    table, index, offsets, weights = bags(d=20)
    all_of_them = triton_kernels().bag(table, index, offsets, weights)
    assert torch.equal(all_of_them, triton_kernels().bag(table, index, offsets, weights))
    for number, (start, length) in enumerate(zip(offsets.tolist(), LENGTHS, strict=True)):
        part = slice(start, start + length)
        alone = triton_kernels().bag(table, index[part], offsets[:1], weights[part])
        assert torch.equal(alone[0], all_of_them[number])


@kernel_test
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(name) -> None:
    dtype = TYPES[name]
    table, index, offsets, weights = bags()
    found = triton_kernels().bag(table.to(dtype), index, offsets, weights)
    assert found.dtype == dtype
    assert nearly_all_equal(found, exact_bag(table.to(dtype), index, offsets, weights).to(dtype))
    x, rows = torch.randn(50, 10, device=DEVICE).to(dtype), torch.randint(50, index.shape, device=DEVICE)
    dots = triton_kernels().products(table.to(dtype), x, index, rows)
    assert dots.dtype == dtype
    assert nearly_all_equal(dots, (table.to(dtype).double()[index] * x.double()[rows]).sum(1).to(dtype))


def nearly_all_equal(found: Tensor, rounded: Tensor) -> bool:
    """Sums in float32 are rounded to another number only where the exact sum lies between two of them."""
    return float((found == rounded).double().mean()) > 0.98


@kernel_test
@SIZES
def test_products_are_dot_products(d, integers) -> None:
    weight, index, _, _ = bags((101,), d=d)
    x, rows, _, _ = bags((101,), rows=7, d=d)
    found = triton_kernels().products(weight, x, index.to(integers), rows.to(integers))
    assert found.dtype == torch.float32
    assert distance(found, (weight.double()[index] * x.double()[rows]).sum(1)) < 2e-6


@kernel_test
def test_nothing_to_sum() -> None:
    table, index, _, weights = bags((0,))
    assert triton_kernels().bag(table, index, offsets_of((0, 0, 0)), weights).tolist() == [[0.0] * 10] * 3
    assert triton_kernels().bag(table, index, offsets_of((0,))[:0], weights).shape == (0, 10)
    assert triton_kernels().products(table, table, index, index).shape == (0,)


@kernel_test
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_a_table_of_more_than_2_to_the_31_numbers(integers) -> None:
    """4 GiB are asked for, and on a CPU hardly any of it is touched."""
    rows, d = 2**28 + 8, 8
    try:
        table = torch.empty(rows, d, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no memory for the table: {error}")
    first = torch.arange(8.0, device=DEVICE)
    table[-1], table[0] = first + 1, -first
    index = torch.tensor([rows - 1, rows - 1], dtype=integers, device=DEVICE)
    weights = torch.tensor([1.0, 2.0], device=DEVICE)
    assert torch.equal(triton_kernels().bag(table, index, offsets_of((2,)), weights)[0].float(), 3 * (first + 1))
    dots = triton_kernels().products(table, torch.ones(1, 8, device=DEVICE), index, torch.zeros_like(index))
    assert dots.tolist() == [36.0, 36.0]


@kernel_test
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
def test_entries_give_what_they_give_without_triton(monkeypatch, skewed) -> None:
    """Values and gradients of a decoder, on a dense feature or none."""
    batch, k, n_features, d = 140, 3, 20, 12
    pre = torch.randn(batch, n_features, device=DEVICE)
    if skewed:
        pre[:, 7] += 100
    entries = kernels.top_k(pre, k)
    weight, target = torch.randn(n_features, d, device=DEVICE), torch.randn(batch, d, device=DEVICE)
    values = torch.randn(batch * k, device=DEVICE)
    results = []
    for answer in (True, False):
        monkeypatch.setattr(kernels, "_use_triton", lambda tensor, answer=answer: answer)
        inputs = values.clone().requires_grad_(), weight.clone().requires_grad_()
        made = entries.decode(*inputs)
        results.append([made.detach(), *torch.autograd.grad((made - target).square().sum(), inputs)])
    for with_triton, without in zip(*results, strict=True):
        assert distance(with_triton, without) < 1e-5


@needs_triton
@not_again
@pytest.mark.skipif(WITH_CUDA, reason="the kernels are tested on the GPU")
def test_in_the_interpreter() -> None:
    names = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__))]
    done = subprocess.run(
        command,
        env=names | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# ---- where the kernels are not used --------------------------------------------------------------------------------


@not_again
@pytest.mark.parametrize(
    ("device", "dtype", "used"),
    [("cuda", name, True) for name in TYPES] + [("cuda", "float64", False), ("cpu", "float32", False)],
)
def test_triton_is_used_on_cuda_for_types_that_it_knows(monkeypatch, device, dtype, used) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: name == "triton")
    with FakeTensorMode():
        assert kernels._use_triton(torch.empty(2, 3, device=device, dtype=getattr(torch, dtype))) is used


@not_again
def test_cuda_without_triton_uses_torch(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed: importing it raises
    with FakeTensorMode():
        table = torch.empty(5, 3, device="cuda")
        assert not kernels._use_triton(table)


@not_again
def test_the_package_is_imported_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import mechinterp.sae.kernels as k, torch; "
    code += "print(k.top_k(torch.eye(4), 1).decode(torch.ones(4), torch.eye(4)).sum().item())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "4.0", done.stdout + done.stderr
