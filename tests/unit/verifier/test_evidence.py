"""What the verdict on good evidence says, and what a relying party can let pass."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.verifier.verdict import Outcome
from cgpu_agent.wire import eventlog
from cgpu_agent.wire.manifest import parse_manifest
from cgpu_agent.wire.tpm import extend
from fixtures.attest import Signer, ecc_key, rsa_key
from fixtures.bundles import (
    AUDIENCE,
    BOOT_LOG,
    GENUINE,
    PARTY,
    PLATFORM_AK,
    QUOTED,
    RECORDED_PCRS,
    ROOT,
    agent_records,
    bent,
    made,
    name_of,
    pcrs_after,
    statement,
    stating,
)
from fixtures.eventlogs import EV_DRIVER_CONFIG, record, secure_boot_variable
from fixtures.pki import NOW


def accepted(data: bytes, party: RelyingParty = PARTY) -> EvidenceResult:
    result = verify_evidence(data, party)
    assert result.accepted, result.refusal
    assert result.refusal is None
    return result


def skipped(result: EvidenceResult) -> dict[str, str | None]:
    return {step.id: step.slug for step in result.steps if step.outcome is Outcome.SKIP}


def test_hands_over_what_was_signed_and_what_the_steps_found() -> None:
    result = accepted(GENUINE.encode())
    assert result.statement == statement()
    assert result.manifest == parse_manifest(GENUINE.manifest)
    assert result.records == agent_records()
    assert result.boot_log is not None
    assert result.secure_boot is not None
    assert result.secure_boot.state == "enabled"
    assert result.endorsement is not None
    assert result.endorsement.kind == "ak-certificate"
    assert {index: found.status for index, found in result.registers.items()} == dict.fromkeys(QUOTED, "explained")
    assert [step.outcome for step in result.quote_steps] == [Outcome.PASS] * 8
    gpu_steps = ("gpus.lane", "gpus.inventory", "gpus.devices")
    not_asked = dict.fromkeys(("statement.binding", *gpu_steps), "NOT_ASKED")
    assert skipped(result) == {**not_asked, "platform.report": "NO_HARDWARE_REPORT"}


@pytest.mark.parametrize("size", [1, 2, 7])
def test_accepts_every_caller_of_a_batch(size: int) -> None:
    statements = tuple(statement(salt=bytes([i]) * 16) for i in range(size))
    for index in range(size):
        result = accepted(made(statements=statements, index=index))
        assert result.statement == statements[index]


def test_accepts_what_the_caller_bound() -> None:
    party = replace(PARTY, user_data=b"data", public_key=b"key")
    result = accepted(stating(user_data=b"data", public_key=b"key"), party)
    assert "statement.binding" not in skipped(result)


@pytest.mark.parametrize("key", [ecc_key(), rsa_key()], ids=["ecc", "rsa"])
def test_accepts_an_agent_ak_of_either_kind(key: object) -> None:
    assert accepted(made(agent=Signer(key))).accepted  # type: ignore[arg-type]


def test_accepts_a_platform_ak_on_p256() -> None:
    platform = Signer(ecc_key())
    certificate = ROOT.issue(platform.key.public_key()).public_bytes(Encoding.DER)
    assert accepted(made(platform=platform, platform_certificate=certificate)).accepted


def test_accepts_a_certificate_from_an_nv_index_with_its_padding() -> None:
    padded = (GENUINE.platform_ak_certificate or b"") + bytes(100)
    assert accepted(bent(platform_ak_certificate=padded)).accepted


def test_accepts_a_certificate_below_an_intermediate_that_the_relying_party_has() -> None:
    middle = ROOT.intermediate("middle")
    leaf = middle.issue(PLATFORM_AK.key.public_key()).public_bytes(Encoding.DER)
    party = replace(PARTY, intermediates=(middle.certificate,))
    assert accepted(bent(platform_ak_certificate=leaf), party).accepted
    assert not verify_evidence(bent(platform_ak_certificate=leaf), PARTY).accepted


def test_a_pinned_name_vouches_for_the_platform_ak() -> None:
    party = replace(PARTY, roots=(), pinned_names=frozenset({name_of(PLATFORM_AK)}))
    result = accepted(GENUINE.encode(), party)
    assert result.endorsement is not None
    assert (result.endorsement.kind, result.endorsement.path) == ("pinned", None)


def test_a_pinned_name_covers_the_attributes_that_a_certificate_does_not() -> None:
    """A certificate is for a key; the description that comes with it in the bundle is nobody's word."""
    lied = replace(PLATFORM_AK, policy=b"p" * 32).public()
    assert accepted(bent(platform_ak=lied)).accepted
    party = replace(PARTY, roots=(), pinned_names=frozenset({name_of(PLATFORM_AK)}))
    refusal = verify_evidence(bent(platform_ak=lied), party).refusal
    assert refusal is not None
    assert refusal.slug == "UNENDORSED"


