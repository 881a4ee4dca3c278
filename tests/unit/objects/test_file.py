"""Ranges of a sealed file: the same bytes as the whole, and a size that is verified."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.objects.file import SealedFile
from fixtures.sealed import KEY, NAME, SMALL, joined, parts, seal

PLAIN = bytes(range(256)) * 2


class Memory:
    """A file in memory; closed at the end of the test."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("object")

    def holds(self, data: bytes) -> int:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, data, 0)
        return self.fd


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    os.close(made.fd)


def opened(fd: int) -> SealedFile:
    return SealedFile(fd, KEY, NAME, SMALL)


def read(file: SealedFile, offset: int, size: int) -> bytes:
    out = bytearray(size)
    file.read_into(offset, out)
    return bytes(out)


@given(st.binary(max_size=400), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=5))
def test_every_range_is_that_of_the_plaintext(plain: bytes, ranges: list[tuple[int, int]]) -> None:
    fd = Memory().holds(seal(plain))
    try:
        file = opened(fd)
        assert file.size == len(plain)
        for one, other in ranges:
            start, end = sorted((min(one, len(plain)), min(other, len(plain))))
            assert read(file, start, end - start) == plain[start:end]
    finally:
        os.close(fd)


def test_the_offset_of_the_descriptor_is_neither_used_nor_moved(memory: Memory) -> None:
    fd = memory.holds(seal(PLAIN))
    os.lseek(fd, 5, os.SEEK_SET)
    assert read(opened(fd), 100, 200) == PLAIN[100:300]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 5


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 513), (512, 1), (513, 0)])
def test_refuses_ranges_past_the_end(memory: Memory, offset: int, size: int) -> None:
    with pytest.raises(Misuse) as caught:
        read(opened(memory.holds(seal(PLAIN))), offset, size)
    assert caught.value.slug == "BAD_RANGE"


def test_refuses_what_is_no_regular_file() -> None:
    ends = os.pipe()
    try:
        with pytest.raises(Misuse) as caught:
            opened(ends[0])
    finally:
        for end in ends:
            os.close(end)
    assert caught.value.slug == "NOT_A_FILE"


def test_a_file_cut_between_segments_does_not_open(memory: Memory) -> None:
    """Not even for a range that is all there: the size that is told would be a lie."""
    header, segments = parts(seal(PLAIN))
    with pytest.raises(HostileInput) as caught:
        opened(memory.holds(joined(header, segments[:-1])))
    assert caught.value.slug == "NOT_AUTHENTIC"


def test_a_file_that_shrinks_while_it_is_open_is_refused(memory: Memory) -> None:
    file = opened(memory.holds(seal(PLAIN)))
    os.ftruncate(memory.fd, 200)
    assert read(file, 0, 24) == PLAIN[:24]
    with pytest.raises(HostileInput) as caught:
        read(file, 200, 100)
    assert caught.value.slug == "TRUNCATED"


def test_nothing_of_an_altered_segment_reaches_the_reader(memory: Memory) -> None:
    sealed = bytearray(seal(PLAIN))
    sealed[2 * SMALL + 1] ^= 1
    file = opened(memory.holds(bytes(sealed)))
    out = bytearray(b"\xaa" * len(PLAIN))
    with pytest.raises(HostileInput) as caught:
        file.read_into(0, out)
    assert caught.value.slug == "NOT_AUTHENTIC"
    assert out == PLAIN[:88] + b"\xaa" * (len(PLAIN) - 88)
    # Its staging memory passes neither for it nor for the segment that was opened before.
    assert read(file, 30, 10) == PLAIN[30:40]
    with pytest.raises(HostileInput):
        read(file, 90, 1)
    assert read(file, 152, 100) == PLAIN[152:252]
