"""The shuffle buffer against a list of rows; states at random cuts; a finite source; memory."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.sae.activations import buffer as buffers
from mechinterp.sae.activations.buffer import ShuffleBuffer, bytes_needed

WIDTHS = {"blocks.0.hook_resid_post": 3, "blocks.1.hook_mlp_out": 2}


class Counting:
    """Rows that say their own number, in chunks of unequal length; the same memory is used for every chunk."""

    def __init__(self, n: int | None, longest: int = 37, dtype: torch.dtype = torch.float32) -> None:
        self.n, self.longest, self.dtype, self.done, self.asked = n, longest, dtype, 0, 0
        self._memory = torch.zeros(longest, max(WIDTHS.values()), dtype=dtype)

    def chunk(self) -> dict[str, Tensor]:
        if self.n is not None and self.done == self.n:
            raise StopIteration
        self.asked += 1
        length = (self.asked * 7919) % (self.longest + 1)  # sometimes no row at all
        length = min(length, self.n - self.done) if self.n is not None else length
        self._memory[:length] = torch.arange(self.done, self.done + length)[:, None].to(self.dtype)
        self.done += length
        return {name: self._memory[:length, :width] for name, width in WIDTHS.items()}

    def state_dict(self):
        return {"done": torch.tensor(self.done), "asked": self.asked}

    def load_state_dict(self, state) -> None:
        self.done, self.asked = int(state["done"]), state["asked"]


def numbers(batch: dict[str, Tensor]) -> list[int]:
    """The rows of a batch, which must be whole and aligned between sites."""
    assert list(batch) == list(WIDTHS)
    first = next(iter(batch.values()))[:, 0]
    for name, rows in batch.items():
        assert rows.shape == (len(first), WIDTHS[name])
        assert bool((rows == first[:, None]).all())
    return [int(number) for number in first]


def drain(buffer: ShuffleBuffer) -> list[list[int]]:
    out = []
    while True:
        try:
            out.append(numbers(buffer.batch()))
        except StopIteration:
            return out


def plain_reference(n: int, size: int, batch: int, seed: int) -> list[list[int]]:
    """The same algorithm on a list of numbers."""
    source, generator = Counting(n), torch.Generator().manual_seed(seed)
    held: list[int] = []
    waiting: list[int] = []
    out = []
    ended = False
    while True:
        if 2 * len(held) <= size and not ended:
            while len(held) < size and not ended:
                if not waiting:
                    try:
                        waiting = [int(row[0]) for row in source.chunk()["blocks.0.hook_resid_post"]]
                    except StopIteration:
                        ended = True
                room = size - len(held)
                held, waiting = held + waiting[:room], waiting[room:]
            held = [held[i] for i in torch.randperm(len(held), generator=generator).tolist()]
        if len(held) < batch:
            return out
        out.append(held[:batch])
        held = held[batch:]


@pytest.mark.parametrize(("n", "size", "batch"), [(1000, 100, 10), (999, 64, 64), (500, 101, 7), (30, 200, 10)])
def test_batches_are_those_of_a_plain_list(n, size, batch):
    assert drain(ShuffleBuffer(Counting(n), size, batch, seed=3)) == plain_reference(n, size, batch, seed=3)


def test_every_row_of_a_finite_source_comes_out_once():
    batches = drain(ShuffleBuffer(Counting(1200), 100, 8, seed=0))
    assert {len(batch) for batch in batches} == {8}
    assert sorted(number for batch in batches for number in batch) == list(range(1200))


def test_a_source_ends_after_the_last_full_batch_and_stays_ended():
    buffer = ShuffleBuffer(Counting(105), 40, 10, seed=0)
    seen = [number for batch in drain(buffer) for number in batch]
    assert len(seen) == len(set(seen)) == 100
    with pytest.raises(StopIteration):
        buffer.batch()


def test_batches_are_memory_of_their_own():
    buffer = ShuffleBuffer(Counting(None), 100, 10, seed=0)
    first = buffer.batch()
    kept = {name: rows.clone() for name, rows in first.items()}
    for _ in range(30):
        buffer.batch()
    assert all(torch.equal(first[name], kept[name]) for name in WIDTHS)
    next(iter(first.values())).fill_(-1)
    assert all(min(numbers(buffer.batch())) >= 0 for _ in range(30))


def test_peeking_takes_nothing():
    straight = drain(ShuffleBuffer(Counting(300), 100, 10, seed=2))
    buffer, got = ShuffleBuffer(Counting(300), 100, 10, seed=2), []
    for _ in straight:
        seen = numbers(buffer.peek(25))
        got.append(numbers(buffer.batch()))
        assert seen[:10] == got[-1]
    assert got == straight
    assert len(numbers(ShuffleBuffer(Counting(300), 100, 10, seed=2).peek(1000))) == 100


def test_rows_that_wait_for_a_refill_are_memory_of_their_own():
    source = Counting(None)
    buffer = ShuffleBuffer(source, 100, 10, seed=0)
    straight = [numbers(ShuffleBuffer(Counting(None), 100, 10, seed=0).batch())]
    got = [numbers(buffer.batch())]
    source._memory.fill_(-1)  # as a source that uses its memory for something else
    got += [numbers(buffer.batch()) for _ in range(20)]
    assert got[0] == straight[0]
    assert min(number for batch in got for number in batch) >= 0


def test_rows_of_a_chunk_are_spread_over_many_batches():
    # A chunk of 37 rows in a buffer of 1,000: with batches of 50 the rows of one chunk would fill one batch if they
    # were not mixed. Mixed, a batch of 50 holds about 50 · 37 / 1,000 = 2 of them.
    batches = drain(ShuffleBuffer(Counting(20_000), 1000, 50, seed=0))
    chunk_of = [number // 37 for number in range(20_000)]
    spread: dict[int, set[int]] = {}
    for place, batch in enumerate(batches):
        for number in batch:
            spread.setdefault(chunk_of[number], set()).add(place)
    inner = [len(places) for chunk, places in spread.items() if 50 < chunk < 500]
    assert min(inner) >= 10
    # Where a row comes out hardly depends on where it lay within what was in the buffer together with it.
    early = torch.tensor([n for batch in batches[:10] for n in batch], dtype=torch.float64)
    assert abs(float(early.mean()) - 499.5) < 4 * 288.7 / len(early) ** 0.5


def test_all_orders_of_a_full_buffer_are_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        order = tuple(numbers(ShuffleBuffer(Counting(4, longest=4), 4, 4, seed).batch()))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi2 = sum((count - 50) ** 2 / 50 for count in counts.values())
    assert chi2 < 55  # 23 degrees of freedom: P < 0.0002


def test_another_seed_is_another_order():
    one, two = (numbers(ShuffleBuffer(Counting(None), 100, 50, seed).batch()) for seed in (0, 1))
    assert one != two


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 9, 13, 24, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_state_continues_bit_for_bit(cut, dtype, tmp_path):
    longest = 37 if dtype == torch.float32 else 3  # bfloat16 counts to 256
    n = None if dtype == torch.float32 else 250
    size, batch = (100, 13) if n is None else (40, 4)
    made = ShuffleBuffer(Counting(n, longest, dtype), size, batch, seed=5)
    for _ in range(cut):
        made.batch()
    state = made.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    save_file(tensors, tmp_path / "state.safetensors")
    expected = [numbers(made.batch()) for _ in range(10)]  # the state is a copy: this does not change it
    again = ShuffleBuffer(Counting(n, longest, dtype), size, batch, seed=99)
    plain = {name: value for name, value in state.items() if name not in tensors}
    again.load_state_dict({**plain, **load_file(tmp_path / "state.safetensors")})
    assert [numbers(again.batch()) for _ in range(10)] == expected


def test_states_of_states():
    rng = random.Random(4)
    straight = drain(ShuffleBuffer(Counting(3000), 150, 11, seed=1))
    made, seen = ShuffleBuffer(Counting(3000), 150, 11, seed=1), []
    try:
        while True:
            for _ in range(rng.randint(0, 12)):
                seen.append(numbers(made.batch()))
            fresh = ShuffleBuffer(Counting(3000), 150, 11, seed=rng.randint(0, 9))
            fresh.load_state_dict(made.state_dict())
            made = fresh
    except StopIteration:
        assert seen == straight


def test_a_state_holds_what_is_left_only():
    buffer = ShuffleBuffer(Counting(None), 100, 10, seed=0)
    for _ in range(3):
        buffer.batch()
    state = buffer.state_dict()
    assert {len(state[f"rows.{name}"]) for name in WIDTHS} == {70}


def test_a_state_of_other_sizes_is_refused():
    state = ShuffleBuffer(Counting(None), 100, 10, seed=0).state_dict()
    with pytest.raises(UserError, match="100 tokens with batches of 10; this one has 100 and 20"):
        ShuffleBuffer(Counting(None), 100, 20, seed=0).load_state_dict(state)


@pytest.mark.parametrize("batch", [0, 101])
def test_batches_must_fit(batch):
    with pytest.raises(UserError, match="valid: 1 … 100"):
        ShuffleBuffer(Counting(None), 100, batch, seed=0)


def test_bytes_needed():
    assert bytes_needed(10, {"a": 3, "b": 2}, torch.float32) == 10 * (5 * 4 + 24)
    assert bytes_needed(10, {"a": 3, "b": 2}, torch.bfloat16) == 10 * (5 * 2 + 24)


def test_a_buffer_beyond_the_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(
        "mechinterp.sae.activations.memory.free_bytes", lambda device: 55_000
    )  # four fifths of it: 44,000
    assert len(numbers(ShuffleBuffer(Counting(None), 1000, 10, seed=0).batch())) == 10
    monkeypatch.setattr(buffers.torch, "empty", lambda *args, **kw: pytest.fail("allocated"))
    with pytest.raises(UserError, match=r"of 1,001 tokens at 2 sites would take 0\.00 GB .* at most 1,000 tokens"):
        ShuffleBuffer(Counting(None), 1001, 10, seed=0).batch()


def test_a_source_without_rows_is_refused():
    source = Counting(None)
    source.longest = 0
    with pytest.raises(UserError, match="does the exclusion rule leave any"):
        ShuffleBuffer(source, 100, 10, seed=0).batch()


def test_sites_must_be_aligned():
    class Ragged(Counting):
        def chunk(self):
            return {"a": torch.zeros(4, 2), "b": torch.zeros(5, 2)}

    with pytest.raises(ValueError, match="equally many tokens"):
        ShuffleBuffer(Ragged(None), 100, 10, seed=0).batch()


def test_a_source_that_changes_its_sites_is_refused():
    class Fickle(Counting):
        def chunk(self):
            return {"a" if self.asked else "b": super().chunk()["blocks.1.hook_mlp_out"]}

    with pytest.raises(ValueError, match="unlike those before it"):
        ShuffleBuffer(Fickle(None), 100, 10, seed=0).batch()
