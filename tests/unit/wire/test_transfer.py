"""The ring's arithmetic, slot headers, and packed copies."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.transfer import (
    DEPTH,
    HEADER_SIZE,
    MAX_CHANNEL,
    MAX_COUNTER,
    MAX_PACKED,
    RING_SIZE,
    SLOT_SIZE,
    TAG_SIZE,
    Direction,
    Hint,
    Kind,
    Piece,
    Refusal,
    SlotHeader,
    hint_index,
    iv,
    pack_into,
    packed_size,
    slot_offset,
    unpack,
)

U64 = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(
    SlotHeader,
    kind=st.just(Kind.WRITE),
    direction=st.just(Direction.TO_DEVICE),
    detail=st.just(0),
    epoch=st.integers(0, (1 << 32) - 1),
    channel=st.integers(0, MAX_CHANNEL),
    session=U64,
    transfer=U64,
    counter=U64,
    offset=st.integers(0, 1 << 62),
    left=st.integers(SLOT_SIZE, 1 << 62),
    length=st.integers(1, SLOT_SIZE),
    handle=st.integers(0, (1 << 32) - 1),
)
GOOD = SlotHeader(Kind.WRITE, Direction.TO_DEVICE, 0, 1, 2, 3, 4, 5, 6, 100, 100, 7)


def test_a_header_byte_by_byte() -> None:
    first = "63675431 01 00 0000 00000001 00000002 0000000000000003 0000000000000004 0000000000000005"
    assert GOOD.encode() == bytes.fromhex(first + "0000000000000006 0000000000000064 00000064 00000007")


@given(HEADERS)
def test_headers_survive(header: SlotHeader) -> None:
    assert len(header.encode()) == HEADER_SIZE
    assert SlotHeader.parse(header.encode()) == header


@given(st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE) | HEADERS.map(SlotHeader.encode), st.data())
def test_whatever_is_parsed_fits_a_slot(data: bytes, draw: st.DataObject) -> None:
    altered = bytearray(data)
    altered[draw.draw(st.integers(0, HEADER_SIZE - 1))] = draw.draw(st.integers(0, 255))
    try:
        found = SlotHeader.parse(bytes(altered))
    except HostileInput:
        pass
    else:
        assert found.length <= SLOT_SIZE
        assert found.encode() == altered


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 0},
        {"kind": 7},
        {"direction": Direction.TO_HOST},
        {"direction": 2},
        {"detail": 1},
        {"channel": MAX_CHANNEL + 1},
        {"length": 0},
        {"length": 101},
        {"length": SLOT_SIZE + 1, "left": SLOT_SIZE + 1},
        {"offset": (1 << 64) - 100},
        {"kind": Kind.READ},
        {"kind": Kind.PACKED},
        {"kind": Kind.PACKED, "detail": MAX_PACKED + 1},
        {"kind": Kind.PACKED, "detail": 1, "left": 101},
        {"kind": Kind.DONE, "direction": Direction.TO_HOST},
        {"kind": Kind.REFUSED, "direction": Direction.TO_HOST, "length": 0, "detail": 9},
    ],
    ids=str,
)
def test_refused_headers(change: dict[str, int]) -> None:
    assert SlotHeader.parse(GOOD.encode()) == GOOD
    with pytest.raises(HostileInput) as caught:
        SlotHeader.parse(GOOD._replace(**change).encode())
    assert caught.value.slug == "BAD_SLOT"


@pytest.mark.parametrize("data", [b"", GOOD.encode()[:-1], GOOD.encode() + b"\0", b"X" + GOOD.encode()[1:]])
def test_refused_bytes(data: bytes) -> None:
    with pytest.raises(HostileInput, match="BAD_SLOT"):
        SlotHeader.parse(data)


def test_answers_are_headers_too() -> None:
    for kind, detail in ((Kind.DONE, 0), (Kind.REFUSED, Refusal.BAD_RANGE)):
        header = GOOD._replace(kind=kind, direction=Direction.TO_HOST, detail=detail, left=0, length=0)
        assert SlotHeader.parse(header.encode()) == header


def test_nothing_in_the_ring_overlaps() -> None:
    areas = [(hint_index(way, hint) * 8, 8) for way in Direction for hint in Hint]
    areas += [
        (slot_offset(way, counter), HEADER_SIZE + SLOT_SIZE + TAG_SIZE)
        for way in Direction
        for counter in range(DEPTH)
    ]
    areas.sort()
    for (begin, size), (later, _) in itertools.pairwise(areas):
        assert begin + size <= later
    assert areas[-1][0] + areas[-1][1] <= RING_SIZE
    assert slot_offset(Direction.TO_HOST, DEPTH + 3) == slot_offset(Direction.TO_HOST, 3)


@given(
    st.tuples(st.integers(0, MAX_CHANNEL), st.sampled_from(Direction), st.integers(0, MAX_COUNTER)),
    st.tuples(st.integers(0, MAX_CHANNEL), st.sampled_from(Direction), st.integers(0, MAX_COUNTER)),
)
def test_two_slots_have_two_ivs(one: tuple[int, Direction, int], other: tuple[int, Direction, int]) -> None:
    assert len(iv(*one)) == 12
    assert (iv(*one) == iv(*other)) == (one == other)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1 << 40), st.binary(min_size=1, max_size=50)), min_size=1)
)
def test_packed_copies_survive(copies: list[tuple[int, int, bytes]]) -> None:
    out = memoryview(bytearray(SLOT_SIZE))
    size = pack_into(out, [(handle, offset, memoryview(data)) for handle, offset, data in copies])
    assert size == packed_size([len(data) for _, _, data in copies])
    pieces = unpack(out[:size], len(copies))
    assert [(p.handle, p.offset, bytes(out[p.start : p.start + p.length])) for p in pieces] == copies


@given(st.binary(max_size=100), st.integers(0, 5))
def test_unpacked_pieces_lie_within(payload: bytes, count: int) -> None:
    try:
        pieces = unpack(memoryview(payload), count)
    except HostileInput:
        pass
    else:
        assert sum(piece.length for piece in pieces) + 16 * count == len(payload)
        assert all(piece.start + piece.length <= len(payload) for piece in pieces)


def test_refused_packed_copies() -> None:
    one = memoryview(b"\0\0\0\1\0\0\0\2" + bytes(8) + b"ab")
    assert unpack(one, 1) == (Piece(1, 2, 0, 16),)
    for payload, count in ((one, 0), (one, 2), (one[:-1], 1), (memoryview(bytes(one) + b"c"), 1), (one[:8], 1)):
        with pytest.raises(HostileInput, match="BAD_SLOT"):
            unpack(payload, count)
    with pytest.raises(HostileInput, match="BAD_SLOT"):
        unpack(memoryview(bytes(16)), 1)
    for copies in ([], [(1, 0, memoryview(bytes(SLOT_SIZE)))]):
        with pytest.raises(Misuse, match="BAD_COPY"):
            pack_into(memoryview(bytearray(SLOT_SIZE)), copies)
