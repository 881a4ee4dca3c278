"""SPDM reports: read to the last byte, or refused."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.spdm import Measurement, encode_signed, parse_report

NONCE, OTHER = bytes(range(32)), bytes(range(32, 64))
BLOCKS = (Measurement(1, 1, b"\xaa" * 48), Measurement(2, 0x81, b"raw"), Measurement(254, 2, b""))
SIGNATURE = bytes(range(96))
OPAQUE = b"\x03\0\x01\0x"
REPORT = encode_signed(NONCE, BLOCKS, OTHER, OPAQUE, slot=3) + SIGNATURE
HEADER, RECORD = 41, 45


def refused(data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_report(data)
    return caught.value.slug


def changed(at: int, *values: int) -> bytes:
    return REPORT[:at] + bytes(values) + REPORT[at + len(values) :]


def test_reads_every_part() -> None:
    report = parse_report(REPORT)
    assert (report.nonce, report.responder_nonce, report.slot) == (NONCE, OTHER, 3)
    assert tuple(report.measurements.values()) == BLOCKS
    assert list(report.measurements) == [1, 2, 254]
    assert (report.opaque, report.signature) == (OPAQUE, SIGNATURE)
    assert report.signed + report.signature == REPORT


def test_layout_is_that_of_the_specification() -> None:
    assert REPORT[:4].hex() == "11e001ff"
    assert REPORT[36:45].hex() == "031160000003480000"
    assert parse_report(REPORT).signed[45:52].hex() == "01013300013000"


@pytest.mark.parametrize("length", range(0, len(REPORT), 7))
def test_refuses_a_truncated_report(length: int) -> None:
    assert refused(REPORT[:length]) in ("TRUNCATED", "BAD_REPORT")


@pytest.mark.parametrize("tail", [b"\0", b"\n", bytes(96), REPORT])
def test_names_stray_bytes_after_the_signature(tail: bytes) -> None:
    assert refused(REPORT + tail) == "TRAILING_BYTES"


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 0x12), (1, 0xE1), (2, 0), (3, 0), (36, 8), (37, 0x12), (38, 0x61), (39, 1), (40, 1)],
)
def test_refuses_another_exchange_than_measurements_by_spdm_1_1(at: int, value: int) -> None:
    assert refused(changed(at, value)) == "BAD_REPORT"


@pytest.mark.parametrize(
    ("at", "values", "slug"),
    [
        (HEADER, (2,), "TRAILING_BYTES"),
        (HEADER, (4,), "TRUNCATED"),
        (HEADER + 1, (0x49,), "TRUNCATED"),
        (HEADER + 3, (1,), "TRUNCATED"),
        (RECORD, (0,), "BAD_MEASUREMENT"),
        (RECORD, (255,), "BAD_MEASUREMENT"),
        (RECORD, (2,), "DUPLICATE_MEASUREMENT"),
        (RECORD + 1, (2,), "BAD_MEASUREMENT"),
        (RECORD + 2, (0x32,), "BAD_MEASUREMENT"),
        (RECORD + 5, (0x2F,), "BAD_MEASUREMENT"),
    ],
)
def test_refuses_a_record_whose_counts_or_sizes_do_not_fit(at: int, values: tuple[int, ...], slug: str) -> None:
    assert refused(changed(at, *values)) == slug


def test_refuses_more_than_a_driver_could_hand_over() -> None:
    huge = encode_signed(NONCE, (), OTHER, bytes(8192)) + SIGNATURE
    assert refused(huge) == "TOO_LARGE"
