"""Shared memory: its size is fixed, a turn that has ended writes nothing, and what is closed is empty."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from cgpu_agent.backends.keptmemory import adopted
from cgpu_agent.backends.memory import SharedMemory
from cgpu_agent.errors import HostileInput, Unavailable
from frontdoor_kit import needs_root

SIZE = 3 * mmap.PAGESIZE + 5


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory(SIZE)
    yield made
    made.close()


def content(fd: int) -> bytes:
    return os.pread(fd, SIZE + 1, 0)


def test_what_is_written_is_seen_and_wiped(memory: SharedMemory) -> None:
    fd = memory.take_descriptor()
    memory.write(memory.begin(), 4, b"text")
    assert content(fd) == b"\0\0\0\0text" + bytes(SIZE - 8)
    memory.wipe()
    assert content(fd) == bytes(SIZE)
    os.close(fd)


def test_a_turn_ends_with_the_next_and_with_a_wipe(memory: SharedMemory) -> None:
    fd = memory.take_descriptor()
    first = memory.begin()
    second = memory.begin()
    for turn in (first, second):
        if turn == second:
            memory.wipe()
        with pytest.raises(Unavailable) as raised:
            memory.write(turn, 0, b"late")
        assert raised.value.slug == "LEASE_GONE"
    assert content(fd) == bytes(SIZE)
    os.close(fd)


def test_a_turn_begins_in_empty_memory(memory: SharedMemory) -> None:
    fd = memory.take_descriptor()
    memory.write(memory.begin(), 0, bytes([255]) * SIZE)
    memory.begin()
    assert content(fd) == bytes(SIZE)
    os.close(fd)


def test_nothing_is_written_past_the_end(memory: SharedMemory) -> None:
    fd = memory.take_descriptor()
    turn = memory.begin()
    for offset in (-1, SIZE - 3, SIZE, 1 << 40):
        with pytest.raises(ValueError, match="outside"):
            memory.write(turn, offset, b"four")
    memory.wipe()
    assert content(fd) == bytes(SIZE)
    os.close(fd)


def test_what_is_closed_is_empty_and_gives_its_pages_back(memory: SharedMemory) -> None:
    fd = memory.take_descriptor()
    turn = memory.begin()
    memory.write(turn, 0, b"text")
    memory.close()
    memory.close()
    assert os.fstat(fd).st_blocks == 0
    assert content(fd) == bytes(SIZE)
    with pytest.raises(Unavailable):
        memory.write(turn, 0, b"late")
    memory.wipe()
    os.close(fd)


def test_the_descriptor_is_handed_out_once(memory: SharedMemory) -> None:
    os.close(memory.take_descriptor())
    with pytest.raises(ValueError, match="taken"):
        memory.take_descriptor()


def test_memory_that_cannot_be_had_is_a_state() -> None:
    with pytest.raises(Unavailable) as raised:
        SharedMemory(1 << 62)
    assert raised.value.slug == "NO_MEMORY"


@pytest.mark.parametrize("settled", [True, False])
def test_only_what_was_settled_outlives_the_agent(memory: SharedMemory, settled: bool) -> None:
    turn = memory.begin()
    memory.write(turn, 0, b"text")
    if settled:
        memory.settle(turn)
    again = adopted(os.dup(memory.kept_by))
    assert content(memory.kept_by).startswith(b"text") == settled
    assert again.size == SIZE
    again.close()
    assert content(memory.kept_by) == bytes(SIZE)


def test_a_turn_that_has_ended_settles_nothing(memory: SharedMemory) -> None:
    late = memory.begin()
    memory.write(memory.begin(), 0, b"text")
    with pytest.raises(Unavailable):
        memory.settle(late)
    adopted(os.dup(memory.kept_by)).close()
    assert content(memory.kept_by) == bytes(SIZE)


def test_what_was_settled_is_unsettled_while_it_is_filled_again(memory: SharedMemory) -> None:
    memory.settle(memory.begin())
    memory.write(memory.begin(), 0, b"text")
    again = adopted(os.dup(memory.kept_by))
    assert content(memory.kept_by) == bytes(SIZE)
    again.close()


@needs_root
def test_memory_of_another_user_is_not_adopted(memory: SharedMemory) -> None:
    fd = os.dup(memory.kept_by)
    os.fchown(fd, 12345, -1)
    with pytest.raises(HostileInput) as raised:
        adopted(fd)
    assert raised.value.slug == "BAD_KEPT_MEMORY"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
