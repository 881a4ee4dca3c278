"""Encrypted transfers: the bounce ring as arithmetic, the header of a slot, its IV, and small copies packed into one.

    ring   = page of hints to the device || page of hints to the host || slots to the device || slots to the host
    page   = tail, head, what a sleeping reader and writer wait for: u64 of the machine's byte order, 64 bytes apart
    slot   = header, 64 bytes, which is the AAD || ciphertext || tag, 16 bytes; one every 260 KiB
    IV     = u32be(channel << 1 | direction) || u64be(counter): deterministic, NIST SP 800-38D, 8.2.1
    packed = n times (handle u32be || length u32be || offset u64be) || the data of all n, in this order

Hints only say when to look. What counts is the header that the tag covers, and the reader's own counter.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from cgpu_agent.errors import HostileInput, Misuse

HEADER_SIZE: Final = 64
TAG_SIZE: Final = 16
SLOT_SIZE: Final = 256 << 10
"""Most bytes of plaintext in a slot."""
DEPTH: Final = 8
"""Slots of one direction."""
STRIDE: Final = SLOT_SIZE + 4096
RING_SIZE: Final = 2 * 4096 + 2 * DEPTH * STRIDE
MAX_CHANNEL: Final = (1 << 31) - 1
MAX_COUNTER: Final = (1 << 63) - 1
MAX_PACKED: Final = 1024
PACKED_SIZE: Final = 16

_PAGE: Final = 4096
_WORDS_APART: Final = 8  # 64 bytes: no two sides write to one cache line
_MAGIC: Final = b"cgT1"
_HEADER: Final = struct.Struct(">4sBBHIIQQQQQII")
_IV: Final = struct.Struct(">IQ")
_PACKED: Final = struct.Struct(">IIQ")
_U64: Final = 1 << 64


class Direction(IntEnum):
    """Which way a slot goes."""

    TO_DEVICE = 0
    TO_HOST = 1


class Kind(IntEnum):
    """What a slot is. The first three go to the device, the others come from it."""

    WRITE = 1
    """A piece of data for one allocation."""
    PACKED = 2
    """``detail`` small copies."""
    READ = 3
    """Asks for ``left`` bytes; no data."""
    DATA = 4
    """A piece of what was asked for."""
    DONE = 5
    """Everything up to this transfer is in device memory."""
    REFUSED = 6
    """The transfer was not carried out; ``detail`` is a ``Refusal``."""


class Refusal(IntEnum):
    """Why a device does not carry out a transfer."""

    NO_ALLOCATION = 1
    BAD_RANGE = 2


_TO_DEVICE: Final = frozenset({Kind.WRITE, Kind.PACKED, Kind.READ})
_WITHOUT_DATA: Final = frozenset({Kind.READ, Kind.DONE, Kind.REFUSED})
_KINDS: Final = {int(kind): kind for kind in Kind}


class Hint(IntEnum):
    """The words of a page of hints, in their order."""

    TAIL = 0
    """Slots ever filled; the writer's."""
    HEAD = 1
    """Slots ever emptied; the reader's."""
    READER_SLEEPS = 2
    """What ``TAIL`` must have come to for the reader to be woken; 0: it is awake."""
    WRITER_SLEEPS = 3
    """Likewise, of ``HEAD``."""


def encode_header(*fields: int) -> bytes:
    """The ``HEADER_SIZE`` bytes of the ``SlotHeader`` with these fields, which takes longer to make than they do."""
    return _HEADER.pack(_MAGIC, *fields)


