"""HCL reports: lengths that agree, a zero tail, and claims with one meaning."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.hcl import MAX_CLAIMS, MAX_HCL, ReportType, is_hcl, parse_claims, parse_hcl
from fixtures.platform import AK, AMD, BATCH, CLAIMS, TD, VM_ID, batch_user_data, claims_json, hcl_report

HARDWARE = AMD.report(CLAIMS)
GOOD = hcl_report(HARDWARE, CLAIMS)


def slug(data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_hcl(data)
    return caught.value.slug


def test_keeps_hardware_report_and_claims_as_they_are() -> None:
    report = parse_hcl(GOOD)
    assert is_hcl(GOOD)
    assert (report.version, report.kind, report.hardware, report.claims) == (2, ReportType.SNP, HARDWARE, CLAIMS)


def test_a_tdreport_is_shorter_than_its_place() -> None:
    assert parse_hcl(hcl_report(TD.tdreport, CLAIMS, 4)).hardware == TD.tdreport
    assert slug(hcl_report(TD.tdreport + b"\1", CLAIMS, 4)) == "BAD_VALUE"


@pytest.mark.parametrize("size", [1236 + len(CLAIMS), 2600, MAX_HCL])
def test_the_tail_may_be_of_any_length(size: int) -> None:
    padded = hcl_report(HARDWARE, CLAIMS, tail=bytes(size - 1236 - len(CLAIMS)))
    assert len(padded) == size
    assert parse_hcl(padded).claims == CLAIMS


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"magic": b"HCLB"}, "BAD_VALUE"),
        ({"version": 3}, "UNKNOWN_VERSION"),
        ({"version": 0}, "UNKNOWN_VERSION"),
        ({"request": 1}, "WRONG_TYPE"),
        ({"status": 1}, "BAD_VALUE"),
        ({"reserved": bytes(11) + b"\1"}, "BAD_VALUE"),
        ({"claims_version": 2}, "UNKNOWN_VERSION"),
        ({"kind": 0}, "WRONG_TYPE"),
        ({"kind": 1}, "WRONG_TYPE"),
        ({"kind": 3}, "WRONG_TYPE"),
        ({"kind": 5}, "WRONG_TYPE"),
        ({"hash_type": 2}, "UNKNOWN_ALGORITHM"),
        ({"report_size": 1235 + len(CLAIMS)}, "BAD_VALUE"),
        ({"data_size": 21 + len(CLAIMS)}, "BAD_VALUE"),
        ({"claims_size": len(CLAIMS) - 1}, "BAD_VALUE"),
        ({"claims_size": 0xFFFFFFFF}, "TOO_LARGE"),
        ({"tail": b"\0\1"}, "TRAILING_BYTES"),
        ({"tail": bytes(MAX_HCL)}, "TOO_LARGE"),
    ],
)
def test_refuses_a_header_that_contradicts(changed: dict[str, Any], expected: str) -> None:
    assert slug(hcl_report(HARDWARE, CLAIMS, **changed)) == expected


def test_refuses_less_than_it_announces() -> None:
    short = hcl_report(HARDWARE, CLAIMS, tail=b"")
    for size in (0, 3, 31, 1235, len(short) - 1):
        assert slug(short[:size]) == "TRUNCATED"


# --- claims ---


def claims_slug(data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_claims(data)
    return caught.value.slug


def document() -> Any:
    return json.loads(CLAIMS)


def test_reads_the_claims() -> None:
    claims = parse_claims(CLAIMS)
    assert (claims.ak.modulus, claims.ak.exponent) == (AK.public_numbers().n, 65537)
    assert claims.secure_boot is True
    assert claims.vm_unique_id == VM_ID.lower()
    assert claims.user_data == batch_user_data(BATCH)
    assert parse_claims(claims_json(batch=None)).user_data is None


def test_members_that_nobody_needs_may_be_there() -> None:
    found = document()
    found["keys"].append({"kid": "HCLEkPub"})
    found["new"] = [1]
    found["vm-configuration"]["root-cert-thumbprint"] = ""
    assert parse_claims(json.dumps(found).encode()).secure_boot is True


def _drop_keys(found: Any) -> None:
    found["keys"] = []


def _same_key_twice(found: Any) -> None:
    found["keys"] *= 2


def _ec_key(found: Any) -> None:
    found["keys"][0]["kty"] = "EC"


def _padded(found: Any) -> None:
    found["keys"][0]["e"] = "AQAB="


def _not_shortest(found: Any) -> None:
    found["keys"][0]["e"] = "AAEAAQ"


def _plain_base64(found: Any) -> None:
    found["keys"][0]["e"] = "A+AB"


def _empty(found: Any) -> None:
    found["keys"][0]["n"] = ""


def _secure_boot_as_text(found: Any) -> None:
    found["vm-configuration"]["secure-boot"] = "true"


def _no_vm(found: Any) -> None:
    del found["vm-configuration"]["vmUniqueId"]


def _other_vm(found: Any) -> None:
    found["vm-configuration"]["vmUniqueId"] = VM_ID[:-1] + "g"


def _short_user_data(found: Any) -> None:
    found["user-data"] = "00" * 63


def _user_data_not_hex(found: Any) -> None:
    found["user-data"] = "zz" * 64


@pytest.mark.parametrize(
    "spoil",
    [
        _drop_keys,
        _same_key_twice,
        _ec_key,
        _padded,
        _not_shortest,
        _plain_base64,
        _empty,
        _secure_boot_as_text,
        _no_vm,
        _other_vm,
        _short_user_data,
        _user_data_not_hex,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_refuses_claims_of_a_wrong_form(spoil: Any) -> None:
    found = document()
    spoil(found)
    assert claims_slug(json.dumps(found).encode()) == "BAD_FIELD"


def test_refuses_what_two_readers_could_read_differently() -> None:
    twice = CLAIMS.replace(b'"secure-boot": true', b'"secure-boot": true, "secure-boot": false')
    assert claims_slug(twice) == "DUPLICATE_KEY"
    assert claims_slug(CLAIMS + b"\0") == "BAD_JSON"
    assert claims_slug(b"[]") == "BAD_JSON"
    assert claims_slug(b" " * (MAX_CLAIMS + 1)) == "TOO_LARGE"
