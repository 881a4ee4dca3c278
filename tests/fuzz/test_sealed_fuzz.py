"""Hostile bytes in place of sealed objects: refused, unless they are the object itself."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.sealed import Header, Layout
from fixtures.sealed import SMALL, seal, unseal

PLAIN = bytes(range(200))
SEALED = seal(PLAIN)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """The object with pieces replaced, cut out, doubled, moved or appended."""
    data = bytearray(SEALED)
    for _ in range(draw(st.integers(0, 3))):
        at, size = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 1, 16, 40, SMALL]))
        source = draw(st.integers(0, len(data)))
        data[at : at + size] = draw(st.binary(max_size=6) | st.just(bytes(data[source : source + SMALL])))
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(edited() | st.binary(max_size=300).map(lambda tail: b"\x28" + tail), st.integers(1, 200) | st.none())
def test_only_the_object_itself_opens(data: bytes, pieces: int | None) -> None:
    sink = io.BytesIO()
    try:
        opened = unseal(data, pieces=pieces, sink=sink)
    except HostileInput:
        assert data != SEALED
        assert PLAIN.startswith(sink.getvalue())
    else:
        assert (data, opened) == (SEALED, PLAIN)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=45) | st.binary(min_size=39, max_size=39).map(lambda tail: b"\x28" + tail))
def test_what_is_read_of_a_header_is_all_that_is_there(data: bytes) -> None:
    try:
        header = Header.parse(data)
    except HostileInput:
        return
    assert header.encode() == data


@settings(max_examples=300, deadline=None)
@given(st.integers(57, (1 << 31) - 1), st.integers(0, 1 << 70))
def test_sizes_are_read_or_refused_whatever_they_are(segment_size: int, size: int) -> None:
    try:
        layout = Layout.of_sealed(segment_size, size)
    except HostileInput:
        return
    assert layout.sealed_size == size
