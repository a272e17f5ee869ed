"""The two sums of kernels.py as Triton kernels: sums of table rows by bag, and products of two rows by entry.

Tokens × k × d_model numbers are never made: rows of a table are read where they are needed and summed in registers.

`bag`, for bags of any lengths (a dense feature has thousands of tokens, most features few):

1. Bags are cut into chunks of `CHUNK` entries. One program sums one chunk, `COLUMNS` columns of it: no program has
   more than `CHUNK` rows to read. A bag's first chunk goes to the output, later ones to partial sums.
2. Later chunks are found without a plan, and without asking the device how many there are. Cut the entries, too, into
   windows of `CHUNK`: in each window at most one later chunk begins, for the `CHUNK` entries before it are of the same
   bag. It is a chunk of the bag that has the entry before the window, and the later chunks of a bag lie in windows in
   a row.
3. A second pass adds a bag's partial sums to the output, in order.

`products`: one program a block of entries, in a loop over the columns.

Sums are in float32, on no tensor core (no TF32), and without atomics: the same input gives the same bits, which
resuming needs. For that reason sizes are fixed and not autotuned: an autotuner's choice is a race between timings,
and sizes set the order of summation. A bag's sum does not depend on the bags beside it, either. Offsets into a table
are 64-bit, for features × d_model may exceed 2³¹.

Indices are not checked. The sizes below were chosen by arithmetic; none was measured on a GPU.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton is not there on every machine; without it a kernel looks like a plain function, not launched with [grid].)

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # entries of a chunk: a token's k features are one chunk
TILE = 8  # rows that a program of `bag` reads at once; an average feature has few tokens
COLUMNS = 256  # of a program of `bag`: 4 numbers (16 bytes of float32) for each thread of its two warps
ENTRIES, COLUMNS_OF_PRODUCTS = 8, 128  # of a program of `products`: rows that are read at once, and their columns
OPTIONS = {"num_warps": 2, "enable_fp_fusion": True}  # fused multiply-adds: said, for Triton's default is to change

# The wrappers that tests put around functions (jaxtyping) cannot be compiled: hence `no_type_check` on every kernel.


def bag(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`[bag d]` sums of the rows of a table, weighted; in the table's type, summed in float32.

    Args:
        table: `[row d]` float32, bfloat16 or float16.
        index: `[entry]` row of each entry, int32 or int64.
        offsets: `[bag]` number of the first entry of each bag, ascending from 0; a bag without entries gives 0.
        weights: `[entry]`, of any of the table's types.
    """
    table, index, offsets, weights = (one.contiguous() for one in (table, index, offsets, weights))
    n_bags, n_entries, d = len(offsets), len(index), table.shape[1]
    out = torch.empty(n_bags, d, dtype=torch.float32, device=table.device)
    if not out.numel():
        return out.to(table.dtype)
    # The bag of the entry before each window; no later chunk can begin in the first window, which is left out.
    firsts = torch.arange(CHUNK, max(n_entries, CHUNK), CHUNK, dtype=offsets.dtype, device=offsets.device)
    owners = torch.searchsorted(offsets, firsts) - 1
    windows = len(owners)
    partials = torch.empty(windows, d, dtype=torch.float32, device=table.device)
    columns = min(COLUMNS, triton.next_power_of_2(d))
    blocks = triton.cdiv(d, columns)
    sizes = {"CHUNK": CHUNK, "TILE": TILE, "COLUMNS": columns, **OPTIONS}
    with torch.cuda.device_of(table):
        _sum_chunks[(windows + n_bags, blocks)](
            table, index, weights, offsets, owners, out, partials, n_bags, n_entries, windows, d, **sizes
        )
        if windows:
            _add_partials[(windows, blocks)](offsets, owners, out, partials, n_bags, n_entries, d, **sizes)
    return out.to(table.dtype)


