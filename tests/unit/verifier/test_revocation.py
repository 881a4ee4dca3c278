"""CRLs and OCSP responses: good needs fresh word of the issuer, revoked needs its word, and the rest is unknown."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpuchain import PinnedRoots, verify_pinned_chain
from cgpu_agent.verifier.revocation import CertificateStatus, RevocationData, chain_status, load_crl, load_ocsp
from fixtures.gpujudge import GPU, OTHER, PARTY, RIMS, VENDOR, of
from fixtures.gpupki import CA_EXTENSIONS, SIGNER_EXTENSIONS, Signer
from fixtures.gpurevocation import RESPONDER_EXTENSIONS, crl, ocsp_response
from fixtures.pki import NOW, usage

PATH = verify_pinned_chain(GPU.certificates, roots=VENDOR.device_roots, length=range(5, 6), at=NOW)
BOOT_ROM, PROVISIONER, FAMILY, ROOT = GPU.signers[1:]
HOLD = x509.ReasonFlags.certificate_hold


def status(
    *, crls: tuple[bytes, ...] = (), responses: tuple[bytes, ...] = (), days: int | None = None, position: int = 1
) -> CertificateStatus:
    data = RevocationData(
        tuple(load_crl(each) for each in crls),
        tuple(load_ocsp(each) for each in responses),
        None if days is None else timedelta(days=days),
    )
    (found,) = chain_status(PATH, [position], data, NOW)
    return found


def refused(**given: tuple[bytes, ...]) -> str:
    with pytest.raises(HostileInput) as caught:
        status(**given)  # type: ignore[arg-type]
    return caught.value.slug


def said(found: CertificateStatus) -> tuple[str, str, str]:
    return found.status, found.source, found.reason


def test_without_anything_the_status_is_unknown() -> None:
    assert said(status()) == ("unknown", "none", "absent")


def test_a_fresh_crl_of_the_issuer_that_does_not_list_it_is_good() -> None:
    found = status(crls=(crl(PROVISIONER),))
    assert said(found) == ("good", "crl", "")
    assert found.until == NOW + timedelta(days=1)
    pem = x509.load_der_x509_crl(crl(PROVISIONER)).public_bytes(Encoding.PEM)
    assert said(status(crls=(pem,))) == ("good", "crl", "")


def test_the_root_may_sign_a_crl_whatever_its_certificate_says() -> None:
    """Its key is what is pinned, and not every certificate of NVIDIA's root key has cRLSign."""
    bare = Signer.root("bare root", (CA_EXTENSIONS[0], (usage("key_cert_sign"), True)))
    family = bare.issue("family")
    leaf = family.issue("leaf", SIGNER_EXTENSIONS)
    certificates = [leaf.certificate, family.certificate, bare.certificate]
    roots = PinnedRoots.of([bare.certificate])
    path = verify_pinned_chain(certificates, roots=roots, length=range(3, 4), at=NOW)
    data = RevocationData((load_crl(crl(bare)),))
    assert chain_status(path, [1], data, NOW)[0].status == "good"


def test_a_listed_certificate_is_revoked_with_its_reason() -> None:
    revoked = crl(PROVISIONER, BOOT_ROM.certificate, reason=x509.ReasonFlags.key_compromise)
    assert said(status(crls=(revoked,))) == ("revoked", "crl", "key_compromise")
    assert said(status(crls=(crl(PROVISIONER, BOOT_ROM.certificate),))) == ("revoked", "crl", "unspecified")
    assert status(crls=(crl(PROVISIONER, BOOT_ROM.certificate, reason=HOLD),)).on_hold


def test_a_revocation_counts_however_old_its_paper_and_whatever_else_is_said() -> None:
    old = {"this_update": NOW - timedelta(days=900), "next_update": NOW - timedelta(days=800)}
    stale = crl(PROVISIONER, BOOT_ROM.certificate, **old)
    good = crl(PROVISIONER)
    response = ocsp_response(BOOT_ROM.certificate, PROVISIONER)
    assert status(crls=(good, stale), responses=(response,)).status == "revoked"


