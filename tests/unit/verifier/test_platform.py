"""Platforms that are endorsed, in all their forms; and the certificates of CPU makers, one rule at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.gpuchain import spki_digest
from cgpu_agent.verifier.platformcase import PlatformEvidence, PlatformParty, SnpFloor, TdxFloor
from cgpu_agent.verifier.roots.platform import AMD_ROOTS, AZURE_VTPM_ROOTS, INTEL_ROOTS, SHIPPED
from cgpu_agent.verifier.teechain import leaf_key, order_chain, verify_tee_chain
from cgpu_agent.verifier.vcek import chip_certificate
from cgpu_agent.wire.snp import Product, Tcb
from fixtures.pki import CA_EXTENSIONS, NOW, Extension, usage
from fixtures.platform import (
    AK,
    AMD,
    CHIP,
    CLAIMS,
    INTEL,
    PARTY,
    PINS,
    SNP,
    TD,
    TDX,
    TRUSTED_LAUNCH,
    VM_ID,
    Amd,
    Maker,
    chip_extensions,
    claims_json,
    hcl_report,
    judge,
    refused,
    snp,
)


def trusting(amd: Amd) -> PlatformParty:
    return replace(PARTY, pins=replace(PINS, amd_roots={spki_digest(amd.ark.certificate): amd.product}))


# --- who is endorsed ---


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
def test_endorses_every_product(product: Product) -> None:
    amd = Amd.make(product)
    answer = judge(snp(amd=amd), trusting(amd))
    assert answer.endorsed_by == "amd-sev-snp"
    assert answer.facts.product == product
    assert answer.facts.tcb["fmc"] == (1 if product == "turin" else 0)


def test_a_root_of_one_product_vouches_for_no_other() -> None:
    amd = Amd.make("genoa")
    party = replace(PARTY, pins=replace(PINS, amd_roots={spki_digest(amd.ark.certificate): "milan"}))
    assert refused(judge(snp(amd=amd), party)) == ("snp.product", "PRODUCT_MISMATCH")


def test_endorses_an_old_report_that_names_no_processor() -> None:
    assert judge(snp(version=2, cpuid=bytes(3))).endorsed_by == "amd-sev-snp"


def test_endorses_under_the_key_of_a_cloud() -> None:
    vlek = AMD.leaf("SEV-VLEK", chip_extensions(vlek=True))
    answer = judge(snp(amd=vlek, key_info=1 << 2, chip_id=bytes(64)))
    assert answer.endorsed_by == "amd-sev-snp"


@pytest.mark.parametrize(("version", "kind"), [(4, 2), (5, 2), (5, 3)])
def test_endorses_quotes_of_every_version(version: int, kind: int) -> None:
    answer = judge(replace(TDX, td_quote=INTEL.quote(TD, version, kind=kind)))
    assert answer.endorsed_by == "intel-tdx"
    assert answer.facts.tcb == {"qe_svn": 6, "tee_tcb_svn": TD.tee_tcb_svn.hex()}


@pytest.mark.parametrize("report", [AMD.report(CLAIMS), INTEL.quote(TD)], ids=["snp", "td-quote"])
def test_endorses_a_bare_report_with_its_claims_and_not_without(report: bytes) -> None:
    evidence = PlatformEvidence(report, CLAIMS, certificates=AMD.certificates)
    assert judge(evidence).endorsed_by in ("amd-sev-snp", "intel-tdx")
    answer = judge(replace(evidence, claims=None))
    assert (answer.endorsed_by, answer.reason, answer.refusal, answer.ak) == ("none", "no claims", None, None)
    assert answer.facts.measurement is not None


def test_endorses_the_ak_of_the_claims_where_none_is_given_and_says_so() -> None:
    answer = judge(SNP, ak=None)
    assert answer.ak is not None
    assert answer.ak.public_numbers() == AK.public_numbers()
    assert "NO_AK" in {step.slug for step in answer.warnings}


def test_endorses_by_the_cloud_with_the_root_among_the_authorities() -> None:
    answer = judge(TRUSTED_LAUNCH)
    assert answer.endorsed_by == "azure-trusted-launch"
    assert answer.tee == "none"
    assert answer.facts.path is not None
    assert len(answer.facts.path.certificates) == 3


def test_certificates_may_come_in_any_order_twice_and_among_those_of_other_products() -> None:
    others = Amd.make("genoa")
    pile = [*others.certificates[1:], *reversed(AMD.certificates), AMD.ark.certificate]
    assert judge(replace(SNP, certificates=pile)).endorsed_by == "amd-sev-snp"


def test_with_floors_met_nothing_warns_of_them() -> None:
    party = replace(
        PARTY,
        snp_floor=SnpFloor(bootloader=4, snp=24, microcode=219, guest_svn=12),
        tdx_floor=TdxFloor(b"\7\1\3", 6),
        require_fresh=True,
    )
    for evidence in (SNP, TDX):
        answer = judge(evidence, party)
        assert answer.endorsed_by != "none"
        assert "NO_FLOOR" not in {step.slug for step in answer.warnings}


def test_nothing_at_all_endorses_nothing() -> None:
    answer = judge(PlatformEvidence())
    assert (answer.endorsed_by, answer.reason) == ("none", "no ak certificate")
    assert judge(PlatformEvidence(report=b"")).endorsed_by == "none"


def test_the_verdict_is_plain_json() -> None:
    found = json.loads(json.dumps(judge(SNP).to_json()))
    assert found["endorsed_by"] == "amd-sev-snp"
    assert found["claims"]["vm_unique_id"] == VM_ID.lower()
    assert found["claims"]["secure_boot"] is True
    assert len(found["claims"]["certificates"]) == 3
    assert found["warnings"].keys() == {"NO_FLOOR", "REVOCATION_UNKNOWN", "NO_AK_CERTIFICATE", "NO_PCR_VALUES"}


def test_secure_boot_off_is_told_and_is_for_policy_to_judge() -> None:
    claims = claims_json(**{"vm-configuration": {"secure-boot": False, "vmUniqueId": VM_ID}})
    assert judge(snp(claims)).facts.secure_boot is False


def test_claims_count_by_their_bytes() -> None:
    claims = CLAIMS.replace(b": ", b" :\t")
    assert judge(snp(claims)).endorsed_by == "amd-sev-snp"


def test_by_default_only_the_real_makers_are_believed() -> None:
    assert PlatformParty(at=NOW).pins is SHIPPED
    assert set(SHIPPED.amd_roots.values()) == {"milan", "genoa", "turin"}
    assert all(len(each) == 32 for each in (*AMD_ROOTS, *INTEL_ROOTS, *AZURE_VTPM_ROOTS))
    for evidence in (SNP, TDX, TRUSTED_LAUNCH):
        assert judge(evidence, PlatformParty(at=NOW)).endorsed_by == "none"


# --- chains ---


def milan_chain(*certificates: x509.Certificate, at: datetime = NOW) -> None:
    verify_tee_chain(certificates, PINS.amd_roots, at)


def middle(extensions: Sequence[Extension], **changed: datetime) -> tuple[x509.Certificate, ...]:
    """The chip's chain with a CA of these extensions."""
    ask = AMD.ark.issue("SEV-milan", AMD.ask.key, extensions, **changed)
    return AMD.vcek.certificate, ask.certificate, AMD.ark.certificate


