"""Training steps of sparse autoencoders and their Triton kernels on a GPU, and how near they are to the least.

    python scripts/bench/sae_gpu.py [--json FILE] [--quick] [--device cuda]

It needs no peers and no network. Without CUDA it says that nothing was measured.

1. *step*: TopK, BatchTopK and JumpReLU steps at two sizes, in float32 (without TF32) and with bfloat16 autocast: with
   the Triton kernels, with `embedding_bag` in their place, and dense. With 5% dead features, too.
2. *kernels*: the sums by row and by feature and the products of pairs, in float32 and bfloat16, with Triton beside
   `embedding_bag`, where tokens are spread over features evenly, where one feature has every token, and by Zipf's law.

*Floor* of a step: multiply-adds of the encoder's product at the rate of a large matmul of the same precision, and
Adam's seven passes over the parameters at the rate of a large copy. Of a kernel: tables, entries and results once, at
the rate of that copy. *Of it* is that over ours; gathers that miss the cache read more.
*Checked*: sums against float64, to 1e-5 of the largest in float32 and 1e-2 in bfloat16; losses and reconstructions
against the dense step's, to 1e-4 in float32 and 5e-2 in bfloat16; the same input twice gives the same bits. The exit
code is that of the checks: no time is promised.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from sae_steps import Setting, Shape, dense_gap
from torch import Tensor

from mechinterp.results import write_json
from mechinterp.sae import kernels
from mechinterp.sae.kernels import Entries

SIZES = (Shape(dead=460), Shape(2048, 32768, 64, 8192, dead=1638))
QUICK = (Shape(64, 512, 8, 128, dead=25),)
SUMS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DENSE = {False: 1e-4, True: 5e-2}  # by autocast
HEADER = "case                                    beside       ours     ratio    floor of it  max diff  peak MB"


@dataclass(frozen=True)
class Line:
    """A case as measured: milliseconds beside and of ours, the least, and what was checked."""

    name: str
    other: float
    ours: float
    floor: float
    max_rel_diff: float
    tolerance: float
    same_bits: bool
    peak_bytes: int
    what: str

    @property
    def ok(self) -> bool:
        return self.max_rel_diff <= self.tolerance and self.same_bits

    def __str__(self) -> str:
        return (
            f"{self.name:<36}{self.other:>10.3f}{self.ours:>11.3f} ms{self.other / self.ours:>7.2f}x"
            f"{self.floor:>9.3f}{self.floor / self.ours:>6.0%}{self.max_rel_diff:>10.0e}{self.peak_bytes / 1e6:>9.0f}"
            f"  {'ok' if self.ok else 'MISSED'}  {self.what}"
        )


class Clock:
    """Milliseconds of calls on a device, and what it does at best."""

    def __init__(self, device: str, quick: bool):
        self.device, self.n = device, 3 if quick else 20
        self.side = 512 if quick else 8192

    def __call__(self, *runs: Callable[[], object], rounds: int = 5) -> list[float]:
        """Of each run: the median of rounds in which they take turns."""
        times: list[list[float]] = [[] for _ in runs]
        for run in runs:
            run()
            run()
        for _ in range(rounds):
            for found, run in zip(times, runs, strict=True):
                self.wait()
                start = time.perf_counter()
                for _ in range(self.n):
                    run()
                self.wait()
                found.append(1e3 * (time.perf_counter() - start) / self.n)
        return [median(found) for found in times]

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a run takes beyond those held; 0 on the CPU."""
        if self.device != "cuda":
            return 0
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - held

    def rate(self, dtype: torch.dtype) -> float:
        """Multiply-adds a millisecond of a large matmul."""
        one, two = torch.rand(2, self.side, self.side, device=self.device).to(dtype)
        return self.side**3 / self(lambda: one @ two)[0]

    def bandwidth(self) -> float:
        """Bytes a millisecond that a large copy reads and writes."""
        source, target = torch.zeros(2, 4 * self.side**2, device=self.device)
        return 2 * source.nbytes / self(lambda: target.copy_(source))[0]


@contextmanager
def without_triton() -> Iterator[None]:
    """`embedding_bag` in the place of the Triton kernels."""
    with patch.object(kernels, "_use_triton", lambda tensor: False):
        yield


# ---- steps ---------------------------------------------------------------------------------------------------------


