"""SNP reports: every field at its place, and no byte that may be anything."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.snp import REPORT_SIZE, SIGNED_SIZE, Product, Tcb, parse_snp_report, parse_tcb
from fixtures.platform import CHIP, CLAIMS, CPUS, ID_KEY, MEASUREMENT, snp_report, tcb_bytes

KEY = ec.generate_private_key(ec.SECP384R1())
GOOD = snp_report(KEY, CLAIMS)


def slug(data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_snp_report(data)
    return caught.value.slug


def changed(at: int, value: bytes) -> bytes:
    return GOOD[:at] + value + GOOD[at + len(value) :]


def test_reads_every_field() -> None:
    report = parse_snp_report(GOOD)
    assert len(GOOD) == REPORT_SIZE
    assert (report.version, report.guest_svn, report.policy, report.vmpl) == (3, 12, 0x3001F, 0)
    assert (report.measurement, report.id_key_digest, report.chip_id) == (MEASUREMENT, ID_KEY, CHIP)
    assert (report.signing_key, report.masked, report.debug, report.migration) == (0, False, False, False)
    assert report.product == "milan"
    assert report.signed == GOOD[:SIGNED_SIZE]
    assert parse_tcb(report.reported_tcb, "milan") == Tcb(4, 0, 24, 219)


@pytest.mark.parametrize("product", CPUS)
def test_knows_the_processors(product: Product) -> None:
    assert parse_snp_report(snp_report(KEY, CLAIMS, product)).product == product


def test_siena_and_bergamo_are_of_genoas_family() -> None:
    assert parse_snp_report(snp_report(KEY, CLAIMS, cpuid=b"\x19\xa0\2")).product == "genoa"


def test_reads_policy_bits_and_keys() -> None:
    report = parse_snp_report(snp_report(KEY, CLAIMS, policy=0xF001F, key_info=0b111))
    assert (report.debug, report.migration, report.signing_key, report.masked) == (True, True, 1, True)


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (0x00, b"\4", "UNKNOWN_VERSION"),
        (0x0A, b"\1", "BAD_VALUE"),
        (0x34, b"\2", "UNKNOWN_ALGORITHM"),
        (0x48, b"\x20", "BAD_VALUE"),
        (0x4C, b"\1", "BAD_VALUE"),
        (0x188, b"\x17", "UNKNOWN_PRODUCT"),
        (0x18B, b"\1", "BAD_VALUE"),
        (0x1EB, b"\1", "BAD_VALUE"),
        (0x29F, b"\1", "BAD_VALUE"),
        (0x2A0 + 48, b"\1", "BAD_VALUE"),
        (0x2A0, bytes(72), "BAD_VALUE"),
        (0x2E8, bytes(72), "BAD_VALUE"),
        (0x49F, b"\1", "BAD_VALUE"),
    ],
)
def test_refuses_what_no_processor_writes(at: int, value: bytes, expected: str) -> None:
    assert slug(changed(at, value)) == expected


def test_refuses_other_lengths() -> None:
    assert slug(GOOD[:-1]) == "TRUNCATED"
    assert slug(GOOD + b"\0") == "TRAILING_BYTES"
    assert slug(b"") == "TRUNCATED"


def test_an_old_version_names_no_processor() -> None:
    assert parse_snp_report(snp_report(KEY, CLAIMS, version=2, cpuid=bytes(3))).product is None
    assert slug(snp_report(KEY, CLAIMS, version=2)) == "BAD_VALUE"


def test_the_layout_of_versions_changed_with_turin() -> None:
    raw = bytes([1, 2, 3, 4, 0, 0, 0, 5])
    assert parse_tcb(raw, "turin") == Tcb(bootloader=2, tee=3, snp=4, microcode=5, fmc=1)
    assert tcb_bytes("turin", 2, 3, 4, 5, 1) == raw
    for product in ("milan", "genoa"):
        with pytest.raises(HostileInput) as caught:
            parse_tcb(raw, product)
        assert caught.value.slug == "BAD_VALUE"
