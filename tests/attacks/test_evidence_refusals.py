"""Attacks on evidence: each names the step that must stop it, and without that step it would have succeeded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier import evidence
from cgpu_agent.verifier.evidence import EVIDENCE_CHECKS, Case, EvidenceResult, verify_evidence
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.verdict import Check, Outcome, Skip
from cgpu_agent.wire.tpm import parse_attest
from fixtures.attacks_on_keys_and_logs import KEY_AND_LOG_ATTACKS
from fixtures.attacks_on_lanes import LANE_ATTACKS
from fixtures.attacks_on_statements import STATEMENT_ATTACKS
from fixtures.bundles import GENUINE, PARTY
from fixtures.catalogue import Attack

ATTACKS = [*STATEMENT_ATTACKS, *KEY_AND_LOG_ATTACKS, *LANE_ATTACKS]
REPORTS_ONLY = {"boot.secure-boot"}
"""Tells what booted and refuses nothing: a log without SHA-256 digests was refused when it was replayed."""


def judge(attack: Attack) -> EvidenceResult:
    return verify_evidence(attack.make(), attack.party)


def test_the_bundle_that_all_attacks_start_from_is_accepted() -> None:
    result = verify_evidence(GENUINE.encode(), PARTY)
    assert result.accepted
    assert [step.id for step in result.steps] == [check.id for check in EVIDENCE_CHECKS]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_the_named_step_refuses(attack: Attack) -> None:
    refusal = judge(attack).refusal
    assert refusal is not None
    assert (refusal.id, refusal.slug) == (attack.step, attack.slug)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_nothing_is_claimed_of_refused_evidence(attack: Attack) -> None:
    result = judge(attack)
    assert not result.accepted
    assert result.statement is None
    assert result.manifest is None
    assert result.endorsement is None
    assert result.secure_boot is None
    assert result.boot_log is None
    assert (dict(result.registers), result.records) == ({}, ())
    at = [check.id for check in EVIDENCE_CHECKS].index(attack.step)
    assert [step.slug for step in result.steps[at + 1 :]] == ["AFTER_REFUSAL"] * (len(EVIDENCE_CHECKS) - at - 1)


def _read_the_quote(case: Case) -> str:
    bundle, _, _ = case.parts
    case.agent_ak, case.quote = load_attestation_key(bundle.agent_ak), parse_attest(bundle.quote.attest)
    return "not judged"


def _read_the_certification(case: Case) -> str:
    bundle, _, _ = case.parts
    case.platform_ak = load_attestation_key(bundle.platform_ak)
    case.certify = parse_attest(bundle.agent_ak_certify.attest)
    return "not judged"


def _replay_the_logs(case: Case) -> str:
    # It compares the registers before it refuses.
    judges = {check.id: check.judge for check in EVIDENCE_CHECKS}
    with suppress(HostileInput):
        judges["logs.boot"](case)
    return "not judged"


STAND_INS: dict[str, Callable[[Case], str | Skip]] = {
    "manifest.quote": _read_the_quote,
    "agent-ak.certify": _read_the_certification,
    "logs.boot": _replay_the_logs,
}
"""Steps that also find out what later steps need: the same without the judgement."""

LOAD_BEARING = {"bundle.format", *STAND_INS}


def _without(step: str) -> tuple[Check[Case], ...]:
    """The sequence without one step, or with a stand-in that lets everything pass."""
    stand_in = STAND_INS.get(step)
    if stand_in is None:
        return tuple(check for check in EVIDENCE_CHECKS if check.id != step)
    return tuple(Check(check.id, "", stand_in) if check.id == step else check for check in EVIDENCE_CHECKS)


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.alone], ids=str)
def test_without_its_step_the_attack_succeeds(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "EVIDENCE_CHECKS", _without(attack.step))
    result = judge(attack)
    assert result.accepted, result.refusal


def test_every_step_is_all_that_stops_some_attack() -> None:
    """Nothing can do without the format step: it is what makes a bundle of bytes at all."""
    steps = {check.id for check in EVIDENCE_CHECKS}
    assert {attack.step for attack in ATTACKS} == steps - REPORTS_ONLY
    assert {attack.step for attack in ATTACKS if attack.alone} == steps - REPORTS_ONLY - {"bundle.format"}


@pytest.mark.parametrize("step", sorted(LOAD_BEARING))
def test_without_a_step_that_others_rest_on_nothing_is_accepted(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "EVIDENCE_CHECKS", tuple(c for c in EVIDENCE_CHECKS if c.id != step))
    refusal = verify_evidence(GENUINE.encode(), PARTY).refusal
    assert refusal is not None


def test_without_the_reporting_step_nothing_is_said_of_secure_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify_evidence(GENUINE.encode(), PARTY).secure_boot is not None
    monkeypatch.setattr(evidence, "EVIDENCE_CHECKS", _without("boot.secure-boot"))
    result = verify_evidence(GENUINE.encode(), PARTY)
    assert result.secure_boot is None
    assert "boot.secure-boot" not in [step.id for step in result.steps]


def test_no_step_at_all_accepts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "EVIDENCE_CHECKS", ())
    assert not verify_evidence(GENUINE.encode(), PARTY).accepted


def test_a_step_that_breaks_down_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(_case: Case) -> str:
        raise ZeroDivisionError("secret of the verifier")

    broken = (*EVIDENCE_CHECKS, Check("extra", "", break_down))
    monkeypatch.setattr(evidence, "EVIDENCE_CHECKS", broken)
    result = verify_evidence(GENUINE.encode(), PARTY)
    assert not result.accepted
    assert result.steps[-1].outcome is Outcome.REFUSE
    assert result.steps[-1].slug == "INTERNAL"
    assert "secret" not in result.steps[-1].detail