def products(weight: Tensor, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`[entry]` = weight[index] · x[rows]; in the type of x, summed in float32.

    Args:
        weight: `[feature d]` float32, bfloat16 or float16.
        x: `[batch d]`, of any of these types.
        index: `[entry]` row of `weight`, int32 or int64.
        rows: `[entry]` row of `x`, int32 or int64.
    """
    weight, x, index, rows = (one.contiguous() for one in (weight, x, index, rows))
    n_entries, d = len(index), x.shape[1]
    out = torch.empty(n_entries, dtype=torch.float32, device=x.device)
    if n_entries:
        columns = min(COLUMNS_OF_PRODUCTS, triton.next_power_of_2(d))
        with torch.cuda.device_of(x):
            _sum_products[(triton.cdiv(n_entries, ENTRIES),)](
                weight, x, index, rows, out, n_entries, d, ENTRIES=ENTRIES, COLUMNS=columns, **OPTIONS
            )
    return out.to(x.dtype)  # (the interpreter, by which this is tested, cuts bfloat16 off where a GPU rounds)


@triton.jit
@no_type_check
def _bounds(offsets, bag, n_bags, n_entries):
    """Where a bag begins and ends."""
    begin = tl.load(offsets + bag).to(tl.int64)
    end = tl.load(offsets + bag + 1, mask=bag + 1 < n_bags, other=n_entries).to(tl.int64)
    return begin, end


@triton.jit
@no_type_check
def _later_chunk(offsets, owners, window, n_bags, n_entries, CHUNK: tl.constexpr):
    """Of the later chunk that begins in a window: its bag, its number in the bag, where it begins, where the bag ends.

    Where none begins there, the beginning is not before the end.
    """
    bag = tl.load(owners + window).to(tl.int64)
    begin, end = _bounds(offsets, bag, n_bags, n_entries)
    number = ((window + 1) * CHUNK - begin + CHUNK - 1) // CHUNK
    return bag, number, begin + number * CHUNK, end


# Counts that change at every step are not specialised on, or kernels would be compiled again in mid-training.
@triton.jit(do_not_specialize=["n_entries", "windows"])
@no_type_check
def _sum_chunks(
    table,
    index,
    weights,
    offsets,
    owners,
    out,
    partials,
    n_bags,
    n_entries,
    windows,
    d,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program < windows:
        _, _, at, end = _later_chunk(offsets, owners, program, n_bags, n_entries, CHUNK)
        target = partials + program * d
    else:
        at, end = _bounds(offsets, program - windows, n_bags, n_entries)
        target = out + (program - windows) * d
    end = tl.minimum(end, at + CHUNK)

    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(at, end, TILE):
        entries = first + tl.arange(0, TILE)
        real = entries < end
        row = tl.load(index + entries, mask=real, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=real, other=0.0).to(tl.float32)
        where = table + row[:, None] * d + columns[None, :]
        values = tl.load(where, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * values, axis=0)
    tl.store(target + columns, total, mask=inside)


@triton.jit(do_not_specialize=["n_entries"])
@no_type_check
def _add_partials(
    offsets,
    owners,
    out,
    partials,
    n_bags,
    n_entries,
    d,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64)
    bag, number, at, end = _later_chunk(offsets, owners, window, n_bags, n_entries, CHUNK)
    # The program of a bag's first later chunk adds all of that bag; the others have nothing to do.
    if (number == 1) & (at < end):
        stop = window + (end - at + CHUNK - 1) // CHUNK
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < d
        total = tl.load(out + bag * d + columns, mask=inside, other=0.0)
        for first in range(window, stop, TILE):
            each = first + tl.arange(0, TILE)
            where = partials + each[:, None] * d + columns[None, :]
            values = tl.load(where, mask=(each < stop)[:, None] & inside[None, :], other=0.0)
            total += tl.sum(values, axis=0)
        tl.store(out + bag * d + columns, total, mask=inside)


@triton.jit(do_not_specialize=["n_entries"])
@no_type_check
def _sum_products(weight, x, index, rows, out, n_entries, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = entries < n_entries
    of_weight = tl.load(index + entries, mask=real, other=0).to(tl.int64) * d
    of_x = tl.load(rows + entries, mask=real, other=0).to(tl.int64) * d
    total = tl.zeros([ENTRIES, COLUMNS], dtype=tl.float32)
    for first in range(0, d, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = real[:, None] & (columns < d)[None, :]
        left = tl.load(weight + of_weight[:, None] + columns[None, :], mask=mask, other=0.0)
        right = tl.load(x + of_x[:, None] + columns[None, :], mask=mask, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out + entries, tl.sum(total, axis=1), mask=real)