@pytest.mark.parametrize("order", [1, -1])
def test_a_hold_never_hides_a_final_revocation(order: int) -> None:
    child = BOOT_ROM.certificate
    papers = (crl(PROVISIONER, child, reason=HOLD), crl(PROVISIONER, child, reason=x509.ReasonFlags.key_compromise))
    assert not status(crls=papers[::order]).on_hold


def test_a_stale_or_future_crl_leaves_the_status_unknown() -> None:
    for this, following in ((-9, -1), (1, 9)):
        paper = crl(PROVISIONER, this_update=NOW + timedelta(days=this), next_update=NOW + timedelta(days=following))
        assert said(status(crls=(paper,))) == ("unknown", "crl", "stale")


def test_the_judges_own_age_limit_holds_against_a_long_next_update() -> None:
    paper = crl(PROVISIONER, this_update=NOW - timedelta(days=8), next_update=NOW + timedelta(days=90))
    assert status(crls=(paper,), days=9).status == "good"
    assert said(status(crls=(paper,), days=7)) == ("unknown", "crl", "stale")
    ended = crl(PROVISIONER, this_update=NOW - timedelta(days=8), next_update=NOW - timedelta(days=1))
    assert said(status(crls=(ended,), days=90)) == ("unknown", "crl", "stale")


def test_a_crl_of_another_issuer_says_nothing() -> None:
    assert said(status(crls=(crl(FAMILY),))) == ("unknown", "none", "absent")


def test_refuses_a_crl_that_its_issuer_did_not_sign() -> None:
    assert refused(crls=(crl(PROVISIONER, signer=OTHER.leaf),)) == "BAD_CRL"


def test_refuses_a_crl_of_a_part_only() -> None:
    assert refused(crls=(crl(PROVISIONER, partial=True),)) == "BAD_CRL"


def test_refuses_a_crl_by_an_issuer_that_may_sign_none() -> None:
    ca = VENDOR.root.issue("ca", (CA_EXTENSIONS[0], (usage("key_cert_sign"), True)))
    leaf = ca.issue("leaf", SIGNER_EXTENSIONS)
    certificates = [leaf.certificate, ca.certificate, VENDOR.root.certificate]
    path = verify_pinned_chain(certificates, roots=VENDOR.device_roots, length=range(3, 4), at=NOW)
    with pytest.raises(HostileInput) as caught:
        chain_status(path, [0], RevocationData((load_crl(crl(ca)),)), NOW)
    assert caught.value.slug == "BAD_CRL"


# --- OCSP ---


@pytest.mark.parametrize("algorithm", [hashes.SHA1(), hashes.SHA256(), hashes.SHA384()])
def test_a_fresh_response_of_the_issuer_is_good(algorithm: hashes.HashAlgorithm) -> None:
    response = ocsp_response(BOOT_ROM.certificate, PROVISIONER, algorithm=algorithm)
    assert said(status(responses=(response,))) == ("good", "ocsp", "")


def test_a_responder_that_the_issuer_certified_may_answer() -> None:
    responder = PROVISIONER.issue("responder", RESPONDER_EXTENSIONS)
    response = ocsp_response(BOOT_ROM.certificate, PROVISIONER, responder=responder)
    assert said(status(responses=(response,))) == ("good", "ocsp", "")


def test_a_responder_of_another_issuer_or_purpose_or_time_may_not() -> None:
    def by(responder: Signer) -> str:
        return refused(responses=(ocsp_response(BOOT_ROM.certificate, PROVISIONER, responder=responder),))

    assert by(FAMILY.issue("uncle", RESPONDER_EXTENSIONS)) == "BAD_CERTIFICATE_SIGNATURE"
    assert by(PROVISIONER.issue("no responder", SIGNER_EXTENSIONS)) == "BAD_OCSP"
    expired = PROVISIONER.issue("late", RESPONDER_EXTENSIONS, not_after=NOW - timedelta(days=1))
    assert by(expired) == "CERTIFICATE_EXPIRED"