@pytest.mark.parametrize(
    ("extensions", "slug"),
    [
        ((), "NOT_A_CA"),
        (((x509.BasicConstraints(ca=True, path_length=None), True),), "NOT_A_CA"),
        (((x509.BasicConstraints(ca=False, path_length=None), True), (usage("key_cert_sign"), True)), "NOT_A_CA"),
        ((*CA_EXTENSIONS, (x509.OCSPNoCheck(), True)), "UNKNOWN_CRITICAL_EXTENSION"),
        (
            (*CA_EXTENSIONS, (x509.NameConstraints(None, [x509.DNSName("x")]), False)),
            "UNKNOWN_CRITICAL_EXTENSION",
        ),
    ],
)
def test_refuses_an_issuer_that_may_not_issue(extensions: Sequence[Extension], slug: str) -> None:
    with pytest.raises(HostileInput) as caught:
        milan_chain(*middle(extensions))
    assert caught.value.slug == slug


def test_refuses_a_chain_deeper_than_its_root_allows() -> None:
    key = rsa.generate_private_key(65537, 2048)
    short: tuple[Extension, ...] = ((x509.BasicConstraints(ca=True, path_length=0), True), CA_EXTENSIONS[1])
    stranger = Maker.root("stranger", key)
    root = stranger.issue("stranger", key, short)
    ca = root.issue("SEV-milan", AMD.ask.key)
    with pytest.raises(HostileInput) as caught:
        verify_tee_chain(
            (AMD.vcek.certificate, ca.certificate, root.certificate), {spki_digest(root.certificate)}, NOW
        )
    assert caught.value.slug == "PATH_TOO_LONG"