def steps(clock: Clock, shape: Shape, autocast: bool) -> Iterator[Line]:
    """Whole steps."""
    setting = Setting(shape, clock.device)
    dtype = torch.bfloat16 if autocast else torch.float32
    least = shape.products / clock.rate(dtype) + shape.adam_bytes / clock.bandwidth()
    for architecture, n_dead in (("topk", 0), ("topk", shape.dead), ("batchtopk", 0), ("jumprelu", 0)):
        make = {"n_dead": n_dead, "autocast": autocast}
        ours, plain, dense = (setting.trainer(architecture, one, **make) for one in (False, False, True))

        def bags(step: Callable[[Tensor], None] = plain.step) -> None:
            with without_triton():
                step(setting.x)

        fast, slow, whole = clock(lambda: ours.step(setting.x), bags, lambda: dense.step(setting.x))  # noqa: B023
        peak, peak_dense = clock.peak(lambda: ours.step(setting.x)), clock.peak(lambda: dense.step(setting.x))  # noqa: B023
        gap = dense_gap(setting, architecture, n_dead, autocast)
        same = repeats(setting, architecture, n_dead, autocast)
        name = f"{architecture}{', dead' if n_dead else ''}, {'bf16' if autocast else 'fp32'}"
        for beside, other in (("embedding_bag", slow), (f"dense ({peak_dense / 1e6:.0f} MB)", whole)):
            yield Line(
                f"step {name}", other, fast, least, gap, DENSE[autocast], same, peak, f"beside {beside}; {shape}"
            )


def repeats(setting: Setting, architecture: str, n_dead: int, autocast: bool) -> bool:
    """Whether two trainers end with the same bits."""
    ends = []
    for _ in range(2):
        trainer = setting.trainer(architecture, n_dead=n_dead, autocast=autocast)
        for _ in range(3):
            trainer.step(setting.x)
        ends.append(torch.cat([one.detach().flatten() for one in trainer.sae.parameters()]))
    return torch.equal(*ends)


# ---- kernels -------------------------------------------------------------------------------------------------------


def pairs(shape: Shape, spread: str, device: str) -> Entries:
    """batch · k pairs: features by an even chance, by Zipf's law, or one that every token has."""
    draw = torch.Generator().manual_seed(0)
    chance = torch.ones(shape.d_sae) if spread != "Zipf" else 1 / torch.arange(1, shape.d_sae + 1)
    index = torch.multinomial(chance, shape.batch * shape.k, replacement=True, generator=draw)
    index = index.view(shape.batch, shape.k)
    if spread == "one dense":
        index[:, 0] = 0
    return Entries.of_rows(index.to(device), shape.d_sae)


def sums(clock: Clock, shape: Shape, dtype: torch.dtype) -> Iterator[Line]:
    """Both sums and the products, at three spreads."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, shape.d_in, generator=draw).to(clock.device, dtype) for n in (shape.batch, shape.d_sae))
    rate, size, n_pairs = clock.bandwidth(), x.element_size(), shape.batch * shape.k
    for spread in ("even", "one dense", "Zipf"):
        entries = pairs(shape, spread, clock.device)
        values = torch.randn(n_pairs, generator=draw).to(clock.device, dtype)
        runs: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
            "by row": (entries.sum_by_row, weight, values),
            "by feature": (entries.sum_by_feature, x, values),
            "products": (entries.products, weight, x),
        }
        for name, (run, *given) in runs.items():
            made, again, wanted = run(*given), run(*given), run(*(one.double() for one in given))

            def bags(run: Callable[..., Tensor] = run, given: Sequence[Tensor] = given) -> Tensor:
                with without_triton():
                    return run(*given)

            fast, slow = clock(lambda: run(*given), bags)  # noqa: B023
            gap = float((made.double() - wanted).abs().max() / wanted.abs().max())
            moved = size * shape.d_in * (shape.batch + shape.d_sae) + n_pairs * (8 + size)
            yield Line(
                f"{name}, {spread}, {str(dtype).removeprefix('torch.')}", slow, fast, moved / rate, gap, SUMS[dtype],
                torch.equal(made, again), clock.peak(lambda: run(*given)), f"beside embedding_bag; {shape}",  # noqa: B023
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases, print the table, write the JSON. Returns the exit code: of the checks."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the program out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only to try the program out")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA here: nothing was measured")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, for trial"
    triton = kernels._use_triton(torch.zeros(1, device=args.device))
    print(f"{device}, torch {torch.__version__}, {'with' if triton else 'WITHOUT'} Triton\n{HEADER}")
    clock, made = Clock(args.device, args.quick), []
    for shape in QUICK if args.quick else SIZES:
        for autocast in (False, True) if args.device == "cuda" else (False,):
            for line in steps(clock, shape, autocast):
                made.append(line)
                print(line, flush=True)
        for dtype in SUMS:
            for line in sums(clock, shape, dtype):
                made.append(line)
                print(line, flush=True)
    ok = all(line.ok for line in made)
    if args.json is not None:
        cases = [{**asdict(line), "ok": line.ok} for line in made]
        write_json(
            args.json, {"cases": cases, "ok": ok, "device": device, "triton": triton, "torch": torch.__version__}
        )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