def test_allowing_no_endorsement_leaves_a_mark() -> None:
    data = made(platform=Signer(ecc_key()), platform_certificate=None)
    result = accepted(data, replace(PARTY, allow_unendorsed=True))
    assert skipped(result)["platform-ak.endorsement"] == "UNENDORSED"
    assert result.endorsement is not None
    assert result.endorsement.kind == "none"


def test_allowing_no_endorsement_lets_no_bad_certificate_pass() -> None:
    party = replace(PARTY, allow_unendorsed=True, at=NOW + timedelta(days=400))
    refusal = verify_evidence(GENUINE.encode(), party).refusal
    assert refusal is not None
    assert refusal.slug == "CERTIFICATE_EXPIRED"


def test_allowing_no_boot_log_leaves_a_mark() -> None:
    result = accepted(made(boot_log=None), replace(PARTY, allow_no_boot_log=True))
    assert skipped(result)["logs.boot"] == "NO_BOOT_LOG"
    assert skipped(result)["boot.secure-boot"] == "NO_BOOT_LOG"
    assert result.registers[7].status == "unexplained"
    assert result.registers[13].status == "explained"


def test_allowing_no_boot_log_lets_no_wrong_one_pass() -> None:
    party = replace(PARTY, allow_no_boot_log=True)
    other = made(boot_log=BOOT_LOG, pcrs=dict.fromkeys(range(24), bytes(32)))
    refusal = verify_evidence(other, party).refusal
    assert refusal is not None
    assert refusal.slug == "LOG_REPLAY_MISMATCH"


def test_a_machine_without_a_systemd_log_is_no_worse() -> None:
    assert accepted(made(systemd_log=None, quoted=(*range(10), 13, 14))).accepted


def test_a_pcr_that_no_log_explains_is_reported() -> None:
    result = accepted(made(quoted=(*QUOTED, 10)))
    assert result.registers[10].status == "unexplained"


def test_accepts_the_register_that_the_relying_party_expects() -> None:
    data = made(register=15, quoted=(*QUOTED, 15))
    assert accepted(data, replace(PARTY, register=15)).accepted


@pytest.mark.parametrize("register", [-1, 16, 23, 24])
def test_a_relying_party_cannot_expect_a_register_that_can_be_reset(register: int) -> None:
    with pytest.raises(Misuse, match="BAD_REGISTER"):
        replace(PARTY, register=register)


def test_a_secure_boot_state_that_is_not_known_is_no_pass() -> None:
    """A second SecureBoot variable after the separator: the log replays, and says two things."""
    more = record(7, EV_DRIVER_CONFIG, secure_boot_variable(b"\0"))
    digest = eventlog.parse(BOOT_LOG + more, kind="tpm").events[-1].digest("sha256")
    assert digest is not None
    held = {**pcrs_after(agent_records()), 7: extend("sha256", RECORDED_PCRS[7], digest)}
    result = accepted(made(boot_log=BOOT_LOG + more, pcrs=held))
    assert skipped(result)["boot.secure-boot"] == "SECURE_BOOT_UNKNOWN"


def test_a_moment_without_a_time_zone_is_refused() -> None:
    refusal = verify_evidence(GENUINE.encode(), replace(PARTY, at=NOW.replace(tzinfo=None))).refusal
    assert refusal is not None
    assert refusal.slug == "NAIVE_TIME"


@pytest.mark.parametrize("audience", ["", "\ud800", AUDIENCE.upper()])
def test_any_audience_of_a_relying_party_is_compared(audience: str) -> None:
    refusal = verify_evidence(GENUINE.encode(), replace(PARTY, audience=audience)).refusal
    assert refusal is not None
    assert refusal.id == "statement.audience"


def test_an_empty_nonce_matches_nothing() -> None:
    refusal = verify_evidence(GENUINE.encode(), replace(PARTY, nonce=b"")).refusal
    assert refusal is not None
    assert refusal.slug == "NONCE_MISMATCH"