def test_refuses_a_ca_as_the_key_of_a_report() -> None:
    extensions = (CA_EXTENSIONS[0], (usage("digital_signature", "key_cert_sign"), True), *chip_extensions())
    vcek = AMD.ask.issue("SEV-VCEK", AMD.vcek.key, extensions)
    with pytest.raises(HostileInput) as caught:
        milan_chain(vcek.certificate, *AMD.certificates[1:])
    assert caught.value.slug == "WRONG_PURPOSE"


def test_refuses_a_certificate_for_something_other_than_signing() -> None:
    extensions: tuple[Extension, ...] = ((usage("key_encipherment"), True), *chip_extensions())
    vcek = AMD.ask.issue("SEV-VCEK", AMD.vcek.key, extensions)
    with pytest.raises(HostileInput) as caught:
        milan_chain(vcek.certificate, *AMD.certificates[1:])
    assert caught.value.slug == "WRONG_PURPOSE"


def test_refuses_a_weak_key_on_the_way() -> None:
    weak = AMD.ark.issue("SEV-milan", rsa.generate_private_key(65537, 1024))
    with pytest.raises(HostileInput) as caught:
        milan_chain(AMD.vcek.certificate, weak.certificate, AMD.ark.certificate)
    assert caught.value.slug == "WEAK_KEY"


def test_refuses_a_chain_of_another_length() -> None:
    for certificates in (AMD.certificates[:2], (*AMD.certificates, AMD.ark.certificate), AMD.certificates[2:]):
        with pytest.raises(HostileInput) as caught:
            milan_chain(*certificates)
        assert caught.value.slug == "CHAIN_LENGTH"


def test_refuses_names_that_do_not_follow_each_other() -> None:
    other = AMD.ark.issue("SEV-other", AMD.ask.key).certificate
    with pytest.raises(HostileInput) as caught:
        milan_chain(AMD.vcek.certificate, other, AMD.ark.certificate)
    assert caught.value.slug == "WRONG_ISSUER"


def test_refuses_a_chain_before_and_after_its_time() -> None:
    for at, slug in (
        (NOW - timedelta(days=366), "CERTIFICATE_NOT_YET_VALID"),
        (NOW + timedelta(days=366), "CERTIFICATE_EXPIRED"),
    ):
        with pytest.raises(HostileInput) as caught:
            milan_chain(*AMD.certificates, at=at)
        assert caught.value.slug == slug


def test_refuses_a_time_without_a_zone_as_the_callers_fault() -> None:
    with pytest.raises(Misuse) as caught:
        milan_chain(*AMD.certificates, at=NOW.replace(tzinfo=None))
    assert caught.value.slug == "NAIVE_TIME"


