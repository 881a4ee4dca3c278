"""Memory that a caller writes to: its size is fixed, a part in use stays, and what is closed is empty to all."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from cgpu_agent.backends.keptmemory import adopted
from cgpu_agent.backends.workmemory import WorkMemory
from cgpu_agent.errors import Unavailable

SIZE = 3 * mmap.PAGESIZE + 5


@pytest.fixture
def memory() -> Iterator[WorkMemory]:
    made = WorkMemory(SIZE)
    yield made
    made.close()


def test_what_either_side_writes_the_other_sees(memory: WorkMemory) -> None:
    fd = memory.take_descriptor()
    os.pwrite(fd, b"text", SIZE - 4)
    with memory.use(SIZE - 6, 6) as part:
        assert bytes(part) == b"\0\0text"
        part[:2] = b"my"
    assert os.pread(fd, 99, SIZE - 6) == b"mytext"
    os.close(fd)


def test_its_size_and_its_seals_cannot_be_changed(memory: WorkMemory) -> None:
    fd = memory.take_descriptor()
    assert os.fstat(fd).st_size == SIZE
    assert os.fstat(fd).st_blocks * 512 >= SIZE  # all of it is there
    for change in (lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, SIZE + 1)):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


def test_a_hole_that_the_caller_punches_is_no_fault(memory: WorkMemory) -> None:
    fd = memory.take_descriptor()
    with mmap.mmap(fd, SIZE) as mine:
        mine[:] = bytes([255]) * SIZE
        mine.madvise(mmap.MADV_REMOVE, 0, mmap.PAGESIZE)
    with memory.use(0, SIZE) as part:
        assert bytes(part) == bytes(mmap.PAGESIZE) + bytes([255]) * (SIZE - mmap.PAGESIZE)
    os.close(fd)


def test_closed_memory_is_empty_for_whoever_kept_it_and_used_by_nobody(memory: WorkMemory) -> None:
    fd = memory.take_descriptor()
    with mmap.mmap(fd, SIZE) as mine:
        mine[:4] = b"text"
        memory.close()
        memory.close()
        assert os.fstat(fd).st_blocks == 0
        assert mine[:] == bytes(SIZE)
    with pytest.raises(Unavailable) as raised, memory.use(0, 1):
        pass
    assert raised.value.slug == "LEASE_GONE"
    os.close(fd)


def test_closing_waits_for_a_part_in_use_and_lets_nobody_else_in(memory: WorkMemory) -> None:
    closing = threading.Thread(target=memory.close)
    with memory.use(0, SIZE) as part:
        closing.start()
        while True:  # until it is closing
            try:
                with memory.use(0, 1):
                    pass
            except Unavailable:
                break
        part[:4] = b"text"  # and still there
        assert bytes(part[:4]) == b"text"
        assert closing.is_alive()
    closing.join(60)
    assert not closing.is_alive()


def test_a_part_that_a_fault_still_names_does_not_keep_the_memory(memory: WorkMemory) -> None:
    fd = memory.take_descriptor()
    os.pwrite(fd, b"text", 0)
    with memory.use(0, SIZE) as part:
        kept = memoryview(part)[:4]  # as a traceback would
    memory.close()
    assert bytes(kept) == bytes(4)
    assert os.fstat(fd).st_blocks * 512 <= mmap.PAGESIZE  # what was read just now
    kept.release()
    os.close(fd)


def test_nothing_is_used_past_the_end(memory: WorkMemory) -> None:
    for offset, size in ((0, SIZE + 1), (SIZE, 1), (-1, 1), (1, -1)):
        with pytest.raises(ValueError, match="outside"), memory.use(offset, size):
            pass


def test_memory_that_cannot_be_had_is_no_crash() -> None:
    with pytest.raises(Unavailable) as raised:
        WorkMemory(1 << 50)
    assert raised.value.slug == "NO_MEMORY"


def test_it_outlives_the_agent_as_it_is_and_as_what_it_is(memory: WorkMemory) -> None:
    fd = memory.take_descriptor()
    os.pwrite(fd, b"text", SIZE - 4)
    again = adopted(os.dup(memory.kept_by))
    assert isinstance(again, WorkMemory)
    assert again.size == SIZE
    with again.use(SIZE - 4, 4) as part:
        assert bytes(part) == b"text"
        part[:] = b"back"
    assert os.pread(fd, 9, SIZE - 4) == b"back"
    again.close()
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


def test_memory_to_read_by_only_is_not_adopted(memory: WorkMemory) -> None:
    fd = os.open(f"/proc/self/fd/{memory.kept_by}", os.O_RDONLY)
    with pytest.raises(Unavailable) as raised:
        adopted(fd)
    assert raised.value.slug == "NO_MEMORY"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