def test_refuses_a_response_that_was_altered() -> None:
    response = bytearray(ocsp_response(BOOT_ROM.certificate, PROVISIONER))
    response[-1] ^= 1
    assert refused(responses=(bytes(response),)) == "BAD_OCSP"


def test_revoked_unknown_and_stale_responses() -> None:
    child = BOOT_ROM.certificate
    revoked = ocsp_response(child, PROVISIONER, revoked=HOLD)
    assert status(responses=(revoked,)).on_hold
    assert status(responses=(ocsp_response(child, PROVISIONER, unknown=True),)).status == "unknown"
    late = NOW - timedelta(days=2)
    stale = ocsp_response(child, PROVISIONER, this_update=late, next_update=late + timedelta(days=1))
    assert said(status(responses=(stale,))) == ("unknown", "ocsp", "stale")


def test_a_response_without_an_end_is_fresh_only_by_the_judges_own_limit() -> None:
    response = ocsp_response(BOOT_ROM.certificate, PROVISIONER, next_update=None)
    assert said(status(responses=(response,))) == ("unknown", "ocsp", "stale")
    assert status(responses=(response,), days=1).status == "good"


def test_a_response_about_another_certificate_says_nothing() -> None:
    other = ocsp_response(OTHER.signers[1].certificate, PROVISIONER)
    assert said(status(responses=(other,))) == ("unknown", "none", "absent")
    namesake = Signer(FAMILY.key, PROVISIONER.certificate)
    elsewhere = ocsp_response(BOOT_ROM.certificate, Signer(namesake.key, FAMILY.certificate))
    assert said(status(responses=(elsewhere,))) == ("unknown", "none", "absent")


def test_refuses_what_is_no_answer() -> None:
    failure = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER)
    for data, load in (
        (failure.public_bytes(Encoding.DER), load_ocsp),
        (b"", load_ocsp),
        (crl(PROVISIONER), load_ocsp),
        (b"", load_crl),
        (GPU.chain, load_crl),
        (bytes(5 << 20), load_crl),
    ):
        with pytest.raises(HostileInput) as caught:
            load(data)
        assert caught.value.slug in ("BAD_OCSP", "BAD_CRL", "TOO_LARGE")


# --- in a verdict ---


def all_crls() -> list[bytes]:
    l3, ca, root = VENDOR.rim_chain
    return [crl(each) for each in (PROVISIONER, FAMILY, VENDOR.root, l3, ca, root)]


def test_with_crls_of_every_issuer_a_demand_for_revocation_is_met() -> None:
    collateral = Collateral.load(rims=[each.data for each in RIMS.rims], crls=all_crls())
    result = verify_device(of().evidence, replace(PARTY, collateral=collateral, require_revocation=True))
    assert result.refusal is None
    assert result.passed("gpu.revocation")
    assert result.passed("gpu.rim-revocation")


def test_one_missing_crl_of_a_signer_of_values_fails_the_demand() -> None:
    collateral = Collateral.load(rims=[each.data for each in RIMS.rims], crls=all_crls()[:5])
    refusal = verify_device(of().evidence, replace(PARTY, collateral=collateral, require_revocation=True)).refusal
    assert refusal is not None
    assert (refusal.id, refusal.slug) == ("gpu.rim-revocation", "REVOCATION_UNKNOWN")


def test_a_signer_of_values_on_hold_is_tolerated_where_the_judge_says_so_and_shown() -> None:
    signer = x509.load_der_x509_certificate(RIMS.rims[0].certificates[0])
    papers = [*all_crls(), crl(VENDOR.rim_chain[0], signer, reason=HOLD)]
    collateral = Collateral.load(rims=[each.data for each in RIMS.rims], crls=papers)
    result = verify_device(of().evidence, replace(PARTY, collateral=collateral, allow_rim_hold=True))
    assert result.accepted
    assert not result.passed("gpu.rim-revocation")
    assert any(each.on_hold for found in result.revocation.values() for each in found)
