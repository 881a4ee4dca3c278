"""Attacks on who vouches for the vTPM, one or more for each numbered step; each names what stops it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.verifier import platform
from cgpu_agent.verifier.platform import (
    SNP_STEPS,
    TDX_STEPS,
    TRUSTED_LAUNCH_STEPS,
    batch_user_data,
)
from cgpu_agent.verifier.platformcase import PlatformEvidence, SnpFloor
from cgpu_agent.verifier.roots.platform import SHIPPED
from cgpu_agent.wire.tpm import extend
from fixtures import attacks_on_platforms as attacks
from fixtures import platform as world
from fixtures.attacks_on_platforms import ATTACKS, Given
from fixtures.platform import (
    AK,
    AK_CERTIFICATE,
    AMD,
    AZURE_CA,
    BATCH,
    CAS,
    CLAIMS,
    PARTY,
    SNP,
    TDX,
    TRUSTED_LAUNCH,
    VM_ID,
    claims_json,
    hcl_report,
    judge,
    refused,
    snp,
    tcb_bytes,
)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_refuses(attack: Callable[[], Given]) -> None:
    answer = attack().judge()
    assert refused(answer) == ATTACKS[attack]
    assert answer.endorsed_by == "none"
    assert answer.platform_freshness == "boot"
    assert answer.ak is None
    assert answer.facts.measurement is None
    assert answer.trusted == "nobody vouches for this vTPM"


def test_every_step_that_can_refuse_has_an_attack_that_it_stops() -> None:
    cannot = {"snp.revocation", "tdx.collateral", "platform.hardware"}
    steps = {check.id for check in (*SNP_STEPS, *TDX_STEPS, *TRUSTED_LAUNCH_STEPS)}
    assert {step for step, _ in ATTACKS.values()} == steps - cannot


LISTS = ("_FIRST", "_LAST", "SNP_CHECKS", "TDX_CHECKS", "TRUSTED_LAUNCH_STEPS")
REQUIREMENTS = ("_BOUND", "SNP_REQUIRED", "TDX_REQUIRED")


def without(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LISTS:
        monkeypatch.setattr(platform, name, tuple(each for each in getattr(platform, name) if each.id != step))


@pytest.mark.parametrize(
    "attack",
    [
        attacks.report_about_another_ak,
        attacks.report_of_another_product,
        attacks.certificate_of_another_chip,
        attacks.altered_measurement,
        attacks.guest_open_to_a_debugger,
        attacks.guest_below_the_paravisor_asked,
        attacks.old_firmware,
        attacks.own_code_on_a_rented_epyc,
        attacks.quote_of_the_same_claims_by_other_code,
        attacks.enclave_open_to_a_debugger,
        attacks.own_attestation_key,
        attacks.quote_signed_by_another_key,
        attacks.old_td_module,
        attacks.unknown_td_module,
        attacks.own_code_in_a_td,
        attacks.pcrs_of_another_vm,
        attacks.report_of_another_batch,
    ],
    ids=lambda attack: attack.__name__,
)
def test_without_its_step_the_attack_would_succeed(
    attack: Callable[[], Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = ATTACKS[attack]
    without(step, monkeypatch)
    for name in REQUIREMENTS:
        monkeypatch.setattr(platform, name, getattr(platform, name) - {step})
    assert attack().judge().endorsed_by != "none"


@pytest.mark.parametrize("evidence", [SNP, TDX], ids=["snp", "tdx"])
def test_a_step_that_was_left_out_endorses_nothing(
    evidence: PlatformEvidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    required = platform.SNP_REQUIRED if evidence is SNP else platform.TDX_REQUIRED
    for step in required:
        with monkeypatch.context() as patch:
            without(step, patch)
            assert judge(evidence).endorsed_by == "none", step


# --- attack 1: whose code ---


def test_own_code_on_a_rented_epyc_is_refused_by_the_paravisor_step_and_by_no_other() -> None:
    answer = attacks.own_code_on_a_rented_epyc().judge()
    assert answer.reason == "unknown paravisor"
    for step in ("snp.chain", "snp.chip", "snp.tcb", "snp.signature", "snp.policy", "snp.vmpl", "platform.binding"):
        assert answer.passed(step)


def test_the_same_in_a_td() -> None:
    answer = attacks.own_code_in_a_td().judge()
    assert answer.reason == "unknown paravisor"
    assert all(answer.passed(step) for step in ("tdx.chain", "tdx.signature", "tdx.attributes", "tdx.module"))


def test_a_pinned_measurement_is_a_known_paravisor_too() -> None:
    evidence = snp(id_key_digest=bytes(48))
    pins = replace(PARTY.pins, snp_measurements={world.MEASUREMENT: "mine"})
    answer = judge(evidence, replace(PARTY, pins=pins))
    assert answer.endorsed_by == "amd-sev-snp"
    assert answer.facts.code == "mine"


def test_nothing_that_ships_is_the_digest_of_no_key() -> None:
    assert bytes(48) not in SHIPPED.snp_id_keys
    assert not SHIPPED.snp_measurements
    assert not any(attributes[0] & 1 for each in SHIPPED.td_paravisors.values() for attributes in each)


def test_a_refused_report_is_not_rescued_by_a_good_certificate() -> None:
    """Who can spoil the report shall not thereby choose who vouches."""
    evidence = replace(
        attacks.own_code_on_a_rented_epyc().evidence,
        ak_certificate=AK_CERTIFICATE.public_bytes(Encoding.DER),
        ca_certificates=CAS,
    )
    assert judge(evidence).endorsed_by == "none"


# --- attack 11: how old ---


@pytest.mark.parametrize("evidence", [SNP, TDX], ids=["snp", "tdx"])
def test_without_a_floor_the_verdict_says_so(evidence: PlatformEvidence) -> None:
    warnings = judge(evidence).to_json()["warnings"]
    assert isinstance(warnings, dict)
    assert warnings["NO_FLOOR"] == "floor: none configured"


@pytest.mark.parametrize("field", ["bootloader", "tee", "snp", "microcode", "guest_svn"])
def test_each_field_has_its_floor(field: str) -> None:
    have = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219, "guest_svn": 12}[field]
    for floor, outcome in ((have, None), (have + 1, ("snp.floor", "BELOW_FLOOR"))):
        party = replace(PARTY, snp_floor=SnpFloor(**{field: floor}))
        assert refused(judge(SNP, party)) == outcome


def test_the_floor_counts_committed_firmware_too() -> None:
    evidence = snp(committed_tcb=tcb_bytes("milan", 3, 0, 24, 219))
    party = replace(PARTY, snp_floor=SnpFloor(bootloader=4))
    assert refused(judge(evidence, party)) == ("snp.floor", "BELOW_FLOOR")


# --- attack 24: of which boot ---


def test_freshness_is_what_the_signed_claims_say_of_this_batch() -> None:
    assert judge(SNP).platform_freshness == "this-batch"
    assert judge(snp(claims_json(batch=None))).platform_freshness == "boot"
    assert judge(SNP, root=hashlib.sha256(b"later").digest()).platform_freshness == "boot"
    assert judge(SNP, root=None).platform_freshness == "boot"


def test_user_data_is_tied_to_its_purpose() -> None:
    assert batch_user_data(BATCH) == hashlib.sha512(b"cgpu/platform/1" + BATCH).digest()
    plain = claims_json(**{"user-data": hashlib.sha512(BATCH).hexdigest()})
    assert judge(snp(plain)).platform_freshness == "boot"


def test_an_unbound_user_data_makes_nothing_fresh() -> None:
    stale = AMD.report(claims_json(batch=None))
    answer = judge(replace(SNP, report=hcl_report(stale, CLAIMS)))
    assert (answer.endorsed_by, answer.platform_freshness) == ("none", "boot")


# --- attack 32: who is trusted ---


def test_trusted_launch_says_that_the_cloud_operator_is_trusted() -> None:
    answer = judge(TRUSTED_LAUNCH)
    assert answer.endorsed_by == "azure-trusted-launch"
    assert answer.trusted.startswith("cloud operator trusted")
    assert {step.slug for step in answer.warnings} >= {"NO_HARDWARE_REPORT"}


@pytest.mark.parametrize("evidence", [SNP, TDX], ids=["snp", "tdx"])
def test_a_hardware_report_takes_the_operators_host_out_of_it(evidence: PlatformEvidence) -> None:
    assert "the cloud operator's host is not" in judge(evidence).trusted


def test_leaving_out_the_hardware_report_is_seen() -> None:
    leaf = AZURE_CA.issue(AK, "0123456789ab.ConfidentialVM.Azure.windows.net").public_bytes(Encoding.DER)
    answer = judge(PlatformEvidence(ak_certificate=leaf, ca_certificates=CAS))
    assert answer.endorsed_by == "azure-trusted-launch"
    assert any("who left it out" in step.detail for step in answer.warnings)


def test_pcr6_follows_from_the_uuid_with_and_without_the_step_of_2026() -> None:
    uuid = hashlib.sha256(f"UUID: {VM_ID}".encode()).digest()
    machine = hashlib.sha256(b'{"MachineArchitecture": "X64"}').digest()
    end = hashlib.sha256(bytes(4)).digest()
    for events in ([uuid, end], [uuid, machine, end]):
        value = bytes(32)
        for event in events:
            value = extend("sha256", value, event)
        answer = judge(SNP, pcrs={6: value})
        assert answer.passed("platform.pcr6")
        assert answer.endorsed_by == "amd-sev-snp"
