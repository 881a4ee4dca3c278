"""The outermost layer of DER and PEM."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.der import MAX_DER, MAX_PEM_BLOCKS, is_pem, pem_blocks, trim_der

LARGEST = b"\x30\x82" + (MAX_DER - 4).to_bytes(2, "big") + bytes(MAX_DER - 4)
BLOCK = b"-----BEGIN THING-----\nAQID\n-----END THING-----\n"


class TestTrim:
    @pytest.mark.parametrize(
        "value",
        [
            b"\x30\x00",
            b"\x30\x03\x02\x01\x07",
            b"\x30\x7f" + b"\1" * 127,
            b"\x30\x81\x80" + bytes(128),
            b"\x30\x81\xff" + bytes(255),
            b"\x30\x82\x01\x00" + bytes(256),
            LARGEST,
        ],
    )
    def test_cuts_zeros_and_only_zeros(self, value: bytes) -> None:
        assert trim_der(value) == trim_der(value + b"\0") == trim_der(value + bytes(500)) == value
        for tail in (b"\1", b"\0\1", bytes(499) + b"\xff", b"\1" + bytes(499)):
            with pytest.raises(HostileInput) as caught:
                trim_der(value + tail)
            assert caught.value.slug == "TRAILING_BYTES"

    @pytest.mark.parametrize(
        ("value", "slug"),
        [
            (b"", "TRUNCATED"),
            (b"\x30", "TRUNCATED"),
            (b"\x30\x01", "TRUNCATED"),
            (b"\x30\x82\x01", "TRUNCATED"),
            (b"\x30\x82\x01\x00" + bytes(255), "TRUNCATED"),
            (LARGEST[:-1], "TRUNCATED"),
            (b"\x31\x00", "BAD_DER"),
            (b"\0" * 100, "BAD_DER"),
            (b"\xff" * 100, "BAD_DER"),
            (b"\x30\x80\x00\x00", "BAD_DER"),
            (b"\x30\xff", "BAD_DER"),
            (b"\x30\x81\x7f" + bytes(127), "BAD_DER"),
            (b"\x30\x82\x00\x80" + bytes(128), "BAD_DER"),
            (b"\x30\x83\x00\x01\x00" + bytes(256), "BAD_DER"),
            (b"\x30\x84\x00\x00\x01\x00" + bytes(256), "BAD_DER"),
            (b"\x30\x83\xff\xff\xff", "TOO_LARGE"),
            (b"\x30\x82" + (MAX_DER - 3).to_bytes(2, "big") + bytes(MAX_DER), "TOO_LARGE"),
        ],
    )
    def test_refuses_lengths_that_der_does_not_have(self, value: bytes, slug: str) -> None:
        with pytest.raises(HostileInput) as caught:
            trim_der(value)
        assert caught.value.slug == slug

    def test_leaves_a_real_certificate_as_it_is(self, vectors: Path) -> None:
        certificate = (vectors / "vm-boot" / "quote-sample" / "ek-rsa.crt").read_bytes()
        assert trim_der(certificate.ljust(4096, b"\0")) == certificate


class TestPem:
    def test_reads_label_and_content_of_every_block(self) -> None:
        other = BLOCK.replace(b"THING", b"OTHER THING").replace(b"AQID", b"BA\r\n==")
        assert pem_blocks(b"\n " + BLOCK + b"\r\n\n" + other) == [("THING", b"\1\2\3"), ("OTHER THING", b"\4")]

    def test_tells_pem_from_anything_else(self) -> None:
        assert is_pem(BLOCK)
        assert is_pem(b"\n\t " + BLOCK)
        assert not is_pem(b"")
        assert not is_pem(b"text\n" + BLOCK)
        assert not is_pem(b"\x30\x00")

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"", "BAD_PEM"),
            (b" \n", "BAD_PEM"),
            (b"-----BEGIN X-----\n-----END X-----", "BAD_PEM"),
            (b"text\n" + BLOCK, "BAD_PEM"),
            (BLOCK + b"text", "BAD_PEM"),
            (BLOCK + b"text\n" + BLOCK, "BAD_PEM"),
            (BLOCK.replace(b"END THING", b"END OTHER"), "BAD_PEM"),
            (BLOCK.replace(b"AQID", b"AQI"), "BAD_PEM"),
            (BLOCK.replace(b"AQID", b"AQ=D"), "BAD_PEM"),
            (BLOCK.replace(b"AQID", b"Proc-Type: 4\n\nAQID"), "BAD_PEM"),
            (BLOCK[:-10], "BAD_PEM"),
            (BLOCK * (MAX_PEM_BLOCKS + 1), "TOO_LARGE"),
            (BLOCK + b" " * 2 * MAX_DER * MAX_PEM_BLOCKS, "TOO_LARGE"),
        ],
    )
    def test_refuses_what_stands_between_and_inside_blocks(self, data: bytes, slug: str) -> None:
        with pytest.raises(HostileInput) as caught:
            pem_blocks(data)
        assert caught.value.slug == slug

    def test_reads_as_many_blocks_as_it_allows(self) -> None:
        assert len(pem_blocks(BLOCK * MAX_PEM_BLOCKS)) == MAX_PEM_BLOCKS
