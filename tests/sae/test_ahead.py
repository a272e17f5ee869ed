"""Harvest ahead: the same chunks in the same order, states in the middle, failures and the end in their turn."""

import subprocess
import sys
import threading

import pytest
import torch

from mechinterp.errors import UserError
from mechinterp.sae.activations.ahead import Ahead
from mechinterp.sae.activations.buffer import ShuffleBuffer
from mechinterp.sae.activations.chunks import Chunks


class Counting:
    """Chunk i holds 1 to 3 rows of the number i; `fails` chunks raise once, before they are made."""

    def __init__(self, end=None, fails=()):
        self.at, self.end, self.fails, self.asked = 0, end, set(fails), 0

    def chunk(self):
        self.asked += 1
        if self.at == self.end:
            raise StopIteration
        if self.at in self.fails:
            self.fails.remove(self.at)
            raise UserError(f"chunk {self.at} failed")
        rows = torch.full((1 + self.at % 3, 2), float(self.at))
        self.at += 1
        return {"a": rows, "b": -rows}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def numbers(chunks, n):
    """The numbers of the next n chunks, which are whole and the same at both sites."""
    found = []
    for _ in range(n):
        one = chunks.chunk()
        number = int(one["a"][0, 0])
        assert torch.equal(one["a"], torch.full((1 + number % 3, 2), float(number)))
        assert torch.equal(one["b"], -one["a"])
        found.append(number)
    return found


@pytest.fixture
def ahead():
    """Makes an Ahead whose thread ends with the test."""
    made = []

    def make(chunks, n):
        made.append(Ahead(chunks, n))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("n", [0, 1, 4])
def test_the_same_chunks_in_the_same_order(ahead, n):
    source = Counting()
    made = ahead(source, n)
    assert isinstance(made, Chunks) and source.asked == 0  # nothing before the first is asked for
    assert numbers(made, 20) == list(range(20))
    made.state_dict()
    assert source.at == 20 + n  # that far ahead, and no further


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_state_in_the_middle_resumes_bit_for_bit(ahead, taken):
    made = ahead(Counting(), 3)
    numbers(made, taken)
    state = made.state_dict()
    assert all(isinstance(one, torch.Tensor | int | list) for one in state.values())
    rest = numbers(made, 6)
    other = ahead(Counting(), 3)
    numbers(other, 2)  # what it made before is forgotten
    other.load_state_dict(state)
    assert numbers(other, 6) == rest == list(range(taken, taken + 6))


def test_a_state_can_be_taken_twice_and_put_back_into_the_same(ahead):
    made = ahead(Counting(), 2)
    numbers(made, 3)
    first, second = made.state_dict(), made.state_dict()
    assert first["chunks.at"] == second["chunks.at"] == 5 and len(first["sites"]) == 2
    numbers(made, 4)
    made.load_state_dict(first)
    assert numbers(made, 4) == [3, 4, 5, 6]


def test_behind_a_buffer_batches_are_those_of_the_source_alone(ahead):
    alone, with_ahead = (ShuffleBuffer(chunks, 16, 4, 0) for chunks in (Counting(), ahead(Counting(), 3)))
    for _ in range(5):
        assert torch.equal(alone.batch()["a"], with_ahead.batch()["a"])
    resumed = ShuffleBuffer(ahead(Counting(), 3), 16, 4, 0)
    resumed.load_state_dict(with_ahead.state_dict())
    for _ in range(9):
        expected = alone.batch()["b"]
        assert torch.equal(expected, with_ahead.batch()["b"]) and torch.equal(expected, resumed.batch()["b"])


def test_what_the_source_raises_comes_out_when_it_is_its_turn(ahead):
    made = ahead(Counting(fails=[3]), 5)
    assert numbers(made, 3) == [0, 1, 2]
    with pytest.raises(UserError, match="chunk 3 failed"):
        made.chunk()
    assert numbers(made, 4) == [3, 4, 5, 6]  # asked again, the source goes on where it failed: no chunk is lost


def test_a_source_that_failed_is_not_asked_for_what_comes_after(ahead):
    source = Counting(fails=[2])
    made = ahead(source, 6)
    numbers(made, 1)
    made.state_dict()
    assert source.asked == 3


def test_a_state_before_a_failure_comes_out_holds_what_is_before_it(ahead):
    made = ahead(Counting(fails=[3]), 5)
    numbers(made, 1)
    state = made.state_dict()  # 1 and 2 are ready, 3 has failed
    other = ahead(Counting(), 5)
    other.load_state_dict(state)
    assert numbers(other, 5) == [1, 2, 3, 4, 5]
    assert numbers(made, 2) == [1, 2]
    with pytest.raises(UserError, match="chunk 3 failed"):
        made.chunk()


def test_the_end_of_a_finite_source(ahead):
    made = ahead(Counting(end=4), 2)
    assert numbers(made, 3) == [0, 1, 2]
    state = made.state_dict()
    assert numbers(made, 1) == [3]
    for _ in range(3):  # stays at its end
        with pytest.raises(StopIteration):
            made.chunk()
    other = ahead(Counting(end=4), 2)
    other.load_state_dict(state)
    assert numbers(other, 1) == [3]
    with pytest.raises(StopIteration):
        other.chunk()


def test_it_goes_on_after_it_was_closed(ahead):
    held, gate = threading.Event(), threading.Event()

    class Slow(Counting):
        def chunk(self):
            held.set()
            gate.wait(10)
            return super().chunk()

    source = Slow()
    made = ahead(source, 5)
    taker = threading.Thread(target=made.chunk)
    taker.start()
    assert held.wait(10)  # the first is under way
    while len(made._made) != 5 or made._made[0].running():  # until five wait behind it, and it is waited for
        pass
    closer = threading.Thread(target=made.close)
    closer.start()
    while len(made._made) > 0:  # the waiting ones are taken back before the first is done
        pass
    gate.set()
    taker.join()
    closer.join()
    assert source.asked == 1
    assert numbers(made, 4) == [1, 2, 3, 4]


SCRIPT = """
import sys, time
from mechinterp.sae.activations.ahead import Ahead

class Slow:
    made = 0
    def chunk(self):
        if self.made:
            time.sleep(0.2)
        self.made += 1
        return {}

ahead = Ahead(Slow(), 1_000)
try:
    ahead.chunk()
    raise KeyboardInterrupt
except KeyboardInterrupt:
    ahead.close()
print(ahead.chunks.made)
"""


def test_a_process_that_is_interrupted_ends_after_the_chunk_under_way():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) <= 3
