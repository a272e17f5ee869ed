"""Harvest while training: chunks are made in a thread, some ahead of those that were asked for."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from mechinterp.sae.activations.chunks import Chunks, under


class Ahead:
    """The chunks of another source, in the same order. Worth it where that source has a device of its own."""

    def __init__(self, chunks: Chunks, n: int):
        """Nothing is made yet.

        Args:
            chunks: the source; nobody else may use it.
            n: chunks to be ahead.
        """
        self.chunks, self.n = chunks, n
        self._made: deque[Future[dict[str, Tensor] | None]] = deque()
        self._failure: Exception | None = None
        self._thread = ThreadPoolExecutor(1, "harvest")

    def chunk(self) -> dict[str, Tensor]:
        """The next rows. Raises what the source raises, when it is its turn; the call after that asks it again."""
        while len(self._made) <= self.n:
            self._made.append(self._thread.submit(self._next))
        try:
            made = self._made.popleft().result()
        except Exception:
            wait(self._made)  # they fail as well, without asking the source
            self._made.clear()
            self._failure = None
            raise
        if made is None:
            raise StopIteration
        return made

    def _next(self) -> dict[str, Tensor] | None:
        """A chunk; None at the end, for no future may hold StopIteration. A source that failed is not asked further."""
        if self._failure is not None:
            raise self._failure
        try:
            return self.chunks.chunk()
        except StopIteration:
            return None
        except Exception as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Stop after the chunk under way: a process does not end before its threads. The next `chunk` starts again."""
        while self._made and self._made[-1].cancel():
            self._made.pop()
        self._thread.shutdown()
        self._thread = ThreadPoolExecutor(1, "harvest")

    def state_dict(self) -> dict[str, Any]:
        """The chunks that are made or under way, and the source's state after them (or where it ended or failed)."""
        wait(self._made)
        whole = [future.result() for future in self._made if future.exception() is None]
        ready = [one for one in whole if one is not None]
        made: dict[str, Any] = {"sites": [list(one) for one in ready]}
        for number, one in enumerate(ready):
            made |= {f"ready.{number}.{name}": rows for name, rows in one.items()}
        return made | {f"chunks.{name}": value for name, value in self.chunks.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        wait(self._made)
        self.chunks.load_state_dict(under("chunks.", state))
        self._made.clear()
        self._failure = None
        for number, names in enumerate(state["sites"]):
            ready: Future[dict[str, Tensor] | None] = Future()
            ready.set_result({name: state[f"ready.{number}.{name}"] for name in names})
            self._made.append(ready)
