"""Signed reference values: signer, signature and digest each fail on their own, and only what is signed counts."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.collateral import MAX_RIMS, Collateral
from cgpu_agent.verifier.rim import RIM_CHECKS, RimResult, verify_rim
from cgpu_agent.wire.rim import DS, parse_rim
from fixtures.gpu import DRIVER, DRIVER_INDICES, VBIOS, Vendor
from fixtures.gpupki import SIGNER_EXTENSIONS, digest
from fixtures.gpurim import Manifest
from fixtures.pki import NOW

VENDOR = Vendor()
RIM = VENDOR.rim()
GOLDEN = digest("block 22").hex()


def judge(document: bytes, **changed: object) -> RimResult:
    given = {"roots": VENDOR.rim_roots, "at": NOW} | changed
    return verify_rim(document, **given)  # type: ignore[arg-type]


def refused(document: bytes, **changed: object) -> tuple[str, str | None]:
    result = judge(document, **changed)
    assert result.verified is None
    assert result.refusal is not None
    return result.refusal.id, result.refusal.slug


def test_accepts_a_signed_manifest_and_hands_out_what_was_signed() -> None:
    result = judge(RIM)
    assert result.refusal is None
    assert result.verified is not None
    assert result.verified.rim == parse_rim(RIM).claimed
    assert all(result.passed(check.id) for check in RIM_CHECKS)
    assert judge(RIM).to_json()["version"] == DRIVER


@pytest.mark.parametrize(
    "change",
    [
        (b'corpus="false" name="GH100"', b'name="GH100"   corpus="false"'),
        (b"        <ns0:Resource", b"        <ns0:Resource "),
        (b'index="3"', b"index='3'"),
        (b'index="3"', b'index="&#51;"'),
    ],
)
def test_what_canonical_form_does_not_see_changes_nothing(change: tuple[bytes, bytes]) -> None:
    assert change[0] in RIM
    result = judge(RIM.replace(*change))
    assert result.verified is not None
    assert result.verified.rim == parse_rim(RIM).claimed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (GOLDEN, digest("malware").hex()),
        (DRIVER, "999.90.07"),
        ('active="True"', 'active="False"'),
        ("  <ns0", " <ns0"),
    ],
)
def test_any_change_to_the_content_is_a_digest_mismatch(old: str, new: str) -> None:
    assert refused(VENDOR.rim(tamper={old: new})) == ("rim.digest", "RIM_DIGEST_MISMATCH")


def test_any_change_to_signed_info_is_a_bad_signature() -> None:
    value = RIM.split(b"<ds:DigestValue>")[1][:8]
    assert refused(RIM.replace(value, b"AAAAAAAA")) == ("rim.signature", "BAD_RIM_SIGNATURE")


@pytest.mark.parametrize(
    ("value", "step"),
    [(b"", "rim.format"), (b" ", "rim.format"), (b"!", "rim.format"), (b"AAAA", "rim.signature")]
    + [(b"A" * length, "rim.signature") for length in (124, 128, 132, 4096)],
)
def test_refuses_a_signature_value_of_another_kind(value: bytes, step: str) -> None:
    head, _, rest = RIM.partition(b"<ds:SignatureValue>")
    _, _, tail = rest.partition(b"</ds:SignatureValue>")
    document = head + b"<ds:SignatureValue>" + value + b"</ds:SignatureValue>" + tail
    assert refused(document) == (step, "BAD_RIM" if step == "rim.format" else "BAD_RIM_SIGNATURE")


def test_what_has_no_canonical_form_is_refused() -> None:
    """A relative namespace name, which canonical XML does not know."""
    document = RIM.replace(b'xmlns:ns1="https:', b'xmlns:nsx="relative" xmlns:ns1="https:')
    assert refused(document) == ("rim.signature", "BAD_RIM_SIGNATURE")


def test_a_signed_document_inside_another_is_refused() -> None:
    """Signature wrapping: the good document travels along, and the values come from elsewhere."""
    evil = Manifest(DRIVER, goldens={index: (digest("malware"),) for index in DRIVER_INDICES}).unsigned()
    wrapped = evil.replace("</SoftwareIdentity>", RIM.decode().strip() + "</SoftwareIdentity>").encode()
    assert refused(wrapped) == ("rim.format", "BAD_RIM")
    signature = RIM[RIM.index(b"<ds:Signature ") : RIM.index(b"</SoftwareIdentity>")].decode()
    moved = evil.replace("</SoftwareIdentity>", signature + "</SoftwareIdentity>").encode()
    assert refused(moved) == ("rim.digest", "RIM_DIGEST_MISMATCH")
    assert f'xmlns:ds="{DS[1:-1]}"' in signature


def test_the_signer_must_be_certified_by_the_pinned_root() -> None:
    assert refused(Vendor().rim()) == ("rim.chain", "UNKNOWN_ROOT")
    assert refused(RIM, roots=VENDOR.device_roots) == ("rim.chain", "UNKNOWN_ROOT")


def test_the_moment_of_judgement_must_be_within_the_signers_validity() -> None:
    assert refused(RIM, at=NOW + timedelta(days=366)) == ("rim.chain", "CERTIFICATE_EXPIRED")
    assert refused(RIM, at=NOW - timedelta(days=366)) == ("rim.chain", "CERTIFICATE_NOT_YET_VALID")


def test_the_machines_own_clock_decides_nothing() -> None:
    old = VENDOR.rim(not_before=NOW - timedelta(days=300), not_after=NOW - timedelta(days=200))
    assert judge(old, at=NOW - timedelta(days=250)).verified is not None


def test_what_a_document_claims_is_never_handed_out() -> None:
    document = parse_rim(RIM)
    lying = replace(document, claimed=replace(document.claimed, version="999.0", goldens=()))
    verified = verify_rim(lying, roots=VENDOR.rim_roots, at=NOW).verified
    assert verified is not None
    assert verified.rim == document.claimed


def test_a_ca_may_not_sign_values_itself() -> None:
    l3, *above = VENDOR.rim_chain
    document = Manifest(DRIVER, goldens={1: (digest("x"),)}).signed([l3, *above])
    assert refused(document) == ("rim.chain", "WRONG_PURPOSE")


def test_a_signer_for_engineering_firmware_is_refused() -> None:
    debug = VENDOR.rim_chain[1].issue("Reference Value L3 GH100 001 DEBUG only")
    document = VENDOR.rim(chain=(debug, *VENDOR.rim_chain[1:]))
    assert refused(document) == ("rim.chain", "DEBUG_RIM")


def test_a_chain_too_short_or_too_long_is_refused() -> None:
    lone = VENDOR.rim_root.issue("signer", SIGNER_EXTENSIONS)
    short = Manifest(DRIVER, goldens={1: (digest("x"),)}).signed([lone, VENDOR.rim_root])
    assert refused(short) == ("rim.chain", "CHAIN_LENGTH")
    l3, ca, root = VENDOR.rim_chain
    long = Manifest(DRIVER, goldens={1: (digest("x"),)}).signed([lone, l3, ca, ca, ca, root])
    assert refused(long) == ("rim.chain", "CHAIN_LENGTH")


def test_garbage_is_refused_as_such() -> None:
    assert refused(b"")[0] == "rim.format"
    assert refused(b"<!DOCTYPE x>" + RIM) == ("rim.format", "XML_FORBIDDEN")


# --- the store ---


def test_of_several_issues_the_one_signed_last_is_taken() -> None:
    old = VENDOR.rim(not_before=NOW - timedelta(days=700))
    store = Collateral.load(rims=[RIM, old, VENDOR.rim("580.95.05")])
    found = store.newest_rim("GPU", DRIVER)
    assert found is not None
    assert found.data == RIM
    assert Collateral.load(rims=[old, RIM]).newest_rim("GPU", DRIVER) == found


def test_issues_for_another_chip_of_the_same_driver_are_passed_over_where_there_is_one_for_this() -> None:
    other = VENDOR.rim(product="GB100", not_before=NOW - timedelta(days=1))
    newer = VENDOR.rim(not_before=NOW - timedelta(days=2))
    store = Collateral.load(rims=[other, RIM, newer])

    def taken(*products: str) -> bytes:
        found = store.newest_rim("GPU", DRIVER, products)
        assert found is not None
        return found.data

    assert taken("GH100") == newer
    assert taken("GB100", "GB20X") == other
    assert taken("GB202") == other  # for the judge to refuse: there is none for this chip


def test_versions_compare_without_case_and_editions_are_apart() -> None:
    store = Collateral.load(rims=[VENDOR.rim(VBIOS.lower())])
    assert store.newest_rim("GPU", VBIOS) is not None
    assert store.newest_rim("SWITCH", VBIOS) is None
    assert store.newest_rim("GPU", "96.00.9F.00.02") is None
    assert store.versions("GPU") == (VBIOS.lower(),)


def test_the_same_issue_twice_is_one() -> None:
    assert Collateral.load(rims=[RIM, RIM]).newest_rim("GPU", DRIVER) is not None


def test_a_file_that_cannot_be_read_is_not_taken_for_absent() -> None:
    for broken in ({"rims": [b"<x/>"]}, {"crls": [b"x"]}, {"ocsp": [b"x"]}):
        with pytest.raises(HostileInput):
            Collateral.load(**broken)  # type: ignore[arg-type]


def test_a_store_has_an_end() -> None:
    with pytest.raises(HostileInput) as caught:
        Collateral.load(rims=[RIM] * (MAX_RIMS + 1))
    assert caught.value.slug == "TOO_MANY_RIMS"
