"""The policy decides each part, the whole is its worst required part, and every answer says why."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from cgpu_agent.cedar.engine import Policies, problems
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.appraisal import PARTS, Appraisal, PartAppraisal, appraise
from cgpu_agent.verifier.claims import claims_of
from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.verifier.facts import gather
from cgpu_agent.verifier.reference import Reference, make_reference, parse_reference
from cgpu_agent.verifier.trustvector import CLAIMS
from fixtures import boots
from fixtures.bundles import GENUINE, PARTY, PLATFORM_AK, caller, made, name_of, stating

PINNING = replace(PARTY, pinned_names=frozenset({name_of(PLATFORM_AK)}))
ALL = '@id("all") permit (principal, action == CGpu::Action::"require", resource);'
AFFIRM = '@id("a") permit (principal, action == CGpu::Action::"affirm", resource);'


@cache
def policy(text: str | None = None) -> Policies:
    return Policies.load(default_appraisal() if text is None else text, appraisal_schema(), "policy")


def judged(data: bytes | None = None, party: RelyingParty = PINNING) -> EvidenceResult:
    result = verify_evidence(GENUINE.encode() if data is None else data, party)
    assert result.accepted, result.refusal
    return result


def reference_of(result: EvidenceResult, **options: Any) -> Reference:
    return parse_reference(make_reference(result, pcrs=range(10), **options))


def verity(**changed: Any) -> EvidenceResult:
    return judged(made(**boots.with_command_line(boots.VERITY), **changed))


def part(appraisal: Appraisal, name: str) -> PartAppraisal:
    return next(each for each in appraisal.parts if each.part == name)


def statuses(appraisal: Appraisal) -> dict[str, str]:
    return {each.part: each.status for each in appraisal.parts}


def test_the_default_policy_is_valid() -> None:
    assert problems(default_appraisal(), appraisal_schema()) == ()


def test_affirms_a_known_vm_with_a_measured_root_that_boots_as_expected() -> None:
    result = verity()
    found = appraise(result, policy(), reference_of(result))
    assert found.status == "affirming"
    assert found.good
    assert statuses(found) == {**dict.fromkeys(PARTS, "affirming"), "gpus": "none"}
    assert part(found, "agent").rules == ("measured-agent",)
    assert part(found, "agent").better is None


def test_warns_where_only_the_agent_says_so() -> None:
    result = judged()
    found = appraise(result, policy(), reference_of(result))
    assert (found.status, found.good) == ("warning", True)
    assert statuses(found) == {
        "platform": "affirming",
        "boot": "affirming",
        "agent": "warning",
        "gpus": "none",
        "workload": "warning",
    }
    assert part(found, "agent").better == ("a root file system with dm-verity, demanded by the command line",)


def test_warns_where_nobody_said_what_to_expect() -> None:
    found = appraise(judged(), policy(), None)
    assert part(found, "boot").rules == ("some-signed-boot",)
    assert part(found, "boot").better == (
        "a reference (--reference) that the evidence matches",
        "a reference that pins more PCRs (cgpuctl reference make --pcr)",
    )
    assert found.status == "warning"


def test_a_reference_may_name_the_vm_in_place_of_the_relying_party() -> None:
    result = judged(party=PARTY)
    assert appraise(result, policy(), None).status == "contraindicated"
    assert appraise(result, policy(), reference_of(result)).status == "warning"
    assert appraise(result, policy(), reference_of(result, any_instance=True)).status == "contraindicated"


def test_an_enrolled_ak_without_a_certificate_is_accepted_and_not_affirmed() -> None:
    found = appraise(judged(made(platform_certificate=None)), policy(), None)
    assert part(found, "platform").rules == ("enrolled-ak",)
    assert part(found, "platform").status == "warning"
    assert part(found, "platform").better == ("an AK certificate below a root you trust (--ak-root)",)


def test_a_caller_known_by_pid_alone_is_never_affirmed() -> None:
    weak = caller(identity_strength="pid", unit=None, cgroup=None)
    changed = boots.with_command_line(boots.VERITY)
    result = judged(made(statements=(replace(judged().statement, caller=weak),), index=0, **changed))
    found = appraise(result, policy(), reference_of(result))
    assert statuses(found) | {"gpus": "affirming"} == {**dict.fromkeys(PARTS, "affirming"), "workload": "warning"}
    assert part(found, "workload").better is None


def test_differences_from_the_reference_contraindicate_and_are_named() -> None:
    found = appraise(judged(made(**boots.with_command_line(boots.VERITY))), policy(), reference_of(judged()))
    assert [each.what for each in found.differences] == ["pcr-8", "command-line"]
    assert statuses(found) == {
        "platform": "affirming",
        "boot": "contraindicated",
        "agent": "contraindicated",
        "gpus": "none",
        "workload": "contraindicated",
    }


def test_secure_boot_off_debug_mode_and_a_missing_log_contraindicate_the_boot() -> None:
    for changed in (boots.with_secure_boot_off(), boots.with_debug_mode(), {"boot_log": None}):
        found = appraise(judged(made(**changed), replace(PINNING, allow_no_boot_log=True)), policy(), None)
        assert part(found, "boot").status == "contraindicated"
        assert found.status == "contraindicated"


def test_an_ak_that_nobody_vouches_for_contraindicates_every_part() -> None:
    party = replace(PARTY, allow_unendorsed=True)
    found = appraise(judged(made(platform_certificate=None), party), policy(), None)
    assert statuses(found) == {**dict.fromkeys(PARTS, "contraindicated"), "gpus": "none"}


def test_refused_evidence_is_contraindicated_everywhere_by_the_step_that_refused() -> None:
    result = verify_evidence(GENUINE.encode(), replace(PINNING, audience="somebody else"))
    everything = policy(
        '@id("everything") permit (principal, action, resource);',
    )
    found = appraise(result, everything, None)
    assert set(statuses(found).values()) == {"contraindicated"}
    assert not found.good
    assert all("statement.audience [WRONG_AUDIENCE]" in each.reason for each in found.parts)
    assert set(part(found, "boot").vector.values()) == {99}
    with pytest.raises(Misuse) as caught:
        gather(result, "nothing", None, differs=False)
    assert caught.value.slug == "NOT_ACCEPTED"


def test_the_whole_is_the_worst_of_the_required_parts_only() -> None:
    narrow = (
        '@id("r") permit (principal, action == CGpu::Action::"require", resource == CGpu::Part::"boot");'
        '@id("b") permit (principal, action == CGpu::Action::"affirm", resource == CGpu::Part::"boot");'
    )
    found = appraise(judged(), policy(narrow), None)
    assert found.status == "affirming"
    assert statuses(found)["platform"] == "contraindicated"
    assert [each.part for each in found.parts if each.required] == ["boot"]
    assert appraise(judged(), policy(ALL + AFFIRM), None).status == "none"


def test_a_policy_that_requires_nothing_lets_nothing_pass() -> None:
    found = appraise(judged(), policy(AFFIRM), None)
    assert (found.status, found.good) == ("none", False)


def test_a_rule_that_cannot_be_evaluated_requires_rather_than_releases() -> None:
    overflowing = (
        '@id("r") permit (principal, action == CGpu::Action::"require", resource)'
        " when { principal.uid * 9223372036854775807 > 0 };"
        '@id("b") permit (principal, action == CGpu::Action::"require", resource == CGpu::Part::"boot");'
        '@id("c") permit (principal, action == CGpu::Action::"affirm", resource == CGpu::Part::"boot");'
    )
    found = appraise(judged(), policy(overflowing), None)
    assert all(each.required for each in found.parts)
    assert found.status == "contraindicated"


def test_a_forbid_is_named_as_the_rule_that_decided() -> None:
    text = (
        f'{ALL} @id("yes") permit (principal, action, resource);'
        '@id("no-model") forbid (principal, action == CGpu::Action::"accept", resource == CGpu::Part::"workload")'
        ' when { principal.unit == "model.service" };'
        '@id("no-affirming") forbid (principal, action == CGpu::Action::"affirm", resource);'
    )
    found = part(appraise(judged(), policy(text), None), "workload")
    assert (found.status, found.rules) == ("contraindicated", ("no-model",))
    assert "no-model" in found.reason
    assert found.better is None


def test_says_the_least_that_would_change_the_answer() -> None:
    party = replace(PARTY, pinned_names=frozenset())
    found = part(appraise(judged(party=party), policy(), None), "platform")
    assert found.better == ('the VM named by you (--ak-name, or "instances" in the reference)',)


def test_what_a_policy_may_test_is_a_complete_record() -> None:
    result = judged(stating(public_key=b"\x30\x03\x02\x01\x05", user_data=b"x"))
    facts, workload = gather(result, "nothing", None, differs=False)
    assert facts.context() == {
        "endorsement": "ak-certificate",
        "simulated": False,
        "instance": "pinned",
        "boot_log": "explained",
        "secure_boot": "enabled",
        "debug": "off",
        "agent_coverage": "nothing",
        "reference": "not-given",
        "reference_pcrs": frozenset(),
        "reference_pins": frozenset(),
        "platform_freshness": "none",
        "platform_floor": "none-configured",
        "gpus": "not-asked",
        "gpu_count": 0,
        "gpu_simulated": False,
        "gpu_architectures": frozenset(),
        "gpu_measurements": "not-compared",
        "gpu_revocation": "unknown",
        "gpu_floor": "none-configured",
        "gpu_cc": "unknown",
        "gpu_production": "unknown",
        "gpu_dev_tools": "unknown",
        "gpu_ready": False,
        "lane": "boot",
        "purpose": "evidence",
        "key_id": "",
        "audience": PARTY.audience,
        "key": "claimed",
    }
    assert workload.attrs["unit"] == "model.service"
    assert workload.attrs["root"] is False


def test_debug_mode_is_known_by_its_digest() -> None:
    party = replace(PINNING, allow_no_boot_log=True)
    for data, debug in ((made(**boots.with_debug_mode()), "on"), (made(boot_log=None), "unknown")):
        facts, _ = gather(judged(data, party), "nothing", None, differs=False)
        assert facts.debug == debug


def test_a_caller_known_by_pid_alone_has_no_name_that_a_policy_could_test() -> None:
    # An agent never says so; a policy must not lean on it if one does.
    lying = caller(identity_strength="pid", uid=0)
    _, workload = gather(judged(stating(caller=lying)), "nothing", None, differs=False)
    assert (workload.attrs["unit"], workload.attrs["cgroup"], workload.attrs["has_unit"]) == ("", "", False)
    assert workload.attrs["root"] is False


def test_signed_claims_and_the_agents_words_never_share_an_object() -> None:
    result = judged()
    found = appraise(result, policy(), None)
    claims = {name: claims_of(name, result, found.facts, found.coverage) for name in PARTS}
    assert claims["boot"].signed["secure_boot"] == "enabled"
    assert claims["platform"].reported == claims["boot"].reported == {}
    assert claims["workload"].signed == {}
    assert claims["workload"].reported["caller"] == caller()
    assert claims["workload"].reported["measured_by"] == "nothing"
    assert "build" not in claims["agent"].signed
    assert claims["agent"].reported["build"] == "aa" * 32
    assert (claims["gpus"].signed, claims["gpus"].reported) == ({}, {})


def test_vectors_hold_every_claim_and_assert_only_what_was_shown() -> None:
    result = judged()
    found = appraise(result, policy(), reference_of(result))
    assert all(tuple(each.vector) == CLAIMS for each in found.parts)
    shown = {each.part: {name: value for name, value in each.vector.items() if value} for each in found.parts}
    assert shown == {
        "platform": {"hardware": 2, "instance-identity": 2},
        "boot": {"configuration": 2, "executables": 3},
        "agent": {"executables": 33},
        "gpus": {},
        "workload": {},
    }


def test_is_plain_json() -> None:
    result = judged()
    document = json.loads(json.dumps(appraise(result, policy(), reference_of(result)).to_json()))
    assert document["status"] == "warning"
    assert document["parts"]["platform"]["status"] == "affirming"
    assert document["policy_sha256"] == policy().digest
