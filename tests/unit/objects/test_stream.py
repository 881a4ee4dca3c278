"""Sealing and opening streams: round trips however they are cut, and streams that are never mistaken for whole."""

from __future__ import annotations

import io
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.objects.stream import Opener, Sealer
from cgpu_agent.wire.sealed import Layout
from fixtures.sealed import KEY, NAME, SMALL, seal, unseal

PIECES = st.integers(1, 300) | st.none()


@given(st.binary(max_size=600), st.integers(57, 200), PIECES, PIECES)
def test_what_was_sealed_opens(plain: bytes, segment_size: int, writes: int | None, reads: int | None) -> None:
    sealed = seal(plain, segment_size=segment_size, pieces=writes)
    assert len(sealed) == Layout(segment_size, len(plain)).sealed_size
    assert unseal(sealed, segment_size=segment_size, pieces=reads) == plain


def test_no_two_objects_share_anything() -> None:
    one, other = seal(bytes(24)), seal(bytes(24))
    assert one[1:40] != other[1:40]
    assert one[40:] != other[40:]


def test_takes_any_contiguous_bytes() -> None:
    sink = io.BytesIO()
    sealer = Sealer(sink, bytearray(KEY), NAME, SMALL)
    sealer.write(bytearray(b"abc"))
    sealer.write(memoryview(b"defg").cast("H"))
    sealer.finish()
    assert unseal(sink.getvalue()) == b"abcdefg"


def test_a_sink_that_takes_a_little_at_a_time_gets_everything() -> None:
    class Slow(io.BytesIO):
        def write(self, data: object) -> int:
            return super().write(memoryview(data)[:3])  # type: ignore[arg-type, call-overload]

    sink = Slow()
    assert unseal(seal(bytes(500)), sink=sink) == bytes(500)


@pytest.mark.parametrize("taken", [0, None])
def test_a_sink_that_takes_nothing_ends_the_stream(taken: int | None) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            return taken  # type: ignore[return-value]

    with pytest.raises(BlockingIOError):
        Sealer(Full(), KEY, NAME, SMALL)


def test_an_unfinished_seal_is_no_object() -> None:
    """However much was written: what a crash left behind must not pass for the whole."""
    for count in (0, 24, 25, 88, 89, 500):
        sink = io.BytesIO()
        Sealer(sink, KEY, NAME, SMALL).write(bytes(count))
        with pytest.raises(HostileInput):
            unseal(sink.getvalue())


def test_nothing_follows_the_end() -> None:
    sealer = Sealer(io.BytesIO(), KEY, NAME, SMALL)
    sealer.finish()
    for again in (sealer.finish, lambda: sealer.write(b"x")):
        with pytest.raises(Misuse) as caught:
            again()
        assert caught.value.slug == "STREAM_ENDED"


def test_nothing_follows_a_failure() -> None:
    sealed = bytearray(seal(bytes(200)))
    sealed[100] ^= 1
    opener = Opener(sink := io.BytesIO(), KEY, NAME, SMALL)
    with pytest.raises(HostileInput):
        opener.write(bytes(sealed))
    before = sink.getvalue()
    for again in (opener.finish, lambda: opener.write(b"x")):
        with pytest.raises(Misuse) as caught:
            again()
        assert caught.value.slug == "STREAM_ENDED"
    assert sink.getvalue() == before


@pytest.mark.parametrize("kind", [Sealer, Opener])
@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33)])
def test_refuses_keys_of_another_size(kind: type[Sealer | Opener], key: bytes) -> None:
    with pytest.raises(Misuse) as caught:
        kind(io.BytesIO(), key, NAME, SMALL)
    assert caught.value.slug == "BAD_KEY"


@pytest.mark.parametrize("kind", [Sealer, Opener])
def test_refuses_impossible_segment_sizes(kind: type[Sealer | Opener]) -> None:
    with pytest.raises(Misuse) as caught:
        kind(io.BytesIO(), KEY, NAME, 56)
    assert caught.value.slug == "BAD_SEGMENT_SIZE"


def test_memory_does_not_grow_with_the_object() -> None:
    class Nowhere(io.BytesIO):
        def write(self, data: object) -> int:
            return len(memoryview(data))  # type: ignore[arg-type]

    piece = bytes(1 << 16)
    tracemalloc.start()
    try:
        sealer = Sealer(Nowhere(), KEY, NAME, 1 << 16)
        for _ in range(200):
            sealer.write(piece)
        sealer.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(piece)
