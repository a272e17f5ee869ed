"""Memory: what a table of activations takes, asked before it is allocated; and how a training process keeps its own."""

import ctypes
import os
from collections.abc import Mapping

import psutil
import torch

from mechinterp.errors import UserError

SHARE = 0.8  # of the free memory that one table may take


def bytes_needed(size: int, widths: Mapping[str, int], dtype: torch.dtype) -> int:
    """Bytes of `size` rows of every site, with three int64 indices a row (the order, its successor, a permutation)."""
    return size * (sum(widths.values()) * dtype.itemsize + 3 * 8)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; on CUDA, what PyTorch holds but does not use counts as free."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def require_memory(what: str, size: int, widths: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
    """Raise UserError when `size` tokens would take more than four fifths of what is free on `device`."""
    asked, free = bytes_needed(size, widths, dtype), free_bytes(device)
    if asked > SHARE * free:
        fits = int(SHARE * free) // bytes_needed(1, widths, dtype)
        raise UserError(
            f"{what} of {size:,} tokens at {len(widths)} sites would take {asked / 1e9:.2f} GB of the "
            f"{free / 1e9:.2f} GB free on {device}; at most {fits:,} tokens would fit into four fifths of it"
        )


def keep_freed_memory(device: torch.device) -> None:
    """On the CPU, let this process keep the memory that it frees, where its C library is glibc.

    A step frees tables of tens of megabytes and asks for the same again. By default each goes back to the system, and
    comes anew page by page: a fifth of the time of a step. MECHINTERP_KEEP_FREED_MEMORY=0 leaves it as it is.
    """
    if device.type != "cpu" or os.environ.get("MECHINTERP_KEEP_FREED_MEMORY") == "0":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD: smaller ones come from the heap,
    mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD: whose free end is kept up to this size
