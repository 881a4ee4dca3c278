"""TDREPORTs and TD quotes of both versions: every length bounded, nothing after the end but zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.tdx import MAX_QUOTE, MAX_ZERO_TAIL, TDREPORT_SIZE, is_td_quote, parse_td_quote, parse_tdreport
from fixtures.platform import INTEL, TD

V4 = INTEL.quote(TD)
V5 = INTEL.quote(TD, 5)
SIGNATURE_SIZE_AT = 48 + 584


def slug(parse: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse(data)
    return caught.value.slug


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(("quote", "version"), [(V4, 4), (V5, 5)])
def test_reads_a_quote(quote: bytes, version: int) -> None:
    found = parse_td_quote(quote)
    assert is_td_quote(quote)
    assert found.version == version
    assert (found.body.mrtd, found.body.mrseam, found.body.report_data) == (TD.mrtd, TD.mrseam, TD.report_data)
    assert found.body.service_td == (b"" if version == 4 else bytes(48))
    assert (found.qe.product, found.qe.svn, found.qe.debug) == (2, 6, False)
    assert found.signed == quote[: SIGNATURE_SIZE_AT if version == 4 else 54 + 648]
    pem = b"".join(each.public_bytes(Encoding.PEM) for each in INTEL.certificates)
    assert found.certificates == pem


def test_version_5_may_carry_the_body_of_version_4() -> None:
    assert parse_td_quote(INTEL.quote(TD, 5, kind=2)).body == parse_td_quote(V4).body


def test_a_tdreport_tells_of_the_same_guest() -> None:
    report = parse_tdreport(TD.tdreport)
    assert len(TD.tdreport) == TDREPORT_SIZE
    assert replace(report, service_td=b"") == parse_td_quote(V4).body


def test_debug_is_the_lowest_bit() -> None:
    assert parse_tdreport(replace(TD, attributes=b"\1" + bytes(7)).tdreport).debug
    assert not parse_tdreport(replace(TD, attributes=b"\xfe" + bytes(7)).tdreport).debug


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (0, b"\3", "UNKNOWN_VERSION"),
        (2, b"\3", "UNKNOWN_ALGORITHM"),
        (4, b"\0", "WRONG_TYPE"),
        (12, b"\0", "BAD_VALUE"),
        (SIGNATURE_SIZE_AT, b"\xff\xff\xff\xff", "TRUNCATED"),
        (SIGNATURE_SIZE_AT + 4, bytes(32), "BAD_VALUE"),
        (SIGNATURE_SIZE_AT + 4 + 128, b"\5", "WRONG_TYPE"),
        (SIGNATURE_SIZE_AT + 4 + 130, b"\xff\xff\xff\xff", "TOO_LARGE"),
        (SIGNATURE_SIZE_AT + 4 + 134 + 384, bytes(64), "BAD_VALUE"),
        (SIGNATURE_SIZE_AT + 4 + 134 + 448, b"\xff\xff", "TOO_LARGE"),
        (SIGNATURE_SIZE_AT + 4 + 134 + 450 + 32, b"\3", "WRONG_TYPE"),
        (SIGNATURE_SIZE_AT + 4 + 134 + 452 + 32, b"\0\0\0\0", "TRAILING_BYTES"),
    ],
)
def test_refuses_a_quote_that_breaks_its_format(at: int, value: bytes, expected: str) -> None:
    assert slug(parse_td_quote, changed(V4, at, value)) == expected


def test_refuses_a_body_of_another_type_or_size() -> None:
    assert slug(parse_td_quote, changed(V5, 48, b"\1")) == "WRONG_TYPE"
    assert slug(parse_td_quote, changed(V5, 50, b"\x48")) == "BAD_VALUE"


def test_only_zeros_and_not_many_may_follow() -> None:
    for tail, expected in (
        (b"\1", "TRAILING_BYTES"),
        (bytes(MAX_ZERO_TAIL + 1), "TRAILING_BYTES"),
        (bytes(MAX_QUOTE), "TOO_LARGE"),
    ):
        assert slug(parse_td_quote, INTEL.quote(TD, tail=tail)) == expected
    for tail in (b"", bytes(70), bytes(MAX_ZERO_TAIL)):
        assert parse_td_quote(INTEL.quote(TD, tail=tail)).version == 4


@pytest.mark.parametrize("size", [0, 3, 47, 600, SIGNATURE_SIZE_AT + 3, 1000, len(V4) - 71])
def test_refuses_a_cut_quote(size: int) -> None:
    assert slug(parse_td_quote, V4[:size]) == "TRUNCATED"


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [(0, b"\0", "WRONG_TYPE"), (1, b"\1", "WRONG_TYPE"), (2, b"\2", "WRONG_TYPE"), (4, b"\1", "BAD_VALUE")],
)
def test_refuses_another_kind_of_report(at: int, value: bytes, expected: str) -> None:
    assert slug(parse_tdreport, changed(TD.tdreport, at, value)) == expected


def test_refuses_a_tdreport_of_another_length() -> None:
    assert slug(parse_tdreport, TD.tdreport[:-1]) == "TRUNCATED"
    assert slug(parse_tdreport, TD.tdreport + b"\0") == "TRAILING_BYTES"
    assert slug(parse_tdreport, changed(TD.tdreport, TDREPORT_SIZE - 1, b"\1")) == "BAD_VALUE"
