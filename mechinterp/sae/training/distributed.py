"""Several processes that train one autoencoder: each harvests its own text and takes its share of every batch.

`torchrun --nproc-per-node N -m mechinterp sae train …` starts them; PyTorch's engine moves the numbers: NCCL on CUDA,
gloo on the CPU. What is of the whole batch (its mean and variance, BatchTopK's choice, dead features, gradients) is
summed or gathered over all processes, so that N of them take the step that one would take on the same batch.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mechinterp.errors import UserError, one_line


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def started(cls) -> "Processes":
        """Those that torchrun has started, joined; or this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local < torch.cuda.device_count():
                torch.cuda.set_device(local)
            # Both: what is on the CPU (reports of failures, a run with device="cpu") goes by gloo.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            # At the end of the process, not of a run: there may be more runs, and a group cannot be joined twice.
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def device(self, asked: str | None) -> torch.device:
        """Where this process computes: the device asked for, or CUDA where there is one, each process on its own."""
        if asked is None:
            asked = "cuda" if torch.cuda.is_available() else "cpu"
        if asked == "cuda" and self.size > 1:
            asked = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        try:
            # Of a tensor, so that it has a number and compares as equal with the model's.
            return torch.empty(0, device=asked).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"no device {asked!r} here: {one_line(error)}") from None

    def share(self, batch: int) -> int:
        """Rows of a batch that this process takes. Raises UserError where it cannot be divided."""
        if batch % self.size:
            raise UserError(f"a batch of {batch} tokens cannot be divided among {self.size} processes")
        return batch // self.size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, tensor: Tensor) -> Tensor:
        """Bool: whether it is True in some process."""
        if self.size == 1:
            return tensor
        counts = tensor.int()
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return counts.bool()

    def gather(self, values: Tensor) -> Tensor:
        """One-dimensional values of all processes, in the order of ranks, however many each has."""
        if self.size == 1:
            return values
        counts = values.new_zeros(self.size, dtype=torch.long)
        counts[self.rank] = len(values)
        dist.all_reduce(counts)
        longest = int(counts.max())
        if not longest:
            return values
        mine = torch.nn.functional.pad(values, (0, longest - len(values)))
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return torch.cat([part[:n] for part, n in zip(everyone, counts.tolist(), strict=True)])

    def wait(self) -> None:
        """Until all processes have come this far."""
        if self.size > 1:
            dist.barrier()

    def agree(self, failure: UserError | None = None) -> None:
        """Wait for all processes. If one of them has failed, all raise what it raises."""
        if self.size > 1:
            told: list[str | None] = [None] * self.size
            dist.all_gather_object(told, None if failure is None else str(failure))
            failure = failure or next((UserError(one) for one in told if one is not None), None)
        if failure is not None:
            raise failure

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work that all must get through: a UserError in one process is raised in all.

        Where only one process writes, it may fail alone, and the others would wait for it in the next sum.
        """
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        self.agree(failure)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first process's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