def test_refuses_two_authorities_of_one_name() -> None:
    twin = AMD.ark.issue("SEV-milan", rsa.generate_private_key(65537, 2048)).certificate
    with pytest.raises(HostileInput) as caught:
        order_chain([*AMD.certificates, twin], {"SEV-VCEK"})
    assert caught.value.slug == "AMBIGUOUS_ISSUER"


def test_refuses_more_certificates_than_it_will_search() -> None:
    with pytest.raises(HostileInput) as caught:
        order_chain([AMD.ark.certificate] * 17, {"SEV-VCEK"})
    assert caught.value.slug == "TOO_MANY_CERTIFICATES"


def test_refuses_a_key_on_another_curve() -> None:
    leaf = AMD.ask.issue("SEV-VCEK", ec.generate_private_key(ec.SECP256R1()), chip_extensions())
    with pytest.raises(HostileInput) as caught:
        leaf_key(leaf.certificate, "secp384r1")
    assert caught.value.slug == "WEAK_KEY"


# --- what AMD certifies ---


def test_reads_chip_and_firmware_of_a_certificate() -> None:
    found = chip_certificate(AMD.vcek.certificate, vlek=False)
    assert (found.product, found.tcb, found.chip_id) == ("milan", Tcb(4, 0, 24, 219), CHIP)


def test_a_vlek_names_a_cloud_and_no_chip() -> None:
    extensions = chip_extensions(vlek=True)
    assert chip_certificate(AMD.leaf("SEV-VLEK", extensions).vcek.certificate, vlek=True).chip_id is None
    for nobody in (None, b"\x16\0"):
        extensions = chip_extensions(vlek=True, x5=nobody)  # type: ignore[arg-type]
        with pytest.raises(HostileInput) as caught:
            chip_certificate(AMD.leaf("SEV-VLEK", extensions).vcek.certificate, vlek=True)
        assert caught.value.slug == "BAD_CERTIFICATE"


def test_pads_the_short_chip_id_of_turin() -> None:
    found = chip_certificate(Amd.make("turin").vcek.certificate, vlek=False)
    assert found.chip_id == CHIP[:8] + bytes(56)
    assert found.tcb.fmc == 1


@pytest.mark.parametrize(
    ("changed", "slug"),
    [
        ({"x2": None}, "BAD_CERTIFICATE"),
        ({"x2": b"\x16\x05Milan"}, None),
        ({"x2": b"\x16\x04Rome"}, "UNKNOWN_PRODUCT"),
        ({"x2": b"\x16\x09Milan"}, "BAD_CERTIFICATE"),
        ({"x3_1": None}, "BAD_CERTIFICATE"),
        ({"x3_8": b"\2\2\0\x01"}, "BAD_CERTIFICATE"),
        ({"x3_8": b"\2\1\xdb"}, "BAD_CERTIFICATE"),
        ({"x3_8": b"\2\2\1\0"}, "BAD_CERTIFICATE"),
        ({"x3_4": b"\2\1\1"}, "BAD_CERTIFICATE"),
        ({"x4": bytes(63)}, "BAD_CERTIFICATE"),
    ],
)
def test_reads_extensions_strictly(changed: dict[str, bytes | None], slug: str | None) -> None:
    certificate = AMD.leaf(extensions=chip_extensions(**changed)).vcek.certificate  # type: ignore[arg-type]
    if slug is None:
        assert chip_certificate(certificate, vlek=False).product == "milan"
        return
    with pytest.raises(HostileInput) as caught:
        chip_certificate(certificate, vlek=False)
    assert caught.value.slug == slug


def test_the_hcl_report_may_be_of_the_old_size() -> None:
    claims = claims_json(batch=None)
    old = hcl_report(AMD.report(claims), claims, version=1, tail=bytes(2048 - 1236 - len(claims)))
    assert len(old) == 2048
    assert judge(replace(SNP, report=old)).endorsed_by == "amd-sev-snp"
