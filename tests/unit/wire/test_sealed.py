"""Sealed objects as arithmetic: names, headers, and where segments lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.sealed import HEADER_SIZE, MAX_SEGMENTS, SEGMENT_SIZES, TAG_SIZE, Header, Layout, ObjectName

MIB = SEGMENT_SIZES["1MiB"]
SIZES = st.integers(57, 200) | st.sampled_from(list(SEGMENT_SIZES.values()))


class TestObjectName:
    def test_its_associated_data_is_what_the_documentation_says(self) -> None:
        expected = b"cgpu/object/1\0\0\5kek-1\0\6models\0\x08\0\0\0\0\0\0\1\2"
        assert ObjectName("kek-1", "models", 258).associated_data() == expected

    @given(*[st.tuples(st.text("ab/", min_size=1), st.text("ab/", min_size=1), st.integers(1, 3))] * 2)
    def test_two_names_never_look_the_same(self, one: tuple[str, str, int], other: tuple[str, str, int]) -> None:
        same = ObjectName(*one).associated_data() == ObjectName(*other).associated_data()
        assert same == (one == other)

    @pytest.mark.parametrize("bad", ["", "a b", "a\n", "\x7f", "schlüssel", "x" * 256])
    def test_refuses_ids_that_could_be_mistaken(self, bad: str) -> None:
        for names in ((bad, "object"), ("key", bad)):
            with pytest.raises(Misuse) as caught:
                ObjectName(*names, 1)
            assert caught.value.slug == "BAD_OBJECT_NAME"

    @pytest.mark.parametrize("bad", [-1, 0, 1 << 64])
    def test_refuses_versions_that_no_owner_gives(self, bad: int) -> None:
        with pytest.raises(Misuse) as caught:
            ObjectName("key", "object", bad)
        assert caught.value.slug == "BAD_OBJECT_NAME"

    def test_takes_the_longest_ids_and_the_last_version(self) -> None:
        assert len(ObjectName("k" * 255, "o" * 255, (1 << 64) - 1).associated_data()) == 14 + 2 * 257 + 10


class TestHeader:
    def test_encodes_what_it_parses(self) -> None:
        data = bytes([40]) + bytes(range(39))
        header = Header.parse(data)
        assert (header.salt, header.prefix, header.encode()) == (bytes(range(32)), bytes(range(32, 39)), data)

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"", "TRUNCATED"),
            (b"\x28" + bytes(38), "TRUNCATED"),
            (b"\x28" + bytes(40), "TRAILING_BYTES"),
            (b"\x18" + bytes(39), "BAD_FORMAT"),
            (b"\x29" + bytes(39), "BAD_FORMAT"),
        ],
    )
    def test_refuses_everything_else(self, data: bytes, slug: str) -> None:
        with pytest.raises(HostileInput) as caught:
            Header.parse(data)
        assert caught.value.slug == slug

    def test_is_another_each_time(self) -> None:
        assert Header.fresh() != Header.fresh()

    def test_nonces_hold_place_and_end(self) -> None:
        header = Header(bytes(32), b"prefix!")
        assert header.nonce(258, last=False) == b"prefix!\0\0\1\2\0"
        assert header.nonce(MAX_SEGMENTS - 1, last=True) == b"prefix!\xff\xff\xff\xff\1"

    def test_a_nonce_never_comes_round_again(self) -> None:
        with pytest.raises(Misuse) as caught:
            Header(bytes(32), bytes(7)).nonce(MAX_SEGMENTS, last=True)
        assert caught.value.slug == "OBJECT_TOO_LARGE"


class TestLayout:
    @pytest.mark.parametrize(
        ("plain", "segments", "sealed"),
        [
            (0, 1, 56),
            (MIB - 56, 1, MIB),
            (MIB - 55, 2, MIB + 17),
            (2 * MIB - 72, 2, 2 * MIB),
            (2 * MIB - 71, 3, 2 * MIB + 17),
        ],
    )
    def test_counts_as_tink_does(self, plain: int, segments: int, sealed: int) -> None:
        layout = Layout(MIB, plain)
        assert (layout.segments, layout.sealed_size) == (segments, sealed)

    @given(SIZES, st.integers(0, 5000))
    def test_segments_cover_object_and_plaintext_without_a_gap(self, segment_size: int, plain: int) -> None:
        layout = Layout(segment_size, plain)
        segments = [layout.segment(index) for index in range(layout.segments)]
        offset, plain_offset = HEADER_SIZE, 0
        for segment in segments:
            assert (segment.offset, segment.plain_offset) == (offset, plain_offset)
            assert segment.last == (segment is segments[-1])
            assert segment.plain_size > 0 or plain == 0
            offset += segment.size
            plain_offset += segment.plain_size
        assert all(each.offset + each.size == (each.index + 1) * segment_size for each in segments[:-1])
        assert segments[-1].size <= segment_size
        assert (offset, plain_offset) == (layout.sealed_size, plain)

    @given(SIZES, st.integers(1, 5000), st.data())
    def test_finds_the_segment_of_a_byte(self, segment_size: int, plain: int, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, plain - 1))
        segment = Layout(segment_size, plain).segment_of(at)
        assert segment.plain_offset <= at < segment.plain_offset + segment.plain_size

    @given(SIZES, st.integers(0, 5000))
    def test_a_size_is_read_back_or_refused(self, segment_size: int, size: int) -> None:
        if size < HEADER_SIZE + TAG_SIZE or (size > segment_size and 0 < size % segment_size <= TAG_SIZE):
            with pytest.raises(HostileInput) as caught:
                Layout.of_sealed(segment_size, size)
            assert caught.value.slug == "TRUNCATED"
        else:
            assert Layout.of_sealed(segment_size, size).sealed_size == size

    @pytest.mark.parametrize("size", [-1, 0, 56, 1 << 31])
    def test_refuses_impossible_segment_sizes(self, size: int) -> None:
        with pytest.raises(Misuse) as caught:
            Layout(size, 0)
        assert caught.value.slug == "BAD_SEGMENT_SIZE"
        with pytest.raises(Misuse) as caught:
            Layout.of_sealed(size, 100)
        assert caught.value.slug == "BAD_SEGMENT_SIZE"

    def test_refuses_more_segments_than_there_are_nonces(self) -> None:
        largest = MAX_SEGMENTS * (4096 - TAG_SIZE) - HEADER_SIZE
        assert Layout(4096, largest).segments == MAX_SEGMENTS
        with pytest.raises(Misuse) as caught:
            Layout(4096, largest + 1)
        assert caught.value.slug == "OBJECT_TOO_LARGE"
        assert Layout.of_sealed(4096, MAX_SEGMENTS * 4096).plain_size == largest
        with pytest.raises(HostileInput) as refused:
            Layout.of_sealed(4096, MAX_SEGMENTS * 4096 + 17)
        assert refused.value.slug == "TOO_LARGE"

    @pytest.mark.parametrize("index", [-1, 2])
    def test_has_no_other_segments(self, index: int) -> None:
        with pytest.raises(ValueError):
            Layout(80, 30).segment(index)
