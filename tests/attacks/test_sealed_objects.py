"""Attack 30, its part in sealed objects: whoever stores one can withhold it, and do nothing else to it."""

from __future__ import annotations

import io
import os

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cgpu_agent.errors import HostileInput
from cgpu_agent.objects.cipher import SegmentCipher
from cgpu_agent.objects.file import SealedFile
from cgpu_agent.wire.sealed import TAG_SIZE, Header, ObjectName
from fixtures.sealed import KEY, NAME, SMALL, joined, parts, seal, unseal

PLAIN = bytes(range(200))
SEALED = seal(PLAIN)
HEADER, SEGMENTS = parts(SEALED)


def read_file(sealed: bytes, name: ObjectName, key: bytes, segment_size: int) -> None:
    fd = os.memfd_create("object")
    try:
        os.pwrite(fd, sealed, 0)
        file = SealedFile(fd, key, name, segment_size)
        file.read_into(0, bytearray(file.size))
    finally:
        os.close(fd)


def refused(sealed: bytes, name: ObjectName = NAME, key: bytes = KEY, segment_size: int = SMALL) -> str:
    """The reason, for streams in one and in many pieces and for files; what got out is verified plaintext."""
    slugs = set()
    for pieces in (None, 1):
        sink = io.BytesIO()
        with pytest.raises(HostileInput) as caught:
            unseal(sealed, name, key=key, segment_size=segment_size, pieces=pieces, sink=sink)
        assert PLAIN.startswith(sink.getvalue())
        slugs.add(caught.value.slug)
    with pytest.raises(HostileInput) as caught:
        read_file(sealed, name, key, segment_size)
    slugs.add(caught.value.slug)
    assert len(slugs) == 1 or slugs == {"NOT_AUTHENTIC", "TRUNCATED"}  # a file's size is looked at first
    return min(slugs)


def test_the_genuine_object_opens() -> None:
    assert len(SEGMENTS) == 4
    assert unseal(SEALED) == PLAIN


@pytest.mark.parametrize("at", range(len(SEALED)))
def test_every_flipped_byte_is_noticed(at: int) -> None:
    altered = bytearray(SEALED)
    altered[at] ^= 0x80
    assert refused(bytes(altered)) == ("NOT_AUTHENTIC" if at else "BAD_FORMAT")


def test_every_truncation_is_noticed() -> None:
    for size in range(len(SEALED)):
        assert refused(SEALED[:size]) in ("NOT_AUTHENTIC", "TRUNCATED")


@pytest.mark.parametrize("more", [b"\0", bytes(TAG_SIZE), bytes(SMALL), SEGMENTS[0], SEGMENTS[-1], SEALED])
def test_every_prolongation_is_noticed(more: bytes) -> None:
    assert refused(SEALED + more) == "NOT_AUTHENTIC"


def test_a_prolonged_full_last_segment_is_noticed() -> None:
    """Where the last segment is full, what follows it lies outside: the end is in its nonce."""
    full = seal(PLAIN[: 24 + 64])
    assert len(full) == 2 * SMALL
    for more in (b"\0", bytes(TAG_SIZE), bytes(TAG_SIZE + 1), bytes(SMALL)):
        with pytest.raises(HostileInput):
            unseal(full + more)


@pytest.mark.parametrize(
    "order",
    [[0, 2, 1, 3], [0, 1, 1, 2, 3], [0, 1, 3], [0, 1, 2], [0], [0, 3], [0, 1, 2, 2], [0, 1, 2, 3, 3], [0, 3, 2, 1]],
)
def test_segments_swapped_dropped_or_doubled_are_noticed(order: list[int]) -> None:
    assert refused(joined(HEADER, [SEGMENTS[index] for index in order])) == "NOT_AUTHENTIC"


def test_segments_of_two_objects_do_not_mix() -> None:
    other_header, other = parts(seal(PLAIN))
    for index in range(len(SEGMENTS)):
        mixed = [*SEGMENTS[:index], other[index], *SEGMENTS[index + 1 :]]
        assert refused(joined(HEADER, mixed)) == "NOT_AUTHENTIC"
    assert refused(joined(other_header, SEGMENTS)) == "NOT_AUTHENTIC"


@pytest.mark.parametrize(
    "name",
    [
        ObjectName("kek-2", "models/tiny", 7),
        ObjectName("kek-1", "models/other", 7),
        ObjectName("kek-1", "models/tiny", 6),
        ObjectName("kek-1", "models/tiny", 8),
        ObjectName("kek-1m", "odels/tiny", 7),
    ],
    ids=["another key id", "another object", "an earlier version", "a later version", "the same letters"],
)
def test_an_object_does_not_pass_for_another_of_its_key(name: ObjectName) -> None:
    assert refused(SEALED, name) == "NOT_AUTHENTIC"


def test_another_key_opens_nothing() -> None:
    assert refused(SEALED, key=bytes(32)) == "NOT_AUTHENTIC"


def test_another_cut_opens_nothing() -> None:
    for size in (SMALL - 1, SMALL + 1, 2 * SMALL):
        assert refused(SEALED, segment_size=size) in ("NOT_AUTHENTIC", "TRUNCATED")


def test_an_empty_object_is_as_well_kept() -> None:
    empty = seal(b"")
    assert unseal(empty) == b""
    for at in range(len(empty)):
        altered = bytearray(empty)
        altered[at] ^= 1
        refused(bytes(altered))


def test_a_plaintext_has_one_cut_only() -> None:
    """A holder of the key could end an object with an empty segment; its size is not one that a plaintext has."""
    header = Header.parse(HEADER)
    cipher = SegmentCipher(KEY, NAME, header)
    first, last = memoryview(bytearray(24 + TAG_SIZE)), memoryview(bytearray(TAG_SIZE))
    cipher.seal(0, last=False, plain=memoryview(PLAIN[:24]), out=first)
    cipher.seal(1, last=True, plain=memoryview(b""), out=last)
    assert refused(joined(HEADER, [bytes(first), bytes(last)])) == "TRUNCATED"


def test_unverified_plaintext_is_wiped() -> None:
    """The cipher itself leaves it in the output buffer."""
    sealed = bytearray(SEGMENTS[0])
    sealed[-1] ^= 1
    out = memoryview(bytearray(24))
    with pytest.raises(HostileInput):
        SegmentCipher(KEY, NAME, Header.parse(HEADER)).open(0, last=False, sealed=memoryview(sealed), out=out)
    assert out == bytes(24)

    aead, left = AESGCM(KEY), bytearray(24)
    altered = bytearray(aead.encrypt(bytes(12), PLAIN[:24], None))
    altered[-1] ^= 1
    with pytest.raises(InvalidTag):
        aead.decrypt_into(bytes(12), altered, None, left)
    assert left == PLAIN[:24]
