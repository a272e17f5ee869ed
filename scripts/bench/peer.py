"""Peers: other people's code, run in processes and environments of its own (`peers/`), which answer calls."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from measure import timed
from peers.served import forget_peak, resident
from safetensors.torch import load_file
from torch import Tensor

PEERS = Path(os.environ.get("MECHINTERP_PEERS", Path.home() / ".cache/mechinterp-peers"))
PROGRAMS = Path(__file__).parent / "peers"
Made = TypeVar("Made")


class Missing(Exception):
    """A peer that cannot be run here; says how to get it."""


class Peer:
    """A peer's program, which answers calls."""

    def __init__(self, environment: str, setup: str, program: str, *args: object):
        """Start it.

        Args:
            environment: folder in `PEERS`.
            setup: script that makes the environment.
            program: file in `peers/`.
            args: of the program.
        """
        python = PEERS / environment / "bin/python"
        if not python.exists():
            raise Missing(f"no environment at {PEERS / environment}: bash scripts/bench/peers/{setup}")
        self.process = subprocess.Popen(
            [str(python), str(PROGRAMS / program), *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._answer() is None:
            raise Missing(f"{program} does not start (exit code {self.process.wait()}); its reason stands above")

    def _answer(self) -> dict | None:
        """The next line of JSON, or None where the program has ended."""
        assert self.process.stdout is not None
        return next((json.loads(line) for line in self.process.stdout if line.startswith("{")), None)

    def __call__(self, call: str, **asked: object) -> tuple[float, int, dict[str, Tensor]]:
        """Seconds, bytes that the process grew by, and tensors."""
        assert self.process.stdin is not None
        print(json.dumps({"call": call, **asked}), file=self.process.stdin, flush=True)
        made = self._answer()
        if made is None:
            raise RuntimeError(f"the peer failed in {call!r}; its reason stands above")
        return made["seconds"], made["peak_bytes"], load_file(made["tensors"])

    def close(self) -> None:
        """End it."""
        self.process.communicate()


@contextmanager
def serving(environment: str, setup: str, program: str, *args: object) -> Iterator[Peer]:
    """A peer for a while."""
    peer = Peer(environment, setup, program, *args)
    try:
        yield peer
    finally:
        peer.close()


def measured(run: Callable[[], Made]) -> tuple[float, int, Made]:
    """Seconds of our side, bytes that the process grew by, and what it gave."""
    before = forget_peak()
    spent, made = timed(run)
    return spent, resident("VmHWM") - before, made
