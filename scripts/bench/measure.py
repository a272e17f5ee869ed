"""What the benchmarks share: the clock, the machine, the file."""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import mechinterp as mi
from mechinterp.results import write_json


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gave: CPU time on one thread, which other programs disturb little, else wall."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    made = run()
    return clock() - start, made


def arguments(doc: str, names: Sequence[str], argv: Sequence[str] | None) -> argparse.Namespace:
    """`--json`, `--cases`, `--threads`; torch's threads are set."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--cases", nargs="+", choices=names, default=list(names), help="by default all")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 by default, timed in CPU seconds")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


def load_smollm2() -> mi.HookedModel:
    """The model of every benchmark; what is measured on is printed."""
    model = mi.load("smollm2-135m", device="cpu", dtype="float32", bos=False)
    print(model.header())
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {_clock()} time")
    return model


def write(path: Path | None, cases: Sequence[dict[str, Any]], ok: bool, **more: Any) -> int:
    """Write the table as JSON where a path is given. Returns the exit code: 0 if all is well, else 1."""
    if path is not None:
        threads = torch.get_num_threads()
        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}
        write_json(path, {"cases": cases, "ok": ok, "clock": _clock(), "machine": machine, **more})
    return 0 if ok else 1


def _clock() -> str:
    return "CPU" if torch.get_num_threads() == 1 else "wall"
