"""A shuffle buffer of activations: rows of many chunks, drawn in random order, each once.

1. The buffer holds `size` tokens of every site, and an order over them. A batch is the next `batch` rows of the order.
2. When at most half is left, new rows take the slots of the drawn ones, and all that is there is shuffled anew. Half of
   the rows outlive a refill, a quarter of them two: the rows of a chunk are spread over many batches.
3. The rows that were drawn are never needed again. A state holds what is left, in its order: that is between half and
   all of the buffer, and it does not depend on which slot a row lies in.

The refill writes its slots in ascending order: that is 1.4 times as fast as in the order that they were drawn in.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.sae.activations.chunks import Chunks, n_rows, under, widths_of
from mechinterp.sae.activations.memory import bytes_needed as bytes_needed  # the estimate, for those who plan a buffer
from mechinterp.sae.activations.memory import require_memory

EMPTY_CHUNKS = 1_000  # chunks without a row, one after another, after which a source is taken to have none
SLICE = 1_024  # rows that a state copies at a time: memory that is used again is several times as fast as new memory


class ShuffleBuffer:
    """Mixes the rows of `chunks`; memory is taken when the first batch is asked for."""

    def __init__(
        self, chunks: Chunks, size: int, batch: int, seed: int, device: str | torch.device | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            chunks: where the rows come from.
            size: tokens held.
            batch: tokens of a batch, at most `size`. The buffer mixes well when a refill (half of `size`) spans many
                chunks.
            seed: of the order.
            device: where the rows are held; that of the chunks by default None.

        Raises:
            UserError: sizes that do not fit each other.
        """
        if not 1 <= batch <= size:
            raise UserError(f"a buffer of {size} tokens cannot give batches of {batch}; valid: 1 … {size}")
        self.chunks, self.size, self.batch_size = chunks, size, batch
        self.device = None if device is None else torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)  # on the CPU: the same order on every device
        self._contents: dict[str, Tensor] = {}  # hook name -> [size d]
        self._order = torch.zeros(0, dtype=torch.int64)  # slots of the rows, drawn or left, in the order of drawing
        self._cursor = 0  # how many of them are drawn
        self._rest: dict[str, Tensor] = {}  # rows of the last chunk that did not fit
        self._ended = False

    def __len__(self) -> int:
        """Tokens that are left to draw before the next refill."""
        return len(self._order) - self._cursor

    def batch(self) -> dict[str, Tensor]:
        """Hook name -> `[batch d]`: the next rows, which nothing else refers to.

        Raises:
            StopIteration: the source has ended and less than a batch is left; that rest is not given.
            UserError: the buffer would not fit into memory, or the source gives no rows.
        """
        made = self.peek(self.batch_size)
        if len(next(iter(made.values()), ())) < self.batch_size:
            raise StopIteration
        self._cursor += self.batch_size
        return made

    def peek(self, n: int) -> dict[str, Tensor]:
        """Hook name -> `[token d]`: the next n rows, or all there are, which stay the next ones. Raises as `batch`."""
        if 2 * len(self) <= self.size and not self._ended:
            self._refill()
        slots = self._order[self._cursor : self._cursor + n]
        return {name: rows.index_select(0, slots) for name, rows in self._contents.items()}

    def _refill(self) -> None:
        """Put new rows into the free slots, then shuffle. What is left comes first, in its order, then the new."""
        left, drawn = self._order[self._cursor :], self._order[: self._cursor]
        unused = torch.arange(len(self._order), self.size, device=self._order.device)
        slots, filled, empty = torch.cat([drawn.sort().values, unused]), 0, 0
        while filled < self.size - len(left) and empty < EMPTY_CHUNKS:
            rows = self._next_rows()
            if rows is None:
                break
            empty = 0 if n_rows(rows) else empty + 1
            if not self._contents:  # the first chunk
                self._allocate(rows)
                left, slots = left.to(self.device), torch.arange(self.size, device=self.device)
            filled += self._put(rows, slots[filled:])
        if empty == EMPTY_CHUNKS:
            raise UserError(f"{EMPTY_CHUNKS:,} chunks in a row held no token: does the exclusion rule leave any?")
        held = torch.cat([left, slots[:filled]])
        order = torch.randperm(len(held), generator=self._generator)
        self._order, self._cursor = held[order.to(held.device)], 0

    def _next_rows(self) -> dict[str, Tensor] | None:
        """Left-over rows, else a chunk; None at the end of the source."""
        if n_rows(self._rest):
            return self._rest
        try:
            chunk = self.chunks.chunk()
        except StopIteration:
            self._ended = True
            return None
        found = widths_of(chunk)
        have = {name: rows.shape[1] for name, rows in self._contents.items()}
        if have and found != have:
            raise ValueError(f"a chunk holds {found}, unlike those before it: {have}")
        return chunk

    def _put(self, rows: Mapping[str, Tensor], slots: Tensor) -> int:
        """Copy rows into the first slots, keep what does not fit, and say how many went in."""
        n = min(n_rows(rows), len(slots))
        for name, table in self._contents.items():
            table.index_copy_(0, slots[:n], rows[name][:n].detach().to(table))
        # A clone: it waits for the next refill, and the source may write into its memory until then.
        self._rest = {name: tensor[n:].detach().clone() for name, tensor in rows.items()} if n < n_rows(rows) else {}
        return n

    def _allocate(self, like: Mapping[str, Tensor]) -> None:
        widths, first = widths_of(like), next(iter(like.values()))
        self.device = self.device or first.device
        require_memory("a shuffle buffer", self.size, widths, first.dtype, self.device)
        self._contents = {
            name: torch.empty(self.size, width, dtype=first.dtype, device=self.device) for name, width in widths.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything, as a flat dict of CPU tensors and plain values: a copy, which takes as much memory again."""
        slots = self._order[self._cursor :]
        return {
            "size": self.size,
            "batch": self.batch_size,
            "device": None if self.device is None else str(self.device),
            "sites": list(self._contents),
            "ended": self._ended,
            "generator": self._generator.get_state(),
            **{f"rows.{name}": _gathered(table, slots) for name, table in self._contents.items()},
            **{f"rest.{name}": rows.cpu().clone() for name, rows in self._rest.items()},
            **{f"chunks.{name}": value for name, value in self.chunks.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit for bit, where the state was taken; `chunks` is set as well.

        Raises:
            UserError: the state is of a buffer of another size or batch, or does not fit into memory.
        """
        asked, found = (self.size, self.batch_size), (state["size"], state["batch"])
        if asked != found:
            raise UserError(
                f"the state is of a buffer of {found[0]} tokens with batches of {found[1]}; "
                f"this one has {asked[0]} and {asked[1]}, with which the batches would be others"
            )
        self.chunks.load_state_dict(under("chunks.", state))
        self._generator.set_state(state["generator"].cpu())
        self._ended, self._rest, self._cursor, self._contents = state["ended"], under("rest.", state), 0, {}
        self._order = torch.zeros(0, dtype=torch.int64)
        if state["sites"]:
            if self.device is None:
                self.device = torch.device(state["device"])
            rows = {name: state[f"rows.{name}"] for name in state["sites"]}
            self._allocate(rows)
            self._order = torch.arange(n_rows(rows), device=self.device)
            for name, table in self._contents.items():
                table[: len(rows[name])].copy_(rows[name])


def _gathered(table: Tensor, slots: Tensor) -> Tensor:
    """Rows of a table in CPU memory, some at a time: the device holds no second copy."""
    out = torch.empty(len(slots), table.shape[1], dtype=table.dtype)
    for start in range(0, len(slots), SLICE):
        some = slots[start : start + SLICE]
        out[start : start + len(some)].copy_(table.index_select(0, some))
    return out
