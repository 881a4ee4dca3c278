"""The event log parser: both TPM formats, CCEL, and every way of being wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.eventlog import MAX_EVENTS, MAX_LOG_SIZE, parse
from fixtures.eventlogs import (
    EV_IPL,
    EV_SEPARATOR,
    header,
    legacy_record,
    raw_record,
    record,
    separator,
    u32,
)


def slug_of(data: bytes, **options: str) -> str:
    with pytest.raises(HostileInput) as refusal:
        parse(data, **options)  # type: ignore[arg-type]
    return refusal.value.slug


@pytest.fixture(scope="module")
def uki(vectors: Path) -> bytes:
    return (vectors / "vm-boot" / "uki-secboot-crb" / "binary_bios_measurements").read_bytes()


@pytest.mark.parametrize(("name", "records"), [("uki-secboot-crb", 37), ("shim-grub-ms-secboot", 48)])
def test_reads_every_record_of_a_recorded_boot(vectors: Path, name: str, records: int) -> None:
    log = parse((vectors / "vm-boot" / name / "binary_bios_measurements").read_bytes())
    assert len(log.events) == records
    assert (log.kind, log.format, log.banks, log.padding) == ("tpm", "crypto-agile", ("sha256",), 0)
    assert not log.events[0].measured
    assert [event.index for event in log.events] == list(range(records))
    assert log.spec is not None
    assert log.spec.version == (2, 0, 0)


def test_names_an_empty_log() -> None:
    assert slug_of(b"") == "EMPTY_LOG"


def test_refuses_a_cut_at_every_byte_inside_a_record(uki: bytes) -> None:
    events = parse(uki).events
    sizes = [32 + len(events[0].data)] + [50 + len(event.data) for event in events[1:]]
    boundaries = {sum(sizes[:count]): count for count in range(1, len(sizes) + 1)}
    assert boundaries[len(uki)] == 37
    for cut in range(1, len(uki)):
        if cut in boundaries:
            assert parse(uki[:cut]).events == events[: boundaries[cut]]
        else:
            # A single stray 0x00 or 0xff byte is no record either, hence the second slug.
            assert slug_of(uki[:cut]) in ("TRUNCATED", "TRAILING_BYTES")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 5])
def test_refuses_an_event_size_beyond_the_end(size: int) -> None:
    data = header() + separator(0)[:-8] + u32(size) + bytes(4)
    assert slug_of(data) == "TRUNCATED"


def test_refuses_a_huge_event_size_in_the_first_record() -> None:
    assert slug_of(u32(0) + u32(3) + bytes(20) + u32(0xFFFFFFFF)) == "TRUNCATED"


def test_refuses_more_than_four_mebibytes() -> None:
    assert slug_of(bytes(MAX_LOG_SIZE + 1)) == "TOO_LARGE"


def test_refuses_one_event_too_many() -> None:
    one = legacy_record(0, EV_SEPARATOR, bytes(4))
    assert len(parse(one * MAX_EVENTS).events) == MAX_EVENTS
    assert slug_of(one * (MAX_EVENTS + 1)) == "TOO_LARGE"


@pytest.mark.parametrize("rest", [b"\0", b"\xff", b"\xff" * 16, bytes(16), b"\x01\0\0"])
def test_refuses_bytes_after_the_last_record_of_a_tpm_log(rest: bytes) -> None:
    assert slug_of(header() + separator(0) + rest) in ("TRAILING_BYTES", "TRUNCATED", "NO_DIGEST")


def test_reads_a_legacy_log() -> None:
    log = parse(legacy_record(0, EV_SEPARATOR, bytes(4)) + legacy_record(23, EV_IPL, b"x"))
    assert (log.kind, log.format, log.banks, log.spec) == ("tpm", "legacy-sha1", ("sha1",), None)
    assert [event.pcr for event in log.events] == [0, 23]


def test_reads_a_legacy_log_that_begins_with_another_no_action_record() -> None:
    log = parse(legacy_record(0, 3, b"StartupLocality\0\3", bytes(20)))
    assert log.format == "legacy-sha1"
    assert [event.measured for event in log.events] == [False]


@pytest.mark.parametrize("make", [lambda pcr: legacy_record(pcr, 4), lambda pcr: header() + record(pcr, 4)])
def test_refuses_a_measured_event_outside_the_24_pcrs(make) -> None:  # type: ignore[no-untyped-def]
    assert slug_of(make(24)) == "BAD_REGISTER"
    assert slug_of(make(0xFFFFFFFF)) == "BAD_REGISTER"


def test_allows_any_register_in_a_record_that_is_never_extended() -> None:
    assert parse(header() + record(0xFFFFFFFF, 3, b"note")).events[1].pcr == 0xFFFFFFFF


def test_keeps_an_announced_algorithm_that_it_cannot_compute() -> None:
    sm3 = bytes(range(32))
    event = raw_record(0, 4, [(0x0B, b"\1" * 32), (0x12, sm3)], b"data")
    log = parse(header(extra=[(0x12, 32)]) + event)
    assert log.banks == ("sha256", "alg-0x0012")
    assert log.events[1].digest("alg-0x0012") == sm3


def test_refuses_a_digest_algorithm_never_announced() -> None:
    assert slug_of(header() + raw_record(0, 4, [(0x04, bytes(20))], b"")) == "UNKNOWN_ALGORITHM"


@pytest.mark.parametrize("digests", [[], [(0x0B, bytes(32))] * 2])
def test_refuses_no_digest_and_more_digests_than_announced(digests: list[tuple[int, bytes]]) -> None:
    assert slug_of(header() + raw_record(0, 4, digests, b"")) == "NO_DIGEST"


def test_refuses_two_digests_of_one_bank() -> None:
    data = header(("sha1", "sha256")) + raw_record(0, 4, [(0x0B, bytes(32))] * 2, b"")
    assert slug_of(data) == "DUPLICATE_DIGEST"


def test_offers_only_banks_that_every_measured_event_has() -> None:
    announced = header(("sha1", "sha256", "sha384"))
    two = record(0, 4, banks=("sha1", "sha256"))
    assert parse(announced + two).banks == ("sha1", "sha256")
    assert parse(announced + two + record(1, 4, banks=("sha256",))).banks == ("sha256",)


HEADER = header()


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (4, 4),  # not EV_NO_ACTION
        (8, 1),  # a digest
        (0, 2),  # register of no kind of log
        (48, 2),  # platform class
        (52, 1),  # minor
        (53, 1),  # major
        (55, 3),  # uintn size
        (56, 0),  # no algorithm
        (56, 17),  # too many
        (60, 0x0C),  # SHA-384 of 32 bytes
        (62, 20),  # SHA-256 of 20 bytes
    ],
)
def test_refuses_a_header_that_breaks_the_profile(offset: int, value: int) -> None:
    data = bytearray(HEADER)
    data[offset] = value
    assert slug_of(bytes(data)) == "BAD_HEADER"


def test_refuses_an_algorithm_announced_twice() -> None:
    assert slug_of(header(("sha256", "sha256"))) == "BAD_HEADER"


def test_reads_vendor_info_inside_the_record_and_never_beyond_it() -> None:
    log = parse(header(vendor=b"\xde\xad"))
    assert log.spec is not None
    assert log.spec.vendor_info == b"\xde\xad"
    beyond = bytearray(HEADER)
    beyond[-1] = 4
    assert slug_of(bytes(beyond) + b"\xde\xad\xbe\xef") == "TRUNCATED"
    inside = bytearray(header(vendor=b"\xde\xad"))
    inside[-3] = 1
    assert slug_of(bytes(inside)) == "TRAILING_BYTES"


def ccel(*records: bytes) -> bytes:
    return header(("sha384",), pcr=1) + b"".join(records)


def test_knows_a_ccel_by_the_register_of_its_header() -> None:
    assert parse(ccel(separator(1, ("sha384",)))).kind == "ccel"
    assert parse(header(("sha384",)) + separator(1, ("sha384",))).kind == "tpm"


def test_lets_the_caller_say_what_a_log_is() -> None:
    unclear = header(("sha384",)) + separator(1, ("sha384",))
    assert parse(unclear, kind="ccel").kind == "ccel"
    assert slug_of(ccel(), kind="tpm") == "BAD_HEADER"
    assert slug_of(header(("sha256",), pcr=1)) == "BAD_HEADER"
    assert slug_of(legacy_record(0, 4), kind="ccel") == "BAD_HEADER"


@pytest.mark.parametrize("fill", [b"\xff", b"\0"])
@pytest.mark.parametrize("count", [1, 7, 8, 4096])
def test_counts_the_padding_of_a_ccel(fill: bytes, count: int) -> None:
    log = parse(ccel(separator(1, ("sha384",))) + fill * count)
    assert (len(log.events), log.padding) == (2, count)


@pytest.mark.parametrize("rest", [b"\xff" * 40 + b"\0", b"\xff" * 40 + b"\x01", bytes(40) + b"\x01"])
def test_refuses_mixed_padding(rest: bytes) -> None:
    assert slug_of(ccel() + rest) == "TRAILING_BYTES"


@pytest.mark.parametrize("register", [0, 5])
def test_refuses_a_register_that_a_tdx_guest_has_not_got(register: int) -> None:
    assert slug_of(ccel(separator(register, ("sha384",)))) == "BAD_REGISTER"