class SlotHeader(NamedTuple):
    """The head of a slot.

    Attributes:
        kind: what it is.
        direction: which way it goes.
        detail: how many packed copies, or a ``Refusal``; else 0.
        epoch: of the key.
        channel: up to ``MAX_CHANNEL``.
        session: number of the GPU session.
        transfer: number of the transfer, from 1 up; of packed copies, of the last one.
        counter: place of the slot in its direction of the channel.
        offset: place of the data in the allocation.
        left: bytes of the transfer that are not yet through, with those of this slot.
        length: bytes of plaintext in this slot.
        handle: allocation in device memory.
    """

    kind: int
    direction: int
    detail: int
    epoch: int
    channel: int
    session: int
    transfer: int
    counter: int
    offset: int
    left: int
    length: int
    handle: int

    def encode(self) -> bytes:
        return encode_header(*self)

    @classmethod
    def parse(cls, data: bytes) -> SlotHeader:
        """A header that could be genuine. Whether it is, its tag says.

        Raises ``HostileInput`` (``BAD_SLOT``), for lengths that do not fit a slot among others.
        """
        if len(data) != HEADER_SIZE:
            raise _bad("a header of another size")
        magic, *fields = _HEADER.unpack(data)
        found = cls(*fields)
        kind = _KINDS.get(found.kind)
        if magic != _MAGIC or kind is None:
            raise _bad("this is no slot")
        if found.direction != (Direction.TO_DEVICE if kind in _TO_DEVICE else Direction.TO_HOST):
            raise _bad("its kind does not go this way")
        _require_lengths(found, kind)
        return found


def _require_lengths(found: SlotHeader, kind: Kind) -> None:
    if found.length > SLOT_SIZE or found.channel > MAX_CHANNEL or found.offset + found.left >= _U64:
        raise _bad("a number is too large")
    if (found.length == 0) != (kind in _WITHOUT_DATA) or (kind is not Kind.READ and found.length > found.left):
        raise _bad("its length is not one of its kind")
    if kind is Kind.PACKED:
        good = 0 < found.detail <= MAX_PACKED and found.left == found.length
    elif kind is Kind.REFUSED:
        good = found.detail in set(Refusal)
    else:
        good = not found.detail
    if not good:
        raise _bad("its detail is not one of its kind")


def hint_index(direction: Direction, hint: Hint) -> int:
    """Where a word of hints is, counted in u64 from the beginning of the ring."""
    return direction * (_PAGE // 8) + hint * _WORDS_APART


def slot_offset(direction: Direction, counter: int) -> int:
    """Where slot number ``counter`` of a direction is, in bytes from the beginning of the ring."""
    return 2 * _PAGE + (direction * DEPTH + counter % DEPTH) * STRIDE


def iv(channel: int, direction: int, counter: int) -> bytes:
    """The 12 bytes of IV: no two slots under one key have the same."""
    return _IV.pack(channel << 1 | direction, counter)


class Piece(NamedTuple):
    """One packed copy: ``length`` bytes, at ``start`` of the payload, for ``offset`` of an allocation."""

    handle: int
    length: int
    offset: int
    start: int


def packed_size(lengths: Sequence[int]) -> int:
    """Bytes that copies of these lengths take in a slot."""
    return PACKED_SIZE * len(lengths) + sum(lengths)


def pack_into(out: memoryview, copies: Sequence[tuple[int, int, memoryview]]) -> int:
    """Write copies ``(handle, offset, data)``; returns the bytes taken.

    Raises ``Misuse`` (``BAD_COPY``) where they do not fit.
    """
    size = packed_size([len(data) for _, _, data in copies])
    if not 0 < len(copies) <= MAX_PACKED or size > len(out):
        raise Misuse("BAD_COPY", "these copies do not fit into one slot")
    place = PACKED_SIZE * len(copies)
    for index, (handle, offset, data) in enumerate(copies):
        _PACKED.pack_into(out, index * PACKED_SIZE, handle, len(data), offset)
        out[place : place + len(data)] = data
        place += len(data)
    return size


def unpack(payload: memoryview, count: int) -> tuple[Piece, ...]:
    """The copies in a verified payload; together they take all of it.

    Raises ``HostileInput`` (``BAD_SLOT``).
    """
    start = count * PACKED_SIZE
    if not 0 < count <= MAX_PACKED or start > len(payload):
        raise _bad("its packed copies are cut short")
    pieces = []
    for index in range(count):
        handle, length, offset = _PACKED.unpack_from(payload, index * PACKED_SIZE)
        pieces.append(Piece(handle, length, offset, start))
        start += length
    if start != len(payload) or not all(piece.length for piece in pieces):
        raise _bad("its packed copies are not as long as they say")
    return tuple(pieces)


def _bad(why: str) -> HostileInput:
    return HostileInput("BAD_SLOT", f"transfer slot: {why}")
