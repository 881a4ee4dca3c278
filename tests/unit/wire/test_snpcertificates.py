"""The host's table of certificates, well-formed and not."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.snpcertificates import parse_certificate_table
from fixtures.snpcertificates import CRL, VCEK, certificate_table

DER = b"\x30\x03\x02\x01\x05"


def refusal(data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_certificate_table(data)
    return caught.value.slug


@pytest.mark.parametrize("name", [VCEK.bytes, VCEK.bytes_le])
def test_certificates_come_out_in_either_byte_order(name: bytes) -> None:
    table = certificate_table([(name, DER), (CRL.bytes, b"a revocation list"), (name, DER)])
    assert parse_certificate_table(table) == (DER, DER)


@pytest.mark.parametrize("data", [b"", bytes(24), bytes(4096)])
def test_no_certificates(data: bytes) -> None:
    assert parse_certificate_table(data) == ()


def test_zeros_may_follow_what_the_entries_name() -> None:
    assert parse_certificate_table(certificate_table([(VCEK.bytes, DER)]) + bytes(4000)) == (DER,)


@pytest.mark.parametrize("size", range(1, 53, 4))
def test_a_table_cut_short_is_refused(size: int) -> None:
    assert refusal(certificate_table([(VCEK.bytes, DER)])[:size]) in ("TRUNCATED", "BAD_VALUE")


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 5), (47, 5), (48, 6), (53, 1), (0xFFFFFFFF, 5), (48, 0xFFFFFFFF), (1 << 31, 1 << 31)]
)
def test_an_entry_outside_of_the_table_is_refused(offset: int, length: int) -> None:
    table = VCEK.bytes + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + bytes(24) + DER
    assert refusal(table) == "BAD_VALUE"


def test_an_end_that_is_none_is_refused() -> None:
    assert refusal(VCEK.bytes + bytes(8) + bytes(16) + b"\1" + bytes(7)) == "BAD_VALUE"


def test_too_many_entries_are_refused() -> None:
    assert refusal(certificate_table([(VCEK.bytes, DER)] * 17)) == "TOO_LARGE"
    assert len(parse_certificate_table(certificate_table([(VCEK.bytes, DER)] * 16))) == 16


@pytest.mark.parametrize("content", [DER + b"\0", DER + b"\1", DER[:-1], b"", b"\x31\x00"])
def test_what_is_not_exactly_a_certificate_is_refused(content: bytes) -> None:
    refusal(certificate_table([(VCEK.bytes, content)]))
